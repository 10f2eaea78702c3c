"""Attention patterns as an interactive page: a panel per head, one head large; pointing at a cell shows its weight.

A weight is stored as the byte round(255 sqrt(weight)), so that weak ones keep their digits: the error is 0.004 at most.
Keys after the query, which a causal model does not see, are left out: 32 layers of 32 heads on 50 tokens take 1.7 MB.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence

import numpy as np

from tinymia_files import Error

from .colours import SEQUENTIAL
from .terminal import visible

STYLE = """
.attention .bar{display:flex;flex-wrap:wrap;gap:.5rem;align-items:center;margin:.5rem 0}
.attention select,.attention .bar button{font:inherit;padding:.2rem .6rem}
.attention .panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.5rem,1fr));gap:.5rem}
.attention .panel{padding:.25rem;border:1px solid var(--line);background:none;color:inherit;font:.75rem system-ui;
 cursor:pointer}
.attention .panel[aria-pressed=true]{outline:3px solid var(--mark)}
.attention .panel canvas{display:block;width:100%;aspect-ratio:1;image-rendering:pixelated;background:var(--box)}
.attention .tokens{line-height:1.9;font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.8rem}
.attention .tokens span{padding:.15rem .25rem;border-radius:3px;cursor:pointer;white-space:pre-wrap}
.attention .tokens .query{outline:2px solid var(--mark)}
.attention output{display:block;min-height:1.5em;font:.85rem ui-monospace,"DejaVu Sans Mono",monospace}
.attention .faint{color:var(--faint);font-size:.8rem}
"""

BODY = """
<div class=bar><label>layer <select class=layer></select></label><button type=button class=down>lower</button>
<button type=button class=up>higher</button><span class=faint>rows: query, columns: key; colours by the square root of
the weight</span></div>
<div class=panels></div><h3></h3><output aria-live=polite></output>
<div class=scroll><canvas class=large tabindex=0 role=img></canvas></div>
<p class=faint>what the marked token looks at; choose another with the mouse, a finger, or in the large panel with the
arrow keys</p><div class=tokens></div>
"""

SCRIPT = """
(root=>{
const d=JSON.parse(root.querySelector('script').textContent),n=d.pieces.length,$=s=>root.querySelector(s);
const bytes=Uint8Array.from(atob(d.weights),c=>c.charCodeAt(0)),size=d.causal?n*(n+1)/2:n*n;
const stops=d.ramp.split(' ').map(c=>[0,2,4].map(i=>parseInt(c.slice(i,i+2),16)));
const ramp=Array.from({length:256},(_,b)=>{                      // the colour of a byte
 const x=b/255*(stops.length-1),k=Math.min(Math.floor(x),stops.length-2);
 return stops[k].map((v,i)=>Math.round(v+(stops[k+1][i]-v)*(x-k)));
});
let layer=d.layers.length-1,head=0,query=n-1,key=0,cell=10,edge=0;
const seen=(i,j)=>!d.causal||j<=i;
const byte=(h,i,j)=>seen(i,j)?bytes[(layer*d.heads.length+h)*size+(d.causal?i*(i+1)/2+j:i*n+j)]:0;
const weight=(h,i,j)=>((byte(h,i,j)/255)**2).toFixed(3);
const css=b=>`rgb(${ramp[b]})`,name=h=>d.layers[layer]+'.'+d.heads[h];
const tell=(h,i,j)=>`head ${name(h)}: query ${i} ${d.pieces[i]} \\u2192 key ${j} ${d.pieces[j]}: `
 +(seen(i,j)?weight(h,i,j):'not seen');
const panels=d.heads.map((_,h)=>{
 const panel=document.createElement('button'),canvas=document.createElement('canvas');
 panel.type='button';panel.className='panel';canvas.width=canvas.height=n;
 panel.append(canvas,document.createElement('span'));
 panel.onclick=()=>{head=h;draw()};
 canvas.onpointermove=e=>point(e,h,Math.floor(e.offsetY/canvas.clientHeight*n),Math.floor(e.offsetX/canvas.clientWidth*n));
 $('.panels').append(panel); return panel;
});
function paint(canvas,h){
 const g=canvas.getContext('2d'),image=g.createImageData(n,n);
 for(let i=0;i<n;i++)for(let j=0;j<n;j++)if(seen(i,j))image.data.set([...ramp[byte(h,i,j)],255],4*(i*n+j));
 g.putImageData(image,0,0);
}
function point(e,h,i,j){
 if(i<0||j<0||i>=n||j>=n)return showTip('');
 showTip(tell(h,i,j),{left:e.clientX+12,top:e.clientY-8,bottom:e.clientY+12});
}
const tokens=d.pieces.map((piece,i)=>{
 const span=document.createElement('span');
 span.textContent=piece;span.onclick=()=>{query=i;key=Math.min(key,i);mark()};
 span.onpointermove=e=>point(e,head,query,i);
 $('.tokens').append(span,' ');
 return span;
});
function large(){                                                // the chosen head, with tokens at its edges
 const canvas=$('.large'),g=canvas.getContext('2d'),ratio=devicePixelRatio||1;
 const font='11px ui-monospace,"DejaVu Sans Mono",monospace';
 cell=Math.max(n>80?2:11,Math.min(28,Math.floor(640/n)));
 g.font=font;
 const label=p=>p.length>14?p.slice(0,13)+'\\u2026':p;
 edge=cell<11?0:Math.ceil(Math.max(...d.pieces.map(p=>g.measureText(label(p)).width)))+8;
 const side=edge+n*cell+2;
 canvas.width=canvas.height=side*ratio;canvas.style.width=canvas.style.height=side+'px';
 g.scale(ratio,ratio);g.font=font;g.fillStyle=getComputedStyle(root).color;g.textBaseline='middle';
 if(edge)d.pieces.forEach((p,i)=>{
  g.textAlign='right';g.fillText(label(p),edge-4,edge+(i+.5)*cell);
  g.save();g.translate(edge+(i+.5)*cell,edge-4);g.rotate(-Math.PI/2);
  g.textAlign='left';g.fillText(label(p),0,0);g.restore();
 });
 for(let i=0;i<n;i++)for(let j=0;j<n;j++)if(seen(i,j)){
  g.fillStyle=css(byte(head,i,j));g.fillRect(edge+j*cell,edge+i*cell,cell,cell);
 }
 g.strokeStyle=getComputedStyle(root).getPropertyValue('--mark')||'#0b57d0';g.lineWidth=2;
 g.strokeRect(edge+key*cell,edge+query*cell,cell,cell);
}
function mark(){
 large();
 $('output').textContent=tell(head,query,key);
 tokens.forEach((span,j)=>{
  const b=seen(query,j)?byte(head,query,j):-1;
  span.style.background=b<0?'none':css(b);span.style.color=b<0?'var(--faint)':b>150?'#000':'#fff';
  span.classList.toggle('query',j===query);
 });
}
function draw(){
 $('.layer').value=layer;$('.down').disabled=layer===0;$('.up').disabled=layer===d.layers.length-1;
 panels.forEach((panel,h)=>{
  paint(panel.firstChild,h);
  panel.lastChild.textContent='head '+name(h);
  panel.setAttribute('aria-pressed',h===head);
 });
 $('h3').textContent='head '+name(head)+Object.entries(d.scores).map(([what,s])=>
  s[layer][head]===null?'':', '+what+' '+s[layer][head].toFixed(2)).join('');
 $('.large').setAttribute('aria-label','attention pattern of head '+name(head));
 mark();
}
d.layers.forEach((l,k)=>$('.layer').add(new Option(l,k)));
$('.layer').onchange=e=>{layer=+e.target.value;draw()};
$('.down').onclick=()=>{layer--;draw()};
$('.up').onclick=()=>{layer++;draw()};
const where=e=>[Math.floor((e.offsetY-edge)/cell),Math.floor((e.offsetX-edge)/cell)];
$('.large').onpointermove=e=>point(e,head,...where(e));
$('.large').onclick=e=>{const[i,j]=where(e);if(i>=0&&j>=0&&i<n&&j<n){query=i;key=j;mark()}};
$('.large').onkeydown=e=>{
 const step={ArrowLeft:[0,-1],ArrowRight:[0,1],ArrowUp:[-1,0],ArrowDown:[1,0]}[e.key];
 if(!step)return;
 e.preventDefault();
 query=Math.max(0,Math.min(n-1,query+step[0]));key=Math.max(0,Math.min(n-1,key+step[1]));
 mark();
};
matchMedia('(prefers-color-scheme:dark)').addEventListener('change',mark);
draw();
})(document.currentScript.parentNode);
"""


MOST = 24_000_000   # the most bytes of attention patterns in a page


def check_size(n_layer: int, n_head: int, n_tok: int, most: int = MOST) -> None:
    """Raise Error if the patterns of these layers and heads are too large for a page that browsers can show."""
    words = "{:.0f} MB in a page, which holds {:.0f} MB"
    check_room(n_layer, n_head, n_tok, n_tok * (n_tok + 1) // 2, most, words, 1e6)


def check_room(n_layer: int, n_head: int, n_tok: int, each: int, most: int, words: str, unit: float) -> None:
    """Raise Error if the patterns, of size `each`, are larger together than `most`; words and unit: to say the two."""
    size, one = n_layer * n_head * each, n_head * each
    if size > most:
        fewer = f"layers, {most // one} or so" if one <= most else "one layer and some heads, or a shorter prompt"
        raise Error(f"the attention patterns of {n_layer} layers and {n_head} heads on {n_tok} tokens take "
                    f"{words.format(size / unit, most / unit)}: choose {fewer}")


def pack(patterns: np.ndarray) -> tuple[bytes, bool]:
    """Pack patterns [n_layer, n_head, n_tok, n_tok] into (bytes, whether keys after the query are left out).

    The bytes are row by row of each pattern. Heads are packed one by one, because the arrays made on the way take more
    memory than the patterns.
    """
    levels = np.empty(patterns.shape, np.uint8)
    for at in np.ndindex(patterns.shape[:-2]):
        levels[at] = np.rint(255 * np.sqrt(np.clip(patterns[at], 0, 1)))
    causal = not any(np.triu(levels[at], 1).any() for at in np.ndindex(patterns.shape[:-2]))
    queries, keys = np.tril_indices(patterns.shape[-1])
    return (levels[..., queries, keys] if causal else levels).tobytes(), causal


def viewer(pieces: Sequence[str], layers: Sequence[int], heads: Sequence[int], patterns: np.ndarray,
           scores: Mapping[str, np.ndarray]) -> str:
    """Make an HTML fragment for a page of page.py, whose style and tips it uses; a page may have several.

    patterns: [len(layers), len(heads), n_tok, n_tok], query and key, of these layers and heads; scores: by their names,
    [n_layer, n_head] each, of all heads of the model.
    """
    check_size(len(layers), len(heads), len(pieces))
    weights, causal = pack(patterns)
    kept = np.ix_(layers, heads)
    data = json.dumps({
        "pieces": [visible(piece) for piece in pieces], "layers": list(layers), "heads": list(heads),
        "causal": causal, "weights": b64encode(weights).decode(), "ramp": SEQUENTIAL,
        "scores": {name: [[None if np.isnan(v) else round(float(v), 3) for v in row] for row in values[kept]]
                   for name, values in scores.items()},
    }, ensure_ascii=False).replace("<", "\\u003c")
    return (f"<div class=attention><style>{STYLE}</style><script type=application/json>{data}</script>{BODY}"
            f"<script>{SCRIPT}</script></div>")
