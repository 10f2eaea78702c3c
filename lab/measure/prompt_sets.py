"""Sets of prompts: read from a file with one per line, or a JSON list, and tensors pooled over each prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tinymia
from tinymia import Error, Model
from tinymia_engine import given
from tinymia_files import read_json, read_text, short

POOLS = ("last", "mean")    # how the rows of a prompt become one: the last token's row, or the mean over tokens


def read_prompts(path: str | Path) -> list[str]:
    """Read the prompts of a file: one per line, or in a .json file a list of texts, which may hold line ends.

    Empty lines are ignored; line ends may be those of any system. Raises Error.
    """
    if Path(path).suffix == ".json":
        return _listed(path, read_json(path, "a list of prompts"))
    lines = re.split("\r\n|\r|\n", read_text(path, "the prompts"))
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise Error(f"{path}: no prompts: it takes one per line, or a JSON list in a .json file")
    return prompts


def _listed(path: str | Path, prompts: Any) -> list[str]:
    if not isinstance(prompts, list) or not prompts:
        raise Error(f'{path}: the prompts must be a JSON list of texts, ["...", "..."]')
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise Error(f"{path}: prompt {i + 1} must be a text, not {short(prompt)}")
    return prompts


def cut_prompts(model: Model, prompts: Sequence[str | Sequence[int]], what: str) -> list[list[int]]:
    """The ids of each prompt. Raises Error, which names the set and the prompt, if one does not fit the context."""
    if isinstance(prompts, str) or not len(prompts):
        raise Error(f"the {what} prompts are a list of one or more")
    cut = [given.token_ids(model.tokenize(p) if isinstance(p, str) else p, model.config.n_vocab) for p in prompts]
    for i, ids in enumerate(cut):
        if not 0 < len(ids) <= model.config.n_ctx:
            raise Error(f"prompt {i + 1} of the {what} prompts has {len(ids)} tokens; it must have 1 to "
                        f"{model.config.n_ctx}, the context")
    return cut


def pooled(model: Model, base_pool_ids: tuple[str, str, Sequence[int]]) -> np.ndarray:
    """The rows of a tensor in every layer, pooled over one prompt: float64 [n_layer, width].

    base_pool_ids: the tensor's base name; "last" or "mean" (which includes BOS, if there is one); the prompt's ids.
    """
    base, pool, ids = base_pool_ids
    found = []

    def take(x: np.ndarray, ctx: tinymia.Context) -> None:
        found.append(x[-1].astype(np.float64) if pool == "last" else x.mean(0, dtype=np.float64))

    model.run(ids, actions=[tinymia.Replace(base, take)], logits="last")
    return np.array(found)
