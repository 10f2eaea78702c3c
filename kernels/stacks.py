"""Four rows with one token, which is what decoding does: the templates of the `stack` that products.py calls.

    stack(row, stride, n, activations) -> four sums, of the rows from address `row` on, `stride` bytes apart

Sums are those of `dot` in rows.py and superblocks.py, bit for bit. Each weight is used once, so memory sets the pace:
while four rows are multiplied the next four are asked for, since four short streams are more than a CPU foresees.

Nibbles are little work each, and much of it is shared when the four rows lie in the same vectors, for which a format of
blocks of 32 brings
    four_quants(row, stride, j)    -> 2 u8x64   quants 0 to 15 of group j of each row, then 16 to 31 of each row
    four_scales(row, stride, j)    -> f32x16    lanes 4r to 4r + 3 for row r
    four_minimums(row, stride, j)  -> f32x16
The other formats go row by row.
"""

from .cpu import dot4, widen_half
from .jit import inline
from .lanes import bits_of, concat, first, fma, shuffle
from .simd import prefetch
from .vectors import (
    f32x16,
    load_f32x1,
    load_i8x16,
    load_i32x4,
    load_u8x16,
    load_u16x1,
    load_u32x1,
    to_f32,
    to_u16,
)  # fmt: skip

four_quants = four_scales = four_minimums = add_group = dot = None  # see jit.specialise
SIZE = 0


@inline
def four(a, b, c, d):
    return concat(concat(a, b), concat(c, d))


@inline
def four_loads(at, stride):
    """16 bytes at each of four addresses."""
    a, b, c = load_u8x16(at), load_u8x16(at + stride), load_u8x16(at + 2 * stride)
    return four(a, b, c, load_u8x16(at + 3 * stride))


each_four = shuffle([lane // 4 for lane in range(16)])


@inline
def four_halves(at, stride):
    """The F16 numbers at four addresses, four times each."""
    a, b, c = load_u16x1(at), load_u16x1(at + stride), load_u16x1(at + 2 * stride)
    return each_four(widen_half(four(a, b, c, load_u16x1(at + 3 * stride))))


@inline
def four_fifth_bits(at, stride):
    """32 bits at each of four addresses, as 0 or 16: two vectors in the order of four_quants."""
    a, b, c = load_u32x1(at), load_u32x1(at + stride), load_u32x1(at + 2 * stride)
    h = four(a, b, c, load_u32x1(at + 3 * stride))
    return bits_of(to_u16(h)) << 4, bits_of(to_u16(h >> 16)) << 4


# Group after group; lanes 4r to 4r + 3 hold the partial sums of row r, 0 to 3 in one vector, 4 to 7 in another.

four_times = shuffle([lane % 16 for lane in range(64)])
four_times_4 = shuffle([lane % 4 for lane in range(16)])


def add_group_template(acc, row, stride, j, record):
    at = record + 256 * (j // 2) + 32 * (j % 2)
    prefetch(row + 4 * (stride + SIZE * j))
    prefetch(row + 4 * (stride + SIZE * j) + 64)
    q, s = four_quants(row, stride, j), four_scales(row, stride, j) * first(load_f32x1(at + 128))
    low = dot4(four_times_4(load_i32x4(at + 64)), q[0], four_times(load_i8x16(at)))
    high = dot4(four_times_4(load_i32x4(at + 80)), q[1], four_times(load_i8x16(at + 16)))
    return fma(to_f32(low), s, acc[0]), fma(to_f32(high), s, acc[1])


@inline
def no_sums():
    return f32x16(0), f32x16(0)


half_turn, quarter_turn = (shuffle([lane // 4 * 4 + (lane + k) % 4 for lane in range(16)]) for k in (2, 1))
row0, row1, row2, row3 = (shuffle([4 * r]) for r in range(4))


@inline
def of_rows(acc):
    """The total of each row's eight lanes, in the order of lanes.total; four times each."""
    v = acc[0] + acc[1]
    v = v + half_turn(v)
    return v + quarter_turn(v)


@inline
def numbers(v):
    return first(row0(v)), first(row1(v)), first(row2(v)), first(row3(v))


def stack_scale(row, stride, n, record):
    acc = no_sums()
    for j in range(n):
        acc = add_group(acc, row, stride, j, record)
    return numbers(of_rows(acc))


def stack_scale_minimum(row, stride, n, record):
    acc, lowest = no_sums(), f32x16(0)
    for j in range(n):
        acc = add_group(acc, row, stride, j, record)
        s = first(load_f32x1(record + 256 * (j // 2) + 32 * (j % 2) + 192))
        lowest = fma(four_minimums(row, stride, j), s, lowest)
    return numbers(of_rows(acc) + lowest)


def stack_rows(row, stride, n, x):
    return dot(row, n, x), dot(row + stride, n, x), dot(row + 2 * stride, n, x), dot(row + 3 * stride, n, x)
