"""The arithmetic written in tinymia.py: it is what numerics="plain" runs, and what the kernels compute."""
import inspect
import subprocess
import sys
from types import SimpleNamespace

import gguf
import naive
import numpy as np
import pytest
from conftest import prompt
from naive import nmse
from test_forward import SHAPES, tensors

import tinymia
import tinymia_kernels
from tinymia_files.types import TYPES

FUNCTIONS = ("embed", "rms_norm", "linear", "linears", "rope_angles", "rope", "scores", "soft_cap", "soft_max", "mix",
             "attention", "silu", "gelu")


def test_the_kernels_have_the_same_functions_with_the_same_arguments():
    for name in FUNCTIONS:
        written, fast = getattr(tinymia, name), getattr(tinymia_kernels.Arithmetic, name)
        want = list(inspect.signature(written).parameters.values())
        got = list(inspect.signature(fast).parameters.values())[1:]
        assert [(p.name, p.kind) for p in got] == [(p.name, p.kind) for p in want], name
    assert all(getattr(tinymia.plain(np.dtype("float32")), name) is getattr(tinymia, name) for name in FUNCTIONS[1:])


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float64_it_is_what_the_naive_reference_computes(tiny, shape):
    path = tiny(**SHAPES[shape])
    model, ids = tinymia.load(path, numerics="plain", dtype="float64"), prompt(9)
    got, want = tensors(model, ids), naive.forward(naive.read(path), ids)
    assert list(got) == list(want) and all(x.dtype == np.float64 for x in got.values())
    for name in got:
        assert nmse(got[name], want[name]) <= 1e-26, name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wtype", ["F32", "Q5_1"])
def test_the_kernels_compute_the_same(tiny, load, shape, wtype):
    how, ids = dict(wtype=wtype, **SHAPES[shape]), prompt(9)
    got, want = (tensors(load(numerics, **how), ids) for numerics in ("f32", "plain"))
    assert list(got) == list(want)
    for name in got:
        assert nmse(got[name], want[name]) <= 1e-11, name


def test_a_cache_continues_the_sequence(load):
    model, ids = load("plain"), prompt(11)
    whole, cache = model.run(ids).logits, model.cache()
    parts = [model.run(ids[a:b], cache=cache).logits for a, b in ((0, 4), (4, 5), (5, 11))]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=2e-4, atol=1e-5)


def test_every_action_works_in_float64(tiny):
    model, ids = tinymia.load(tiny(), numerics="plain", dtype="float64"), prompt(5)
    run = model.run(ids, keep=["l_out-0"])
    assert run["l_out-0"].dtype == np.float64
    for action in (tinymia.Patch("l_out-0", run, src=1, at=-1), tinymia.Ablate("kqv-1", heads=[1], mode="mean"),
                   tinymia.Add("l_out-0", run["l_out-0"][2], 0.1), tinymia.Scale("ffn_out-0", 0.1),
                   tinymia.ProjectOut("l_out-0", run["l_out-0"][2])):
        changed = model.run(ids, actions=action)
        assert changed.logits.dtype == np.float64 and (changed.logits[-1] != run.logits[-1]).any(), action
    third = model.run(ids, keep=["l_out-0"], actions=tinymia.Scale("l_out-0", 0.1))["l_out-0"]
    np.testing.assert_array_equal(third, 0.1 * run["l_out-0"])      # and not by float32's 0.1


HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"numba", "llvmlite", "gguf", "sentencepiece", "tokenizers"}:
            raise ImportError(f"{name} is hidden")
sys.meta_path.insert(0, Hide())
import numpy as np
import tinymia
for path in sys.argv[1:3]:
    model = tinymia.load(path, numerics="plain")
    run = model.run([1, 5, 9, 4], keep=["l_out-0"])
    patched = model.run([1, 5, 9, 4], actions=tinymia.Patch("l_out-0", run, src=1, at=-1))
    print(repr(float(run.logits[-1].sum())), int((patched.logits[-1] != run.logits[-1]).any()))
    print(model.generate([1, 5, 9, 4], n=3).tokens)
    try:
        model.tokenize("Once")
    except tinymia.Error as error:
        print(error)
for path in sys.argv[3:]:
    try:
        tinymia.load(path, numerics="plain").run([1, 5])
    except tinymia.Error as error:
        print(error)
"""


def test_without_numba_gguf_and_sentencepiece_floats_load_and_run(tiny):
    """Only NumPy is there: token ids give logits, actions and new tokens; a package that is missing is named."""
    paths = [tiny(wtype="F32"), tiny(wtype="F16"), tiny(wtype="Q4_0")]
    p = subprocess.run([sys.executable, "-c", HIDDEN, *paths], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    lines = p.stdout.splitlines()
    for path, total, tokens, message in zip(paths, lines[0:6:3], lines[1:6:3], lines[2:6:3]):
        model = tinymia.load(path, numerics="plain")
        assert total == f"{float(model.run([1, 5, 9, 4]).logits[-1].sum())!r} 1"
        assert tokens == str(model.generate([1, 5, 9, 4], n=3).tokens)
        assert "pip install sentencepiece" in message
    assert "Q4_0" in lines[6] and "pip install gguf" in lines[6]


def test_the_table_of_types_is_ggufs_and_the_kernels():
    for kind, t in TYPES.items():
        known = gguf.GGMLQuantizationType(kind)
        assert (t.type, t.name, (t.block_size, t.type_size)) == (kind, known.name, gguf.GGML_QUANT_SIZES[known])
    fields = ("type", "name", "block_size", "type_size")
    kernels = {kind: tuple(getattr(f, x) for x in fields) for kind, f in tinymia_kernels.FORMATS.items()}
    assert kernels == {kind: tuple(t) for kind, t in TYPES.items()}


def test_numerics_and_dtype_that_do_not_go_together(tiny):
    with pytest.raises(tinymia.Error, match=r"dtype 'float64': it must be float32 or, with numerics plain, float64"):
        tinymia.load(tiny(), dtype="float64")
    with pytest.raises(tinymia.Error, match=r"numerics 'fast': it must be one of ggml .*, f32 .*, plain"):
        tinymia.load(tiny(), numerics="fast")
    assert isinstance(tinymia.load(tiny(), numerics="plain").ops, SimpleNamespace)
