"""Tasks that a model can learn from examples: pairs (x, y), and the template that makes prompts from them.

A task file is JSON: a list of pairs, [["France", "Paris"], ...], or an object with

    pairs       the list                                                                     (the one key it must have)
    template    a demonstration, with {x} and {y}: "{x} -> {y}"
    separator   the text between demonstrations: ", "
    prefix      a text in front of every prompt: "Answer with the opposite.\\n"; <s> and the like are tokens in it
    about       one sentence
    shots       demonstrations in a prompt, if 5 (task-vector) or 10 (function-vector) do not suit the task
    score       "first": an answer is right by its first token; "whole": by all of its tokens

The query is the template up to {y}, without the space before it: "Estonia ->"; the answer is then " Tallinn". Files in
tasks/ are used by their names; copycat-capital and the like are the tasks that copycat was trained on, from models/.
"""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tinymia_files import Error, FileError, expand, read_json, short

HERE = Path(__file__).parents[1] / "tasks"
COPYCAT = "copycat-"
Pair = tuple[str, str]


@dataclass(frozen=True)
class Template:
    """The text of a demonstration, `before` x `middle` y `after`, and the separator between two of them."""

    before: str
    middle: str
    after: str
    separator: str

    @staticmethod
    def parse(text: str, separator: str = ", ") -> Template:
        """Read a template such as "Q: {x}\\nA: {y}". Raises Error unless it has {x}, then text, then {y}, each once."""
        before, x, rest = text.partition("{x}")
        middle, y, after = rest.partition("{y}")
        if not (x and y and middle.strip()) or "{x}" in middle + after or "{y}" in before + after:
            raise Error(f"template {text!r}: it must have {{x}}, some text, {{y}}, each once; e.g. '{{x}} -> {{y}}'")
        return Template(before, middle, after, separator)

    def prompt(self, demonstrations: list[Pair], query: str) -> str:
        """The demonstrations and the query, ready to be answered."""
        shown = "".join(self.before + x + self.middle + y + self.after + self.separator for x, y in demonstrations)
        return shown + self.before + query + self.middle.rstrip()

    def answer(self, y: str) -> str:
        """The text of y as it follows a prompt, with its space."""
        return self.middle[len(self.middle.rstrip()) :] + y

    def __str__(self) -> str:
        return f"{self.before}{{x}}{self.middle}{{y}}{self.after}"


TEMPLATES = {
    "arrow": Template.parse("{x} -> {y}", ", "),
    "hendel": Template.parse("example:{x}->{y}", "\n"),
    "todd": Template.parse("Q: {x}\nA: {y}", "\n\n"),
}


@dataclass(frozen=True)
class Task:
    """A task: its pairs, and how prompts are made from them."""

    name: str
    pairs: tuple[Pair, ...]
    template: Template = TEMPLATES["arrow"]
    about: str = ""
    shots: int | None = None
    score: str = "first"
    prefix: str = ""                    # stands once in front of a prompt
    front: tuple[int, ...] | None = None    # ids before that; None: BOS, as the model's file says

    def settings(self, shots: int) -> dict[str, Any]:
        """The settings that a result keeps to repeat the task; the pairs are among them, as a file may change."""
        return {"template": str(self.template), "separator": self.template.separator, "shots": shots,
                "score": self.score, "pairs": self.pairs, "prefix": self.prefix, "front": self.front}


def names() -> list[str]:
    """The names of the tasks that come with the lab, then of copycat's."""
    return sorted(path.stem for path in HERE.glob("*.json")) + [COPYCAT + name for name in _facts()]


def read_task(
    task: str | Path | Task, template: str | None = None, separator: str | None = None, score: str | None = None,
    prefix: str | None = None,
) -> Task:
    """Read a task, given by name or by the path of its file; the other arguments replace what it says.

    template: a name (arrow, hendel, todd) or a text with {x} and {y}; prefix: a text in front of every prompt. Raises
    Error for what is not a task.
    """
    if isinstance(task, Task):
        found = task
    elif str(task) in names():
        found = _copycat(str(task)) if str(task).startswith(COPYCAT) else _read(HERE / f"{task}.json")
    else:
        found = _read(expand(task))
    chosen = found.template
    if template is not None:
        chosen = TEMPLATES.get(template) or Template.parse(template, chosen.separator)
    if separator is not None:
        chosen = replace(chosen, separator=separator)
    if score not in (None, "first", "whole"):
        raise Error(f"score {score!r}: it must be first (token) or whole (answer)")
    return replace(found, template=chosen, score=score or found.score,
                   prefix=found.prefix if prefix is None else prefix)


def read_tasks(
    tasks: str | Path | Task | Sequence[str | Path | Task], template: str | None, separator: str | None,
    score: str | None, prefix: str | None = None,
) -> list[Task]:
    """Read one task or several, as in `read_task`. Raises Error for none, and for two of one name."""
    several = [tasks] if isinstance(tasks, (str, Path, Task)) else tasks
    read = [read_task(task, template, separator, score, prefix) for task in several]
    names = [task.name for task in read]
    if not read or len(set(names)) < len(names):
        raise Error(f"tasks {', '.join(names) or '(none)'}: one or more, each once and by a name of its own")
    return read


def check_counts(seed: int, **counts: int | None) -> None:
    """Raise Error for a number of something that is less than 1, and for a negative seed."""
    for name, n, least in [("seed", seed, 0), *((name, n, 1) for name, n in counts.items())]:
        if n is not None and n < least:
            raise Error(f"{name} is {n}: it must be {least} or more")


def _read(path: Path) -> Task:
    try:
        os.stat(path)
    except FileNotFoundError as e:
        close = difflib.get_close_matches(str(path), names(), 3, 0.5)
        closest = f"; closest: {', '.join(close)}" if close else ""
        raise FileError(f"no task is called {str(path)!r}, and no file{closest} (--list shows all)") from e
    except OSError:  # read_json below reports it
        pass
    data = read_json(path, "a task file")
    said = data if isinstance(data, dict) else {"pairs": data}
    kinds = {"pairs": list, "template": str, "separator": str, "about": str, "shots": int, "score": str,
             "prefix": str}
    for key, value in said.items():
        if key not in kinds:
            raise FileError(f"{path}: {short(key)} is not a key of a task file; the keys are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            what = {list: "a list", str: "a text", int: "a whole number"}[kinds[key]]
            raise FileError(f"{path}: {key} must be {what}, not {short(value)}")
    if said.get("shots", 1) < 1 or said.get("score", "first") not in ("first", "whole"):
        raise FileError(f"{path}: shots must be 1 or more, score first or whole")
    try:
        template = Template.parse(said.get("template", "{x} -> {y}"), said.get("separator", ", "))
    except Error as e:
        raise FileError(f"{path}: {e}") from e
    pairs = _pairs(said.get("pairs", []), path)
    return Task(path.stem, pairs, template, said.get("about", ""), said.get("shots"), said.get("score", "first"),
                said.get("prefix", ""))


def _pairs(rows: list[Any], path: Path) -> tuple[Pair, ...]:
    if not rows:
        raise FileError(f'{path}: no pairs: a task is a list of them, [["France", "Paris"], ...]')
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 2 or not all(isinstance(t, str) and t.strip() for t in row):
            raise FileError(f"{path}: pair {i} must be two texts, [x, y], not {short(row)}")
        if row[0] in first:
            raise FileError(f"{path}: pair {i} asks {short(row[0])} again, after pair {first[row[0]]}")
        first[row[0]] = i
    return tuple((x, y) for x, y in rows)


@cache
def _facts() -> dict[str, Any]:
    from tinymia_models.facts import Facts

    return Facts.read().tasks


def _copycat(name: str, n_sequences: int = 60) -> Task:
    """One of copycat's tasks: all its pairs, or sequences drawn as in its training."""
    task = _facts()[name.removeprefix(COPYCAT)]
    if not task.is_list:
        return Task(name, tuple(dict(task.pairs).items()), TEMPLATES["arrow"], f"{task.domain}: {task.word}", 5)
    rng, pairs = random.Random(task.domain), dict[str, str]()  # so that all tasks of an alphabet get the same x
    while len(pairs) < n_sequences:
        x, y = task.draw(rng)
        pairs[x] = y
    about = f"sequences of {task.domain}: {task.word}"
    return Task(name, tuple(pairs.items()), Template.parse("{x} to {y}", ", "), about, 4, "whole")
