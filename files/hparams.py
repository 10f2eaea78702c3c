"""A model's shape, read from the metadata of its file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .errors import GGUFError, short
from .gguf import Tensor
from .unused import note_keys

ARCHITECTURES = ("llama",)
LAYERS = (  # one value, or one for each layer
    "feed_forward_length", "attention.head_count", "attention.head_count_kv", "expert_used_count")
KINDS = {int: "a whole number", float: "a number"}     # in words
NONE = {  # keys that must be 0, and why
    "expert_count": "mixtures of experts are not supported",
    "expert_used_count": "mixtures of experts are not supported",
    "expert_group_count": "mixtures of experts are not supported",
    "nextn_predict_layers": "layers that predict further tokens are not supported",
}


def read_hparams(meta: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The fields of tinymia.Config from a file's metadata. Raises GGUFError for all that `forward` cannot compute."""

    def get(key: str, default: Any, least: float, kind: Any = int) -> Any:
        value = meta.get(key, default)
        if value is None:
            raise GGUFError(f"{path}: metadata key {key} is missing")
        if isinstance(value, np.ndarray) and key in by_layer:
            if len(value) != n_layer:
                raise GGUFError(f"{path}: {key} has {len(value)} values for {n_layer} layers: one for each is needed")
            if (value != value[0]).any():
                raise GGUFError(f"{path}: {key} is {short(value)}; layers that differ are not supported")
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not least <= value < 2**31:
            raise GGUFError(f"{path}: {key} is {short(value)}; it must be {KINDS[kind]} of at least {least:g}")
        return kind(value)

    arch = meta.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        found = "is missing" if arch is None else f"{short(arch)} is not supported"
        raise GGUFError(f"{path}: general.architecture {found}; supported: {', '.join(ARCHITECTURES)}")
    by_layer = [f"{arch}.{key}" for key in LAYERS]
    n_layer = get(f"{arch}.block_count", None, 1)
    for key, why in NONE.items():
        if get(f"{arch}.{key}", 0, 0):
            raise GGUFError(f"{path}: {arch}.{key} is {short(meta[f'{arch}.{key}'])}: {why}")
    if meta.get(f"{arch}.attention.causal", True) is not True:
        found = f"{arch}.attention.causal is {short(meta[f'{arch}.attention.causal'])}"
        raise GGUFError(f"{path}: {found}: only causal attention is supported, where a token sees those before it")
    n_embd = get(f"{arch}.embedding_length", None, 1)
    n_head = get(f"{arch}.attention.head_count", None, 1)
    n_head_kv = get(f"{arch}.attention.head_count_kv", n_head, 1)
    d_head = get(f"{arch}.attention.key_length", n_embd // n_head, 1)
    n_rot = get(f"{arch}.rope.dimension_count", d_head, 2)
    n_ctx = get(f"{arch}.context_length", None, 1)
    if n_head % n_head_kv:
        raise GGUFError(f"{path}: {n_head} query heads cannot share {n_head_kv} key heads evenly")
    if n_rot % 2 or n_rot > d_head:
        raise GGUFError(f"{path}: {arch}.rope.dimension_count is {n_rot}; it must be even and at most {d_head}")
    rope_base = get(f"{arch}.rope.freq_base", 10000.0, 1e-6, float)
    scaling = meta.get(f"{arch}.rope.scaling.type", "linear")
    if not isinstance(scaling, str) or scaling not in ("none", "linear", "yarn"):
        raise GGUFError(f"{path}: rope scaling {short(scaling)} is not supported; supported: none, linear, yarn")
    factor = get(f"{arch}.rope.scaling.factor", get(f"{arch}.rope.scale_linear", 1.0, 0, float), 0, float) or 1.0
    factor = 1.0 if scaling == "none" else factor
    if scaling == "yarn" and not (1e-3 <= factor <= 1e6 and rope_base > 1):
        wrong = f"rope scaling yarn with factor {factor:g} and base {rope_base:g}"
        raise GGUFError(f"{path}: {wrong}; the factor must be 0.001 to 1e6, the base above 1")
    if not tensors:
        raise GGUFError(f"{path}: the file holds no weights (a vocabulary only?)")
    tokens = meta.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise GGUFError(f"{path}: tokenizer.ggml.tokens is missing, empty or no array of texts")
    if n_layer > len(tensors):
        raise GGUFError(f"{path}: {arch}.block_count is {n_layer}, but the file has only {len(tensors)} tensors")
    note_keys(meta, arch, path)
    return dict(
        name=str(meta.get("general.name", path.stem)),
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=n_head_kv,
        d_head=d_head,
        d_head_v=get(f"{arch}.attention.value_length", n_embd // n_head, 1),
        n_ff=get(f"{arch}.feed_forward_length", None, 1),
        n_vocab=len(tokens),
        n_ctx=n_ctx,
        n_rot=n_rot,
        eps=get(f"{arch}.attention.layer_norm_rms_epsilon", None, 0, float),
        rope_base=rope_base,
        rope_scale=1 / factor,
        rope_gain=_gain(get(f"{arch}.rope.scaling.attn_factor", 1.0, 0, float), factor if scaling == "yarn" else None),
        yarn=_corrections(n_rot, get(f"{arch}.rope.scaling.original_context_length", n_ctx, 1), rope_base)
        if scaling == "yarn" else None,
    )


def _gain(attn_factor: float, yarn_factor: float | None) -> float:
    """The factor of cos and sin: attn_factor, with yarn times 1 + 0.1 ln(factor), step by step in float32.

    llama.cpp first divides attn_factor by yarn's gain, then ggml multiplies by it again, so the two cancel except for
    float32 rounding. Both steps are repeated here to get the same bits. Factors below 1 have no gain.
    Source: llama-context.cpp, llama_context (yarn_attn_factor); ggml-cpu/ops.cpp, rope_yarn (mscale).
    """
    f32 = np.float32
    if yarn_factor is None:
        return float(f32(attn_factor))
    log = f32(math.log(f32(1) / (f32(1) / f32(yarn_factor))))
    wanted = f32(1) if log <= 0 else f32(0.1) * log + f32(1)
    given = wanted * (f32(1) / (f32(1) + f32(0.1) * log)) * f32(attn_factor)
    return float(given * f32(1 + float(f32(0.1)) * float(log)))  # 1 + 0.1 * log is rounded once in ggml's kernel


def _corrections(n_rot: int, n_ctx: int, base: float) -> tuple[float, float]:
    """YaRN's ramp (low, high): RoPE pairs below `low` rotate as trained, pairs above `high` slower by the factor.

    Pairs that make 32 turns or more over the trained context keep their speed; pairs that make one turn or less are
    slowed; those between are blended. llama.cpp reads other numbers than 32 and 1 only for other architectures.
    Source: ggml.c, ggml_rope_yarn_corr_dims; llama-hparams.h, yarn_beta_fast and yarn_beta_slow.
    """
    f32 = np.float32

    def pair(turns: float) -> np.float32:
        inside = f32(n_ctx) / (f32(turns) * f32(2) * f32(math.pi))
        return f32(n_rot) * f32(math.log(inside)) / (f32(2) * f32(math.log(base)))

    return max(0.0, math.floor(pair(32))), min(n_rot - 1.0, math.ceil(pair(1)))
