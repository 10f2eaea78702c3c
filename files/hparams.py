"""The shape of a model, read from the metadata of its file. architectures.py says which keys an architecture has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .architectures import Architecture
from .config import Config
from .errors import GGUFError
from .gguf import Tensor
from .metadata import Reader
from .rope import read_layers
from .unused import note_keys

NONE = {  # keys that must be 0, and why
    "expert_count": "mixtures of experts are not supported",
    "expert_used_count": "mixtures of experts are not supported",
    "expert_group_count": "mixtures of experts are not supported",
    "nextn_predict_layers": "layers that predict further tokens are not supported",
}


def read_hparams(
    meta: dict[str, Any], tensors: dict[str, Tensor], path: Path, n_ctx: int | None = None
) -> Config:
    """The shape of a model. Raises GGUFError for a model that `forward` would compute wrongly.

    n_ctx: the number of positions that a run may have; None: as the metadata say.
    """
    r = Reader(meta, path)
    arch, n_layer = r.arch, r.n_layer
    for key, why in NONE.items():
        if r.get(key, 0, 0):
            raise r.refuse(key, f": {why}")
    if meta.get(f"{r.name}.attention.causal", True) is not True:
        raise r.refuse("attention.causal", ": only causal attention is supported, where a token sees those before it")
    deepstack = r.raw("deepstack_mapping") if r.counts("deepstack_mapping") else None
    if deepstack is not None and not (np.asarray(deepstack) == -1).all():
        raise r.refuse("deepstack_mapping", ": inputs of images are not supported")
    n_embd = r.get("embedding_length", None, 1)
    n_head = r.get("attention.head_count", None, 1)
    n_head_kv = r.get("attention.head_count_kv", n_head, 1)
    d_head = r.get("attention.key_length", n_embd // n_head, 1)
    d_head_v = r.get("attention.value_length", n_embd // n_head, 1)
    if n_head % n_head_kv:
        raise GGUFError(f"{path}: {n_head} query heads cannot share {n_head_kv} key heads evenly")
    if not tensors:
        raise GGUFError(f"{path}: the file holds no weights (a vocabulary only?)")
    tokens = meta.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise GGUFError(f"{path}: tokenizer.ggml.tokens is missing, empty or no array of texts")
    if n_layer > len(tensors):
        raise GGUFError(f"{path}: {r.name}.block_count is {n_layer}, but the file has only {len(tensors)} tensors")
    n_trained = r.get("context_length", None, 1)
    temperature = r.factor("attention.temperature_scale")
    needed = r.raw("rope.scaling.type") == "yarn" or temperature or "rope_factors_long" in arch.factors
    n_original = r.get("rope.scaling.original_context_length", n_trained, 1 if needed else 0) or n_trained
    n_ctx = _context(arch, tensors, path, n_ctx, n_trained, n_original)
    ropes, layers = read_layers(r, d_head, n_original, tensors)
    if any(layer.window for layer in layers):
        for key, here in (("attention.key_length_swa", d_head), ("attention.value_length_swa", d_head_v),
                          ("rope.dimension_count_swa", ropes[0].n_rot)):
            if r.get(key, here, 1) != here:
                raise r.refuse(key, f"; layers with a window must have {here}, as the others have")
    note_keys(meta, r.name, arch.reads, path)
    return Config(
        name=str(meta.get("general.name", path.stem)),
        arch=r.name,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=n_head_kv,
        d_head=d_head,
        d_head_v=d_head_v,
        n_ff=r.get("feed_forward_length", None, 1),
        n_vocab=len(tokens),
        n_ctx=n_ctx,
        n_original=n_original,
        eps=r.get("attention.layer_norm_rms_epsilon", None, 0, float),
        ropes=ropes,
        layers=layers,
        norms=tuple(arch.norms.split()),
        act=arch.act,
        freqs=_freqs(arch, tensors, n_ctx > n_original) if ropes else None,
        d_scale=n_embd // n_head if n_layer == arch.wide_scale else d_head,
        attention_scale=r.factor("attention.scale"),
        scale_queries=arch.scale_queries,
        temperature=temperature,
        embedding_scale=math.sqrt(n_embd) if arch.embedding_root else r.factor("embedding_scale"),
        residual_scale=r.factor("residual_scale"),
        logit_scale=1 / r.get("logit_scale", None, 1e-30, float) if r.counts("logit_scale") else None,
        attn_soft_cap=_cap(r, "attn_logit_softcapping", arch.attn_soft_cap),
        logit_soft_cap=_cap(r, "final_logit_softcapping", arch.logit_soft_cap),
    )


def _context(
    arch: Architecture, tensors: dict[str, Tensor], path: Path, asked: int | None, trained: int, original: int
) -> int:
    """The number of positions that a run may have: `asked`, or else the context that the model was trained for.

    A file with separate RoPE factors for long contexts is run with those for short ones, and with the short context,
    unless more positions are asked for.
    """
    long = "rope_factors_long" in arch.factors and "rope_factors_long.weight" in tensors
    if asked is None:
        return min(trained, original) if long else trained
    if not 1 <= asked <= trained:
        raise GGUFError(f"{path}: a context of {asked} positions: the model was trained for {trained}, and it must be "
                        f"1 to {trained}")
    return asked


def _freqs(arch: Architecture, tensors: dict[str, Tensor], long: bool) -> str | None:
    """The tensor that RoPE's angles are divided by; None if there is none. Of two, one is for long contexts.

    Source: llama-model.cpp, get_rope_factors.
    """
    if not arch.factors:
        return None
    name = f"{arch.factors[0] if long or len(arch.factors) == 1 else arch.factors[1]}.weight"
    return name if name in tensors else None


def _cap(r: Reader, key: str, default: float | None) -> float | None:
    """The soft cap of a key; None if there is none."""
    if default is None:
        return None
    value: float = r.get(key, default, 0 if default == 0 else 1e-30, float)
    return value or None
