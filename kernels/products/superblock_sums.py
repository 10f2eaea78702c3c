"""The orders in which dot products of superblocks are summed: one class per order that ggml has.

BIAS and minimums are added at the same point, and over the same number of lanes, as in ggml's x86-64 code; float sums
depend on that order, and so results equal ggml's bit for bit. In each class, `step` takes the result of
`Superblocks.opened`: quants q, scales by lanes s, factor d, and the class's own `correction`.
Source: ggml-cpu/arch/x86/quants.c, ggml_vec_dot_q2_K_q8_K and the other functions named ggml_vec_dot_*_q8_K.
"""

import numpy as np

from ..machine.jit import inline
from ..machine.lanes import even, first, fma, low, total
from ..machine.template import STAMPED, part
from ..machine.vectors import f32x1, f32x4, f32x8, load_f32x1, load_i16x8, load_i16x16, to_f32, to_i16
from .superblocks import Superblocks, sums_of_biased_products, sums_of_pairs, sums_of_products


@inline
def scale_of(record):
    """The scale d of a token's superblock."""
    return first(load_f32x1(record + 304))


class OneSum(Superblocks):
    """8 lanes of sums, which the three classes below share."""

    @part
    def nothing():
        """The sums before the first superblock: 8 lanes of 0."""
        return f32x8(0)

    @part
    def whole(acc):
        """The dot product: the lanes added up."""
        return total(acc)


class BiasByLane(OneSum):
    """BIAS is subtracted lane by lane, with the sums c of four activations."""

    @part
    def step(acc, opened, record):
        """The sums with a superblock added; each dot4 starts from c, which subtracts BIAS before the scale."""
        q, s, d, _ = opened
        return fma(to_f32(sums_of_biased_products(q, s, record)), d * scale_of(record), acc)


class BiasBy16(OneSum):
    """BIAS is subtracted with the sums of 16 activations, two of them per lane."""

    @part
    def correction(block):
        """The scales as i16, and BIAS."""
        return to_i16(fmt.scales(block)), fmt.BIAS

    @part
    def step(acc, opened, record):
        """The sums with a superblock added; scale times BIAS times each sum of 16 activations is subtracted first."""
        q, s, d, (s16, bias) = opened
        sums = sums_of_products(q, s, record) - sums_of_pairs(s16, load_i16x16(record + 256)) * bias
        return fma(to_f32(sums), d * scale_of(record), acc)


class MinimumsOf16(OneSum):
    """Minimums times the sums of 16 activations, two of them per lane, are subtracted before the products are added."""

    @part
    def correction(block):
        """The minimums as i16, and dmin."""
        return to_i16(fmt.minimums(block)), fmt.min_factor(block)

    @part
    def step(acc, opened, record):
        """The sums with a superblock added: first the minimums are subtracted, then the products are added."""
        q, s, d, (m, dmin) = opened
        scale = scale_of(record)
        acc = fma(to_f32(sums_of_pairs(m, load_i16x16(record + 256))), dmin * -scale, acc)
        return fma(to_f32(sums_of_products(q, s, record)), d * scale, acc)


class MinimumsOf32(Superblocks):
    """Minimums times the sums of 32 activations are summed apart, in 4 lanes."""

    @part
    def correction(block):
        """One minimum per 32 weights as i16, and dmin in 4 lanes."""
        return to_i16(even(fmt.minimums(block))), low(fmt.min_factor(block))

    @part
    def nothing():
        """The sums before the first superblock: 8 lanes for the products, 4 for the minimums."""
        return f32x8(0), f32x4(0)

    @part
    def step(acc, opened, record):
        """Both sums with a superblock added."""
        q, s, d, (m, dmin) = opened
        scale = scale_of(record)
        below = fma(to_f32(sums_of_pairs(m, load_i16x8(record + 288))), dmin * -scale, acc[1])
        return fma(to_f32(sums_of_products(q, s, record)), d * scale, acc[0]), below

    @part
    def whole(acc):
        """The dot product: the lanes of both sums added up."""
        return total(acc[0]) + total(acc[1])


class MinimumsInOne(MinimumsOf32):
    """Minimums times the sums of 32 activations are one whole number per superblock before the float product."""

    @part
    def nothing():
        """The sums before the first superblock: 8 lanes for the products, 1 for the minimums."""
        return f32x8(0), f32x1(0)

    @part
    def step(acc, opened, record):
        """Both sums with a superblock added."""
        q, s, d, (m, dmin) = opened
        scale = scale_of(record)
        below = f32x1(np.float32(total(sums_of_pairs(m, load_i16x8(record + 288)))))
        below = fma(below, first(dmin) * -scale, acc[1])
        return fma(to_f32(sums_of_products(q, s, record)), d * scale, acc[0]), below


fmt: Superblocks = STAMPED
