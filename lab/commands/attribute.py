"""`tinymia attribute`: a logit split into the direct contributions of the embedding, each head and each FFN.

If the scale of the final norm is kept at its value in this run, the logits are a linear function of the last residual
stream. The stream is a sum of terms, so a logit is a sum, too: over the terms, each times one direction:

    direction = (W_output[answer] - W_output[against]) * output_norm / rms(x)       x = l_out of the last layer
    head h of layer l: Wo[:, its columns] @ kqv_merged-l[its columns] . direction   and so on for each term

Some models have a factor or a norm between a block and the stream: the scale of this norm, too, is kept at its value in
this run (measure/passage.py). Some models scale or cap their logits: the row of each token in W_output is then
multiplied by logit / product, as they were in this run. The effect of a part through later layers is not included. Two
more kinds of part make the sum exact:

    rounding    the engine rounds activations before a product with weights that are not float32 (--numerics ggml), and
                sums in float32. Heads are computed here without rounding, from kqv_merged and the decoded weights;
                kqv_out minus their sum is its rounding. The product with the output matrix is treated the same way.
    stream      what actions add elsewhere than at the terms themselves: at kqv_out and the steps after it, ffn_inp,
                l_out, and at the output norm, result_norm, result_output; without actions, the float32 rounding of
                sums, norms and caps, about 1e-6

A single logit also contains terms that raise all tokens equally; a difference of two logits (`against`) does not.
Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), direct paths through the stream.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

import tinymia
from tinymia import Action, Context, Error, Model
from tinymia_engine import out_of_range, stream, whole
from tinymia_files import Tensor

from ..flags.action_flags import change_flags, patch_flags, read_actions
from ..flags.arguments import prompt_flags, prompt_ids
from ..flags.command import Command
from ..flags.pair_flags import pair_flags
from ..flags.parser import Parser, least
from ..measure.answers import check_apart, token_or
from ..measure.passage import passage
from ..measure.selection import position_of
from ..measure.sinks import tell_sink
from ..runs.progress import keeping
from ..runs.result import about, describe, resume
from .attribute_result import Attribution, kinds, largest, pictures, text, title, top_neurons

__all__ = [
    "Attribution", "attribute", "back", "command", "kinds", "largest",
    "pictures", "text", "title", "top_neurons",
]

TERMS = ("kqv_merged", "kqv_out", "ffn_out", "l_out", "result_norm")    # read after actions
DECODED = 256   # rows of a matrix that are decoded at a time
Rows = dict[str, np.ndarray]    # the rows of these tensors at the position, by exact name: float64


def attribute(
    model: Model,
    prompt: str | Sequence[int],
    answer: str | int | None = None,
    against: str | int | None = None,
    position: int = -1,
    neurons: int | None = None,
    actions: Action | Sequence[Action] = (),
    out: str | Path | None = None,
) -> Attribution:
    """Compute the direct logit attribution at one position of a prompt.

    answer, against: texts or ids; without an answer, the best token. neurons: the layer whose FFN is split by neuron.
    out: an .npz or .json file that keeps the result; a stopped run continues from it. Raises Error.
    """
    c = model.config
    ids = model.ids(prompt)
    actions = tinymia.listed(actions)
    position = position_of(position, len(ids))
    if neurons is not None and not 0 <= whole(neurons, "the layer of neurons") < c.n_layer:
        raise Error(out_of_range("layer", neurons, c.n_layer, "layers"))
    last = position == len(ids) - 1
    wanted, other = (token_or(model, t, prompt if last else ids[: position + 1], None) for t in (answer, against))
    settings = {"answer": wanted, "against": other, "position": position, "neurons": neurons,
                "actions": describe(actions)}
    info = about(model, "attribute", settings, prompt=prompt)
    found = resume(out, info, Attribution, actions)
    if found is not None and not np.isnan(found.heads).any():
        return found
    with keeping(result := _empty(model, info, ids, position, neurons), out, c.n_layer + 1, "attribute") as bar:
        row: Rows = {}          # as actions left them
        computed: Rows = {}     # before actions

        def take(rows: Rows, x: np.ndarray, ctx: Context) -> None:
            rows[ctx.name] = ctx.rows(x)[-1 if last else position].astype(np.float64)

        names = [stream(c, 0), *TERMS, *([f"ffn_gate_par-{neurons}"] if neurons is not None else ())]
        before = [tinymia.Replace(name, partial(take, computed)) for name in ("kqv_out", c.product)]
        after = [tinymia.Replace(name, partial(take, row)) for name in names]
        run = model.run(prompt, actions=[*before, *actions, *after], logits="last" if last else "all")
        bar.step()
        direction = _output(result, model, run.logits[-1 if last else position], row, computed, wanted, other)
        for il in range(c.n_layer):
            _layer(result, il, model, row, computed, direction)
            bar.step()
        if neurons is not None:
            worth = direction * passage(model, f"ffn_out-{neurons}", row[f"ffn_out-{neurons}"])     # [n_embd]
            result.activations[:] = row[f"ffn_gate_par-{neurons}"]
            result.neurons[:] = row[f"ffn_gate_par-{neurons}"] * back(
                model, model.weights.blk[neurons].ffn_down.weight, worth)
    return result


def _empty(model: Model, info: dict[str, object], ids: list[int], position: int, neurons: int | None) -> Attribution:
    c, nan, pieces = model.config, float("nan"), [model.piece(i) for i in ids]
    n = c.n_ff if neurons is not None else 0
    heads, (bias, rounding, ffn, stream) = np.full((c.n_layer, c.n_head), nan), np.full((4, c.n_layer), nan)
    return Attribution(info, pieces, position, 0, "", None, None, nan, nan, heads, bias, rounding, ffn, stream, nan,
                       nan, nan, neurons, np.full(n, nan), np.full(n, nan, np.float32))


def _output(
    found: Attribution, model: Model, logits: np.ndarray, row: Rows, computed: Rows, wanted: int | None,
    other: int | None,
) -> np.ndarray:
    """Fill in the logit and the final norm. Returns the direction that each part is multiplied by, float64 [n_embd]."""
    found.answer = int(logits.argmax()) if wanted is None else wanted
    found.answer_piece, found.against = model.piece(found.answer), other
    check_apart(model, found.answer, other)
    found.against_piece = None if other is None else model.piece(other)
    c, (weight, bias) = model.config, model.weights.output
    ids, signs = ([found.answer], [1.0]) if other is None else ([found.answer, other], [1.0, -1.0])
    found.logit = float(signs @ logits[ids].astype(np.float64))
    product = computed[c.product][ids]                                                  # [n_id]
    signs = signs * _made_of(product, c.logit_scale, c.logit_soft_cap)                  # [n_id]
    x = row[stream(c, c.n_layer)]                                                       # [n_embd]
    scale = 1 / np.sqrt(np.mean(x * x) + c.eps)
    unembed = signs @ model.rows(weight, np.array(ids)).astype(np.float64)              # [n_embd]
    direction = unembed * model.weights.output_norm * scale                             # [n_embd]
    whole, exact = signs @ product, row["result_norm"] @ unembed
    found.embedding = float(row[stream(c, 0)] @ direction)
    found.output_bias = 0.0 if bias is None else float(signs @ bias[ids])
    found.output_rounding = float(whole - exact - found.output_bias)
    found.output_stream = float(found.logit - whole + exact - x @ direction)
    return direction


def _made_of(product: np.ndarray, scale: float | None, cap: float | None) -> np.ndarray:
    """The logit divided by its product with the output matrix, for each product: the effect of scale and soft cap."""
    factor = np.full(product.shape, 1.0 if scale is None else scale)
    if cap is not None:
        safe = np.where(product == 0, 1.0, product * factor)
        factor = factor * np.where(product == 0, 1.0, cap * np.tanh(safe / cap) / safe)
    return factor


def _layer(found: Attribution, il: int, model: Model, row: Rows, computed: Rows, direction: np.ndarray) -> None:
    """Fill in the parts of one layer, from the rows of its tensors."""
    c, (weight, bias) = model.config, model.weights.blk[il].attn_output
    x, l_out, ffn_out = row[stream(c, il)], row[f"l_out-{il}"], row[f"ffn_out-{il}"]    # [n_embd]
    by_attention = direction * passage(model, f"kqv_out-{il}", row[f"kqv_out-{il}"])    # [n_embd]
    by_ffn = direction * passage(model, f"ffn_out-{il}", ffn_out)                       # [n_embd]
    worth = back(model, weight, by_attention)                                           # [n_head * d_head_v]
    heads = (row[f"kqv_merged-{il}"] * worth).reshape(c.n_head, -1).sum(1)              # [n_head]
    attention = computed[f"kqv_out-{il}"] @ by_attention
    found.bias[il] = 0.0 if bias is None else bias @ by_attention
    found.rounding[il] = attention - heads.sum() - found.bias[il]
    found.ffn[il] = ffn_out @ by_ffn
    found.stream[il] = (l_out - x) @ direction - attention - found.ffn[il]
    found.heads[il] = heads  # set last: a row without NaN is done


def back(model: Model, weight: Tensor, direction: np.ndarray) -> np.ndarray:
    """The effect of one unit of each input of a matrix W: direction W, float64 [n_out] -> [n_in], decoded in parts."""
    worth = np.zeros(weight.shape[1])
    for at in range(0, weight.shape[0], DECODED):
        rows = np.arange(at, min(at + DECODED, weight.shape[0]))
        worth += direction[rows] @ model.rows(weight, rows)
    return worth


# ---------------------------------------------------------------------------------------- command line


EPILOG = """\
tinymia attribute -p "Egypt -> Cairo, Norway -> Oslo, France ->" --answer Paris --against Italy
rounding: what the engine's rounding of activations adds; stream: what actions add elsewhere than at
the parts themselves (at kqv_out, ffn_inp, l_out and later), else float32 rounding"""


def add_flags(p: Parser) -> None:
    """Add the flags of the prompt, the logits that are split, and actions."""
    prompt_flags(p)
    pair_flags(p)
    p.add_argument("--answer", metavar="TEXT", help="or #id (default: the best token)")
    p.add_argument("--against", metavar="TEXT", help="or #id: split the answer's logit minus this one's")
    p.add_argument("--position", type=int, default=-1, metavar="POS", help="of the logits (default -1, the last)")
    p.add_argument("--neurons", type=int, metavar="LAYER", help="split the FFN of this layer by neuron")
    p.add_argument("--top", type=least(1), default=20, metavar="N", help="the most lines in each list (default 20)")
    patch_flags(p.add_argument_group("patch"))
    change_flags(p.add_argument_group("change"))


def run(args: Namespace, model: Model, out: Path | None) -> Attribution:
    """Run the attribution that the flags describe."""
    prompt = prompt_ids(args, model)
    tell_sink(model, prompt)
    return attribute(model, prompt, args.answer, args.against, args.position, args.neurons, read_actions(args, model),
                     out)


command = Command("attribute", "A logit, or a difference of two, split over the embedding, each head and each FFN.",
                  add_flags, run, text, pictures, EPILOG, text_flags=("top",))
