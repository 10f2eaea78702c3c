"""`tinymia attribute`: a logit split into what the embedding, each head and each FFN give to it directly.

The logits are a linear function of the last residual stream once the final norm is given the scale that it had in this
run; the stream is a sum; so a logit is a sum over the stream's terms, each times one direction:

    direction = (W_output[answer] - W_output[against]) * output_norm / rms(x)       x = l_out of the last layer
    head h of layer l: Wo[:, its columns] @ kqv_merged-l[its columns] . direction   and so on for each term

What a part does by way of later layers is not in it. Two more kinds of part make the sum exact:

    rounding    the engine rounds activations before a product with weights that are not float32 (--numerics ggml), and
                sums in float32. Heads are computed here without rounding, from kqv_merged and the decoded weights; what
                kqv_out was more than they are is its rounding. The same for the product with the output matrix.
    stream      what actions put in by other ways than the terms themselves: at kqv_out, ffn_inp, l_out, and at the
                output norm, result_norm, result_output; without actions float32 rounding of sums, about 1e-6

A logit by itself also holds what raises all tokens alike; a difference of two logits (`against`) does not.
Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), direct paths through the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tinymia
from tinymia import Action, Context, Error, Model
from tinymia_engine import whole
from tinymia_files import Tensor

from ..flags.action_flags import change_flags, patch_flags, read_actions
from ..flags.arguments import emit, open_model, out_file, parser, prompt_flags, prompt_ids
from ..flags.parser import least
from ..measure.answers import token_of
from ..measure.sinks import tell_sink
from ..pictures.heatmap import Heatmap, number
from ..pictures.terminal import screen, signed, table, visible
from ..runs.progress import keeping
from ..runs.result import Result, about, describe, resume

TERMS = ("inp_embd", "kqv_merged", "ffn_out", "l_out", "result_norm")    # as actions left them
COMPUTED = ("kqv_out", "result_output")                                 # before actions
ROWS = 256  # of a matrix that are decoded together
Rows = dict[str, np.ndarray]    # of those tensors by exact name, at the position: float64


@dataclass
class Attribution(Result):
    """The parts of a logit; everything is in logits but `activations`."""

    pieces: list[str]               # of the prompt's tokens, [n_tok]
    position: int                   # whose logits
    answer: int                     # token ids
    answer_piece: str
    against: int | None
    against_piece: str | None
    logit: float                    # of the answer, less that of `against`: what the parts add up to
    embedding: float
    heads: np.ndarray               # float64 [n_layer, n_head]
    bias: np.ndarray                # float64 [n_layer], of attn_output, in models that have one
    rounding: np.ndarray            # float64 [n_layer]: the rest of kqv_out as it was computed
    ffn: np.ndarray                 # float64 [n_layer]
    stream: np.ndarray              # float64 [n_layer]: the rest of l_out
    output_bias: float
    output_rounding: float          # the rest of the logit as it was computed
    output_stream: float            # the rest of the logit
    neuron_layer: int | None        # whose FFN is split further
    neurons: np.ndarray             # float64 [n_ff]: ffn_gate_par times what its column of ffn_down is worth; else [0]
    activations: np.ndarray         # float32 [n_ff], ffn_gate_par; else [0]

    def parts(self) -> list[tuple[str, float]]:
        """(name, logits) of every part; those of a kind that the model does not have are left out."""
        named = [("embedding", self.embedding)]
        for il in range(len(self.ffn)):
            named += [(f"head {il}.{head}", v) for head, v in enumerate(self.heads[il])]
            named += [(f"FFN {il}", self.ffn[il]), (f"rounding in attn_output {il}", self.rounding[il]),
                      (f"stream {il}", self.stream[il])]
            named += [(f"bias of attn_output {il}", self.bias[il])] * bool(self.bias.any())
        named += [("rounding in output", self.output_rounding), ("stream, output", self.output_stream)]
        named += [("bias of output", self.output_bias)] * bool(self.output_bias)
        return [(name, float(v)) for name, v in named]


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
    """Direct logit attribution at one position of a prompt.

    answer, against: texts or ids; the best token where there is no answer. neurons: the layer whose FFN is split by
    neuron. out: an .npz or .json file that a stopped run is kept in and goes on from. Raises Error.
    """
    c = model.config
    ids = model.ids(prompt)
    actions = tinymia.listed(actions)
    if not -len(ids) <= whole(position, "the position") < len(ids):
        raise Error(f"position {position} is out of range: the prompt has {len(ids)} tokens, 0 to {len(ids) - 1}")
    if neurons is not None and not 0 <= whole(neurons, "the layer of neurons") < c.n_layer:
        raise Error(f"layer {neurons} is out of range: there are {c.n_layer} layers, 0 to {c.n_layer - 1}")
    position %= len(ids)
    last = position == len(ids) - 1
    wanted, other = (_token(model, t, prompt if last else ids[: position + 1]) for t in (answer, against))
    settings = {"answer": wanted, "against": other, "position": position, "neurons": neurons,
                "actions": describe(actions)}
    info = about(model, "attribute", settings, prompt=prompt)
    found = resume(out, info, Attribution, actions)
    if found is not None and not np.isnan(found.heads).any():
        return found
    with keeping(result := _empty(model, info, ids, position, neurons), out, c.n_layer + 1, "attribute") as bar:
        row: Rows = {}

        def take(x: np.ndarray, ctx: Context) -> None:
            row[ctx.name] = ctx.rows(x)[-1 if last else position].astype(np.float64)

        names = [*TERMS, *([f"ffn_gate_par-{neurons}"] if neurons is not None else ())]
        before, after = ([tinymia.Replace(name, take) for name in part] for part in (COMPUTED, names))
        run = model.run(prompt, actions=[*before, *actions, *after], logits="last" if last else "all")
        bar.step()
        direction = _output(result, model, run.logits[-1 if last else position], row, wanted, other)
        for il in range(c.n_layer):
            _layer(result, il, model, row, direction)
            bar.step()
        if neurons is not None:
            result.activations[:] = row[f"ffn_gate_par-{neurons}"]
            result.neurons[:] = row[f"ffn_gate_par-{neurons}"] * back(
                model, model.weights.blk[neurons].ffn_down.weight, direction)
    return result


def _token(model: Model, answer: str | int | None, before: str | Sequence[int]) -> int | None:
    return None if answer is None else token_of(model, answer, before)


def _empty(model: Model, info: dict[str, object], ids: list[int], position: int, neurons: int | None) -> Attribution:
    c, nan, pieces = model.config, float("nan"), [model.piece(i) for i in ids]
    n = c.n_ff if neurons is not None else 0
    heads, (bias, rounding, ffn, stream) = np.full((c.n_layer, c.n_head), nan), np.full((4, c.n_layer), nan)
    return Attribution(info, pieces, position, 0, "", None, None, nan, nan, heads, bias, rounding, ffn, stream, nan,
                       nan, nan, neurons, np.full(n, nan), np.full(n, nan, np.float32))


def _output(
    found: Attribution, model: Model, logits: np.ndarray, row: Rows, wanted: int | None, other: int | None
) -> np.ndarray:
    """Logit and final norm: the direction in the stream whose products are the parts, float64 [n_embd]."""
    found.answer = int(logits.argmax()) if wanted is None else wanted
    found.answer_piece, found.against = model.piece(found.answer), other
    if found.answer == other:
        raise Error(f"the answer and what it is held against are the same token, {found.answer_piece!r} (#{other})")
    found.against_piece = None if other is None else model.piece(other)
    ids, signs = ([found.answer], [1.0]) if other is None else ([found.answer, other], [1.0, -1.0])
    weight, bias = model.weights.output
    x = row[f"l_out-{model.config.n_layer - 1}"]                                        # [n_embd]
    scale = 1 / np.sqrt(np.mean(x * x) + model.config.eps)
    unembed = signs @ model.rows(weight, np.array(ids)).astype(np.float64)              # [n_embd]
    direction = unembed * model.weights.output_norm * scale                             # [n_embd]
    computed, exact = signs @ row["result_output"][ids], row["result_norm"] @ unembed
    found.logit = float(signs @ logits[ids].astype(np.float64))
    found.embedding = float(row["inp_embd"] @ direction)
    found.output_bias = 0.0 if bias is None else float(signs @ bias[ids])
    found.output_rounding = float(computed - exact - found.output_bias)
    found.output_stream = float(found.logit - computed + exact - x @ direction)
    return direction


def _layer(found: Attribution, il: int, model: Model, row: Rows, direction: np.ndarray) -> None:
    """The parts of one layer, out of the rows of its tensors."""
    weight, bias = model.weights.blk[il].attn_output
    x = row["inp_embd" if il == 0 else f"l_out-{il - 1}"]                               # [n_embd]
    kqv_out, ffn_out, l_out = (row[f"{name}-{il}"] for name in ("kqv_out", "ffn_out", "l_out"))
    worth = back(model, weight, direction)                                              # [n_head * d_head_v]
    heads = (row[f"kqv_merged-{il}"] * worth).reshape(model.config.n_head, -1).sum(1)   # [n_head]
    found.bias[il] = 0.0 if bias is None else bias @ direction
    found.rounding[il] = kqv_out @ direction - heads.sum() - found.bias[il]
    found.ffn[il] = ffn_out @ direction
    found.stream[il] = (l_out - x - kqv_out - ffn_out) @ direction
    found.heads[il] = heads  # last: a row without NaN is done


def back(model: Model, weight: Tensor, direction: np.ndarray) -> np.ndarray:
    """What each input of a matrix is worth: direction W, float64 [n_out] -> [n_in], a few rows decoded at a time."""
    worth = np.zeros(weight.shape[1])
    for at in range(0, weight.shape[0], ROWS):
        rows = np.arange(at, min(at + ROWS, weight.shape[0]))
        worth += direction[rows] @ model.rows(weight, rows)
    return worth


# ---------------------------------------------------------------------------------------- pictures


def title(found: Attribution) -> str:
    """logit of ▁Paris, or ... less that of ▁Italy."""
    less = "" if found.against_piece is None else f" less that of {visible(found.against_piece)}"
    return f"logit of {visible(found.answer_piece)}{less}"


def pictures(found: Attribution) -> list[Heatmap]:
    """Layer x head; then embedding, attention, FFN and the rest by layer, whose cells add up to the logit."""
    n_layer, n_head = found.heads.shape
    what = f"{title(found)}, {found.logit:.4g}, at position {found.position}"
    layers, columns = ([str(i) for i in range(n)] for n in (n_layer, n_head))
    heads = Heatmap(found.heads, layers, columns, f"{what}: by head", "head", "layer", "logits",
                    diverging=True, upward=True)
    grid = np.full((n_layer + 2, 4), np.nan)
    grid[0, 0], grid[-1, 3] = found.embedding, found.output_bias + found.output_rounding + found.output_stream
    grid[1:-1, 1] = found.heads.sum(1) + found.bias + found.rounding
    grid[1:-1, 2], grid[1:-1, 3] = found.ffn, found.stream
    names, so_far = ["tokens", *layers, "output"], np.cumsum(np.nansum(grid, 1))
    columns = ["embedding", "attention", "FFN", "rest"]
    hovers = [[f"{name if name in ('tokens', 'output') else f'layer {name}'}, {column}\nlogits {number(v)}\n"
               f"all up to here {number(total)}" for column, v in zip(columns, row)]
              for name, row, total in zip(names, grid, so_far)]
    return [heads, Heatmap(grid, names, columns, f"{what}: by layer", "part", "layer", "logits", hovers=hovers,
                           diverging=True, upward=True)]


def largest(found: Attribution, top: int) -> str:
    """The parts of the largest size, and what the others sum up to."""
    parts = sorted(found.parts(), key=lambda part: -abs(part[1]))
    rows = [[name, signed(v)] for name, v in parts[:top]]
    if parts[top:]:
        rows.append([f"{len(parts) - top} smaller parts", signed(sum(v for _, v in parts[top:]))])
    rows.append([title(found), signed(found.logit)])
    return f"parts by size, in logits\n{table(rows)}"


def kinds(found: Attribution) -> str:
    """What each kind of part sums up to."""
    sums = {"embedding": found.embedding, "heads": found.heads.sum(), "FFNs": found.ffn.sum(),
            "biases": found.bias.sum() + found.output_bias, "rounding": found.rounding.sum() + found.output_rounding,
            "stream": found.stream.sum() + found.output_stream}
    return ", ".join(f"{name} {signed(v)}" for name, v in sums.items())


def top_neurons(found: Attribution, top: int) -> str:
    """The neurons of one FFN whose parts are the largest in size."""
    il, order = found.neuron_layer or 0, np.argsort(-np.abs(found.neurons), kind="stable")
    rows = [["neuron", "ffn_gate_par", "a unit is worth", "logits"]]
    for i in order[:top].tolist():
        value, part = float(found.activations[i]), found.neurons[i]
        rows.append([str(i), f"{value:+.4g}", signed(part / value if value else 0), signed(part)])
    others, rest = found.neurons[order[top:]].sum(), found.ffn[il] - found.neurons.sum()
    rows += [["others", "", "", signed(others)]] if len(order) > top else []
    rows += [["rest", "", "", signed(rest)], [f"FFN {il}", "", "", signed(found.ffn[il])]]
    return f"neurons of FFN {il} (rest: rounding, bias, actions on ffn_out)\n{table(rows)}"


def text(found: Attribution, top: int) -> str:
    """What the terminal shows."""
    maps = [h.terminal(*screen()) for h in pictures(found)]
    split = [top_neurons(found, top)] if found.neuron_layer is not None else []
    return "\n\n".join([*maps, largest(found, top), *split, kinds(found)])


# ---------------------------------------------------------------------------------------- command line


def command(argv: Sequence[str]) -> int:
    """`tinymia attribute`."""
    p = parser("attribute", "A logit, or a difference of two, split over the embedding, each head and each FFN.",
               'tinymia attribute -p "Egypt -> Cairo, Norway -> Oslo, France ->" --answer Paris --against Italy\n'
               "rounding: what the engine's rounding of activations adds; stream: what actions put in by other ways\n"
               "than the parts themselves (at kqv_out, ffn_inp, l_out and behind), else float32 rounding")
    prompt_flags(p)
    p.add_argument("--answer", metavar="TEXT", help="or #id (default: the best token)")
    p.add_argument("--against", metavar="TEXT", help="or #id: split the answer's logit less this one's")
    p.add_argument("--position", type=int, default=-1, metavar="POS", help="whose logits (default -1, the last)")
    p.add_argument("--neurons", type=int, metavar="LAYER", help="split the FFN of this layer by neuron")
    p.add_argument("--top", type=least(1), default=20, metavar="N", help="lines of the lists (default 20)")
    patch_flags(p.add_argument_group("patch"))
    change_flags(p.add_argument_group("change"))
    args = p.parse_args(argv)
    model = open_model(args)
    prompt = prompt_ids(args, model)
    tell_sink(model, prompt)
    found = attribute(model, prompt, args.answer, args.against, args.position, args.neurons,
                      read_actions(args, model), out_file(args))
    return emit(args, found, text(found, args.top), pictures(found))
