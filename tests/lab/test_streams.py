"""The streams of the output: closed, missing, full, or replaced; and texts from files, cleaned."""
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from test_cli import environment
from tiny import vocabulary, write_gguf

import tinymia
from tinymia_files import note, printable
from tinymia_lab.pictures.heatmap import Heatmap
from tinymia_lab.pictures.page import write_page
from tinymia_lab.pictures.terminal import fixed, screen, signed, table
from tinymia_lab.runs.progress import Progress
from tinymia_lab.runs.streams import Stream, is_terminal, json_safe

P = ["-p", "France ->"]
COMMANDS = [
    [*P, "-n", "1"], ["lens", *P], ["attend", *P], ["attribute", *P], ["trace", *P], ["report", *P, "-n", "1"],
    ["sweep", "--clean", "France ->", "--corrupt", "Italy ->", "--layers", "3"], ["ablate", *P, "--layers", "3"],
    ["task-vector", "country-capital", "--n-dev", "1", "--n-test", "1", "--shots", "2"],
    ["function-vector", "country-capital", "--n-mean", "1", "--n-effect", "1", "--n-test", "1", "--shots", "2"],
    ["steer", *P, "--positive", "examples/capitals.txt", "--negative", "examples/countries.txt", "-n", "1"],
    ["story", "--clean", "Egypt -> Cairo, France ->", "--corrupt", "Egypt -> Cairo, Norway ->"],
    ["verify", "--self", *P, "--only", "norm"], ["--list-models"], ["task-vector", "--list"],
]


def shell(redirect, *argv):
    """(status, stdout, stderr) of the command with a redirection of bash, in the project's folder."""
    line = " ".join(["exec", "\"$0\"", "-m", "tinymia", *(f'"${i + 1}"' if i < 9 else f'"${{{i + 1}}}"'
                                                          for i in range(len(argv))), redirect])
    p = subprocess.run(["bash", "-c", line, sys.executable, *argv], capture_output=True, timeout=300,
                       cwd=Path(__file__).parents[2], env=environment())
    return p.returncode, p.stdout.decode(), p.stderr.decode()


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: argv[0] if argv[0] != "-p" else "tinymia")
def test_a_closed_stream_does_not_spoil_the_other(argv):
    """No line moves to the other stream, JSON stays JSON, and the exit status stays the same."""
    status, out, err = shell("", *argv, "--json")
    assert status == 0 and json.loads(out), err
    assert shell("2>&-", *argv, "--json")[:2] == (0, out) or argv[0] == "verify"   # its JSON has seconds
    again, nothing, told = shell(">&-", *argv)
    assert again == 0 and nothing == "" and "Traceback" not in told and "error" not in told
    assert "output:" not in told and not told.startswith("{")
    if argv[0] in ("-p", "lens"):
        assert shell(">&- 2>&- <&-", *argv) == (0, "", "")


@pytest.mark.parametrize("redirect", ["2>&-", ">&- 2>&-", "2>/dev/full"])
def test_errors_without_stderr_keep_their_status(redirect):
    assert shell(redirect, "-m", "absent.gguf", *P) == (2, "", "")
    assert shell(redirect, "lens", "--nonsense") == (2, "", "")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["lens", "--help"], ["--list-models"]], ids=" ".join)
def test_a_full_stdout_is_told_whatever_is_printed(argv):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which Linux has")
    assert shell(">/dev/full", *argv) == (2, "", "error: the output cannot be written: No space left on device\n")


def test_a_full_stderr_does_not_stop_the_work():
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which Linux has")
    assert shell("2>/dev/full", *P, "-n", "1") == (0, 'output: " Italy"\n', "")
    status, _, err = shell(">/dev/full", "lens", *P)
    assert status == 2 and err.splitlines()[-1].startswith("error: the output cannot be written: No space left")


def test_a_saved_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    file = tmp_path / "x.npy"
    assert shell(">&- 2>&- <&-", *P, "-n", "1", "--save", "l_out-3", str(file)) == (0, "", "")
    assert np.load(file).shape == (3, 128)


class Bare:
    """A stream as a GUI puts it in place of stdout: it has a method to write, and no others."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


@pytest.mark.parametrize("argv", [
    [*P, "-n", "1"], ["lens", *P], ["ablate", *P, "--layers", "3"], ["verify", "--self", *P],
], ids=lambda argv: argv[0])
def test_streams_that_are_none_or_bare_objects(argv, monkeypatch):
    bare, notes = Bare(), Bare()
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", bare)
        m.setattr(sys, "stderr", notes)
        assert tinymia.main(argv) == 0 and sys.stdout is bare and sys.stderr is notes
        m.setattr(sys, "stderr", None)
        first, bare.text = bare.text, ""
        assert tinymia.main([*argv, "--json"]) == 0 and json.loads(bare.text)
        m.setattr(sys, "stdout", None)
        assert tinymia.main(argv) == 0
        closed = io.StringIO()
        closed.close()
        m.setattr(sys, "stdout", closed)
        m.setattr(sys, "stderr", object())
        assert tinymia.main(argv) == 0 and tinymia.main(["--nonsense"]) == 2
    assert len(first) > 10 and "no -m: the bundled model copycat runs" in notes.text


def test_in_python_notes_and_bars_need_no_stderr(monkeypatch, capsys):
    for stream in (None, object(), Bare()):
        with monkeypatch.context() as m:
            m.setattr(sys, "stderr", stream)
            note("a line")
            with Progress(2, "look") as bar:
                bar.step()
            m.setattr(sys, "stdout", stream)
            assert screen()[1] is False
    assert capsys.readouterr().out == "" and stream.text == "a line\n"
    assert not is_terminal(None) and not is_terminal(io.StringIO())


# ------------------------------------------------------------------------------------------------ cleaning

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202edlrow\u2066\r\x00\ud800"


def test_control_characters_do_not_reach_a_terminal():
    assert printable("ab→é漢 \U0001f600") == "ab→é漢 \U0001f600" and printable("a\tb", "\t") == "a\tb"
    clean = printable(HOSTILE)
    assert len(clean) == len(HOSTILE) and not set(clean) & set("\x1b\x07\x9b\u202e\u2066\r\x00\ud800")
    assert printable("\n") == "\ufffd" and str(tinymia.Error("a\nb")) == "a\ufffdb"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_stream_lets_only_our_own_sequences_through():
    for inner in (io.StringIO(), Terminal()):
        stream = Stream(inner)
        stream.write(f"{HOSTILE}\n\x1b[31mred")
        assert not set(inner.getvalue()) & set("\x1b\x07\x9b\u202e\u2066\r\x00\ud800"), inner
    terminal = Terminal()
    cell = "\x1b[48;2;10;20;30;97mcell\x1b[0m"
    Stream(terminal).write(f"\r{cell}\x1b[K")
    assert terminal.getvalue() == f"\r{cell}\x1b[K"
    pipe = io.StringIO()
    Stream(pipe).write(cell)
    assert "\x1b" not in pipe.getvalue()


def test_generated_text_is_cleaned_for_a_terminal_only():
    pipe, terminal = io.StringIO(), Terminal()
    for inner in (pipe, terminal):
        Stream(inner).as_it_is("a\x1b[31m\u202eb\n")
    assert pipe.getvalue() == "a\x1b[31m\u202eb\n" and terminal.getvalue() == "a\ufffd[31m\ufffdb\n"


def test_json_is_the_same_data_and_harms_no_terminal():
    data = {"a": f"{HOSTILE[:-1]}\U000e0041\u200d漢"}
    text = json_safe(json.dumps(data, ensure_ascii=False))
    assert json.loads(text) == data and not set(text) & set("\x1b\x9b\u202e\u2066\U000e0041") and "漢" in text


def test_pictures_and_tables_and_pages(tmp_path):
    heatmap = Heatmap(np.zeros((1, 1)), [HOSTILE], [HOSTILE], HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    for text in (heatmap.terminal(80, False), heatmap.title, heatmap.unit):
        assert not set(text) & set("\x1b\x07\x9b\u202e\u2066\r\x00\ud800")
    assert table([["a\nb", HOSTILE]]).count("\n") == 0
    write_page(tmp_path / "x.html", f"<p>{HOSTILE}\n</p>")
    page = (tmp_path / "x.html").read_text("utf-8")
    assert page.endswith("\n</p>") and not set(page) & set("\x1b\x07\x9b\u202e\u2066\r\x00")


NAMES = [["--list-tensors"], ["-p", "Once", "-n", "0", "-v", "--ll", "l_out", "3"], ["--print-cgraph"],
         ["lens", "-p", "Once"], ["attend", "-p", "Once"], ["trace", "-p", "Once"], ["attribute", "-p", "Once"],
         ["report", "-p", "Once", "-n", "1"]]


@pytest.mark.parametrize("argv", NAMES, ids=lambda argv: argv[0])
@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_hostile_file_says_reaches_no_terminal(tmp_path, argv, terminal):
    """Names of tensors and of the model, pieces: escape sequences in a file's own words."""
    if terminal and sys.platform == "win32":
        pytest.skip("needs pseudo-terminals, which Linux and macOS have")
    words = HOSTILE.replace("\0", "").replace("\ud800", "")
    pieces = [*vocabulary(384)[0]]      # a copy: the list is shared
    pieces[300:380] = [f"{words}{i}" for i in range(80)]
    path = write_gguf(tmp_path / "hostile.gguf", meta={"general.name": words, "tokenizer.ggml.tokens": pieces})
    argv = [sys.executable, "-m", "tinymia", *argv, "-m", path]
    env = environment(NO_COLOR="1", PYTHONDONTWRITEBYTECODE="1")
    if not terminal:
        p = subprocess.run(argv, capture_output=True, env=env, timeout=300)
        found, output, _ = p.stdout.partition(b"output:") if argv[3] == "-p" else (p.stdout, b"output:", b"")
        out = found + p.stderr      # the text that the model writes goes into a pipe as it is
        assert p.returncode == 0 and output and b"Traceback" not in out
    else:
        ours, theirs = pty.openpty()
        p = subprocess.Popen(argv, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        out = b""
        try:
            while part := os.read(ours, 65536):
                out += part
        except OSError:     # Linux: the other end is closed
            pass
        os.close(ours)
        assert p.wait(60) == 0, out
        out = out.replace(b"\r\n", b"\n").replace(b"\x1b[K", b"").replace(b"\r", b"")
    text = out.decode()
    assert argv[3] not in ("lens", "trace") or "\ufffd" in text     # the file's words do hold such characters
    assert len(text) > 20 and not set(text) & {*map(chr, range(0x80, 0xa0)), *map(chr, range(32))} - {"\n"}, ascii(text)


# ------------------------------------------------------------------------------------------------ labels, zeros


def test_the_corner_tells_what_columns_of_bare_numbers_are():
    heads = Heatmap(np.array([[0.5, -0.004]]), ["0"], ["0", "1"], "t", "head", "layer", "u")
    assert heads.terminal(80, False).splitlines()[2].split() == ["layer", "\\", "head", "0", "1"]
    assert "<th class=corner>layer \\ head" in heads.html()
    tokens = Heatmap(np.array([[0.5]]), ["0"], [" a"], "t", "token", "layer", "u")
    assert tokens.corner == "layer"


def test_a_cell_is_never_minus_zero():
    heatmap = Heatmap(np.array([[-0.004, 0.5]]), ["0"], ["0", "1"], "t", "head", "layer", "u", diverging=True)
    assert [heatmap.text(0, j) for j in (0, 1)] == ["0.00", "0.50"]
    assert (signed(-1e-9), signed(-0.5), signed(0.0, 3), signed(2)) == ("+0.0000", "-0.5000", "+0.000", "+2.0000")
    assert (fixed(-0.004), fixed(-0.006), fixed(0.0), fixed(12.345, 1)) == ("0.00", "-0.01", "0.00", "12.3")


def test_a_hostile_name_in_an_error_is_clean(capsys):
    """A tensor that the Llama architecture lacks is refused by its name."""
    assert tinymia.main(["-m", shared("odd-files/escname.gguf"), "--list-tensors"]) == 2
    err = capsys.readouterr().err
    assert "evil\ufffd[31m" in err and not set(err) & {*map(chr, range(32))} - {"\n"}
