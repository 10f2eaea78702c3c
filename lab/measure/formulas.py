"""The formula of every line of the table of names, and one sentence on what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinymia import Config, Model, Op
from tinymia_engine import Linear, stream

# By base name: formula and sentence. i, j are positions, h is a head, g = n_head / n_head_kv.
TOLD: dict[str, tuple[str, str]] = {
    "inp_embd": (
        "inp_embd[i] = token_embd[token i]",
        "Each token's id picks a row of the embedding matrix: the vector that enters the residual stream."),
    "inp_scaled": (
        "inp_scaled = inp_embd * {embedding_scale:g}",
        "The embeddings are made longer, or shorter, before they enter the residual stream."),
    "norm": (
        "norm = x / sqrt(mean(x²) + {eps:g})",
        "Each token's vector is divided by its root mean square: only its direction stays."),
    "attn_norm": (
        "attn_norm = norm * weight",
        "Each of the n_embd numbers gets its own learnt scale before attention reads it."),
    "Qcur_pre": (
        "Qcur_pre[i, h] = Wq[h] {read}[i]",
        "Each head computes a query from each token: what the head looks for."),
    "Kcur_pre": (
        "Kcur_pre[i, h] = Wk[h] {read}[i]",
        "Each token gets keys, which queries are compared with. {shared}"),
    "Vcur": (
        "Vcur[i, h] = Wv[h] {read}[i]",
        "Each token gets values: what a head reads when it attends to the token."),
    "norm_q": (
        "norm_q = Qcur_pre / sqrt(mean(Qcur_pre²) + {eps:g}), the mean over {together}",
        "Queries are divided by their root mean square, so that their length no longer matters."),
    "Qcur_normed": (
        "Qcur_normed = norm_q * weight",
        "Each number of a query gets its own learnt scale."),
    "norm_k": (
        "norm_k = Kcur_pre / sqrt(mean(Kcur_pre²) + {eps:g}), the mean over {together}",
        "Keys are divided by their root mean square in the same way."),
    "Kcur_normed": (
        "Kcur_normed = norm_k * weight",
        "Each number of a key gets its own learnt scale."),
    "Qcur": (
        "pair p of each head: (a, b) -> (a cos t - b sin t, a sin t + b cos t){gain}\nt = {angle}",
        "RoPE: each pair of numbers of a query is rotated by an angle that grows with the position."),
    "Kcur": (
        "pair p of each head: (a, b) -> (a cos t - b sin t, a sin t + b cos t){gain}\nt = {angle}",
        "Keys are rotated in the same way, so that query times key depends on how far apart the two tokens are."),
    "Qcur_attn_temp_scaled": (
        "Qcur_attn_temp_scaled[i] = {query} * (1 + {temperature:g} * ln(1 + floor(i / {n_original})))",
        "Queries far into a long text are made longer, so that attention stays sharp among many keys."),
    "Qcur_scaled": (
        "Qcur_scaled = {query} * {scale}",
        "Queries are scaled, so that scores do not grow with the width of a head."),
    "kq": (
        "kq[h, i, j] = {query}[i, h] . {key}[j, {kv}]",
        "How well the query of token i fits the key of token j, in each head."),
    "kq_scaled_2": (
        "kq_scaled_2 = {attn_soft_cap:g} * tanh(kq / {attn_soft_cap:g})",
        "A soft cap: small scores stay as they are, large ones stay below {attn_soft_cap:g}."),
    "kq_soft_max": (
        "kq_soft_max[h, i, j] = exp({score}) / sum over {seen} of the same",
        "The scores become weights that add up to 1; tokens after i get none{far}: this is the attention pattern."),
    "kqv": (
        "kqv[h, i] = sum over j of kq_soft_max[h, i, j] * Vcur[j, {kv}]",
        "Each head takes the mean of the values, by those weights: what the head has read."),
    "kqv_merged": (
        "kqv_merged[i] = kqv[0, i], kqv[1, i], ... side by side",
        "The outputs of the heads for a token are put side by side; nothing is computed."),
    "kqv_out": (
        "kqv_out[i] = Wo kqv_merged[i]",
        "The output matrix turns what the heads have read into the output of the attention block."),
    "kqv_out_scaled": (
        "kqv_out_scaled = kqv_out * {residual_scale:g}",
        "What attention adds to the residual stream is made smaller."),
    "norm_attn_post": (
        "norm_attn_post = {attention} / sqrt(mean({attention}²) + {eps:g})",
        "A norm after the block: the output of attention is divided by its root mean square."),
    "attn_post_norm": (
        "attn_post_norm = norm_attn_post * weight",
        "Each of the n_embd numbers gets its own learnt scale before it is added."),
    "ffn_inp": (
        "ffn_inp = x + {added}",
        "The output of attention is added to the residual stream."),
    "norm_ffn": (
        "norm_ffn = ffn_inp / sqrt(mean(ffn_inp²) + {eps:g})",
        "Again each vector is divided by its root mean square, now for the feed-forward block."),
    "ffn_norm": (
        "ffn_norm = norm_ffn * weight",
        "Again each number gets its own learnt scale."),
    "ffn_gate": (
        "ffn_gate[i] = Wgate {read}[i]",
        "For each of the n_ff neurons: how strongly the token activates it."),
    "ffn_up": (
        "ffn_up[i] = Wup {read}[i]",
        "A second product for each neuron: the content that the gate multiplies, with its sign."),
    "ffn_silu": (
        "ffn_silu = ffn_gate / (1 + exp(-ffn_gate))",
        "SiLU is the gate: a number well above 0 passes, a number well below becomes almost 0."),
    "ffn_gelu": (
        "ffn_gelu = ffn_gate / 2 * (1 + tanh(sqrt(2 / pi) * (ffn_gate + 0.044715 ffn_gate³)))",
        "GELU is the gate: a number well above 0 passes, a number well below becomes almost 0."),
    "ffn_gate_par": (
        "ffn_gate_par = ffn_{act} * ffn_up",
        "Gate times content: the activation of each neuron."),
    "ffn_out": (
        "ffn_out[i] = Wdown ffn_gate_par[i]",
        "Each neuron adds its column of the matrix, times its activation: the sum is the block's output."),
    "ffn_out_scaled": (
        "ffn_out_scaled = ffn_out * {residual_scale:g}",
        "What the block adds to the residual stream is made smaller."),
    "norm_ffn_post": (
        "norm_ffn_post = {ffn} / sqrt(mean({ffn}²) + {eps:g})",
        "A norm after the block: its output is divided by its root mean square."),
    "ffn_post_norm": (
        "ffn_post_norm = norm_ffn_post * weight",
        "Each of the n_embd numbers gets its own learnt scale before it is added."),
    "l_out": (
        "l_out = ffn_inp + {added}",
        "The residual stream after the layer; the next layer reads it as x."),
    "result_norm": (
        "result_norm = norm * weight",
        "The last vectors of the stream, scaled for the output matrix."),
    "result_output_pre": (
        "result_output_pre[i, v] = Woutput[v] . result_norm[i]",
        "A score for each token of the vocabulary, not yet {last}."),
    "result_output": (
        "{logits}",
        "The logits: a score for each token of the vocabulary; their softmax says how likely it comes next."),
}


def told(model: Model, op: Op, il: int | None, graph: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The description of an op before it is run: name, formula, sentence, shapes by dimension, weight, type."""
    c, name = model.config, op.base if il is None else f"{op.base}-{il}"
    line = graph[name]
    words = {**vars(c), **words_of(model, op, il)}
    formula, sentence = (part.format(**words) for part in TOLD[op.base])
    inputs, weight, bias, scaled = [], None, None, False
    for role, source in zip(op.inputs, line["inputs"]):
        dims, shape = (("n_tok",), line["shape"]) if source == "tokens" else (
            model.table[source][0].dims, graph[source]["shape"])
        inputs.append({"role": role, "name": source, "shape": _named(dims, shape)})
    if line["weight"]:
        dims = {"get_rows": ("n_vocab", "n_embd"), "mul": op.dims[1:]}.get(op.op) or tuple(
            "*".join(d[1:]) for d in (op.dims, model.table[line["inputs"][0]][0].dims))
        weight = {"name": line["weight"], "type": line["type"],
                  "shape": _named(dims[-len(line["weight_shape"]):], line["weight_shape"])}
    if op.op == "mul_mat" and op.weight:
        own = linear_of(model, op, il)
        scaled, has_bias = own.weight.scale is not None, own.bias is not None
        bias = f"{(own.weight.name.partition('.weight')[0])}.bias" if has_bias else None
    formula += " * scale" * scaled + " + bias" * (bias is not None)
    return {"name": name, "layer": il, "op": op.op, "formula": formula,
            "sentence": sentence, "shape": _named(op.dims, line["shape"]), "inputs": inputs, "weight": weight,
            "bias": bias}


def words_of(model: Model, op: Op, il: int | None) -> dict[str, str]:
    """The words that fill the placeholders of TOLD, for an op of a layer."""
    c, group, first = model.config, model.config.n_head // model.config.n_head_kv, op.inputs[0]
    words = {"kv": "h" if group == 1 else f"h // {group}", "read": first, "query": first, "key": op.inputs[-1],
             "attention": first, "ffn": first, "added": first,
             "shared": "Every head has its own." if group == 1 else f"{group} heads share one of them.",
             "together": "all heads" if len(op.dims) > 2 and wide(model, op, il) else "each head",
             "last": "scaled" if c.logit_soft_cap is None else "capped", "logits": logits_of(c)}
    if il is None:
        return words
    layer, scale = c.layers[il], f"1 / sqrt({c.d_scale})" if c.attention_scale is None else f"{c.attention_scale:g}"
    by = f" / sqrt({c.d_scale})" if c.attention_scale is None else f" * {c.attention_scale:g}"
    gain = 1 if layer.rope is None else c.ropes[layer.rope].gain
    return words | {
        "scale": scale, "angle": angle(model, il), "gain": "" if gain == 1 else f" * {gain:g}",
        "score": f"{first}[h, i, j]" + by * (not c.scale_queries),
        "seen": "j' <= i" if layer.window is None else f"i - {layer.window} < j' <= i",
        "far": "" if layer.window is None else f", nor do those {layer.window} or more positions before it"}


def wide(model: Model, op: Op, il: int | None) -> bool:
    """Return whether the norm of queries or keys is over all heads together."""
    block = model.weights.blk[il or 0]
    weight = block.attn_q_norm if op.base == "norm_q" else block.attn_k_norm
    return weight is not None and weight.ndim > 1


def logits_of(c: Config) -> str:
    """The formula of the logits."""
    if c.logit_soft_cap is not None:
        return f"result_output = {c.logit_soft_cap:g} * tanh(result_output_pre / {c.logit_soft_cap:g})"
    if c.logit_scale is not None:
        return f"result_output = result_output_pre * {c.logit_scale:g}"
    return "result_output[i, v] = Woutput[v] . result_norm[i]"


def angle(model: Model, il: int) -> str:
    """The formula of the angle by which RoPE turns pair p at position i in a layer."""
    layer = model.config.layers[il]
    if layer.rope is None:
        return ""
    r = model.config.ropes[layer.rope]
    turn = f"i * {r.base:g}^(-2p / {r.n_rot})"
    turn += f" * {r.scale:g}" * (r.scale != 1 and r.yarn is None)
    turn += " / rope_freqs[p]" * (model.weights.rope_freqs is not None)
    if r.yarn is not None and r.scale != 1:
        turn = f"{turn}, times {r.scale:g} from pair {r.yarn[1]:g} on (yarn), times 1 up to pair {r.yarn[0]:g}"
    return turn + f"; pair p is numbers p and p + {r.n_rot // 2}" * r.halves


def linear_of(model: Model, op: Op, il: int | None) -> Linear:
    """The matrix of a product, with its scale and bias."""
    assert op.weight is not None
    return model.weights.output if il is None else getattr(model.weights.blk[il], op.weight)


def _named(dims: Sequence[str], shape: Sequence[int]) -> list[list[Any]]:
    """A shape with names: [[name, size], ...]."""
    return [[name, int(size)] for name, size in zip(dims, shape)]


def cgraph(model: Model, n_tok: int | None) -> list[dict[str, Any]]:
    """All ops in the order of computation, with shape, inputs, weight and its type; n_tok None: shapes by name."""
    sizes = {**model.config.sizes(), "n_tok": n_tok or "n_tok", "n_kv": n_tok or "n_kv"}
    rows = []
    for name, (op, il) in model.table.items():
        x = stream(model.config, model.config.n_layer if il is None else il)
        inputs = [x if i == "x" else i if il is None else f"{i}-{il}" for i in op.inputs]
        tensor = None
        if op.op == "mul_mat" and op.weight:
            tensor = linear_of(model, op, il).weight
        elif op.weight:
            tensor = model.weights[f"{op.weight}.weight" if il is None else f"blk.{il}.{op.weight}.weight"]
        rows.append({
            "name": name, "op": op.op, "shape": [sizes[d] for d in op.dims], "inputs": inputs,
            "weight": tensor and tensor.name, "type": tensor and tensor.type_name,
            "weight_shape": tensor and list(tensor.shape),
        })
    return rows
