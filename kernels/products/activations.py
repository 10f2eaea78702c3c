"""Rounding and quantising activations before a product, as ggml does.

Groups of 32 activations x become bytes q = rint(x * 127 / amax) with the scale d = amax / 127, amax = max |x|. Q8_0 and
Q8_1 keep d as F16; Q8_1 also keeps s = F16(d * sum of q), the partner of the weights' minimum.
Source: ggml-cpu/arch/x86/quants.c, quantize_row_q8_0 and quantize_row_q8_1 (rounds to even; the reference in
ggml-quants.c rounds halves away from zero).

Two groups make a record of 256 bytes, laid out as the dot product loads it:

    byte   0  q   64 x i8     the quants of both groups
    byte  64  c   16 x i32    -bias * (q[4k] + ... + q[4k+3]): added to products with unsigned quants, it corrects them
    byte 128  d   16 x f32    8 times the scale of the first group, 8 times that of the second
    byte 192  s   16 x f32    8 times s of the first group, 8 times that of the second; zeros for Q8_0

If the number of groups is odd, the second half of the last record is zero.

Q8_K quantises groups of 256: q = rint(x * i), i = -127 / (the x of largest magnitude; the first one if there are
several). The scale d = 1 / i stays float32. A group of zeros has d = 0.
Source: ggml-quants.c, quantize_row_q8_K_ref. There a NaN counts as 0; here it makes d NaN, so that it is noticed.

A record of 576 bytes holds one group:

    byte   0  q  256 x i8     the quants
    byte 256  b   16 x i16    sums of 16 quants each
    byte 288  s    8 x i16    sums of 32
    byte 304  d    4 x f32    the scale, four times
    byte 320  c   64 x i32    -bias * (q[4k] + ... + q[4k+3])
"""

import numpy as np

from ..machine.cpu import dot4
from ..machine.half import round_bf16, round_half, to_half, widen_bf16, widen_half
from ..machine.jit import inline, kernel
from ..machine.lanes import even, fabs, first, larger, largest, odd, rint, total
from ..machine.simd import address_of, keep, store
from ..machine.template import STAMPED, Template, abstract, entry
from ..machine.vectors import (
    as_i32,
    f32x4,
    f32x8,
    i16x1,
    i32x8,
    load_f32x1,
    load_f32x16,
    load_f32x32,
    load_i8x32,
    to_f32,
    to_i8,
    to_i16,
    u8x32,
)

RECORD, RECORD_K = 256, 576


@inline
def quantise_group(x, record, half, bias, with_sum):
    """Quantise the 32 numbers at address x into the first half (0) or the second half (1) of a record."""
    v = load_f32x32(x)
    amax = largest(fabs(v))
    d = amax / np.float32(127)
    inverse = np.float32(127) / amax if amax != 0 else np.float32(0)
    q = to_i8(rint(v * inverse))
    sums = dot4(i32x8(0), u8x32(1), q)
    s = to_half(d * np.float32(total(sums))) if with_sum else np.float32(0)
    store(record + 32 * half, q)
    store(record + 64 + 32 * half, sums * -bias)
    store(record + 128 + 32 * half, f32x8(to_half(d)))
    store(record + 192 + 32 * half, f32x8(s))


@inline
def first_record(y):
    """The address at which the records in an array begin: a multiple of 64, so that no vector crosses a cache line."""
    return (address_of(y) + 63) & -64


@kernel
def quantise_q8(x, y, bias, with_sum, t0, t1):
    """Fill the records of the tokens t0 to t1 from x [n_tok, n_in]; y: from new_records."""
    n_groups, x, y = x.shape[1] // 32, address_of(x), first_record(y)
    stride = RECORD * ((n_groups + 1) // 2)
    for t in range(t0, t1):
        for j in range(n_groups):
            record = y + t * stride + RECORD * (j // 2)
            quantise_group(x + 128 * (t * n_groups + j), record, j % 2, bias, with_sum)
        if n_groups % 2:
            for part in range(4):
                store(y + (t + 1) * stride - RECORD + 64 * part + 32, u8x32(0))


def new_records(n_tok: int, n_in: int) -> tuple[np.ndarray, int]:
    """Allocate the Q8_0 or Q8_1 records of n_tok tokens. Returns the uint8 array, and the bytes per token."""
    stride = RECORD * ((n_in // 32 + 1) // 2)
    return np.empty(n_tok * stride + 63, np.uint8), stride


@inline
def furthest(x, n):
    """The number of largest magnitude among n, the first one if there are several; NaN if one of them is NaN."""
    top = fabs(load_f32x32(x))
    for i in range(32, n, 32):
        top = larger(top, fabs(load_f32x32(x + 4 * i)))
    amax = largest(top)
    for i in range(n):
        v = first(load_f32x1(x + 4 * i))
        if abs(v) == amax:
            return v
    return amax


@inline
def quantise_superblock(x, record, bias):
    """Quantise the 256 numbers at address x into a Q8_K record."""
    most = furthest(x, 256)
    inverse = np.float32(-127) / most if most != 0 else np.float32(0)
    store(record + 304, f32x4(np.float32(1) / inverse if most != 0 else np.float32(0)))
    for k in range(8):
        # Near 1.5 * 2 ** 23 float32 numbers are 1 apart, so the sum is rounded to a whole number (halves to even).
        shifted = as_i32(load_f32x32(x + 128 * k) * inverse + 12582912.0)
        q = to_i8((shifted & 0x7FFFFF) - 0x400000)
        sums = dot4(i32x8(0), u8x32(1), q)
        of_8 = even(sums) + odd(sums)
        store(record + 32 * k, q)
        store(record + 256 + 4 * k, to_i16(even(of_8) + odd(of_8)))
        store(record + 288 + 2 * k, i16x1(total(sums)))
        store(record + 320 + 32 * k, sums * -bias)


@kernel
def quantise_q8_k(x, y, bias, t0, t1):
    """Fill the Q8_K records of the tokens t0 to t1 from x [n_tok, n_in]; y: from new_records_k."""
    n_blocks, x, y = x.shape[1] // 256, address_of(x), first_record(y)
    for i in range(t0 * n_blocks, t1 * n_blocks):
        quantise_superblock(x + 1024 * i, y + RECORD_K * i, bias)


def new_records_k(n_tok: int, n_in: int) -> tuple[np.ndarray, int]:
    """Allocate the Q8_K records of n_tok tokens. Returns the uint8 array, and the bytes per token."""
    stride = RECORD_K * (n_in // 256)
    return np.empty(n_tok * stride + 63, np.uint8), stride


# Beside weights that are plain numbers, activations become float32 again after they were rounded or quantised.


@kernel
def round_to_q8_0(x, y, j0, j1):
    """Write y = quant * d for the groups of 32 numbers from j0 to j1."""
    scratch = np.empty(RECORD, np.uint8)
    x, y, record = address_of(x), address_of(y), address_of(scratch)
    for j in range(j0, j1):
        quantise_group(x + 128 * j, record, 0, 0, False)
        store(y + 128 * j, to_f32(load_i8x32(record)) * first(load_f32x1(record + 128)))
    keep(scratch)


@kernel
def round_to_q8_k(x, y, j0, j1):
    """Write y = quant * d for the groups of 256 numbers from j0 to j1."""
    scratch = np.empty(RECORD_K, np.uint8)
    x, y, record = address_of(x), address_of(y), address_of(scratch)
    for j in range(j0, j1):
        quantise_superblock(x + 1024 * j, record, 0)
        d = first(load_f32x1(record + 304))
        for k in range(8):
            store(y + 1024 * j + 128 * k, to_f32(load_i8x32(record + 32 * k)) * d)
    keep(scratch)


class Rounding(Template):
    """Rounding to a 16-bit format."""

    @abstract
    def narrow(v):
        """Round the float32 numbers of a vector to the format: bit patterns, u16."""

    @abstract
    def widen(v):
        """Convert bit patterns of the format, u16, to float32 numbers."""

    @entry
    def round(x, y, i0, i1):
        """Write y[i] = x[i] rounded to the format, as float32."""
        x, y = address_of(x), address_of(y)
        for i in range(i0, i1 - 15, 16):
            store(y + 4 * i, fmt.widen(fmt.narrow(load_f32x16(x + 4 * i))))
        for i in range(i1 - (i1 - i0) % 16, i1):
            store(y + 4 * i, fmt.widen(fmt.narrow(load_f32x1(x + 4 * i))))


fmt: Rounding = STAMPED


class ToF16(Rounding):
    """Rounding to F16."""

    narrow, widen = round_half, widen_half


class ToBF16(Rounding):
    """Rounding to BF16."""

    narrow, widen = round_bf16, widen_bf16


ToF16.stamp()
ToBF16.stamp()
round_to_f16, round_to_bf16 = ToF16.round, ToBF16.round
