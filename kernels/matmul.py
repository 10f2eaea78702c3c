"""Matrix products with weights as they lie in the file, and unpacking rows of them."""

import numpy as np

from . import block_panels, panels

from .activations import (  # isort: skip
    new_records, new_records_k, quantise_q8, quantise_q8_k, round_to_bf16, round_to_f16, round_to_q8_0, round_to_q8_k,
)  # fmt: skip
from .formats import Format
from .threads import Pool, run

# How activations are rounded for weights that are plain numbers, and how many at a time.
ROUND = {
    "F16": (round_to_f16, 1), "BF16": (round_to_bf16, 1), "Q8_0": (round_to_q8_0, 32), "Q8_K": (round_to_q8_k, 256),
}  # fmt: skip


def _weights(raw: np.ndarray, fmt: Format, n_rows: int, n_in: int) -> tuple[np.ndarray, int]:
    """`raw` read-only (kernels are compiled for that once), and the bytes of a row; ValueError on a wrong length."""
    row_bytes = fmt.row_bytes(n_in)
    if raw.dtype != np.uint8 or raw.ndim != 1 or not raw.flags.c_contiguous:
        raise ValueError(f"{fmt.name} weights are a flat uint8 array, not {raw.dtype} {raw.shape}")
    if n_rows < 0 or raw.size != n_rows * row_bytes:
        raise ValueError(f"{fmt.name} weights of {n_rows} rows of {n_in}: {n_rows * row_bytes} bytes, not {raw.size}")
    if raw.flags.writeable:
        raw = raw.view()
        raw.flags.writeable = False
    return raw, row_bytes


def _prepare(x: np.ndarray, fmt: Format, many: bool, pool: Pool | None) -> tuple[np.ndarray, int, int]:
    """The activations as fmt.activation says: records for blocks, panels of many, rounded float32 for float formats.

    Also the bytes from one token to the next, and the length of a row as the kernel counts it.
    """
    n_tok, n_in = x.shape
    if fmt.activation == "F32":
        return x, 4 * n_in, n_in
    if fmt.block_size == 1:
        kernel, group = ROUND[fmt.activation]
        if n_in % group:
            raise ValueError(f"rows of {n_in} weights: {fmt.name} rows are multiples of {group} weights")
        y = np.empty((n_tok, n_in), np.float32)
        run(pool, x.nbytes, kernel, x.size // group, x.reshape(-1), y.reshape(-1))
        return y, 4 * n_in, n_in
    if fmt.activation == "Q8_K":
        y, stride = new_records_k(n_tok, n_in)
        run(pool, x.nbytes, quantise_q8_k, n_tok, x, y, fmt.bias)
        return (_panels(panels, y, n_tok, n_in, 256, pool) if many else y), stride, n_in // 256
    y, stride = new_records(n_tok, n_in)
    run(pool, x.nbytes, quantise_q8, n_tok, x, y, fmt.bias, fmt.activation == "Q8_1")
    return (_panels(block_panels, y, n_tok, n_in, 32, pool) if many else y), stride, n_in // 32


def _panels(module, records: np.ndarray, n_tok: int, n_in: int, block: int, pool: Pool | None) -> np.ndarray:
    """The records of the tokens as panels.py or block_panels.py want them."""
    y = np.empty(module.panel_bytes(n_tok, n_in), np.uint8)
    run(pool, y.nbytes, module.make_panels, -(-n_tok // 16), records, n_tok, n_in // block, y)
    return y


def matmul(
    x: np.ndarray, raw: np.ndarray, fmt: Format, n_out: int, numerics: str = "ggml", pool: Pool | None = None,
    forms: dict | None = None,
) -> np.ndarray:  # fmt: skip
    """out[t, i] = sum over j of x[t, j] * weight[i, j].

    x: float32 [n_tok, n_in], contiguous. raw: uint8, the n_out rows of n_in weights as they lie in a file.
    Returns float32 [n_tok, n_out]. numerics "ggml": activations are rounded or quantised as fmt.activation says, bytes
    are multiplied as integers, sums are float32, in ggml's order, which for some formats is another one for a single
    token. "f32": float32 weights times float32 activations; one token and several are summed alike. Products of the
    same x may share `forms`, an empty dict at first, in which x is kept as it was prepared.
    ValueError when shapes, types or lengths do not fit.
    Source: ggml-cpu.c, ggml_compute_forward_mul_mat and type_traits_cpu (vec_dot_type).
    """
    if x.dtype != np.float32 or x.ndim != 2 or not x.flags.c_contiguous:
        raise ValueError(f"activations are a contiguous float32 [n_tok, n_in] array, not {x.dtype} {x.shape}")
    n_tok, n_in = x.shape
    raw, row_bytes = _weights(raw, fmt, n_out, n_in)
    out = np.empty((n_tok, n_out), np.float32)
    if numerics == "ggml":
        many = 0 < fmt.many <= n_tok and n_in % 16 == 0
        one = n_tok == 1 and fmt.matmul_one
        kernel = fmt.matmul_many if many else one or fmt.matmul
        forms, form = {} if forms is None else forms, (fmt.activation, fmt.bias, many)
        if form not in forms:
            forms[form] = _prepare(x, fmt, many, pool)
        y, stride, n = forms[form]
    elif numerics == "f32":
        kernel, y, stride, n = fmt.matmul_f32, x, 4 * n_in, n_in
    else:
        raise ValueError(f"numerics is 'ggml' or 'f32', not {numerics!r}")
    run(pool, raw.size * n_tok, kernel, n_out, y, stride, raw, row_bytes, n, out)
    return out


def get_rows(raw: np.ndarray, fmt: Format, n_rows: int, n_in: int, ids) -> np.ndarray:
    """out[k] = row ids[k] of the weights, as float32 [len(ids), n_in]; IndexError for an id outside the rows."""
    raw, row_bytes = _weights(raw, fmt, n_rows, n_in)
    ids = np.ascontiguousarray(ids, np.intp)
    if ids.ndim != 1:
        raise ValueError(f"ids are one row of numbers, not {ids.shape}")
    if ids.size and not (0 <= ids.min() and ids.max() < n_rows):
        raise IndexError(f"row ids from {ids.min()} to {ids.max()}: there are {n_rows} rows")
    out = np.empty((ids.size, n_in), np.float32)
    fmt.unpack_rows(raw, row_bytes, ids, out, 0, ids.size)
    return out


def dequantize(raw: np.ndarray, fmt: Format, n_rows: int, n_in: int) -> np.ndarray:
    """All the weights as float32 [n_rows, n_in]. Source: ggml-quants.c, dequantize_row_*."""
    return get_rows(raw, fmt, n_rows, n_in, np.arange(n_rows))
