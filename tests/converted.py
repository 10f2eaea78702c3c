"""What llama.cpp's converter writes for models that people know: metadata, and the shape of a small model like them.

The keys and their values are those of conversion/*.py (llama.cpp, 2026) for each model's own config.json; widths and
numbers of layers and heads are small here. Values that a small model cannot have (a window of 4096 positions) are kept
where they change nothing in it.
"""
import architectures

QK, AFTER = ("attn_q_norm", "attn_k_norm"), ("post_attention_norm", "post_ffw_norm")
QKV, FUSED = ("attn_q", "attn_k", "attn_v"), ("attn_qkv", "ffn_up")
GEMMA2 = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
GEMMA3 = ("attn_norm", *QK, "post_attention_norm", "ffn_norm", "post_ffw_norm")
ALL = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
       "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base")
HEADS = ("attention.key_length", "attention.value_length")
LLAMA = ("vocab_size", "rope.dimension_count")      # of those that the converter takes for kinds of Llama
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32768}
MINISTRAL = {"rope.scaling.type": "yarn", "rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 16384,
             "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
             "rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1}
OLMO3 = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 8192,
         "rope.scaling.yarn_attn_factor": 1.2079441547393799, "rope.scaling.yarn_beta_fast": 32.0,
         "rope.scaling.yarn_beta_slow": 1.0, "rope.freq_base_swa": 500000.0, "attention.sliding_window": 4096,
         "attention.sliding_window_pattern": [True, True, True, False, True]}

# name: (architecture, keys besides ALL that stand for shapes, keys with values, arguments of tiny.write_gguf)
MODELS = {
    "Llama-3.2-1B": ("llama", HEADS + LLAMA, {}, dict(
        d_head=16, d_head_v=16, n_ctx=131072, rope_base=5e5, tied=True, rope_freqs=True)),
    "Ministral-8B-2410": ("llama", HEADS + LLAMA, {}, dict(d_head=32, d_head_v=32, n_ctx=32768, rope_base=1e8)),
    "Qwen2.5-0.5B": ("qwen2", (), {}, dict(
        bias=True, biases=QKV, n_ctx=32768, rope_base=1e6, eps=1e-6, tied=True)),
    "Qwen2.5-7B-1M, yarn": ("qwen2", (), YARN, dict(
        bias=True, biases=QKV, n_ctx=32768, rope_base=1e6, eps=1e-6)),
    "Qwen3-0.6B": ("qwen3", HEADS, {}, dict(
        norms=("attn_norm", *QK, "ffn_norm"), d_head=32, d_head_v=32, n_ctx=40960, rope_base=1e6, eps=1e-6, tied=True)),
    "SmolLM3-3B": ("smollm3", LLAMA, {}, dict(n_layer=5, n_ctx=65536, rope_base=5e6, eps=1e-6, tied=True)),
    "Ministral-3-3B": ("mistral3", HEADS + LLAMA, MINISTRAL, dict(
        d_head=32, d_head_v=32, n_ctx=262144, rope_base=1e6, tied=True)),
    "Mistral-Small-3.1-24B": ("mistral3", HEADS + LLAMA, {}, dict(
        d_head=32, d_head_v=32, n_ctx=131072, rope_base=1e9)),
    "Granite-3.3-2B": ("granite", LLAMA, {"attention.scale": 0.015625, "embedding_scale": 12.0, "residual_scale": 0.22,
                                          "logit_scale": 8.0}, dict(n_ctx=131072, rope_base=1e7, tied=True)),
    "Granite-4, text of a vision model": ("granite", LLAMA, {
        "attention.scale": 0.015625, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0,
        "deepstack_mapping": [-1, -1]}, dict(n_ctx=131072, rope_base=1e7, tied=True)),
    "OLMo-2-1B": ("olmo2", (), {}, dict(
        norms=(*QK, *AFTER), wide_norms=True, n_head_kv=4, n_ctx=4096, rope_base=5e5, eps=1e-6)),
    "OLMo-3-7B": ("olmo2", (), OLMO3, dict(
        norms=(*QK, *AFTER), wide_norms=True, n_head_kv=4, n_layer=5, n_ctx=65536, rope_base=5e5, eps=1e-6)),
    "Phi-3-mini-4k": ("phi3", ("rope.dimension_count",), {
        "rope.scaling.original_context_length": 4096, "attention.sliding_window": 2047},
        dict(fused=FUSED, n_head_kv=4, n_ctx=4096)),
    "Phi-3.5-mini": ("phi3", ("rope.dimension_count",), {
        "rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.190238118171692,
        "attention.sliding_window": 262144},
        dict(fused=FUSED, n_head_kv=4, n_ctx=131072, factors=architectures.LONG)),
    "Phi-4-mini": ("phi3", ("rope.dimension_count",), {
        "rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.190238118171692,
        "attention.sliding_window": 262144},
        dict(fused=FUSED, n_embd=128, n_rot=24, n_ctx=131072, factors=architectures.LONG, tied=True)),
    "Phi-4": ("phi3", ("rope.dimension_count",), {
        "rope.scaling.original_context_length": 16384, "attention.sliding_window": 0},
        dict(fused=FUSED, n_ctx=16384, rope_base=250000.0)),
    "Gemma-2-2B": ("gemma2", HEADS, {
        "rope.freq_base": None, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "attention.sliding_window": 4096},
        dict(norms=GEMMA2, d_head=16, d_head_v=16, n_layer=3, n_ctx=8192, eps=1e-6, tied=True)),
    "Gemma-3-1B": ("gemma3", HEADS, {"rope.freq_base_swa": 10000.0, "attention.sliding_window": 512},
                   dict(norms=GEMMA3, d_head=32, d_head_v=32, n_head_kv=1, n_layer=7, n_ctx=32768, rope_base=1e6,
                        eps=1e-6, tied=True)),
    "Gemma-3-4B": ("gemma3", HEADS, {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
                                     "rope.freq_base_swa": 10000.0, "attention.sliding_window": 1024},
                   dict(norms=GEMMA3, d_head=16, d_head_v=16, n_layer=7, n_ctx=131072, rope_base=1e6, eps=1e-6,
                        tied=True)),
    "Gemma-3-4B, of early 2025": ("gemma3", HEADS, {
        "rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.sliding_window": 1024},
        dict(norms=GEMMA3, d_head=16, d_head_v=16, n_layer=7, n_ctx=131072, rope_base=1e6, eps=1e-6, tied=True)),
}

# Keys of no architecture that files on the hub have, whatever the model. None of them changes a number.
GENERAL = {
    "general.type": "model", "general.name": "Some Model 1B Instruct", "general.basename": "Some-Model",
    "general.finetune": "Instruct", "general.version": "v0.1", "general.size_label": "1B", "general.license": "other",
    "general.license.name": "a-license", "general.license.link": "https://example.org/license",
    "general.author": "A. Uthor", "general.organization": "An organisation", "general.description": "A model.",
    "general.quantized_by": "Somebody", "general.repo_url": "https://example.org/repo", "general.uuid": "0-1",
    "general.base_model.count": 1, "general.base_model.0.name": "Some Model 1B",
    "general.base_model.0.organization": "An organisation", "general.base_model.0.repo_url": "https://example.org/base",
    "general.dataset.count": 1, "general.dataset.0.name": "Some data", "general.tags": ["chat", "text-generation"],
    "general.languages": ["en", "de"], "general.datasets": ["some/data"], "general.file_type": 15,
    "general.quantization_version": 2, "general.sampling.top_k": 64, "general.sampling.top_p": 0.95,
    "general.sampling.temp": 0.6, "general.sampling.min_p": 0.05, "general.alignment": 32,
    "quantize.imatrix.file": "imatrix.gguf", "quantize.imatrix.dataset": "calibration.txt",
    "quantize.imatrix.entries_count": 182, "quantize.imatrix.chunks_count": 128, "mradermacher.quantized_at": "2025",
    "tokenizer.ggml.pre": "default", "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_sep_token": False,
    "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.seperator_token_id": 2,
    "tokenizer.ggml.mask_token_id": 3, "tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 2,
    "tokenizer.ggml.fim_pre_token_id": 4, "tokenizer.ggml.fim_suf_token_id": 5, "tokenizer.ggml.fim_mid_token_id": 6,
    "tokenizer.ggml.fim_pad_token_id": 7, "tokenizer.ggml.fim_rep_token_id": 8, "tokenizer.ggml.fim_sep_token_id": 9,
    "tokenizer.huggingface.json": "{}",
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "tokenizer.chat_templates": ["rag", "tool_use"], "tokenizer.chat_template.rag": "{{ messages }}",
    "tokenizer.chat_template.tool_use": "{{ messages }}",
}


def shape(name):
    """The arguments of tiny.write_gguf for a model, with the metadata that the converter writes and no others."""
    arch, more, meta, how = MODELS[name]
    meta = {f"{arch}.{key}": value for key, value in meta.items()}
    written = {*ALL, *more}
    absent = {f"{arch}.{key}": None for key in (*HEADS, *LLAMA) if key not in written}
    if absent.get(f"{arch}.attention.key_length", 0) is None:
        assert "d_head" not in how, "a width of its own needs its key"
    return {"arch": arch, **how, "meta": {**GENERAL, **absent, **meta}}
