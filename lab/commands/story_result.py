"""The result of `tinymia story`, and its text: full sentences whose numbers come from the run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..pictures.heatmap import Heatmap
from ..pictures.terminal import screen, signed, table, visible
from ..runs.result import Result
from .ablate_result import Ablation
from .attribute_result import Attribution
from .sweep import Sweep
from .sweep import picture as sweep_picture

BRIGHT = 0.5    # a cell counts from here on: half of the way from the corrupt answer to the clean one


@dataclass
class Story(Result):
    """Two prompts, where their difference sits and moves, and the heads that move it."""

    pieces: list[str]                   # of the clean prompt, [n_tok]
    other_pieces: list[str]             # of the corrupt prompt
    comes: list[list[list[object]]]     # best tokens after clean, and after corrupt: [piece, probability]
    sweep: Sweep                        # l_out, by layer and position
    moved: Sweep                        # kqv at the last position, by layer and head
    attribution: Attribution            # of the answer against the other one, after the clean prompt
    ablation: Ablation                  # of each head, after the clean prompt
    heads: list[list[int]]              # [layer, head] of the described heads, the most important first
    patterns: np.ndarray                # float32 [n_head_told, n_tok]: what the last position looks at, clean prompt
    other_patterns: np.ndarray          # the same for the corrupt prompt
    without: list[list[object]]         # first head silenced: [prompt, best piece, its probability, best piece without,
                                        # probability of the first piece without]

    def __str__(self) -> str:
        return text(self)


def stretches(found: Story) -> list[tuple[int, int, int | None]]:
    """Successive layers whose brightest cell is at the same token: (first layer, last layer, position or None)."""
    grid, made = found.sweep.logit_difference, list[tuple[int, int, int | None]]()
    for il, row in enumerate(grid):
        best = int(np.nanargmax(row))
        at = best if row[best] >= BRIGHT else None
        if made and made[-1][2] == at:
            made[-1] = made[-1][0], il, at
        else:
            made.append((il, il, at))
    return made


def said(piece: object) -> str:
    """A token in quotes."""
    return repr(str(piece))


def name(head: list[int]) -> str:
    """The name of a head, such as 23.4."""
    return f"{head[0]}.{head[1]}"


def answers(found: Story) -> str:
    """Sentences on the model's answers to both prompts."""
    lines = []
    for which, (best, *_) in zip(("clean", "corrupt"), found.comes):
        text = found.about["prompts"][which]["text"]
        lines.append(f"After {text!r} the model's best token is {said(best[0])}, with probability {best[1]:.2f}.")
    a, b = said(found.sweep.answer_piece), said(found.sweep.against_piece)
    gap = found.sweep.clean["logit-difference"], found.sweep.corrupt["logit-difference"]
    lines.append(f"Measured is the logit of {a} minus the logit of {b}: {signed(gap[0], 2)} after the first prompt, "
                 f"{signed(gap[1], 2)} after the second.")
    return " ".join(lines)


def where(found: Story) -> list[str]:
    """Sentences on where the difference sits, one per stretch of layers, and on where it moves."""
    grid, lines, made = found.sweep.logit_difference, [], stretches(found)
    for first, last, at in made:
        layers = f"After layer {first}" if first == last else f"After layers {first} to {last}"
        if at is None:
            best = float(np.nanmax(grid[first : last + 1]))
            lines.append(f"{layers} no single token brings half of the answer back; the most is {best:.2f}: the "
                         "difference is spread over several tokens.")
            continue
        part = grid[first : last + 1, at]
        share = f"{part.min():.2f}" if f"{part.min():.2f}" == f"{part.max():.2f}" else \
            f"{part.min():.2f} to {part.max():.2f}"
        lines.append(f"{layers} it sits at token {at}, {said(found.pieces[at])}: copying this one row of the first run "
                     f"into the second brings {share} of the difference between the two answers back (0 is nothing, 1 "
                     "is all).")
    for one, two in pairwise(made):
        if one[2] is not None and two[2] is not None:
            before, after = grid[one[1] : two[0] + 1, two[2]]
            lines.append(f"So in layer {two[0]} it moves from token {one[2]}, {said(found.pieces[one[2]])}, to token "
                         f"{two[2]}, {said(found.pieces[two[2]])}, where the number goes from {before:.2f} to "
                         f"{after:.2f}. Only attention can carry it from one token to another.")
    if len(made) == 1 and made[0][2] == len(found.pieces) - 1:
        lines.append("It sits at the last token from the first layer on, and never has to move.")
    return lines


def about_head(found: Story, i: int) -> str:
    """Sentences on one head: attention, attribution, patch, ablation."""
    il, head = found.heads[i]
    k = int(found.patterns[i].argmax())
    other = int(found.other_patterns[i].argmax())
    part, moved = found.attribution.heads[il, head], found.moved.logit_difference[il, head]
    effect, best = found.ablation.effects[0, il, head], found.ablation.best_pieces[il][head]
    a, b = said(found.sweep.answer_piece), said(found.sweep.against_piece)
    n_parts = found.attribution.heads.size
    rank = int((np.abs(found.attribution.heads) > abs(part)).sum()) + 1
    place = "the largest part" if rank == 1 else f"part number {rank}"
    return (
        f"Attention: at the last token head {il}.{head} looks at {said(found.pieces[k])} (token {k}) with "
        f"{found.patterns[i, k]:.2f} of its attention, and in the second prompt at {said(found.other_pieces[other])} "
        f"with {found.other_patterns[i, other]:.2f}. Attribution: it writes {signed(part, 2)} logits for {a} against "
        f"{b}, {place} of {n_parts} heads. Patch: its output alone, copied from the first run into the second, moves "
        f"the answer {moved:.2f} of the way. Ablation: without it the logit difference changes by {signed(effect, 2)}, "
        f"to {signed(found.ablation.values[0, il, head], 2)}, and the best token is {said(best)}.")


def honest(found: Story) -> list[str]:
    """Sentences on whether the first head is needed: one per prompt, and a conclusion."""
    first, lines, kept = name(found.heads[0]), [], 0
    for prompt, best, p, after, q in found.without:
        same = best == after
        kept += same
        how = (f"still {said(best)}; its probability goes from {p:.2f} to {q:.2f}" if same else
               f"now {said(after)}; the probability of {said(best)} goes from {p:.2f} to {q:.2f}")
        lines.append(f"Without head {first}, the best token after {prompt!r} is {how}.")
    n = len(found.without)
    if kept == n:
        lines.append(f"So this head is not needed for the best token in any of the {n} prompts: other paths carry the "
                     "answer as well. A head that writes much is not the same as a head without which nothing works.")
    elif kept:
        lines.append(f"So the head is needed for the best token in {n - kept} of {n} prompts and not in {kept}. It is "
                     "not the whole story: other paths carry the answer as well.")
    else:
        lines.append(f"So the head is needed for the best token in all {n} prompts that were tried. That does not "
                     "prove that it is enough, or that it is needed in other prompts (--other TEXT tries more).")
    return lines


def table_of_heads(found: Story) -> str:
    """A table with the numbers of the described heads."""
    rows = [["head", "attribution", "patch", "ablation", "looks at", "with"]]
    for i, (il, head) in enumerate(found.heads):
        k = int(found.patterns[i].argmax())
        rows.append([f"{il}.{head}", signed(found.attribution.heads[il, head], 2),
                     signed(found.moved.logit_difference[il, head], 2), signed(found.ablation.effects[0, il, head], 2),
                     visible(found.pieces[k]), f"{found.patterns[i, k]:.2f}"])
    return table(rows)


def pictures(found: Story) -> list[Heatmap]:
    """The heatmaps: the sweep, and what each head writes, moves and is needed for."""
    maps = [sweep_picture(found.sweep)]
    for values, what, unit in (
        (found.attribution.heads, "attribution: what each head writes", "logits"),
        (found.moved.logit_difference, "patch: each head's output at the last token, first run into the second",
         found_unit(found)),
        (found.ablation.effects[0], "ablation: change without the head", "logits"),
    ):
        layers, heads = ([str(i) for i in range(n)] for n in values.shape)
        maps.append(Heatmap(values, layers, heads, what, "head", "layer", unit, diverging=True, upward=True))
    return maps


def found_unit(found: Story) -> str:
    """The meaning of the numbers of a sweep, as a unit."""
    return f"logit difference of {said(found.sweep.answer_piece)}, 0 corrupt to 1 clean"


def text(found: Story) -> str:
    """The text that the terminal shows."""
    parts = [f"1. The answers. {answers(found)}", "2. Where the difference sits. " + " ".join(where(found)),
             pictures(found)[0].terminal(*screen()), "3. The heads that move it.", table_of_heads(found)]
    parts.append(about_head(found, 0))
    return "\n\n".join([*parts, "4. Is it the whole story? " + " ".join(honest(found))])
