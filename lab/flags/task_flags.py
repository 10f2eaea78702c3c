"""The flags that task-vector, function-vector and steer share: tasks, their prompts, the seed."""

from __future__ import annotations

import argparse
from dataclasses import replace

from tinymia import Error, Model
from tinymia_files import dumps, note

from ..measure.in_context import make_prompt
from ..measure.task_files import TEMPLATES, Task, names, read_task, read_tasks
from ..pictures.terminal import table
from ..runs.streams import print_json
from .action_flags import Input
from .parser import least
from .prompt_notes import tell_unknown


def task_flags(p: argparse.ArgumentParser, shots: int) -> None:
    """Add TASK ..., --list, --template, --separator, --prefix, --bos, --shots, --score and --seed."""
    p.add_argument("task", nargs="*", type=Input, metavar="TASK", help="names of tasks, or JSON files")
    p.add_argument("--list", action="store_true", help="print the tasks that come with the lab, and end")
    p.add_argument("--template", metavar="TEXT", help="a demonstration, with {x} and {y}; or the name of one: "
                   f"{', '.join(TEMPLATES)}; default: the task's")
    p.add_argument("--separator", metavar="TEXT", help="what stands between demonstrations; \\n is a line end")
    p.add_argument("--prefix", metavar="TEXT", help="what stands once in front of a prompt; \\n is a line end, and <s> "
                   "and the like are tokens")
    p.add_argument("--bos", default="auto", metavar="ID|none", help="the token in front of every prompt; default: BOS "
                   "as the model's file says, or else the token that the model is measured to need there")
    p.add_argument("--shots", type=least(1), metavar="N",
                   help=f"demonstrations ({shots}, unless the task says otherwise)")
    p.add_argument("--score", choices=("first", "whole"),
                   help="an answer is right by its first token, or by all of them; default: the task's, or first")
    p.add_argument("--seed", type=least(0), default=0, metavar="N", help="seed of random choices (0)")


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """Read the tasks that the flags name. Raises Error."""
    if not args.task:
        raise Error("no task: name one or more, or a JSON file (--list shows all)")
    texts = (args.template, args.separator, args.prefix)
    template, separator, prefix = (None if t is None else t.replace("\\n", "\n") for t in texts)
    return read_tasks(args.task, template, separator, args.score, prefix)


def before_tasks(args: argparse.Namespace) -> int | None:
    """Read the tasks into args.task before a model is opened. With --list, print all and return the exit status."""
    if args.list:
        return list_tasks(args.json)
    args.task = tasks_of(args)
    return None


def list_tasks(as_json: bool) -> int:
    """Print the tasks that come with the lab. Returns the exit status."""
    rows = [(task.name, len(task.pairs), str(task.template), task.about) for task in map(read_task, names())]
    if as_json:
        print_json(dumps([dict(zip(("name", "pairs", "template", "about"), row)) for row in rows]))
    else:
        print(table([["task", "pairs", "template", "what"], *rows]))
    return 0


def said(model: Model, ids: list[int]) -> str:
    """The text that tokens add to the text before them, with the space in front of the first word."""
    return b"".join(map(model.tokenizer.bytes, ids)).decode("utf-8", "replace")


def tell_answers(model: Model, tasks: list[Task]) -> None:
    """Write notes on stderr about the answers of tasks.

    One note per task that has answers of more tokens than are scored, and one on words that the bundled model does not
    know.
    """
    tell_unknown(model, [text for task in tasks for pair in task.pairs for text in pair])
    for task in tasks:
        many = list[str]()
        for x, y in task.pairs:
            scored, all_ = (make_prompt(model, replace(task, score=s), [], x, y).answer for s in (task.score, "whole"))
            if scored != all_:
                many.append(f"{said(model, scored)!r} of {task.template.answer(y)!r}")
        if many:
            note(f"note: {task.name}: {len(many)} of {len(task.pairs)} answers have several tokens; the first counts, "
                  f"as {many[0]} (--score whole: all)")
