"""The formula of every line of the table of names, and one sentence on what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinymia import Model, Op

# By base name: formula and sentence. i, j are positions, h is a head, g = n_head / n_head_kv.
TOLD: dict[str, tuple[str, str]] = {
    "inp_embd": (
        "inp_embd[i] = token_embd[token i]",
        "Each token's id picks a row of the embedding matrix: the vector that enters the residual stream."),
    "norm": (
        "norm = x / sqrt(mean(x²) + {eps:g})",
        "Each token's vector is divided by its root mean square: only its direction stays."),
    "attn_norm": (
        "attn_norm = norm * weight",
        "Each of the n_embd numbers gets its own learnt scale before attention reads it."),
    "Qcur_pre": (
        "Qcur_pre[i, h] = Wq[h] attn_norm[i]",
        "Each head computes a query from each token: what the head looks for."),
    "Kcur_pre": (
        "Kcur_pre[i, h] = Wk[h] attn_norm[i]",
        "Each token gets keys, which queries are compared with. {shared}"),
    "Vcur": (
        "Vcur[i, h] = Wv[h] attn_norm[i]",
        "Each token gets values: what a head reads when it attends to the token."),
    "Qcur": (
        "pair p of each head: (a, b) -> (a cos t - b sin t, a sin t + b cos t){gain}\nt = {angle}",
        "RoPE: each pair of numbers of a query is rotated by an angle that grows with the position."),
    "Kcur": (
        "pair p of each head: (a, b) -> (a cos t - b sin t, a sin t + b cos t){gain}\nt = {angle}",
        "Keys are rotated in the same way, so that query times key depends on how far apart the two tokens are."),
    "kq": (
        "kq[h, i, j] = Qcur[i, h] . Kcur[j, {kv}]",
        "How well the query of token i fits the key of token j, in each head."),
    "kq_soft_max": (
        "kq_soft_max[h, i, j] = exp(kq[h, i, j] / sqrt({d_head})) / sum over j' <= i of the same",
        "The scores become weights that add up to 1; tokens after i get none: this is the attention pattern."),
    "kqv": (
        "kqv[h, i] = sum over j of kq_soft_max[h, i, j] * Vcur[j, {kv}]",
        "Each head takes the mean of the values, by those weights: what the head has read."),
    "kqv_merged": (
        "kqv_merged[i] = kqv[0, i], kqv[1, i], ... side by side",
        "The outputs of the heads for a token are put side by side; nothing is computed."),
    "kqv_out": (
        "kqv_out[i] = Wo kqv_merged[i]",
        "The output matrix turns what the heads have read into the vector that attention adds to the residual stream."),
    "ffn_inp": (
        "ffn_inp = x + kqv_out",
        "The output of attention is added to the residual stream."),
    "norm_ffn": (
        "norm_ffn = ffn_inp / sqrt(mean(ffn_inp²) + {eps:g})",
        "Again each vector is divided by its root mean square, now for the feed-forward block."),
    "ffn_norm": (
        "ffn_norm = norm_ffn * weight",
        "Again each number gets its own learnt scale."),
    "ffn_gate": (
        "ffn_gate[i] = Wgate ffn_norm[i]",
        "For each of the n_ff neurons: how strongly the token activates it."),
    "ffn_up": (
        "ffn_up[i] = Wup ffn_norm[i]",
        "A second product for each neuron: the content that the gate multiplies, with its sign."),
    "ffn_silu": (
        "ffn_silu = ffn_gate / (1 + exp(-ffn_gate))",
        "SiLU is the gate: a number well above 0 passes, a number well below becomes almost 0."),
    "ffn_gate_par": (
        "ffn_gate_par = ffn_silu * ffn_up",
        "Gate times content: the activation of each neuron."),
    "ffn_out": (
        "ffn_out[i] = Wdown ffn_gate_par[i]",
        "Each neuron adds its column of the matrix, times its activation: the sum is the block's output."),
    "l_out": (
        "l_out = ffn_inp + ffn_out",
        "The residual stream after the layer; the next layer reads it as x."),
    "result_norm": (
        "result_norm = norm * weight",
        "The last vectors of the stream, scaled for the output matrix."),
    "result_output": (
        "result_output[i, v] = Woutput[v] . result_norm[i]",
        "The logits: a score for each token of the vocabulary; their softmax says how likely it comes next."),
}


def told(model: Model, op: Op, il: int | None, graph: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The description of an op before it is run: name, formula, sentence, shapes by dimension, weight, type."""
    c, name = model.config, op.base if il is None else f"{op.base}-{il}"
    line, group = graph[name], c.n_head // c.n_head_kv
    words = {"kv": "h" if group == 1 else f"h // {group}", "angle": angle(model),
             "gain": "" if c.rope_gain == 1 else f" * {c.rope_gain:g}",
             "shared": "Every head has its own." if group == 1 else f"{group} heads share one of them."}
    formula, sentence = (part.format(**vars(c), **words) for part in TOLD[op.base])
    inputs, weight, bias, scaled = [], None, None, False
    for role, source in zip(op.inputs, line["inputs"]):
        dims, shape = (("n_tok",), line["shape"]) if source == "tokens" else (
            model.table[source][0].dims, graph[source]["shape"])
        inputs.append({"role": role, "name": source, "shape": _named(dims, shape)})
    if line["weight"]:
        dims = {"get_rows": ("n_vocab", "n_embd"), "mul": ("n_embd",)}.get(op.op) or tuple(
            "*".join(d[1:]) for d in (op.dims, model.table[line["inputs"][0]][0].dims))
        weight = {"name": line["weight"], "type": line["type"], "shape": _named(dims, line["weight_shape"])}
        own = op.weight if il is None else f"blk.{il}.{op.weight}"
        scaled = f"{own}.scale" in model.weights and op.op == "mul_mat"
        bias = f"{own}.bias" if f"{own}.bias" in model.weights and op.op == "mul_mat" else None
    formula += " * scale" * scaled + " + bias" * (bias is not None)
    return {"name": name, "layer": il, "op": op.op, "formula": formula,
            "sentence": sentence, "shape": _named(op.dims, line["shape"]), "inputs": inputs, "weight": weight,
            "bias": bias}


def angle(model: Model) -> str:
    """The formula of the angle by which RoPE rotates pair p at position i."""
    c, scaled = model.config, model.config.rope_scale != 1 and model.config.yarn is None
    turn = f"i * {c.rope_base:g}^(-2p / {c.n_rot})"
    turn += f" * {c.rope_scale:g}" * scaled + " / rope_freqs[p]" * (model.weights.rope_freqs is not None)
    if c.yarn is None:
        return turn
    return f"{turn}, times {c.rope_scale:g} from pair {c.yarn[1]:g} on (yarn), times 1 up to pair {c.yarn[0]:g}"


def _named(dims: Sequence[str], shape: Sequence[int]) -> list[list[Any]]:
    """A shape with names: [[name, size], ...]."""
    return [[name, int(size)] for name, size in zip(dims, shape)]


def cgraph(model: Model, n_tok: int | None) -> list[dict[str, Any]]:
    """All ops in the order of computation: name, op, shape, inputs, weight and its type; n_tok None: shapes by name."""
    sizes = {**model.config.sizes(), "n_tok": n_tok or "n_tok", "n_kv": n_tok or "n_kv"}
    rows = []
    for name, (op, il) in model.table.items():
        below = (model.config.n_layer if il is None else il) - 1
        before = f"l_out-{below}" if below >= 0 else "inp_embd"
        inputs = [before if i == "x" else i if il is None else f"{i}-{il}" for i in op.inputs]
        weight = op.weight and f"{op.weight}.weight" if il is None else op.weight and f"blk.{il}.{op.weight}.weight"
        if weight and weight not in model.weights:  # output tied to the embedding
            weight = "token_embd.weight"
        tensor = model.weights[weight] if weight else None
        rows.append({
            "name": name, "op": op.op, "shape": [sizes[d] for d in op.dims], "inputs": inputs, "weight": weight,
            "type": tensor and tensor.type_name, "weight_shape": tensor and list(tensor.shape),
        })
    return rows
