"""tinymia: a language model like Llama, written in one file, in which every intermediate result has a name.

What a Llama computes. A text is cut into tokens, whole numbers that stand for words and parts of words. Each token
picks one row of a table, its embedding: a vector of n_embd numbers. From then on each token has one such vector, and
together they are the residual stream, an array [n_tok, n_embd]. The model has n_layer layers, and each one reads the
stream twice and adds something to it:

    attention       moves information between tokens. For each token a head makes a query, and compares it with the keys
                    of this token and those before it. The scores become weights that sum to 1, the attention pattern,
                    and the head adds up the tokens' values by these weights.
    feed-forward    changes each token by itself: a product with one matrix opens n_ff channels, another matrix writes
                    their sum back.

After the last layer, each vector of the stream is compared with a row for every word of the vocabulary. The results are
the logits: the larger the logit of a word, the higher its probability to come next. `forward` below computes all of
this, one operation per line.

What a named value is. Each line of `forward` begins with a name and ends with a shape. `l_out-3` is the residual stream
after layer 3, `kq_soft_max-7` is the attention pattern of layer 7; the names are llama.cpp's, and engine/names.py lists
all of them. `t(name, layer, value)` hands each value to the actions that asked for its name. An action can read the
value (Log, Save, or Lens, which shows what the model would say if it stopped here), or give another one to go on with
(Patch, Ablate, Add, ProjectOut, Scale, Replace).

What patching means. Run the model on a clean prompt, "The capital of France is", and keep its stream. Run it on a
corrupt prompt that differs in one thing, "The capital of Italy is", and in that run put one row of the clean stream in
place of its own: one token, after one layer. If the answer changes from Rome to Paris, then this row carried the
country. Repeat this for each layer and token, and you see where the model keeps the fact, and in which layer the fact
moves to the last token.

Where this comes from. In January 2024 the post "Task vectors & analogy making in LLMs" (https://grgv.xyz/blog) used a
program called mia, made from llama.cpp, to find such a row: saved from a prompt with examples of a task, it makes a
prompt without examples do the task. tinymia takes mia's commands as they stand.

Which models. Llama, and those that differ from it by a few parts: a norm more or less, queries that are scaled, layers
that see only the last positions. Such a part is there when its weight, or its number in the Config, is there: `forward`
has a line for it, which changes nothing in a model without it. files/architectures.py says which model has which.

Read on from top to bottom: the arithmetic in NumPy, the cache, `forward`, the tap, Model. tinymia_backward.py has
`forward` in reverse order: it computes by how much a number made from the logits changes with each named value. Around
these two files, kernels/ has the same arithmetic, fast and on quantised weights as they lie in the file; engine/ has
the names and the actions; files/ reads GGUF files, what they say of a model's shape, and vocabularies; lab/ has the
command line and experiments. Names of dimensions are ggml's: n_embd, n_head, n_head_kv (keys and values may have fewer
heads), d_head, n_ff, n_vocab, n_tok, n_kv (positions that a token may look at).
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinymia_engine import (
    NOT_HERE,
    Ablate,
    Action,
    Add,
    Context,
    Edit,
    Gradients,
    Lens,
    Linear,
    Log,
    Logit,
    LogitDifference,
    LogProb,
    Loss,
    Op,
    Patch,
    ProjectOut,
    Record,
    Replace,
    Sampler,
    Save,
    Scale,
    Weights,
    best,
    exact,
    files_read,
    given,
    listed,
    match,
    name_table,
    softmax,
)
from tinymia_files import (
    ActionError,
    Config,
    Error,
    GGUFError,
    Note,
    Rope,
    Tensor,
    Text,
    UnknownName,
    check_apart,
    check_target,
    expand,
    read_gguf,
    read_hparams,
    read_tokenizer,
    short,
    write_tensors,
)

__version__ = "0.1.0"
__all__ = [
    "Ablate", "Action", "ActionError", "Add", "Cache", "Config", "Context", "Edit", "Error", "GGUFError", "Generation",
    "Gradients", "Lens", "Log", "LogProb", "Logit", "LogitDifference", "Loss", "Model", "Note", "Op", "Patch",
    "ProjectOut", "Record", "Replace", "Run", "Save", "Scale", "Tensor", "UnknownName", "Weights", "files_read",
    "listed", "load", "main", "match", "name_table",
]


# ---------------------------------------------------------------------------------------- the arithmetic

# Everything that these models compute, as one would write it on a blackboard. numerics="plain" runs exactly these
# functions, in float32 or float64. kernels/ has the same functions with the same arguments, fast; a test compares them.


def embed(weight: Tensor, tokens: np.ndarray) -> np.ndarray:        # [n_vocab, n_embd], [n_tok] -> [n_tok, n_embd]
    """Look up the row of each token."""
    return weight.rows(tokens)


def rms_norm(x: np.ndarray, eps: float, dims: int = 1) -> np.ndarray:       # [n_tok, n_embd] -> the same
    """Divide each row by its root mean square: that of the last dimension, or of more of them together."""
    return x / np.sqrt(np.mean(x * x, axis=tuple(range(-dims, 0)), keepdims=True) + eps)


def linear(x: np.ndarray, layer: Linear) -> np.ndarray:             # [n_tok, n_in] -> [n_tok, n_out]
    """Multiply each row by a weight matrix, and add the bias where the model has one."""
    y = x @ layer.weight.numpy().T
    return y if layer.bias is None else y + layer.bias


def linears(x: np.ndarray, *layers: Linear) -> list[np.ndarray]:    # [n_tok, n_in] -> [n_tok, n_out] per layer
    """Several products of one x. The kernels then quantise x once for all of them."""
    return [linear(x, layer) for layer in layers]


def rope_angles(positions: np.ndarray, r: Rope, freqs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the angles by which RoPE turns, [n_tok, n_rot / 2] each."""
    pair = np.arange(r.n_rot // 2)
    theta = positions[:, None] * r.base ** (-2 * pair / r.n_rot)
    theta = theta if freqs is None else theta / freqs
    low, high = r.yarn or (-1, 0)
    ramp = np.clip((pair - low) / max(0.001, high - low), 0, 1)     # how much of the scaling a pair gets
    theta = theta * (1 - ramp) + theta * r.scale * ramp
    return r.gain * np.cos(theta), r.gain * np.sin(theta)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, halves: bool) -> np.ndarray:      # [n_tok, n_head, d_head]
    """Turn each pair of a head, (x[2i], x[2i + 1]) or (x[i], x[i + n_rot / 2]), by an angle that grows with the
    position."""
    y, n, cos, sin = x.copy(), cos.shape[1], cos[:, None], sin[:, None]
    first, second = (slice(n), slice(n, 2 * n)) if halves else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    a, b = x[..., first], x[..., second]
    y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
    return y


def put(keys: np.ndarray, values: np.ndarray, k: np.ndarray, v: np.ndarray, n: int) -> None:
    """Write k [n_tok, n_head_kv, d_head] and v [n_tok, n_head_kv, d_head_v] to the positions from n on of one layer."""
    keys[:, n : n + len(k)] = k.swapaxes(0, 1)         # a number too large for float16 becomes infinite, as in ggml
    values[:, :, n : n + len(v)] = v.transpose(1, 2, 0)


def scores(q: np.ndarray, keys: np.ndarray, n_kv: int) -> np.ndarray:       # [n_tok, n_head, d_head] ->
    """Dot products of every query with the first n_kv keys; n_head / n_head_kv query heads share one key head."""
    k = np.repeat(keys[:, :n_kv], q.shape[1] // len(keys), axis=0)          # [n_head, n_kv, d_head]
    return q.swapaxes(0, 1) @ k.swapaxes(1, 2)                              # [n_head, n_tok, n_kv]


def soft_cap(x: np.ndarray, cap: float) -> np.ndarray:                      # any shape -> the same
    """cap * tanh(x / cap): about x where it is small, never beyond the cap."""
    return cap * np.tanh(x / cap)


def soft_max(kq: np.ndarray, scale: float, positions: np.ndarray, window: int | None = None) -> np.ndarray:
    """Turn scores [n_head, n_tok, n_kv] into weights that sum to 1. No token sees the future, nor what lies before a
    window: their weights are 0."""
    ago = positions[:, None] - np.arange(kq.shape[2])                       # [n_tok, n_kv]: how long ago a key was
    unseen = (ago < 0) if window is None else (ago < 0) | (ago >= window)
    kq = np.where(unseen, -np.inf, kq * scale)
    e = np.exp(kq - kq.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def mix(pattern: np.ndarray, values: np.ndarray) -> np.ndarray:             # [n_head, n_tok, n_kv] ->
    """Add up the values, each times its weight in the attention pattern."""
    v = np.repeat(values[:, :, : pattern.shape[2]], len(pattern) // len(values), axis=0)    # [n_head, d_head_v, n_kv]
    return pattern @ v.swapaxes(1, 2)                                       # [n_head, n_tok, d_head_v]


def merge(kqv: np.ndarray) -> np.ndarray:                   # [n_head, n_tok, d_head_v] -> [n_tok, n_head * d_head_v]
    """Put the heads of each token side by side."""
    return kqv.swapaxes(0, 1).reshape(kqv.shape[1], -1)


def attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, positions: np.ndarray,
    window: int | None = None, cap: float | None = None,
) -> np.ndarray:
    """Scores, soft_cap, soft_max, mix, merge in one: [n_tok, n_head, d_head] -> [n_tok, n_head * d_head_v]."""
    kq = scores(q, keys, int(positions[-1]) + 1)
    return merge(mix(soft_max(kq if cap is None else soft_cap(kq, cap), scale, positions, window), values))


def silu(x: np.ndarray) -> np.ndarray:                              # [n_tok, n_ff] -> the same
    """x * sigmoid(x): about x where x is large, about 0 where it is very negative."""
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:                              # [n_tok, n_ff] -> the same
    """x times the share of a normal distribution that lies below x, nearly: the same idea with another curve."""
    return x / 2 * (1 + np.tanh(np.sqrt(x.dtype.type(2 / np.pi)) * (x + 0.044715 * x**3)))


def plain(dtype: np.dtype) -> SimpleNamespace:
    """The functions above as `forward` calls them, for numbers of a dtype."""
    these = SimpleNamespace(
        embed=lambda weight, tokens: embed(weight, tokens).astype(dtype), rms_norm=rms_norm, linear=linear,
        linears=linears, rope_angles=rope_angles, rope=rope, put=put, scores=scores, soft_cap=soft_cap,
        soft_max=soft_max, mix=mix, attention=attention, silu=silu, gelu=gelu, threads=1, done=lambda: None,
    )
    these.several = lambda: these
    return these


def fast(threads: int | None, numerics: str) -> Any:
    """The functions above as kernels, which numba compiles for this CPU."""
    from tinymia_kernels import Arithmetic

    return Arithmetic(threads, numerics)


NUMERICS = {"ggml": "as llama.cpp computes", "f32": "float32 throughout", "plain": "float32, the NumPy in tinymia.py"}


# ---------------------------------------------------------------------------------------- the cache


class Cache:
    """Keys and values of the positions seen so far, one pair of arrays per layer; it stores them and computes nothing.

    k[il] is [n_head_kv, capacity, d_head] and v[il] is [n_head_kv, d_head_v, capacity]: float16 with ggml's numerics,
    float32 or float64 otherwise. The capacity is a multiple of 16, doubles as needed, and unused places hold zeros.

    Here the tokens of a pass continue one sequence. A subclass may hold several continuations of one prompt as the rows
    of one pass (lab/measure/branches.py): it overrides `positions`, `last`, `store` and `ops`.
    """

    def __init__(self, c: Config, numerics: str, dtype: Any = np.float32):
        self.n = 0  # positions that hold something
        self.config, self.numerics = c, numerics
        dtype = np.float16 if numerics == "ggml" else dtype
        self.k = [np.zeros((c.n_head_kv, 0, c.d_head), dtype) for _ in range(c.n_layer)]
        self.v = [np.zeros((c.n_head_kv, c.d_head_v, 0), dtype) for _ in range(c.n_layer)]

    def reserve(self, n: int) -> None:
        """Make room for n positions in all."""
        if n > self.k[0].shape[1]:
            more = -(-max(n, 2 * self.k[0].shape[1]) // 64) * 64 - self.k[0].shape[1]
            self.k = [np.pad(k, ((0, 0), (0, more), (0, 0))) for k in self.k]
            self.v = [np.pad(v, ((0, 0), (0, 0), (0, more))) for v in self.v]

    def truncate(self, n: int) -> None:
        """Drop the positions n and later. Values become zeros, because kernels read 16 positions at a time."""
        self.n = n
        for v in self.v:
            v[:, :, n:] = 0

    def positions(self, n_tok: int) -> np.ndarray:
        """Sequence positions of the next n_tok tokens, intp [n_tok]."""
        return np.arange(self.n, self.n + n_tok)

    def last(self, x: np.ndarray) -> np.ndarray:
        """The last row of x [n_tok, ...]: the only one whose logits predict the next token."""
        return x[-1:]

    def store(self, il: int, k: np.ndarray, v: np.ndarray, ops: Any) -> None:
        """Keep the keys [n_tok, n_head_kv, d_head] and values [n_tok, n_head_kv, d_head_v] of a pass, by ops.put."""
        ops.put(self.k[il], self.v[il], k, v, self.n)

    def ops(self, ops: Any) -> Any:
        """The arithmetic that a pass over this cache uses: here `ops`, unchanged.

        A subclass whose rows do not all see the same keys replaces scores, soft_max, mix and attention here.
        """
        return ops


# ---------------------------------------------------------------------------------------- forward


Start = tuple[int, np.ndarray] | None   # (il, x): a pass begins at layer il on the residual x


def norms(t: Tap, o: Any, eps: float) -> Callable[..., np.ndarray]:
    """The function that norms x in a pass: its two steps have the names `base` and `name`."""
    def norm(base: str, name: str, il: int | None, x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        if weight is None:          # the model has no such norm: x stays as it is
            return x
        x = t(base, il, o.rms_norm(x, eps, weight.ndim))
        return t(name, il, x * weight)
    return norm


def scales(m: Model, positions: np.ndarray) -> tuple[Any, Any, Any]:
    """Factors of the queries by position, [n_tok, 1, 1], of all queries, and of the scores; None for those that a
    model does without."""
    c, heat = m.config, None
    if c.temperature is not None:
        heat = (np.log(positions // c.n_original + 1) * c.temperature + 1).astype(m.dtype)[:, None, None]
    return (heat, m.scale, 1.0) if c.scale_queries else (heat, None, m.scale)


def forward(m: Model, tokens: np.ndarray, cache: Cache, t: Tap, start: Start = None, last: bool = False) -> np.ndarray:
    """Logits of n_tok tokens that follow what the cache holds; float32 [n_tok, n_vocab], [1, n_vocab] with `last`.

    t(name, layer, value) names a value and gives the one to go on with. start = (il, x) begins at layer il on a given
    residual x [n_tok, n_embd] (the cache then gets keys and values of the layers from il on only).
    """
    c, w, o, n_tok = m.config, m.weights, cache.ops(m.ops), len(tokens)     # o: the functions above or kernels/'s
    norm, act, open_gate = norms(t, o, c.eps), f"ffn_{c.act}", getattr(o, c.act)
    positions = cache.positions(n_tok)                                              # [n_tok]
    cache.reserve(n_kv := int(positions[-1]) + 1)
    turns = [(*o.rope_angles(positions, r, w.rope_freqs), r.halves) for r in c.ropes]           # [n_tok, n_rot / 2]
    heat, q_scale, kq_scale = scales(m, positions)
    grow, factor, cap = c.embedding_scale, c.residual_scale, c.attn_soft_cap        # None where the model has none
    first, x = start or (0, t("inp_embd", None, o.embed(w.token_embd, tokens)))     # [n_tok, n_embd]
    x = x if grow is None or start else t("inp_scaled", None, x * grow)             # [n_tok, n_embd]
    for il in range(first, c.n_layer):
        blk, layer = w.blk[il], c.layers[il]

        cur = norm("norm", "attn_norm", il, x, blk.attn_norm)                       # [n_tok, n_embd]
        q, k, v = o.linears(cur, blk.attn_q, blk.attn_k, blk.attn_v)                # [n_tok, n_head(_kv) * d_head(_v)]
        q = t("Qcur_pre", il, q.reshape(n_tok, c.n_head, c.d_head))                 # [n_tok, n_head, d_head]
        k = t("Kcur_pre", il, k.reshape(n_tok, c.n_head_kv, c.d_head))              # [n_tok, n_head_kv, d_head]
        v = t("Vcur", il, v.reshape(n_tok, c.n_head_kv, c.d_head_v))                # [n_tok, n_head_kv, d_head_v]
        q = norm("norm_q", "Qcur_normed", il, q, blk.attn_q_norm)                   # [n_tok, n_head, d_head]
        k = norm("norm_k", "Kcur_normed", il, k, blk.attn_k_norm)                   # [n_tok, n_head_kv, d_head]
        if layer.rope is not None:
            q = t("Qcur", il, o.rope(q, *turns[layer.rope]))                        # [n_tok, n_head, d_head]
            k = t("Kcur", il, o.rope(k, *turns[layer.rope]))                        # [n_tok, n_head_kv, d_head]
        q = q if heat is None else t("Qcur_attn_temp_scaled", il, q * heat)         # [n_tok, n_head, d_head]
        q = q if q_scale is None else t("Qcur_scaled", il, q * q_scale)             # [n_tok, n_head, d_head]
        cache.store(il, k, v, o)
        if t.wants(il, "kq", "kq_scaled_2", "kq_soft_max", "kqv"):  # step by step, so that each step has its name
            kq = t("kq", il, o.scores(q, cache.k[il], n_kv))                        # [n_head, n_tok, n_kv]
            kq = kq if cap is None else t("kq_scaled_2", il, o.soft_cap(kq, cap))   # [n_head, n_tok, n_kv]
            pattern = t("kq_soft_max", il, o.soft_max(kq, kq_scale, positions, layer.window))   # [n_head, n_tok, n_kv]
            cur = merge(t("kqv", il, o.mix(pattern, cache.v[il])))                  # [n_tok, n_head * d_head_v]
        else:       # no action needs the steps: the same numbers, without an array that grows with n_tok * n_kv
            cur = o.attention(q, cache.k[il], cache.v[il], kq_scale, positions, layer.window, cap)
        cur = t("kqv_merged", il, cur)                                              # [n_tok, n_head * d_head_v]
        cur = t("kqv_out", il, o.linear(cur, blk.attn_output))                      # [n_tok, n_embd]
        cur = cur if factor is None else t("kqv_out_scaled", il, cur * factor)      # [n_tok, n_embd]
        cur = norm("norm_attn_post", "attn_post_norm", il, cur, blk.post_attention_norm)        # [n_tok, n_embd]
        x = t("ffn_inp", il, cur + x)                                               # [n_tok, n_embd]

        cur = norm("norm_ffn", "ffn_norm", il, x, blk.ffn_norm)                     # [n_tok, n_embd]
        gate, up = o.linears(cur, blk.ffn_gate, blk.ffn_up)                         # [n_tok, n_ff]
        gate, up = t("ffn_gate", il, gate), t("ffn_up", il, up)                     # [n_tok, n_ff]
        gate = t(act, il, open_gate(gate))                                          # [n_tok, n_ff]
        cur = t("ffn_gate_par", il, gate * up)                                      # [n_tok, n_ff]
        cur = t("ffn_out", il, o.linear(cur, blk.ffn_down))                         # [n_tok, n_embd]
        cur = cur if factor is None else t("ffn_out_scaled", il, cur * factor)      # [n_tok, n_embd]
        cur = norm("norm_ffn_post", "ffn_post_norm", il, cur, blk.post_ffw_norm)    # [n_tok, n_embd]
        x = t("l_out", il, cur + x)                                                 # [n_tok, n_embd]
    cache.n = n_kv
    if last:        # from here on, only the rows that predict a next token
        x, t.positions = cache.last(x), cache.last(positions)                       # [1, n_embd]
    cur = norm("norm", "result_norm", None, x, w.output_norm)                       # [n_tok, n_embd]
    cur = t(c.product, None, o.linear(cur, w.output))                               # [n_tok, n_vocab]
    cur = cur if c.logit_scale is None else t("result_output", None, cur * c.logit_scale)       # [n_tok, n_vocab]
    return cur if c.logit_soft_cap is None else t("result_output", None, o.soft_cap(cur, c.logit_soft_cap))


# ---------------------------------------------------------------------------------------- the tap


class Tap:
    """The `t` of forward: it gives each named tensor to the actions on its name, and notes which actions have fired."""

    def __init__(self, model: Model, actions: Any, on_record: Callable[[Record], None] | None = None):
        self.model, self.actions, self.on_record = model, listed(actions), on_record
        self.records: list[Record] = []
        self.fired = [False] * len(self.actions)
        self.phase, self.positions = "prompt", np.arange(0)
        self.seen: dict[str, set[int]] = {"prompt": set(), "decode": set()}  # positions of the passes so far
        self.by_name: dict[tuple[str, int | None], list[tuple[int, Action]]] = {}
        files: dict[str | Path, list[str]] = {}
        for i, action in enumerate(self.actions):
            if action.when not in ("prompt", "decode", "all"):
                raise ActionError(f"{action}: when must be prompt, decode or all")
            for name in match(action.name, model.table):
                op, il = model.table[name]
                self.by_name.setdefault((op.base, il), []).append((i, action.bind(name, op, model)))
                if isinstance(action, Save) and action.path is not None:
                    files.setdefault(action.path, []).append(name)
        inputs = [path for action in self.actions for path in files_read(action)]
        for path, names in files.items():
            check_target(path, names, inputs)
        check_apart(list(files))

    def begin(self, phase: str, positions: np.ndarray) -> None:
        """Prepare for a pass: its phase, and the positions of its rows, intp [n_tok]."""
        self.phase, self.positions = phase, positions
        self.seen[phase].update(positions.tolist())

    def wants(self, il: int | None, *bases: str) -> bool:
        """Return whether an action of this phase is on one of these names in layer il."""
        return bool(self.by_name) and any(
            a.when in ("all", self.phase) for base in bases for _, a in self.by_name.get((base, il), ())
        )

    def __call__(self, base: str, il: int | None, x: np.ndarray) -> np.ndarray:
        """The value to go on with: x itself unless an action changes it."""
        if not self.by_name:    # most passes have no actions, and even a small model calls this 100 times per token
            return x
        for i, action in self.by_name.get((base, il), ()):
            if action.when in ("all", self.phase):
                name = base if il is None else f"{base}-{il}"
                op = self.model.table[name][0]
                keep = partial(self._keep, action)
                ctx = Context(name, il, self.positions, self.phase, op, self.model, keep)
                with np.errstate(all="ignore"):  # NaN and infinity show in the logits, and are reported there
                    y = action.apply(x, ctx)
                if y is NOT_HERE:
                    continue
                self.fired[i] = True
                if y is not x:
                    if np.shape(y) != x.shape:
                        raise ActionError(f"{action} gave {name} the shape {list(np.shape(y))}, not {list(x.shape)}")
                    self.changed(action, x, ctx)
                    x = np.ascontiguousarray(y, x.dtype)
        return x

    def changed(self, action: Action, x: np.ndarray, ctx: Context) -> None:
        """Take note that an action has changed x; nothing to note here, but for the backward pass."""

    def _keep(self, action: Action, ctx: Context, value: Any) -> None:
        self.records.append(Record(action, ctx.name, ctx.layer, ctx.positions, ctx.phase, value))
        if self.on_record:
            self.on_record(self.records[-1])

    def finish(self, prompt: str | Sequence[int], **about: Any) -> None:
        """Write the files of Save after the run. Raises ActionError for an action that never fired."""
        files: dict[str | Path, dict[str, dict[int, np.ndarray]]] = {}  # path, name, first position
        for r in self.records:
            if isinstance(r.action, Save) and r.action.path is not None:
                files.setdefault(r.action.path, {}).setdefault(r.name, {})[int(r.positions[0])] = r.value
        for path, tensors in files.items():
            joined = {name: self._join(name, list(passes.values())) for name, passes in tensors.items()}
            write_tensors(path, joined, {"model": self.model.about, "prompt": self.model.text(prompt), **about})
        for action, fired in zip(self.actions, self.fired):
            if not fired:
                kind = type(action).__name__
                raise ActionError(f"{kind} of {action.name} (when={action.when}) never fired: no such pass or position")
            if isinstance(action, Edit) and action.at is not None and action.when != "prompt":
                seen = self.seen["decode"].union(self.seen["prompt"] if action.when == "all" else ())
                lost = given.never_came(action.at, seen)
                if lost:
                    warnings.warn(f"{action}: positions {lost} never came: the last one was {max(seen)}", Note, 3)

    def _join(self, name: str, passes: list[np.ndarray]) -> np.ndarray:
        """Join the values of several passes along the token axis."""
        op = self.model.table[name][0]
        if len(passes) > 1 and "n_kv" in op.dims:
            raise ActionError(f"{name} grows with each token: save it with when=prompt")
        return np.concatenate(passes, op.dims.index("n_tok"))


# ---------------------------------------------------------------------------------------- Model


@dataclass(repr=False)
class Run:
    """The result of a pass over a prompt."""

    logits: np.ndarray              # float32 [n_tok, n_vocab], [1, n_vocab] for logits="last"
    tokens: list[int]
    records: list[Record]           # what the actions kept, in the order of computation
    text: str = ""                  # the text of the prompt
    table: Mapping[str, Any] = field(default_factory=dict)      # the model's names

    @property
    def names(self) -> list[str]:
        """Exact names of the tensors that were kept."""
        return list(dict.fromkeys(r.name for r in self.records if isinstance(r.action, Save)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> np.ndarray:
        """The copy of a tensor that keep= or Save made, float32, of the shape in the table of names."""
        meant = exact(name, self.table or dict.fromkeys(self.names))
        found = [r.value for r in self.records if isinstance(r.action, Save) and r.name == meant]
        if not found:
            kept = f"; kept: {', '.join(self.names[:9])}{', ...' * (len(self.names) > 9)}" if self.names else ""
            raise UnknownName(f"{name!r} was not kept: ask with keep=[{name!r}]{kept}")
        return found[-1]

    def __repr__(self) -> str:
        kept = f", kept {self.names[0]}{' ...' * (len(self.names) > 1)}" if self.names else ""
        return f"Run({short(self.text)}, {len(self.tokens)} tokens{kept})"


@dataclass
class Generation:
    """A text that a model generated, with its tokens."""

    text: str                   # new text only
    tokens: list[int]           # new ids, an end token included
    prompt_tokens: list[int]
    stop_reason: str            # "eos", "stop" (a stop text), "length" (n reached), "context" (full), "interrupted"
    records: list[Record] = field(repr=False)
    seconds: tuple[float, float]    # of the prompt pass, of decoding


class Model:
    """A loaded model. Weights stay in the mapped file; several models may run in several threads."""

    def __init__(
        self, path: str | Path, threads: int | None = None, numerics: str = "ggml", dtype: str = "float32",
        n_ctx: int | None = None,
    ):
        if numerics not in NUMERICS:
            kinds = ", ".join(f"{name} ({what})" for name, what in NUMERICS.items())
            raise Error(f"numerics {numerics!r}: it must be one of {kinds}")
        if dtype != "float32" and not (numerics == "plain" and dtype == "float64"):
            raise Error(f"dtype {dtype!r}: it must be float32 or, with numerics plain, float64")
        if threads is not None and not 1 <= given.whole(threads, "threads") <= 1024:
            raise Error(f"{threads} threads: it must be 1 to 1024")
        n_ctx = None if n_ctx is None else given.whole(n_ctx, "n_ctx")
        self.path, self.numerics = expand(path), numerics
        meta, tensors = read_gguf(self.path)
        self.config = read_hparams(meta, tensors, self.path, n_ctx)
        self.weights = Weights(tensors, self.config, self.path, decode=numerics != "plain")
        self.files = tensors.files
        self.tokenizer = read_tokenizer(meta, self.path)
        self.template = meta.get("tokenizer.chat_template")
        self.dtype = np.dtype(dtype)
        self.scale = self.config.scale(self.dtype)
        self.ops: Any = plain(self.dtype) if numerics == "plain" else fast(threads, numerics)
        self.threads = self.ops.threads
        self.table = name_table(self.config)
        self.n_ids = max(self.config.n_vocab, len(self.tokenizer.pieces))
        self.about = {k: getattr(self.config, k) for k in ("name", "n_embd", "n_layer", "n_head", "n_vocab")}

    def names(self) -> list[str]:
        """Every exact name, in the order of computation."""
        return list(self.table)

    def __repr__(self) -> str:
        c, kinds = self.config, Counter[str]()
        for w in self.weights.values():
            kinds[w.type_name] += w.nbytes
        return (f"Model({c.name}: {c.n_layer} layers of {c.n_head} heads, {c.n_embd} wide, {c.n_vocab:,} tokens, "
                f"{kinds.most_common(1)[0][0]}, numerics {self.numerics})")

    def tokenize(self, text: str, bos: bool | None = None, special: bool = True) -> list[int]:
        """The ids of a text. BOS comes first if `bos`, or else the file, says so; `special` recognises <s> etc.

        A text that already begins with BOS gets another one, as in llama.cpp, and a Note.
        """
        t = self.tokenizer
        ids = t.encode(text, bos, special)
        if (t.add_bos if bos is None else bos) and ids[:2] == [t.bos, t.bos]:
            warnings.warn(f"the text begins with {self.piece(ids[0])}, and gets another one before it; bos=False "
                          "(--no-bos) adds none", Note, stacklevel=2)
        return ids

    def chat(self, messages: str | Sequence[Mapping[str, str]], system: str | None = None) -> list[int]:
        """The ids of a chat, ready for the assistant's answer, in the format of the template in the file.

        messages: the user's text, or [{"role": "user", "content": text}, {"role": "assistant", ...}, ...]; system: a
        system message in front. Only the template can write special tokens. Raises Error.
        """
        from tinymia_files.chat import format_chat

        return format_chat(self.template, self.tokenizer, messages, system).ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids, without the space that tokenize puts before the first word. Raises Error."""
        return self.tokenizer.decode(given.token_ids(ids, self.n_ids))

    def text(self, prompt: str | Sequence[int]) -> str:
        """The text of a prompt; for ids, if possible, a text that is cut into the same ids again."""
        return prompt if isinstance(prompt, str) else self.tokenizer.text(given.token_ids(prompt, self.n_ids))

    def piece(self, i: int) -> str:
        """One token as people read it. Raises Error for an unknown id."""
        return self.tokenizer.piece(given.token_ids([i], self.n_ids)[0])

    def rows(self, weight: Tensor, ids: np.ndarray) -> np.ndarray:
        """Dequantised rows of a matrix, [len(ids), n_in]."""
        return self.ops.embed(weight, ids)

    def linear(self, x: np.ndarray, layer: Linear) -> np.ndarray:
        """x W^T + b as this model's numerics compute it: [n_tok, n_in] -> [n_tok, n_out]."""
        return self.ops.linear(x, layer)

    def cache(self) -> Cache:
        """An empty cache of this model's shape."""
        return Cache(self.config, self.numerics, self.dtype)

    @given.known_arguments
    def run(
        self,
        prompt: str | Sequence[int],
        keep: str | Sequence[str] = (),
        actions: Action | Sequence[Action] = (),
        logits: str = "all",
        cache: Cache | None = None,
        start: Start = None,
        on_record: Callable[[Record], None] | None = None,
    ) -> Run:
        """Run one pass over a prompt, text or ids, after what `cache` holds.

        If the cache is not empty, a text continues what it holds: it gets no BOS, and no space before it.
        keep: names whose tensors, as the actions left them, are copied into the run. logits: "all", or "last" row only
        (then norm, result_norm and result_output have one row). start = (il, x) begins at layer il on the residual x
        [n_tok, n_embd]. Raises Error for a prompt that does not fit, and for logits that are NaN or infinite.
        """
        if logits not in ("all", "last"):
            raise Error(f"logits={logits!r}: it must be all or last")
        if cache is not None and not isinstance(cache, Cache):
            raise Error(f"cache is {short(cache)}; it must be what Model.cache() gives")
        cache = self.cache() if cache is None else cache
        ids = self.ids(prompt, follows=cache.n > 0)
        tap = Tap(self, [*listed(actions), *map(Save, given.names(keep, "keep"))], on_record)
        if start is not None:
            start = given.residual(start, self.config.n_layer, (len(ids), self.config.n_embd), self.dtype)
        out = self._pass(ids, cache, tap, "prompt", start, logits == "last")
        tap.finish(prompt, tokens=ids)
        text = prompt if isinstance(prompt, str) else self.detokenize(ids)
        return Run(out, ids, tap.records, text, self.table)

    def generate(
        self,
        prompt: str | Sequence[int],
        n: int = 32,
        actions: Action | Sequence[Action] = (),
        *,
        stop: str | Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        on_record: Callable[[Record], None] | None = None,
        bos: bool | None = None,
        special: bool = True,
        **sampling: Any,
    ) -> Generation:
        """Continue a prompt, text or ids, by up to n tokens: greedily, or as Sampler's fields say (temp=0.8, ...).

        Ends at an end-of-text token, at a `stop` text (which is not part of the result) or control token ("</s>"), when
        the context is full, or at Ctrl-C. on_text gets the text piece by piece, whole characters only.
        """
        known = "prompt n actions stop on_text on_record bos special".split()
        given.check_arguments("generate", sampling, [*known, *(f.name for f in fields(Sampler))])
        if given.whole(n, "n") < 0:
            raise Error(f"n is {n}: it must be 0 or more")
        texts, ends = self.tokenizer.stops(stop)
        try:
            sampler = Sampler(**sampling)
        except ValueError as e:
            raise Error(str(e)) from e
        ids, clock = self.ids(prompt, bos, special), time.perf_counter()
        tap, cache, out = Tap(self, actions, on_record), self.cache(), Text(texts, on_text)
        seen, new = [*ids], list[int]()
        reason, prompt_seconds = "length", 0.0
        try:
            last = not tap.wants(None, "norm", "result_norm", "result_output")
            rows = self._pass(ids, cache, tap, "prompt", None, last)
            prompt_seconds = time.perf_counter() - clock
            while len(new) < n:
                new.append(sampler.sample(rows[-1], seen))
                seen.append(new[-1])
                if new[-1] in self.tokenizer.end:
                    reason = "eos"
                    break
                if new[-1] in ends or out.add(self.tokenizer.bytes(new[-1])):
                    reason = "stop"
                    break
                if len(new) < n and cache.n == self.config.n_ctx:
                    reason = "context"
                    break
                if len(new) < n:
                    rows = self._pass(new[-1:], cache, tap, "decode", None, True)
        except KeyboardInterrupt:
            reason = "interrupted"
        text, seconds = out.close(), (prompt_seconds, time.perf_counter() - clock - prompt_seconds)
        tap.finish(prompt, tokens=seen, output=text)
        return Generation(text, new, ids, reason, tap.records, seconds)

    def gradients(
        self,
        prompt: str | Sequence[int],
        of: Any,
        wrt: str | Sequence[str],
        actions: Action | Sequence[Action] = (),
        keep: str | Sequence[str] = (),
    ) -> Gradients:
        """Differentiate a number made from the logits of a prompt with respect to named values.

        of: Logit(token), LogitDifference(a, b), LogProb(token), each at the last position unless at= says otherwise;
        Loss(); a function from logits [n_tok, n_vocab] to (value, d value / d logits); or a list of these, which share
        the forward pass and go back together. wrt: names; the gradient is with respect to what the actions left.
        Gradients go through the actions. keep: as in `run`; the pass is `run` of the result. Raises Error.
        """
        from tinymia_backward import gradients

        return gradients(self, prompt, of, wrt, actions, keep)

    def lens(self, x: np.ndarray, k: int = 5, score: str = "raw") -> list[list[tuple[str, float]]]:
        """Apply the logit lens: for each row of x [n_tok, n_embd] its k best (piece, score), best first; none for NaN.

        "raw" is (x * norm weight) W^T, as the post's program printed; "logit" divides by the RMS first and adds the
        output's bias, scales and caps, where a model does so; "prob" is the softmax of that. In exact arithmetic and
        without a bias all three have the same order. With numerics="ggml" the rows are rounded for the product, x and
        x / rms(x) not to the same values: there raw and logit may order tokens of nearly equal scores differently.
        Source: nostalgebraist, interpreting GPT: the logit lens (2020).
        """
        x = np.ascontiguousarray(np.atleast_2d(x), np.float32)
        if x.ndim != 2 or x.shape[1] != self.config.n_embd:
            raise Error(f"the lens takes rows of n_embd = {self.config.n_embd} numbers, not {list(x.shape)}")
        if score not in ("raw", "logit", "prob"):
            raise Error(f"lens score {score!r}: it must be raw, logit or prob")
        k = min(given.whole(k, "k"), self.config.n_vocab)
        if k < 1:
            raise Error(f"the lens shows {k} tokens per row: it must be at least 1")
        normed = x if score == "raw" else self.ops.rms_norm(x, self.config.eps)
        scores = self.unembed(normed, raw=score == "raw")
        if score == "prob":
            scores = softmax(scores)
        rows = zip(scores, best(scores, k), np.isnan(scores).any(1))
        return [[] if nan else [(self.piece(int(i)), float(row[i])) for i in ids] for row, ids, nan in rows]

    def unembed(self, x: np.ndarray, raw: bool = False) -> np.ndarray:
        """Logits of rows that are divided by their RMS, [n_row, n_embd] -> [n_row, n_vocab]; with `raw` only what the
        output matrix makes of x times the norm's weight, without a bias, a scale or a soft cap."""
        c, output = self.config, self.weights.output
        scores = self.linear(x * self.weights.output_norm, output._replace(bias=None) if raw else output)
        scores = scores if raw or c.logit_scale is None else scores * c.logit_scale
        return scores if raw or c.logit_soft_cap is None else self.ops.soft_cap(scores, c.logit_soft_cap)

    def ids(
        self, prompt: str | Sequence[int], bos: bool | None = None, special: bool = True, follows: bool = False
    ) -> list[int]:
        """The ids of a prompt, checked; a text that `follows` another one gets no BOS and no space. Raises Error."""
        if isinstance(prompt, str) and follows:
            prompt = self.tokenizer.encode(prompt, False, special, follows)
        elif isinstance(prompt, str):
            prompt = self.tokenize(prompt, bos, special)
        ids = given.token_ids(prompt, self.config.n_vocab)
        if not ids:
            raise Error("the prompt has no tokens: give some text, or let BOS stand for an empty one")
        return ids

    def _pass(
        self, ids: Sequence[int], cache: Cache, tap: Tap, phase: str, start: Start, last: bool
    ) -> np.ndarray:
        positions = cache.positions(len(ids))
        if positions[-1] >= self.config.n_ctx:
            before = f" after {cache.n} in the cache" if cache.n else ""
            raise Error(f"the prompt has {len(ids)} tokens{before}; the context has room for {self.config.n_ctx}")
        if (cache.config, cache.numerics) != (self.config, self.numerics):
            raise Error("this cache was made by another model, or for other numerics")
        tap.begin(phase, positions)
        n = cache.n
        try:
            with np.errstate(all="ignore"):  # exp of silu may overflow, rightly; what is not a number is found below
                logits = forward(self, np.asarray(ids, np.intp), cache, tap, start, last)
            self.ops.done()
            if not np.isfinite(logits.max(axis=1)).all():
                raise Error("the logits are not finite: a weight or an action brought NaN or infinity (see --log all)")
            return logits
        except BaseException:
            cache.truncate(n)
            raise


@given.known_arguments
def load(
    path: str | Path | None = None, threads: int | None = None, numerics: str = "ggml", dtype: str = "float32",
    n_ctx: int | None = None,
) -> Model:
    """Map a GGUF file, by its path or a name such as "smollm2" (tinymia_models.stores), by default the bundled one, and
    check it; threads: by default one per physical core. Raises Error.

    numerics: "ggml" rounds as llama.cpp does, "f32" keeps float32 throughout, "plain" runs the arithmetic of this file
    in NumPy, in float32 or, with dtype="float64", in float64. n_ctx: the positions that a run may have, at most those
    that the model was trained for. A file that has other RoPE factors for long contexts (phi3) is run with those for
    short ones, and its context is as short, unless n_ctx asks for more.
    """
    from tinymia_models import DEFAULT
    from tinymia_models.stores import find

    return Model(find(DEFAULT if path is None else path), threads, numerics, dtype, n_ctx)


# ---------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `tinymia`, whose flags and output are in lab/cli.py. Returns the exit status."""
    from tinymia_lab.cli import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
