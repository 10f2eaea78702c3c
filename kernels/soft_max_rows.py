"""The softmax of a row of scores, and what may be done to the scores before it: a soft cap, a window."""

import math

import numpy as np

from .machine.jit import inline, kernel
from .machine.lanes import first, larger, largest, total
from .machine.simd import address_of, store
from .machine.vectors import exp, f32x1, f32x16, load_f32x1, load_f32x16


@inline
def pad(s, n, value):
    """Fill s[n:] with a number up to the next multiple of 16, and return that multiple."""
    for j in range(n, up16(n)):
        store(s + 4 * j, f32x1(value))
    return up16(n)


@inline
def up16(n):
    """The next multiple of 16, or n itself."""
    return (n + 15) & -16


@inline
def soft_max_row(s, n, scale):
    """Replace n scores by s[j] = exp(scale s[j] - max) / sum; zeros follow them up to a multiple of 16.

    Sums over 16 scores are float32, the sum of those sums is float64.
    """
    end = pad(s, n, -np.inf)
    top = f32x16(-np.inf)
    for j in range(0, end, 16):
        top = larger(top, load_f32x16(s + 4 * j) * scale)
    most, whole = largest(top), 0.0
    for j in range(0, end, 16):
        e = exp(load_f32x16(s + 4 * j) * scale - most)
        whole += total(e)
        store(s + 4 * j, e)
    inverse = np.float32(1 / whole)
    for j in range(0, end, 16):
        store(s + 4 * j, load_f32x16(s + 4 * j) * inverse)


@inline
def capped(x, cap):
    """cap * tanh(x / cap) of a number, by the C library's tanhf."""
    return np.float32(math.tanh(x * (np.float32(1) / cap))) * cap


@inline
def cap_row(s, n, cap):
    """Replace n scores by what a soft cap makes of them."""
    for j in range(n):
        store(s + 4 * j, f32x1(capped(first(load_f32x1(s + 4 * j)), cap)))


@inline
def hide(s, n):
    """Take the first n scores out of the softmax: they lie before the window."""
    for j in range(n):
        store(s + 4 * j, f32x1(-np.inf))


@kernel
def soft_max_rows(s, scale, n_past, window, out, i0, i1):
    """Write the softmax of the rows i0 to i1, (head, token) pairs of s [n_head, n_tok, n_kv], into out."""
    n_tok, n_kv = s.shape[1], s.shape[2]
    row = np.empty(up16(n_kv), np.float32)
    for item in range(i0, i1):
        h, t = item // n_tok, item % n_tok
        n = min(n_past + t + 1, n_kv)
        row[:n] = s[h, t, :n]
        hide(address_of(row), n - window)
        soft_max_row(address_of(row), n, scale)
        out[h, t, :n] = row[:n]
        out[h, t, n:] = 0
