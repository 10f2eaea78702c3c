"""The page of `tinymia report`: sections with links to them; it can be used by keyboard, mouse or finger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np

from ..pictures.colours import rgb
from ..pictures.page import page, repeat, table_html
from ..pictures.terminal import signed, visible
from . import attend, lens
from .attribute_result import Attribution, kinds, pictures, title
from .report_result import Report

WITHOUT, WITH = "without interventions", "with interventions"
PARTS = 16      # the most bars of an attribution
DEFAULTS = (("when", "prompt"), ("value", 0.0), ("coef", 1.0))  # defaults of actions, which are not written

STYLE = """<style>
nav a,.token{display:inline-block;padding:.2rem .5rem;margin:.1rem;border:1px solid var(--line);border-radius:4px;
 color:inherit}
.token{font:.85rem ui-monospace,"DejaVu Sans Mono",monospace;white-space:pre;background:var(--box)}
.token small{display:block;color:var(--faint);font-size:.7rem}
.said{white-space:pre-wrap;overflow-wrap:anywhere}.said b{background:var(--mark);color:var(--back);padding:0 .15rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}
.plain td,.plain th{padding:.15rem .6rem;max-width:none}.plain td:not(:first-child){text-align:right}
.bars td{padding:.1rem .35rem}.bars .bar{width:min(18rem,40vw);min-width:7rem}
.bars i{display:block;height:.8rem}.faint{color:var(--faint);font-size:.85rem}
h3{font-size:1rem}
</style>"""


def report_page(found: Report) -> str:
    """Make the page as one HTML document."""
    name, n = found.about["model"]["name"], len(found.pieces)
    sections = [
        ("text", "Text", _texts(found)), ("tokens", "Tokens", _tokens(found)),
        ("interventions", "Interventions", _interventions(found)),
        ("lens", "Lens", _lens(found)), ("attention", "Attention", _attention(found)),
        ("attribution", "Attribution", _attribution(found)), ("repeat", "To repeat this", repeat(found.about)),
    ]
    nav = "<nav>" + "".join(f"<a href=#{key}>{head}</a>" for key, head, _ in sections) + "</nav>"
    lead = f"<p>{escape(name)}, numerics {found.about['model']['numerics']}, {n} tokens</p>"
    return page(f"tinymia report: {visible(found.about['prompts']['prompt']['text'])}",
                [STYLE + lead + nav, *(f"<h2 id={key}>{head}</h2>{body}" for key, head, body in sections)])


def _texts(found: Report) -> str:
    """The prompt with its continuations, and the probabilities of the next token."""
    prompt, names = found.about["prompts"]["prompt"]["text"], [WITHOUT, WITH][: len(found.outputs)]
    texts = "".join(f"<figure><figcaption>{name}</figcaption><pre class=said>{escape(prompt)}<b>{escape(output)}</b>"
                    "</pre></figure>" for name, output in zip(names, found.outputs))
    short = [name.split()[0] for name in names] if len(names) > 1 else ["probability"]
    rows = [[visible(piece), *(f"{p:.2%}" for p in row)] for piece, *row in found.comes]
    return f"<div class=pair>{texts}</div>{table_html(['next token', *short], rows)}"


def _tokens(found: Report) -> str:
    ids = found.about["prompts"]["prompt"]["tokens"]
    return "<p class=faint>position, piece, id</p><div>" + " ".join(
        f"<span class=token><small>{i}</small>{escape(visible(piece))}<small>{token}</small></span>"
        for i, (piece, token) in enumerate(zip(found.pieces, ids))) + "</div>"


def _interventions(found: Report) -> str:
    """The interventions, one action per line, with its settings in words."""
    actions = found.about["settings"]["actions"]
    if not actions:
        return "<p>None: the model ran unchanged.</p>"
    return "<ol>" + "".join(f"<li><code>{escape(words(action))}</code>" for action in actions) + "</ol>"


def words(action: dict[str, Any]) -> str:
    """An action in words, such as: Ablate kqv_merged-3, heads 1, mode zero."""
    said = [f"{action['action']} {action['name']}"]
    for key, value in action.items():
        if key not in ("action", "name") and value is not None and (key, value) not in DEFAULTS:
            numbers = isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)
            said.append(f"{key} {', '.join(map(str, value)) if numbers else value}")
    return ", ".join(said)


def _lens(found: Report) -> str:
    maps = [lens.pictures(one)[0] for one in found.lenses]
    return ("<p class=faint>The best token after each layer, if the model ended there; point at a cell, by mouse, "
            f"finger or arrow keys, to see the others.</p>{_named([h.html() for h in maps])}")


def _attention(found: Report) -> str:
    return (f"<p class=faint>{WITH}</p>" if len(found.outputs) > 1 else "") + attend.patterns_html(found.attention)


def _attribution(found: Report) -> str:
    """Bars of the largest parts, then layer x head and layer x kind, with one colour scale for both runs."""
    maps = [pictures(one) for one in found.attributions]
    spans = [max(max(map(abs, h.span)) for h in kind) for kind in zip(*maps)]
    most = max(abs(value) for one in found.attributions for _, value in one.parts()) or 1.0
    shown = []
    for one, pair in zip(found.attributions, maps):
        same = [replace(h, limits=(-span, span)) for h, span in zip(pair, spans)]
        sums = f"<p class=faint>{escape(kinds(one))}</p>"
        shown.append(bars(one, most) + sums + "".join(h.html() for h in same))
    return ("<p class=faint>The logit as a sum of what each part writes directly; effects through later layers are "
            f"not included. Rounding: the engine's rounding; stream: what actions add elsewhere.</p>{_named(shown)}")


def bars(one: Attribution, most: float) -> str:
    """The largest parts of a logit as bars, the sum of the others, and the logit; `most` is half the width."""
    parts = sorted(one.parts(), key=lambda part: -abs(part[1]))
    shades = rgb(np.array([value for _, value in parts[:PARTS]]), -most, most, True)
    rows = []
    for (name, value), shade in zip(parts[:PARTS], shades):
        left, width = 50 + 50 * min(value, 0) / most, 50 * abs(value) / most
        rows.append(f'<tr><th scope=row>{escape(name)}<td>{signed(value, 3)}<td class=bar>'
                    f'<i style="margin-left:{left:.1f}%;width:{width:.1f}%;'
                    f'background:#{bytes(shade).hex()};border:1px solid var(--faint)"></i>')
    rest = sum(value for _, value in parts[PARTS:])
    if parts[PARTS:]:
        rows.append(f"<tr><th scope=row>{len(parts) - PARTS} smaller parts<td>{signed(rest, 3)}<td>")
    rows.append(f"<tr><th scope=row>sum<td>{signed(one.logit, 3)}<td>")
    return (f"<figure class=bars><figcaption>{escape(title(one))}, in logits</figcaption><div class=scroll>"
            f"<table>{''.join(rows)}</table></div></figure>")


def _named(fragments: Sequence[str]) -> str:
    """One fragment unchanged; two with headings: without and with interventions."""
    if len(fragments) == 1:
        return fragments[0]
    return "".join(f"<h3>{name}</h3>{part}" for name, part in zip((WITHOUT, WITH), fragments))
