"""Small random models of every architecture, in several shapes each: `write(path, "qwen3", "grouped heads")`.

What a real file of an architecture has stands here by itself, and not taken from files/architectures.py, which is under
test: norms, biases, matrices in one, metadata. Widths of heads are odd in some, in others the queries share keys.
"""
from tiny import write_gguf

QK = ("attn_q_norm", "attn_k_norm")
AFTER = ("post_attention_norm", "post_ffw_norm")
GEMMA = dict(n_layer=4, n_rot=None, wtype="F32")
QKV = ("attn_q", "attn_k", "attn_v")
LONG = ("rope_factors_long", "rope_factors_short")


def gemma(n_layer=7, **more):
    return dict(n_layer=n_layer, meta={"attention.sliding_window": 8, **more.pop("meta", {})}, **more)


# By architecture and name of the shape; keys of `meta` without the architecture's name.
SHAPES = {
    "llama": {
        "plain": dict(),
    },
    "qwen2": {
        "biases": dict(bias=True, biases=QKV, n_head=4, n_head_kv=2),
        "tied, one key head": dict(bias=True, biases=QKV, n_head=4, n_head_kv=1, tied=True, rope_base=1e6),
        "no biases": dict(n_embd=96, n_head=6, n_head_kv=2, n_ff=101),
        "q, k and v in one": dict(bias=True, biases=("attn_qkv",), fused=("attn_qkv",)),
        "yarn": dict(bias=True, biases=QKV, meta={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                                                  "rope.scaling.original_context_length": 32}),
        "d_head 24": dict(n_embd=96, n_head=4, n_head_kv=4, bias=True, biases=QKV),
    },
    "qwen3": {
        "grouped heads": dict(norms=("attn_norm", *QK, "ffn_norm"), n_head=4, n_head_kv=2),
        "heads wider than n_embd, tied": dict(norms=("attn_norm", *QK, "ffn_norm"), d_head=32, d_head_v=32, tied=True,
                                              rope_base=1e6),
        "d_head 20": dict(norms=("attn_norm", *QK, "ffn_norm"), n_embd=80, n_head=4, n_head_kv=1),
        "biases": dict(norms=("attn_norm", *QK, "ffn_norm"), bias=True, biases=QKV),
    },
    "smollm3": {
        "every fourth layer without RoPE": dict(n_layer=5, tied=True, rope_base=5e6),
        "grouped heads": dict(n_layer=4, n_head=8, n_head_kv=1, bias=True, biases=QKV),
        "d_head 24": dict(n_layer=4, n_embd=96, n_head=4, n_head_kv=2),
    },
    "mistral3": {
        "yarn and temperature": dict(d_head=24, d_head_v=24, rope_base=1e6, meta={
            "attention.temperature_scale": 0.1, "rope.scaling.type": "yarn", "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 16, "rope.scaling.yarn_beta_fast": 8.0,
            "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.yarn_log_multiplier": 1.0}),
        "another multiplier": dict(meta={
            "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64,
            "rope.scaling.yarn_log_multiplier": 0.5, "rope.scaling.attn_factor": 1.1}),
        "neither": dict(bias=True, n_head_kv=1),
    },
    "granite": {
        "four multipliers": dict(tied=True, meta={
            "attention.scale": 0.09, "embedding_scale": 3.5, "residual_scale": 0.22, "logit_scale": 6.0}),
        "only that of logits": dict(n_embd=96, n_head=6, n_head_kv=3, meta={"logit_scale": 0.3}),
        "biases, no RoPE": dict(bias=True, meta={"logit_scale": 2.0, "residual_scale": 0.5,
                                                 "rope.scaling.finetuned": False}),
    },
    "olmo2": {
        "norms after the blocks": dict(norms=(*QK, *AFTER), wide_norms=True, n_head_kv=4),
        "grouped heads": dict(norms=(*QK, *AFTER), wide_norms=True, n_embd=96, n_head=6, n_head_kv=2, rope_base=5e5),
        "windows and yarn": dict(norms=(*QK, *AFTER), wide_norms=True, n_layer=5, meta={
            "attention.sliding_window": 8, "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
            "rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.2}),
        "windows by a list": dict(norms=(*QK, *AFTER), wide_norms=True, n_layer=3, meta={
            "attention.sliding_window": 5, "attention.sliding_window_pattern": [False, True, True]}),
    },
    "phi3": {
        "all in one": dict(fused=("attn_qkv", "ffn_up"), n_head_kv=4),
        "short factors": dict(fused=("attn_qkv", "ffn_up"), factors=LONG, n_ctx=1024, n_head_kv=1, meta={
            "rope.scaling.original_context_length": 512, "rope.scaling.attn_factor": 1.19}),
        "long factors": dict(fused=("attn_qkv", "ffn_up"), factors=LONG, n_ctx=1024, tied=True, meta={
            "rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.19,
            "rope.scaling.type": "longrope"}),
        "part of a head turns": dict(fused=("attn_qkv", "ffn_up"), n_embd=96, n_head=4, n_head_kv=2, n_rot=18),
        "apart": dict(fused=("ffn_up",), bias=True, biases=QKV),
    },
    "gemma2": {
        "caps and windows": gemma(4, norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), tied=True,
                                  meta={"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.5}),
        "default caps, d_head 24": gemma(3, norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
                                         tied=True, d_head=24, d_head_v=24, n_head=4, n_head_kv=1),
        "linear scaling": gemma(2, norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), tied=True,
                                rope_scale=4.0, n_ff=101, meta={"rope.freq_base_swa": 500.0}),
    },
    "gemma3": {
        "two rope bases": gemma(7, norms=("attn_norm", *QK, "post_attention_norm", "ffn_norm", "post_ffw_norm"),
                                rope_base=1e6, rope_scale=8.0, tied=True, n_head_kv=1),
        "an own output, a cap": gemma(2, norms=("attn_norm", *QK, "post_attention_norm", "ffn_norm", "post_ffw_norm"),
                                      d_head=24, d_head_v=24, meta={"final_logit_softcapping": 3.0}),
        "no windows": gemma(3, norms=("attn_norm", *QK, "post_attention_norm", "ffn_norm", "post_ffw_norm"),
                            meta={"attention.sliding_window": None}, tied=True),
        "other pattern and base": gemma(5, norms=("attn_norm", *QK, "post_attention_norm", "ffn_norm", "post_ffw_norm"),
                                        meta={"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 20.0}),
    },
}
EVERY = [(arch, name) for arch in SHAPES for name in SHAPES[arch]]
LONGER = {("phi3", "long factors"): 1024}     # n_ctx that a test asks for


def shape(arch, name, **more):
    """The arguments of tiny.write_gguf for a shape of an architecture."""
    how = {**SHAPES[arch][name], **more}
    meta = {f"{arch}.{key}": value for key, value in how.pop("meta", {}).items()}
    return {"arch": arch, **how, "meta": meta}


def write(path, arch, name, **more):
    return write_gguf(path, **shape(arch, name, **more))
