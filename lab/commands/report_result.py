"""What `tinymia report` found, and its words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..pictures.terminal import table, visible
from ..runs.result import Result
from .attend import Attention
from .attribute_result import Attribution, kinds, largest
from .lens import Lens, details


@dataclass
class Report(Result):
    """What the page shows. Lists have one entry, or two with interventions: without them, with them."""

    pieces: list[str]               # of the prompt's tokens, [n_tok]
    outputs: list[str]              # the text that the model went on with
    comes: list[list[Any]]          # [piece, its probability in each run]: what comes after the prompt
    lenses: list[Lens]
    attention: Attention            # with the interventions
    attributions: list[Attribution]


def text(found: Report) -> str:
    """What the terminal shows."""
    parts = [f'{name}: "{output}"' for name, output in zip(("output", "with interventions"), found.outputs)]
    shares = [[visible(piece), *(f"{p:.1%}" for p in row)] for piece, *row in found.comes]
    parts.append(table([["what comes", "probability", "with interventions"][: len(found.outputs) + 1], *shares]))
    parts += [details(found.lenses[-1], -1), largest(found.attributions[-1], 10), kinds(found.attributions[-1])]
    return "\n\n".join(parts)
