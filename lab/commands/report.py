"""`tinymia report`: one page about a prompt: its tokens, lens, attention, attribution, interventions, text.

With interventions, lens and attribution are shown without and with them, and attention patterns with them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import tinymia
from tinymia import Action, Error, Model
from tinymia_engine import best as best_of
from tinymia_engine import softmax, whole

from ..flags.action_flags import change_flags, patch_flags, read_actions
from ..flags.arguments import prompt_flags, prompt_ids
from ..flags.command import Command
from ..flags.parser import Parser, least
from ..measure.selection import chosen
from ..pictures.attention_page import MOST, check_size
from ..pictures.heatmap import Heatmap
from ..pictures.page import write_page
from ..runs.result import about, describe
from .attend import attend
from .attribute import attribute
from .attribute_result import pictures as attribute_pictures
from .lens import lens
from .lens import pictures as lens_pictures
from .report_page import report_page
from .report_result import Report, text

__all__ = ["Report", "command", "pictures", "report", "text"]


def report(
    model: Model,
    prompt: str | Sequence[int],
    answer: str | int | None = None,
    against: str | int | None = None,
    n: int = 16,
    layers: str | Sequence[int] | None = None,
    actions: Action | Sequence[Action] = (),
) -> Report:
    """Compute lens, attention and attribution of a prompt, and the model's continuation.

    answer, against: as in `attribute`; without an answer, the best token without interventions. n: tokens to generate.
    layers: the layers whose attention patterns are kept (None: all). Raises Error.
    """
    c = model.config
    ids = model.ids(prompt)
    actions = tinymia.listed(actions)
    kept = chosen(layers, c.n_layer, "layer")
    if whole(n, "n") < 0:
        raise Error(f"{n} tokens to generate: it must be 0 or more")
    check_size(len(kept), c.n_head, len(ids), MOST)
    at_prompt = [action for action in actions if action.when != "decode"]
    runs = [[], actions] if actions else [[]]
    outputs, probabilities = [], []
    for steps in runs:
        gen = model.generate(prompt, n, [*steps, tinymia.Save("result_output")])
        outputs.append(gen.text)
        probabilities.append(softmax(gen.records[-1].value[-1:])[0])                    # [n_vocab]
    first = attribute(model, prompt, answer, against)
    prompt_runs = [at_prompt] * (len(runs) - 1)
    attributions = [first, *(attribute(model, prompt, first.answer, first.against, actions=a) for a in prompt_runs)]
    lenses = [lens(model, prompt, target=first.answer, actions=a) for a in [[], *prompt_runs]]
    best = dict.fromkeys(int(i) for p in probabilities for i in best_of(p, 5))
    best[first.answer] = None
    comes = [[model.piece(i), *(float(p[i]) for p in probabilities)] for i in best]
    settings = {"answer": first.answer, "against": first.against, "n": n, "layers": kept, "actions": describe(actions)}
    info, pieces = about(model, "report", settings, prompt=prompt), [model.piece(i) for i in ids]
    attention = attend(model, prompt, kept, actions=at_prompt)
    return Report(info, pieces, outputs, comes, lenses, attention, attributions)


# ---------------------------------------------------------------------------------------- command line


EPILOG = """\
tinymia report -p "Egypt -> Cairo, Norway -> Oslo, Estonia ->" --scale kqv_out-1 0 -o report.html
the numbers that it shows can be saved by the commands lens, attend and attribute"""


def add_flags(p: Parser) -> None:
    """Add the flags of the prompt, the logit that is split, the patterns that are kept, and interventions."""
    prompt_flags(p)
    p.add_argument("-n", "--n-predict", type=least(0), default=16, metavar="N", help="new tokens (default 16)")
    p.add_argument("--answer", metavar="TEXT", help="or #id: the token whose logit is split (default: the best)")
    p.add_argument("--against", metavar="TEXT", help="or #id: split the answer's logit minus this one's")
    p.add_argument("--layers", metavar="LIST", help="layers whose attention patterns are shown: 0,3-5 (default: all)")
    patch_flags(p.add_argument_group("patch"))
    change_flags(p.add_argument_group("change"))


def run(args: Namespace, model: Model, out: Path | None) -> Report:
    """Make the report that the flags describe."""
    return report(model, prompt_ids(args, model), args.answer, args.against, args.n_predict, args.layers,
                  read_actions(args, model))


def pictures(found: Report) -> list[Heatmap]:
    """The heatmaps of lens and attribution, with interventions if there are some."""
    return [*lens_pictures(found.lenses[-1]), *attribute_pictures(found.attributions[-1])]


def write_html(found: Report, path: Path) -> None:
    """Write the page."""
    write_page(path, report_page(found))


command = Command(
    "report", "One page about a prompt, which needs no network: tokens, lens, attention, attribution, "
    "interventions, the text without and with them.", add_flags, run, text, pictures, EPILOG, results=(),
    drawn=(".html",), writers={".html": write_html})
