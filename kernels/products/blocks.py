"""Blocks of 32 weights: products with a few tokens, and unpacking.

Activations are quantised in groups of 32 and lie in records of 256 bytes for two groups, with the vectors q, c, d, s at
bytes 0, 64, 128 and 192, see activations.py. The dot product of a group of weights with one of activations is

    sum over 8 lanes of  scale * d * (dot4(quants, q) + c)   +   minimum * s

where c = -BIAS * (the sum of four q): the quants are unsigned, and c turns them into quant - BIAS.

Sums are taken in the order of ggml's code for x86-64 with AVX-512, so that results equal ggml's bit for bit: 8 lanes,
group after group; the minimums have a separate sum (arch/x86/quants.c; llamafile/sgemm.cpp, tinyBLAS_Q0_AVX). One
token and several are summed alike, so a token's result is the same whatever the batch.
"""

from ..machine.cpu import dot4
from ..machine.lanes import concat, first, fma, high, low, total
from ..machine.simd import store
from ..machine.template import STAMPED, abstract, part
from ..machine.vectors import f32x8, load_f32x16, load_i8x64, load_i32x16, spread, to_f32, u8x32
from .activations import first_record
from .loops import Products


class Blocks(Products):
    """A format of blocks of 32 weights with one scale: weight = scale * (quant - BIAS).

    Lengths count groups of 32 weights. `row` is the address of a row, j the number of a group in it.
    """

    BLOCK, ACTIVATION, FAR = 32, "Q8_0", True

    @abstract
    def quants(row, j):
        """u8x32: the quants of group j, unsigned, in the order of the weights."""

    @abstract
    def scale(row, j):
        """f32x8: the scale of group j; lane k of it is for the weights 4k to 4k + 3."""

    @part
    def minimum(row, j):
        """f32x8: what is added to each weight of group j, in all lanes; 0 where a format has no minimums."""
        return f32x8(0)

    @part
    def start(y):
        """The address of the first record in y."""
        return first_record(y)

    # Two groups at a time: 64 quants fill a vector.

    @part
    def pair(row, j):
        """The groups j and j + 1: quants, scales, minimums."""
        q = concat(fmt.quants(row, j), fmt.quants(row, j + 1))
        scales = concat(fmt.scale(row, j), fmt.scale(row, j + 1))
        return q, scales, concat(fmt.minimum(row, j), fmt.minimum(row, j + 1))

    @part
    def single(row, j):
        """The last group j of an odd number of groups, with zeros in the upper lanes: quants, scales, minimums."""
        scale, minimum = fmt.scale(row, j), fmt.minimum(row, j)
        return concat(fmt.quants(row, j), u8x32(0)), concat(scale, f32x8(0)), concat(minimum, f32x8(0))

    @part
    def nothing():
        """The sums before the first group."""
        return f32x8(0)

    @part
    def step(acc, group, record):
        """The sums with the two groups of a record added."""
        products = to_f32(dot4(load_i32x16(record + 64), group[0], load_i8x64(record)))
        scales = group[1] * load_f32x16(record + 128)
        return fma(high(products), high(scales), fma(low(products), low(scales), acc))

    @part
    def whole(acc):
        """The dot product, from its sums."""
        return total(acc)

    @part
    def tile(row, row2, n_groups, record, stride):
        """Unpack two groups of each of two rows, and add them to the sums of four tokens; then the next two groups."""
        a = b = fmt.nothing(), fmt.nothing(), fmt.nothing(), fmt.nothing()
        for j in range(0, n_groups - 1, 2):
            a = fmt.step_four_tokens(a, fmt.pair(row, j), record, stride)
            b = fmt.step_four_tokens(b, fmt.pair(row2, j), record, stride)
            record += 256
        if n_groups % 2:
            j = n_groups - 1
            a = fmt.step_four_tokens(a, fmt.single(row, j), record, stride)
            b = fmt.step_four_tokens(b, fmt.single(row2, j), record, stride)
        first_row = fmt.whole(a[0]), fmt.whole(a[1]), fmt.whole(a[2]), fmt.whole(a[3])
        return first_row, (fmt.whole(b[0]), fmt.whole(b[1]), fmt.whole(b[2]), fmt.whole(b[3]))

    @part
    def stack(row, stride, n_groups, record):
        """Sum four rows side by side, two groups at a time."""
        a = b = c = d = fmt.nothing()
        second, third, fourth = row + stride, row + 2 * stride, row + 3 * stride
        for j in range(0, n_groups - 1, 2):
            a, b = fmt.step(a, fmt.pair(row, j), record), fmt.step(b, fmt.pair(second, j), record)
            c, d = fmt.step(c, fmt.pair(third, j), record), fmt.step(d, fmt.pair(fourth, j), record)
            record += 256
        if n_groups % 2:
            j = n_groups - 1
            a, b = fmt.step(a, fmt.single(row, j), record), fmt.step(b, fmt.single(second, j), record)
            c, d = fmt.step(c, fmt.single(third, j), record), fmt.step(d, fmt.single(fourth, j), record)
        return fmt.whole(a), fmt.whole(b), fmt.whole(c), fmt.whole(d)

    @part
    def unpack(row, n, to):
        """Write the weights group by group: scale * (quant - BIAS)."""
        for j in range(n // 32):
            store(to + 128 * j, spread(fmt.scale(row, j)) * (to_f32(fmt.quants(row, j)) - fmt.BIAS))


class BlocksWithMinimum(Blocks):
    """A format of blocks with a scale and a minimum: weight = scale * quant + minimum."""

    ACTIVATION = "Q8_1"

    @abstract
    def minimum(row, j):
        """f32x8: what is added to each weight of group j, in all lanes."""

    @part
    def nothing():
        """The sums before the first group: of the products, and of what the minimums add."""
        return f32x8(0), f32x8(0)

    @part
    def step(acc, group, record):
        """The sums with the two groups of a record added; minimums times s have a sum of their own."""
        products = to_f32(dot4(load_i32x16(record + 64), group[0], load_i8x64(record)))
        scales, s = group[1] * load_f32x16(record + 128), load_f32x16(record + 192)
        sums = fma(high(products), high(scales), fma(low(products), low(scales), acc[0]))
        return sums, fma(high(group[2]), high(s), fma(low(group[2]), low(s), acc[1]))

    @part
    def whole(acc):
        """The dot product, from both sums."""
        return total(acc[0]) + first(acc[1])

    @part
    def unpack(row, n, to):
        """Write the weights group by group: scale * quant + minimum."""
        for j in range(n // 32):
            values = spread(fmt.scale(row, j)) * (to_f32(fmt.quants(row, j)) - fmt.BIAS)
            store(to + 128 * j, values + spread(fmt.minimum(row, j)))


class BlocksInTwoSums(Blocks):
    """A format of blocks without minimums that ggml sums in two parts, the even groups and the odd groups."""

    @part
    def nothing():
        """The sums before the first group: of the even groups, and of the odd groups."""
        return f32x8(0), f32x8(0)

    @part
    def step(acc, group, record):
        """The sums with the two groups of a record added, the first to one sum and the second to the other."""
        products = to_f32(dot4(load_i32x16(record + 64), group[0], load_i8x64(record)))
        scales = group[1] * load_f32x16(record + 128)
        return fma(low(products), low(scales), acc[0]), fma(high(products), high(scales), acc[1])

    @part
    def whole(acc):
        """The dot product, from both sums."""
        return total(acc[0] + acc[1])


fmt: Blocks = STAMPED
