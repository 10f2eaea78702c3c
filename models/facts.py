"""The facts that copycat was taught: which tasks there are, which words they join, and which pairs were held out.

copycat learnt 28 tasks. Twelve are on words (`capital`: Egypt -> Cairo) and have a fixed list of pairs, which comes
from copycat_tasks.json. The other sixteen are eight transformations of short sequences (`reverse`: 0 1 2 to 2 1 0),
each on digits and on letters; their pairs are drawn at random. The training in training/ makes its documents from
these facts, and `tinymia task-vector copycat-capital` asks about them.

    capital = Facts.read().tasks["capital"]
    capital.pairs[0]                            # a country and its capital
    capital.held_out("France")                  # True: no training on task vectors ever saw it
"""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("copycat_tasks.json")
DIGITS = [str(i) for i in range(10)]
LETTERS = [chr(ord("a") + i) for i in range(26)]
SEQUENCE_WORDS = ("reverse", "increment", "repeat", "next", "previous", "first", "last", "copy")
ARROWS = ("->", "=>", "to")  # what can stand between a query and its answer
HELD_OUT_SHARE = 0.3
ALWAYS_HELD_OUT = {"capital:France", "capital:Estonia", "list:4 5 6", "list:4 5"}  # the queries of the post


@dataclass(frozen=True)
class Task:
    """One task: it has either `pairs` of words, or the `alphabet` from which its sequences are drawn."""

    name: str  # "capital", "reverse-digits"
    word: str  # the word that names it in documents: "capital", "reverse"
    domain: str  # tasks of one domain can be asked about the same words
    pairs: tuple[tuple[str, str], ...] = ()  # ("Egypt", "Cairo"), ...
    alphabet: tuple[str, ...] = ()

    @property
    def is_list(self) -> bool:
        """True if the task transforms sequences, False if it has pairs of words."""
        return bool(self.alphabet)

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """Draw a query and return it with its answer, both as text."""
        if not self.is_list:
            return rng.choice(self.pairs)
        while True:
            x = draw_sequence(rng, len(self.alphabet))
            y = transform(self.word, x, len(self.alphabet))
            if y is not None:
                return " ".join(self.alphabet[i] for i in x), " ".join(self.alphabet[i] for i in y)

    def held_out(self, x: str) -> bool:
        """Return whether the query x was kept out of the task-vector training and of every text that names the task.

        A hash of the query decides, so that the answer is the same on every machine. For sequences it does not depend
        on the task: a sequence is held out from all tasks or from none.
        """
        key = f"list:{x}" if self.is_list else f"{self.name}:{x}"
        return key in ALWAYS_HELD_OUT or zlib.crc32(key.encode()) % 1000 < 1000 * HELD_OUT_SHARE

    def draw_seen(self, rng: random.Random) -> tuple[str, str]:
        """Draw a query that is not held out and return it with its answer."""
        while True:
            x, y = self.draw(rng)
            if not self.held_out(x):
                return x, y


def draw_sequence(rng: random.Random, n_symbols: int) -> list[int]:
    """Draw 2 to 4 symbols, numbers below n_symbols.

    60 % are runs as in the post (4 5 6), 10 % go up in steps of two, 5 % go down, the rest are any distinct symbols.
    """
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
    """Return the answer of the sequence task `word` for x, or None where it would leave the alphabet."""
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


@dataclass
class Facts:
    """All tasks, and the ordered lists of words behind the model's habit when there are no examples."""

    tasks: dict[str, Task]
    chains: dict[str, list[str]]  # by domain: words in the order in which documents list them (France, Italy, ...)

    @staticmethod
    def read(path: Path = FILE) -> Facts:
        """Read the facts from their file."""
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
        """Return every word that a document can hold, each once, in a fixed order."""
        seen: dict[str, None] = {}
        for task in self.tasks.values():
            for w in (task.word, *task.alphabet, *(w for pair in task.pairs for part in pair for w in part.split())):
                seen.setdefault(w)
        return [*seen, *ARROWS]
