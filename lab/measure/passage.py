"""What becomes of a block's output on its way into the residual stream: it may be scaled, and a norm may follow."""

from __future__ import annotations

import numpy as np

from tinymia import Model

NORMS = {"kqv_out": "post_attention_norm", "ffn_out": "post_ffw_norm"}      # the weight of the norm after each block


def passage(model: Model, name: str, whole: np.ndarray) -> np.ndarray:
    """By what the stream gets each number of a block's output multiplied: [n_embd] of whole's dtype.

    name: kqv_out-L or ffn_out-L, and `whole` a row of it. A norm divides by the size of the whole, so that what passes
    is a sum over the parts of the block's output once that size is known: Wo times a head for one.
    """
    c, (base, _, il) = model.config, name.rpartition("-")
    weight = getattr(model.weights.blk[int(il)], NORMS[base])
    factor = np.full(whole.shape, 1.0 if c.residual_scale is None else c.residual_scale, whole.dtype)
    if weight is None:
        return factor
    scaled = whole * factor
    return factor * weight / np.sqrt(np.mean(scaled * scaled) + whole.dtype.type(c.eps))
