"""The page of `tinymia story`: each bright cell is a link to its explanation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

from ..pictures.heatmap import Heatmap
from ..pictures.page import page, repeat, table_html, write_page
from ..pictures.terminal import signed, visible
from .story_result import BRIGHT, Story, about_head, answers, honest, name, pictures, stretches, where

STYLE = """<style>
nav a{display:inline-block;padding:.2rem .5rem;margin:.1rem;border:1px solid var(--line);border-radius:4px;
 color:inherit}
.plain td,.plain th{padding:.15rem .6rem;max-width:none}.plain td:not(:first-child){text-align:right}
td a{color:inherit}.plain td:last-child:nth-child(4){text-align:left}
p,li{max-width:45rem}:target{outline:3px solid var(--mark);outline-offset:2px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}
</style>"""
WRITES = 3      # the number of heads named per layer


def story_page(found: Story) -> str:
    """Make the page as one HTML document."""
    sweep_map, *head_maps = pictures(found)
    sections = [
        ("answers", "1. The answers", f"<p>{escape(answers(found))}</p>{_comes(found)}"),
        ("where", "2. Where the difference sits", _where(found, sweep_map)),
        ("layers", "3. What each layer writes at the last token", _layers(found)),
        ("heads", "4. The heads that move it", _heads(found, head_maps)),
        ("whole", "5. Is it the whole story?", "".join(f"<p>{escape(line)}</p>" for line in honest(found))),
        ("repeat", "To repeat this", repeat(found.about)),
    ]
    nav = "<nav>" + "".join(f"<a href=#{key}>{head}</a>" for key, head, _ in sections) + "</nav>"
    model = found.about["model"]
    lead = (f"<p>{escape(model['name'])}, numerics {model['numerics']}. Two prompts, two answers: which parts of the "
            "model make the difference? A cell with a link leads to what explains it.</p>")
    title = " / ".join(visible(found.about["prompts"][which]["text"]) for which in ("clean", "corrupt"))
    return page(f"tinymia story: {title}",
                [STYLE + lead + nav, *(f"<h2 id={key}>{head}</h2>{body}" for key, head, body in sections)])


def write_html(found: Story, path: Path) -> None:
    """Write the page."""
    write_page(path, story_page(found))


def _comes(found: Story) -> str:
    """The best tokens after both prompts."""
    shown = []
    for which, best in zip(("clean", "corrupt"), found.comes):
        rows = [[visible(str(piece)), f"{p:.2%}"] for piece, p in best]
        text = escape(found.about["prompts"][which]["text"])
        table = table_html(["next token", "probability"], rows)
        shown.append(f"<figure><figcaption>{text}</figcaption>{table}</figure>")
    return f"<div class=pair>{''.join(shown)}</div>"


def _where(found: Story, sweep_map: Heatmap) -> str:
    """The sentences of the sweep, each with an anchor, and its map."""
    last = len(found.pieces) - 1
    stretch = {at: f"#token-{at}" for _, _, at in stretches(found) if at is not None}
    links = []
    for il, row in enumerate(found.sweep.logit_difference):
        links.append([(f"#layer-{il}" if j == last else stretch.get(j, "")) if abs(v) >= BRIGHT else ""
                      for j, v in enumerate(row)])
    told, lines, seen = where(found), [], set[int]()
    for line, (_, _, at) in zip(told, stretches(found)):
        anchor = f" id=token-{at}" if at is not None and at not in seen else ""
        seen |= set() if at is None else {at}
        lines.append(f"<li{anchor}>{escape(line)}")
    rest = "".join(f"<p>{escape(line)}</p>" for line in told[len(lines):])
    return f"<ul>{''.join(lines)}</ul>{rest}{replace(sweep_map, links=links).html()}"


def _layers(found: Story) -> str:
    """A line per layer: what attention and the FFN write for the answer, and the heads that write the most."""
    head = ["layer", "heads together", "FFN", "the heads that write the most"]
    lines = ["<tr>" + "".join(f"<th scope=col>{cell}" for cell in head)]
    told = [tuple(one) for one in found.heads]
    for il in reversed(range(len(found.attribution.ffn))):
        parts, cells = found.attribution.heads[il], []
        for j in np.argsort(-np.abs(parts), kind="stable")[:WRITES].tolist():
            cell = f"{il}.{j} {signed(parts[j], 2)}"
            cells.append(f"<a href=#head-{il}-{j}>{cell}</a>" if (il, j) in told else cell)
        lines.append(f"<tr id=layer-{il}><th scope=row>{il}<td>{signed(parts.sum(), 2)}<td>"
                     f"{signed(found.attribution.ffn[il], 2)}<td>{', '.join(cells)}")
    return ("<p>In logits, for the answer of the first prompt against that of the second: what a layer writes directly "
            f"into the last token's row.</p><div class=scroll><table class=plain>{''.join(lines)}</table></div>")


def _heads(found: Story, maps: Sequence[Heatmap]) -> str:
    """A part per described head: sentences and what it looks at; then the three maps of all heads."""
    shown = []
    for i, head in enumerate(found.heads):
        looks = Heatmap(np.stack([found.patterns[i], found.other_patterns[i]]), ["first prompt", "second prompt"],
                        [f"{j} {visible(a)}" if a == b else f"{j} {visible(a)}/{visible(b)}" for j, (a, b) in
                         enumerate(zip(found.pieces, found.other_pieces))],
                        f"what head {name(head)} looks at from the last token", "token", "prompt", "weight",
                        limits=(0.0, 1.0))
        shown.append(f"<h3 id=head-{head[0]}-{head[1]}>Head {name(head)}</h3><p>{escape(about_head(found, i))}</p>"
                     f"{looks.html()}")
    told = [tuple(one) for one in found.heads]
    for one in maps:
        links = [[f"#head-{i}-{j}" if (i, j) in told else "" for j in range(len(one.columns))]
                 for i in range(len(one.rows))]
        shown.append(replace(one, links=links).html())
    return ("<p>First come the heads whose output alone, copied at the last token from the first run into the "
            f"second, moves the answer the most.</p>{''.join(shown)}")
