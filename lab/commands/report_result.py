"""The result of `tinymia report`, and its text."""

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
    """Everything that the page shows. Lists have one entry; with interventions two: without and with them."""

    pieces: list[str]               # of the prompt's tokens, [n_tok]
    outputs: list[str]              # the generated text
    comes: list[list[Any]]          # [piece, its probability in each run]: what comes after the prompt
    lenses: list[Lens]
    attention: Attention            # with the interventions
    attributions: list[Attribution]

    def __str__(self) -> str:
        return text(self)


def text(found: Report) -> str:
    """The text that the terminal shows."""
    parts = [f'{name}: "{output}"' for name, output in zip(("output", "with interventions"), found.outputs)]
    shares = [[visible(piece), *(f"{p:.1%}" for p in row)] for piece, *row in found.comes]
    parts.append(table([["next token", "probability", "with interventions"][: len(found.outputs) + 1], *shares]))
    parts += [details(found.lenses[-1], -1), largest(found.attributions[-1], 10), kinds(found.attributions[-1])]
    return "\n\n".join(parts)
