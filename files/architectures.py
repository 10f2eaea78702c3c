"""What sets architectures apart, by data: which weights a file has, which metadata keys count, and what they mean.

Each row is what llama.cpp's loader and graph of the architecture do (llama.cpp, src/models/NAME.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

QKV = "attn_q attn_k attn_v"
ALL = f"{QKV} attn_output ffn_gate ffn_up ffn_down"
WINDOWS = "attention.sliding_window attention.sliding_window_pattern"
YARN = "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scaling.yarn_log_multiplier"


@dataclass(frozen=True)
class Windows:
    """Layers in which a token sees the last positions only: all but one of `every` layers, where the metadata do not
    say otherwise."""

    every: int
    size: int | None = None             # where the metadata give none; None: no windows then
    base: float | None = None           # of RoPE in these layers where the metadata give none; None: that of the others
    scaled: bool = False                # positions are scaled in these layers too
    yarn: bool = True                   # YaRN's blend and gain hold in these layers too


@dataclass(frozen=True)
class Architecture:
    """What holds for an architecture where the metadata do not say otherwise."""

    norms: str = "attn_norm ffn_norm"   # norms of a layer that have a weight, by its GGUF name
    wide_norms: bool = False            # queries and keys are normed over all heads together, not each head by itself
    biases: str = QKV                   # matrices of a layer that may have a bias
    fused: tuple[str, ...] = ("attn_qkv",)  # matrices that a file may hold as one; "ffn_up": that it must
    output: str = "any"                 # the output matrix: "own", "tied" to the embedding, or any of them
    output_bias: bool = False           # whether it may have a bias
    ffn_scales: bool = False            # whether the FFN's matrices may have a scale: in others llama.cpp forgets it
    halves: bool = True                 # how RoPE pairs the elements of a head
    act: str = "silu"
    reads: str = ""                     # metadata keys, beside those that count for all
    factors: tuple[str, ...] = ()       # tensors that RoPE's angles may be divided by
    rope_step: int | None = None        # every so many layers, one does without RoPE
    windows: Windows | None = None
    scale_queries: bool = False
    wide_scale: int | None = None       # a model of so many layers scales by n_embd / n_head in place of d_head
    embedding_root: bool = False        # embeddings are multiplied by the square root of their width
    attn_soft_cap: float | None = None  # where the metadata give none; None: there is none, and no key for it
    logit_soft_cap: float | None = None     # the same for logits; 0: none where the metadata give none or 0


ARCHITECTURES = {
    "llama": Architecture(biases=ALL, output_bias=True, ffn_scales=True, halves=False, factors=("rope_freqs",)),
    "qwen2": Architecture(output_bias=True),
    "qwen3": Architecture(norms="attn_norm attn_q_norm attn_k_norm ffn_norm", ffn_scales=True),
    "smollm3": Architecture(halves=False, rope_step=4),
    "mistral3": Architecture(biases=ALL, ffn_scales=True, halves=False, factors=("rope_freqs",),
                             reads=f"attention.temperature_scale {YARN}"),
    "granite": Architecture(biases=ALL, halves=False, factors=("rope_freqs",), reads="attention.scale embedding_scale "
                            "residual_scale logit_scale rope.scaling.finetuned deepstack_mapping"),
    "olmo2": Architecture(norms="attn_q_norm attn_k_norm post_attention_norm post_ffw_norm", wide_norms=True,
                          output="own", reads=WINDOWS, windows=Windows(4, yarn=False)),
    "phi3": Architecture(fused=("attn_qkv", "ffn_up"), factors=("rope_factors_long", "rope_factors_short"),
                         scale_queries=True),
    "gemma2": Architecture(norms="attn_norm post_attention_norm ffn_norm post_ffw_norm", output="tied", act="gelu",
                           reads=f"{WINDOWS} rope.freq_base_swa attn_logit_softcapping final_logit_softcapping",
                           windows=Windows(2, 4096, scaled=True), scale_queries=True, wide_scale=46,
                           embedding_root=True, attn_soft_cap=50.0, logit_soft_cap=30.0),
    "gemma3": Architecture(norms="attn_norm attn_q_norm attn_k_norm post_attention_norm ffn_norm post_ffw_norm",
                           act="gelu", reads=f"{WINDOWS} rope.freq_base_swa final_logit_softcapping",
                           windows=Windows(6, base=10000.0),
                           scale_queries=True, wide_scale=62, embedding_root=True, logit_soft_cap=0.0),
}
