"""Blocks of 32 weights with many tokens at once: 6 rows with a panel of 16 tokens, one token per lane.

The sums equal those of blocks.py, bit for bit: 8 partial sums per row and token, the k-th over the weights 4k to 4k + 3
of each group. They are computed in two passes of 4 partial sums for 6 rows, because 24 vectors of sums fit in the CPU's
registers, and each load from a panel is used for 6 rows. Rows are unpacked to bytes once for all tokens.

For n groups of 32, a panel has 1152 n bytes, and an unpacked row 40 n:

    n x 512   for the partial sums 0 to 3: q  4 x 16 x 4 i8  quants 4k to 4k + 3 of each token
                                           c  4 x 16 x i32   -BIAS * their sum
    n x 512   for the partial sums 4 to 7: the same
    n x 128   d  16 x f32, s  16 x f32     of each token, as in its records

    n x 40    quants 32 x u8, scale f32, minimum f32
"""

from typing import Any

import numpy as np

from ..machine.cpu import dot4
from ..machine.jit import inline, kernel
from ..machine.lanes import first, fma
from ..machine.simd import address_of, keep, store
from ..machine.template import STAMPED, entry, part
from ..machine.vectors import (
    bytes_everywhere,
    everywhere,
    f32x1,
    f32x16,
    load_f32x1,
    load_f32x16,
    load_i8x64,
    load_i32x16,
    load_u32x1,
    to_f32,
    u8x64,
)
from .activations import RECORD, first_record
from .blocks import Blocks, BlocksInTwoSums, BlocksWithMinimum

GROUP, UNPACKED = 1152, 40  # bytes per group of a panel, and of an unpacked row
ROWS_AT_ONCE = 24  # rows that are unpacked at a time


def block_panel_bytes(n_tok: int, n_in: int) -> int:
    """Bytes of the panels of n_tok tokens of n_in activations, and 63 more so that they can be aligned."""
    return -(-n_tok // 16) * (n_in // 32) * GROUP + 63


@kernel
def fill_block_panels(records, n_tok, n, panels, p0, p1):
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


# Six vectors, one per row.


@inline
def six(row, stride):
    """Addresses of six rows, `stride` bytes apart."""
    return row, row + stride, row + 2 * stride, row + 3 * stride, row + 4 * stride, row + 5 * stride


@inline
def add(a, b):
    """The sums of six vectors and six others."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5]


@inline
def times(at, v):
    """v times the float32 number at each of six addresses."""
    a, b, c = v * everywhere(load_f32x1(at[0])), v * everywhere(load_f32x1(at[1])), v * everywhere(load_f32x1(at[2]))
    d, e, f = v * everywhere(load_f32x1(at[3])), v * everywhere(load_f32x1(at[4])), v * everywhere(load_f32x1(at[5]))
    return a, b, c, d, e, f


@inline
def add_group_to_six(acc, rows, k, panel, scales):
    """The k-th of four partial sums of six rows with a group added; scales: of each row, times those of the tokens."""
    x, c = load_i8x64(panel + 64 * k), load_i32x16(panel + 256 + 64 * k)
    return (
        fma(to_f32(dot4(c, bytes_everywhere(rows[0] + 4 * k), x)), scales[0], acc[0]),
        fma(to_f32(dot4(c, bytes_everywhere(rows[1] + 4 * k), x)), scales[1], acc[1]),
        fma(to_f32(dot4(c, bytes_everywhere(rows[2] + 4 * k), x)), scales[2], acc[2]),
        fma(to_f32(dot4(c, bytes_everywhere(rows[3] + 4 * k), x)), scales[3], acc[3]),
        fma(to_f32(dot4(c, bytes_everywhere(rows[4] + 4 * k), x)), scales[4], acc[4]),
        fma(to_f32(dot4(c, bytes_everywhere(rows[5] + 4 * k), x)), scales[5], acc[5]),
    )


@inline
def zeros():
    """Six vectors of zeros."""
    return f32x16(0), f32x16(0), f32x16(0), f32x16(0), f32x16(0), f32x16(0)


@inline
def four_sums(row, stride, first_group, n, every, panel, half):
    """The partial sums 4 half to 4 half + 3 of six rows, over the groups first_group, first_group + every, ..."""
    a = b = c = d = zeros()
    for j in range(first_group, n, every):
        at, rows = panel + (half * n + j) * 512, six(row + j * UNPACKED + 16 * half, stride)
        scales = times(six(row + j * UNPACKED + 32, stride), load_f32x16(panel + 1024 * n + 128 * j))
        a, b = add_group_to_six(a, rows, 0, at, scales), add_group_to_six(b, rows, 1, at, scales)
        c, d = add_group_to_six(c, rows, 2, at, scales), add_group_to_six(d, rows, 3, at, scales)
    return a, b, c, d


class ManyTokens(Blocks):
    """A format of blocks with a kernel for MANY_FROM tokens or more."""

    MANY_FROM = 8

    @part
    def unpack_to_bytes(row, n, to):
        """Write the n groups of a row as bytes and float32 scales to an address."""
        for j in range(n):
            store(to, fmt.quants(row, j))
            store(to + 32, f32x1(first(fmt.scale(row, j))))
            store(to + 36, f32x1(first(fmt.minimum(row, j))))
            to += UNPACKED

    @part
    def partial_sums(row, stride, n, panel, half):
        """The partial sums 4 half to 4 half + 3 of six rows, over all groups."""
        return four_sums(row, stride, 0, n, 1, panel, half)

    @part
    def add_minimums(sums, row, stride, n, panel):
        """The sums of six rows with minimum * s added; unchanged where a format has no minimums."""
        return sums

    @part
    def tile_of_panel(row, stride, n, panel, to):
        """Write the dot products of six unpacked rows with 16 tokens to an address: 6 x 16 float32."""
        u, v = fmt.partial_sums(row, stride, n, panel, 0), fmt.partial_sums(row, stride, n, panel, 1)
        sums = add(add(add(u[0], v[0]), add(u[2], v[2])), add(add(u[1], v[1]), add(u[3], v[3])))
        a, b, c, d, e, f = fmt.add_minimums(sums, row, stride, n, panel)
        store(to, a)
        store(to + 64, b)
        store(to + 128, c)
        store(to + 192, d)
        store(to + 256, e)
        store(to + 320, f)

    @entry
    def matmul_many(y, stride, w, row_bytes, n, out, i0, i1):
        """Write out[t, i] = row i of w . activations t, for the rows i0 to i1; y: panels of n groups."""
        unpacked, sums = np.empty(ROWS_AT_ONCE * n * UNPACKED + 63, np.uint8), np.empty((ROWS_AT_ONCE, 16), np.float32)
        n_tok, w, y = out.shape[0], address_of(w), first_record(y)
        rows, row_stride, at = first_record(unpacked), n * UNPACKED, address_of(sums)
        for begin in range(i0, i1, ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, i1)
            for i in range(begin, begin + 6 * ((end - begin + 5) // 6)):
                fmt.unpack_to_bytes(w + min(i, end - 1) * row_bytes, n, rows + (i - begin) * row_stride)
            for t in range(0, n_tok, 16):
                for i in range(0, end - begin, 6):
                    fmt.tile_of_panel(rows + i * row_stride, row_stride, n, y + t // 16 * n * GROUP, at + 64 * i)
                for m in range(min(16, n_tok - t)):
                    for i in range(begin, end):
                        out[t + m, i] = sums[i - begin, m]
        keep(unpacked)
        keep(sums)

    @classmethod
    def kernels(cls) -> dict[str, Any]:
        """The kernels that Python calls, by their names in Format."""
        return super().kernels() | {"matmul_many": cls.matmul_many}


class ManyTokensWithMinimum(ManyTokens, BlocksWithMinimum):
    """A format of blocks with minimums and a kernel for MANY_FROM tokens or more."""

    @part
    def add_minimums(sums, row, stride, n, panel):
        """The sums of six rows with minimum * s of all groups added."""
        a, b, c, d, e, f = zeros()
        for j in range(n):
            at, s = six(row + j * UNPACKED + 36, stride), load_f32x16(panel + 1024 * n + 128 * j + 64)
            a, b = fma(everywhere(load_f32x1(at[0])), s, a), fma(everywhere(load_f32x1(at[1])), s, b)
            c, d = fma(everywhere(load_f32x1(at[2])), s, c), fma(everywhere(load_f32x1(at[3])), s, d)
            e, f = fma(everywhere(load_f32x1(at[4])), s, e), fma(everywhere(load_f32x1(at[5])), s, f)
        return add(sums, (a, b, c, d, e, f))


class ManyTokensInTwoSums(ManyTokens, BlocksInTwoSums):
    """A format that sums even and odd groups apart, with a kernel for MANY_FROM tokens or more."""

    @part
    def partial_sums(row, stride, n, panel, half):
        """The partial sums 4 half to 4 half + 3 of six rows: over the even groups, plus over the odd groups."""
        even, odd = four_sums(row, stride, 0, n, 2, panel, half), four_sums(row, stride, 1, n, 2, panel, half)
        return add(even[0], odd[0]), add(even[1], odd[1]), add(even[2], odd[2]), add(even[3], odd[3])


fmt: ManyTokens = STAMPED
