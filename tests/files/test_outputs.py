"""Writing loses nothing: no input is overwritten, links and modes stay, and errors come before the run."""
import errno
import json
import os
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
from conftest import command, nobody

import tinymia
from tinymia_files import check_apart, check_target, write_atomic, write_tensors
from tinymia_lab.commands.steer import steer
from tinymia_lab.commands.trace import trace
from tinymia_lab.runs.result import model_hash

LINKS = {"itself": lambda a, b: a, "hard link": lambda a, b: (os.link(a, b), b)[1],
         "symlink": lambda a, b: (b.symlink_to(a), b)[1]}


@pytest.fixture
def file(tiny, tmp_path):
    """A model to be kept."""
    return shutil.copy(tiny(), tmp_path / "m.gguf")


def refused(path, *args, words=("cannot be written",)):
    """The command ends with one line of error, and the file is as it was."""
    before = path.read_bytes()
    status, _, err = command(*map(str, args))
    last = err.strip().split("\n")[-1]
    assert status == 2 and last.startswith("error: ") and "Traceback" not in err, err
    assert all(word in last for word in words), err
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", LINKS)
def test_no_output_goes_onto_the_model(file, tmp_path, how):
    there = LINKS[how](file, tmp_path / "other.gguf")
    before, model = file.read_bytes(), tinymia.load(file, threads=1)
    for call in (lambda: model.run([1, 5], actions=[tinymia.Save("l_out-0", there)]),
                 lambda: write_tensors(there, {"x": np.ones(3, np.float32)}, {}),
                 lambda: write_atomic(there, lambda f: f.write(b"x")), lambda: check_target(there)):
        with pytest.raises(tinymia.Error, match="cannot be written: the model that is loaded"):
            call()
    assert file.read_bytes() == before


def test_no_part_of_a_split_model_is_written_onto(tiny, tmp_path):
    from test_split import cut

    parts = cut(tiny(), tmp_path, [range(8), range(8, 21)])
    model = tinymia.load(parts[1], threads=1)
    for part in parts:
        with pytest.raises(tinymia.Error, match="the model that is loaded"):
            model.run([1, 5], actions=[tinymia.Save("l_out-0", part)])


def test_results_are_not_written_onto_the_model(tiny, tmp_path):
    path = shutil.copy(tiny(), tmp_path / "m.npz")      # no kind of name makes a model writable
    model = tinymia.load(path, threads=1)
    with pytest.raises(tinymia.Error, match="the model that is loaded"):
        trace(model, [1, 5], out=path)
    with pytest.raises(tinymia.Error, match="the model that is loaded"):
        trace(model, [1, 5]).save(path)


@pytest.mark.parametrize("how", LINKS)
def test_no_output_goes_onto_a_source_of_an_action(model, tmp_path, how):
    source = tmp_path / "a.npy"
    model.run([1, 5, 6], actions=[tinymia.Save("l_out-0", source)])
    before, there = source.read_bytes(), LINKS[how](source, tmp_path / "b.npy")
    for action in (tinymia.Patch("l_out-0", source), tinymia.Patch("l_out-0", (source, source), 0, at=1),
                   tinymia.Add("l_out-0", str(source), row=1), tinymia.Add("l_out-0", (source, source), row=1)):
        with pytest.raises(tinymia.Error, match="read in this run"):
            model.run([1, 5, 6], actions=[action, tinymia.Save("l_out-1", there)])
    assert source.read_bytes() == before


def test_no_result_goes_onto_what_it_is_made_of(model, tmp_path):
    out = tmp_path / "v.npz"
    steer(model, positive=[[1, 5]], negative=[[1, 6]], out=out)
    with pytest.raises(tinymia.Error, match="read in this run"):
        steer(model, [1, 5], vector=out, n=1, out=out)
    source = tmp_path / "s.npz"
    model.run([1, 5], actions=[tinymia.Save("l_out-0", source)])
    with pytest.raises(tinymia.Error, match="read in this run"):
        trace(model, [1, 5], actions=[tinymia.Patch("l_out-0", source)], out=source)


def test_two_outputs_are_two_files(model, tmp_path):
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    b.symlink_to(a)
    for one, two in ((a, a), (a, tmp_path / "." / "a.npy"), (a, b)):
        with pytest.raises(tinymia.Error, match="two outputs would go there"):
            check_apart([one, two])
    check_apart([a, tmp_path / "c.npy", os.devnull, os.devnull])
    with pytest.raises(tinymia.Error, match="two outputs"):
        model.run([1, 5], actions=[tinymia.Save("l_out-0", a), tinymia.Save("l_out-1", b)])
    model.run([1, 5], actions=[tinymia.Save(name, tmp_path / "x.npz") for name in ("l_out-0", "l_out-1")])
    with np.load(tmp_path / "x.npz") as f:
        assert {"l_out-0", "l_out-1"} <= set(f.files)


@pytest.mark.parametrize("args", [
    ["-m", "M", "-p", "x", "--save", "l_out-0", "M"], ["-m", "M", "-p", "x", "--draw", "P"],
    ["-m", "M", "-f", "P", "--save", "l_out-0", "P"], ["-m", "M", "-p", "x", "--patch", "l_out-0", "P", "--draw", "P"],
    ["-m", "M", "-p", "x", "--patch-avg", "l_out-0", "Q", "P", "0", "0", "--save", "l_out-1", "P"],
    ["lens", "-m", "M", "-f", "P", "-o", "P"], ["steer", "-m", "M", "--positive", "P", "--negative", "Q", "-o", "P"],
    ["steer", "-m", "M", "--vector", "P", "-p", "x", "-o", "P"], ["attend", "-m", "M", "-f", "P", "--scores", "P"],
    ["task-vector", "-m", "M", "P", "-o", "P"], ["function-vector", "-m", "M", "P", "-o", "P"],
    ["verify", "-m", "M", "-f", "P", "--record", "P"], ["steer", "-m", "M", "-p", "x", "-o", "M"],
    ["lens", "-m", "M", "-p", "x", "-o", "O", "-o", "O"],
    ["-m", "M", "-p", "x", "--draw", "O", "--save", "l_out-0", "O"],
], ids=" ".join)
def test_every_command_looks_at_its_files_first(file, tmp_path, args, capsys):
    from tinymia_lab.cli import main

    kept = tmp_path / "p.npz"
    (tmp_path / "q.npz").write_bytes(b"")
    if "P" in args[-2:] and ["--draw", "P"] == args[-2:] and args.count("P") == 1:
        args = [*args[:-1], "M"]
    kept.write_bytes(b"precious")
    before, names = file.read_bytes(), {"M": str(file), "P": str(kept), "Q": str(tmp_path / "q.npz"),
                                        "O": str(tmp_path / "new.npz")}
    assert main([names.get(a, a) for a in args]) == 2
    err = capsys.readouterr().err.strip()
    assert err.count("\n") == 0 and ("read in this run" in err or "two outputs" in err), err
    assert file.read_bytes() == before and kept.read_bytes() == b"precious"


def test_links_are_followed_and_modes_kept(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_atomic(link, lambda f: f.write(b"new"))
    assert link.is_symlink() and target.read_bytes() == b"new" and stat.S_IMODE(target.stat().st_mode) == 0o640
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "later")
    write_atomic(dangling, lambda f: f.write(b"new"))
    assert dangling.is_symlink() and (tmp_path / "later").read_bytes() == b"new"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "later").stat().st_mode) == 0o666 & ~mask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "later", "link", "target"]


def test_what_cannot_be_written_is_said_before_the_run(tmp_path):
    locked = tmp_path / "locked"
    locked.write_bytes(b"x")
    locked.chmod(0o444)
    ring = tmp_path / "ring"
    ring.symlink_to(ring)
    for path, word in ((locked, "permission to write"), (tmp_path / ("x" * 256), "name too long"),
                       (ring, "symbolic links"),
                       (tmp_path / "a b" / "x", f"mkdir -p '{tmp_path}/a b'"), (tmp_path, "is a folder"),
                       (locked / "x", "ot a directory"), ("a\0b", "NUL"), ("\ud800", "cannot be the name"),
                       (3, "cannot be the name")):
        with pytest.raises(tinymia.Error, match="(?i)" + word):
            check_target(path)
    check_target(tmp_path / ("x" * 255))
    write_atomic(tmp_path / ("x" * 255), lambda f: f.write(b"long"))
    assert locked.read_bytes() == b"x" and (tmp_path / ("x" * 255)).read_bytes() == b"long"


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path):
    (tmp_path / "x").write_bytes(b"old")

    def full(f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(tinymia.Error, match="No space left"):
        write_atomic(tmp_path / "x", full)
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"
    if os.path.exists("/dev/full"):
        with pytest.raises(tinymia.Error, match="No space left"):
            write_atomic("/dev/full", lambda f: f.write(b"x" * 100000))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs os.geteuid, which Linux and macOS have")
def test_an_ordinary_user_writes_to_devices_and_to_own_files_in_closed_folders(tmp_path):
    own = tmp_path / "closed" / "own"
    own.parent.mkdir()
    own.write_bytes(b"older and longer")
    own.chmod(0o666)
    fifo = tmp_path / "closed" / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    for folder in (own.parent, *own.parent.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o005 == 0o005:
            folder.chmod(folder.stat().st_mode | 0o055)
    own.parent.chmod(0o555)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with nobody():
        for path in (own, fifo, os.devnull):
            check_target(path)
            write_tensors(path, {"x": np.ones(2, np.float32)}, {})
        with pytest.raises(tinymia.Error, match="no permission to make a file"):
            check_target(own.parent / "new")
    assert own.read_bytes() == os.read(reader, 100) == np.ones(2, "<f4").tobytes()
    os.close(reader)


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="needs /dev/stdout, which Linux and macOS have")
def test_dev_stdout_is_where_stdout_goes(tmp_path):
    code = ("from tinymia_files import write_atomic; print('before'); "
            "write_atomic('/dev/stdout', lambda f: f.write(b'bytes ')); print('after')")
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    with open(tmp_path / "f", "wb") as f:
        subprocess.run([sys.executable, "-c", code], stdout=f, check=True)
    assert piped == (tmp_path / "f").read_bytes() == b"before\nbytes after\n"
    code = f"from tinymia_files import check_target; check_target({str(tmp_path / 'f')!r})"
    with open(tmp_path / "f", "wb") as f:
        p = subprocess.run([sys.executable, "-c", code], stdout=f, stderr=subprocess.PIPE, text=True)
    assert "stdout or stderr goes there already" in p.stderr


def test_a_folder_that_was_deleted_is_told(tmp_path):
    code = ("import os, sys, tinymia; from tinymia_files import check_target; os.mkdir('d'); os.chdir('d'); "
            "os.rmdir('../d')\ntry: check_target('x.npy')\nexcept tinymia.Error as e: print(e)")
    p = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert p.stdout == "x.npy: cannot be written: its folder was deleted\n", p


def test_a_tilde_stands_for_a_home_or_for_itself(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(tiny(), tmp_path / "m.gguf")
    model = tinymia.load("~/m.gguf", threads=1)
    model.run([1, 5], actions=[tinymia.Save("l_out-0", "~/x.npy")])
    assert (tmp_path / "x.npy").exists()
    monkeypatch.chdir(tmp_path)
    model.run([1, 5], actions=[tinymia.Save("l_out-0", "~nosuchuser.npy")])
    model.run([1, 5], actions=[tinymia.Patch("l_out-0", "~nosuchuser.npy")])
    for load in (tinymia.load, lambda p: model.run([1, 5], actions=[tinymia.Patch("l_out-0", p)]),
                 lambda p: steer(model, [1, 5], vector=p)):
        with pytest.raises(tinymia.Error, match="~nosuch"):
            load("~nosuchuser/m.gguf")


# ---------------------------------------------------------------------------------------- which bytes a result is of


def test_the_hash_is_of_the_bytes_that_are_mapped(tiny, tmp_path, file):
    first = model_hash(tinymia.load(file, threads=1))
    model = tinymia.load(file, threads=1)
    os.replace(shutil.copy(tiny(), tmp_path / "n.gguf"), file)   # another inode
    assert model_hash(model) == first
    file.unlink()
    assert model_hash(model) == first


def test_a_file_that_was_written_to_is_not_vouched_for(file):
    model = tinymia.load(file, threads=1)
    with open(file, "r+b") as f:
        f.seek(-4, 2)
        f.write(b"abcd")
    os.utime(file, (1, 1))
    with pytest.raises(tinymia.Error, match="written to after it was loaded"):
        model_hash(model)
    again = tinymia.load(file, threads=1)
    with open(file, "r+b") as f:
        f.truncate(os.path.getsize(file) - 32)
    with pytest.raises(tinymia.Error, match="written to after it was loaded"):
        model_hash(again)


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="needs Linux: names of files are bytes there")
def test_a_model_whose_name_is_not_utf8(drawn, tiny, tmp_path):
    path = os.fsencode(tmp_path) + b"/m\xff.gguf"
    shutil.copy(tiny(), path)
    model, out = tinymia.load(os.fsdecode(path), threads=1), tmp_path / "r.json"
    trace(model, [1, 5]).save(out)
    assert json.loads(out.read_bytes().decode("utf-8"))["about"]["model"]["path"].endswith("m\ufffd.gguf")
    from tinymia_lab.pictures.draw import draw

    draw({0: np.ones((1, 2, 2), np.float32)}, tmp_path / "x.png", ["a", "b"], model.path.name)
    assert {"m\ufffd.gguf", "a", "b"} <= {*drawn(tmp_path / "x.png").words}


def test_json_holds_no_nan_or_infinity(model, tmp_path, capsys):
    from tinymia_files import dumps
    from tinymia_lab.cli import main

    def never(text):
        raise AssertionError(text)

    # The last row of the logits must be finite: a row before it, cut off from it by its own keys, is not.
    source = tmp_path / "x.npy"
    np.save(source, np.full((1, model.config.n_embd), np.nan, np.float32))
    assert main(["-m", str(model.path), "-p", "a b", "-n", "1", "--json", "--patch", "l_out-1", str(source), "0", "0",
                 "--log", "l_out", "--ll", "l_out", "2"]) == 0
    out = json.loads(capsys.readouterr().out, parse_constant=never)
    assert out["log"][1]["mean"] is None and out["log"][0]["mean"] is not None
    assert json.loads(dumps({"x": [np.nan, np.inf, -np.inf, np.float32("nan"), 1.5]}), parse_constant=never) == {
        "x": [None] * 4 + [1.5]}


@pytest.mark.skipif(os.name == "nt", reason="needs locales such as C, which Linux and macOS have")
def test_a_prompt_is_utf8_in_every_locale(tiny):
    for env in ({}, {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}):
        p = subprocess.run([sys.executable, "-m", "tinymia", "-m", str(tiny()), "-p", "é", "-n", "0", "--json"],
                           env={**os.environ, **env}, capture_output=True, cwd=os.path.dirname(tinymia.__file__))
        assert p.returncode == 0 and json.loads(p.stdout)["prompt"] == "é", p.stderr


def test_attention_pages_have_a_limit_that_is_told_before_the_run(tiny, tmp_path):
    from tinymia_lab.pictures.attention_page import MOST, check_size

    check_size(30, 9, 300)
    with pytest.raises(tinymia.Error, match=r"30 layers and 9 heads on 1191 tokens .* choose layers, 3 or so"):
        check_size(30, 9, 1191)
    with pytest.raises(tinymia.Error, match="some heads"):
        check_size(1, 32, 2000)
    assert MOST == 24_000_000


def test_patterns_that_take_too_much_memory_are_told_before_the_run(model, tmp_path, monkeypatch):
    from tinymia_lab.commands import attend as module

    monkeypatch.setattr(module.Model, "run", lambda *args, **how: pytest.fail("it ran"))
    monkeypatch.setattr(module, "MOST_KEPT", 4 * 4 * 9)             # one layer of this model on three tokens
    monkeypatch.setattr(module, "MOST_LISTED", 2 * 9)
    with pytest.raises(tinymia.Error, match=r"2 layers and 4 heads on 3 tokens take 0\.0 GB of memory"):
        module.attend(model, [1, 5, 6])
    with pytest.raises(tinymia.Error, match="one layer and some heads"):
        module.attend(model, [1, 5, 6, 7], layers=[0])
    with pytest.raises(tinymia.Error, match=r"numbers in JSON, where .*\(an .npz file holds more\): choose one"):
        module.attend(model, [1, 5, 6], layers=[0], out=tmp_path / "x.json")
    monkeypatch.undo()
    whole = ("-p", "France ->" * 30, "--json")
    monkeypatch.setattr(module, "MOST_LISTED", 1000)
    assert tinymia.main(["attend", *whole]) == 2
    assert module.attend(model, [1, 5, 6], kept=None).previous.shape == (2, 4)


def test_patterns_are_kept_as_small_as_their_use_allows(model):
    from tinymia_lab.commands.attend import attend

    whole, half, none = (attend(model, [1, 5, 6, 5], kept=kept) for kept in ("float32", "float16", None))
    assert whole.patterns.dtype == np.float32 and half.patterns.dtype == np.float16 and not none.patterns.size
    np.testing.assert_array_equal(half.patterns, whole.patterns.astype(np.float16))
    for name in ("previous", "first", "induction", "induction_here"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(half, name))
        np.testing.assert_array_equal(getattr(whole, name), getattr(none, name))


def test_a_saved_result_makes_no_lists_of_its_arrays(model, tmp_path, monkeypatch):
    import tinymia_files.disk as disk
    from tinymia_lab.commands.attend import attend

    found, plain = attend(model, [1, 5, 6]), disk.plain

    def watched(value):
        assert not isinstance(value, np.ndarray)
        return plain(value)

    monkeypatch.setattr(disk, "plain", watched)
    monkeypatch.setattr("tinymia_lab.runs.result.plain", watched)
    found.save(tmp_path / "x.npz")
    np.testing.assert_array_equal(type(found).load(tmp_path / "x.npz").patterns, found.patterns)
