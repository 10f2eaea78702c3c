"""The attention sink at the start of a prompt: who stands there loses what it says.

Many models turn the token at position 0 into a sink: later tokens look at it when they look for nothing, its residual
becomes hundreds of times as long as any other, and the same for every word. A model that is trained with a BOS token
keeps that place for it. Where the file adds none, the first word of the prompt stands there. In few-shot prompts that
is a word of the first example; in a bare query such as "France ->" it is the word asked about.

A token in front heals it, but not any token: some leave the word after them in a second sink. So it is measured.

Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks (2023), arXiv 2309.17453.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from tinymia import Error, Model
from tinymia_engine import out_of_range
from tinymia_files import note
from tinymia_files.vocab import CONTROL, UNKNOWN

from .branches import Branches

WORDS = ("France", "big", "go", "cat", "red", "one", "house", "water", "Italy", "happy", "walk", "music")
GAIN = 0.05     # a token in front must lower the likeness by this much, or nothing is put there
PROBED = 64     # tokens of a prompt that are looked at: what stands at position 0 does not depend on later ones
SINK = 10.0     # a residual so many times as long as the others' is a sink


class Front(NamedTuple):
    """A token that may stand in front of every prompt, and how alike it leaves the words after it."""

    token: int | None       # None: nothing
    likeness: float


def likeness(model: Model, token: int | None) -> float:
    """How alike different words are at the start of a prompt, after `token`: 0 to 1, the less the better.

    It is the mean over layers and pairs of words of the cosine between their l_out rows.
    """
    words = list(dict.fromkeys(model.tokenize(word, bos=False)[0] for word in WORDS))
    before = [] if token is None else [token]
    n = len(before) + 1
    rows = [i for word in words for i in (*before, word)]
    run = model.run(rows, keep=["l_out"], logits="last", cache=Branches(model.cache(), [0] * len(words), n))
    cosines = []
    for il in range(model.config.n_layer):
        x = run[f"l_out-{il}"][n - 1 :: n].astype(np.float64)
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
        cosines.append((x @ x.T)[np.triu_indices(len(x), 1)].mean())
    return float(np.mean(cosines))


def candidates(model: Model) -> list[int]:
    """Ids of BOS, of the tokens that end a text, and of the unknown token, where they are control tokens."""
    t = model.tokenizer
    ids = dict.fromkeys(i for i in (t.bos, t.eos, t.unknown, *sorted(t.end)) if i is not None)
    return [i for i in ids if t.types[i] in (CONTROL, UNKNOWN)]


_measured: WeakKeyDictionary[Model, list[Front]] = WeakKeyDictionary()


def measured(model: Model) -> list[Front]:
    """Nothing and each candidate, the best first. Measured once for each model."""
    if model not in _measured:
        _measured[model] = sorted((Front(i, likeness(model, i)) for i in (None, *candidates(model))),
                                  key=lambda front: front.likeness)
    return _measured[model]


def front(model: Model, bos: int | str | None = "auto") -> tuple[int, ...]:
    """Ids that stand in front of every prompt of an experiment. Raises Error.

    "auto": BOS where the model's file adds one; else the candidate that leaves words the least alike, or nothing where
    none lowers the likeness. None or "none": nothing. A number, or the text of one token: that token.
    """
    if bos == "auto":
        own = model.tokenizer.bos
        if model.tokenizer.add_bos and own is not None:
            return (own,)
        best, nothing = measured(model)[0], next(f for f in measured(model) if f.token is None)
        return () if best.token is None or nothing.likeness - best.likeness < GAIN else (best.token,)
    if bos is None or bos == "none":
        return ()
    token = int(bos) if isinstance(bos, int) or bos.isdecimal() else model.tokenizer.one(bos)
    if not 0 <= token < model.config.n_vocab:
        raise Error(out_of_range("bos", token, model.config.n_vocab, "tokens", "the model has"))
    return (token,)


def tell_front(model: Model, bos: str | None) -> None:
    """A line on stderr where "auto" put a token in front that the model's file does not."""
    chosen = front(model, bos)
    if bos != "auto" or model.tokenizer.add_bos or not chosen:
        return
    shown = [f"{'nothing' if f.token is None else repr(model.tokenizer.pieces[f.token])} {f.likeness:.2f}"
             for f in measured(model)]
    name = f"{model.tokenizer.pieces[chosen[0]]!r} (#{chosen[0]})"
    note(f"note: the model's file puts no BOS in front of a text. {name} stands in front of every prompt: with it "
         f"the first words of prompts are the least alike inside the model ({', '.join(shown)}; 1.00: all the "
         "same). --bos ID or --bos none decides otherwise")


class Sink(NamedTuple):
    """What makes position 0 a sink."""

    layer: int              # where its residual is longest beside the others
    norm: float             # of l_out at position 0
    others: float           # of l_out elsewhere, median
    attention: float        # share of attention that later positions give it, mean over layers and heads


def sink(model: Model, ids: Sequence[int]) -> Sink | None:
    """The sink at position 0, or None where there is none, or where a control token stands there."""
    if len(ids) < 2 or model.tokenizer.types[ids[0]] in (CONTROL, UNKNOWN):
        return None
    run = model.run(ids[:PROBED], keep=["l_out", "kq_soft_max"], logits="last")
    norms = np.array([np.linalg.norm(run[f"l_out-{il}"], axis=1) for il in range(model.config.n_layer)])
    others = np.median(norms[:, 1:], axis=1)
    il = int((norms[:, 0] / np.maximum(others, 1e-30)).argmax())
    if norms[il, 0] < SINK * others[il]:
        return None
    attention = np.mean([run[f"kq_soft_max-{il}"][:, 1:, 0].mean() for il in range(model.config.n_layer)])
    return Sink(il, float(norms[il, 0]), float(others[il]), float(attention))


def tell_sink(model: Model, prompt: str | Sequence[int], other: str | Sequence[int] | None = None) -> None:
    """A line on stderr where a word stands in the sink at position 0; with another prompt, if they differ there."""
    ids, beside = (model.tokenize(p) if isinstance(p, str) else p for p in (prompt, () if other is None else other))
    if other is not None and list(ids[:1]) == list(beside[:1]):
        return
    found = sink(model, ids)
    if found is None:
        return
    best = front(model)
    token = repr(model.tokenizer.pieces[best[0]]) if best else "a neutral word"
    note(f"note: {model.piece(ids[0])!r} stands at position 0, which is an attention sink of this model: later "
         f"positions give it {found.attention:.0%} of their attention, and after layer {found.layer} its residual has "
         f"the norm {found.norm:.0f}, the others' {found.others:.0f}. It says little about the word there; with "
         f"{token} in front of the prompt it would")
