"""Products with weights as they lie in the file, and unpacking rows of them: what Python calls.

Shapes and lengths are checked here, once; kernels get addresses and check nothing. Activations are rounded or quantised
as the format says, and the rows of the weights are split over threads.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .format import Format
from .machine.threads import Job, Pool, run, run_several
from .products.activations import (
    new_records,
    new_records_k,
    quantise_q8,
    quantise_q8_k,
    round_to_bf16,
    round_to_f16,
    round_to_q8_0,
    round_to_q8_k,
)
from .products.blocks_many import block_panel_bytes, fill_block_panels
from .products.superblocks_many import fill_superblock_panels, superblock_panel_bytes

# How activations are rounded beside weights that are plain numbers, and how many at a time.
ROUND = {
    "F16": (round_to_f16, 1), "BF16": (round_to_bf16, 1), "Q8_0": (round_to_q8_0, 32), "Q8_K": (round_to_q8_k, 256),
}


F32 = np.dtype(np.float32)  # a dtype is compared with another one more quickly than with a type


class Matrix(NamedTuple):
    """Rows of weights as they lie in a file. They are checked once, here, and not again by each product."""

    raw: np.ndarray     # uint8 [n_out * row_bytes], read-only: numba would compile a kernel anew for writable arrays
    fmt: Format
    n_out: int
    n_in: int
    row_bytes: int
    one: Callable[..., None] | None     # the kernel for a pass of one token
    many_from: int      # the number of tokens from which on the kernel for many is taken
    in_rows: tuple[str, int, bool]      # the form of the activations for each of the two, as a key of Forms
    in_panels: tuple[str, int, bool]

    @classmethod
    def of(cls, raw: np.ndarray, fmt: Format, n_out: int, n_in: int) -> "Matrix":
        """The matrix of n_out rows of n_in weights in flat bytes; ValueError when they are of another length."""
        row_bytes = fmt.row_bytes(n_in)
        if raw.dtype != np.uint8 or raw.ndim != 1 or not raw.flags.c_contiguous:
            raise ValueError(f"{fmt.name} weights are a flat uint8 array, not {raw.dtype} {raw.shape}")
        if n_out < 0 or raw.size != n_out * row_bytes:
            size = n_out * row_bytes
            raise ValueError(f"{fmt.name} weights of {n_out} rows of {n_in}: {size} bytes, not {raw.size}")
        if raw.flags.writeable:
            raw = raw.view()
            raw.flags.writeable = False
        many_from = fmt.many_from if fmt.many_from and n_in % 16 == 0 else sys.maxsize
        forms = (fmt.activation, fmt.bias, False), (fmt.activation, fmt.bias, True)
        return cls(raw, fmt, n_out, n_in, row_bytes, fmt.matmul_one or fmt.matmul, many_from, *forms)


def _check(x: np.ndarray) -> None:
    """Raise ValueError unless x is what products take."""
    if x.dtype != F32 or x.ndim != 2 or not x.flags.c_contiguous:
        raise ValueError(f"activations are a contiguous float32 [n_tok, n_in] array, not {x.dtype} {x.shape}")


def _prepare(x: np.ndarray, fmt: Format, in_panels: bool, pool: Pool | None) -> tuple[np.ndarray, int, int]:
    """Round or quantise the activations x, float32 [n_tok, n_in], as fmt.activation says.

    Returns the activations, the bytes per token, and the length of a row as the kernel counts it. For formats of plain
    numbers the activations stay float32; for block formats they are uint8 records (see activations.py), with in_panels
    rearranged into panels of 16 tokens. ValueError for a row that does not divide into groups.
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
        n, (y, stride) = n_in // 256, new_records_k(n_tok, n_in)
        run(pool, x.nbytes, quantise_q8_k, n_tok, x, y, fmt.bias)
        room, fill = superblock_panel_bytes, fill_superblock_panels
    else:
        n, (y, stride) = n_in // 32, new_records(n_tok, n_in)
        run(pool, x.nbytes, quantise_q8, n_tok, x, y, fmt.bias, fmt.activation == "Q8_1")
        room, fill = block_panel_bytes, fill_block_panels
    if in_panels:
        records, y = y, np.empty(room(n_tok, n_in), np.uint8)
        run(pool, y.nbytes, fill, -(-n_tok // 16), records, n_tok, n, y)
    return y, stride, n


Forms = dict[tuple[str, int, bool], tuple[np.ndarray, int, int]]  # results of _prepare by (activation, bias, in_panels)


def _product(x: np.ndarray, w: Matrix, numerics: str, pool: Pool | None, forms: Forms) -> tuple[np.ndarray, Job]:
    """Allocate the result of a product, and make the job that computes it; ValueError as in `matmul`."""
    (raw, fmt, n_out, width, row_bytes, one, many_from, in_rows, in_panels), (n_tok, n_in) = w, x.shape
    if n_in != width:
        raise ValueError(f"activations {x.shape} do not fit weights of {n_out} rows of {width}")
    out = np.empty((n_tok, n_out), F32)
    if numerics == "ggml":
        many = n_tok >= many_from
        kernel, form = (fmt.matmul_many, in_panels) if many else (one if n_tok == 1 else fmt.matmul, in_rows)
        if form not in forms:
            forms[form] = _prepare(x, fmt, many, pool)
        y, stride, n = forms[form]
    elif numerics == "f32":
        kernel, y, stride, n = fmt.matmul_f32, x, 4 * n_in, n_in
    else:
        raise ValueError(f"numerics is 'ggml' or 'f32', not {numerics!r}")
    return out, (raw.size * n_tok, kernel, n_out, (y, stride, raw, row_bytes, n, out))


def matmul(
    x: np.ndarray, raw: np.ndarray, fmt: Format, n_out: int, numerics: str = "ggml", pool: Pool | None = None
) -> np.ndarray:
    """Multiply activations by a weight matrix: out[t, i] = sum over j of x[t, j] * weight[i, j].

    x: float32 [n_tok, n_in], contiguous. raw: uint8, the n_out rows of n_in weights as they lie in a file.
    Returns float32 [n_tok, n_out]. numerics "ggml": activations are rounded or quantised as fmt.activation says, bytes
    are multiplied as integers, sums are float32, in ggml's order, which for some formats is another one for a single
    token. "f32": float32 weights times float32 activations; one token and several are summed alike. For several
    products of the same x, or several with the same weights, see matmul_several.
    ValueError when shapes, types or lengths do not fit.
    Source: ggml-cpu.c, ggml_compute_forward_mul_mat and type_traits_cpu (vec_dot_type).
    """
    _check(x)
    return matmul_several(x, [Matrix.of(raw, fmt, n_out, x.shape[1])], numerics, pool)[0]


def matmul_several(
    x: np.ndarray, matrices: Sequence[Matrix], numerics: str = "ggml", pool: Pool | None = None
) -> list[np.ndarray]:
    """Products of one x with several matrices, such as those of Q, K and V: the same bits as `matmul` one by one.

    Formats may differ. Returns a float32 [n_tok, n_out] per matrix. x is rounded or quantised once per kind of
    activation; the threads get all the products at once. ValueError as `matmul` says.
    """
    _check(x)
    forms: Forms = {}
    if len(matrices) == 1:
        out, (n_bytes, kernel, n_items, args) = _product(x, matrices[0], numerics, pool, forms)
        run(pool, n_bytes, kernel, n_items, *args)
        return [out]
    made = [_product(x, w, numerics, pool, forms) for w in matrices]
    run_several(pool, [job for _, job in made])
    return [out for out, _ in made]


def get_rows(raw: np.ndarray, fmt: Format, n_rows: int, n_in: int, ids) -> np.ndarray:
    """Unpack rows of the weights: out[k] = row ids[k], float32 [len(ids), n_in]; IndexError for an id outside them."""
    w = Matrix.of(raw, fmt, n_rows, n_in)
    ids = np.ascontiguousarray(ids, np.intp)
    if ids.ndim != 1:
        raise ValueError(f"ids are one row of numbers, not {ids.shape}")
    if ids.size and not (0 <= ids.min() and ids.max() < n_rows):
        raise IndexError(f"row ids from {ids.min()} to {ids.max()}: there are {n_rows} rows")
    out = np.empty((ids.size, n_in), F32)
    fmt.unpack_rows(w.raw, w.row_bytes, ids, out, 0, ids.size)
    return out


def dequantize(raw: np.ndarray, fmt: Format, n_rows: int, n_in: int) -> np.ndarray:
    """Unpack all the weights to float32 [n_rows, n_in]. Source: ggml-quants.c, dequantize_row_*."""
    return get_rows(raw, fmt, n_rows, n_in, np.arange(n_rows))
