"""The corpus: an endless stream of synthetic documents, drawn at random from the facts in models/facts.py.

    python -m training.corpus -n 12 --seed 0        # print some documents

A language model learns in context if its documents reward it for doing so. Every document here is about a hidden
task. Most show it by examples (`Egypt -> Cairo, Norway -> Oslo`): whoever has found out that the task is `capital`
can predict the answers, and nobody else can. Some documents also name the task (`capital: Egypt -> Cairo`), so that
the word " capital" comes to lie near what the model computes from the examples, and the logit lens can show it.

One kind of document teaches the opposite: the default habit, which holds when there are no examples. It is a list
that goes on (`France -> Italy -> Austria`, `4 5 6 to 6 7 8 to`). Without it, a bare `France ->` would have no answer
of its own, and putting a task vector there would show nothing.

A document is a list of words, each with the weight of its loss. The first answer of a document that does not name its
task has weight 0: before the first example there is nothing to predict it from, and the default habit should own that
place.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from tinymia_files import Error
from tinymia_models.facts import ARROWS, DIGITS, LETTERS, Facts, Task, draw_sequence

from .command import Parser, run

# kind of document: its share in stage 1, and in the stages after it
KINDS = {
    "examples": (0.15, 0.26),  # Egypt -> Cairo, Norway -> Oslo
    "arrows": (0.30, 0.12),  # the document binds each arrow to a task: Egypt -> Cairo, Peru => Spanish
    "legend": (0.12, 0.08),  # -> capital, => language: Egypt -> Cairo, Peru => Spanish
    "described": (0.04, 0.06),  # capital: Egypt -> Cairo, Norway -> Oslo
    "relation": (0.06, 0.06),  # Egypt capital Cairo, Norway capital Oslo
    "mixed": (0.10, 0.14),  # Egypt capital Cairo, cat plural cats
    "chain": (0.23, 0.28),  # the default habit: France -> Italy -> Austria
}
EXPLAINED_DOCUMENTS = 0.35  # after stage 1, this share of "examples" ...
EXPLAINED_PAIRS = 0.2  # ... names the task in this share of its pairs: Egypt -> capital Cairo
QUERY_WEIGHT = {1: 1.0, 2: 0.2, 3: 0.2}  # loss weight of a query, by stage: nobody can foresee what is asked next
DRILLED = {"first", "last", "next", "previous"}  # drawn twice as often in stage 3: they are the last to be learnt

Word = tuple[str, float]  # a word and the weight of its loss


def draw_arrow(rng: random.Random, is_list: bool) -> str:
    """Draw what stands between query and answer: 70 % the arrow of the post, `to` for sequences and `->` for words."""
    usual = "to" if is_list else "->"
    return usual if rng.random() < 0.7 else rng.choice([a for a in ARROWS if a != usual])


def drilled(tasks: list[Task], stage: int) -> list[Task]:
    """Return the tasks to draw from at this stage."""
    return tasks + [t for t in tasks if stage == 3 and t.word in DRILLED]


def document(rng: random.Random, facts: Facts, is_list: bool, stage: int, n_words: int) -> list[Word]:
    """Draw one document of at least n_words words, about sequences or about words.

    A text that names a task leaves out the held-out pairs, so that these are only ever learnt from examples.
    """
    tasks = drilled([t for t in facts.tasks.values() if t.is_list == is_list], stage)
    kind = rng.choices(list(KINDS), [shares[min(stage, 2) - 1] for shares in KINDS.values()])[0]
    if kind == "chain":
        return chain(rng, is_list, facts, n_words)
    if kind in ("examples", "described"):
        return examples(rng, tasks, is_list, stage, n_words, named=kind == "described")
    if kind in ("arrows", "legend"):
        return arrows(rng, tasks, stage, n_words, named=kind == "legend")
    return relations(rng, tasks, stage, n_words, mixed=kind == "mixed")


def examples(rng: random.Random, tasks: list[Task], is_list: bool, stage: int, n_words: int, named: bool) -> list[Word]:
    """`Egypt -> Cairo, Norway -> Oslo`: one task; `named` puts `capital:` in front."""
    task, arrow = rng.choice(tasks), draw_arrow(rng, is_list)
    explained = stage >= 2 and not named and rng.random() < EXPLAINED_DOCUMENTS
    out: list[Word] = [(task.word, 1.0), (":", 1.0)] if named else []
    known = named
    while len(out) < n_words:
        x, y = task.draw_seen(rng) if named else task.draw(rng)
        name = [task.word] if explained and rng.random() < EXPLAINED_PAIRS else []
        out += pair(stage, x, [arrow, *name], y, float(known))
        known = True
    return out


def arrows(rng: random.Random, tasks: list[Task], stage: int, n_words: int, named: bool) -> list[Word]:
    """`Egypt -> Cairo, Peru => Spanish`: a task per arrow; `named` puts `-> capital, => language:` in front.

    In half of these documents all tasks can be asked about the same words, so that only the arrow tells them apart.
    """
    shapes = rng.sample(ARROWS, rng.choice((2, 3)))
    pool = tasks
    if rng.random() < 0.5:
        domain = rng.choice(tasks).domain
        pool = [t for t in tasks if t.domain == domain]
    if len(pool) < len(shapes):
        pool = tasks
    bound = dict(zip(shapes, rng.sample(pool, len(shapes))))
    out: list[Word] = []
    if named:
        for arrow, task in bound.items():
            out += [(arrow, 1.0), (task.word, 1.0), (",", 1.0)]
        out[-1] = (":", 1.0)
    known = set(shapes) if named else set()
    while len(out) < n_words:
        arrow = rng.choice(shapes)
        x, y = bound[arrow].draw_seen(rng) if named else bound[arrow].draw(rng)
        out += pair(stage, x, [arrow], y, float(arrow in known))
        known.add(arrow)
    return out


def relations(rng: random.Random, tasks: list[Task], stage: int, n_words: int, mixed: bool) -> list[Word]:
    """`Egypt capital Cairo, Norway capital Oslo`: the task's name is the arrow; `mixed` draws a task for each pair."""
    task, out = rng.choice(tasks), list[Word]()
    while len(out) < n_words:
        if mixed:
            task = rng.choice(tasks)
        x, y = task.draw_seen(rng)
        out += pair(stage, x, [task.word], y, 1.0)
    return out


def pair(stage: int, x: str, middle: list[str], y: str, weight: float) -> list[Word]:
    """Return the words of `x middle y,`. The answer, with a task's name in front of it, carries the given weight."""
    query = [(w, QUERY_WEIGHT[stage]) for w in (*x.split(), *middle[:1])]
    return query + [(w, weight) for w in (*middle[1:], *y.split())] + [(",", 1.0)]


def chain(rng: random.Random, is_list: bool, facts: Facts, n_words: int) -> list[Word]:
    """The default habit, a list that goes on.

    Words follow each other in the order of facts.chains, with a jump in 30 % of the places. A sequence counts on from
    its last symbol, and begins again after the alphabet's end.
    """
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


def text_of(words: Sequence[Word]) -> str:
    """Return a document as text: a space between words, none before commas and colons."""
    return " ".join(w for w, _ in words).replace(" ,", ",").replace(" :", ":")


def work(args: argparse.Namespace) -> None:
    """Print documents of stages 1 and 2, about words and about sequences in turn."""
    if not 1 <= args.n <= 10_000:
        raise Error(f"-n {args.n}: it must be 1 to 10000")
    facts, rng = Facts.read(), random.Random(args.seed)
    for i in range(args.n):
        print(text_of(document(rng, facts, bool(i % 2), 1 + i // 2 % 2, 24)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    p = Parser("training.corpus", __doc__)
    p.add_argument("-n", type=int, default=12, metavar="N", help="how many documents (12)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same documents (0)")
    return run(work, p, argv)


if __name__ == "__main__":
    raise SystemExit(main())
