"""The metadata about positions: how far RoPE turns in each layer, and how many positions a token sees there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .config import Layer, Rope
from .errors import GGUFError, short

if TYPE_CHECKING:
    from .gguf import Tensor
    from .metadata import Reader

f32 = np.float32


def read_layers(
    r: Reader, d_head: int, n_original: int, tensors: dict[str, Tensor]
) -> tuple[tuple[Rope, ...], tuple[Layer, ...]]:
    """The kinds of RoPE that a model has, and its layers. n_original: the context that its angles were trained for."""
    arch = r.arch
    n_rot = r.get("rope.dimension_count", d_head, 2)
    if n_rot % 2 or n_rot > d_head:
        raise r.refuse("rope.dimension_count", f"; it must be even and at most {d_head}")
    base = r.get("rope.freq_base", 10000.0, 1e-6, float)
    scaling = r.raw("rope.scaling.type")
    scaling = "linear" if scaling is None else scaling
    known = ["none", "linear", "yarn", *["longrope"] * ("rope_factors_long" in arch.factors)]
    if not isinstance(scaling, str) or scaling not in known:
        raise GGUFError(f"{r.path}: rope scaling {short(scaling)} is not supported; supported: {', '.join(known)}")
    given = r.get("rope.scaling.factor", r.get("rope.scale_linear", 1.0, 0, float), 0, float) or 1.0
    factor = 1.0 if scaling == "none" else given
    if scaling == "yarn" and not (1e-3 <= factor <= 1e6 and base > 1):
        wrong = f"rope scaling yarn with factor {factor:g} and base {base:g}"
        raise GGUFError(f"{r.path}: {wrong}; the factor must be 0.001 to 1e6, the base above 1")
    yarn = factor if scaling == "yarn" else None
    attn_factor = r.get("rope.scaling.attn_factor", 1.0, 0, float)
    more = r.factor("rope.scaling.yarn_log_multiplier")

    def rope(base: float, factor: float, with_yarn: bool = True) -> Rope:
        blend = _corrections(r, n_rot, n_original, base) if with_yarn and yarn else None
        gain = _gain(attn_factor, yarn, factor, more) if with_yarn else 1.0
        return Rope(n_rot, base, 1 / factor, gain, blend, arch.halves)

    ropes, windows = [rope(base, factor)], arch.windows
    size = _window(r)
    if windows and size:
        key = "rope.freq_base_swa"
        own = r.get(key, windows.base or base, 1e-6, float) if r.counts(key) else base
        ropes.append(rope(own, given if windows.scaled else 1.0, windows.yarn))
    turned = not r.counts("rope.scaling.finetuned") or _flag(r, "rope.scaling.finetuned")
    layers = []
    for il, near in enumerate(_pattern(r) if size else [False] * r.n_layer):
        skipped = not turned or (arch.rope_step is not None and (il + 1) % arch.rope_step == 0)
        layers.append(Layer(None if skipped else int(near), size if near else None))
    return (tuple(ropes) if turned else ()), tuple(layers)


def _flag(r: Reader, key: str) -> bool:
    """Read a key that is true or false; true if it is missing."""
    value = r.raw(key)
    if value is not None and not isinstance(value, bool):
        raise r.refuse(key, "; it must be true or false")
    return value is not False


def _window(r: Reader) -> int | None:
    """The number of positions that a token sees in layers with a window; None if there are no such layers."""
    if r.arch.windows is None:
        return None
    size: int = r.get("attention.sliding_window", r.arch.windows.size or 0, 1 if r.arch.windows.size else 0)
    return size or None


def _pattern(r: Reader) -> list[bool]:
    """For each layer, whether it has a window: as the file lists them, or all layers but the last of every few.

    Source: llama-model.cpp, load_swa_pattern; llama-hparams.cpp, set_swa_pattern.
    """
    assert r.arch.windows is not None
    key = "attention.sliding_window_pattern"
    value = r.raw(key)
    if isinstance(value, (np.ndarray, list)):
        if np.asarray(value).dtype.kind not in "biu" or len(value) != r.n_layer:
            raise r.refuse(key, f"; it must be a number, or true or false for each of the {r.n_layer} layers")
        return [bool(v) for v in value]
    every = r.get(key, r.arch.windows.every, 0)
    return [every == 0 or il % every < every - 1 for il in range(r.n_layer)]


def _gain(attn_factor: float, yarn: float | None, factor: float, multiplier: float | None) -> float:
    """The factor of cos and sin: attn_factor, with YaRN times 1 + 0.1 ln(factor), step by step in float32.

    llama.cpp first divides attn_factor by YaRN's gain, and ggml multiplies by it again. The two cancel except for
    float32 rounding; both steps are repeated here to get the same bits. A factor below 1 has no gain. `yarn` is the
    model's factor, `factor` that of the layer. A multiplier also divides by 1 + 0.1 * multiplier * ln(factor).
    Source: llama-context.cpp, llama_context (yarn_attn_factor); ggml-cpu/ops.cpp, rope_yarn (mscale).
    """
    if yarn is None:
        return float(f32(attn_factor))

    def log_of(factor: float) -> np.float32:
        return f32(math.log(f32(1) / (f32(1) / f32(factor))))

    def size(times: float) -> np.float32:
        return f32(1) if log <= 0 else f32(0.1) * f32(times) * log + f32(1)

    log = log_of(yarn)
    wanted = size(1.0) if multiplier is None else size(1.0) / size(multiplier)
    given = wanted * (f32(1) / (f32(1) + f32(0.1) * log)) * f32(attn_factor)
    return float(given * f32(1 + float(f32(0.1)) * float(log_of(factor))))  # rounded once in ggml's kernel


def _corrections(r: Reader, n_rot: int, n_ctx: int, base: float) -> tuple[float, float]:
    """The range of pairs (low, high) in which YaRN blends: pairs below it keep their angle, pairs above it are scaled.

    A pair that turns 32 times or more within the trained context keeps its angle, one that turns once or less is
    scaled. The metadata of some architectures give other numbers than 32 and 1.
    Source: ggml.c, ggml_rope_yarn_corr_dims; llama-hparams.h, yarn_beta_fast and yarn_beta_slow.
    """
    def pair(turns: float) -> np.float32:
        inside = f32(n_ctx) / (f32(turns) * f32(2) * f32(math.pi))
        return f32(n_rot) * f32(math.log(inside)) / (f32(2) * f32(math.log(base)))

    fast, slow = (r.get(key, turns, 1e-6, float) if r.counts(key) else turns
                  for key, turns in (("rope.scaling.yarn_beta_fast", 32.0), ("rope.scaling.yarn_beta_slow", 1.0)))
    return max(0.0, math.floor(pair(fast))), min(n_rot - 1.0, math.ceil(pair(slow)))
