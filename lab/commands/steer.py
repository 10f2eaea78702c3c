"""`tinymia steer`: a direction in the residual stream, from two sets of prompts, added while the model writes.

Of every prompt, l_out is taken at the last token, or as the mean over the tokens. The vector of a layer is the mean
over the positive prompts minus that over the negative ones. Coefficient times vector is added to l_out of the chosen
layers, at every position of the chosen passes. With all passes, this is what llama.cpp does with a control vector.

Source: Turner et al., Activation Addition (2023), arXiv 2308.10248; Rimsky et al., Steering Llama 2 via Contrastive
Activation Addition (2023), arXiv 2312.06681 (difference of means; one layer, a third to half of the way up).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from tinymia import Add, Error, Generation, Model

from ..flags.action_flags import Input
from ..flags.arguments import prompt_flags, prompt_ids
from ..flags.chat import in_chat
from ..flags.command import Command
from ..flags.parser import Parser, least
from ..flags.prompt_notes import tell_unknown
from ..measure.control_vector import read_control_vector
from ..measure.prompt_sets import POOLS, cut_prompts, pooled, read_prompts
from ..measure.selection import chosen
from ..runs.executors import commit, spread
from ..runs.progress import keeping
from ..runs.result import about, describe, resume
from .steer_result import Steering, text, write_gguf

__all__ = ["Steering", "command", "read_vector", "steer", "steering", "text", "write_gguf"]

WHEN = ("prompt", "decode", "all")

EPILOG = """\
  tinymia steer --positive examples/capitals.txt --negative examples/countries.txt -p "France ->" --coef 1 2 -n 1 \\
      -o capital.gguf
  tinymia steer --vector capital.gguf -p "Norway ->" --coef 2 -n 1
A control vector, -o FILE.gguf, holds the directions of the chosen layers, without the coefficient: --coef 2 here equals
--control-vector-scaled FILE.gguf:2 in llama.cpp. Its layers begin at 1. An .npz file keeps all layers, and --vector
takes both kinds of file.
A file of prompts has one per line:
  examples/capitals.txt     Paris       Oslo        Cairo       ...
  examples/countries.txt    France      Norway      Egypt       ...
"""


def steer(
    model: Model,
    prompt: str | Sequence[int] | None = None,
    positive: Sequence[str | Sequence[int]] | None = None,
    negative: Sequence[str | Sequence[int]] | None = None,
    *,
    vector: str | Path | np.ndarray | None = None,
    layers: str | Sequence[int] | None = None,
    pool: str = "last",
    coef: float | Sequence[float] = 1.0,
    when: str = "all",
    n: int = 32,
    executor: Executor | None = None,
    out: str | Path | None = None,
) -> Steering:
    """Make a vector from positive and negative prompts, or take one, and continue a prompt without and with it.

    vector: a control vector (.gguf), a result of this command (.npz or .json), or float32 [n_layer, n_embd] with NaN
    for layers without one. layers: such as "3-5"; by default the middle one, or those of the file. coef: one or
    several. when: "prompt", "decode" or "all" passes. Without a prompt, only the vector is made. An executor's workers
    get a prompt at a time. `out`, a .npz or .json file, keeps the result, and a stopped run continues from it. Raises
    Error.
    """
    c, coefs = model.config, [float(k) for k in np.atleast_1d(coef)]
    _check(pool, coefs, when, n, prompt)
    if (positive is None) != (negative is None) or (positive is None) == (vector is None):
        raise Error("a vector is made of positive and negative prompts, or read from a file: one of the two")
    sets = [cut_prompts(model, s, what) for s, what in ((positive, "positive"), (negative, "negative"))
            if s is not None]
    given, theirs = (None, [c.n_layer // 2]) if vector is None else read_vector(model, vector)
    wanted = theirs if layers is None else chosen(layers, c.n_layer, "layer")
    for il in wanted:
        if given is not None and np.isnan(given[il]).any():
            raise Error(f"the vector has no direction for layer {il}; it has those of {theirs}")
    settings = {"layers": wanted, "pool": pool, "coef": coefs, "when": when, "n": n, "vector": describe(given)}
    prompts = dict(zip(("positive", "negative"), sets)) | ({} if prompt is None else {"prompt": prompt})
    note = about(model, "steer", settings, **prompts)
    found = resume(out, note, Steering, [] if vector is None else [vector]) or Steering(
        note, wanted, np.full((c.n_layer, c.n_embd), np.nan, np.float32) if given is None else given,
        np.full((2, c.n_layer, c.n_embd), np.nan), np.zeros(2, np.int64), None, [], [],
    )
    done = int(found.counts.sum()) + len(found.texts) + (found.plain is not None)
    total = sum(map(len, sets)) + (0 if prompt is None else 1 + len(coefs))
    with keeping(found, out, total, "steer", done) as bar:
        for side, ids in enumerate(sets):
            items = [("l_out", pool, one) for one in ids[found.counts[side] :]]
            for x in spread(model, pooled, items, executor):
                means, counts = found.means.copy(), found.counts.copy()
                counts[side] += 1
                means[side] = x if counts[side] == 1 else means[side] + (x - means[side]) / counts[side]
                commit(found, means=means, counts=counts)
                bar.step()
        if given is None:
            found.vectors = (found.means[0] - found.means[1]).astype(np.float32)
        if prompt is not None:
            if found.plain is None:
                said = _say(model, prompt, n)
                vars(found).update(plain=said.text, plain_tokens=said.tokens)
                bar.step()
            for k in coefs[len(found.texts) :]:
                text, tokens = found.plain, found.plain_tokens
                if when != "decode" or len(tokens) > 1:  # otherwise there is no decoding pass to steer
                    said = _say(model, prompt, n, steering(found, k, when))
                    text, tokens = said.text, said.tokens
                found.texts.append({"coef": k, "text": text, "tokens": tokens})
                bar.step()
        found.best = [[[piece for piece, _ in model.lens(sign * v, 4)[0]] for sign in (1, -1)]
                      if np.isfinite(v).all() else [] for v in found.vectors]
    return found


def steering(found: Steering, coef: float, when: str = "all") -> list[Add]:
    """The actions that add coef times the vector to the chosen layers."""
    return [Add(f"l_out-{il}", x, coef, when=when) for il, x in found.directions().items()]


def _say(model: Model, prompt: str | Sequence[int], n: int, actions: Sequence[Add] = ()) -> Generation:
    """Generate a continuation; raise KeyboardInterrupt if it was interrupted, so that no half text is kept."""
    said = model.generate(prompt, n, actions)
    if said.stop_reason == "interrupted":
        raise KeyboardInterrupt
    return said


def _check(pool: str, coefs: list[float], when: str, n: int, prompt: Any) -> None:
    if pool not in POOLS:
        raise Error(f"pool {pool!r}: it must be last or mean")
    if when not in WHEN:
        raise Error(f"when {when!r}: it must be prompt, decode or all")
    if not coefs or not np.isfinite(coefs).all():
        raise Error(f"coefficients {coefs}: they must be numbers, one at least")
    least = 2 if when == "decode" else 1
    if prompt is not None and n < least:
        raise Error(f"n is {n}: it must be {least} or more" + (" to have a decoding pass" if least == 2 else ""))


def read_vector(model: Model, vector: str | Path | np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Read a vector, float32 [n_layer, n_embd], from a file or an array, and the layers that have one. Raises Error."""
    c = model.config
    if isinstance(vector, np.ndarray):
        rows, where = np.array(vector, np.float32), "the vector"
    elif Path(vector).suffix == ".gguf":
        rows, where = np.full((c.n_layer, c.n_embd), np.nan, np.float32), str(vector)
        for il, direction in read_control_vector(vector, c).items():
            rows[il] = direction
    else:
        found, where = Steering.load(vector), str(vector)
        rows, layers = found.vectors.astype(np.float32), found.layers
        if rows.shape == (c.n_layer, c.n_embd) and all(0 <= il < c.n_layer for il in layers):
            if not np.isnan(rows[layers]).any():
                return rows, layers
    if rows.shape != (c.n_layer, c.n_embd):
        raise Error(f"{where} is {list(rows.shape)}; the model's layers are [{c.n_layer}, {c.n_embd}]")
    layers = np.flatnonzero(np.isfinite(rows).all(1)).tolist()
    if not layers:
        raise Error(f"{where} has no direction for any layer; was its run stopped?")
    return rows, layers


# ---------------------------------------------------------------------------------------- command line


def add_flags(p: Parser) -> None:
    """Add the flags of the prompt, of the vector, and of where and how strongly it is added."""
    prompt_flags(p)
    p.add_argument("--positive", type=Input, metavar="FILE",
                   help="prompts with what the vector stands for: one per line, or a JSON list (.json); with "
                        "--chat each is put into the chat format")
    p.add_argument("--negative", type=Input, metavar="FILE", help="prompts without it")
    p.add_argument("--vector", type=Input, metavar="FILE",
                   help="a control vector (.gguf) or a result (.npz, .json) instead")
    p.add_argument("--pool", choices=POOLS, default="last",
                   help="take a prompt's last token (default), or the mean over its tokens")
    p.add_argument("--layers", metavar="LIST", help="0,3-5 (default: the middle one, or those of the file)")
    p.add_argument("--coef", type=float, nargs="+", default=[1.0], metavar="X", help="coefficients, one text each (1)")
    p.add_argument("--when", choices=WHEN, default="all",
                   help="passes in which it is added: over the prompt, over generated tokens, or all (default)")
    p.add_argument("-n", "--n-predict", type=least(1), default=32, metavar="N", help="tokens at most (default 32)")


def before(args: Namespace) -> None:
    """Raise Error unless the flags give exactly one vector, and read the prompts that it is made from."""
    made = [args.positive is not None, args.negative is not None]
    if any(made) == (args.vector is not None) or any(made) != all(made):
        raise Error("give --positive FILE and --negative FILE, of which a vector is made, or --vector FILE")
    args.sets = [None if path is None else read_prompts(path) for path in (args.positive, args.negative)]


def run(args: Namespace, model: Model, out: Path | None) -> Steering:
    """Run the steering that the flags describe."""
    others, prompt = [text for one in args.sets for text in one or ()], None
    if args.prompt is None and args.file is None:
        tell_unknown(model, others)
    else:
        prompt = prompt_ids(args, model, others)
    for path in args.out:
        if path.endswith(".gguf") and args.layers and 0 in chosen(args.layers, model.config.n_layer, "layer"):
            raise Error(f"-o {path}: llama.cpp's control vectors begin at layer 1: leave 0 out of --layers")
    sets = [said if said is None else [in_chat(args, model, text) for text in said] for said in args.sets]
    return steer(model, prompt, *sets, vector=args.vector, layers=args.layers, pool=args.pool, coef=args.coef,
                 when=args.when, n=args.n_predict, out=out)


command = Command("steer", "Steering: the difference between two sets of prompts, added while the model writes.",
                  add_flags, run, text, epilog=EPILOG, before=before, drawn=(), writers={".gguf": write_gguf})
