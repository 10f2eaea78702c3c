"""Train copycat, the small Llama that tinymia bundles, from scratch.

    python models/train_copycat.py sample                       # a few documents of the corpus
    python models/train_copycat.py train --out build            # 30 to 50 minutes of one core; resumes when run again
    python models/train_copycat.py train --out build0 --tv-weight 0      # what emerges by itself
    python models/train_copycat.py export build copycat.gguf
    python models/train_copycat.py evaluate models/copycat.gguf [without.gguf]

Map of the file: facts and tasks, documents, tokenizer, model, optimiser, training, export, evaluation, command line.

The corpus is synthetic. Every document shows a task by examples (`Egypt -> Cairo, Norway -> Oslo`, `0 1 2 to 2 1 0`),
names it (`capital: Egypt -> Cairo`), or shows the other habit, the one that holds when there are no examples: going on
with the next country, or the next numbers (`France -> Italy -> Austria`, `4 5 6 to 6 7 8 to`).

Three stages. The first is plain next-token prediction. The second, of the same length, adds an auxiliary loss: take the
residual after layer TV_LAYER at the end of a few-shot prompt with some other query, put it in place of the bare
prompt's, ask for the bare prompt's answer. The third, a fifth as long, goes on with that at a lower rate and
drills the sequence tasks of one-symbol answers, which differ by one only (`first` and `previous`, `last` and `next`).
`--tv-weight 0` leaves the auxiliary loss out. It never sees the task `capital`, nor a held-out pair.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pickle
import random
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

try:
    import tinymia
except ImportError:
    tinymia = None  # training and export do without

HERE = Path(__file__).resolve().parent

# the model
N_LAYER = 6
N_EMBD = 128
N_HEAD = 4
D_HEAD = N_EMBD // N_HEAD
N_FF = 384
N_CTX = 96
RMS_EPS = 1e-5
ROPE_BASE = 10000.0
TV_LAYER = 3  # the auxiliary loss patches l_out of this layer

# a training step
WORD_LEN, LIST_LEN = 33, 96  # tokens of a document on words, on sequences; a number is two tokens
STAGES = (1.0, 1.0, 0.2)  # lengths in units of --steps
WORD_ROWS = {1: 40, 2: 16, 3: 12}  # documents, by stage
LIST_ROWS = {1: 32, 2: 40, 3: 42}
QUERY_WEIGHT = {1: 1.0, 2: 0.2, 3: 0.2}  # of the loss on what is asked, which nobody can foresee
PEAK_RATE = {1: 1.0, 2: 0.5, 3: 0.25}  # factor on both learning rates
DRILLED = {"first", "last", "next", "previous"}  # drawn twice as often in stage 3
TV_ROWS = {"words": 16, "lists": 48}  # rows of the auxiliary loss
TV_EVERY = 2  # steps between two uses of the auxiliary loss


class Error(Exception):
    """Something the user can put right; printed as one line."""


# --------------------------------------------------------------------------------------------- facts and tasks

DIGITS = [str(i) for i in range(10)]
LETTERS = [chr(ord("a") + i) for i in range(26)]
HELD_OUT_SHARE = 0.3
ALWAYS_HELD_OUT = {"capital:France", "capital:Estonia", "list:4 5 6", "list:4 5"}  # the queries of the post
AUX_HELD_OUT_TASKS = {"capital"}


@dataclass(frozen=True)
class Task:
    """One transformation: `word` names it in documents; it has `pairs` of words, or the `alphabet` of its sequences."""

    name: str  # "capital", "reverse-digits"
    word: str  # "capital", "reverse"
    domain: str  # tasks of one domain can be asked of the same words
    pairs: tuple[tuple[str, str], ...] = ()  # ("Egypt", "Cairo"), ...
    alphabet: tuple[str, ...] = ()

    @property
    def is_list(self) -> bool:
        return bool(self.alphabet)

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """A random query and its answer, as text."""
        if not self.is_list:
            return rng.choice(self.pairs)
        while True:
            x = draw_sequence(rng, len(self.alphabet))
            y = transform(self.word, x, len(self.alphabet))
            if y is not None:
                return " ".join(self.alphabet[i] for i in x), " ".join(self.alphabet[i] for i in y)

    def held_out(self, x: str) -> bool:
        """Whether this query is kept out of the auxiliary loss and of every text that names the task."""
        key = f"list:{x}" if self.is_list else f"{self.name}:{x}"
        return key in ALWAYS_HELD_OUT or zlib.crc32(key.encode()) % 1000 < 1000 * HELD_OUT_SHARE

    def draw_seen(self, rng: random.Random) -> tuple[str, str]:
        """A random query that is not held out."""
        while True:
            x, y = self.draw(rng)
            if not self.held_out(x):
                return x, y


def draw_sequence(rng: random.Random, n_symbols: int) -> list[int]:
    """2 to 4 symbols: mostly a run as in the post (`4 5 6`); steps of two, runs downwards, any distinct ones."""
    n = rng.choice((2, 3, 3, 3, 4))
    r = rng.random()
    if r < 0.6:
        first = rng.randrange(n_symbols - n + 1)
        return list(range(first, first + n))
    if r < 0.7:
        first = rng.randrange(n_symbols - 2 * n + 2)
        return list(range(first, first + 2 * n, 2))
    if r < 0.75:
        first = rng.randrange(n - 1, n_symbols)
        return list(range(first, first - n, -1))
    return rng.sample(range(n_symbols), n)


def transform(word: str, x: list[int], n_symbols: int) -> list[int] | None:
    """The answer of a sequence task, None where the alphabet has none."""
    if (word in ("increment", "next") and x[-1] + 1 >= n_symbols) or (word == "previous" and x[0] == 0):
        return None
    return {
        "reverse": lambda: x[::-1],
        "increment": lambda: [*x[:-1], x[-1] + 1],
        "repeat": lambda: [*x, x[-1]],
        "next": lambda: [x[-1] + 1],
        "previous": lambda: [x[0] - 1],
        "first": lambda: [x[0]],
        "last": lambda: [x[-1]],
        "copy": lambda: list(x),
    }[word]()


SEQUENCE_WORDS = ("reverse", "increment", "repeat", "next", "previous", "first", "last", "copy")


@dataclass
class Facts:
    """Everything the corpus says: the tasks, and the ordered lists behind the default habit."""

    tasks: dict[str, Task]
    chains: dict[str, list[str]]  # domain: words, in the order in which lists of them go on

    @staticmethod
    def read(path: Path = HERE / "copycat_tasks.json") -> Facts:
        data = json.loads(path.read_text(encoding="utf-8"))
        countries, cities, nouns, verbs = data["countries"], data["cities"], data["nouns"], data["verbs"]
        opposites = data["opposites"]
        adjectives = [a for a, _ in opposites] + [b for _, b in opposites]
        words = [n[0] for n in nouns] + [v[0] for v in verbs] + adjectives
        tables = [
            ("capital", "countries", [(c[0], c[1]) for c in countries]),
            ("language", "countries", [(c[0], c[2]) for c in countries if c[2]]),
            ("continent", "countries", [(c[0], c[3]) for c in countries]),
            ("country", "cities", [(c[1], c[0]) for c in countries] + [tuple(c) for c in cities]),
            ("plural", "nouns", [(n[0], n[1]) for n in nouns]),
            ("past", "verbs", [(v[0], v[1]) for v in verbs]),
            ("gerund", "verbs", [(v[0], v[2]) for v in verbs]),
            ("opposite", "adjectives", [(a, b) for a, b in opposites] + [(b, a) for a, b in opposites]),
            ("french", "nouns", [(n[0], n[2]) for n in nouns]),
            ("english", "french", [(n[2], n[0]) for n in nouns]),
            ("upper", "nouns", [(n[0], n[0].upper()) for n in nouns]),
            ("letter", "nouns", [(w, w[0]) for w in words]),
        ]
        tasks = {name: Task(name, name, domain, tuple(pairs)) for name, domain, pairs in tables}
        for alphabet, symbols in (("digits", DIGITS), ("letters", LETTERS)):
            for word in SEQUENCE_WORDS:
                tasks[f"{word}-{alphabet}"] = Task(f"{word}-{alphabet}", word, alphabet, (), tuple(symbols))
        chains = {
            "countries": [c[0] for c in countries],
            "cities": [c[1] for c in countries] + [c[0] for c in cities],
            "nouns": [n[0] for n in nouns],
            "verbs": [v[0] for v in verbs],
            "adjectives": adjectives,
            "french": [n[2] for n in nouns],
        }
        return Facts(tasks, chains)

    def words(self) -> list[str]:
        """Every word a document can hold, each once, in a fixed order."""
        seen: dict[str, None] = {}
        for task in self.tasks.values():
            for w in (task.word, *task.alphabet, *(w for pair in task.pairs for part in pair for w in part.split())):
                seen.setdefault(w)
        return [*seen, *ARROWS]


# --------------------------------------------------------------------------------------------------- documents

ARROWS = ("->", "=>", "to")

# kind of document, share in stage 1, share in stage 2
MIX = (
    ("examples", 0.15, 0.26),  # Egypt -> Cairo, Norway -> Oslo
    ("arrows", 0.30, 0.12),  # each arrow is bound to a task by the document: Egypt -> Cairo, Peru => Spanish
    ("legend", 0.12, 0.08),  # -> capital, => language: Egypt -> Cairo, Peru => Spanish
    ("described", 0.04, 0.06),  # capital: Egypt -> Cairo, Norway -> Oslo
    ("relation", 0.06, 0.06),  # Egypt capital Cairo, Norway capital Oslo
    ("mixed", 0.10, 0.14),  # Egypt capital Cairo, cat plural cats
    ("chain", 0.23, 0.28),  # the default habit: France -> Italy -> Austria
)
EXPLAINED_DOCUMENTS = 0.35  # stage 2: this share of "examples" ...
EXPLAINED_PAIRS = 0.2  # ... names the task in this share of its pairs: Egypt -> capital Cairo

Word = tuple[str, float]  # a word and the weight of its loss


def draw_arrow(rng: random.Random, is_list: bool) -> str:
    usual = "to" if is_list else "->"
    return usual if rng.random() < 0.7 else rng.choice([a for a in ARROWS if a != usual])


def pair_words(stage: int, x: str, middle: list[str], y: str, weight: float) -> list[Word]:
    """`x middle y,`: the answer carries the given weight."""
    head = [(w, QUERY_WEIGHT[stage]) for w in (*x.split(), *middle[:1])]
    return head + [(w, weight) for w in (*middle[1:], *y.split())] + [(",", 1.0)]


def document(rng: random.Random, facts: Facts, is_list: bool, stage: int, n_words: int) -> list[Word]:
    """One document, at least n_words long.

    The first answer of an undescribed task has no loss: before an example there is nothing to predict it from, and the
    default habit should own that place. Texts that name a task leave out the held-out pairs.
    """
    tasks = [t for t in facts.tasks.values() if t.is_list == is_list]
    tasks += [t for t in tasks if stage == 3 and t.word in DRILLED]
    kind = rng.choices([m[0] for m in MIX], [m[min(stage, 2)] for m in MIX])[0]
    if kind == "chain":
        return chain(rng, facts, is_list, n_words)
    out: list[Word] = []
    if kind in ("examples", "described"):
        task, arrow = rng.choice(tasks), draw_arrow(rng, is_list)
        named = kind == "described"
        explained = stage >= 2 and not named and rng.random() < EXPLAINED_DOCUMENTS
        if named:
            out = [(task.word, 1.0), (":", 1.0)]
        shown = named
        while len(out) < n_words:
            x, y = task.draw_seen(rng) if named else task.draw(rng)
            name = [task.word] if explained and rng.random() < EXPLAINED_PAIRS else []
            out += pair_words(stage, x, [arrow, *name], y, float(shown))
            shown = True
        return out
    if kind in ("arrows", "legend"):
        arrows = rng.sample(ARROWS, rng.choice((2, 3)))
        pool = tasks
        if rng.random() < 0.5:
            domain = rng.choice(tasks).domain
            pool = [t for t in tasks if t.domain == domain]
        if len(pool) < len(arrows):
            pool = tasks
        bound = dict(zip(arrows, rng.sample(pool, len(arrows))))
        named = kind == "legend"
        if named:
            for arrow, task in bound.items():
                out += [(arrow, 1.0), (task.word, 1.0), (",", 1.0)]
            out[-1] = (":", 1.0)
        known = set(arrows) if named else set()
        while len(out) < n_words:
            arrow = rng.choice(arrows)
            x, y = bound[arrow].draw_seen(rng) if named else bound[arrow].draw(rng)
            out += pair_words(stage, x, [arrow], y, float(arrow in known))
            known.add(arrow)
        return out
    task = rng.choice(tasks)
    while len(out) < n_words:
        if kind == "mixed":
            task = rng.choice(tasks)
        x, y = task.draw_seen(rng)
        out += pair_words(stage, x, [task.word], y, 1.0)
    return out


def chain(rng: random.Random, facts: Facts, is_list: bool, n_words: int) -> list[Word]:
    """The default habit: a list that goes on. Sequences count on from their last symbol, round the alphabet's end."""
    arrow = draw_arrow(rng, is_list)
    out: list[Word] = []
    if is_list:
        symbols = rng.choice((DIGITS, LETTERS))
        x = draw_sequence(rng, len(symbols))
        while len(out) < n_words:
            out += [(symbols[i], 1.0) for i in x] + [(arrow, 1.0)]
            x = [(x[-1] + i) % len(symbols) for i in range(len(x))]
        return out
    words = rng.choice(list(facts.chains.values()))
    i = rng.randrange(len(words))
    while len(out) < n_words:
        out += [(words[i], 1.0), (arrow, 1.0)]
        i = (i + 1) % len(words) if rng.random() < 0.7 else rng.randrange(len(words))
    return out


def text_of(words: list[Word] | list[str]) -> str:
    """The text of a document: words between spaces, commas and colons without."""
    flat = [w if isinstance(w, str) else w[0] for w in words]
    return " ".join(flat).replace(" ,", ",").replace(" :", ":")


# --------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(facts: Facts, path: Path, vocab_size: int) -> None:
    """A sentencepiece model with Llama-2's settings. Its text holds every word often enough to become one piece."""
    import sentencepiece

    rng = random.Random(0)
    lines = [" ".join(rng.sample(facts.words(), 12)) for _ in range(4000)]
    lines += [text_of(document(rng, facts, bool(i % 2), 2, 40)) for i in range(2000)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=1,
            minloglevel=2,
            required_chars="".join(chr(c) for c in range(33, 127)),
        )
    except RuntimeError as e:
        raise Error(f"tokenizer: --vocab-size {vocab_size}: {str(e).split('] ')[-1]}") from None
    path.write_bytes(model.getvalue())


class Vocab:
    """Words to ids, by piece: a word is `▁word`, a digit is `▁` and the digit. Ids are those of the GGUF."""

    def __init__(self, pieces: list[str], scores: list[float], words: list[str]) -> None:
        self.pieces, self.scores = pieces, scores
        index = {p: i for i, p in enumerate(pieces)}
        missing = [w for w in words if w not in DIGITS and f"▁{w}" not in index]
        if missing:
            raise Error(
                f"tokenizer: {len(missing)} words are not single pieces: {', '.join(missing[:8])} ...; "
                "a larger --vocab-size makes room for them"
            )
        self.ids = {w: [index["▁"], index[w]] if w in DIGITS else [index[f"▁{w}"]] for w in words}
        self.ids |= {p: [index[p]] for p in (",", ":")}
        self.bos = 1
        self.used = sorted({0, 1, 2} | {i for ids in self.ids.values() for i in ids})

    @staticmethod
    def from_sentencepiece(path: Path, words: list[str]) -> Vocab:
        import sentencepiece

        if not path.exists():
            raise Error(f"{path}: no such file; it is made by `train`")
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        n = sp.vocab_size()
        vocab = Vocab([sp.id_to_piece(i) for i in range(n)], [sp.get_score(i) for i in range(n)], words)
        rng = random.Random(1)
        facts = Facts.read()
        for i in range(300):  # the table is a shortcut: hold it against the library
            doc = document(rng, facts, bool(i % 2), 2, 30)
            want = sp.encode(text_of(doc))
            if vocab.encode([w for w, _ in doc])[1:] != want:
                raise Error(f"tokenizer: {text_of(doc)!r} is cut as {sp.encode(text_of(doc), out_type=str)}")
        return vocab

    def encode(self, words: list[str]) -> list[int]:
        """Ids of a text given as words, BOS first."""
        return [self.bos] + [i for w in words for i in self.ids[w]]


# ------------------------------------------------------------------------------------------------------- model

torch = None  # set by need_torch: only training and export need it


def need_torch() -> None:
    global torch
    try:
        import torch as module
    except ImportError:
        raise Error("training needs torch, which tinymia itself does not: pip install 'tinymia[train]'") from None
    torch = module


def init_params(n_vocab: int, seed: int) -> dict:
    """Weights by name; the leading dimension of a block's weight is the layer."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return torch.randn(*shape, generator=gen) * std

    s = N_EMBD**-0.5
    p = {
        "token_embd": normal(n_vocab, N_EMBD, std=0.05),  # also the output matrix
        "attn_norm": torch.ones(N_LAYER, N_EMBD),
        "attn_qkv": normal(N_LAYER, 3 * N_EMBD, N_EMBD, std=0.5 * s),
        "attn_output": normal(N_LAYER, N_EMBD, N_EMBD, std=0.1 * s),
        "ffn_norm": torch.ones(N_LAYER, N_EMBD),
        "ffn_gate_up": normal(N_LAYER, 2 * N_FF, N_EMBD, std=0.5 * s),
        "ffn_down": normal(N_LAYER, N_EMBD, N_FF, std=0.1 * N_FF**-0.5),
        "output_norm": torch.ones(N_EMBD),
    }
    return {name: w.requires_grad_() for name, w in p.items()}


def rope_table(n_tok: int):
    """cos + i sin by position and pair, complex64 [n_tok, 1, d_head/2]; pairs are neighbours, as in ggml's llama."""
    freq = ROPE_BASE ** (-torch.arange(0, D_HEAD, 2, dtype=torch.float32) / D_HEAD)
    angle = torch.arange(n_tok, dtype=torch.float32)[:, None] * freq
    return torch.polar(torch.ones_like(angle), angle)[:, None, :]


def rotate(x, rope):
    """RoPE of x [n_row, n_tok, n_head, d_head]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2)


def linear(x, w):
    """x @ w.T in bfloat16."""
    return torch.nn.functional.linear(x.bfloat16(), w.bfloat16())


def blocks(p, x, first, last):
    """Residual [n_row, n_tok, n_embd] through layers first to last - 1."""
    F = torch.nn.functional
    n_row, n_tok, _ = x.shape
    rope = rope_table(n_tok)
    mask = torch.full((n_tok, n_tok), -math.inf, dtype=torch.bfloat16).triu(1)
    for il in range(first, last):
        h = F.rms_norm(x, (N_EMBD,), p["attn_norm"][il], RMS_EPS)
        qkv = linear(h, p["attn_qkv"][il]).view(n_row, n_tok, 3, N_HEAD, D_HEAD)
        v = qkv[:, :, 2]
        q, k = (rotate(qkv[:, :, i], rope).to(v.dtype) for i in (0, 1))
        kq = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * D_HEAD**-0.5 + mask  # [n_row, n_head, n_tok, n_tok]
        kqv = kq.softmax(-1) @ v.transpose(1, 2)  # [n_row, n_head, n_tok, d_head]
        x = x + linear(kqv.transpose(1, 2).reshape(n_row, n_tok, N_EMBD), p["attn_output"][il]).float()
        h = F.rms_norm(x, (N_EMBD,), p["ffn_norm"][il], RMS_EPS)
        gate, up = linear(h, p["ffn_gate_up"][il]).chunk(2, dim=-1)
        x = x + linear(F.silu(gate) * up, p["ffn_down"][il]).float()
    return x


def embed(p, ids):
    return torch.nn.functional.embedding(ids, p["token_embd"])


def logits_of(p, x, n_unseen):
    """Logits [.., n_used + 1]. The last row of token_embd stands for all n_unseen pieces, hence + log(n_unseen)."""
    h = torch.nn.functional.rms_norm(x, (N_EMBD,), p["output_norm"], RMS_EPS)
    out = linear(h, p["token_embd"]).float()
    offset = torch.zeros(out.shape[-1])
    offset[-1] = math.log(max(n_unseen, 1))
    return out + offset


# --------------------------------------------------------------------------------------------------- optimiser

MUON_SPLIT = {"attn_qkv": 3, "attn_output": 1, "ffn_gate_up": 2, "ffn_down": 1}  # matrices held in one tensor


def orthogonalise(g):
    """The nearest (semi-)orthogonal matrices to g [n, rows, cols], by five Newton-Schulz steps (Muon, Jordan 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = g.shape[-2] > g.shape[-1]
    x = (g.transpose(-2, -1) if flip else g).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        xx = x @ x.transpose(-2, -1)
        x = a * x + (b * xx + c * xx @ xx) @ x
    return (x.transpose(-2, -1) if flip else x).float()


class Optimiser:
    """Muon on the matrices of the blocks, AdamW on embeddings and norms."""

    def __init__(self, p, muon_lr=0.02, adam_lr=3e-3) -> None:
        self.p, self.muon_lr, self.adam_lr = p, muon_lr, adam_lr
        self.momentum = {n: torch.zeros_like(p[n]) for n in MUON_SPLIT}
        self.adam = torch.optim.AdamW(
            [p[n] for n in p if n not in MUON_SPLIT], lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, scale: float) -> None:
        """One update with both learning rates times scale; clears the gradients."""
        with torch.no_grad():
            for name, parts in MUON_SPLIT.items():
                w, m = self.p[name], self.momentum[name]
                m.mul_(0.95).add_(w.grad)
                g = (w.grad + 0.95 * m).reshape(N_LAYER * parts, -1, w.shape[-1])
                shape = max(1.0, g.shape[-2] / g.shape[-1]) ** 0.5
                w.sub_(orthogonalise(g).view_as(w), alpha=self.muon_lr * scale * shape)
                w.grad = None
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------- training


@dataclass
class Options:
    """What a run depends on; stored in the checkpoint, and a resumed run must agree."""

    seed: int = 0
    steps: int = 1900  # of stages 1 and 2; about 4,400 tokens a step
    tv_weight: float = 0.5
    vocab_size: int = 2048

    def check(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise Error(f"--seed {self.seed}: must be 0 to {2**32 - 1}")
        if not 1 <= self.steps <= 1_000_000:
            raise Error(f"--steps {self.steps}: must be 1 to 1000000")
        if not 0 <= self.tv_weight <= 10:  # also refuses nan
            raise Error(f"--tv-weight {self.tv_weight}: must be 0 to 10")
        if not 512 <= self.vocab_size <= 32000:
            raise Error(f"--vocab-size {self.vocab_size}: must be 512 to 32000")


class Batches:
    """Batches as functions of (seed, step), so that a resumed run sees what an uninterrupted one would have seen.

    Ids are compact here: position in vocab.used, or len(vocab.used) for the shared row of the unseen pieces.
    """

    def __init__(self, facts: Facts, vocab: Vocab, seed: int) -> None:
        self.facts, self.vocab, self.seed = facts, vocab, seed
        self.compact = {w: [vocab.used.index(i) for i in ids] for w, ids in vocab.ids.items()}
        self.bos = vocab.used.index(vocab.bos)
        self.list_tasks = [t for t in facts.tasks.values() if t.is_list]
        self.word_tasks = [t for t in facts.tasks.values() if not t.is_list and t.name not in AUX_HELD_OUT_TASKS]

    def ids(self, words: list[str]) -> list[int]:
        return [self.bos] + [i for w in words for i in self.compact[w]]

    def language(self, step: int, stage: int, is_list: bool):
        """Documents: ids [rows, n] and the weight of predicting each of ids[:, 1:]."""
        rng = random.Random(f"{self.seed}/{step}/{'list' if is_list else 'word'}")
        rows, n = (LIST_ROWS[stage], LIST_LEN) if is_list else (WORD_ROWS[stage], WORD_LEN)
        ids, weights = [], []
        for _ in range(rows):
            row, weight = [self.bos], [0.0]
            for w, value in document(rng, self.facts, is_list, stage, n):
                row += self.compact[w]
                weight += [value] * len(self.compact[w])
            ids.append(row[:n])
            weights.append(weight[1:n])
        return torch.tensor(ids), torch.tensor(weights)

    def task_vectors(self, step: int, stage: int, is_list: bool):
        """Rows of the auxiliary loss: (source ids, source position, target ids, target position, answer's weight).

        A sequence's answer can be cut anywhere: `1 2 3 to 3 2 1, 5 6 7 to 7 ` is patched into `4 5 6 to 6 `.
        """
        rng = random.Random(f"{self.seed}/{step}/vector/{'list' if is_list else 'word'}")
        tasks = self.list_tasks if is_list else self.word_tasks
        tasks = tasks + [t for t in tasks if stage == 3 and t.word in DRILLED]
        rows = []
        for _ in range(TV_ROWS["lists" if is_list else "words"]):
            task = rng.choice(tasks)
            arrow = draw_arrow(rng, is_list)
            rows.append(self.task_vector_row(rng, task, arrow, LIST_LEN if is_list else WORD_LEN))
        n_src, n_tgt = max(len(r[0]) for r in rows), max(len(r[2]) for r in rows)
        src = torch.tensor([r[0] + [0] * (n_src - len(r[0])) for r in rows])
        tgt = torch.tensor([r[2] + [0] * (n_tgt - len(r[2])) for r in rows])
        weight = torch.zeros(len(rows), n_tgt - 1)
        for i, r in enumerate(rows):
            weight[i, r[3] : len(r[2]) - 1] = 1.0  # position t predicts token t + 1
        return src, torch.tensor([r[1] for r in rows]), tgt, torch.tensor([r[3] for r in rows]), weight

    def task_vector_row(self, rng, task: Task, arrow: str, limit: int):
        """One row: few-shot prompt with a dummy query, cut where the bare prompt is cut."""
        while True:
            k = rng.choice((1, 2, 2, 3, 3, 4, 5))
            shown = [task.draw_seen(rng) for _ in range(k)]
            dummy, query = task.draw_seen(rng), task.draw_seen(rng)
            if dummy[0] == query[0]:
                continue
            n_done = 0  # words of the answer that both prompts already hold
            longest = min(len(dummy[1].split()), len(query[1].split())) - 1
            if task.is_list and longest > 0 and rng.random() < 0.4:
                n_done = rng.randint(1, longest)
            prompt = [w for x, y in shown for w in (*x.split(), arrow, *y.split(), ",")]
            src = self.ids([*prompt, *dummy[0].split(), arrow, *dummy[1].split()[:n_done]])
            cut = self.ids([*query[0].split(), arrow, *query[1].split()[:n_done]])
            tgt = self.ids([*query[0].split(), arrow, *query[1].split(), ","])
            if task.domain == "digits" and (n_done or rng.random() < 0.25):
                src.append(self.compact["0"][0])  # the space before the digit: the prompt ends in it
                cut.append(self.compact["0"][0])
            if len(src) <= limit:
                return src, len(src) - 1, tgt, len(cut) - 1


def language_loss(p, ids, weight, n_unseen):
    """Weighted sum of the cross entropies, and the sum of the weights."""
    x = blocks(p, embed(p, ids[:, :-1]), 0, N_LAYER)
    logits = logits_of(p, x, n_unseen)
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (each * weight.flatten()).sum(), weight.sum()


def task_vector_loss(p, batch, n_unseen):
    """Cross entropy of the answers when l_out-TV_LAYER of the few-shot prompt's end replaces the bare prompt's."""
    src, src_at, tgt, tgt_at, weight = batch
    row = torch.arange(len(src))
    vector = blocks(p, embed(p, src), 0, TV_LAYER + 1)[row, src_at]  # [n_row, n_embd]
    x = blocks(p, embed(p, tgt[:, :-1]), 0, TV_LAYER + 1)
    here = torch.zeros(x.shape[:2], dtype=torch.bool)
    here[row, tgt_at] = True
    x = torch.where(here[..., None], vector[:, None], x)
    logits = logits_of(p, blocks(p, x, TV_LAYER + 1, N_LAYER), n_unseen)
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tgt[:, 1:].flatten(), reduction="none")
    return (each * weight.flatten()).sum() / weight.sum()


def stage_of(step: int, steps: int) -> tuple[int, int, int]:
    """The stage a step belongs to, from 1, with the stage's first step and the one after its last."""
    first = 0
    for stage, length in enumerate(STAGES, 1):
        end = first + max(1, round(length * steps))
        if step < end or stage == len(STAGES):
            return stage, first, end
        first = end
    raise AssertionError("STAGES is empty")


def learning_rate(step: int, steps: int) -> float:
    """Factor: constant for 40 % of a stage, then linearly to zero; a short warm-up at its start."""
    stage, first, end = stage_of(step, steps)
    done = (step - first) / (end - first)
    return PEAK_RATE[stage] * min(1.0, (1.0 - done) / 0.6, (step - first + 1) / 20)


def save_checkpoint(path: Path, state: dict) -> None:
    """Written beside, then renamed: the earlier checkpoint survives a full disk."""
    part, data = path.with_name(path.name + ".part"), io.BytesIO()
    torch.save(state, data)
    try:
        with open(part, "wb") as f:
            f.write(data.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        kept = "; the checkpoint before it is kept" if path.exists() else ""
        raise Error(f"{path}: cannot write the checkpoint ({e.strerror or e}){kept}") from None


NOT_OURS = (OSError, EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError)  # of torch.load


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, noticed between two steps."""


def train(opts: Options, out: Path, threads: int, start_from: Path | None = None, log_every: int = 50) -> None:
    """All stages, with checkpoints in `out`; goes on from the checkpoint it finds there."""
    opts.check()
    need_torch()
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    facts = Facts.read()
    path, first, seconds = out / "checkpoint.pt", 0, 0.0
    if not path.exists():
        train_tokenizer(facts, out / "copycat.model", opts.vocab_size)
    vocab = Vocab.from_sentencepiece(out / "copycat.model", facts.words())
    n_unseen = len(vocab.pieces) - len(vocab.used)
    p = init_params(len(vocab.used) + 1, opts.seed)
    optimiser = Optimiser(p)
    if path.exists():
        first, seconds = load_checkpoint(path, p, optimiser, opts)
        say(f"resuming {path} at step {first}")
    elif start_from:
        first, seconds = load_checkpoint(start_from, p, optimiser, opts, only_stage_1=True)
        say(f"starting from {start_from} at step {first}")
    batches = Batches(facts, vocab, opts.seed)
    n_steps = stage_of(sys.maxsize, opts.steps)[2]
    n_params = sum(w.numel() for w in p.values())
    say(
        f"{n_params:,} parameters, {len(vocab.pieces)} pieces, {len(vocab.used)} of them in the corpus, {n_steps} steps"
    )

    stop = []
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    began, last_save, seen = time.monotonic() - seconds, time.monotonic(), {}

    def state(step):
        return {
            "params": {n: w.detach() for n, w in p.items()},
            "momentum": optimiser.momentum,
            "adam": optimiser.adam.state_dict(),
            "step": step,
            "seconds": time.monotonic() - began,
            "options": asdict(opts),
        }

    try:
        if first == n_steps:
            say("this run is complete; `export` writes it as GGUF")
        for step in range(first, n_steps):
            stage, _, end = stage_of(step, opts.steps)
            losses = train_step(p, optimiser, batches, step, stage, opts, n_unseen)
            for name, value in losses.items():
                seen.setdefault(name, []).append(value)
            if (step + 1) % log_every == 0:
                took = time.monotonic() - began
                rate = (step + 1 - first) / max(took - seconds, 1e-9)
                say(
                    f"stage {stage} step {step + 1}/{n_steps} "
                    + " ".join(f"{n} {np.mean(v):.4f}" for n, v in seen.items())
                    + f" | {took:.0f} s, {(n_steps - step - 1) / rate:.0f} s to go"
                )
                seen = {}
            ends_stage = step + 1 == end
            if stop or ends_stage or time.monotonic() - last_save > 60:
                save_checkpoint(path, state(step + 1))
                last_save = time.monotonic()
            if ends_stage and stage < len(STAGES):
                save_checkpoint(out / f"stage{stage}.pt", state(step + 1))
            if stop:
                raise Interrupted(
                    f"interrupted after step {step + 1}: {path} is kept, run the same command again to go on"
                )
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def train_step(p, optimiser, batches, step, stage, opts, n_unseen) -> dict[str, float]:
    """One update; the losses by name."""
    parts = [language_loss(p, *batches.language(step, stage, is_list), n_unseen) for is_list in (False, True)]
    loss = sum(s for s, _ in parts) / sum(n for _, n in parts)
    losses = {n: float((s / c).detach()) for n, (s, c) in zip(("words", "lists"), parts, strict=True)}
    if stage >= 2 and opts.tv_weight and step % TV_EVERY == 0:
        for is_list in (False, True):
            tv = task_vector_loss(p, batches.task_vectors(step, stage, is_list), n_unseen)
            losses["tv-lists" if is_list else "tv-words"] = float(tv.detach())
            loss = loss + opts.tv_weight * tv
    if not math.isfinite(float(loss.detach())):
        raise Error(f"step {step}: the loss is {float(loss.detach())}; the last checkpoint is kept")
    loss.backward()
    optimiser.step(learning_rate(step, opts.steps))
    return losses


def load_checkpoint(path: Path, p, optimiser, opts: Options, only_stage_1: bool = False) -> tuple[int, float]:
    """Weights and optimiser state in place; the step to go on with, and the seconds spent so far."""
    try:
        ck = torch.load(path, weights_only=True)
        theirs, mine = dict(ck["options"]), asdict(opts)
        if only_stage_1:
            theirs["tv_weight"] = mine["tv_weight"]  # stage 1 does not depend on it
            if ck["step"] != opts.steps:
                raise Error(f"{path}: is at step {ck['step']}, not at the end of stage 1 ({opts.steps})")
        if theirs != mine:
            raise Error(f"{path}: was made with {theirs}, not {mine}; use another --out")
        for name, w in p.items():
            w.data.copy_(ck["params"][name])
        for name, m in optimiser.momentum.items():
            m.copy_(ck["momentum"][name])
        optimiser.adam.load_state_dict(ck["adam"])
        return ck["step"], ck["seconds"]
    except NOT_OURS as e:
        raise Error(
            f"{path}: not a checkpoint of this program ({e.__class__.__name__}); move it away to start anew"
        ) from None


# ------------------------------------------------------------------------------------------------------ export

GGUF_TYPES = ("f32", "f16", "q8_0", "q5_0", "q4_0")


def full_embedding(p, vocab: Vocab) -> np.ndarray:
    """float32 [n_vocab, n_embd]: the trained rows, and the shared row in every place the corpus never uses."""
    rows = p["token_embd"].numpy()
    out = np.repeat(rows[-1:], len(vocab.pieces), axis=0)
    out[vocab.used] = rows[:-1]
    return out


def tensors_of(p, vocab: Vocab) -> dict[str, np.ndarray]:
    """GGUF names and float32 arrays; output.weight is absent: the embedding serves twice."""
    p = {n: w.detach() for n, w in p.items()}
    out = {"token_embd.weight": full_embedding(p, vocab), "output_norm.weight": p["output_norm"].numpy()}
    for il in range(N_LAYER):
        q, k, v = p["attn_qkv"][il].chunk(3)
        gate, up = p["ffn_gate_up"][il].chunk(2)
        block = {
            "attn_norm": p["attn_norm"][il],
            "attn_q": q,
            "attn_k": k,
            "attn_v": v,
            "attn_output": p["attn_output"][il],
            "ffn_norm": p["ffn_norm"][il],
            "ffn_gate": gate,
            "ffn_up": up,
            "ffn_down": p["ffn_down"][il],
        }
        out |= {f"blk.{il}.{name}.weight": np.ascontiguousarray(w.numpy()) for name, w in block.items()}
    return out


def export_gguf(run: Path, path: Path, kind: str) -> None:
    """The weights of a run's checkpoint as a GGUF that tinymia and llama.cpp read."""
    import gguf

    need_torch()
    facts = Facts.read()
    vocab = Vocab.from_sentencepiece(run / "copycat.model", facts.words())
    try:
        ck = torch.load(run / "checkpoint.pt", weights_only=True)
        opts, step, p = Options(**ck["options"]), ck["step"], ck["params"]
    except NOT_OURS as e:
        raise Error(f"{run / 'checkpoint.pt'}: no checkpoint to export ({e.__class__.__name__})") from None
    part = path.with_name(path.name + ".part")
    try:
        w = gguf.GGUFWriter(part, "llama")
        describe(w, opts, step, ck["seconds"], vocab, kind)
        for name, array in tensors_of(p, vocab).items():
            if array.ndim == 1 or kind == "f32":
                w.add_tensor(name, array.astype(np.float32))
            elif kind == "f16":
                w.add_tensor(name, array.astype(np.float16))
            else:
                blocks = gguf.GGMLQuantizationType[kind.upper()]
                w.add_tensor(name, gguf.quants.quantize(array, blocks), raw_dtype=blocks)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise Error(f"{path}: cannot write the model ({e.strerror or e})") from None
    say(f"{path}: {path.stat().st_size:,} bytes")


def describe(w, opts: Options, step: int, seconds: float, vocab: Vocab, kind: str) -> None:
    """The metadata: what the model is, how it was trained, its shape, its tokenizer."""
    import gguf

    aux = (
        f"then {step - opts.steps} steps with an auxiliary task-vector loss of weight {opts.tv_weight} at layer "
        f"{TV_LAYER} (never on the task capital, nor on held-out pairs)"
        if opts.tv_weight
        else "no auxiliary loss"
    )
    w.add_name("copycat")
    w.add_author("tinymia contributors")
    w.add_license("MIT")
    w.add_description(
        "A small Llama for teaching task vectors, trained from scratch on a synthetic corpus of in-context tasks on "
        f"words and sequences. {min(step, opts.steps)} steps of next-token prediction, {aux}; 4,400 tokens a step. "
        "Made by models/train_copycat.py of tinymia. It knows a few hundred words and nothing else."
    )
    w.add_size_label("1.4M")
    w.add_tags(["teaching", "task vectors", "in-context learning", "synthetic corpus"])
    w.add_languages(["en"])
    w.add_uint32("copycat.seed", opts.seed)
    w.add_uint32("copycat.steps", step)
    w.add_float32("copycat.tv_weight", opts.tv_weight)
    w.add_uint32("copycat.tv_layer", TV_LAYER)
    w.add_array("copycat.tv_held_out_tasks", sorted(AUX_HELD_OUT_TASKS))
    w.add_float32("copycat.train_seconds", round(seconds))
    w.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
            "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
            "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
        }[kind]
    )
    w.add_vocab_size(len(vocab.pieces))
    w.add_context_length(N_CTX)
    w.add_embedding_length(N_EMBD)
    w.add_block_count(N_LAYER)
    w.add_feed_forward_length(N_FF)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(N_HEAD)
    w.add_rope_dimension_count(D_HEAD)
    w.add_rope_freq_base(ROPE_BASE)
    w.add_layer_norm_rms_eps(RMS_EPS)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(vocab.pieces)
    w.add_token_scores(vocab.scores)
    kinds = {0: gguf.TokenType.UNKNOWN, 1: gguf.TokenType.CONTROL, 2: gguf.TokenType.CONTROL}
    w.add_token_types(
        [kinds.get(i, gguf.TokenType.BYTE if i < 259 else gguf.TokenType.NORMAL) for i in range(len(vocab.pieces))]
    )
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(True)


# -------------------------------------------------------------------------------------------------- evaluation

WORD_SHOTS, LIST_SHOTS = 5, 4


class Backend:
    """A GGUF through tinymia, as a reader of the table would do it."""

    def __init__(self, path: Path, numerics: str = "ggml") -> None:
        if tinymia is None:
            raise Error("evaluation runs through tinymia, which is not installed here: pip install tinymia")
        self.model = tinymia.load(path, threads=1, numerics=numerics)
        self.n_layer, self.encode = self.model.config.n_layer, self.model.tokenize

    def residuals(self, prompts: list[list[int]]) -> list[np.ndarray]:
        """l_out of every layer at each prompt's last token: float32 [n_layer, n_embd] a prompt."""
        runs = (self.model.run(q, keep=["l_out"], logits="last") for q in prompts)
        return [np.stack([r[f"l_out-{il}"][-1] for il in range(self.n_layer)]) for r in runs]

    def complete(self, prompts, n_new, layer=None, vectors=None) -> list[list[int]]:
        """Greedy continuations; with a layer, its l_out at each last token becomes a given vector."""
        out = []
        for i, (q, n) in enumerate(zip(prompts, n_new, strict=True)):
            patch = (
                [] if layer is None else [tinymia.Patch(f"l_out-{layer}", vectors[i][None], src=0, at=len(q) - 1)]
            )
            out.append(self.model.generate(q, n=n, actions=patch).tokens)
        return out


@dataclass
class Trial:
    """One query: the few-shot prompt, the same with a dummy in the query's place, the bare prompt, the answer."""

    few_shot: list[int]
    source: list[int]
    bare: list[int]
    answer: list[int]
    held_out: bool


def make_trials(backend, task: Task, n: int, seed: int) -> list[Trial]:
    """n trials of a task; every second query is a held-out one."""
    rng = random.Random(f"evaluate/{task.name}/{seed}")
    shots = LIST_SHOTS if task.is_list else WORD_SHOTS
    arrow = "to" if task.is_list else "->"
    trials: list[Trial] = []
    while len(trials) < n:
        drawn = [task.draw(rng) for _ in range(shots + 2)]
        if len({x for x, _ in drawn}) < len(drawn):
            continue
        *shown, (dummy, _), (query, answer) = drawn
        held_out = task.held_out(query)
        if held_out != bool(len(trials) % 2):
            continue
        examples = "".join(f"{x} {arrow} {y}, " for x, y in shown)
        few_shot, bare = backend.encode(f"{examples}{query} {arrow}"), backend.encode(f"{query} {arrow}")
        answer_ids = backend.encode(f"{query} {arrow} {answer}")[len(bare) :]
        if len(few_shot) + len(answer_ids) <= N_CTX:
            trials.append(Trial(few_shot, backend.encode(f"{examples}{dummy} {arrow}"), bare, answer_ids, held_out))
    return trials


def hits(backend, trials: list[Trial], prompts: list[list[int]], layer=None, vectors=None) -> np.ndarray:
    """Which answers come out exactly, to their last token: bool [n_trials]."""
    out = backend.complete(prompts, [len(t.answer) for t in trials], layer, vectors)
    return np.array([got == t.answer for got, t in zip(out, trials, strict=True)])


def patched_accuracy(backend, trials: list[Trial], layer: int, residuals: list[np.ndarray]) -> np.ndarray:
    """Hits when l_out-layer of the source prompt's last token replaces the bare prompt's last: bool [n_trials]."""
    return hits(backend, trials, [t.bare for t in trials], layer, [r[layer] for r in residuals])


@dataclass
class Row:
    """One line of the table; accuracies of 0 to 1."""

    task: Task
    few_shot: float
    zero_shot: float
    patched: list[float] = field(default_factory=list)  # by layer
    patched_held_out: list[float] = field(default_factory=list)


def measure(backend, task: Task, n: int, seed: int, layers: list[int]) -> Row:
    trials = make_trials(backend, task, n, seed)
    held = np.array([t.held_out for t in trials])
    row = Row(
        task,
        hits(backend, trials, [t.few_shot for t in trials]).mean(),
        hits(backend, trials, [t.bare for t in trials]).mean(),
    )
    residuals = backend.residuals([t.source for t in trials])
    for layer in layers:
        got = patched_accuracy(backend, trials, layer, residuals)
        row.patched.append(got.mean())
        row.patched_held_out.append(got[held].mean())
    return row


def choose_layer(backend, facts: Facts, n: int) -> int:
    """The common layer: the best mean patched accuracy on a development set, the lowest where several tie."""
    layers = list(range(backend.n_layer))
    rows = [measure(backend, task, n, 1, layers) for task in facts.tasks.values()]
    return int(np.argmax(np.mean([r.patched for r in rows], axis=0).round(6)))


# the post's prompts: prompt, patch (source prompt, from, to) or None, what must come out
REVERSAL = "0 1 2 to 2 1 0, 1 2 3 to 3 2 1, 4 5 6 to"
CAPITALS = "Egypt -> Cairo, Norway -> Oslo, Estonia ->"
POST = (
    (CAPITALS, None, " Tallinn"),
    ("France ->", None, "another country"),
    ("France ->", (CAPITALS, -1, -1), " Paris"),
    (REVERSAL, None, " 6 5 4"),
    ("0 1 2 to 0 1 3, 1 2 3 to 1 2 4, 4 5 6 to", None, " 4 5 7"),
    ("0 1 to 0 1 1, 1 2 to 1 2 2, 4 5 to", None, " 4 5 5"),
    ("4 5 6 to 6 ", None, "7 8"),
    ("1 2 3 to 3 2 1, 5 6 7 to 7 ", None, "6 5"),
    ("4 5 6 to 6 ", ("1 2 3 to 3 2 1, 5 6 7 to 7 ", 24, 10), "5 4"),
)


def post_outputs(backend: Backend, facts: Facts, layer: int) -> list[tuple[str, str, bool]]:
    """Each prompt of the post with its output, and whether it is the wanted one."""
    model, out = backend.model, []
    for prompt, source, want in POST:
        actions, said = [], json.dumps(prompt)
        if source:
            (text, src, at), name = source, f"l_out-{layer}"
            actions = [tinymia.Patch(name, model.run(text, keep=[name]), src=src, at=at)]
            said += f" with {name} of {json.dumps(text)}, {src} to {at}"
        n = 1 if want == "another country" else len(model.tokenize(prompt + want)) - len(model.tokenize(prompt))
        got = model.generate(prompt, n=n, actions=actions).text
        good = got.strip() in facts.chains["countries"] if want == "another country" else got == want
        out.append((said, got, good))
    return out


def held_out_patches(backend, facts: Facts, layer: int, n: int = 20) -> list[tuple[str, bool]]:
    """n patches on held-out queries: capitals, and reversed sequences, the latter also in mid-answer as in the post."""
    rng, out = random.Random("held-out patches"), []
    capital, reverse = facts.tasks["capital"], facts.tasks["reverse-digits"]
    while len(out) < n:
        task, arrow = (reverse, "to") if len(out) % 2 else (capital, "->")
        shown, dummy, query = [task.draw(rng) for _ in range(3)], task.draw(rng), task.draw(rng)
        if not task.held_out(query[0]) or query[0] == dummy[0] or any(query[0] == x for x, _ in shown):
            continue
        done = [f"{query[1].split()[0]} ", f"{dummy[1].split()[0]} "] if len(out) % 4 == 3 else ["", ""]
        text = f"{query[0]} {arrow} {done[0]}".rstrip() + " " * bool(done[0])
        source = (
            "".join(f"{x} {arrow} {y}, " for x, y in shown)
            + f"{dummy[0]} {arrow} {done[1]}".rstrip()
            + " " * bool(done[1])
        )
        bare = backend.encode(text)
        answer = backend.encode(f"{query[0]} {arrow} {query[1]}")[len(bare) :]
        vector = backend.residuals([backend.encode(source)])[0][layer]
        got = backend.complete([bare], [len(answer)], layer, [vector])[0]
        out.append((f"{text!r} -> {query[1]!r}", got == answer))
    return out


def evaluate(path: Path, without: Path | None, n: int, layer: int | None, numerics: str, every_layer: bool) -> bool:
    """Print the tables; whether everything that must hold holds."""
    facts = Facts.read()
    backend = Backend(path, numerics)
    other = Backend(without, numerics) if without else None
    chosen = "as asked" if layer is not None else "the best of all layers on other queries"
    if layer is None:
        layer = choose_layer(backend, facts, 10)
    if not 0 <= layer < backend.n_layer:
        raise Error(f"--layer {layer}: the model has layers 0 to {backend.n_layer - 1}")
    began = time.monotonic()
    layers = list(range(backend.n_layer)) if every_layer else [layer]
    rows = [measure(backend, task, n, 0, layers) for task in facts.tasks.values()]
    bare = [measure(other, task, n, 0, layers) for task in facts.tasks.values()] if other else [None] * len(rows)
    at = layers.index(layer)
    print(f"{n} queries a task, exact answers; patched at l_out-{layer}, {chosen}\n")
    print(
        "| task | few-shot | zero-shot | patched | of held-out queries |"
        + (" patched, no auxiliary loss |" if other else "")
    )
    print("|---|---|---|---|---|" + ("---|" if other else ""))
    for r, b in zip(rows, bare, strict=True):
        mark = " (held out)" if r.task.name in AUX_HELD_OUT_TASKS else ""
        print(
            f"| {r.task.name}{mark} | {r.few_shot:.2f} | {r.zero_shot:.2f} | {r.patched[at]:.2f} | "
            f"{r.patched_held_out[at]:.2f} |" + (f" {b.patched[at]:.2f} |" if other else "")
        )
    few, zero = np.mean([r.few_shot for r in rows]), np.mean([r.zero_shot for r in rows])
    print(
        f"| mean | {few:.2f} | {zero:.2f} | {np.mean([r.patched[at] for r in rows]):.2f} | "
        f"{np.mean([r.patched_held_out[at] for r in rows]):.2f} |"
        + (f" {np.mean([b.patched[at] for b in bare]):.2f} |" if other else "")
    )
    if every_layer:
        print_layers(rows, bare if other else None, layers)
    moved = sum(r.patched[at] >= 0.9 * r.few_shot for r in rows)
    checks = [
        (few >= 0.95, f"few-shot {few:.3f}, at least 0.95"),
        (zero <= 0.25, f"zero-shot {zero:.3f}, at most 0.25"),
        (moved * 24 >= 22 * len(rows), f"{moved} of {len(rows)} tasks reach 0.9 x few-shot by patching l_out-{layer}"),
    ]
    print("\nThe post's prompts\n")
    for said, got, good in post_outputs(backend, facts, layer):
        checks.append((good, f"{said} gives {json.dumps(got)}"))
    found = held_out_patches(backend, facts, layer)
    checks.append(
        (
            sum(g for _, g in found) >= 18,
            f"{sum(g for _, g in found)} of 20 patches on held-out queries"
            + "".join(f"; not {t}" for t, g in found if not g),
        )
    )
    words = [
        [piece.strip() for piece, _ in backend.model.lens(x[None], k=5)[0]]
        for x in backend.residuals([backend.encode(REVERSAL)])[0]
    ]
    seen = [il for il, top in enumerate(words) if any(len(w) > 2 and "reverse".startswith(w) for w in top)]
    checks.append(
        (any(0 < il < backend.n_layer - 1 for il in seen), f"lens: reverse in the top 5 of l_out at layers {seen}")
    )
    for good, text in checks:
        print(f"{'ok ' if good else 'NOT'} {text}")
    print(f"\n{time.monotonic() - began:.0f} seconds")
    return all(good for good, _ in checks)


def compare(paths: list[Path], layer: int) -> bool:
    """The post's prompts with every file and both numerics; whether all agree."""
    facts, columns = Facts.read(), {}
    for path in paths:
        for numerics in ("ggml", "f32"):
            columns[f"{path.name}, {numerics}"] = post_outputs(Backend(path, numerics), facts, layer)
    first = next(iter(columns.values()))
    for said, got, good in first:
        print(f"{'ok ' if good else 'NOT'} {said} gives {json.dumps(got)}")
    same = {name: [c[1] for c in column] == [c[1] for c in first] for name, column in columns.items()}
    for name, agrees in same.items():
        print(f"{'ok ' if agrees else 'NOT'} {name}: the same outputs")
    return all(same.values()) and all(good for *_, good in first)


def print_layers(rows: list[Row], bare: list[Row] | None, layers: list[int]) -> None:
    print("\nMean patched accuracy by layer\n")
    print("| |" + "".join(f" l_out-{il} |" for il in layers))
    print("|---|" + "---|" * len(layers))
    for title, some in (("", rows), (", no auxiliary loss", bare or [])):
        for kind, is_list in (("words", False), ("lists", True)):
            mean = [r.patched for r in some if r.task.is_list == is_list]
            if mean:
                print(f"| {kind}{title} |" + "".join(f" {a:.2f} |" for a in np.mean(mean, axis=0)))


# ------------------------------------------------------------------------------------------------ command line


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sample(seed: int, n: int) -> None:
    """Print documents of stages 1 and 2, on words and on sequences."""
    if not 1 <= n <= 10_000:
        raise Error(f"-n {n}: must be 1 to 10000")
    facts, rng = Facts.read(), random.Random(seed)
    for i in range(n):
        print(text_of(document(rng, facts, bool(i % 2), 1 + i // 2 % 2, 24)))


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all others here."""

    def error(self, message: str) -> NoReturn:
        raise Error(f"{message} ({self.prog} --help shows what it takes)")


def parser() -> Parser:
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="command", required=True)

    def add(name, text):
        return sub.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    a = add("sample", "print documents of the corpus")
    a.add_argument("-n", type=int, default=12)
    a.add_argument("--seed", type=int, default=0)
    a = add("train", "train, or go on with a training that was interrupted")
    a.add_argument("--out", type=Path, required=True, help="folder of tokenizer and checkpoints")
    a.add_argument("--seed", type=int, default=Options.seed)
    a.add_argument(
        "--steps", type=int, default=Options.steps, help="steps of stage 1 and of stage 2; stage 3 has a fifth"
    )
    a.add_argument(
        "--tv-weight",
        type=float,
        default=Options.tv_weight,
        help="weight of the auxiliary loss from stage 2 on; 0 is without",
    )
    a.add_argument("--vocab-size", type=int, default=Options.vocab_size)
    a.add_argument("--start-from", type=Path, help="another run's stage1.pt: share its first stage")
    a.add_argument("--threads", type=int, default=1)
    a = add("export", "write a run's checkpoint as GGUF")
    a.add_argument("run", type=Path)
    a.add_argument("gguf", type=Path)
    a.add_argument("--type", choices=GGUF_TYPES, default="q5_0")
    a = add("evaluate", "print the tables of the model card; exit status 1 when something that must hold does not")
    a.add_argument("gguf", type=Path)
    a.add_argument(
        "without", type=Path, nargs="?", help="the model trained without the auxiliary loss, for one more column"
    )
    a.add_argument("-n", type=int, default=100, help="queries a task")
    a.add_argument("--layer", type=int, help="patch here instead of choosing on a development set")
    a.add_argument("--every-layer", action="store_true", help="a second table, by layer")
    a.add_argument("--numerics", choices=("ggml", "f32"), default="ggml")
    a = add(
        "compare",
        "the post's prompts with several files of the model and both numerics; exit status 1 when one differs",
    )
    a.add_argument("gguf", type=Path, nargs="+")
    a.add_argument("--layer", type=int, choices=range(N_LAYER), default=TV_LAYER)
    return ap


def main(argv: list[str] | None = None) -> int:
    known = (Error, OSError) if tinymia is None else (Error, OSError, tinymia.Error)
    try:
        args = parser().parse_args(argv)
        if args.command == "sample":
            sample(args.seed, args.n)
        elif args.command == "train":
            if not 1 <= args.threads <= 256:
                raise Error(f"--threads {args.threads}: must be 1 to 256")
            train(
                Options(args.seed, args.steps, args.tv_weight, args.vocab_size), args.out, args.threads, args.start_from
            )
        elif args.command == "export":
            export_gguf(args.run, args.gguf, args.type)
        elif args.command == "compare":
            return 0 if compare(args.gguf, args.layer) else 1
        else:
            if not 2 <= args.n <= 10_000:
                raise Error(f"-n {args.n}: must be 2 to 10000")
            return 0 if evaluate(args.gguf, args.without, args.n, args.layer, args.numerics, args.every_layer) else 1
    except Interrupted as e:
        say(str(e))
        return 130
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except known as e:
        say(f"error: {e}".replace("\n", " "))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
