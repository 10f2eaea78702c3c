"""Blocks of 32 weights, four rows with one token, with the quants of all four rows in one vector.

Decoding a token uses each weight once, so unpacking cannot be shared between tokens. It is shared between rows instead:
where quants are nibbles, a block has 16 bytes of them, and those of four rows fill a vector of 64 bytes. The sums equal
those of blocks.py, bit for bit.
"""

from ..machine.cpu import dot4
from ..machine.half import widen_half
from ..machine.jit import inline
from ..machine.lanes import bits_of, concat, first, fma, shuffle, shuffle2
from ..machine.template import STAMPED, abstract, part
from ..machine.vectors import (
    f32x16,
    load_f32x1,
    load_f32x16,
    load_i8x16,
    load_i32x4,
    load_u8x16,
    load_u16x1,
    load_u16x32,
    load_u32x1,
    to_f32,
    to_u16,
)
from .blocks import Blocks, BlocksWithMinimum

# How formats read the same block of four rows.


@inline
def concat_four(a, b, c, d):
    """The lanes of four vectors, one after another."""
    return concat(concat(a, b), concat(c, d))


@inline
def load_four(at, stride):
    """16 bytes at each of four addresses, `stride` bytes apart: u8x64."""
    a, b, c = load_u8x16(at), load_u8x16(at + stride), load_u8x16(at + 2 * stride)
    return concat_four(a, b, c, load_u8x16(at + 3 * stride))


@inline
def four_nibbles(at, stride):
    """The low nibbles of 16 bytes at each of four addresses, and their high nibbles: 2 u8x64."""
    v = load_four(at, stride)
    return v & 15, v >> 4


each_four_times = shuffle([lane // 4 for lane in range(16)])


@inline
def four_halves(at, stride):
    """The F16 numbers at four addresses: f32x16, each number four times."""
    a, b, c = load_u16x1(at), load_u16x1(at + stride), load_u16x1(at + 2 * stride)
    return each_four_times(widen_half(concat_four(a, b, c, load_u16x1(at + 3 * stride))))


every_ninth = shuffle2([9 * k + 32 * row for row in range(2) for k in range(4)])


@inline
def sixteen_halves(at, stride):
    """The F16 numbers that begin four neighbouring blocks of 18 bytes in four rows: lane 4r + k, block k of row r."""
    a, b = load_u16x32(at), load_u16x32(at + stride)
    c, d = load_u16x32(at + 2 * stride), load_u16x32(at + 3 * stride)
    return widen_half(concat(every_ninth(a, b), every_ninth(c, d)))


@inline
def four_fifth_bits(at, stride):
    """32 bits at each of four addresses, each bit as 0 or 16: 2 u8x64, in the order of `four_nibbles`."""
    a, b, c = load_u32x1(at), load_u32x1(at + stride), load_u32x1(at + 2 * stride)
    h = concat_four(a, b, c, load_u32x1(at + 3 * stride))
    return bits_of(to_u16(h)) << 4, bits_of(to_u16(h >> 16)) << 4


# Sums: two vectors, in which the lanes 4r to 4r + 3 are the partial sums 0 to 3, and 4 to 7, of row r.

row_of_16 = shuffle([lane % 16 for lane in range(64)])
row_of_4 = shuffle([lane % 4 for lane in range(16)])
turn_by_two, turn_by_one = (shuffle([lane // 4 * 4 + (lane + k) % 4 for lane in range(16)]) for k in (2, 1))
lane_of_row0, lane_of_row1, lane_of_row2, lane_of_row3 = (shuffle([4 * r]) for r in range(4))
group0, group1, group2, group3 = (shuffle([lane // 4 * 4 + g for lane in range(16)]) for g in range(4))
every_eighth = shuffle2([8 * (lane % 4) for lane in range(16)])


@inline
def no_sums():
    """The sums before the first group."""
    return f32x16(0), f32x16(0)


@inline
def scale_at(record, j):
    """The scale of a token's group j."""
    return first(load_f32x1(record + 256 * (j // 2) + 32 * (j % 2) + 128))


@inline
def sum_of_rows(acc):
    """The total of each row's eight lanes, added in the order of lanes.total, four times in a vector."""
    v = acc[0] + acc[1]
    v = v + turn_by_two(v)
    return v + turn_by_one(v)


@inline
def numbers(v):
    """The numbers of the four rows, each of which is in four lanes of v."""
    return first(lane_of_row0(v)), first(lane_of_row1(v)), first(lane_of_row2(v)), first(lane_of_row3(v))


class StackedBlocks(Blocks):
    """A format of blocks that can also read group j of four rows, `stride` bytes apart, at once."""

    @abstract
    def stacked_quants(row, stride, j):
        """2 u8x64: the quants 0 to 15 of each row, then the quants 16 to 31 of each row."""

    @abstract
    def stacked_scales(row, stride, j):
        """f32x16: in the lanes 4r to 4r + 3 the scale of row r."""

    @part
    def stacked_minimums(row, stride, j):
        """f32x16: in the lanes 4r to 4r + 3 the minimum of row r; 0 where a format has no minimums."""
        return f32x16(0)

    @part
    def add_group(acc, row, stride, j, record, s):
        """The sums with group j added; s: the scales of the rows times that of the token."""
        at = record + 256 * (j // 2) + 32 * (j % 2)
        q = fmt.stacked_quants(row, stride, j)
        low = dot4(row_of_4(load_i32x4(at + 64)), q[0], row_of_16(load_i8x16(at)))
        high = dot4(row_of_4(load_i32x4(at + 80)), q[1], row_of_16(load_i8x16(at + 16)))
        return fma(to_f32(low), s, acc[0]), fma(to_f32(high), s, acc[1])

    @part
    def stack(row, stride, n, record):
        """Sum four rows in two vectors, one group at a time."""
        acc = no_sums()
        for j in range(n):
            acc = fmt.add_group(acc, row, stride, j, record, fmt.stacked_scales(row, stride, j) * scale_at(record, j))
        return numbers(sum_of_rows(acc))


class StackedByFour(StackedBlocks):
    """A format of stacked blocks that reads the scales of four groups of four rows at once."""

    @abstract
    def sixteen_scales(row, stride, j):
        """f32x16: in lane 4r + k the scale of group j + k of row r."""

    @part
    def stack(row, stride, n, record):
        """Sum four rows in two vectors, with the scales of four groups read at once."""
        acc = no_sums()
        for j in range(0, n - 3, 4):
            at = record + 128 * j + 128
            s = fmt.sixteen_scales(row, stride, j) * every_eighth(load_f32x16(at), load_f32x16(at + 256))
            acc = fmt.add_group(acc, row, stride, j, record, group0(s))
            acc = fmt.add_group(acc, row, stride, j + 1, record, group1(s))
            acc = fmt.add_group(acc, row, stride, j + 2, record, group2(s))
            acc = fmt.add_group(acc, row, stride, j + 3, record, group3(s))
        for j in range(n - n % 4, n):
            acc = fmt.add_group(acc, row, stride, j, record, fmt.stacked_scales(row, stride, j) * scale_at(record, j))
        return numbers(sum_of_rows(acc))


class StackedWithOneApart(StackedByFour):
    """A stacked format for which ggml sums the only token of a pass in another order than several tokens."""

    ONE_APART = True

    @part
    def stack_one(row, stride, n, record):
        """Sum in the order of ggml_vec_dot_iq4_nl_q8_0: even and odd groups apart, then a last group if n is odd."""
        a = b = no_sums()
        for j in range(0, n - 3, 4):
            at = record + 128 * j + 128
            s = fmt.sixteen_scales(row, stride, j) * every_eighth(load_f32x16(at), load_f32x16(at + 256))
            a = fmt.add_group(a, row, stride, j, record, group0(s))
            b = fmt.add_group(b, row, stride, j + 1, record, group1(s))
            a = fmt.add_group(a, row, stride, j + 2, record, group2(s))
            b = fmt.add_group(b, row, stride, j + 3, record, group3(s))
        for j in range(n & -4, n - 1, 2):
            s, k = fmt.stacked_scales(row, stride, j) * scale_at(record, j), j + 1
            a = fmt.add_group(a, row, stride, j, record, s)
            b = fmt.add_group(b, row, stride, k, record, fmt.stacked_scales(row, stride, k) * scale_at(record, k))
        sums = sum_of_rows((a[0] + b[0], a[1] + b[1]))
        if n % 2:
            j = n - 1
            whole_numbers = sum_of_rows(fmt.add_group(no_sums(), row, stride, j, record, f32x16(1)))
            sums = sums + fmt.stacked_scales(row, stride, j) * scale_at(record, j) * whole_numbers
        return numbers(sums)


class StackedWithMinimum(StackedBlocks, BlocksWithMinimum):
    """A format of blocks with minimums that can also read group j of four rows at once."""

    @abstract
    def stacked_minimums(row, stride, j):
        """f32x16: in the lanes 4r to 4r + 3 the minimum of row r."""

    @part
    def stack(row, stride, n, record):
        """Sum four rows in two vectors, and minimums times s in a third one."""
        acc, lowest = no_sums(), f32x16(0)
        for j in range(n):
            acc = fmt.add_group(acc, row, stride, j, record, fmt.stacked_scales(row, stride, j) * scale_at(record, j))
            s = first(load_f32x1(record + 256 * (j // 2) + 32 * (j % 2) + 192))
            lowest = fma(fmt.stacked_minimums(row, stride, j), s, lowest)
        return numbers(sum_of_rows(acc) + lowest)


fmt: StackedByFour = STAMPED  # the class with the most parts
