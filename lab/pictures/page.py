"""Pages: one HTML file each, which needs no network and no server; light or dark; usable on a phone and by keyboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tinymia_files import dumps, printable, write_atomic

from ..runs.streams import KEEP

STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1a1a1a;--faint:#666;--line:#ccc;--box:#f5f5f5;--mark:#0b57d0}
@media(prefers-color-scheme:dark){:root{--back:#16181c;--text:#e8e8e8;--faint:#a0a0a0;--line:#444;--box:#23262c;--mark:#8ab4f8}}
*{box-sizing:border-box} body{margin:0 auto;padding:1rem;max-width:100rem;background:var(--back);color:var(--text);
 font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.15rem}section{margin:0 0 2rem}
pre,code,table{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.8rem}
pre{overflow-x:auto;padding:.6rem;background:var(--box)}
figure{margin:0 0 1rem}figcaption{font-weight:600;margin-bottom:.4rem;overflow-wrap:anywhere}
.scroll{overflow:auto;max-height:85vh}
table{border-collapse:separate;border-spacing:1px}
td,th{padding:.15rem .35rem;text-align:left;white-space:pre;max-width:9rem;overflow:hidden;text-overflow:ellipsis}
th{font-weight:400;color:var(--faint)}
.heatmap thead th{position:sticky;top:0;background:var(--back);z-index:1}
.heatmap tbody th,.heatmap .corner{position:sticky;left:0;background:var(--back)}.heatmap thead .corner{z-index:2}
.heatmap td{cursor:default}
.none{background:repeating-linear-gradient(45deg,var(--box) 0 4px,var(--back) 4px 8px);color:var(--faint)}
td.at,.at{outline:3px solid var(--mark);outline-offset:-1px}
.ramp{color:var(--faint);font-size:.8rem;margin:.3rem 0}
.ramp span{display:inline-block;width:9rem;height:.8rem;vertical-align:middle;border:1px solid var(--line)}
#tip{position:fixed;z-index:9;max-width:min(30rem,92vw);padding:.4rem .6rem;white-space:pre-wrap;pointer-events:none;
 background:var(--back);color:var(--text);border:1px solid var(--faint);border-radius:4px;
 font:.8rem/1.35 ui-monospace,"DejaVu Sans Mono",monospace;box-shadow:0 2px 10px #0006}
:focus-visible{outline:3px solid var(--mark)}table:focus-visible{outline-offset:-3px}
"""

SCRIPT = """
const tip=document.getElementById('tip');
let byKeys=false;  // the scrolling under way was ours
function showTip(text,box){
 tip.textContent=text;tip.hidden=!text;if(!text)return;
 const w=tip.offsetWidth,h=tip.offsetHeight;
 tip.style.left=Math.max(4,Math.min(box.left,innerWidth-w-4))+'px';
 tip.style.top=(box.bottom+h+8<innerHeight?box.bottom+6:Math.max(4,box.top-h-6))+'px';
}
const cellOf=e=>e.target.closest?.('[data-tip]');
function point(cell){
 document.querySelectorAll('td.at').forEach(c=>c.classList.remove('at'));
 cell?.classList.add('at');showTip(cell?cell.dataset.tip:'',cell?.getBoundingClientRect());
}
document.addEventListener('pointerover',e=>point(cellOf(e)));
document.addEventListener('click',e=>point(cellOf(e)));
document.addEventListener('scroll',()=>{if(!byKeys)point()},true);
document.addEventListener('keydown',e=>{
 const table=e.target.closest?.('.heatmap table');
 const step={ArrowLeft:[0,-1],ArrowRight:[0,1],ArrowUp:[-1,0],ArrowDown:[1,0]}[e.key];
 if(e.key==='Escape')point();
 if(!table||!step)return;
 e.preventDefault();
 const rows=table.tBodies[0].rows,at=table.querySelector('td.at');
 let r=at?at.parentNode.rowIndex-1+step[0]:0,c=at?at.cellIndex+step[1]:1;
 r=Math.max(0,Math.min(r,rows.length-1));c=Math.max(1,Math.min(c,rows[r].cells.length-1));
 const cell=rows[r].cells[c];
 byKeys=true;cell.scrollIntoView({block:'nearest',inline:'nearest'});point(cell);
 requestAnimationFrame(()=>requestAnimationFrame(()=>byKeys=false));
});
document.addEventListener('focusout',()=>point());
"""


def page(title: str, sections: Sequence[str]) -> str:
    """Make an HTML document of fragments under a heading. Elements with data-tip="..." show it when pointed at."""
    body = "\n".join(f"<section>{section}</section>" for section in sections)
    return (
        f'<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,'
        f'initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n'
        f"<div id=tip role=status hidden></div><script>{SCRIPT}</script>\n{body}\n</body></html>\n"
    )


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table of texts as an HTML fragment."""
    lines = ["<tr>" + "".join(f"<th scope=col>{escape(cell)}" for cell in head)]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows]
    return f"<div class=scroll><table class=plain>{''.join(lines)}</table></div>"


def preformatted(text: str) -> str:
    """Lines of text as an HTML fragment, in columns as on a terminal."""
    return f"<pre>{escape(text)}</pre>"


def repeat(about: Mapping[str, Any]) -> str:
    """All that is needed to repeat a run, as an HTML fragment that opens at a click."""
    return f"<details><summary>model, settings, tokens, versions</summary>{preformatted(dumps(about, 1))}</details>"


def write_page(path: str | Path, html: str) -> None:
    """Write a page to a file, completely or not at all. Raises Error."""
    write_atomic(path, lambda f: f.write(printable(html, KEEP).encode("utf-8", "replace")))
