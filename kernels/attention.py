"""Attention: scores of queries with cached keys, softmax under the causal mask, weighted sums of cached values.

A cache is k [n_head_kv, cap, d_head] and v [n_head_kv, d_v, cap], cap a multiple of 16, zeros where nothing was stored;
both are float16 (then queries and probabilities are rounded to F16 before the products, as ggml does) or float32. Query
head h reads the cache's head h // (n_head // n_head_kv). `kq`, `soft_max` and `kqv` give every step as an array.
`attention` computes the same four rows at a time, so that no thread holds more than four rows of scores; it uses the
same row functions, so that both ways agree bit for bit.

With F16 caches a pass of one token is summed in another order than a pass of several, as in ggml. The argument `alone`
says which order to take. By default one row is a pass of one token; alone=False is for a single row out of a pass of
several tokens.
"""

import numpy as np

from .attention_kernels import KERNELS
from .machine.threads import Pool, run
from .soft_max_rows import soft_max_rows

F32 = np.dtype(np.float32)
NO_CAP = np.float32(0)      # as the kernels take it


def _like(name: str, x: np.ndarray, last: int | None = None) -> None:
    """Raise ValueError unless x is a contiguous float32 array of three dimensions, the last of them of that length."""
    if x.dtype != F32 or x.ndim != 3 or not x.flags.c_contiguous or (last is not None and x.shape[2] != last):
        want = f"[..., ..., {'...' if last is None else last}]"
        raise ValueError(f"{name} is a contiguous float32 array {want}, not {x.dtype} {x.shape}")


def _cache(name: str, cache: np.ndarray, cap_axis: int, n_kv: int, n_head: int):
    """Choose the kernels for this cache's type, and view the cache as they take it.

    ValueError unless the cache has room for n_kv positions and fits n_head query heads.
    """
    kernels = KERNELS.get(cache.dtype)
    if kernels is None or cache.ndim != 3 or not cache.flags.c_contiguous:
        wrong = f"{cache.dtype} {cache.shape}"
        raise ValueError(f"{name} is a contiguous float16 or float32 array of 3 dimensions, not {wrong}")
    cap = cache.shape[cap_axis]
    if not 0 <= n_kv <= cap or cap % 16:
        raise ValueError(f"{name} has room for {cap} positions; {n_kv} are needed, and a multiple of 16")
    if cache.shape[0] == 0 or n_head % cache.shape[0]:
        raise ValueError(f"{n_head} query heads are not a multiple of the {cache.shape[0]} heads of {name}")
    return kernels, cache.view(kernels.bits)


def _alone(n_tok: int, alone: bool | None) -> bool:
    """Return whether the rows are the only token of a pass; ValueError if alone=True is given for several tokens."""
    if alone and n_tok > 1:
        raise ValueError(f"{n_tok} tokens are not alone in their pass")
    return n_tok == 1 if alone is None else alone


def _window(window: int | None) -> int:
    """The number of positions that a token sees, as the kernels take it; ValueError for a window of none."""
    if window is None:
        return 2**62
    if window < 1:
        raise ValueError(f"a window of {window} positions")
    return window


def put(keys: np.ndarray, values: np.ndarray, k: np.ndarray, v: np.ndarray, n_past: int) -> None:
    """Write to a cache: keys[h, n_past + t] = k[t, h], values[h, :, n_past + t] = v[t, h], in its dtype.

    k: float32 [n_tok, n_head_kv, d_head], v: float32 [n_tok, n_head_kv, d_v]. ValueError when shapes do not fit.
    """
    _like("k", k, keys.shape[-1])
    _like("v", v, values.shape[1])
    n_tok, n_head_kv = k.shape[:2]
    kernels, to_keys = _cache("keys", keys, 1, n_past + n_tok, n_head_kv)
    _, to_values = _cache("values", values, 2, n_past + n_tok, n_head_kv)
    if n_past < 0 or v.shape[:2] != k.shape[:2] or n_head_kv != len(keys) or n_head_kv != len(values):
        raise ValueError(f"n_past {n_past}, k {k.shape} into {keys.shape}, v {v.shape} into {values.shape}: they do "
                         "not fit each other")
    if keys.dtype != values.dtype:
        raise ValueError(f"keys are {keys.dtype}, values {values.dtype}: they do not fit each other")
    kernels.put(to_keys, to_values, k, v, n_past)


def kq(
    q: np.ndarray, k: np.ndarray, n_kv: int, pool: Pool | None = None, alone: bool | None = None
) -> np.ndarray:
    """Dot products of queries with keys, unscaled and unmasked: out[h, t, j] = q[t, h] . k[head of h, j].

    q: float32 [n_tok, n_head, d_head]. Returns float32 [n_head, n_tok, n_kv]. ValueError when shapes do not fit.
    Source: ggml-cpu.c, ggml_compute_forward_mul_mat with F16 keys.
    """
    _like("q", q, k.shape[-1])
    n_tok, n_head = q.shape[:2]
    kernels, k = _cache("k", k, 1, n_kv, n_head)
    out = np.empty((n_head, n_tok, n_kv), np.float32)
    run(pool, out.nbytes, kernels.kq, n_head * n_tok, q, k, _alone(n_tok, alone), out)
    return out


def soft_max(
    kq: np.ndarray, scale: float, n_past: int, pool: Pool | None = None, window: int | None = None
) -> np.ndarray:
    """Softmax under the causal mask: out[h, t, j] = exp(scale kq[h, t, j]) / (sum over j <= n_past + t); 0 for later j.

    float32 [n_head, n_tok, n_kv]. With a window, token t sees only the last `window` positions up to its own. Scores
    are scaled before the maximum is taken; the sum is float64.
    ValueError for an array of another kind, and for a negative n_past.
    Source: ggml-cpu/ops.cpp, ggml_compute_forward_soft_max_f32.
    """
    _like("kq", kq)
    if n_past < 0:
        raise ValueError(f"n_past is {n_past}")
    out = np.empty(kq.shape, np.float32)
    args = kq, np.float32(scale), n_past, _window(window), out
    run(pool, kq.nbytes, soft_max_rows, kq.shape[0] * kq.shape[1], *args)
    return out


def kqv(p: np.ndarray, v: np.ndarray, pool: Pool | None = None, alone: bool | None = None) -> np.ndarray:
    """Weighted sums of values: out[h, t] = sum over j of p[h, t, j] v[head of h, :, j], float32 [n_head, n_tok, d_v].

    p: float32 [n_head, n_tok, n_kv]. ValueError when shapes do not fit.
    Source: ggml-cpu.c, ggml_compute_forward_mul_mat with F16 values.
    """
    _like("p", p)
    n_head, n_tok, n_kv = p.shape
    kernels, v = _cache("v", v, 2, n_kv, n_head)
    out = np.empty((n_head, n_tok, v.shape[1]), np.float32)
    run(pool, p.nbytes, kernels.kqv, n_head * n_tok, p, v, _alone(n_tok, alone), out)
    return out


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, n_past: int, scale: float, pool: Pool | None = None,
    alone: bool | None = None, window: int | None = None, cap: float | None = None,
) -> np.ndarray:
    """Attention in one step: kqv(soft_max(kq(q, k, n_past + n_tok), scale, n_past, window), v), heads side by side.

    With a cap, scores go through ops.soft_cap before the softmax.
    q: float32 [n_tok, n_head, d_head]. Returns float32 [n_tok, n_head * d_v]. Each thread needs room for 4 n_kv scores.
    ValueError when shapes do not fit.
    """
    _like("q", q, k.shape[-1])
    n_tok, n_head = q.shape[:2]
    kernels, k = _cache("k", k, 1, n_past + n_tok, n_head)
    _, v = _cache("v", v, 2, n_past + n_tok, n_head)
    if n_past < 0 or v.shape[0] != k.shape[0] or v.dtype != k.dtype:
        raise ValueError(f"n_past {n_past}, k {k.dtype} {k.shape}, v {v.dtype} {v.shape}: they do not fit each other")
    out = np.empty((n_tok, n_head * v.shape[1]), np.float32)
    work = 8 * n_head * n_tok * (n_past + n_tok)
    cap = NO_CAP if cap is None else np.float32(cap)
    args = q, k, v, n_past, np.float32(scale), _window(window), cap, _alone(n_tok, alone), out
    run(pool, work, kernels.attention, n_head * -(-n_tok // 4), *args)
    return out
