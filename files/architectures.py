"""The differences between architectures, as data: the weights of a layer, the metadata keys that count, and defaults.

Each row says what llama.cpp's loader and graph of that architecture do (llama.cpp, src/models/NAME.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

QKV = "attn_q attn_k attn_v"
ALL = f"{QKV} attn_output ffn_gate ffn_up ffn_down"
WINDOWS = "attention.sliding_window attention.sliding_window_pattern"
YARN = "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scaling.yarn_log_multiplier"


@dataclass(frozen=True)
class Windows:
    """Layers in which a token sees only the last positions: unless the metadata list them, all layers but the last one
    of every `every`."""

    every: int
    size: int | None = None             # the default number of positions; None: without the key there are no windows
    base: float | None = None           # the default base of RoPE in these layers; None: the base of the other layers
    scaled: bool = False                # whether the scaling of positions applies in these layers, too
    yarn: bool = True                   # whether YaRN's blend and gain apply in these layers, too


@dataclass(frozen=True)
class Architecture:
    """The properties of an architecture, and the defaults of metadata that a file may lack."""

    norms: str = "attn_norm ffn_norm"   # the norms of a layer, by the GGUF names of their weights
    wide_norms: bool = False            # queries and keys are normed over all heads together, not each head by itself
    biases: str = QKV                   # matrices of a layer that may have a bias
    fused: tuple[str, ...] = ("attn_qkv",)  # matrices that a file may hold joined to others; "ffn_up": that it must
    output: str = "any"                 # the output matrix: "own", "tied" to the embedding, or "any" of the two
    output_bias: bool = False           # whether it may have a bias
    ffn_scales: bool = False            # whether the FFN's matrices may have a scale; elsewhere llama.cpp ignores it
    halves: bool = True                 # RoPE pairs element i with i + n_rot / 2, and not with its neighbour
    act: str = "silu"                   # activation function of the feed-forward block: "silu" or "gelu"
    reads: str = ""                     # metadata keys that count here, beside those that count for all
    factors: tuple[str, ...] = ()       # tensors that RoPE's angles may be divided by
    rope_step: int | None = None        # the last one of every rope_step layers has no RoPE
    windows: Windows | None = None      # None: every token sees all positions before it
    scale_queries: bool = False         # the queries are scaled, and not the scores
    wide_scale: int | None = None       # a model with this many layers is scaled by n_embd / n_head instead of d_head
    embedding_root: bool = False        # embeddings are multiplied by the square root of n_embd
    attn_soft_cap: float | None = None  # the default soft cap of the scores; None: there is none, and no key for it
    logit_soft_cap: float | None = None     # the default soft cap of the logits; 0: none unless the metadata give one


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
