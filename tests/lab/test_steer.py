"""Steering against plain means and Add actions, its control vectors against gguf-py's reader and against llama.cpp."""
import json
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from conftest import command, shared
from naive import nmse
from rawgguf import Raw

import tinymia
from tinymia_lab.commands import steer
from tinymia_lab.comparison import llama
from tinymia_lab.measure import prompt_sets
from tinymia_lab.measure.control_vector import ABOUT, read_control_vector, write_control_vector

POSITIVE = ["Egypt -> Cairo, Norway -> Oslo, Estonia ->", "Peru -> Lima, Italy -> Rome, Japan ->", "Spain -> Madrid ->"]
NEGATIVE = ["Estonia ->", "Japan ->"]
PROMPT = "France ->"


@pytest.fixture(scope="module")
def found(copycat):
    return steer.steer(copycat, PROMPT, POSITIVE, NEGATIVE, layers=[2], coef=[1, 2], n=4)


def pool(run, il, how):
    rows = run[f"l_out-{il}"].astype(np.float64)
    return rows[-1] if how == "last" else rows.sum(0) / len(rows)


@pytest.mark.parametrize("how", ["last", "mean"])
def test_the_vector_is_the_difference_of_means(copycat, how):
    found = steer.steer(copycat, positive=POSITIVE, negative=NEGATIVE, pool=how)
    runs = [[copycat.run(p, keep=["l_out"]) for p in prompts] for prompts in (POSITIVE, NEGATIVE)]
    for il in range(copycat.config.n_layer):
        a, b = (np.mean([pool(run, il, how) for run in side], axis=0) for side in runs)
        np.testing.assert_allclose(found.vectors[il], a - b, rtol=0, atol=1e-5 * np.abs(a - b).max())
    assert found.layers == [3] and found.plain is None and found.texts == []


@pytest.mark.parametrize("when", ["prompt", "decode", "all"])
def test_the_texts_are_those_of_add_actions(copycat, found, when):
    again = steer.steer(copycat, PROMPT, vector=found.vectors, layers="2,4", coef=[1.5, -40], when=when, n=5)
    for said, coef in zip(again.texts, (1.5, -40)):
        add = [tinymia.Add(f"l_out-{il}", found.vectors[il], coef, when=when) for il in (2, 4)]
        assert said == {"coef": coef, "text": (want := copycat.generate(PROMPT, 5, add)).text, "tokens": want.tokens}
    assert again.plain == copycat.generate(PROMPT, 5).text
    assert again.plain_tokens != again.texts[1]["tokens"]
    assert (again.plain_tokens[0] == again.texts[1]["tokens"][0]) == (when == "decode")


def test_the_vector_makes_copycat_name_capitals(found):
    """Without the vector, copycat continues the list of countries."""
    assert found.plain.startswith(" Italy") and found.texts[0]["text"].startswith(" Paris")


def test_a_run_that_ends_with_its_first_token_has_nothing_to_steer_while_decoding(copycat, monkeypatch):
    monkeypatch.setattr(copycat.tokenizer, "end", {copycat.generate(PROMPT, 1).tokens[0]})
    vectors = np.ones((copycat.config.n_layer, copycat.config.n_embd), np.float32)
    found = steer.steer(copycat, PROMPT, vector=vectors, when="decode", n=5)
    assert len(found.plain_tokens) == 1 and found.texts[0]["tokens"] == found.plain_tokens


# ---------------------------------------------------------------------------------------- files


def test_a_control_vector_is_what_llama_cpp_reads(copycat, found, tmp_path):
    path = tmp_path / "v.gguf"
    directions = {il: found.vectors[il] for il in (1, 4, 5)}
    write_control_vector(path, directions, "llama", found.about)
    reader = gguf.GGUFReader(path)
    fields = {key: reader.fields[key].contents() for key in reader.fields}
    assert fields["general.architecture"] == "controlvector" and fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 3
    assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.INT32]
    assert json.loads(fields[ABOUT]) == found.about
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.4", "direction.5"]
    for tensor, direction in zip(reader.tensors, directions.values()):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.shape.tolist() == [128]
        np.testing.assert_array_equal(tensor.data, direction)
    back = read_control_vector(path, copycat.config)
    assert list(back) == [1, 4, 5] and all(np.array_equal(back[il], directions[il]) for il in back)


def test_every_kind_of_file_gives_the_same_texts(copycat, found, tmp_path):
    for name in ("v.npz", "v.json"):
        found.save(tmp_path / name)
    write_control_vector(tmp_path / "v.gguf", found.directions(), "llama", found.about)
    for name in ("v.npz", "v.json", "v.gguf"):
        again = steer.steer(copycat, PROMPT, vector=tmp_path / name, coef=[1, 2], n=4)
        assert again.layers == [2] and again.texts == found.texts
    with pytest.raises(tinymia.Error, match=r"no direction for layer 3; it has those of \[2\]"):
        steer.steer(copycat, PROMPT, vector=tmp_path / "v.gguf", layers=[2, 3])


def test_layer_0_has_no_direction(found, tmp_path):
    with pytest.raises(tinymia.Error, match="begin at layer 1"):
        write_control_vector(tmp_path / "v.gguf", {0: found.vectors[0], 1: found.vectors[1]}, "llama", {})
    assert not (tmp_path / "v.gguf").exists()


def spoilt(path, folder):
    """Files that are wrong in one way each: (what is said of it, path)."""
    raw = Raw.read(path)

    def named(name):
        g = raw.copy()
        g.tensors[1].name = name    # was direction.3
        return g

    for says, wrong in (
        ("'direction.0'", named("direction.0")),
        ("'direction.x'", named("direction.x")),
        ("'direction.-1'", named("direction.-1")),
        ("'token_embd.weight'", named("token_embd.weight")),
        ("direction.6: the model's layers are 0 to 5", named("direction.6")),
        ("occurs twice", named("direction.2")),
        ("direction.3 is F16; it must be F32", raw.tensor("direction.3", kind=1)),
        ("direction.3 is [64]; the model's layers are [128] wide", raw.tensor("direction.3", dims=(64,))),
        ("direction.2 is [2, 128]", raw.drop("direction.3").tensor("direction.2", dims=(128, 2))),
        ("not finite", Raw(raw.kv, raw.tensors, np.full(256, np.nan, "<f4").tobytes())),
        ("without directions", raw.drop("direction.2", "direction.3")),
        ("is None, not 'controlvector'", raw.drop("general.architecture")),
        ("is 'llama', not 'controlvector'", raw.set("general.architecture", 8, "llama")),
        ("the file at", Raw(raw.kv, raw.tensors, raw.data[:-4])),
    ):
        yield says, wrong.write(folder / "wrong.gguf")
    for says, data in (("not a GGUF file", b"not a control vector"), ("the file is empty", b"")):
        (folder / "wrong.gguf").write_bytes(data)
        yield says, str(folder / "wrong.gguf")
    yield "No such file", str(folder / "none.gguf")


def test_malformed_control_vectors_are_one_line(copycat, found, tmp_path):
    path = tmp_path / "v.gguf"
    write_control_vector(path, {il: found.vectors[il] for il in (2, 3)}, "llama", {})
    for says, wrong in spoilt(path, tmp_path):
        with pytest.raises(tinymia.Error) as e:
            steer.steer(copycat, PROMPT, vector=wrong)
        assert says in str(e.value) and wrong in str(e.value) and "\n" not in str(e.value), (says, str(e.value))


def test_a_cut_control_vector_never_passes(copycat, found, tmp_path):
    path = tmp_path / "v.gguf"
    write_control_vector(path, {1: found.vectors[1]}, "llama", {})
    data = path.read_bytes()
    for n in range(0, len(data) - 1, 7):
        path.write_bytes(data[:n])
        says = "the file is empty|ends inside |claims .* more than it has room for|tensor direction.1 ends at "
        with pytest.raises(tinymia.Error, match=rf"v\.gguf: ({says})"):
            read_control_vector(path, copycat.config)


# ---------------------------------------------------------------------------------------- llama.cpp


def as_llama_cpp_reads(path, strength):
    """The buffer of common_control_vector_load_one: float32 [layers from 1 on, n_embd], read with gguf-py."""
    tensors = gguf.GGUFReader(path).tensors
    n_embd = int(tensors[0].shape[0])
    data = np.zeros((max(int(t.name.removeprefix("direction.")) for t in tensors), n_embd), np.float32)
    for t in tensors:
        data[int(t.name.removeprefix("direction.")) - 1] += t.data * np.float32(strength)
    return data


def llama_cpp_steered(model, ids, data, n, **how):
    """llama.cpp's l_out of all layers and its logits, and n greedy tokens, with a control vector."""
    found, held = {}, np.ascontiguousarray(data).reshape(-1)

    def setup(llama_cpp, context):
        pointer = held.ctypes.data_as(llama_cpp.ctypes.POINTER(llama_cpp.ctypes.c_float))
        last = llama_cpp.llama_model_n_layer(llama_cpp.llama_get_model(context))     # as common_init_from_params
        assert llama_cpp.llama_set_adapter_cvec(context, pointer, held.size, data.shape[1], 1, last) == 0

    wanted = {"result_output", *(f"l_out-{il}" for il in range(model.config.n_layer))}
    outcome = llama.compute(model, ids, None, wanted, lambda name, x: None,
                            lambda item: found.setdefault(item.name, item.value), threads=1, flash=False,
                            repack=False, n=n, setup=setup, **how)
    assert found.keys() == wanted
    return found, outcome.output


@pytest.mark.parametrize(("name", "layers", "limit"), [
    ("copycat", [3], 1e-4), ("copycat", [1, 2, 5], 1e-4), ("stories", [2], 1e-6), ("stories", [1, 2, 3, 4], 1e-6),
], ids=str)
def test_llama_cpp_with_the_file_gives_our_logits(tmp_path, name, layers, limit):
    """Limits as in test_llama.py: 1e-6 from F32 weights, 1e-4 from quantised ones. On AVX-512 all are the same bits."""
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'", exc_type=ImportError)
    model = tinymia.load(None if name == "copycat" else shared("models/stories260K-f32.gguf"), threads=1)
    sets = (POSITIVE, NEGATIVE) if name == "copycat" else (["A happy girl", "The sun was warm and"],
                                                           ["A sad boy", "It was dark"])
    prompt = "Egypt -> Cairo, Norway ->" if name == "copycat" else "Once upon a time there was"
    path, coef, n = tmp_path / "v.gguf", 1.7, 12
    found = steer.steer(model, prompt, *sets, layers=layers, coef=coef, n=n)
    write_control_vector(path, found.directions(), "llama", found.about)
    ids = model.tokenize(prompt)
    theirs, tokens = llama_cpp_steered(model, ids, as_llama_cpp_reads(path, coef), n)
    again = steer.steer(model, prompt, vector=path, coef=coef, n=n)
    ours = model.run(ids, keep=["l_out", "result_output"], actions=steer.steering(again, coef))
    for key, value in theirs.items():
        assert nmse(ours[key], value) <= limit, key
    assert again.texts[0]["tokens"] == tokens
    alone = model.run(ids, keep=["l_out"])
    changed = [il for il in range(model.config.n_layer) if nmse(alone[f"l_out-{il}"], theirs[f"l_out-{il}"]) > 1e-3]
    assert changed == list(range(layers[0], model.config.n_layer))
    assert nmse(alone.logits, theirs["result_output"]) > 1e-3


# ---------------------------------------------------------------------------------------- long runs, errors


def same(a, b):
    equal = all(np.array_equal(x, b.arrays()[name], equal_nan=True) for name, x in a.arrays().items())
    return equal and a.texts == b.texts and a.plain == b.plain


def test_an_executor_gives_the_same(copycat, found):
    with ThreadPoolExecutor(2) as executor:
        assert same(found, steer.steer(copycat, PROMPT, POSITIVE, NEGATIVE, layers=[2], coef=[1, 2], n=4,
                                       executor=executor))


@pytest.mark.parametrize("stop", [2, 4, 6, 7])
def test_a_stopped_run_goes_on_where_it_was(copycat, found, monkeypatch, tmp_path, stop):
    """5 prompts, then a text without and two with the vector."""
    calls, out = [], tmp_path / "run.npz"

    def stopping(function):
        def call(*args):
            calls.append(args)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return function(*args)
        return call

    monkeypatch.setattr(steer, "pooled", stopping(prompt_sets.pooled))
    monkeypatch.setattr(steer, "_say", stopping(steer._say))
    how = {"layers": [2], "coef": [1, 2], "n": 4, "out": out}
    with pytest.raises(KeyboardInterrupt):
        steer.steer(copycat, PROMPT, POSITIVE, NEGATIVE, **how)
    whole = steer.steer(copycat, PROMPT, POSITIVE, NEGATIVE, **how)
    assert len(calls) == 8 + 1 and same(found, whole) and same(whole, steer.Steering.load(out))
    steer.steer(copycat, PROMPT, POSITIVE, NEGATIVE, **how)
    assert len(calls) == 8 + 1
    with pytest.raises(tinymia.Error, match="another run"):
        steer.steer(copycat, PROMPT, POSITIVE, NEGATIVE[:1], **how)


def test_half_a_text_is_not_kept(copycat, found, monkeypatch, tmp_path):
    cut = tinymia.Generation(" It", [5], [1], "interrupted", [], (0.0, 0.0))
    monkeypatch.setattr(tinymia.Model, "generate", lambda *_: cut)
    with pytest.raises(KeyboardInterrupt):
        steer.steer(copycat, PROMPT, vector=found.vectors, out=tmp_path / "run.npz")


@pytest.mark.parametrize(("how", "says"), [
    ({}, "one of the two"), ({"positive": POSITIVE}, "one of the two"),
    ({"positive": POSITIVE, "negative": NEGATIVE, "vector": np.zeros((6, 128))}, "one of the two"),
    ({"positive": POSITIVE, "negative": []}, "the negative prompts are a list of one or more"),
    ({"positive": POSITIVE, "negative": ["a " * 200]}, "prompt 1 of the negative prompts has"),
    ({"vector": np.zeros((5, 128))}, r"is \[5, 128\]; the model's layers are \[6, 128\]"),
    ({"vector": np.full((6, 128), np.nan)}, "no direction for any layer"),
    ({"positive": POSITIVE, "negative": NEGATIVE, "layers": "6"}, "layer 6 is out of range"),
    ({"positive": POSITIVE, "negative": NEGATIVE, "pool": "max"}, "pool 'max'"),
    ({"positive": POSITIVE, "negative": NEGATIVE, "when": "never"}, "when 'never'"),
    ({"positive": POSITIVE, "negative": NEGATIVE, "coef": float("nan")}, "coefficients"),
    ({"positive": POSITIVE, "negative": NEGATIVE, "n": 0}, "n is 0"),
    ({"positive": POSITIVE, "negative": NEGATIVE, "n": 1, "when": "decode"}, "2 or more to have a decoding pass"),
])
def test_what_is_wrong_is_said(copycat, how, says):
    with pytest.raises(tinymia.Error, match=says):
        steer.steer(copycat, PROMPT, **how)


def test_the_command_makes_and_uses_a_vector(tmp_path, capsys):
    for name, prompts in (("positive", POSITIVE), ("negative", NEGATIVE)):
        (tmp_path / name).write_text("\n\n".join(prompts) + "\n")
    sets, made = ["--positive", tmp_path / "positive", "--negative", tmp_path / "negative"], tmp_path / "v.gguf"
    status, out, err = command("steer", *sets, "-p", PROMPT, "--layers", "2", "--coef", -1, 1, "-n", 1, "-o", made)
    assert status == 0, err
    assert '\n2 *  ' in out and out.endswith('\nwithout: " Italy"\ncoef -1: " Italy"\ncoef 1: " Paris"\n')
    assert tinymia.main(["steer", "--vector", str(made), "-p", PROMPT, "-n", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"][0]["text"] == " Paris"
    (tmp_path / "empty").write_text(" \n")
    for args, says in ((["--layers", "0,2", "-o", made], "begin at layer 1: leave 0 out"),
                       (["-o", "x.png"], "the kinds of file are .npz, .json, .gguf"),
                       (["--negative", tmp_path / "empty"], "no prompts: it takes one per line"),
                       (["--negative", tmp_path / "none"], "No such file")):
        assert tinymia.main(["steer", *map(str, [*sets, *args])]) == 2
        out, err = capsys.readouterr()
        error = err.strip().splitlines()[-1]
        assert not out and error.startswith("error: ") and says in error and "Traceback" not in err
