"""Unpacking rows to float32: templates over the functions that rows.py and superblocks.py describe.

Products and sums are rounded one by one, in the order of the formats' reference code, so that every bit is the same.
"""

from .machine.jit import inline
from .machine.lanes import concat, shuffle
from .machine.simd import address_of, store
from .machine.vectors import spread, to_f32

# What jit.specialise puts into the templates.
weights = weight = quants = scale = minimum = scales = minimums = factor = min_factor = unpack = None
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


# From a number for each 16 weights to the weights of each 64.
weights0, weights1, weights2, weights3 = (shuffle([4 * k + lane // 16 for lane in range(64)]) for k in range(4))


@inline
def both(v):
    return concat(v, v)


def unpack_superblocks(row, n, out):
    for block in range(row, row + n // 256 * SIZE, SIZE):
        q, d = quants(block), both(factor(block)) * to_f32(scales(block))
        m = both(min_factor(block)) * to_f32(minimums(block))
        store(out, weights0(d) * (to_f32(q[0]) - BIAS) - weights0(m))
        store(out + 256, weights1(d) * (to_f32(q[1]) - BIAS) - weights1(m))
        store(out + 512, weights2(d) * (to_f32(q[2]) - BIAS) - weights2(m))
        store(out + 768, weights3(d) * (to_f32(q[3]) - BIAS) - weights3(m))
        out += 1024


def unpack_rows(w, row_bytes, ids, out, i0, i1):
    """out[i] = row ids[i] of w, as float32."""
    n, w, to = out.shape[1], address_of(w), address_of(out)
    for i in range(i0, i1):
        unpack(w + ids[i] * row_bytes, n, to + 4 * n * i)
