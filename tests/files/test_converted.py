"""Models as llama.cpp's converter writes them: every key that a real file of a known model has is accepted."""
import converted
import numpy as np
import pytest
from conftest import prompt
from tiny import write_gguf

import tinymia
from tinymia_files import read_gguf

EVERY = pytest.mark.parametrize("name", converted.MODELS)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made, folder = {}, tmp_path_factory.mktemp("converted")

    def make(name):
        if name not in made:
            made[name] = write_gguf(folder / f"{len(made)}.gguf", **converted.shape(name))
        return made[name]

    return make


@EVERY
def test_a_file_as_the_converter_writes_it_is_accepted_without_a_note(path, name, capfd):
    """Its architecture's keys are exactly those that the converter writes, and none of them is unknown."""
    arch, more, meta, _ = converted.MODELS[name]
    found = {key.removeprefix(f"{arch}.") for key in read_gguf(path(name))[0] if key.startswith(f"{arch}.")}
    assert found == {*converted.ALL, *more, *meta} - {key for key, value in meta.items() if value is None}
    model = tinymia.load(path(name), threads=1)
    assert model.config.arch == arch and np.isfinite(model.run(prompt(12)).logits).all()
    assert "note" not in capfd.readouterr().err


@EVERY
def test_llama_cpp_computes_the_same(path, name):
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'", exc_type=ImportError)
    from tinymia_lab.comparison.llama_comparison import verify

    found = verify(tinymia.load(path(name), threads=1), prompt(41), n_predict=1)
    assert found["first_not_identical"] is None and not found["unknown"] and not found["absent"], found["verdict"]


def test_what_the_metadata_mean(path):
    """The parts of a Config that come from a key, or from what an architecture has without one."""
    def config(name):
        return tinymia.load(path(name), threads=1).config

    qwen = config("Qwen2.5-0.5B")
    assert qwen.ropes[0].base == 1e6 and qwen.ropes[0].n_rot == qwen.d_head and qwen.eps == np.float32(1e-6)
    smol = config("SmolLM3-3B")
    assert [layer.rope for layer in smol.layers] == [0, 0, 0, None, 0]
    ministral = config("Ministral-3-3B")
    assert ministral.temperature == np.float32(0.1) and ministral.n_original == 16384
    granite = config("Granite-3.3-2B")
    assert granite.logit_scale == 1 / 8 and granite.attention_scale == 0.015625
    olmo3 = config("OLMo-3-7B")
    assert [layer.window for layer in olmo3.layers] == [4096, 4096, 4096, None, 4096]
    assert olmo3.ropes[0].yarn and not olmo3.ropes[1].yarn
    phi = config("Phi-3.5-mini")
    assert phi.n_ctx == 4096 and phi.freqs == "rope_factors_short.weight"
    assert config("Phi-4-mini").ropes[0].n_rot == 24
    gemma2 = config("Gemma-2-2B")
    assert gemma2.attn_soft_cap == 50 and gemma2.logit_soft_cap == 30 and gemma2.ropes[0].base == 1e4
    assert [layer.window for layer in gemma2.layers] == [4096, None, 4096]
    gemma3, early = config("Gemma-3-4B"), config("Gemma-3-4B, of early 2025")
    assert [rope.base for rope in gemma3.ropes] == [1e6, 1e4] and [r.scale for r in gemma3.ropes] == [1 / 8, 1]
    assert (early.ropes, early.layers) == (gemma3.ropes, gemma3.layers)
