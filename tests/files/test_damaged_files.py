"""Whatever a file holds, its reader gives a value or one tinymia.Error: any bytes, valid files mutated, renamed."""
import io
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinymia
from tinymia_files import read_gguf, read_text, write_tensors
from tinymia_files.tensors import read_tensors
from tinymia_lab.commands.steer import Steering, steer
from tinymia_lab.comparison.recording import fingerprint, read_recording
from tinymia_lab.measure.control_vector import read_control_vector, write_control_vector
from tinymia_lab.measure.prompt_sets import read_prompts
from tinymia_lab.measure.task_files import read_task

ODD = Path(__file__).parents[3] / "shared" / "odd-files"
HOW = {"flash": False, "repack": False, "actions": []}
budget = settings(max_examples=150, deadline=None, derandomize=True,
                  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def readers(model, tmp_path_factory):
    """Valid files with their readers, by name."""
    folder = tmp_path_factory.mktemp("valid")
    rng, c = np.random.default_rng(0), model.config
    rows = rng.normal(size=(3, c.n_embd)).astype(np.float32)
    about = {"model": model.about, "prompt": "a", "tokens": [1, 5, 6]}
    for name in ("t.npy", "t.npz", "t.raw"):
        write_tensors(folder / name, {"l_out-0": rows}, about)
    np.savez_compressed(folder / "c.npz", **{"l_out-0": np.zeros((3, c.n_embd), np.float32)}, about=json.dumps(about))
    for name in ("r.npz", "r.json"):
        steer(model, [1, 5], positive=[[1, 5]], negative=[[1, 6]], n=1, out=folder / name)
    (folder / "task.json").write_text(json.dumps({"pairs": [["a", "b"], ["c", "d"]], "shots": 2}))
    (folder / "set.txt").write_bytes("one\r\ntwo\rthree é\n".encode())
    write_control_vector(folder / "v.gguf", {1: rows[0]}, "llama", {})
    said = {"version": "1", "tokens": [1, 5, 6], "output": [], "absent": [], "steps": {}, "unknown": {},
            "names": {"l_out-0": "l_out-0"}, "weights": fingerprint(model), **HOW}
    write_tensors(folder / "rec.npz", {"l_out-0": rows}, {**about, "llama.cpp": said})
    shutil.copy(model.path, folder / "m.gguf")

    def patch(path):
        return model.run([1, 5, 6], actions=[tinymia.Patch("l_out-0", path)])

    return folder, {
        "t.npy": patch, "t.npz": patch, "c.npz": patch, "t.raw": patch, "r.npz": Steering.load, "r.json": Steering.load,
        "task.json": read_task, "set.txt": read_prompts, "v.gguf": lambda p: read_control_vector(p, c),
        "rec.npz": lambda p: read_recording(p, model, [1, 5, 6], HOW, 0), "m.gguf": lambda p: read_gguf(Path(p)),
    }


NAMES = ["t.npy", "t.npz", "c.npz", "t.raw", "r.npz", "r.json", "task.json", "set.txt", "v.gguf", "rec.npz", "m.gguf"]


def value_or_error(read, path):
    """Read a file; the message of its Error, if there is one."""
    try:
        with np.errstate(all="ignore"):
            read(path)
    except tinymia.Error as e:
        assert "\n" not in str(e) and len(str(e)) <= 800
        return str(e)
    return ""


@st.composite
def mutations(draw):
    """Changes to a file's bytes: places are fractions of its length, so that they shrink with it."""
    place = st.floats(0, 1, exclude_max=True)
    kind = draw(st.sampled_from(["flip", "cut", "insert", "zero", "drop", "text"]))
    return kind, draw(place), draw(place), draw(st.binary(min_size=1, max_size=12))


def mutated(data, changes):
    for kind, a, b, more in changes:
        i, j = sorted((int(a * len(data)), int(b * len(data))))
        if kind == "cut":
            data = data[:j]
        elif kind == "flip":
            data = data[:i] + bytes(x ^ y for x, y in zip(data[i:], more)) + data[i + len(more):]
        elif kind == "insert":
            data = data[:i] + more + data[i:]
        elif kind == "zero":
            data = data[:i] + bytes(min(j - i, 200)) + data[i + min(j - i, 200):]
        elif kind == "drop":
            data = data[:i] + data[i + min(j - i, 40):]
        else:
            words = [b"[", b"{", b"null", b"-1", b"1e999", b'"x"', b"NaN", b"true", b"99999999999999999999"]
            data = data[:i] + words[more[0] % len(words)] + data[i:]
    return data


@pytest.mark.parametrize("name", NAMES)
@given(changes=st.lists(mutations(), min_size=1, max_size=4))
@budget
def test_a_mutated_file_is_a_value_or_an_error(readers, tmp_path, name, changes):
    folder, read = readers
    path = tmp_path / name
    path.unlink(missing_ok=True)    # a new inode: what is mapped stays as it is
    path.write_bytes(mutated((folder / name).read_bytes(), changes))
    value_or_error(read[name], path)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.binary(max_size=300), head=st.integers(0, 200))
@settings(budget, max_examples=60)
def test_arbitrary_bytes_are_a_value_or_an_error(readers, tmp_path, name, data, head):
    folder, read = readers
    path = tmp_path / name
    path.unlink(missing_ok=True)
    path.write_bytes((folder / name).read_bytes()[:head] + data)
    value_or_error(read[name], path)


@pytest.mark.parametrize("name", NAMES)
def test_a_renamed_file_is_a_value_or_an_error(readers, tmp_path, name):
    folder, read = readers
    for other in NAMES:
        path = tmp_path / other / name
        path.parent.mkdir()
        shutil.copy(folder / other, path)
        message = value_or_error(read[name], path)
        if name == "t.raw" and other.endswith((".npy", ".npz", ".gguf")):
            assert "not raw float32" in message
        if Path(name).suffix != Path(other).suffix and name != "t.raw" and name != "set.txt":
            assert str(path) in message
    for no_file in (tmp_path / "none" / name, tmp_path, Path("~nosuchuser") / name, Path("a\0b")):
        assert value_or_error(read[name], no_file)


@pytest.mark.parametrize("name", NAMES)
def test_the_valid_files_are_read(readers, name):
    folder, read = readers
    read[name](folder / name)


def test_json_without_end_is_an_error(readers, tmp_path):
    _, read = readers
    deep = "[" * 100_000
    (tmp_path / "deep.json").write_text(deep)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((3, 4), np.float32))
    (tmp_path / "deep.npy").write_bytes(buffer.getvalue() + deep.encode())
    np.savez(tmp_path / "deep.npz", about=np.array(deep), result=np.array(deep))
    for reader, name in (("task.json", "deep.json"), ("r.json", "deep.json"), ("t.npy", "deep.npy"),
                         ("r.npz", "deep.npz"), ("t.npz", "deep.npz"), ("rec.npz", "deep.npz")):
        assert name in value_or_error(read[reader], tmp_path / name)


def test_sizes_are_looked_at_before_room_is_made(tmp_path):
    def header(shape):
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        text += " " * (-(len(text) + 11) % 64) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()

    for shape in ((1 << 40, 4), (1 << 62, 1 << 62), (-1, 4), (-2, -8)):
        (tmp_path / "x.npy").write_bytes(header(shape) + b"1234" * 64)
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as z:
            z.writestr("a.npy", header(shape) + b"1234" * 64)
        for name in ("x.npy", "x.npz"):
            with pytest.raises(tinymia.Error, match=r"takes|shape"):
                read_tensors(tmp_path / name)


def test_zips_that_cannot_be_read_are_errors(readers, tmp_path):
    folder, read = readers
    data = bytearray((folder / "t.npz").read_bytes())
    local, central = data.index(b"PK\3\4"), data.index(b"PK\1\2")
    for name, at, value in (("encrypted", (local + 6, central + 8), 1), ("method 99", (local + 8, central + 10), 99)):
        bad = bytearray(data)
        for i in at:
            bad[i : i + 2] = struct.pack("<H", value)
        (tmp_path / "x.npz").write_bytes(bad)
        for reader in ("t.npz", "rec.npz", "r.npz"):
            message = value_or_error(read[reader], tmp_path / "x.npz")
            assert "x.npz: not a saved" in message and (name != "encrypted" or "encrypted with a password" in message)


@pytest.mark.skipif(not ODD.is_dir(), reason="needs odd-files of the folder `shared` beside the project")
def test_odd_saved_tensors_are_read_or_refused_by_all_readers(readers):
    _, read = readers
    for path in sorted(ODD.glob("*.np[yz]")):
        for name, reader in read.items():
            message = value_or_error(reader, path)
            assert message or name in ("set.txt", "t.raw", "m.gguf"), (path, name)


# ---------------------------------------------------------------------------------------- texts


def test_a_byte_order_mark_is_dropped_and_told(tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfFrance ->\n")
    assert read_text(path, "the prompt") == "France ->\n" and "byte order mark" in capsys.readouterr().err
    assert read_prompts(path) == ["France ->"]
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + b'[["a", "b"]]')
    assert read_task(tmp_path / "t.json").pairs == (("a", "b"),)


def test_line_ends_stay_in_a_prompt_and_are_equal_in_a_set(tmp_path):
    from argparse import Namespace

    from tinymia_lab.flags.arguments import read_prompt

    path = tmp_path / "p.txt"
    for data, text in ((b"a\r\nb\r\n", "a\r\nb"), (b"a\rb\n", "a\rb"), (b"a\n\n", "a\n"), (b"a\r", "a\r")):
        path.write_bytes(data)
        assert read_prompt(Namespace(file=str(path), prompt=None, escapes=False, keep_line_end=False)) == text
    path.write_bytes(b"a\r\nb\rc\n\r\n d\x0be")
    assert read_prompts(path) == ["a", "b", "c", " d\x0be"]


@pytest.mark.parametrize("kind", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_told_as_such(tmp_path, kind):
    (tmp_path / "p.txt").write_bytes("Egypt -> Cairo".encode(kind))
    with pytest.raises(tinymia.Error, match="looks like UTF-16"):
        read_text(tmp_path / "p.txt", "the prompt")


def test_a_result_goes_on_from_no_other_model(model, tiny, tmp_path):
    path, out = shutil.copy(tiny(), tmp_path / "m.gguf"), tmp_path / "r.json"
    steer(tinymia.load(path, threads=1), positive=[[1, 5]], negative=[[1, 6]], out=out)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    os.unlink(path)
    path.write_bytes(data)
    with pytest.raises(tinymia.Error, match="model sha256"):
        steer(tinymia.load(path, threads=1), positive=[[1, 5]], negative=[[1, 6]], out=out)
