"""The forward pass in float64 NumPy on dequantised weights: slow, short, and the judge of everything else.

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


def rope(x, pos, n_rot, base, scale, factors, gain=1.0, n_ctx=None, halves=False, betas=(32, 1), longer=0.0):
    """Rotate pairs (2i, 2i+1), i < n_rot/2, by pos / scale * base^(-2i/n_rot) / factors[i]; x [n_tok, .., d_head].

    With halves, pairs are (i, i + n_rot/2).
    With yarn (n_ctx, the context trained for): a pair that turns more than 32 times in n_ctx is not scaled, one that
    turns less than once wholly, and between them, counted in pairs, the share falls in a straight line; what comes out
    is longer by 1 + 0.1 ln(scale), and with `longer` shorter again by 1 + 0.1 longer ln(scale).
    Source: Peng et al., YaRN (2023), sections 3.2 to 3.4; gain is llama.cpp's own.
    """
    angle = pos[:, None] * base ** (-np.arange(0, n_rot, 2) / n_rot) / factors                    # [n_tok, n_rot/2]
    share = 0.0
    if n_ctx:
        def pair(turns):  # the pair that turns so often in n_ctx positions: n_ctx / (2 pi base^(2i/n_rot)) = turns
            return n_rot * np.log(n_ctx / (turns * 2 * np.pi)) / (2 * np.log(base))

        low, high = max(0, np.floor(pair(betas[0]))), min(n_rot - 1, np.ceil(pair(betas[1])))
        share = 1 - np.clip((np.arange(n_rot // 2) - low) / max(1e-3, high - low), 0, 1)
        gain = gain * (1 + 0.1 * np.log(max(1.0, scale))) / (1 + 0.1 * longer * np.log(max(1.0, scale)))
    angle = angle * share + angle / scale * (1 - share)
    c, s, out = gain * np.cos(angle)[:, None], gain * np.sin(angle)[:, None], x.copy()
    first, second = (slice(n_rot // 2), slice(n_rot // 2, n_rot)) if halves else (slice(0, n_rot, 2),
                                                                                 slice(1, n_rot, 2))
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * c - b * s, a * s + b * c
    return out


# What the architectures have that neither weights nor metadata say. Source: llama.cpp's src/models, the papers.
HALVES = ("qwen2", "qwen3", "olmo2", "phi3", "gemma2", "gemma3")            # how RoPE pairs numbers: as GPT-NeoX
SCALE_QUERIES = ("phi3", "gemma2", "gemma3")                                # before the product, not after it
WINDOWS = {"olmo2": (None, 4), "gemma2": (4096, 2), "gemma3": (None, 6)}    # size, and every which layer has none
CAPS = {"gemma2": (50.0, 30.0), "gemma3": (0.0, 0.0)}                       # of scores and of logits
WIDE = {"gemma2": 46, "gemma3": 62}     # models of so many layers divide scores by the root of n_embd / n_head


def positions(arch, key, w, n_rot, n_ctx):
    """(how to turn layer i, or None; how many positions it sees): two functions of i."""
    scaling, base = key("rope.scaling.type", "linear"), key("rope.freq_base", 10000.0)
    given = key("rope.scaling.factor", key("rope.scale_linear", 1.0))
    scale = 1.0 if scaling == "none" else given
    original = key("rope.scaling.original_context_length", key("context_length"))
    factors = w.get("rope_freqs.weight", 1.0) if arch in ("llama", "granite", "mistral3") else 1.0
    if arch == "phi3":
        factors = w.get(f"rope_factors_{'long' if (n_ctx or 0) > original else 'short'}.weight", 1.0)
    full = dict(n_rot=n_rot, base=base, scale=scale, factors=factors, gain=key("rope.scaling.attn_factor", 1.0),
                n_ctx=original if scaling == "yarn" else None, halves=arch in HALVES)
    if arch == "mistral3":
        full |= dict(betas=(key("rope.scaling.yarn_beta_fast", 32), key("rope.scaling.yarn_beta_slow", 1)),
                     longer=key("rope.scaling.yarn_log_multiplier", 0.0))
    near = full | {"olmo2": dict(scale=1.0, gain=1.0, n_ctx=None), "gemma2": dict(
        base=key("rope.freq_base_swa", base)), "gemma3": dict(
        base=key("rope.freq_base_swa", 10000.0), scale=1.0)}.get(arch, {})
    size, every = WINDOWS.get(arch, (None, 1))
    size = key("attention.sliding_window", size) if arch in WINDOWS else None
    pattern = key("attention.sliding_window_pattern", every)

    def window(i):
        if not size:
            return None
        seen = pattern[i] if isinstance(pattern, list) else pattern == 0 or i % pattern < pattern - 1
        return size if seen else None

    def turn(i):
        if (arch == "smollm3" and i % 4 == 3) or (arch == "granite" and not key("rope.scaling.finetuned", True)):
            return None
        return near if window(i) else full

    return turn, window


def forward(m, ids, numerics="f32", given=None, n_ctx=None):
    """Every named tensor of a prompt, in the order of computation: {name: float64 array}."""
    arch = m.meta["general.architecture"]
    key = lambda k, default=None: m.meta.get(f"{arch}.{k}", default)  # noqa: E731
    n_head, n_embd = key("attention.head_count"), key("embedding_length")
    n_head_kv = key("attention.head_count_kv", n_head)
    d_head = key("attention.key_length", n_embd // n_head)
    d_head_v = key("attention.value_length", n_embd // n_head)
    eps, n_rot = key("attention.layer_norm_rms_epsilon"), key("rope.dimension_count", d_head)
    turn, window = positions(arch, key, m.w, n_rot, n_ctx)
    gemma, granite = arch.startswith("gemma"), arch == "granite"
    scale = 1 / np.sqrt(n_embd // n_head if key("block_count") == WIDE.get(arch) else d_head)
    scale = key("attention.scale", scale) if granite else scale
    residual = key("residual_scale", 1.0) if granite else 1.0
    caps = CAPS.get(arch, (0.0, 0.0))
    score_cap = key("attn_logit_softcapping", caps[0]) if arch == "gemma2" else 0.0
    logit_cap = key("final_logit_softcapping", caps[1]) if gemma else 0.0
    heat = key("attention.temperature_scale", 0.0) if arch == "mistral3" else 0.0
    n, pos, stored = len(ids), np.arange(len(ids)), half if numerics == "ggml" else np.asarray  # stored: as cached
    heads = np.arange(n_head) // (n_head // n_head_kv)                          # the K/V head of each head
    out = {}

    def t(name, value):
        out[name] = value
        return value if given is None or name not in given else np.asarray(given[name], np.float64)

    def norm(base, name, x, weight):
        """RMS norm where the file has its weight: that of each head, or where the weight is wider, of all together."""
        if weight + ".weight" not in m.w:
            return x
        w = m.w[weight + ".weight"]
        y = x if x.shape[-1] == w.size else x.reshape(n, -1)
        y = t(base, (y / np.sqrt((y * y).mean(-1, keepdims=True) + eps)).reshape(x.shape))
        return t(name, (y.reshape(*y.shape[:1], -1) * w if y.shape[-1] != w.size else y * w).reshape(x.shape))

    def op(x, *names):
        """Products with several weights, or with one that holds them all below one another."""
        if names[0] + ".weight" in m.w:
            return [linear(m, x, name, numerics) for name in names]
        whole = linear(m, x, b + ("attn_qkv" if len(names) == 3 else "ffn_up"), numerics)
        kv = n_head_kv * d_head
        ends = [n_head * d_head, n_head * d_head + kv] if len(names) == 3 else [whole.shape[-1] // 2]
        return [part + m.w.get(name + ".bias", 0) * (b + "attn_qkv.bias" not in m.w)
                for part, name in zip(np.split(whole, ends, -1), names, strict=True)]

    def scaled(name, x, factor):
        return x if factor == 1 else t(name, x * factor)

    x = t("inp_embd", m.w["token_embd.weight"][ids])
    x = scaled("inp_scaled", x, np.sqrt(n_embd) if gemma else key("embedding_scale", 1.0) if granite else 1.0)
    for i in range(key("block_count")):
        b = f"blk.{i}."
        y = norm(f"norm-{i}", f"attn_norm-{i}", x, b + "attn_norm")
        q, k, v = op(y, b + "attn_q", b + "attn_k", b + "attn_v")
        q = t(f"Qcur_pre-{i}", q.reshape(n, n_head, d_head))
        k = t(f"Kcur_pre-{i}", k.reshape(n, n_head_kv, d_head))
        v = t(f"Vcur-{i}", v.reshape(n, n_head_kv, d_head_v))
        q = norm(f"norm_q-{i}", f"Qcur_normed-{i}", q, b + "attn_q_norm")
        k = norm(f"norm_k-{i}", f"Kcur_normed-{i}", k, b + "attn_k_norm")
        if turn(i):
            q, k = t(f"Qcur-{i}", rope(q, pos, **turn(i))), t(f"Kcur-{i}", rope(k, pos, **turn(i)))
        if heat:
            far = np.floor(pos / key("rope.scaling.original_context_length", key("context_length")))
            q = t(f"Qcur_attn_temp_scaled-{i}", q * (1 + heat * np.log(1 + far))[:, None, None])
        if arch in SCALE_QUERIES:
            q = t(f"Qcur_scaled-{i}", q * scale)
        kq = t(f"kq-{i}", np.einsum("ihd,jhd->hij", stored(q), stored(k)[:, heads]))
        if score_cap:
            kq = t(f"kq_scaled_2-{i}", score_cap * np.tanh(kq / score_cap))
        ago = pos[:, None] - pos
        e = np.where((ago >= 0) & (ago < (window(i) or n)), kq * (1 if arch in SCALE_QUERIES else scale), -np.inf)
        e = np.exp(e - e.max(-1, keepdims=True))
        p = t(f"kq_soft_max-{i}", e / e.sum(-1, keepdims=True))
        y = t(f"kqv-{i}", np.einsum("hij,jhd->hid", stored(p), stored(v)[:, heads]))
        y = t(f"kqv_merged-{i}", y.transpose(1, 0, 2).reshape(n, n_head * d_head_v))
        y = scaled(f"kqv_out_scaled-{i}", t(f"kqv_out-{i}", *op(y, b + "attn_output")), residual)
        y = norm(f"norm_attn_post-{i}", f"attn_post_norm-{i}", y, b + "post_attention_norm")
        x = t(f"ffn_inp-{i}", y + x)
        y = norm(f"norm_ffn-{i}", f"ffn_norm-{i}", x, b + "ffn_norm")
        gate, up = op(y, b + "ffn_gate", b + "ffn_up")
        gate, up = t(f"ffn_gate-{i}", gate), t(f"ffn_up-{i}", up)
        if gemma:
            gate = t(f"ffn_gelu-{i}", gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))))
        else:
            gate = t(f"ffn_silu-{i}", gate * np.exp(-np.logaddexp(0, -gate)))
        y = t(f"ffn_out-{i}", *op(t(f"ffn_gate_par-{i}", gate * up), b + "ffn_down"))
        y = scaled(f"ffn_out_scaled-{i}", y, residual)
        y = norm(f"norm_ffn_post-{i}", f"ffn_post_norm-{i}", y, b + "post_ffw_norm")
        x = t(f"l_out-{i}", y + x)
    y = norm("norm", "result_norm", x, "output_norm")
    y = linear(m, y, "output" if "output.weight" in m.w else "token_embd", numerics)
    if granite:
        y = t("result_output_pre", y) / key("logit_scale")
    elif logit_cap:
        y = logit_cap * np.tanh(t("result_output_pre", y) / logit_cap)
    t("result_output", y)
    return out


def nmse(a, b):
    """sum (a-b)^2 / sum b^2, b the reference."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(((a - b) ** 2).sum() / max((b * b).sum(), 1e-300))
