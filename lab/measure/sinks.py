"""The attention sink at position 0 of a prompt: the word at that position loses its meaning inside the model.

Many models turn the token at position 0 into an attention sink: later tokens put the attention on it that they need for
nothing else. Its residual vector becomes hundreds of times as long as the others, and nearly the same for every word.
In a model that is trained with a BOS token, BOS is at that position. If the file adds no BOS, the first word of the
prompt is there. In few-shot prompts that is a word of the first example; in a bare query such as "France ->" it is the
word that is asked about.

Another token in front of the prompt mends that, but not every token does: after some of them, the next word becomes a
second sink. So the candidates are measured.

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
GAIN = 0.05     # a token is put in front only if it lowers the likeness by at least this much
PROBED = 64     # the first tokens of a prompt that are run: position 0 does not depend on later tokens
SINK = 10.0     # position 0 is a sink if its residual is this many times as long as the others'


class Front(NamedTuple):
    """A token that may stand in front of every prompt, and how alike words are after it."""

    token: int | None       # None: nothing
    likeness: float


def likeness(model: Model, token: int | None) -> float:
    """The likeness of different words at the start of a prompt, after `token`: 0 to 1, where less is better.

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
    """The ids of BOS, of the tokens that end a text, and of the unknown token, if they are control tokens."""
    t = model.tokenizer
    ids = dict.fromkeys(i for i in (t.bos, t.eos, t.unknown, *sorted(t.end)) if i is not None)
    return [i for i in ids if t.types[i] in (CONTROL, UNKNOWN)]


_measured: WeakKeyDictionary[Model, list[Front]] = WeakKeyDictionary()


def measured(model: Model) -> list[Front]:
    """The likeness with nothing in front and with each candidate, the best first; measured once per model."""
    if model not in _measured:
        _measured[model] = sorted((Front(i, likeness(model, i)) for i in (None, *candidates(model))),
                                  key=lambda front: front.likeness)
    return _measured[model]


def front(model: Model, bos: int | str | None = "auto") -> tuple[int, ...]:
    """The ids that stand in front of every prompt of an experiment. Raises Error.

    "auto": BOS if the model's file adds one; else the candidate after which words are the least alike, or nothing if no
    candidate lowers the likeness. None or "none": nothing. A number, or the text of one token: that token.
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
    """Write a note on stderr if "auto" puts a token in front that the model's file does not."""
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
    """The measurements that show position 0 to be a sink."""

    layer: int              # the layer where its residual is longest compared with the others
    norm: float             # of l_out at position 0
    others: float           # of l_out elsewhere, median
    attention: float        # the share of attention that it gets from later positions, mean over layers and heads


def sink(model: Model, ids: Sequence[int]) -> Sink | None:
    """The sink at position 0; None if there is none, or if a control token stands there."""
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
    """Write a note on stderr if a word stands in the sink at position 0 (unless the other prompt has it too)."""
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
