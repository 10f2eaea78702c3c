"""Superblocks of 256 weights: products with a few tokens, and unpacking.

Each 16 or 32 weights of a superblock share a whole-number scale, and all 256 share one or two floats. Lane k of 8 adds
up, in whole numbers,

    scale * (dot4(quants, q) of the weights 4k to 4k + 3 of each 32)

over a superblock, and only then is the sum multiplied by the float factor * d. q and d belong to the activations, see
Q8_K in activations.py. The classes in superblock_sums.py say how BIAS and the minimums are added.
"""

from ..machine.cpu import dot4
from ..machine.jit import inline
from ..machine.lanes import concat, even, high, low, odd, shuffle
from ..machine.simd import store
from ..machine.template import STAMPED, abstract, part
from ..machine.vectors import f32x8, i32x16, load_i8x64, load_i32x16, to_f32, to_i32
from .activations import RECORD_K, first_record
from .loops import Products

# From one number per 16 weights to the lanes of dot4 for the first, second, third and fourth 64 weights of a
# superblock, and to these weights themselves.
lanes0, lanes1, lanes2, lanes3 = (shuffle([4 * k + lane // 4 for lane in range(16)]) for k in range(4))
weights0, weights1, weights2, weights3 = (shuffle([4 * k + lane // 16 for lane in range(64)]) for k in range(4))


class Superblocks(Products):
    """A format of superblocks: weight = factor * scale * (quant - BIAS) - min_factor * minimum.

    Lengths count superblocks. `block` is the address of one.
    """

    BLOCK, ACTIVATION = 256, "Q8_K"

    @abstract
    def quants(block):
        """4 u8x64: the quants of 64 weights each, unsigned, in the order of the weights."""

    @abstract
    def scales(block):
        """i32x16: a whole number per 16 weights."""

    @abstract
    def factor(block):
        """f32x8: the float by which the scales are multiplied, in all lanes."""

    @part
    def minimums(block):
        """i32x16: a whole number per 16 weights, to be subtracted; 0 where a format has no minimums."""
        return i32x16(0)

    @part
    def min_factor(block):
        """f32x8: the float by which the minimums are multiplied, in all lanes."""
        return f32x8(0)

    # What each order of summing defines, see superblock_sums.py.

    @part
    def correction(block):
        """The part of a superblock that BIAS or the minimums need; it is the same for all tokens."""
        return 0

    @abstract
    def nothing():
        """The sums before the first superblock."""

    @abstract
    def whole(acc):
        """The dot product, from its sums."""

    @part
    def start(y):
        """The address of the first record in y."""
        return first_record(y)

    @part
    def opened(block):
        """A superblock unpacked, for all tokens: quants, scales by lanes, factor, correction."""
        s = fmt.scales(block)
        return fmt.quants(block), (lanes0(s), lanes1(s), lanes2(s), lanes3(s)), fmt.factor(block), fmt.correction(block)

    @part
    def dot(row, n_blocks, record):
        """The dot product of a row with one token."""
        acc = fmt.nothing()
        for j in range(n_blocks):
            acc = fmt.step(acc, fmt.opened(row + fmt.SIZE * j), record + RECORD_K * j)
        return fmt.whole(acc)

    @part
    def stack(row, stride, n, x):
        """Sum four rows one after another: they are compute-heavy, so reading four at once gains nothing."""
        a, b = fmt.dot(row, n, x), fmt.dot(row + stride, n, x)
        return a, b, fmt.dot(row + 2 * stride, n, x), fmt.dot(row + 3 * stride, n, x)

    @part
    def tile(row, row2, n_blocks, record, stride):
        """Unpack a superblock of each of two rows, and add it to the sums of four tokens; then the next one."""
        a = b = fmt.nothing(), fmt.nothing(), fmt.nothing(), fmt.nothing()
        for j in range(n_blocks):
            a = fmt.step_four_tokens(a, fmt.opened(row + fmt.SIZE * j), record, stride)
            b = fmt.step_four_tokens(b, fmt.opened(row2 + fmt.SIZE * j), record, stride)
            record += RECORD_K
        first_row = fmt.whole(a[0]), fmt.whole(a[1]), fmt.whole(a[2]), fmt.whole(a[3])
        return first_row, (fmt.whole(b[0]), fmt.whole(b[1]), fmt.whole(b[2]), fmt.whole(b[3]))

    @part
    def unpack(row, n, to):
        """Write the weights superblock by superblock, rounded as in the reference code."""
        for block in range(row, row + n // 256 * fmt.SIZE, fmt.SIZE):
            q, d = fmt.quants(block), both_halves(fmt.factor(block)) * to_f32(fmt.scales(block))
            m = both_halves(fmt.min_factor(block)) * to_f32(fmt.minimums(block))
            store(to, weights0(d) * (to_f32(q[0]) - fmt.BIAS) - weights0(m))
            store(to + 256, weights1(d) * (to_f32(q[1]) - fmt.BIAS) - weights1(m))
            store(to + 512, weights2(d) * (to_f32(q[2]) - fmt.BIAS) - weights2(m))
            store(to + 768, weights3(d) * (to_f32(q[3]) - fmt.BIAS) - weights3(m))
            to += 1024


fmt: Superblocks = STAMPED


@inline
def both_halves(v):
    """The 8 lanes of v, twice: 16 lanes."""
    return concat(v, v)


# Whole-number sums over a superblock: 8 lanes.


@inline
def sums_of_products(q, s, record):
    """scale * dot4(quants, q), summed over the superblock: i32x8."""
    a = dot4(i32x16(0), q[0], load_i8x64(record)) * s[0] + dot4(i32x16(0), q[1], load_i8x64(record + 64)) * s[1]
    b = dot4(i32x16(0), q[2], load_i8x64(record + 128)) * s[2] + dot4(i32x16(0), q[3], load_i8x64(record + 192)) * s[3]
    return low(a + b) + high(a + b)


@inline
def biased(q, record, k):
    """dot4 of the k-th 64 of quant - BIAS: it starts from the sums c of the record, which hold -BIAS times the q."""
    return dot4(load_i32x16(record + 320 + 64 * k), q, load_i8x64(record + 64 * k))


@inline
def sums_of_biased_products(q, s, record):
    """scale * dot4(quants - BIAS, q), summed over the superblock: i32x8."""
    a = biased(q[0], record, 0) * s[0] + biased(q[1], record, 1) * s[1]
    b = biased(q[2], record, 2) * s[2] + biased(q[3], record, 3) * s[3]
    return low(a + b) + high(a + b)


@inline
def sums_of_pairs(a, b):
    """Sums of neighbouring products, a[0] b[0] + a[1] b[1], ...: from i16 lanes, half as many i32 lanes."""
    products = to_i32(a) * to_i32(b)
    return even(products) + odd(products)
