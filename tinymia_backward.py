"""The backward pass: how much a number made from the logits changes with every named value.

What it computes. Say the number is the logit of " Paris" minus the logit of " Oslo". Its gradient with respect to a
value, `l_out-3` for instance, has the shape of that value, and says for each of its elements: if this element grew by a
little, the number would grow by so many times that little. d_x below is the gradient with respect to x.

How it goes. The gradient with respect to the logits is known. Then the lines of `forward` (tinymia.py) are taken in
reverse order. Each one turns the gradient with respect to what it made into the gradient with respect to what it read.
For y = f(x) this is a vector-Jacobian product: d_x[j] = sum over i of d_y[i] * (d y[i] / d x[j]). The Jacobian itself,
all these derivatives as a matrix, is never made. Where forward uses a value twice, its two gradients are added: so
at `x = cur + x` d_x goes back both ways, into the block and past it.

What it keeps. A derivative of a product or of a norm depends on the values that went in. The first pass keeps
only the residual stream after each layer. When a layer's turn comes, the layer is run again from there, and its inner
values are kept until the layer is done. So memory grows with the number of tokens, as for `forward`.

What it does with rounding. The weights are those of the file, unpacked a few rows at a time. With numerics="ggml",
`forward` rounds activations; the gradient is computed as if such a rounding changed nothing (its true derivative is 0
almost everywhere, which would be of no use). With "f32" and "plain" the gradient is that of the function itself.

What actions do. They are part of the function: a patched row does not depend on the row that it replaced, so the
gradient stops there; at a scaled value the gradient is scaled as well. Each action does this in its method `vjp`. The
gradient with respect to a value is that with respect to what the actions on its name left.

Several numbers have gradients of their own, n_of of them. They go back together, as one more axis in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from tinymia import Action, Error, Model, Run, Save, Tap, forward, match, rope, scales
from tinymia_engine import Context, Gradients, Linear, finite, given, listed, metrics, stream

# ------------------------------------------------------------------------------- one function per kind of operation


PANEL = 512     # rows of a weight that are unpacked at a time
ROWS = 64       # rows of the attention pattern that are made at a time, of all gradients together


def linear(o: Any, d: np.ndarray, layer: Linear) -> np.ndarray:     # [n_of, n_tok, n_out] -> [n_of, n_tok, n_in]
    """y = x W^T + b: d_x = d_y W. Rows of W are unpacked once for all tokens and all gradients, those alone that some
    gradient is not 0 for: the gradient of a logit needs one row of the output matrix."""
    d_y = d.reshape(-1, d.shape[-1])                                # [n_of * n_tok, n_out]
    live, used = np.flatnonzero(d_y.any(1)), np.flatnonzero(d_y.any(0))
    found = np.zeros((len(live), layer.weight.shape[1]), d.dtype)
    for i in range(0, len(used), PANEL):
        rows = used[i : i + PANEL]
        found += d_y[np.ix_(live, rows)] @ o.embed(layer.weight, rows)
    d_x = np.zeros((len(d_y), found.shape[1]), d.dtype)
    d_x[live] = found
    return d_x.reshape(*d.shape[:-1], -1)


def rms_norm(d: np.ndarray, x: np.ndarray, eps: float, dims: int = 1) -> np.ndarray:        # [n_of, n_tok, n_embd]
    """y = x / r, with r = sqrt(mean(x²) + eps): d_x = (d_y - y mean(d_y y)) / r."""
    over = tuple(range(-dims, 0))
    r = np.sqrt(np.mean(x * x, axis=over, keepdims=True) + eps)
    return (d - x / r * np.mean(d * (x / r), axis=over, keepdims=True)) / r


def unrope(d: np.ndarray, cos: np.ndarray, sin: np.ndarray, halves: bool) -> np.ndarray:
    """Each pair of d [n_of, n_tok, n_head, d_head] was turned by an angle: its gradient is turned back by the same."""
    return rope(d, cos, -sin, halves)


def scores(d: np.ndarray, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """kq = q . k, k shared by a group of heads: d_q = d_kq k, and d_k = d_kq q, summed over the group.

    [n_of, n_head, n_tok, n_kv], [n_tok, n_head, d_head], [n_head_kv, n_kv, d_head] -> [n_of, n_tok, n_head, d_head],
    [n_of, n_kv, n_head_kv, d_head].
    """
    group = d.reshape(len(d), len(k), -1, d.shape[-1])              # [n_of, n_head_kv, n_group * n_tok, n_kv]
    d_q = (group @ k).reshape(*d.shape[:3], -1)                     # [n_of, n_head, n_tok, d_head]
    d_k = group.swapaxes(2, 3) @ q.swapaxes(0, 1).reshape(len(k), -1, q.shape[-1])
    return d_q.swapaxes(1, 2), d_k.swapaxes(1, 2)


def soft_cap(d: np.ndarray, x: np.ndarray, cap: float) -> np.ndarray:                       # any shape -> the same
    """y = cap tanh(x / cap): d_x = d_y (1 - tanh(x / cap)²)."""
    return d * (1 - np.tanh(x / cap) ** 2)


def soft_max(d: np.ndarray, pattern: np.ndarray, scale: Any) -> np.ndarray:     # [n_of, n_head, n_tok, n_kv]
    """p = softmax(scale x): d_x = scale p (d_p - sum(d_p p)). It is 0 where p is 0, at tokens that are not seen.

    The sum is subtracted a second time. In exact arithmetic it is 0 by then. But where nearly all the weight is on one
    token, the true result is as small as the rounding error of the first subtraction.
    """
    d = d - np.sum(d * pattern, axis=-1, keepdims=True)
    return scale * pattern * (d - np.sum(d * pattern, axis=-1, keepdims=True))


def mix(d: np.ndarray, pattern: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """kqv = p v, v shared by a group of heads: d_p = d_kqv v, and d_v = d_kqv p, summed over the group.

    [n_of, n_head, n_tok, d_head_v], [n_head, n_tok, n_kv], [n_head_kv, d_head_v, n_kv] -> [n_of, n_head, n_tok, n_kv],
    [n_of, n_kv, n_head_kv, d_head_v].
    """
    group = d.reshape(len(d), len(v), -1, d.shape[-1])              # [n_of, n_head_kv, n_group * n_tok, d_head_v]
    d_p = (group @ v).reshape(*d.shape[:3], -1)                     # [n_of, n_head, n_tok, n_kv]
    d_v = pattern.reshape(len(v), -1, pattern.shape[-1]).swapaxes(1, 2) @ group
    return d_p, d_v.swapaxes(1, 2)


def unmerge(d: np.ndarray, n_head: int) -> np.ndarray:              # [n_of, n_tok, n_head * d_head_v] ->
    """The heads of each token, which stood side by side, apart again."""
    return d.reshape(*d.shape[:2], n_head, -1).swapaxes(1, 2)       # [n_of, n_head, n_tok, d_head_v]


def flat(d: np.ndarray) -> np.ndarray:                              # [n_of, n_tok, n_head, d_head] ->
    """The heads of each token side by side, as a weight made them."""
    return d.reshape(*d.shape[:2], -1)                              # [n_of, n_tok, n_head * d_head]


def attention(
    o: Any, d: np.ndarray, q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: Any, positions: np.ndarray,
    window: int | None, cap: float | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mix, soft_max, soft_cap and scores in one, for a few rows of the pattern at a time: d_kqv -> (d_q, d_k, d_v)."""
    n_of, _, n_tok, _ = d.shape
    k, v = keys[:, :n_tok].astype(d.dtype), values[:, :, :n_tok].astype(d.dtype)
    d_q = np.zeros((n_of, *q.shape), d.dtype)                                       # [n_of, n_tok, n_head, d_head]
    d_k = np.zeros((n_of, n_tok, len(k), k.shape[2]), d.dtype)                      # [n_of, n_tok, n_head_kv, d_head]
    d_v = np.zeros((n_of, n_tok, len(v), v.shape[1]), d.dtype)                      # [n_of, n_tok, n_head_kv, d_head_v]
    step = max(1, ROWS // n_of)
    for i in range(0, n_tok, step):
        rows, n = slice(i, i + step), min(i + step, n_tok)      # these rows see the keys before n
        if not d[:, :, rows].any():
            continue
        kq = o.scores(q[rows], keys, n)                                             # [n_head, n_row, n]
        capped = kq if cap is None else o.soft_cap(kq, cap)                         # [n_head, n_row, n]
        pattern = o.soft_max(capped, scale, positions[rows], window)                # [n_head, n_row, n]
        d_kq, part = mix(d[:, :, rows], pattern, v[:, :, :n])                       # [n_of, n_head, n_row, n]
        d_v[:, :n] += part
        d_kq = soft_max(d_kq, pattern, scale)                                       # [n_of, n_head, n_row, n]
        d_kq = d_kq if cap is None else soft_cap(d_kq, kq, cap)                     # [n_of, n_head, n_row, n]
        d_q[:, rows], part = scores(d_kq, q[rows], k[:, :n])                        # [n_of, n_row, n_head, d_head]
        d_k[:, :n] += part
    return d_q, d_k, d_v


def d_silu(x: np.ndarray) -> np.ndarray:                            # [n_tok, n_ff] -> the same
    """The derivative of x s, with s = sigmoid(x): s + x s (1 - s)."""
    s = 1 / (1 + np.exp(-x))
    return s + x * s * (1 - s)


def d_gelu(x: np.ndarray) -> np.ndarray:                            # [n_tok, n_ff] -> the same
    """The derivative of x / 2 (1 + t), with t = tanh(a (x + b x³)): (1 + t) / 2 + x / 2 (1 - t²) a (1 + 3 b x²)."""
    a, b = np.sqrt(x.dtype.type(2 / np.pi)), 0.044715
    t = np.tanh(a * (x + b * x**3))
    return (1 + t) / 2 + x / 2 * (1 - t * t) * a * (1 + 3 * b * x * x)


SLOPE = {"silu": d_silu, "gelu": d_gelu}


# ------------------------------------------------------------------------------- backward


def norms(tape: Tape, eps: float) -> Callable[..., np.ndarray]:
    """The function that goes back through a norm: its two steps have the names `base` and `name`."""
    def norm(base: str, name: str, il: int | None, d: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        if weight is None:          # the model has no such norm: d stays as it is
            return d
        d = tape.back(base, il, tape.back(name, il, d) * weight)
        return rms_norm(d, tape.read(base, il)[0], eps, weight.ndim)
    return norm


def backward(m: Model, d: np.ndarray, tape: Tape) -> None:
    """Take d, the gradient with respect to the logits [n_of, n_tok, n_vocab], back through the pass on a tape.

    t(name, layer, d) notes the gradient with respect to a named value, and takes it back through the actions on it.
    Here too [n_tok, ...] is [1, ...] after the last layer if forward computed the last row only.
    """
    c, w, t, read = m.config, m.weights, tape.back, tape.read
    o = m.ops.several() if tape.n_tok > 1 else m.ops                                # forward's arithmetic
    norm, product, cache = norms(tape, c.eps), partial(linear, o), tape.cache
    act, slope = f"ffn_{c.act}", SLOPE[c.act]
    turns = [(*o.rope_angles(tape.positions, r, w.rope_freqs), r.halves) for r in c.ropes]      # [n_tok, n_rot / 2]
    heat, q_scale, kq_scale = scales(m, tape.positions)
    grow, factor, cap = c.embedding_scale, c.residual_scale, c.attn_soft_cap        # None where the model has none

    if c.logit_soft_cap is not None:
        d = soft_cap(t("result_output", None, d), read("result_output", None)[0], c.logit_soft_cap)
    d = d if c.logit_scale is None else t("result_output", None, d) * c.logit_scale     # [n_of, n_tok, n_vocab]
    d = product(t(c.product, None, d), w.output)                                    # [n_of, n_tok, n_embd]
    d = norm("norm", "result_norm", None, d, w.output_norm)                         # [n_of, n_tok, n_embd]
    d_x = np.zeros((len(d), tape.n_tok, c.n_embd), d.dtype)
    d_x[:, -d.shape[1] :] = d                                                       # [n_of, n_tok, n_embd]
    for il in reversed(range(c.n_layer)):
        blk, layer = w.blk[il], c.layers[il]
        d_x = t("l_out", il, d_x)                                                   # [n_of, n_tok, n_embd]
        if tape.done:
            return
        tape.make(il)

        d = norm("norm_ffn_post", "ffn_post_norm", il, d_x, blk.post_ffw_norm)      # [n_of, n_tok, n_embd]
        d = d if factor is None else t("ffn_out_scaled", il, d) * factor            # [n_of, n_tok, n_embd]
        d = product(t("ffn_out", il, d), blk.ffn_down)                              # [n_of, n_tok, n_ff]
        d, (gate, up) = t("ffn_gate_par", il, d), read("ffn_gate_par", il)          # [n_of, n_tok, n_ff]
        d_gate, d_up = t(act, il, d * up), d * gate                                 # [n_of, n_tok, n_ff]
        d_gate = d_gate * slope(read(act, il)[0])                                   # [n_of, n_tok, n_ff]
        d_gate, d_up = t("ffn_gate", il, d_gate), t("ffn_up", il, d_up)             # [n_of, n_tok, n_ff]
        d = product(d_gate, blk.ffn_gate) + product(d_up, blk.ffn_up)               # [n_of, n_tok, n_embd]
        d = norm("norm_ffn", "ffn_norm", il, d, blk.ffn_norm)                       # [n_of, n_tok, n_embd]

        d_x = t("ffn_inp", il, d_x + d)                                             # [n_of, n_tok, n_embd]
        d = norm("norm_attn_post", "attn_post_norm", il, d_x, blk.post_attention_norm)          # [n_of, n_tok, n_embd]
        d = d if factor is None else t("kqv_out_scaled", il, d) * factor            # [n_of, n_tok, n_embd]
        d = product(t("kqv_out", il, d), blk.attn_output)                           # [n_of, n_tok, n_head * d_head_v]
        d = unmerge(t("kqv_merged", il, d), c.n_head)                               # [n_of, n_head, n_tok, d_head_v]
        q = read("kq", il)[0]                                                       # [n_tok, n_head, d_head]
        if tape.wants(il, "kq", "kq_scaled_2", "kq_soft_max", "kqv"):   # step by step, as in forward
            k, v = tape.cached(il)          # [n_head_kv, n_kv, d_head], [n_head_kv, d_head_v, n_kv]
            d = t("kqv", il, d)                                                     # [n_of, n_head, n_tok, d_head_v]
            d, d_v = mix(d, read("kqv", il)[0], v)                                  # [n_of, n_head, n_tok, n_kv]
            pattern = o.soft_max(*read("kq_soft_max", il), kq_scale, tape.positions, layer.window)
            d = soft_max(t("kq_soft_max", il, d), pattern, kq_scale)                # [n_of, n_head, n_tok, n_kv]
            if cap is not None:
                d = soft_cap(t("kq_scaled_2", il, d), read("kq_scaled_2", il)[0], cap)     # [n_of, n_head, n_tok, n_kv]
            d_q, d_k = scores(t("kq", il, d), q, k)                                 # [n_of, n_tok, n_head(_kv), d_head]
        else:       # as in forward: the same numbers, without an array that grows with n_tok * n_kv
            d_q, d_k, d_v = attention(o, d, q, cache.k[il], cache.v[il], kq_scale, tape.positions, layer.window, cap)
        d_q = d_q if q_scale is None else t("Qcur_scaled", il, d_q) * q_scale       # [n_of, n_tok, n_head, d_head]
        d_q = d_q if heat is None else t("Qcur_attn_temp_scaled", il, d_q) * heat   # [n_of, n_tok, n_head, d_head]
        if layer.rope is not None:
            d_q = unrope(t("Qcur", il, d_q), *turns[layer.rope])                    # [n_of, n_tok, n_head, d_head]
            d_k = unrope(t("Kcur", il, d_k), *turns[layer.rope])                    # [n_of, n_tok, n_head_kv, d_head]
        d_q = norm("norm_q", "Qcur_normed", il, d_q, blk.attn_q_norm)               # [n_of, n_tok, n_head, d_head]
        d_k = norm("norm_k", "Kcur_normed", il, d_k, blk.attn_k_norm)               # [n_of, n_tok, n_head_kv, d_head]
        d_q, d_k, d_v = t("Qcur_pre", il, d_q), t("Kcur_pre", il, d_k), t("Vcur", il, d_v)      # the same shapes
        d_q, d_k, d_v = map(flat, (d_q, d_k, d_v))                                  # [.., n_head(_kv) * d_head(_v)]
        d = product(d_q, blk.attn_q) + product(d_k, blk.attn_k) + product(d_v, blk.attn_v)      # [n_of, n_tok, n_embd]
        d_x = d_x + norm("norm", "attn_norm", il, d, blk.attn_norm)                 # [n_of, n_tok, n_embd]
    d_x = d_x if grow is None else t("inp_scaled", None, d_x) * grow                # [n_of, n_tok, n_embd]
    t("inp_embd", None, d_x)                                                        # [n_of, n_tok, n_embd]


# ------------------------------------------------------------------------------- the tape


class LayerMade(Exception):
    """An exception that ends `forward` when the layer that was to be run again is done."""


class Tape(Tap):
    """A tap that keeps what `backward` reads: values by name, and what the actions on them were given.

    In the first pass these are the residual stream between the layers, and what comes after the last one. `make` runs
    one layer again, and keeps all of it in place of the layer before.
    """

    def __init__(self, model: Model, actions: Any, tokens: Sequence[int], wanted: Sequence[str]):
        super().__init__(model, actions)
        self.tokens, self.n_tok, self.cache = np.asarray(tokens, np.intp), len(tokens), model.cache()
        self.order = {name: i for i, name in enumerate(model.table)}
        self.first = min(self.order[name] for name in wanted)   # no value before it in the table was asked for
        self.done = False                                       # whether that name has been reached
        self.found: dict[str, Any] = dict.fromkeys(wanted)      # gradients by name, [n_of, ...]
        self.n_row = self.n_tok                                 # rows of what comes after the last layer
        self.layer: int | None = None                           # the layer that was run again
        self.end = ""                                           # the last name of it that is needed
        self.values: dict[str, np.ndarray] = {}                 # as the actions left them
        self.notes: dict[str, list[tuple[Action, np.ndarray, Context]]] = {}    # each action that changed one, in order
        self.first_pass: Any = None                             # values and notes of the first pass

    def keeps(self, base: str, il: int | None) -> bool:
        """Return whether a value is kept: first the stream and what is in no layer, later all values of one layer."""
        return self.layer is not None or il is None or base == "l_out"

    def __call__(self, base: str, il: int | None, x: np.ndarray) -> np.ndarray:
        """The value to go on with, as in any pass."""
        if base == "l_out" and self.layer is not None:
            raise LayerMade
        x = super().__call__(base, il, x)
        if self.keeps(base, il):
            self.values[base if il is None else f"{base}-{il}"] = x
        if base == self.end:
            raise LayerMade
        return x

    def changed(self, action: Action, x: np.ndarray, ctx: Context) -> None:
        """Note what an action was given, where the value is kept."""
        if self.keeps(ctx.op.base, ctx.layer):
            self.notes.setdefault(ctx.name, []).append((action, x, ctx))

    def wants(self, il: int | None, *bases: str) -> bool:
        """Return whether attention is to go step by step: in the layer that is run again, also for a gradient."""
        asked = il is not None and il == self.layer and any(f"{base}-{il}" in self.found for base in bases)
        return asked or super().wants(il, *bases)

    def make(self, il: int) -> None:
        """Run layer il again from the residual stream before it, and keep its values.

        It ends before the product with ffn_down, unless something after that is needed: by a norm, or by an action.
        """
        post = self.model.weights.blk[il].post_ffw_norm is not None
        self.end = "" if post or self.wants(il, "ffn_out", "ffn_out_scaled") else "ffn_gate_par"
        self.first_pass = self.first_pass or (self.values, self.notes)
        self.values, self.notes = (dict(kept) for kept in self.first_pass)
        self.layer, self.cache.n = il, 0        # the keys and values of the first pass are written once more
        try:
            forward(self.model, self.tokens, self.cache, self, (il, self.values[stream(self.model.config, il)]))
        except LayerMade:
            pass

    def read(self, base: str, il: int | None) -> list[np.ndarray]:
        """The inputs of an operation, by its name in the table, as they were in the forward pass: [n_tok, ...] each."""
        c = self.model.config
        op = self.model.table[base if il is None else f"{base}-{il}"][0]
        if il is None:
            return [self.values[stream(c, c.n_layer) if i == "x" else i][-self.n_row :] for i in op.inputs]
        return [self.values[stream(c, il) if i == "x" else f"{i}-{il}"] for i in op.inputs]

    def cached(self, il: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys [n_head_kv, n_tok, d_head] and values [n_head_kv, d_head_v, n_tok] of a layer, out of the cache."""
        real = self.model.dtype
        return self.cache.k[il][:, : self.n_tok].astype(real), self.cache.v[il][:, :, : self.n_tok].astype(real)

    def back(self, base: str, il: int | None, d: np.ndarray) -> np.ndarray:
        """Note d, the gradient with respect to a named value, and take it back through the actions on that name."""
        name = base if il is None else f"{base}-{il}"
        if name in self.found:
            self.found[name] = d
        self.done = self.order[name] <= self.first
        if self.done:
            return d
        for action, x, ctx in reversed(self.notes.get(name, [])):
            d = action.vjp(d, x, ctx)
        return d


def gradients(
    model: Model, prompt: str | Sequence[int], of: Any, wrt: str | Sequence[str], actions: Any = (),
    keep: str | Sequence[str] = (),
) -> Gradients:
    """Compute what Model.gradients describes."""
    ids = model.ids(prompt)
    names = [name for pattern in given.names(wrt, "wrt") for name in match(pattern, model.table)]
    if not names:
        raise Error("wrt is empty: name the values that the gradient is with respect to, such as l_out-*")
    asked = metrics(of, model, ids)
    saves = [Save(name) for name in given.names(keep, "keep")]
    tape = Tape(model, [*listed(actions), *saves], ids, names)
    positions = [one.rows(len(ids)) for one in asked]
    after = [name for name in model.table if model.table[name][1] is None and not name.startswith("inp_")]
    last = all((rows == len(ids) - 1).all() for rows in positions) and not (
        tape.found.keys() & after or tape.wants(None, *after))
    logits = model._pass(ids, tape.cache, tape, "prompt", None, last)
    tape.finish(prompt, tokens=ids)
    run = Run(logits, ids, [*tape.records], prompt if isinstance(prompt, str) else model.detokenize(ids), model.table)

    values, d = [], np.zeros((len(asked), *logits.shape), logits.dtype)
    for one, rows, d_logits in zip(asked, positions, d):
        rows = rows - (len(ids) - len(logits))
        value, d_logits[rows] = one.measure(logits[rows], ids)
        values.append(finite(value, str(one)))
    tape.begin("prompt", np.arange(len(ids)))
    tape.n_row = len(logits)
    with np.errstate(all="ignore"):     # what is not a number is found below
        backward(model, d, tape)
    for name, found in tape.found.items():
        if not np.isfinite(found).all():
            raise Error(f"the gradient with respect to {name} is not finite: a weight, an action or `of` brought NaN "
                        "or infinity")
    many = isinstance(of, (list, tuple))
    arrays = {name: np.array(tape.found[name] if many else tape.found[name][0]) for name in model.table
              if name in tape.found}
    return Gradients(values if many else values[0], run, arrays, model.table)
