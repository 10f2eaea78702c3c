"""Files of an architecture that contradict themselves: one clear line each, or llama.cpp's numbers."""
import architectures
import pytest
from conftest import prompt

import tinymia
from tinymia_files import GGUFError

GEMMA2, GEMMA3, OLMO2 = ("gemma2", "caps and windows"), ("gemma3", "two rope bases"), ("olmo2", "windows by a list")
PHI3, QWEN2, QWEN3 = ("phi3", "short factors"), ("qwen2", "biases"), ("qwen3", "grouped heads")
GRANITE, MISTRAL3 = ("granite", "four multipliers"), ("mistral3", "yarn and temperature")
SMOLLM3 = ("smollm3", "every fourth layer without RoPE")
QK = ("attn_q_norm", "attn_k_norm")

REFUSED = [  # a model, what it is told otherwise in its metadata, what else is written otherwise, what the error says
    (GEMMA2, {"attention.sliding_window": 0}, {}, "sliding_window is 0; it must be a whole number of at least 1"),
    (GEMMA2, {"attention.sliding_window": "8"}, {}, "sliding_window is '8'; it must be a whole number"),
    (GEMMA2, {"attention.sliding_window": 8.0}, {}, "sliding_window is 8.0; it must be a whole number"),
    (GEMMA2, {"attention.sliding_window": 2**31}, {}, "at least 1 and below 2147483648"),
    (GEMMA3, {"attention.sliding_window_pattern": [True, False]}, {}, "for each of the 7 layers"),
    (OLMO2, {"attention.sliding_window_pattern": [True] * 4}, {}, "for each of the 3 layers"),
    (OLMO2, {"attention.sliding_window_pattern": ["a", "b", "c"]}, {}, "for each of the 3 layers"),
    (GEMMA3, {"attention.sliding_window_pattern": "six"}, {}, "sliding_window_pattern is 'six'"),
    (GEMMA3, {"attention.key_length_swa": 8}, {}, "layers with a window must have 16, as the others have"),
    (GEMMA3, {"rope.freq_base_swa": 0.0}, {}, "freq_base_swa is 0.0; it must be a number of at least 1e-06"),
    (GEMMA2, {"attn_logit_softcapping": 0.0}, {}, "attn_logit_softcapping is 0.0; it must be a number"),
    (GEMMA2, {"final_logit_softcapping": -1.0}, {}, "final_logit_softcapping is -1.0; it must be a number"),
    (GEMMA2, {"attn_logit_softcapping": float("nan")}, {}, "attn_logit_softcapping is nan; it must be a number"),
    (GEMMA2, {}, {"tied": False}, "tensor output.weight is not part of the architecture gemma2"),
    (GEMMA3, {}, {"norms": ("attn_norm", *QK, "ffn_norm", "post_ffw_norm")}, "post_attention_norm.*is missing"),
    (GEMMA3, {}, {"bias": True}, "bias .*is not part of the architecture gemma3"),
    (PHI3, {"rope.dimension_count": 12}, {}, r"rope_factors_(short|long).weight is \[8\]; the metadata ask for \[6\]"),
    (PHI3, {"rope.dimension_count": 15}, {}, "dimension_count is 15; it must be even and at most 16"),
    (PHI3, {"rope.dimension_count": 18}, {}, "dimension_count is 18; it must be even and at most 16"),
    (PHI3, {"rope.dimension_count": 0}, {}, "dimension_count is 0; it must be a whole number of at least 2"),
    (PHI3, {"attention.head_count_kv": 2}, {}, r"attn_qkv.weight is \[96, 64\]; the metadata ask for \[128, 64\]"),
    (PHI3, {"feed_forward_length": 95}, {}, r"ffn_up.weight is \[192, 64\]; the metadata ask for \[190, 64\]"),
    (PHI3, {"rope.scaling.original_context_length": 0}, {}, "original_context_length is 0; it must be a whole number"),
    (PHI3, {"rope.scaling.attn_factor": -1.0}, {}, "attn_factor is -1.0; it must be a number of at least 0"),
    (PHI3, {"rope.scaling.type": "su"}, {}, "'su' is not supported; supported: none, linear, yarn, longrope"),
    (QWEN2, {"rope.dimension_count": 15}, {}, "dimension_count is 15; it must be even and at most 16"),
    (QWEN2, {"rope.scaling.type": "longrope"}, {}, "rope scaling 'longrope' is not supported"),
    (QWEN2, {"expert_count": 4}, {}, "expert_count is 4: mixtures of experts are not supported"),
    (QWEN2, {}, {"factors": ("rope_factors_long",)}, "rope_factors_long.weight is not part of the architecture qwen2"),
    (QWEN2, {}, {"norms": ("attn_norm", *QK, "ffn_norm")}, "attn_k_norm.* is not part of the architecture"),
    (QWEN2, {}, {"fused": ("ffn_up",)}, "ffn_gate.weight .* is missing"),
    (QWEN3, {"attention.key_length": 32}, {}, r"attn_q.weight is \[64, 64\]; the metadata ask for \[128, 64\]"),
    (QWEN3, {"attention.head_count_kv": 3}, {}, "4 query heads cannot share 3 key heads evenly"),
    (QWEN3, {}, {"norms": ("attn_norm", "ffn_norm")}, "attn_q_norm.weight .* is missing"),
    (OLMO2, {}, {"wide_norms": False}, r"attn_q_norm.weight is \[16\]; the metadata ask for \[64\]"),
    (OLMO2, {}, {"tied": True}, "tensor output.weight .* is missing"),
    (MISTRAL3, {"attention.temperature_scale": -0.1}, {}, "temperature_scale is -0.1.*; it must be a number"),
    (MISTRAL3, {"attention.temperature_scale": "hot"}, {}, "temperature_scale is 'hot'; it must be a number"),
    (MISTRAL3, {"rope.scaling.original_context_length": 0}, {}, "original_context_length is 0"),
    (MISTRAL3, {"rope.scaling.yarn_beta_fast": 0.0}, {}, "yarn_beta_fast is 0.0; it must be a number of at least"),
    (MISTRAL3, {"rope.scaling.yarn_beta_slow": -1.0}, {}, "yarn_beta_slow is -1.0; it must be a number"),
    (MISTRAL3, {"rope.scaling.yarn_log_multiplier": -1.0}, {}, "yarn_log_multiplier is -1.0; it must be a number"),
    (GRANITE, {"logit_scale": None}, {}, "metadata key granite.logit_scale is missing"),
    (GRANITE, {"logit_scale": 0.0}, {}, "logit_scale is 0.0; it must be a number of at least 1e-30"),
    (GRANITE, {"residual_scale": -0.5}, {}, "residual_scale is -0.5; it must be a number of at least 0"),
    (GRANITE, {"deepstack_mapping": [-1, 0]}, {}, "inputs of images are not supported"),
    (GRANITE, {"rope.scaling.finetuned": 1}, {}, "finetuned is 1; it must be true or false"),
]
RUN = [  # odd, and llama.cpp runs it
    (GEMMA2, {"attention.sliding_window": 1}), (GEMMA2, {"attention.sliding_window": None}),
    (GEMMA3, {"attention.sliding_window_pattern": [1, 0, 1, 0, 1, 0, 1]}),
    (GEMMA3, {"attention.sliding_window_pattern": [True] * 7}), (GEMMA3, {"attention.sliding_window_pattern": 0}),
    (GEMMA3, {"attention.sliding_window_pattern": 100}), (GEMMA3, {"attn_logit_softcapping": 2.0}),
    (GEMMA3, {"attention.shared_kv_layers": 2}), (GEMMA3, {"rope.scaling.factor": 0.0}),
    (OLMO2, {"attention.sliding_window": None}), (OLMO2, {"attention.sliding_window": 0}),
    (PHI3, {"rope.scaling.original_context_length": 2048}), (PHI3, {"rope.scaling.attn_factor": 0.0}),
    (QWEN2, {"attention.temperature_scale": 0.5}), (QWEN2, {"rope.dimension_count": None}),
    (QWEN2, {"logit_scale": 3.0, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0, "embedding_scale": 2.0,
             "residual_scale": 0.5, "attention.sliding_window": 4}),
    (QWEN3, {"attention.scale": 0.5, "embedding_scale": 4.0}), (SMOLLM3, {"rope.scaling.finetuned": False}),
    (MISTRAL3, {"attention.temperature_scale": 0.0}), (MISTRAL3, {"rope.scaling.original_context_length": None}),
    (MISTRAL3, {"rope.scaling.factor": 0.0}), (MISTRAL3, {"rope.scaling.yarn_log_multiplier": 0.0}),
    (MISTRAL3, {"attention.temperature_length": 16}), (GRANITE, {"attention.scale": 0.0}),
    (GRANITE, {"residual_scale": 0.0, "embedding_scale": 0.0}),
]


def written(folder, which, meta, more):
    how = architectures.shape(*which)
    meta = how["meta"] | {f"{which[0]}.{key}": value for key, value in meta.items()}
    return architectures.write_gguf(folder / "m.gguf", **{**how, **more, "meta": meta})


@pytest.mark.parametrize("which, meta, more, says", REFUSED, ids=[f"{r[0][0]} {r[1] or r[2]}"[:70] for r in REFUSED])
def test_a_contradiction_is_one_clear_line(tmp_path, which, meta, more, says):
    path = written(tmp_path, which, meta, more)
    with pytest.raises(GGUFError, match=says) as error:
        tinymia.load(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(path)


@pytest.mark.parametrize("which, meta", RUN, ids=[f"{which[0]} {meta}"[:70] for which, meta in RUN])
def test_what_is_only_odd_is_computed_as_llama_cpp_does(tmp_path, which, meta):
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'", exc_type=ImportError)
    from tinymia_lab.comparison.llama_comparison import verify

    found = verify(tinymia.load(written(tmp_path, which, meta, {}), threads=1), prompt(41), n_predict=1)
    assert found["first_not_identical"] is None and not found["unknown"] and not found["absent"], found["verdict"]


@pytest.mark.parametrize("arch", ["gemma", "gemma3n", "qwen3moe", "phimoe", "granitemoe", "qwen2vl", "mamba"])
def test_another_architecture_is_refused_by_name_with_the_list(tmp_path, arch):
    path = architectures.write_gguf(tmp_path / "m.gguf", arch=arch)
    with pytest.raises(GGUFError, match=f"general.architecture '{arch}' is not supported; supported: llama, .*gemma3$"):
        tinymia.load(path)
