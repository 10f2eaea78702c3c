"""Products of rows of blocks of 32 weights with many tokens: 6 rows with a panel of 16 tokens, a token in each lane.

Sums are those of rows.py, bit for bit: 8 partial sums a row and token, the k-th over weights 4k to 4k + 3 of each
group. 6 rows take 4 of the 8 at a time: 24 vectors of sums stay in registers, and what is loaded of a panel serves 6
rows. Rows are unpacked to bytes once for all tokens.

For n groups of 32, a panel has 1152 n bytes, and an unpacked row 40 n:

    n x 512   for the partial sums 0 to 3: q  4 x 16 x 4 i8  quants 4k to 4k + 3 of each token
                                           c  4 x 16 x i32   -bias * their sum
    n x 512   for the partial sums 4 to 7: the same
    n x 128   d  16 x f32, s  16 x f32     each token's, as in its records

    n x 40    quants 32 x u8, scale f32, minimum f32
"""

import numpy as np

from .activations import RECORD, first_record
from .machine.cpu import dot4
from .machine.jit import inline, kernel
from .machine.lanes import first, fma
from .machine.simd import address_of, keep, store
from .machine.vectors import f32x1, f32x16, load_f32x1, load_f32x16, load_i8x64, load_i32x16, load_u32x1, to_f32, u8x64
from .panels import everywhere, quad

GROUP, UNPACKED = 1152, 40
ROWS = 24  # rows that are unpacked at a time
quants = scale = minimum = unpack_row = partial_sums = minima = tile = None  # see jit.specialise


def panel_bytes(n_tok: int, n_in: int) -> int:
    """Room for the panels of so many tokens, with what it takes to align them."""
    return -(-n_tok // 16) * (n_in // 32) * GROUP + 63


@kernel
def make_panels(records, n_tok, n, panels, p0, p1):
    """Fill the panels p0 to p1 from the records of the tokens, n groups each; zeros where there is no token."""
    y, start, stride = first_record(records), first_record(panels), RECORD * ((n + 1) // 2)
    for p in range(p0, p1):
        panel = start + p * n * GROUP
        if n_tok < 16 * p + 16:
            for i in range(0, n * GROUP, 64):
                store(panel + i, u8x64(0))
        for t in range(min(16, n_tok - 16 * p)):
            for j in range(n):
                half = y + (16 * p + t) * stride + RECORD * (j // 2) + 32 * (j % 2)
                for k in range(8):
                    to = panel + 4 * t + (k // 4 * n + j) * 512 + 64 * (k % 4)
                    store(to, load_u32x1(half + 4 * k))
                    store(to + 256, load_u32x1(half + 64 + 4 * k))
                to = panel + 4 * t + 1024 * n + 128 * j
                store(to, load_u32x1(half + 128))
                store(to + 64, load_u32x1(half + 192))


def unpack_row_template(row, n, to):
    for j in range(n):
        store(to, quants(row, j))
        store(to + 32, f32x1(first(scale(row, j))))
        store(to + 36, f32x1(first(minimum(row, j))))
        to += UNPACKED


# Six vectors, one a row.


@inline
def six(row, stride):
    """Addresses of six rows, `stride` bytes apart."""
    return row, row + stride, row + 2 * stride, row + 3 * stride, row + 4 * stride, row + 5 * stride


@inline
def add(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5]


@inline
def times(at, v):
    """v times the float32 at each of six addresses."""
    a, b, c = v * everywhere(load_f32x1(at[0])), v * everywhere(load_f32x1(at[1])), v * everywhere(load_f32x1(at[2]))
    d, e, f = v * everywhere(load_f32x1(at[3])), v * everywhere(load_f32x1(at[4])), v * everywhere(load_f32x1(at[5]))
    return a, b, c, d, e, f


@inline
def step(acc, rows, k, panel, scales):
    """The k-th of four partial sums, a group further."""
    x, c = load_i8x64(panel + 64 * k), load_i32x16(panel + 256 + 64 * k)
    return (
        fma(to_f32(dot4(c, quad(rows[0] + 4 * k), x)), scales[0], acc[0]),
        fma(to_f32(dot4(c, quad(rows[1] + 4 * k), x)), scales[1], acc[1]),
        fma(to_f32(dot4(c, quad(rows[2] + 4 * k), x)), scales[2], acc[2]),
        fma(to_f32(dot4(c, quad(rows[3] + 4 * k), x)), scales[3], acc[3]),
        fma(to_f32(dot4(c, quad(rows[4] + 4 * k), x)), scales[4], acc[4]),
        fma(to_f32(dot4(c, quad(rows[5] + 4 * k), x)), scales[5], acc[5]),
    )


@inline
def zeros():
    return f32x16(0), f32x16(0), f32x16(0), f32x16(0), f32x16(0), f32x16(0)


@inline
def four_sums(row, stride, first_group, n, every, panel, half):
    """Partial sums 4 half to 4 half + 3 over each `every`-th group, of six rows."""
    a = b = c = d = zeros()
    for j in range(first_group, n, every):
        at, rows = panel + (half * n + j) * 512, six(row + j * UNPACKED + 16 * half, stride)
        scales = times(six(row + j * UNPACKED + 32, stride), load_f32x16(panel + 1024 * n + 128 * j))
        a, b = step(a, rows, 0, at, scales), step(b, rows, 1, at, scales)
        c, d = step(c, rows, 2, at, scales), step(d, rows, 3, at, scales)
    return a, b, c, d


def together(row, stride, n, panel, half):
    return four_sums(row, stride, 0, n, 1, panel, half)


def apart(row, stride, n, panel, half):
    """Even and odd groups by themselves."""
    even, odd = four_sums(row, stride, 0, n, 2, panel, half), four_sums(row, stride, 1, n, 2, panel, half)
    return add(even[0], odd[0]), add(even[1], odd[1]), add(even[2], odd[2]), add(even[3], odd[3])


def no_minima(sums, row, stride, n, panel):
    return sums


def add_minima(sums, row, stride, n, panel):
    """Minimum times s over all groups, added to the sums."""
    a, b, c, d, e, f = zeros()
    for j in range(n):
        at, s = six(row + j * UNPACKED + 36, stride), load_f32x16(panel + 1024 * n + 128 * j + 64)
        a, b = fma(everywhere(load_f32x1(at[0])), s, a), fma(everywhere(load_f32x1(at[1])), s, b)
        c, d = fma(everywhere(load_f32x1(at[2])), s, c), fma(everywhere(load_f32x1(at[3])), s, d)
        e, f = fma(everywhere(load_f32x1(at[4])), s, e), fma(everywhere(load_f32x1(at[5])), s, f)
    return add(sums, (a, b, c, d, e, f))


def tile_template(row, stride, n, panel, to):
    """Dot products of six unpacked rows with 16 tokens: 6 x 16 float32 at `to`."""
    u, v = partial_sums(row, stride, n, panel, 0), partial_sums(row, stride, n, panel, 1)
    sums = add(add(add(u[0], v[0]), add(u[2], v[2])), add(add(u[1], v[1]), add(u[3], v[3])))
    a, b, c, d, e, f = minima(sums, row, stride, n, panel)
    store(to, a)
    store(to + 64, b)
    store(to + 128, c)
    store(to + 192, d)
    store(to + 256, e)
    store(to + 320, f)


def matmul_panels(y, stride, w, row_bytes, n, out, i0, i1):
    """out[t, i] = row i of w . activations t, for the rows i0 to i1; y as make_panels fills it for n groups."""
    unpacked, sums = np.empty(ROWS * n * UNPACKED + 63, np.uint8), np.empty((ROWS, 16), np.float32)
    n_tok, w, y = out.shape[0], address_of(w), first_record(y)
    rows, row_stride, at = first_record(unpacked), n * UNPACKED, address_of(sums)
    for begin in range(i0, i1, ROWS):
        end = min(begin + ROWS, i1)
        for i in range(begin, begin + 6 * ((end - begin + 5) // 6)):
            unpack_row(w + min(i, end - 1) * row_bytes, n, rows + (i - begin) * row_stride)
        for t in range(0, n_tok, 16):
            for i in range(0, end - begin, 6):
                tile(rows + i * row_stride, row_stride, n, y + t // 16 * n * GROUP, at + 64 * i)
            for m in range(min(16, n_tok - t)):
                for i in range(begin, end):
                    out[t + m, i] = sums[i - begin, m]
    keep(unpacked)
    keep(sums)
