"""The Llama forward pass in float64 NumPy on dequantised weights: slow, short, and the judge of everything else.

    m = read("model.gguf"); t = forward(m, ids)            t["l_out-3"], t["result_output"], ...

`numerics="f32"` is the model's own function.  `numerics="ggml"` rounds activations where llama.cpp's CPU backend rounds
them (ggml-cpu/arch/x86/quants.c: quantize_row_q8_0, quantize_row_q8_1; ggml-cpu.c: vec_dot_type of every type) and
computes everything else in float64.  A rounding is a step: a difference of 1e-7 before it can be one quantum after it.
So `given` (another engine's tensors, by name) replaces each tensor once it is recorded: every op is then judged by
itself, on the other engine's own float32 inputs, and errors do not add up.
"""
from types import SimpleNamespace

import gguf
import numpy as np

Q8_0, Q8_1 = ("Q4_0", "Q5_0", "Q8_0"), ("Q4_1", "Q5_1")       # weight types and what activations become before them


def read(path):
    """Metadata (`.meta`), weights as float64 [n_out, n_in] (`.w`), their type names (`.type`) and bytes (`.raw`)."""
    r = gguf.GGUFReader(path)
    deq = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in r.tensors}
    return SimpleNamespace(meta={k: f.contents() for k, f in r.fields.items()}, w=deq,
                           type={t.name: t.tensor_type.name for t in r.tensors},
                           raw={t.name: t.data for t in r.tensors})


def half(x):
    return x.astype(np.float32).astype(np.float16).astype(np.float64)


def bfloat(x):
    """Round to BF16, ties to even (ggml-impl.h: ggml_compute_fp32_to_bf16)."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)


def blocks(x):
    """Quantise rows by blocks of 32 to 8 bits: integers [.., n/32, 32], float32 scales [.., n/32, 1]."""
    b = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(b).max(-1, keepdims=True)
    q = np.rint(b * np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax != 0))
    return q.astype(np.float64), amax / np.float32(127)


def linear(m, x, name, numerics="f32"):
    """x [.., n_in] times the weight [n_out, n_in], plus the bias where the file has one -> [.., n_out]."""
    w, kind = m.w[name + ".weight"], m.type[name + ".weight"]
    if numerics == "ggml" and kind in Q8_0 + Q8_1:
        q, d = blocks(x)
        y = (q * half(d)).reshape(x.shape) @ w.T
        if kind in Q8_1:    # min * sum(activations): the sum is stored as F16(d * sum(q)), beside the F16 scale
            size = 20 if kind == "Q4_1" else 24                                   # bytes a block: F16 d, F16 min, ...
            low = m.raw[name + ".weight"].reshape(len(w), -1, size)[..., 2:4].copy().view(np.float16)[..., 0]
            total = q.sum(-1)                                                     # [.., n_in/32]
            y = y + (half(total.astype(np.float32) * d[..., 0]) - total * half(d)[..., 0]) @ low.T.astype(np.float64)
    elif numerics == "ggml" and kind in ("F16", "BF16"):
        y = (half if kind == "F16" else bfloat)(x) @ w.T
    else:
        y = x @ w.T
    return y + m.w.get(name + ".bias", 0)


def rope(x, pos, n_rot, base, scale, factors, gain=1.0, n_ctx=None):
    """Rotate pairs (2i, 2i+1), i < n_rot/2, by pos / scale * base^(-2i/n_rot) / factors[i]; x [n_tok, .., d_head].

    With yarn (n_ctx, the context trained for): a pair that turns more than 32 times in n_ctx is not scaled, one that
    turns less than once wholly, and between them, counted in pairs, the share falls in a straight line; what comes out
    is longer by 1 + 0.1 ln(scale).  Source: Peng et al., YaRN (2023), sections 3.2 to 3.4; gain is llama.cpp's own.
    """
    angle = pos[:, None] * base ** (-np.arange(0, n_rot, 2) / n_rot) / factors                    # [n_tok, n_rot/2]
    share = 0.0
    if n_ctx:
        def pair(turns):  # the pair that turns so often in n_ctx positions: n_ctx / (2 pi base^(2i/n_rot)) = turns
            return n_rot * np.log(n_ctx / (turns * 2 * np.pi)) / (2 * np.log(base))

        low, high = max(0, np.floor(pair(32))), min(n_rot - 1, np.ceil(pair(1)))
        share = 1 - np.clip((np.arange(n_rot // 2) - low) / max(1e-3, high - low), 0, 1)
        gain = gain * (1 + 0.1 * np.log(max(1.0, scale)))
    angle = angle * share + angle / scale * (1 - share)
    c, s, out = gain * np.cos(angle)[:, None], gain * np.sin(angle)[:, None], x.copy()
    a, b = x[..., 0:n_rot:2], x[..., 1:n_rot:2]
    out[..., 0:n_rot:2], out[..., 1:n_rot:2] = a * c - b * s, a * s + b * c
    return out


def forward(m, ids, numerics="f32", given=None):
    """Every named tensor of a prompt, in the order of computation: {name: float64 array}."""
    key = lambda k, default=None: m.meta.get("llama." + k, default)  # noqa: E731
    n_head, n_embd = key("attention.head_count"), key("embedding_length")
    n_head_kv = key("attention.head_count_kv", n_head)
    d_head = key("attention.key_length", n_embd // n_head)
    d_head_v = key("attention.value_length", n_embd // n_head)
    eps, n_rot = key("attention.layer_norm_rms_epsilon"), key("rope.dimension_count", d_head)
    scaling = key("rope.scaling.type", "linear")
    scale = 1.0 if scaling == "none" else key("rope.scaling.factor", key("rope.scale_linear", 1.0))
    trained = key("rope.scaling.original_context_length", key("context_length")) if scaling == "yarn" else None
    rotate = (n_rot, key("rope.freq_base", 10000.0), scale, m.w.get("rope_freqs.weight", 1.0),
              key("rope.scaling.attn_factor", 1.0), trained)
    n, pos, stored = len(ids), np.arange(len(ids)), half if numerics == "ggml" else np.asarray  # stored: as cached
    heads = np.arange(n_head) // (n_head // n_head_kv)                          # the K/V head of each head
    out = {}

    def t(name, value):
        out[name] = value
        return value if given is None or name not in given else np.asarray(given[name], np.float64)

    def rms(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)

    def op(x, name):
        return linear(m, x, name, numerics)

    x = t("inp_embd", m.w["token_embd.weight"][ids])
    for i in range(key("block_count")):
        b = f"blk.{i}."
        y = t(f"attn_norm-{i}", t(f"norm-{i}", rms(x)) * m.w[b + "attn_norm.weight"])
        q = t(f"Qcur_pre-{i}", op(y, b + "attn_q").reshape(n, n_head, d_head))
        k = t(f"Kcur_pre-{i}", op(y, b + "attn_k").reshape(n, n_head_kv, d_head))
        v = t(f"Vcur-{i}", op(y, b + "attn_v").reshape(n, n_head_kv, d_head_v))
        q, k = t(f"Qcur-{i}", rope(q, pos, *rotate)), t(f"Kcur-{i}", rope(k, pos, *rotate))
        kq = t(f"kq-{i}", np.einsum("ihd,jhd->hij", stored(q), stored(k)[:, heads]))
        e = np.where(pos <= pos[:, None], kq / np.sqrt(d_head), -np.inf)
        e = np.exp(e - e.max(-1, keepdims=True))
        p = t(f"kq_soft_max-{i}", e / e.sum(-1, keepdims=True))
        y = t(f"kqv-{i}", np.einsum("hij,jhd->hid", stored(p), stored(v)[:, heads]))
        y = t(f"kqv_merged-{i}", y.transpose(1, 0, 2).reshape(n, n_head * d_head_v))
        x = t(f"ffn_inp-{i}", t(f"kqv_out-{i}", op(y, b + "attn_output")) + x)
        y = t(f"ffn_norm-{i}", t(f"norm_ffn-{i}", rms(x)) * m.w[b + "ffn_norm.weight"])
        gate, up = t(f"ffn_gate-{i}", op(y, b + "ffn_gate")), t(f"ffn_up-{i}", op(y, b + "ffn_up"))
        y = t(f"ffn_gate_par-{i}", t(f"ffn_silu-{i}", gate * np.exp(-np.logaddexp(0, -gate))) * up)
        x = t(f"l_out-{i}", t(f"ffn_out-{i}", op(y, b + "ffn_down")) + x)
    y = t("result_norm", t("norm", rms(x)) * m.w["output_norm.weight"])
    t("result_output", op(y, "output" if "output.weight" in m.w else "token_embd"))
    return out


def nmse(a, b):
    """sum (a-b)^2 / sum b^2, b the reference."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(((a - b) ** 2).sum() / max((b * b).sum(), 1e-300))
