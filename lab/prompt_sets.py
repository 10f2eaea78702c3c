"""Sets of prompts: a file with one per line, or a JSON list, and the mean of what a model computes on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import tinymia
from tinymia import Error, Model
from tinymia_files import short

POOLS = ("last", "mean")    # of a prompt's rows: the last token's, or the mean over tokens


def read_text(path: str | Path, what: str) -> str:
    """The text of a file; Error when `what` ("the prompt is") not valid UTF-8, or unreadable."""
    try:
        return Path(path).expanduser().read_text("utf-8")
    except UnicodeDecodeError as e:
        raise Error(f"{path}: {what} not valid UTF-8 at byte {e.start}") from e
    except OSError as e:
        raise Error(f"{path}: {e.strerror or e}") from e


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: one per line, where empty lines do not count, or, in a .json file, a list of texts, which
    may hold line ends. Raises Error."""
    text = read_text(path, "the prompts are")
    if Path(path).suffix == ".json":
        return _read_json(path, text)
    prompts = [line for line in text.split("\n") if line.strip()]   # Python's text mode has made all line ends \n
    if not prompts:
        raise Error(f"{path}: no prompts: it takes one per line, or a JSON list in a .json file")
    return prompts


def _read_json(path: str | Path, text: str) -> list[str]:
    try:
        prompts = json.loads(text)
    except ValueError as e:
        raise Error(f"{path}: the prompts are not JSON: {e}") from e
    if not isinstance(prompts, list) or not prompts:
        raise Error(f'{path}: the prompts must be a JSON list of texts, ["...", "..."]')
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise Error(f"{path}: prompt {i + 1} must be a text, not {short(prompt)}")
    return prompts


def cut_prompts(model: Model, prompts: Sequence[str | Sequence[int]], what: str) -> list[list[int]]:
    """Ids of each prompt. Raises Error, which names the set and the prompt, where one does not fit the context."""
    if isinstance(prompts, str) or not len(prompts):
        raise Error(f"the {what} prompts are a list of one or more")
    cut = [model.tokenize(p) if isinstance(p, str) else [int(i) for i in p] for p in prompts]
    for i, ids in enumerate(cut):
        if not 0 < len(ids) <= model.config.n_ctx:
            raise Error(f"prompt {i + 1} of the {what} prompts has {len(ids)} tokens; it must have 1 to "
                        f"{model.config.n_ctx}, the context")
    return cut


def pooled(model: Model, base_pool_ids: tuple[str, str, Sequence[int]]) -> np.ndarray:
    """Rows of a tensor of every layer, pooled over one prompt: float64 [n_layer, width].

    The tensor's base name, "last" or "mean" (BOS, where there is one, counts as well), and the prompt's ids.
    """
    base, pool, ids = base_pool_ids
    found = []

    def take(x: np.ndarray, ctx: tinymia.Context) -> None:
        found.append(x[-1].astype(np.float64) if pool == "last" else x.mean(0, dtype=np.float64))

    model.run(ids, actions=[tinymia.Replace(base, take)], logits="last")
    return np.array(found)
