"""Unpacking rows to float32: templates over the functions that rows.py describes.

Products and sums are rounded one by one, in the order of the formats' reference code, so that every bit is the same.
"""

from .simd import address_of, store
from .vectors import spread, to_f32

# What jit.specialise puts into the templates.
weights = weight = quants = scale = minimum = unpack = None
SIZE = CHUNK = BIAS = 0


def unpack_quantised(row, n, out):
    for j in range(n // 32):
        values = spread(scale(row, j)) * (to_f32(quants(row, j)) - BIAS)
        store(out + 128 * j, values)


def unpack_quantised_minimum(row, n, out):
    for j in range(n // 32):
        values = spread(scale(row, j)) * (to_f32(quants(row, j)) - BIAS) + spread(minimum(row, j))
        store(out + 128 * j, values)


def unpack_floats(row, n, out):
    for i in range(0, n - CHUNK + 1, CHUNK):
        store(out + 4 * i, weights(row + SIZE * i))
    for i in range(n - n % CHUNK, n):
        store(out + 4 * i, weight(row + SIZE * i))


def unpack_rows(w, row_bytes, ids, out, i0, i1):
    """out[i] = row ids[i] of w, as float32."""
    n, w, to = out.shape[1], address_of(w), address_of(out)
    for i in range(i0, i1):
        unpack(w + ids[i] * row_bytes, n, to + 4 * n * i)
