"""The path from a block's output into the residual stream: the output may be scaled, and a norm may follow."""

from __future__ import annotations

import numpy as np

from tinymia import Model

NORMS = {"kqv_out": "post_attention_norm", "ffn_out": "post_ffw_norm"}      # the weight of the norm after each block


def passage(model: Model, name: str, whole: np.ndarray) -> np.ndarray:
    """The factor of each number of a block's output on its way into the stream: [n_embd] of whole's dtype.

    name: kqv_out-L or ffn_out-L; whole: a row of that tensor. A norm divides by the root mean square of the whole row.
    With that kept at its value in this run, each part of the output, such as that of one head, passes by itself.
    """
    c, (base, _, il) = model.config, name.rpartition("-")
    weight = getattr(model.weights.blk[int(il)], NORMS[base])
    factor = np.full(whole.shape, 1.0 if c.residual_scale is None else c.residual_scale, whole.dtype)
    if weight is None:
        return factor
    scaled = whole * factor
    return factor * weight / np.sqrt(np.mean(scaled * scaled) + whole.dtype.type(c.eps))


def passed(model: Model, name: str, x: np.ndarray) -> np.ndarray:
    """The rows of a block's output, kqv_out-L or ffn_out-L, as they are added to the stream: [n_tok, n_embd].

    They are scaled and normed as `forward` does it, with the root mean square of these rows.
    """
    c, (base, _, il) = model.config, name.rpartition("-")
    weight = getattr(model.weights.blk[int(il)], NORMS[base])
    x = x if c.residual_scale is None else x * c.residual_scale
    return x if weight is None else model.ops.rms_norm(x, c.eps, 1) * weight
