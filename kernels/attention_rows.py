"""The row functions of attention, and the kernels made of them: one query of one head at a time, or four.

Items are numbered head after head, so that a thread's items share the keys and values of few heads. Values are cached
with positions innermost, as ggml does, so that both products of attention are dots of contiguous rows. The templates
are specialised for caches of F16 (cast rounds, narrow makes the 16 bits) and of F32 (both leave the numbers alone).
F16 is ggml's way, which sums a single token, `alone` in its pass, in an order of its own: that of ggml_vec_dot_f16,
over positions that are padded with zeros (llama.cpp reads a multiple of 256 of them).
"""

from typing import Any, NamedTuple

import numpy as np

from .cpu import round_half, widen_half
from .floats import F16, F32
from .jit import inline, kernel, specialise
from .lanes import largest, maximum, total
from .simd import address_of, keep, store
from .vectors import exp, f32x1, f32x16, load_f32x1, load_f32x16

dot = tile = cast = narrow = cast_row = dots = tiles = key_dots = value_dots = None  # see jit.specialise
SIZE = 0


def cast_row_template(x, n, y):
    """y = the n numbers of x, rounded to the cache's type."""
    for i in range(0, n - 15, 16):
        store(y + 4 * i, cast(load_f32x16(x + 4 * i)))
    for i in range(n - n % 16, n):
        store(y + 4 * i, cast(load_f32x1(x + 4 * i)))


def store_keys_template(cache, x, n_past):
    (n_tok, n_head_kv, d), cap, x, cache = x.shape, cache.shape[1], address_of(x), address_of(cache)
    for h in range(n_head_kv):
        for t in range(n_tok):
            to, at = cache + SIZE * (h * cap + n_past + t) * d, x + 4 * (t * n_head_kv + h) * d
            for i in range(0, d - 15, 16):
                store(to + SIZE * i, narrow(load_f32x16(at + 4 * i)))
            for i in range(d - d % 16, d):
                store(to + SIZE * i, narrow(load_f32x1(at + 4 * i)))


def store_values_template(cache, x, n_past):
    (n_tok, n_head_kv, d), cap, x, cache = x.shape, cache.shape[2], address_of(x), address_of(cache)
    for row in range(n_head_kv * d):
        for t in range(n_tok):
            store(cache + SIZE * (row * cap + n_past + t), narrow(load_f32x1(x + 4 * (t * n_head_kv * d + row))))


def dots_template(x, n, rows, stride, n_rows, out):
    """out[i] = x . row i, for n_rows rows of length n, their starts `stride` numbers apart."""
    for i in range(n_rows):
        store(out + 4 * i, f32x1(dot(rows + SIZE * stride * i, n, x)))


def tiles_template(x, x_stride, n, rows, stride, n_rows, out, out_stride):
    """The same for four x, `x_stride` bytes apart; their results lie `out_stride` bytes apart."""
    for i in range(0, n_rows, 2):
        k = min(i + 1, n_rows - 1)
        a, b = tile(rows + SIZE * stride * i, rows + SIZE * stride * k, n, x, x_stride)
        for to, sums in ((out + 4 * i, a), (out + 4 * k, b)):
            store(to, f32x1(sums[0]))
            store(to + out_stride, f32x1(sums[1]))
            store(to + 2 * out_stride, f32x1(sums[2]))
            store(to + 3 * out_stride, f32x1(sums[3]))


@inline
def pad(s, n, value):
    """Fill s[n:] up to the next multiple of 16, which is returned."""
    for j in range(n, up16(n)):
        store(s + 4 * j, f32x1(value))
    return up16(n)


@inline
def up16(n):
    return (n + 15) & -16


@inline
def soft_max_row(s, n, scale):
    """s[j] = exp(scale s[j] - max) / sum, for n scores, in place; zeros follow them up to a multiple of 16.

    The sums of 16 are float32, their sum is float64.
    """
    end = pad(s, n, -np.inf)
    top = f32x16(-np.inf)
    for j in range(0, end, 16):
        top = maximum(top, load_f32x16(s + 4 * j) * scale)
    most, whole = largest(top), 0.0
    for j in range(0, end, 16):
        e = exp(load_f32x16(s + 4 * j) * scale - most)
        whole += total(e)
        store(s + 4 * j, e)
    inverse = np.float32(1 / whole)
    for j in range(0, end, 16):
        store(s + 4 * j, load_f32x16(s + 4 * j) * inverse)


# Kernels, for the items i0 to i1.


def kq_template(q, k, alone, out, i0, i1):
    (n_tok, n_head, d), (n_head_kv, cap, d), n = q.shape, k.shape, out.shape[2]
    scratch = np.empty(d, np.float32)
    row, q, k, out = address_of(scratch), address_of(q), address_of(k), address_of(out)
    for item in range(i0, i1):
        h, t = item // n_tok, item % n_tok
        cast_row(q + 4 * (t * n_head + h) * d, d, row)
        keys, to = k + SIZE * (h * n_head_kv // n_head) * cap * d, out + 4 * item * n
        if alone:
            key_dots(row, d, keys, d, n, to)
        else:
            dots(row, d, keys, d, n, to)
    keep(scratch)


@kernel
def soft_max_rows(s, scale, n_past, out, i0, i1):
    n_tok, n_kv = s.shape[1], s.shape[2]
    row = np.empty(up16(n_kv), np.float32)
    for item in range(i0, i1):
        h, t = item // n_tok, item % n_tok
        n = min(n_past + t + 1, n_kv)
        row[:n] = s[h, t, :n]
        soft_max_row(address_of(row), n, scale)
        out[h, t, :n] = row[:n]
        out[h, t, n:] = 0


def kqv_template(p, v, alone, out, i0, i1):
    (n_head, n_tok, n), (n_head_kv, d, cap) = p.shape, v.shape
    scratch = np.empty(up16(n), np.float32)
    row, p, v, out = address_of(scratch), address_of(p), address_of(v), address_of(out)
    for item in range(i0, i1):
        h = item // n_tok
        cast_row(p + 4 * item * n, n, row)
        end = pad(row, n, 0)
        values, to = v + SIZE * (h * n_head_kv // n_head) * d * cap, out + 4 * item * d
        if alone:
            value_dots(row, end, values, cap, d, to)
        else:
            dots(row, end, values, cap, d, to)
    keep(scratch)


def attention_template(q, k, v, n_past, scale, alone, out, i0, i1):
    (n_tok, n_head, d), (n_head_kv, k_cap, d), (n_head_kv, d_v, v_cap) = q.shape, k.shape, v.shape
    wide, blocks = 4 * up16(d), (n_tok + 3) // 4
    scratch = np.empty(4 * (up16(d) + up16(n_past + n_tok)), np.float32)
    x, q, k, v, out = address_of(scratch), address_of(q), address_of(k), address_of(v), address_of(out)
    for item in range(i0, i1):
        h, t = item // blocks, item % blocks * 4
        h_kv, at, n = h * n_head_kv // n_head, t * n_head + h, n_past + min(t + 4, n_tok)
        keys, values = k + SIZE * h_kv * k_cap * d, v + SIZE * h_kv * d_v * v_cap
        p, long = x + 4 * wide, 4 * up16(n)
        four = t + 4 <= n_tok and not alone
        for m in range(min(4, n_tok - t)):
            cast_row(q + 4 * (at + m * n_head) * d, d, x + m * wide)
            if alone:
                key_dots(x + m * wide, d, keys, d, n, p + m * long)
            elif not four:
                dots(x + m * wide, d, keys, d, n, p + m * long)
        if four:
            tiles(x, wide, d, keys, d, n, p, long)
        for m in range(min(4, n_tok - t)):
            seen = n_past + t + m + 1
            soft_max_row(p + m * long, seen, scale)
            for j in range(up16(seen), up16(n), 16):
                store(p + m * long + 4 * j, f32x16(0))
            cast_row(p + m * long, up16(n), p + m * long)
            if alone:
                value_dots(p + m * long, up16(n), values, v_cap, d_v, out + 4 * (at + m * n_head) * d_v)
            elif not four:
                dots(p + m * long, up16(n), values, v_cap, d_v, out + 4 * (at + m * n_head) * d_v)
        if four:
            tiles(p, long, up16(n), values, v_cap, d_v, out + 4 * at * d_v, 4 * n_head * d_v)
    keep(scratch)


class Kernels(NamedTuple):
    """What a type of cache needs."""

    store_keys: Any
    store_values: Any
    kq: Any
    kqv: Any
    attention: Any


def _kernels(fmt, cast, narrow) -> Kernels:
    name, size = fmt.name, fmt.type_size
    cast_row = specialise(cast_row_template, f"cast_row_{name}", part=True, cast=cast)
    dots = specialise(dots_template, f"dots_{name}", part=True, dot=fmt.dot, SIZE=size)
    tiles = specialise(tiles_template, f"tiles_{name}", part=True, tile=fmt.tile, SIZE=size)
    parts = {"cast_row": cast_row, "dots": dots, "tiles": tiles, "SIZE": size, "key_dots": dots, "value_dots": dots}
    if fmt is F16:
        for kind, one in ("key", fmt.vec_dot), ("value", fmt.vec_dot_then_zeros):
            parts[f"{kind}_dots"] = specialise(dots_template, f"{kind}_dots_{name}", part=True, dot=one, SIZE=size)
    return Kernels(
        specialise(store_keys_template, f"store_keys_{name}", narrow=narrow, SIZE=size),
        specialise(store_values_template, f"store_values_{name}", narrow=narrow, SIZE=size),
        specialise(kq_template, f"kq_{name}", **parts),
        specialise(kqv_template, f"kqv_{name}", **parts),
        specialise(attention_template, f"attention_{name}", **parts),
    )


@inline
def _same(x):
    return x


@inline
def _through_f16(x):
    return widen_half(round_half(x))


KERNELS = {
    np.dtype(np.float16): _kernels(F16, _through_f16, round_half),
    np.dtype(np.float32): _kernels(F32, _same, _same),
}
