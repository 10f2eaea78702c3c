"""Models split over several files, as llama.cpp's gguf-split cuts them."""
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import command, prompt
from rawgguf import Info, Raw

import tinymia
from tinymia_files import read_gguf


def name(folder, no, count, prefix="model"):
    return Path(folder) / f"{prefix}-{no + 1:05}-of-{count:05}.gguf"


def cut(path, folder, groups, prefix="model", total=None):
    """Write the tensors of a model in groups (lists of indices), one file each; the first has the metadata."""
    g = Raw.read(path)
    ends = [*sorted(t.offset for t in g.tensors), len(g.data)]
    for no, group in enumerate(groups):
        part = Raw(list(g.kv) if no == 0 else [], [], b"")
        for i in group:
            t = g.tensors[i]
            part.tensors.append(Info(t.name, t.dims, t.kind, len(part.data)))
            part.data += g.data[t.offset:ends[ends.index(t.offset) + 1]]
        total = sum(map(len, groups)) if total is None else total
        for key, kind, value in (("no", 2, no), ("count", 2, len(groups)), ("tensors.count", 5, total)):
            part = part.set("split." + key, kind, value)
        part.write(name(folder, no, len(groups), prefix))
    return [name(folder, no, len(groups), prefix) for no in range(len(groups))]


@pytest.fixture
def parts(tiny, tmp_path):
    """A model of two layers in three parts of 8, 8 and 5 tensors."""
    n = len(Raw.read(tiny()).tensors)
    assert n == 21
    return cut(tiny(), tmp_path, [range(8), range(8, 16), range(16, 21)])


def refused(path, *words):
    with pytest.raises(tinymia.GGUFError) as e:
        tinymia.load(path)
    text = str(e.value)
    assert text.isprintable() and all(w in text for w in words), text
    return text


@pytest.mark.parametrize("no", range(3))
def test_any_part_names_the_model(parts, model, no):
    """The same model, tensor by tensor and bit for bit."""
    split, ids = tinymia.load(parts[no], threads=1), prompt(9)
    assert split.config == model.config and set(split.weights) == set(model.weights)
    assert all(np.array_equal(split.weights[n].raw, model.weights[n].raw) for n in model.weights)
    assert np.array_equal(split.run(ids).logits, model.run(ids).logits)
    assert split.tokenize("the fox") == model.tokenize("the fox")


def test_the_command_takes_a_part(parts):
    want = command("-m", parts[0], "-p", "the fox", "-n", "2")
    assert want[0] == 0 and command("-m", parts[2], "-p", "the fox", "-n", "2")[:2] == want[:2]


def test_the_first_part_may_hold_no_tensors(tiny, tmp_path, model):
    """gguf-split --no-tensor-first-split."""
    split = tinymia.load(cut(tiny(), tmp_path, [[], range(10), range(10, 21)])[1], threads=1)
    assert np.array_equal(split.run(prompt(5)).logits, model.run(prompt(5)).logits)


@pytest.mark.parametrize("count", [0, 1])
def test_a_merged_model_is_one_file(tiny, tmp_path, count):
    """gguf-split --merge leaves a count of 0 behind; a count of 1 needs no other part, whatever the file is called."""
    g = Raw.read(tiny()).set("split.count", 2, count).set("split.no", 2, 0)
    tinymia.load(g.write(tmp_path / "merged.gguf"))


def test_a_relative_path_and_a_folder_with_dots(parts, tmp_path, monkeypatch):
    (tmp_path / "v1.0-00001-of-00002").mkdir()
    for p in parts:
        shutil.copy(p, tmp_path / "v1.0-00001-of-00002")
    monkeypatch.chdir(tmp_path / "v1.0-00001-of-00002")
    assert tinymia.load(parts[1].name).config.n_layer == 2


def test_nothing_is_read_that_is_not_used(tiny, tmp_path):
    """Each part is mapped: a gigabyte of a weight that is not used costs neither time nor memory."""
    parts = cut(tiny(), tmp_path, [range(8), range(8, 16), range(16, 21)])
    g = Raw.read(parts[1]).set("split.tensors.count", 5, 22)
    g.tensors.append(Info("blk.0.attn_rot_embd.weight", (2**28,), 0, len(g.data)))
    g.write(parts[1])
    with open(parts[1], "r+b") as f:
        f.truncate(parts[1].stat().st_size + 2**30)                       # sparse
    for i in (0, 2):
        Raw.read(parts[i]).set("split.tensors.count", 5, 22).write(parts[i])
    clock = time.process_time()
    _, tensors = read_gguf(parts[0])
    assert time.process_time() - clock < 0.5
    raw = base = tensors["blk.0.attn_rot_embd.weight"].raw
    while base.base is not None and isinstance(base.base, np.ndarray):
        base = base.base
    assert type(base.base).__name__ in ("mmap", "memoryview") and not raw.flags.writeable
    tinymia.load(parts[2])


# ------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("lost", range(3))
@pytest.mark.parametrize("named", range(3))
def test_a_missing_part_is_named(parts, lost, named):
    parts[lost].unlink()
    words = [parts[lost].name] + ([] if lost == named else [f"part {lost + 1} of 3", "missing"])
    refused(parts[named], *words)


def test_a_missing_part_in_one_line_on_stderr(parts):
    parts[1].unlink()
    status, out, err = command("-m", parts[0], "-p", "a")
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and parts[1].name in err


def test_a_part_of_another_model(tiny, parts, tmp_path):
    """Seen by the number of parts or of tensors, by a tensor that is there twice, by one that is missing."""
    (tmp_path / "b").mkdir()
    other = cut(tiny(n_layer=1), tmp_path / "b", [range(4), range(4, 8), range(8, 12)])
    shutil.copy(other[1], parts[1])
    refused(parts[0], parts[1].name, "12 tensors", "21 tensors", parts[0].name)
    refused(parts[1], parts[0].name, "12 tensors", "21 tensors")
    other = cut(tiny(seed=1), tmp_path / "b", [range(8), range(6, 14), range(16, 21)], total=21)
    shutil.copy(other[1], parts[1])
    text = refused(parts[2], parts[0].name, parts[1].name, "also in")
    assert "blk." in text


def test_a_part_under_the_name_of_another(parts):
    shutil.copy(parts[2], parts[1])
    refused(parts[0], parts[1].name, "part 3 of 3", "part 2 of 3")
    text = refused(parts[1], parts[1].name, "part 3 of 3", "-00003-of-00003.gguf")
    assert "name" in text


def test_a_whole_model_under_the_name_of_a_part(tiny, parts):
    shutil.copy(tiny(), parts[1])
    refused(parts[0], parts[1].name, "no part", "part 2 of 3")
    tinymia.load(parts[1])                                                # by itself it is what it is


def test_a_tensor_in_two_parts(tiny, tmp_path):
    parts = cut(tiny(), tmp_path, [range(8), range(7, 16), range(16, 21)], total=21)
    twice = Raw.read(tiny()).tensors[7].name
    refused(parts[0], twice, parts[0].name, parts[1].name)


def test_a_tensor_in_no_part(tiny, tmp_path):
    refused(cut(tiny(), tmp_path, [range(8), range(8, 16), range(17, 21)], total=21)[0], "21", "20", "tensors")


def test_a_name_that_says_nothing(parts, tmp_path):
    """The other parts are found by their names, so a file cannot be opened by a renamed part."""
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    refused(tmp_path / "renamed.gguf", "renamed.gguf", "part 1 of 3", "-00001-of-00003.gguf")


@pytest.mark.parametrize("key, kind, value", [
    ("split.count", 8, "3"), ("split.count", 4, 70000), ("split.count", 5, -3), ("split.count", 6, 3.0),
    ("split.count", 9, (4, [3, 3])), ("split.no", 2, 3), ("split.no", 5, -1), ("split.no", 8, "0"),
    ("split.no", 7, True), ("split.tensors.count", 5, -1), ("split.tensors.count", 10, 2**63),
    ("split.tensors.count", 6, 21.0),
])
def test_wrong_numbers_of_parts_are_refused(parts, key, kind, value):
    Raw.read(parts[0]).set(key, kind, value).write(parts[0])
    refused(parts[0], parts[0].name, key)


@pytest.mark.parametrize("key", ["split.no", "split.tensors.count"])
def test_missing_numbers_of_parts_are_refused(parts, key):
    for p in parts[:2]:
        Raw.read(p).drop(key).write(p)
    refused(parts[0], parts[0].name, key, "missing")
    refused(parts[2], parts[0].name, key, "missing")


def test_an_error_names_the_part_that_is_broken(parts):
    """The other parts are not blamed."""
    whole = parts[1].read_bytes()
    for data, word in ((whole[:-100], "truncated"), (b"", "empty"), (b"GGML" + whole[4:], "not a GGUF")):
        parts[1].write_bytes(data)
        refused(parts[0], parts[1].name, word)


def test_llama_cpp_opens_the_same_files(tiny, parts):
    """The parts made here are ones that llama.cpp takes, and it computes the same from them."""
    C = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'", exc_type=ImportError)
    ids = prompt(5)
    llama = C.Llama(str(parts[0]), n_ctx=32, n_batch=32, n_threads=1, verbose=False, flash_attn=False, logits_all=True)
    llama.eval(ids)
    logits = tinymia.load(parts[2], threads=1).run(ids).logits
    assert (logits.argmax(1) == llama.scores[:5].argmax(1)).all() and np.abs(logits - llama.scores[:5]).max() < 1e-2
