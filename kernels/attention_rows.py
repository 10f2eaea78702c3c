"""The row functions of attention, and the kernels made of them: one query of one head at a time.

Items are numbered h * n_tok + t, so that a thread's items share the keys and values of few heads. The templates are
specialised for caches of F16 (cast rounds, narrow makes the 16 bits) and of F32 (both leave the numbers alone).
"""

from typing import Any, NamedTuple

import numpy as np

from .cpu import round_half, widen_half
from .floats import F16, F32, f16_weight, f16_weights
from .jit import inline, kernel, specialise
from .lanes import first, fma, largest, maximum, total
from .simd import address_of, keep, store
from .vectors import exp, f32x1, f32x16, f64x1, f64x16, load_f32x1, load_f32x16, to_f64

dot = weights = weight = cast = narrow = cast_row = scores = mix = None  # see jit.specialise
SIZE = 0


def cast_row_template(x, n, y):
    """y = the n numbers of x, rounded to the cache's type."""
    for i in range(0, n - 15, 16):
        store(y + 4 * i, cast(load_f32x16(x + 4 * i)))
    for i in range(n - n % 16, n):
        store(y + 4 * i, cast(load_f32x1(x + 4 * i)))


def store_template(cache, x, n_past):
    (n_tok, n_head_kv, d), cap, x, cache = x.shape, cache.shape[1], address_of(x), address_of(cache)
    for h in range(n_head_kv):
        for t in range(n_tok):
            to, at = cache + SIZE * (h * cap + n_past + t) * d, x + 4 * (t * n_head_kv + h) * d
            for i in range(0, d - 15, 16):
                store(to + SIZE * i, narrow(load_f32x16(at + 4 * i)))
            for i in range(d - d % 16, d):
                store(to + SIZE * i, narrow(load_f32x1(at + 4 * i)))


def scores_template(q, d, keys, n, out):
    """out[j] = q . key j, for n keys of length d."""
    for j in range(n):
        store(out + 4 * j, f32x1(dot(keys + SIZE * d * j, d, q, 0)))


@inline
def soft_max_row(s, n, scale, p):
    """p[j] = exp(scale s[j] - max) / sum, for n scores; p may be s."""
    top, top_rest = f32x16(-np.inf), f32x1(-np.inf)
    for j in range(0, n - 15, 16):
        top = maximum(top, load_f32x16(s + 4 * j) * scale)
    for j in range(n - n % 16, n):
        top_rest = maximum(top_rest, load_f32x1(s + 4 * j) * scale)
    most = largest(maximum(f32x1(largest(top)), top_rest))
    sums, sums_rest = f64x16(0), f64x1(0)
    for j in range(0, n - 15, 16):
        e = exp(load_f32x16(s + 4 * j) * scale - most)
        sums = sums + to_f64(e)
        store(p + 4 * j, e)
    for j in range(n - n % 16, n):
        e = exp(load_f32x1(s + 4 * j) * scale - most)
        sums_rest = sums_rest + to_f64(e)
        store(p + 4 * j, e)
    inverse = np.float32(1 / (total(sums) + total(sums_rest)))
    for j in range(0, n - 15, 16):
        store(p + 4 * j, load_f32x16(p + 4 * j) * inverse)
    for j in range(n - n % 16, n):
        store(p + 4 * j, load_f32x1(p + 4 * j) * inverse)


def mix_template(p, n, values, d, out):
    """out[i] = sum over j of p[j] value j [i], for n values of length d."""
    stride, c = SIZE * d, 0
    while c + 64 <= d:
        e0 = e1 = e2 = e3 = f32x16(0)
        for j in range(n):
            x, byte = f32x16(first(load_f32x1(p + 4 * j))), values + stride * j + SIZE * c
            e0, e1 = fma(weights(byte), x, e0), fma(weights(byte + 16 * SIZE), x, e1)
            e2, e3 = fma(weights(byte + 32 * SIZE), x, e2), fma(weights(byte + 48 * SIZE), x, e3)
        store(out + 4 * c, e0)
        store(out + 4 * c + 64, e1)
        store(out + 4 * c + 128, e2)
        store(out + 4 * c + 192, e3)
        c += 64
    while c + 16 <= d:
        e0 = f32x16(0)
        for j in range(n):
            e0 = fma(weights(values + stride * j + SIZE * c), first(load_f32x1(p + 4 * j)), e0)
        store(out + 4 * c, e0)
        c += 16
    while c < d:
        e = f32x1(0)
        for j in range(n):
            e = fma(weight(values + stride * j + SIZE * c), load_f32x1(p + 4 * j), e)
        store(out + 4 * c, e)
        c += 1


# Kernels, for the items i0 to i1.


def kq_template(q, k, out, i0, i1):
    (n_tok, n_head, d), (n_head_kv, cap, d), n = q.shape, k.shape, out.shape[2]
    scratch = np.empty(d, np.float32)
    row, q, k, out = address_of(scratch), address_of(q), address_of(k), address_of(out)
    for item in range(i0, i1):
        h, t = item // n_tok, item % n_tok
        cast_row(q + 4 * (t * n_head + h) * d, d, row)
        scores(row, d, k + SIZE * (h * n_head_kv // n_head) * cap * d, n, out + 4 * item * n)
    keep(scratch)


@kernel
def soft_max_rows(s, scale, n_past, out, i0, i1):
    n_tok, n_kv, start, to = s.shape[1], s.shape[2], address_of(s), address_of(out)
    for item in range(i0, i1):
        n = min(n_past + item % n_tok + 1, n_kv)
        soft_max_row(start + 4 * item * n_kv, n, scale, to + 4 * item * n_kv)
        out[item // n_tok, item % n_tok, n:] = 0


def kqv_template(p, v, out, i0, i1):
    (n_head, n_tok, n), (n_head_kv, cap, d) = p.shape, v.shape
    scratch = np.empty(n, np.float32)
    row, p, v, out = address_of(scratch), address_of(p), address_of(v), address_of(out)
    for item in range(i0, i1):
        h = item // n_tok
        cast_row(p + 4 * item * n, n, row)
        mix(row, n, v + SIZE * (h * n_head_kv // n_head) * cap * d, d, out + 4 * item * d)
    keep(scratch)


def attention_template(q, k, v, n_past, scale, out, i0, i1):
    (n_tok, n_head, d), n_head_kv, d_v, k_cap, v_cap = q.shape, k.shape[0], v.shape[2], k.shape[1], v.shape[1]
    scratch = np.empty(d + n_past + n_tok, np.float32)
    row, q, k, v, out = address_of(scratch), address_of(q), address_of(k), address_of(v), address_of(out)
    p = row + 4 * d
    for item in range(i0, i1):
        h, t = item // n_tok, item % n_tok
        n, h_kv, at = n_past + t + 1, h * n_head_kv // n_head, t * n_head + h
        cast_row(q + 4 * at * d, d, row)
        scores(row, d, k + SIZE * h_kv * k_cap * d, n, p)
        soft_max_row(p, n, scale, p)
        cast_row(p, n, p)
        mix(p, n, v + SIZE * h_kv * v_cap * d_v, d_v, out + 4 * at * d_v)
    keep(scratch)


class Kernels(NamedTuple):
    """What a type of cache needs."""

    store: Any
    kq: Any
    kqv: Any
    attention: Any


def _kernels(fmt, weights, weight, cast, narrow) -> Kernels:
    name, size = fmt.name, fmt.type_size
    cast_row = specialise(cast_row_template, f"cast_row_{name}", part=True, cast=cast)
    scores = specialise(scores_template, f"scores_{name}", part=True, dot=fmt.dot, SIZE=size)
    mix = specialise(mix_template, f"mix_{name}", part=True, weights=weights, weight=weight, SIZE=size)
    parts = {"cast_row": cast_row, "scores": scores, "mix": mix, "SIZE": size}
    return Kernels(
        specialise(store_template, f"store_{name}", narrow=narrow, SIZE=size),
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
    np.dtype(np.float16): _kernels(F16, f16_weights, f16_weight, _through_f16, round_half),
    np.dtype(np.float32): _kernels(F32, load_f32x16, load_f32x1, _same, _same),
}
