"""`tinymia story`: from two prompts to the heads that carry their difference, in one chain and on one page.

It shows the model's answers to both; by a sweep, the token and the layers at which the difference sits, and the layer
in which it moves to the last token; then the heads that move it: what they write (attribution), look at (pattern),
carry (patch) and are needed for (ablation). Each step is also a separate command; here one leads to the next.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import tinymia
from tinymia import Error, Model
from tinymia_engine import best as best_of
from tinymia_engine import softmax, whole

from ..flags.arguments import escape_flag, typed
from ..flags.chat import chat_flags, in_chat
from ..flags.command import Command
from ..flags.parser import Parser, least
from ..flags.prompt_notes import tell_unknown
from ..measure.sinks import tell_sink
from ..runs.result import about
from .ablate import ablate
from .attribute import attribute
from .story_page import write_html
from .story_result import Story, pictures, text
from .sweep import sweep

__all__ = ["Story", "command", "pictures", "story", "text"]


def story(
    model: Model, clean: str | Sequence[int], corrupt: str | Sequence[int], answer: str | int | None = None,
    against: str | int | None = None, *, others: Sequence[str | Sequence[int]] = (), heads: int = 3,
) -> Story:
    """Find the heads that carry the difference between two prompts with equally many tokens.

    answer, against: as in `sweep`. others: further prompts on which the first head is silenced. heads: the number of
    heads to describe. Raises Error.
    """
    if whole(heads, "heads") < 1:
        raise Error(f"{heads} heads to describe: it must be 1 or more")
    best = [int(model.run(prompt, logits="last").logits[-1].argmax()) for prompt in (clean, corrupt)]
    if best[0] == best[1] and (answer is None or against is None):
        raise Error(f"after both prompts the best token is {model.piece(best[0])!r}, which tells no story: say what "
                    "the two answers are (--answer TEXT, --against TEXT)")
    by_token = sweep(model, clean, corrupt, answer, against)
    wanted, rival = by_token.answer, by_token.against
    settings = {"answer": wanted, "against": rival, "heads": heads}
    info = about(model, "story", settings, clean=clean, corrupt=corrupt, **({"others": others} if others else {}))
    by_head = sweep(model, clean, corrupt, wanted, rival, tensor="kqv", at="last")
    parts, without = attribute(model, clean, wanted, rival), ablate(model, clean, wanted, rival)
    runs = [model.run(prompt, keep=["kq_soft_max"], logits="last") for prompt in (clean, corrupt)]
    told = carriers(by_head.logit_difference, parts.heads, heads)
    looks, looks_too = (np.array([run[f"kq_soft_max-{il}"][head, -1] for il, head in told], np.float32) for run in runs)
    comes = list[list[list[object]]]()
    for run in runs:
        share = softmax(run.logits[-1:])[0]
        comes.append([[model.piece(int(i)), float(share[i])] for i in best_of(share, 5)])
    silenced = [silence(model, prompt, *told[0]) for prompt in (clean, corrupt, *others)]
    return Story(info, by_token.clean_pieces, by_token.corrupt_pieces, comes, by_token, by_head, parts, without,
                 [list(one) for one in told], looks, looks_too, silenced)


def carriers(moved: np.ndarray, written: np.ndarray, n: int) -> list[tuple[int, int]]:
    """The n heads (layer, head) that carry the most of the difference, the most important first.

    They are ordered by the size of the effect of their output alone; of equal ones, those that write more come first.
    """
    order = np.lexsort((-np.abs(written).ravel(), -np.abs(moved).ravel().round(3)))
    return [(int(i) // moved.shape[1], int(i) % moved.shape[1]) for i in order[:n]]


def silence(model: Model, prompt: str | Sequence[int], il: int, head: int) -> list[object]:
    """Silence a head: [prompt, best piece, its probability, best piece without, probability of the first without]."""
    plain, then = (softmax(model.run(prompt, actions=steps, logits="last").logits[-1:])[0]
                   for steps in ([], [tinymia.Ablate(f"kqv_merged-{il}", heads=[head])]))
    best = int(plain.argmax())
    return [model.text(prompt), model.piece(best), float(plain[best]), model.piece(int(then.argmax())),
            float(then[best])]


# ---------------------------------------------------------------------------------------- command line


EPILOG = """\
tinymia story -m smollm2 --clean "The capital of France is" --corrupt "The capital of Italy is" \\
    --other "The capital of Spain is" -o story.html
tinymia story --clean "Egypt -> Cairo, France ->" --corrupt "Egypt -> Cairo, Norway ->" -o story.html"""


def add_flags(p: Parser) -> None:
    """Add the flags of the two prompts and their answers, and of the number of heads."""
    p.add_argument("--clean", required=True, metavar="TEXT", help="the prompt with the answer")
    p.add_argument("--corrupt", required=True, metavar="TEXT", help="as many tokens, another answer")
    escape_flag(p, "--clean, --corrupt and --other")
    chat_flags(p)
    p.add_argument("--answer", metavar="TEXT", help="or #id; default: the clean run's best token")
    p.add_argument("--against", metavar="TEXT", help="or #id; default: the corrupt run's best token")
    p.add_argument("--other", action="append", default=[], metavar="TEXT",
                   help="a further prompt on which the first head is silenced; more than once")
    p.add_argument("--heads", type=least(1), default=3, metavar="N", help="heads to describe (default 3)")


def run(args: Namespace, model: Model, out: Path | None) -> Story:
    """Run the story that the flags describe; sweep, attribute and ablate can save its numbers in files."""
    texts = [typed(args, text) for text in (args.clean, args.corrupt, *args.other)]
    tell_unknown(model, texts)
    clean, corrupt, *others = (in_chat(args, model, text) for text in texts)
    tell_sink(model, clean, corrupt)
    return story(model, clean, corrupt, args.answer, args.against, others=others, heads=args.heads)


command = Command("story", "Two prompts, two answers: where the difference sits, where it moves, which heads move it, "
                  "and whether they are the whole story. One page.", add_flags, run, text, pictures, EPILOG,
                  results=(), writers={".html": write_html})
