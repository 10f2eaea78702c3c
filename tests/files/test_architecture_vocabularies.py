"""Each architecture with the vocabularies that its models have, small ones: the ids of random texts are llama.cpp's.

Which name of a pre-tokenizer a model gets is written in llama.cpp's conversion/base.py.
"""
import architectures
import pytest
from bpe_vocab import metadata
from test_bpe import same_as_llama_cpp
from tiny import vocabulary

import tinymia
from tinymia_files import GGUFError

BPE = {  # (architecture, pre-tokenizer): whose
    ("qwen2", "qwen2"): "Qwen2.5", ("qwen2", "deepseek-r1-qwen"): "DeepSeek-R1-Distill-Qwen",
    ("qwen3", "qwen2"): "Qwen3",
    ("smollm3", "smaug-bpe"): "SmolLM3", ("smollm3", "llama-bpe"): "SmolLM3", ("mistral3", "tekken"): "Ministral 3",
    ("granite", "refact"): "Granite 3", ("granite", "dbrx"): "Granite 4", ("olmo2", "dbrx"): "OLMo 2",
    ("olmo2", "olmo"): "OLMo 2", ("phi3", "dbrx"): "Phi-4", ("phi3", "gpt-4o"): "Phi-4-mini",
}
# As in Gemma's file: runs of line ends and of blanks are words of their own, and turns have their marks.
RUNS = ["\n\n", "\n\n\n", "\t\t", "▁▁", "▁▁▁", "<b>", "[multimodal]"]
TURNS = ["<start_of_turn>", "<end_of_turn>", "<unused0>"]


def gemma(**more):
    tokens, scores, types = (list(x) for x in vocabulary(384))
    tokens[259:266], types[259:266] = [piece.replace("▁", " ") for piece in RUNS], [4] * 7
    tokens[266:269], types[266:269] = TURNS, [3, 3, 4]
    return {"tokens": tokens, "scores": scores, "token_type": types, "add_space_prefix": False, "add_bos_token": True,
            "add_eos_token": False, "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0, "pre": "default",
            **more}


def phi(**more):
    tokens, scores, types = (list(x) for x in vocabulary(384))
    tokens[380:383], types[380:383] = ["<|endoftext|>", "<|user|>", "<|end|>"], [3, 3, 3]
    return {"tokens": tokens, "scores": scores, "token_type": types, **more}


SPM = {  # (architecture, whose): the vocabulary
    ("gemma2", "Gemma 2"): gemma(), ("gemma3", "Gemma 3"): gemma(eot_token_id=267),
    ("gemma3", "with a space in front"): gemma(add_space_prefix=True),
    ("phi3", "Phi-3"): phi(pre="default", add_space_prefix=True, add_bos_token=False),
}


def written(folder, arch, meta):
    """A model of the first shape of an architecture, with another vocabulary."""
    how = architectures.shape(arch, next(iter(architectures.SHAPES[arch])))
    return architectures.write_gguf(folder / "m.gguf", **{**how, "meta": how["meta"] | meta})


@pytest.mark.parametrize("arch, pre", BPE, ids=" ".join)
def test_byte_pairs(tmp_path, arch, pre):
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'tinymia[bpe]'", exc_type=ImportError)
    same_as_llama_cpp(written(tmp_path, arch, metadata(pre)), 120)


@pytest.mark.parametrize("arch, whose", SPM, ids=" ".join)
def test_sentence_pieces(tmp_path, arch, whose):
    meta = {"general.name": whose, **{f"tokenizer.ggml.{k}": v for k, v in SPM[arch, whose].items()}}
    path = written(tmp_path, arch, meta)
    same_as_llama_cpp(path, 200)
    ours = tinymia.load(path).tokenizer
    if arch.startswith("gemma"):
        assert ours.encode("a\n\nb  c<end_of_turn>")[-1] == 267 and ours.encode("x\n\ny").count(259) == 1


@pytest.mark.parametrize("arch", architectures.SHAPES)
def test_a_pre_tokenizer_that_is_not_there_is_refused_by_name(tmp_path, arch):
    path = written(tmp_path, arch, metadata("nobody-knows-it"))
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.pre is 'nobody-knows-it'; supported: .*qwen2.*"):
        tinymia.load(path)
