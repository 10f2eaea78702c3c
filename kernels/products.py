"""Products of rows with tokens: the templates of the kernels that matmul.py calls.

`dot` and `tile`, of one row with a token and of two rows with four tokens, are a format's own, as rows.py and
superblocks.py describe them; `start` says where the activations begin in their array.
"""

import numpy as np

from .simd import address_of, keep

ROWS = 16  # rows that all tokens pass before the next rows: they stay in the nearest cache

start = dot = tile = unpack = None  # see jit.specialise


def matmul_rows(y, stride, w, row_bytes, n, out, i0, i1):
    """out[t, i] = row i of w . activations t, for the rows i0 to i1; n is the length that `dot` asks for."""
    n_tok, w, y = out.shape[0], address_of(w), start(y)
    for begin in range(i0, i1, ROWS):
        end = min(begin + ROWS, i1)
        for t in range(0, n_tok - 3, 4):
            for i in range(begin, end, 2):
                k = min(i + 1, end - 1)
                a, b = tile(w + i * row_bytes, w + k * row_bytes, n, y + t * stride, stride)
                out[t, i], out[t + 1, i], out[t + 2, i], out[t + 3, i] = a
                out[t, k], out[t + 1, k], out[t + 2, k], out[t + 3, k] = b
        for t in range(n_tok - n_tok % 4, n_tok):
            for i in range(begin, end):
                out[t, i] = dot(w + i * row_bytes, n, y + t * stride, stride)


def matmul_unpacked(x, stride, w, row_bytes, n, out, i0, i1):
    """The same with rows unpacked to float32 and float32 activations."""
    unpacked = np.empty((ROWS, n), np.float32)
    n_tok, w, x, rows = out.shape[0], address_of(w), address_of(x), address_of(unpacked)
    for begin in range(i0, i1, ROWS):
        end = min(begin + ROWS, i1)
        for i in range(begin, end):
            unpack(w + i * row_bytes, n, rows + 4 * n * (i - begin))
        for t in range(0, n_tok - 3, 4):
            for i in range(begin, end, 2):
                k = min(i + 1, end - 1)
                a, b = tile(rows + 4 * n * (i - begin), rows + 4 * n * (k - begin), n, x + t * stride, stride)
                out[t, i], out[t + 1, i], out[t + 2, i], out[t + 3, i] = a
                out[t, k], out[t + 1, k], out[t + 2, k], out[t + 3, k] = b
        for t in range(n_tok - n_tok % 4, n_tok):
            for i in range(begin, end):
                out[t, i] = dot(rows + 4 * n * (i - begin), n, x + t * stride, stride)
    keep(unpacked)
