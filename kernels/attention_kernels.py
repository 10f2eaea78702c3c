"""The compiled loops of attention: for one query of one head at a time, or for four.

Items are numbered head after head, so that a thread reads the keys and values of few heads. Values are cached with
positions innermost, as in ggml, so that both products of attention are dot products of contiguous rows.

With F16 caches, ggml sums the only token of a pass (`alone`) in another order than several tokens: that of
ggml_vec_dot_f16, over positions padded with zeros (llama.cpp reads a multiple of 256 positions).
"""

from typing import Any, NamedTuple

import numpy as np

from .formats.floats import F16, F32
from .machine.half import round_half, widen_half
from .machine.jit import inline
from .machine.simd import address_of, keep, store
from .machine.template import STAMPED, Template, abstract, entry, part
from .machine.vectors import f32x1, f32x16, load_f32x1, load_f32x16
from .soft_max_rows import cap_row, hide, pad, soft_max_row, up16


class CachedAttention(Template):
    """Attention with a cache of one type of number."""

    SIZE: int  # bytes of a number in the cache

    @abstract
    def dot(row, n, x):
        """The dot product of a cached row at an address with the n float32 numbers at address x."""

    @abstract
    def key_dot(row, n, x):
        """The dot product of a row of keys with x, in the order for the only token of a pass; arguments as in `dot`."""

    @abstract
    def value_dot(row, n, x):
        """The dot product of a row of values, padded with zeros, with x, in the order for the only token of a pass."""

    @abstract
    def tile(row, row2, n, x, stride):
        """The dot products of two cached rows with four x, `stride` bytes apart: two times four sums."""

    @abstract
    def cast(v):
        """The float32 numbers of a vector, rounded to the type of the cache."""

    @abstract
    def narrow(v):
        """The float32 numbers of a vector, rounded to the bit patterns that the cache stores."""

    @part
    def cast_row(x, n, y):
        """Write the n numbers at address x, rounded to the type of the cache, to address y."""
        for i in range(0, n - 15, 16):
            store(y + 4 * i, fmt.cast(load_f32x16(x + 4 * i)))
        for i in range(n - n % 16, n):
            store(y + 4 * i, fmt.cast(load_f32x1(x + 4 * i)))

    @part
    def dots(dot, x, n, rows, stride, n_rows, out):
        """Write out[i] = x . row i, for n_rows rows of length n whose starts lie `stride` numbers apart."""
        for i in range(n_rows):
            store(out + 4 * i, f32x1(dot(rows + fmt.SIZE * stride * i, n, x)))

    @part
    def tiles(x, x_stride, n, rows, stride, n_rows, out, out_stride):
        """Write what `dots` writes, for four x, x_stride bytes apart; their results lie out_stride bytes apart."""
        for i in range(0, n_rows, 2):
            k = min(i + 1, n_rows - 1)
            a, b = fmt.tile(rows + fmt.SIZE * stride * i, rows + fmt.SIZE * stride * k, n, x, x_stride)
            for to, sums in ((out + 4 * i, a), (out + 4 * k, b)):
                store(to, f32x1(sums[0]))
                store(to + out_stride, f32x1(sums[1]))
                store(to + 2 * out_stride, f32x1(sums[2]))
                store(to + 3 * out_stride, f32x1(sums[3]))

    @entry
    def put(keys, values, k, v, n_past):
        """Write k and v [n_tok, n_head_kv, d] into keys [n_head_kv, cap, d] and values [n_head_kv, d, cap]."""
        (n_tok, n_head_kv, d), (_, _, d_v), cap = k.shape, v.shape, keys.shape[1]
        k, v, to_keys, to_values = address_of(k), address_of(v), address_of(keys), address_of(values)
        for h in range(n_head_kv):
            for t in range(n_tok):
                to, at = to_keys + fmt.SIZE * (h * cap + n_past + t) * d, k + 4 * (t * n_head_kv + h) * d
                for i in range(0, d - 15, 16):
                    store(to + fmt.SIZE * i, fmt.narrow(load_f32x16(at + 4 * i)))
                for i in range(d - d % 16, d):
                    store(to + fmt.SIZE * i, fmt.narrow(load_f32x1(at + 4 * i)))
        cap = values.shape[2]
        for row in range(n_head_kv * d_v):
            for t in range(n_tok):
                x = load_f32x1(v + 4 * (t * n_head_kv * d_v + row))
                store(to_values + fmt.SIZE * (row * cap + n_past + t), fmt.narrow(x))

    @entry
    def kq(q, k, alone, out, i0, i1):
        """Write the scores of the items i0 to i1, (head, token) pairs, into out [n_head, n_tok, n_kv]."""
        (n_tok, n_head, d), (n_head_kv, cap, d), n = q.shape, k.shape, out.shape[2]
        scratch = np.empty(d, np.float32)
        row, q, k, out = address_of(scratch), address_of(q), address_of(k), address_of(out)
        for item in range(i0, i1):
            h, t = item // n_tok, item % n_tok
            fmt.cast_row(q + 4 * (t * n_head + h) * d, d, row)
            keys, to = k + fmt.SIZE * (h * n_head_kv // n_head) * cap * d, out + 4 * item * n
            if alone:
                fmt.dots(fmt.key_dot, row, d, keys, d, n, to)
            else:
                fmt.dots(fmt.dot, row, d, keys, d, n, to)
        keep(scratch)

    @entry
    def kqv(p, v, alone, out, i0, i1):
        """Write the sums of values of the items i0 to i1, (head, token) pairs, into out [n_head, n_tok, d]."""
        (n_head, n_tok, n), (n_head_kv, d, cap) = p.shape, v.shape
        scratch = np.empty(up16(n), np.float32)
        row, p, v, out = address_of(scratch), address_of(p), address_of(v), address_of(out)
        for item in range(i0, i1):
            h = item // n_tok
            fmt.cast_row(p + 4 * item * n, n, row)
            end = pad(row, n, 0)
            values, to = v + fmt.SIZE * (h * n_head_kv // n_head) * d * cap, out + 4 * item * d
            if alone:
                fmt.dots(fmt.value_dot, row, end, values, cap, d, to)
            else:
                fmt.dots(fmt.dot, row, end, values, cap, d, to)
        keep(scratch)

    @entry
    def attention(q, k, v, n_past, scale, window, cap, alone, out, i0, i1):
        """Write the attention of the items i0 to i1, each four tokens of a head, into out [n_tok, n_head * d_v]."""
        (n_tok, n_head, d), (n_head_kv, k_cap, d), (n_head_kv, d_v, v_cap) = q.shape, k.shape, v.shape
        wide, blocks = 4 * up16(d), (n_tok + 3) // 4
        scratch = np.empty(4 * (up16(d) + up16(n_past + n_tok)), np.float32)
        x, q, k, v, out = address_of(scratch), address_of(q), address_of(k), address_of(v), address_of(out)
        for item in range(i0, i1):
            h, t = item // blocks, item % blocks * 4
            h_kv, at, n = h * n_head_kv // n_head, t * n_head + h, n_past + min(t + 4, n_tok)
            keys, values = k + fmt.SIZE * h_kv * k_cap * d, v + fmt.SIZE * h_kv * d_v * v_cap
            p, long = x + 4 * wide, 4 * up16(n)
            in_fours = t + 4 <= n_tok and not alone
            for m in range(min(4, n_tok - t)):
                fmt.cast_row(q + 4 * (at + m * n_head) * d, d, x + m * wide)
                if alone:
                    fmt.dots(fmt.key_dot, x + m * wide, d, keys, d, n, p + m * long)
                elif not in_fours:
                    fmt.dots(fmt.dot, x + m * wide, d, keys, d, n, p + m * long)
            if in_fours:
                fmt.tiles(x, wide, d, keys, d, n, p, long)
            for m in range(min(4, n_tok - t)):
                seen = n_past + t + m + 1
                if cap > 0:
                    cap_row(p + m * long, seen, cap)
                hide(p + m * long, seen - window)
                soft_max_row(p + m * long, seen, scale)
                for j in range(up16(seen), up16(n), 16):
                    store(p + m * long + 4 * j, f32x16(0))
                fmt.cast_row(p + m * long, up16(n), p + m * long)
                to = out + 4 * (at + m * n_head) * d_v
                if alone:
                    fmt.dots(fmt.value_dot, p + m * long, up16(n), values, v_cap, d_v, to)
                elif not in_fours:
                    fmt.dots(fmt.dot, p + m * long, up16(n), values, v_cap, d_v, to)
            if in_fours:
                fmt.tiles(p, long, up16(n), values, v_cap, d_v, out + 4 * at * d_v, 4 * n_head * d_v)
        keep(scratch)


fmt: CachedAttention = STAMPED


class F16Attention(CachedAttention):
    """Attention with keys and values in F16: queries and probabilities are rounded to F16 as well."""

    SIZE = 2
    dot, tile, narrow = F16.dot, F16.tile, round_half
    key_dot, value_dot = F16.vec_dot, F16.vec_dot_then_zeros

    @part
    def cast(v):
        """Round the lanes to F16 and widen them again."""
        return widen_half(round_half(v))


@inline
def unchanged(v):
    """The vector itself."""
    return v


class F32Attention(CachedAttention):
    """Attention with keys and values in float32."""

    SIZE = 4
    dot = key_dot = value_dot = F32.dot
    tile, cast, narrow = F32.tile, unchanged, unchanged


F16Attention.stamp()
F32Attention.stamp()


class Kernels(NamedTuple):
    """The kernels for a cache, and the type as which they take it: numba has no float16 arrays."""

    put: Any
    kq: Any
    kqv: Any
    attention: Any
    bits: np.dtype


KERNELS = {     # by the type of a cache
    np.dtype(number): Kernels(made.put, made.kq, made.kqv, made.attention, np.dtype(bits))
    for number, made, bits in ((np.float16, F16Attention, np.uint16), (np.float32, F32Attention, np.float32))
}
