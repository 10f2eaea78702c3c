"""Four rows with one token, which is what decoding does: the templates of the `stack` that products.py calls.

    stack(row, stride, n, activations) -> four sums, of the rows from address `row` on, `stride` bytes apart

Sums are those of `tile` in rows.py and of `dot` in superblocks.py, bit for bit. Each weight is used once, so memory
sets the pace. Four rows at the same time, from four places far apart, keep more of it under way than one row after
another, and their sums do not wait for each other; only superblocks have enough to do with a row.

Much of the work on nibbles is shared when the four rows lie in the same vectors, for which a format of blocks of 32
brings its Fours.
"""

from typing import Any, NamedTuple

from .cpu import dot4, widen_half
from .jit import inline
from .lanes import bits_of, concat, first, fma, shuffle, shuffle2, total
from .vectors import (
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
)  # fmt: skip

# What jit.specialise puts into the templates.
quants = scales = minimums = scales_of_four = add_group = pair = single = nothing = None
whole = step = weights = dot = add_64 = rest = None
SIZE = CHUNK = 0


class Fours(NamedTuple):
    """What a format makes of group j of four rows."""

    quants: Any                 # (row, stride, j) -> 2 u8x64: quants 0 to 15 of each row, then 16 to 31 of each row
    scales: Any                 # (row, stride, j) -> f32x16: lanes 4r to 4r + 3 for row r
    minimums: Any = None        # (row, stride, j) -> f32x16, where the format has them
    scales_of_four: Any = None  # (row, stride, j) -> f32x16: lane 4r + k for row r, group j + k; may be left out


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


every_ninth = shuffle2([9 * k + 32 * row for row in range(2) for k in range(4)])


@inline
def four_halves_of_18(at, stride):
    """The F16 numbers at the start of four blocks of 18 bytes of each row: lane 4r + k for block k of row r."""
    a, b = load_u16x32(at), load_u16x32(at + stride)
    c, d = load_u16x32(at + 2 * stride), load_u16x32(at + 3 * stride)
    return widen_half(concat(every_ninth(a, b), every_ninth(c, d)))


@inline
def four_fifth_bits(at, stride):
    """32 bits at each of four addresses, as 0 or 16: two vectors in the order of quants."""
    a, b, c = load_u32x1(at), load_u32x1(at + stride), load_u32x1(at + 2 * stride)
    h = four(a, b, c, load_u32x1(at + 3 * stride))
    return bits_of(to_u16(h)) << 4, bits_of(to_u16(h >> 16)) << 4


# Group after group; lanes 4r to 4r + 3 hold the partial sums of row r, 0 to 3 in one vector, 4 to 7 in another.

four_times = shuffle([lane % 16 for lane in range(64)])
four_times_4 = shuffle([lane % 4 for lane in range(16)])


def add_group_template(acc, row, stride, j, record, s):
    at = record + 256 * (j // 2) + 32 * (j % 2)
    q = quants(row, stride, j)
    low = dot4(four_times_4(load_i32x4(at + 64)), q[0], four_times(load_i8x16(at)))
    high = dot4(four_times_4(load_i32x4(at + 80)), q[1], four_times(load_i8x16(at + 16)))
    return fma(to_f32(low), s, acc[0]), fma(to_f32(high), s, acc[1])


@inline
def scale_of(record, j):
    return first(load_f32x1(record + 256 * (j // 2) + 32 * (j % 2) + 128))


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
        acc = add_group(acc, row, stride, j, record, scales(row, stride, j) * scale_of(record, j))
    return numbers(of_rows(acc))


scales_apart = shuffle2([8 * (lane % 4) for lane in range(16)])
group0, group1, group2, group3 = (shuffle([lane // 4 * 4 + g for lane in range(16)]) for g in range(4))


def stack_scale_by_four(row, stride, n, record):
    """The same with the scales of four groups at a time."""
    acc = no_sums()
    for j in range(0, n - 3, 4):
        at = record + 128 * j + 128
        s = scales_of_four(row, stride, j) * scales_apart(load_f32x16(at), load_f32x16(at + 256))
        acc = add_group(acc, row, stride, j, record, group0(s))
        acc = add_group(acc, row, stride, j + 1, record, group1(s))
        acc = add_group(acc, row, stride, j + 2, record, group2(s))
        acc = add_group(acc, row, stride, j + 3, record, group3(s))
    for j in range(n - n % 4, n):
        acc = add_group(acc, row, stride, j, record, scales(row, stride, j) * scale_of(record, j))
    return numbers(of_rows(acc))


def stack_two_sums(row, stride, n, record):
    """The same in the order of ggml_vec_dot_iq4_nl_q8_0: even and odd groups by themselves, then one that is left."""
    a = b = no_sums()
    for j in range(0, n - 3, 4):
        at = record + 128 * j + 128
        s = scales_of_four(row, stride, j) * scales_apart(load_f32x16(at), load_f32x16(at + 256))
        a = add_group(a, row, stride, j, record, group0(s))
        b = add_group(b, row, stride, j + 1, record, group1(s))
        a = add_group(a, row, stride, j + 2, record, group2(s))
        b = add_group(b, row, stride, j + 3, record, group3(s))
    for j in range(n & -4, n - 1, 2):
        a = add_group(a, row, stride, j, record, scales(row, stride, j) * scale_of(record, j))
        b = add_group(b, row, stride, j + 1, record, scales(row, stride, j + 1) * scale_of(record, j + 1))
    sums = of_rows((a[0] + b[0], a[1] + b[1]))
    if n % 2:
        j = n - 1
        whole_numbers = of_rows(add_group(no_sums(), row, stride, j, record, f32x16(1)))
        sums = sums + scales(row, stride, j) * scale_of(record, j) * whole_numbers
    return numbers(sums)


def stack_scale_minimum(row, stride, n, record):
    acc, lowest = no_sums(), f32x16(0)
    for j in range(n):
        acc = add_group(acc, row, stride, j, record, scales(row, stride, j) * scale_of(record, j))
        s = first(load_f32x1(record + 256 * (j // 2) + 32 * (j % 2) + 192))
        lowest = fma(minimums(row, stride, j), s, lowest)
    return numbers(of_rows(acc) + lowest)


# Four rows, each in its own vectors.


def stack_quantised(row, stride, n_groups, record):
    a = b = c = d = nothing()
    row2, row3, row4 = row + stride, row + 2 * stride, row + 3 * stride
    for j in range(0, n_groups - 1, 2):
        a, b = step(a, pair(row, j), record), step(b, pair(row2, j), record)
        c, d = step(c, pair(row3, j), record), step(d, pair(row4, j), record)
        record += 256
    if n_groups % 2:
        j = n_groups - 1
        a, b = step(a, single(row, j), record), step(b, single(row2, j), record)
        c, d = step(c, single(row3, j), record), step(d, single(row4, j), record)
    return whole(a), whole(b), whole(c), whole(d)


def stack_floats(row, stride, n, x):
    row2, row3, row4 = row + stride, row + 2 * stride, row + 3 * stride
    if n % CHUNK:
        return dot(row, n, x), dot(row2, n, x), dot(row3, n, x), dot(row4, n, x)
    a = b = c = d = f32x16(0)
    for i in range(0, n, CHUNK):
        at, k = x + 4 * i, SIZE * i
        a, b = step(a, weights(row + k), at), step(b, weights(row2 + k), at)
        c, d = step(c, weights(row3 + k), at), step(d, weights(row4 + k), at)
    return total(a), total(b), total(c), total(d)


def stack_vec_dot(row, stride, n, x):
    """The same in the order of ggml_vec_dot_*, see vec_dot in rows.py."""
    row2, row3, row4 = row + stride, row + 2 * stride, row + 3 * stride
    a = b = c = d = nothing()
    for i in range(0, n - 63, 64):
        at, k = x + 4 * i, SIZE * i
        a, b = add_64(a, row + k, at), add_64(b, row2 + k, at)
        c, d = add_64(c, row3 + k, at), add_64(d, row4 + k, at)
    a, b, c, d = whole(a), whole(b), whole(c), whole(d)
    return rest(a, row, n, x), rest(b, row2, n, x), rest(c, row3, n, x), rest(d, row4, n, x)


def stack_superblocks(row, stride, n, x):
    return dot(row, n, x), dot(row + stride, n, x), dot(row + 2 * stride, n, x), dot(row + 3 * stride, n, x)
