"""`--pairs`: one command over many pairs of prompts, with mean and standard error, because one prompt proves little.

    found = over_pairs(model, "sweep", "capitals", tensor="kqv")
    found.mean, found.error                                     # [n_quantity, n_row, n_column]

Each pair is measured by the command's own function. pair_sets.py says how positions of different prompts are aligned.
A sweep's logit difference is scaled per pair, to 0 for its corrupt and 1 for its clean run, and then averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tinymia
from tinymia import Context, Error, Model
from tinymia_kernels import rms_norm

from ..measure.answers import log_softmax, logit_difference, probability, rank
from ..measure.attention_scores import first_score, previous_score
from ..measure.head_ablation import METRICS as ABLATED
from ..measure.pair_sets import ROLES, Pair, by_role, cut_pairs, read_pairs
from ..measure.patching import BY_POSITION
from ..measure.patching import METRICS as PATCHED
from ..measure.selection import chosen
from ..runs.executors import spread
from ..runs.progress import keeping
from ..runs.result import about, resume
from .ablate import ablate
from .attribute import attribute
from .pairs_result import PairsResult, check_quantity, pictures, text
from .sweep import sweep

__all__ = ["PairsResult", "over_pairs", "pictures", "text"]

Options = Mapping[str, Any]


class Kind(NamedTuple):
    """A command that can run over pairs: what it measures, and in which rows and columns."""

    measure: Callable[[Model, Pair, Options], np.ndarray]           # [n_quantity, n_row, n_column]
    layout: Callable[[Model, Options], tuple[str, list[str], str, list[str]]]   # y, rows, x, columns
    quantities: dict[str, str]                                      # units by name, the one that is shown first
    options: tuple[str, ...]                                        # arguments of the command that go with pairs
    aligned: Callable[[Options], bool]                              # whether prompts need the same number of tokens


class Work(NamedTuple):
    """The input of a worker for one pair."""

    command: str
    number: int         # of the pair, from 1
    pair: Pair
    options: dict[str, Any]


def numbers(n: int) -> list[str]:
    """The labels 0 to n - 1."""
    return [str(i) for i in range(n)]


def by_head(model: Model, options: Options) -> tuple[str, list[str], str, list[str]]:
    """The layout of results by layer and head: name and labels of the rows, name and labels of the columns."""
    return "layer", numbers(model.config.n_layer), "head", numbers(model.config.n_head)


def of_sweep(model: Model, pair: Pair, options: Options) -> np.ndarray:
    """Measure a pair by `sweep`."""
    found = sweep(model, pair.clean, pair.corrupt, pair.answer, pair.against, **options)
    grids = np.stack([getattr(found, name.replace("-", "_")) for name in PATCHED])
    return by_role(grids, pair) if options.get("tensor", "l_out") in BY_POSITION else grids


def of_sweep_layout(model: Model, options: Options) -> tuple[str, list[str], str, list[str]]:
    """The layout of a sweep: layers by roles of positions, or layers by heads."""
    layers = [str(il) for il in chosen(options.get("layers"), model.config.n_layer, "layer")]
    if options.get("tensor", "l_out") in BY_POSITION:
        return "layer", layers, "position", list(ROLES)
    return "layer", layers, "head", numbers(model.config.n_head)


def of_attribute(model: Model, pair: Pair, options: Options) -> np.ndarray:
    """The parts whose sum is the logit difference after the clean prompt."""
    found = attribute(model, pair.clean, pair.answer, pair.against)
    n_layer, n_head = found.heads.shape
    grid = np.full((n_layer + 2, n_head + 2), np.nan)
    grid[0, -1], grid[-1, -1] = found.embedding, found.output_bias + found.output_rounding + found.output_stream
    grid[1:-1, :n_head], grid[1:-1, n_head] = found.heads, found.ffn
    grid[1:-1, -1] = found.bias + found.rounding + found.stream
    return grid[None]


def of_attribute_layout(model: Model, options: Options) -> tuple[str, list[str], str, list[str]]:
    """The layout of an attribution: layers, with the embedding and the output, by parts."""
    c = model.config
    return "layer", ["tokens", *numbers(c.n_layer), "output"], "part", [*(f"head {i}" for i in range(c.n_head)), "FFN",
                                                                        "rest"]


def of_ablate(model: Model, pair: Pair, options: Options) -> np.ndarray:
    """Measure a pair by `ablate`."""
    how = {**options, "other": pair.corrupt} if options.get("mode") == "resample" else options
    return ablate(model, pair.clean, pair.answer, pair.against, **how).effects


def of_attend(model: Model, pair: Pair, options: Options) -> np.ndarray:
    """The weight of the last position on the tokens that differ, and on the first one; and two scores of `attend`."""
    differ = [i for i, (a, b) in enumerate(zip(pair.clean, pair.corrupt)) if a != b]
    found: list[np.ndarray] = []

    def take(x: np.ndarray, ctx: Context) -> None:
        found.append(np.stack([x[:, -1, differ].sum(-1), x[:, -1, 0], first_score(x), previous_score(x)]))

    model.run(pair.clean, actions=[tinymia.Replace("kq_soft_max", take)], logits="last")
    return np.stack(found, axis=1)                                                      # [4, n_layer, n_head]


def of_lens(model: Model, pair: Pair, options: Options) -> np.ndarray:
    """Measure a pair by `lens`."""
    run, grids = model.run(pair.clean, keep=["l_out"], logits="last"), []
    for il in range(model.config.n_layer):
        logits = model.unembed(rms_norm(run[f"l_out-{il}"], model.config.eps))         # [n_tok, n_vocab]
        grids.append([np.exp(log_softmax(logits)[:, pair.answer]), [rank(row, pair.answer) for row in logits],
                      [logit_difference(row, pair.answer, pair.against) for row in logits]])
    return by_role(np.array(grids, np.float64).transpose(1, 0, 2), pair)


def of_lens_layout(model: Model, options: Options) -> tuple[str, list[str], str, list[str]]:
    """The layout of a lens: layers by roles of positions."""
    return "layer", numbers(model.config.n_layer), "position", list(ROLES)


def always(options: Options) -> bool:
    """Return True: prompts must have the same number of tokens with all options."""
    return True


def when_resampled(options: Options) -> bool:
    """Return whether the corrupt prompt's heads are put into the clean run at all positions: then they must align."""
    return options.get("mode") == "resample" and options.get("at") is None


KINDS = {
    "sweep": Kind(of_sweep, of_sweep_layout, {
        "logit-difference": "logit difference, 0 corrupt to 1 clean", "probability": "probability of the answer",
        "kl": "KL divergence from the clean run (nats)", "rank": "rank of the answer"},
        ("tensor", "noising", "at", "layers"), always),
    "attribute": Kind(of_attribute, of_attribute_layout, {"logits": "logit of the answer minus that of the other"}, (),
                      lambda options: False),
    "ablate": Kind(of_ablate, by_head, {
        "logit-difference": "change of the logit difference", "logit": "change of the answer's logit",
        "probability": "change of the answer's probability", "kl": "KL divergence from the run as it is (nats)"},
        ("mode", "prompts", "pool", "at", "layers", "heads"), when_resampled),
    "attend": Kind(of_attend, by_head, {
        "to-changed": "attention of the last token to the tokens that differ",
        "to-first": "attention of the last token to the first", "first": "mean attention to the first token",
        "previous": "mean attention to the token before"}, (), always),
    "lens": Kind(of_lens, of_lens_layout, {
        "probability": "probability of the answer", "rank": "rank of the answer",
        "logit-difference": "logit of the answer minus that of the other"}, (), always),
}
assert tuple(KINDS["sweep"].quantities) == PATCHED and tuple(KINDS["ablate"].quantities) == ABLATED


def measure_pair(model: Model, work: Work) -> tuple[np.ndarray, list[float]]:
    """Measure a pair: its grids, and the logits of its two prompts. Raises Error, which names the pair."""
    pair = work.pair
    try:
        clean, corrupt = (model.run(ids, logits="last").logits[-1] for ids in (pair.clean, pair.corrupt))
        ends = [logit_difference(clean, pair.answer, pair.against), logit_difference(corrupt, pair.answer,
                pair.against), probability(clean, pair.answer), float(rank(clean, pair.answer))]
        return KINDS[work.command].measure(model, pair, work.options), ends
    except Error as e:
        raise Error(f"pair {work.number}: {e}") from e


def over_pairs(
    model: Model, command: str, pairs: str | Path | Sequence[Mapping[str, Any]], quantity: str | None = None, *,
    prompts: Sequence[tuple[Any, Any]] | None = None, executor: Executor | None = None, out: str | Path | None = None,
    options: Options | None = None, **more: Any,
) -> PairsResult:
    """Run a command ("sweep", "attribute", "ablate", "attend" or "lens") over pairs, with mean and standard error.

    pairs: the name of a file of the lab, a path, or a list of dictionaries with clean, corrupt, answer and against.
    quantity: the one that is shown; all are kept. prompts: (clean, corrupt) per pair, as texts or ids, if something
    else than the texts themselves is run, such as a chat. Further arguments go to the command: tensor, noising, at,
    layers of a sweep; mode, prompts (as options={"prompts": ...}), pool, at, layers, heads of an ablation. An
    executor's workers get a pair at a time. `out`, a .npz or .json file, keeps the result, and a stopped run continues
    from it. Raises Error, which names the pair.
    """
    if command not in KINDS:
        raise Error(f"command {command!r}: those that take pairs are {', '.join(KINDS)}")
    kind, options = KINDS[command], {**(options or {}), **more}
    for name in options:
        if name not in kind.options:
            raise Error(f"{command} over pairs takes no {name}; what it takes: {', '.join(kind.options) or 'nothing'}")
    texts = read_pairs(pairs)
    both = [(pair["clean"], pair["corrupt"]) for pair in texts] if prompts is None else prompts
    cut = cut_pairs(model, texts, both, kind.aligned(options))
    names = list(kind.quantities)
    check_quantity(quantity or names[0], names)
    y, rows, x, columns = kind.layout(model, options)
    settings = {"options": options, "answers": [[p.answer, p.against] for p in cut]}
    info = about(model, command, settings, clean=[list(p.clean) for p in cut], corrupt=[list(p.corrupt) for p in cut])
    shown = [{**pair, "answer": model.piece(p.answer), "against": model.piece(p.against)}
             for pair, p in zip(texts, cut)]
    nan = np.full((4, len(cut)), np.nan)
    found = resume(out, info, PairsResult) or PairsResult(
        info, command, names, list(kind.quantities.values()), names[0], y, x, rows, columns, shown,
        np.full((len(cut), len(names), len(rows), len(columns)), np.nan), *nan)
    found.quantity = quantity or names[0]
    todo = np.flatnonzero(np.isnan(found.clean)).tolist()
    work = [Work(command, i + 1, cut[i], dict(options)) for i in todo]
    with keeping(found, out, len(cut), f"{command} over pairs", len(cut) - len(todo)) as bar:
        for i, (grids, ends) in zip(todo, spread(model, measure_pair, work, executor)):
            found.values[i] = grids
            found.corrupt[i], found.probability[i], found.rank[i] = ends[1:]
            found.clean[i] = ends[0]    # set last: a pair that is not NaN here is done
            bar.step()
    return found
