"""The arithmetic of tinymia.py, fast: functions with the same names and arguments, by kernels on several threads.

tinymia.py says what each function computes and in which shapes; this file adds how numbers are rounded. A weight is an
object with `stored` (a Matrix) and `scale` (a factor of its products, or None).
"""

import copy
import math
from typing import Any

import numpy as np

from . import ops
from .attention import attention, kq, kqv, put, soft_max
from .machine.jit import announce_done
from .machine.threads import Pool
from .matmul import get_rows, matmul_several


class Arithmetic:
    """The functions of tinymia.py's arithmetic on a pool of threads.

    numerics "ggml" rounds where llama.cpp's CPU backend rounds and takes sums in its order; "f32" keeps float32.
    """

    def __init__(self, threads: int | None, numerics: str):
        self.pool, self.numerics = Pool(threads), numerics
        self.threads = self.pool.n
        self.alone: bool | None = None  # a pass of one token is recognised by its one row

    def several(self) -> "Arithmetic":
        """These functions, for a single row that comes from a pass of several tokens.

        ggml sums the only token of a pass in another order, so the kernels must know which of the two a row is.
        """
        other = copy.copy(self)
        other.alone = False
        return other

    def done(self) -> None:
        """Say how long compiling took, if kernels were compiled in the pass that has just ended."""
        announce_done()

    def embed(self, weight: Any, tokens: np.ndarray) -> np.ndarray:
        """Look up the row of each token: float32 [n_tok, n_embd]."""
        w = weight.stored
        x = get_rows(w.raw, w.fmt, w.n_out, w.n_in, tokens)
        return x if weight.scale is None else x * weight.scale

    def rms_norm(self, x: np.ndarray, eps: float, dims: int = 1) -> np.ndarray:
        """Divide x by its root mean square over the last `dims` dimensions together: float32 of the same shape."""
        if x.ndim == 2:
            return ops.rms_norm(x, eps, self.pool)
        return ops.rms_norm(x.reshape(math.prod(x.shape[:-dims]), -1), eps, self.pool).reshape(x.shape)

    def linear(self, x: np.ndarray, layer: Any) -> np.ndarray:
        """Multiply each row of x [n_tok, n_in] by a weight matrix and add its bias: float32 [n_tok, n_out]."""
        weight, bias = layer
        found = matmul_several(x, (weight.stored,), self.numerics, self.pool)[0]
        found = found if weight.scale is None else found * weight.scale
        return found if bias is None else found + bias

    def linears(self, x: np.ndarray, *layers: Any) -> list[np.ndarray]:
        """Several products of one x, which is quantised once: float32 [n_tok, n_out] per layer."""
        found = matmul_several(x, [weight.stored for weight, _ in layers], self.numerics, self.pool)
        for i, (weight, bias) in enumerate(layers):
            if weight.scale is not None:
                found[i] = found[i] * weight.scale
            if bias is not None:
                found[i] = found[i] + bias
        return found

    def rope_angles(self, positions: np.ndarray, r: Any, freqs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of the angles by which RoPE turns, float32 [n_tok, n_rot / 2] each."""
        how = r.n_rot, r.base, r.scale, r.gain, r.yarn
        return ops.rope_angles(positions, *how, freqs, self.numerics)

    def rope(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, halves: bool) -> np.ndarray:
        """Rotate the pairs of each head of x [n_tok, n_head, d_head] by the angles; float32 of the same shape."""
        return ops.rope(x, cos, sin, self.pool, halves)

    def put(self, keys: np.ndarray, values: np.ndarray, k: np.ndarray, v: np.ndarray, n: int) -> None:
        """Write the keys and values of a pass to the positions from n on of one layer of a cache."""
        put(keys, values, k, v, n)

    def scores(self, q: np.ndarray, keys: np.ndarray, n_kv: int) -> np.ndarray:
        """Dot products of every query with the first n_kv keys: float32 [n_head, n_tok, n_kv]."""
        return kq(q, keys, n_kv, alone=self.alone)

    def soft_cap(self, x: np.ndarray, cap: float) -> np.ndarray:
        """Keep the size of each number of x below a cap: cap * tanh(x / cap), float32 of the same shape."""
        return ops.soft_cap(x, cap, self.pool)

    def soft_max(
        self, kq: np.ndarray, scale: float, positions: np.ndarray, window: int | None = None
    ) -> np.ndarray:
        """Turn scores [n_head, n_tok, n_kv] into weights that sum to 1; `positions` must be consecutive."""
        return soft_max(kq, scale, int(positions[0]), window=window)

    def mix(self, pattern: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Add up the values, each times its weight in the attention pattern: float32 [n_head, n_tok, d_head_v]."""
        return kqv(pattern, values, alone=self.alone)

    def attention(
        self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, positions: np.ndarray,
        window: int | None = None, cap: float | None = None,
    ) -> np.ndarray:
        """Scores, soft_cap, soft_max and mix in one, heads side by side: float32 [n_tok, n_head * d_head_v]."""
        return attention(q, keys, values, int(positions[0]), scale, self.pool, self.alone, window, cap)

    def silu(self, x: np.ndarray) -> np.ndarray:
        """Multiply each number of x, float32 [n_tok, n_ff], by its sigmoid."""
        return ops.silu(x, self.pool)

    def gelu(self, x: np.ndarray) -> np.ndarray:
        """x times the share of a normal distribution below it, of each number of x [n_tok, n_ff]."""
        return ops.gelu(x, self.numerics, self.pool)
