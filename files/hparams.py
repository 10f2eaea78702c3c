"""A model's shape, read from the metadata of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import GGUFError, short
from .gguf import Tensor

ARCHITECTURES = ("llama",)


def read_hparams(meta: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The fields of tinymia.Config from a file's metadata; refuses what the forward pass would compute wrongly."""

    def get(key: str, default: Any, least: float, kind: type = int) -> Any:
        value = meta.get(key, default)
        if value is None:
            raise GGUFError(f"{path}: metadata key {key} is missing")
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one value a layer, all the same
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not least <= value < 2**31:
            raise GGUFError(f"{path}: {key} is {short(value)}; it must be {kind.__name__} of at least {least:g}")
        return kind(value)

    arch = meta.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        found = "is missing" if arch is None else f"{short(arch)} is not supported"
        raise GGUFError(f"{path}: general.architecture {found}; supported: {', '.join(ARCHITECTURES)}")
    if get(f"{arch}.expert_count", 0, 0):
        raise GGUFError(f"{path}: {arch}.expert_count: mixtures of experts are not supported")
    n_embd = get(f"{arch}.embedding_length", None, 1)
    n_head = get(f"{arch}.attention.head_count", None, 1)
    n_head_kv = get(f"{arch}.attention.head_count_kv", n_head, 1)
    d_head = get(f"{arch}.attention.key_length", n_embd // n_head, 1)
    n_rot = get(f"{arch}.rope.dimension_count", d_head, 2)
    if n_head % n_head_kv:
        raise GGUFError(f"{path}: {n_head} query heads cannot share {n_head_kv} key heads evenly")
    if n_rot % 2 or n_rot > d_head:
        raise GGUFError(f"{path}: {arch}.rope.dimension_count is {n_rot}; it must be even and at most {d_head}")
    scaling = meta.get(f"{arch}.rope.scaling.type", "linear")
    if scaling not in ("none", "linear"):
        raise GGUFError(f"{path}: rope scaling {short(scaling)} is not supported; supported: none, linear")
    factor = get(f"{arch}.rope.scaling.factor", get(f"{arch}.rope.scale_linear", 1.0, 0, float), 0, float)
    embd = tensors.get("token_embd.weight")
    if not tensors:
        raise GGUFError(f"{path}: the file holds no weights (a vocabulary only?)")
    if embd is None or len(embd.shape) != 2:
        raise GGUFError(f"{path}: tensor token_embd.weight [n_vocab, {n_embd}] is missing or no matrix")
    n_layer = get(f"{arch}.block_count", None, 1)
    if n_layer > len(tensors):
        raise GGUFError(f"{path}: {arch}.block_count is {n_layer}, but the file has only {len(tensors)} tensors")
    return dict(
        name=str(meta.get("general.name", path.stem)),
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=n_head_kv,
        d_head=d_head,
        d_head_v=get(f"{arch}.attention.value_length", n_embd // n_head, 1),
        n_ff=get(f"{arch}.feed_forward_length", None, 1),
        n_vocab=embd.shape[0],
        n_ctx=get(f"{arch}.context_length", None, 1),
        n_rot=n_rot,
        eps=get(f"{arch}.attention.layer_norm_rms_epsilon", None, 0, float),
        rope_base=get(f"{arch}.rope.freq_base", 10000.0, 1e-6, float),
        rope_scale=1 / factor if scaling == "linear" and factor else 1.0,
    )
