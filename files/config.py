"""The shape of a model: all that `forward` needs except the weights. hparams.py reads it from a file's metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Rope(NamedTuple):
    """The numbers that say how far RoPE turns each pair of a head at a position."""

    n_rot: int      # leading elements of each head that are turned
    base: float
    scale: float    # factor of the positions: 1 / factor of linear scaling and of YaRN
    gain: float     # factor of cos and sin: 1, unless YaRN or the metadata say otherwise
    yarn: tuple[float, float] | None    # (low, high): pairs below low keep their angle, pairs above high are scaled
    halves: bool    # pairs are (x[i], x[i + n_rot / 2]), as in GPT-NeoX, and not the neighbours (x[2i], x[2i + 1])


class Layer(NamedTuple):
    """The properties that may differ from layer to layer."""

    rope: int | None = 0            # which of the model's ropes; None: queries and keys are not turned
    window: int | None = None       # how many positions a token sees, itself included; None: all before it


@dataclass(frozen=True)
class Config:
    """The shape of a model, as the metadata of its file give it. None stands for a step that a model does not have."""

    name: str           # general.name
    arch: str           # general.architecture
    n_embd: int         # width of the residual stream
    n_layer: int
    n_head: int         # query heads
    n_head_kv: int      # key and value heads; n_head / n_head_kv queries share one
    d_head: int         # width of a query and of a key
    d_head_v: int       # width of a value
    n_ff: int           # width of the feed-forward block
    n_vocab: int
    n_ctx: int          # the most positions a run may have
    n_original: int     # the context that RoPE's angles were trained for
    eps: float          # RMS norm
    ropes: tuple[Rope, ...]
    layers: tuple[Layer, ...]               # n_layer of them
    norms: tuple[str, ...]                  # norms of a layer that have a weight, by its GGUF name
    act: str                                # activation function of the feed-forward block: "silu" or "gelu"
    freqs: str | None                       # the tensor that RoPE's angles are divided by
    d_scale: int                            # scores are divided by its square root ...
    attention_scale: float | None           # ... or multiplied by this
    scale_queries: bool                     # the queries are multiplied, before the product, and not the scores
    temperature: float | None               # queries at position p get 1 + this * ln(1 + floor(p / n_original))
    embedding_scale: float | None           # factor of the embeddings
    residual_scale: float | None            # factor of what a block adds to the stream
    logit_scale: float | None               # factor of the logits
    attn_soft_cap: float | None             # scores come closer to +-this, and never reach it
    logit_soft_cap: float | None            # the same for logits

    @property
    def product(self) -> str:
        """The name of the product with the output matrix, which is not yet the logits where these are scaled."""
        return "result_output_pre" if self.logit_scale or self.logit_soft_cap else "result_output"

    def scale(self, dtype: np.dtype) -> np.floating:
        """The factor of the scores, or of the queries, computed in a dtype and rounded to it after each step."""
        real = dtype.type
        return 1 / np.sqrt(real(self.d_scale)) if self.attention_scale is None else real(self.attention_scale)

    def has(self, part: str, il: int | None) -> bool:
        """Return whether a layer has a part of the table of names; il None: whether the model has it outside layers."""
        if part in ("silu", "gelu"):
            return self.act == part
        if part == "rope":
            return il is not None and self.layers[il].rope is not None
        if part in ("result_output", "result_output_pre"):
            return self.product == part
        return part == "-" or part in self.norms or bool(getattr(self, part, None))

    def sizes(self) -> dict[str, int]:
        """The sizes of the dimensions in the table of names, except n_tok and n_kv, which depend on the prompt."""
        return {**vars(self), "n_head*d_head_v": self.n_head * self.d_head_v}
