"""Every architecture, on small random models of several shapes: against llama.cpp, tensor by tensor, and in float64."""
import architectures
import naive
import numpy as np
import pytest
from conftest import prompt
from naive import nmse
from test_forward import tensors

import tinymia
from tinymia_files import ARCHITECTURES

EVERY = pytest.mark.parametrize("arch, name", architectures.EVERY, ids=" ".join)
# n_ff is 101: ggml sums the rest of a row of float32 in an order of its own; so it does for Llama with such a width.
UNEVEN = {("qwen2", "no biases"), ("gemma2", "linear scaling")}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """path(arch, name, **more): a file of that shape, written once."""
    made, folder = {}, tmp_path_factory.mktemp("architectures")

    def make(arch, name, **more):
        key = repr((arch, name, sorted(more.items())))
        if key not in made:
            made[key] = architectures.write(folder / f"{len(made)}.gguf", arch, name, **more)
        return made[key]

    return make


def longer(arch, name):
    return architectures.LONGER.get((arch, name))


def test_every_architecture_has_its_shapes():
    assert set(architectures.SHAPES) == set(ARCHITECTURES)


@EVERY
def test_every_tensor_is_llama_cpps(path, arch, name):
    """A prompt longer than every window, and four passes of decoding; no tensor of either side is left over."""
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'", exc_type=ImportError)
    from tinymia_lab.comparison.llama_comparison import verify

    model = tinymia.load(path(arch, name), threads=1, n_ctx=longer(arch, name))
    found = verify(model, prompt(41), n_predict=4)
    assert found["verdict"].startswith("equal"), found["verdict"]
    assert not found["unknown"] and not found["absent"]
    if (arch, name) not in UNEVEN:
        assert found["first_not_identical"] is None, found["verdict"]


@pytest.mark.parametrize("arch", architectures.SHAPES)
@pytest.mark.parametrize("wtype", ["Q8_0", "Q4_0", "F16"])
def test_quantised_weights_give_llama_cpps_bits(path, arch, wtype):
    """The first shape of each, in formats whose blocks the matrices that are fused are cut at too."""
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'", exc_type=ImportError)
    from tinymia_lab.comparison.llama_comparison import verify

    model = tinymia.load(path(arch, next(iter(architectures.SHAPES[arch])), wtype=wtype), threads=1)
    found = verify(model, prompt(41), n_predict=2)
    assert found["verdict"].startswith("equal") and not found["unknown"], found["verdict"]
    assert found["first_not_identical"] is None, found["verdict"]


@EVERY
def test_in_float64_it_is_what_the_naive_reference_computes(path, arch, name):
    file, ids = path(arch, name), prompt(41)
    model = tinymia.load(file, numerics="plain", dtype="float64", n_ctx=longer(arch, name))
    got, want = tensors(model, ids), naive.forward(naive.read(file), ids, n_ctx=longer(arch, name))
    assert list(got) == list(want) == list(model.table)
    rounded = any(r.gain != 1 for r in model.config.ropes)      # YaRN's gain is float32, as in llama.cpp
    for tensor in got:
        assert nmse(got[tensor], want[tensor]) <= (1e-13 if rounded else 1e-26), tensor


@EVERY
def test_the_kernels_compute_the_same(path, arch, name):
    """numerics f32 and plain, with every step named and, for the logits, with attention in one."""
    ids, n_ctx = prompt(41), longer(arch, name)
    fast, plain = (tinymia.load(path(arch, name), threads=1, numerics=n, n_ctx=n_ctx) for n in ("f32", "plain"))
    got, want = tensors(fast, ids), tensors(plain, ids)
    assert list(got) == list(want)
    for tensor in got:
        assert nmse(got[tensor], want[tensor]) <= 1e-9, tensor
    for model in (fast, plain):
        named = model.run(ids, keep=["all"])
        assert nmse(model.run(ids).logits, named.logits) <= 1e-10
        assert all(named[n].shape == tuple({**model.config.sizes(), "n_tok": 41, "n_kv": 41}[d] for d in op.dims)
                   for n, (op, _) in model.table.items())


@EVERY
def test_a_cache_continues_the_sequence(path, arch, name):
    """The parts end before a window, inside it, and after it."""
    model, ids = tinymia.load(path(arch, name), threads=1, numerics="f32", n_ctx=longer(arch, name)), prompt(41)
    whole, cache = model.run(ids).logits, model.cache()
    parts = [model.run(ids[a:b], cache=cache).logits for a, b in ((0, 3), (3, 4), (4, 30), (30, 41))]
    assert nmse(np.concatenate(parts), whole) <= 1e-10


def test_a_name_that_a_layer_does_without_says_which_layer_has_it(path):
    model = tinymia.load(path("smollm3", "every fourth layer without RoPE"), threads=1)
    with pytest.raises(tinymia.UnknownName, match=r"'Qcur-3': layer 3 of this model does without it; .* Qcur-0"):
        model.run(prompt(3), keep="Qcur-3")
    with pytest.raises(tinymia.UnknownName, match="'Qcur-5': this model has layers 0 to 4"):
        model.run(prompt(3), keep="Qcur-5")


def test_a_number_of_layers_stands_for_a_llama(path):
    assert tinymia.name_table(2) == tinymia.name_table(tinymia.load(path("llama", "plain", n_layer=2)).config)
