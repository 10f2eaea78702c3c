"""python -m bench: quick mode, what is computed of the numbers, and what it says when something is wrong."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest

import tinymia
from bench import __main__ as command
from bench import machine, measure, report, theirs
from bench.measure import Goal, Row, pairs
from bench.ours import Ours, prompt

ROOT = Path(__file__).parents[2]
LIVE = importlib.util.find_spec("llama_cpp") is not None
live = pytest.mark.skipif(not LIVE, reason="needs llama.cpp: pip install 'tinymia[verify]'")


@pytest.fixture
def bench(monkeypatch, capsys):
    """bench(flags...): (status, stdout, stderr) in this process, with a small array for the bandwidth."""
    bandwidth = machine.Bandwidth
    monkeypatch.setattr(machine, "Bandwidth", lambda n_bytes: bandwidth(1 << 20))
    monkeypatch.setattr(measure, "PAUSE", 0)

    def run(*flags):
        status = command.main([*map(str, flags), "--quick", "--repeats", "1"])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


@pytest.fixture
def no_llama_cpp(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


def table(text):
    """The cells of the table's rows."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_quick_mode_measures_every_part(tmp_path):
    """But `first`, which compiles every kernel: see below."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    only = ",".join(part for part in measure.PARTS if part != "first")
    flags = ["--quick", "--only", only, "--threads", "1", "--repeats", "1", "--out", tmp_path / "out"]
    p = subprocess.run([sys.executable, "-m", "bench", *flags], cwd=ROOT, env=env, capture_output=True, text=True)
    assert p.returncode == (0 if LIVE else 1), p.stderr
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    measures = [row["measure"] for row in found["rows"]]
    assert measures == ["small", "prefill 32", "start", "memory", "keep", "long 40", "long 40 memory",
                        "long 80", "long 80 memory"]
    assert [cells[0] for cells in table(p.stdout)] == measures
    assert p.stdout == (tmp_path / "out.md").read_text("utf-8")
    assert (tmp_path / "out.png").exists()                # what it shows is tested below
    assert all(x > 0 for row in found["rows"] for x in row["ours"] + row["theirs"])
    for row in found["rows"] if LIVE else []:
        assert row["theirs"] and row["ratio"] == [a / b for a, b in zip(row["ours"], row["theirs"])]
    about = found["about"]
    assert about["command"].startswith("python -m bench --quick") and about["bandwidth"]["1"] > 1e8
    assert {"date", "cpu", "cores", "tinymia", "python", "numba"} <= about.keys() and about["cpu"] in p.stdout


def test_pairs_take_turns_and_do_not_count_the_first_call(monkeypatch):
    monkeypatch.setattr(measure, "PAUSE", 0)
    calls = []
    ours, theirs, after = pairs(3, *(lambda side=side: calls.append(side) or len(calls) for side in "abc"))
    assert "".join(calls) == "ab" "abc" "bac" "abc"
    assert (ours, theirs, after) == ([3, 7, 9], [4, 6, 10], [5, 8, 11])
    assert pairs(2, lambda: 1, None) == ([1, 1], [], [])


def test_rows_and_their_goals():
    row = Row("decode", "m", 2, "tok/s", [30.0, 20.0, 50.0], [20.0, 20.0, 20.0], Goal("ratio", "≥", 1.5),
              bandwidth=[40e9, 40e9, 40e9], bytes_read=10**9)
    assert row.ratio == [1.5, 1.0, 2.5] and row.met is True
    assert row.ceiling == [40, 40, 40] and row.of_ceiling == [0.75, 0.5, 1.25]
    assert table(f"| head |\n{report.line(row)}") == [
        ["decode", "m", "2", "tok/s", "30", "20", "1.50", "1.00 to 2.50", "75%", "≥ 1.5 x", "yes"]]
    memory = Row("memory", "m", 1, "MB", [838.0], [], Goal("ours", "≤", 837.0))
    assert memory.met is False and "**no**" in report.line(memory)
    assert Row("decode", "m", 1, "tok/s", [1.0], [], Goal("ratio", "≥", 1.0)).met is None


def test_the_chart_has_a_pair_of_bars_for_each_model_and_the_ceiling_of_the_memory(drawn, tmp_path):
    rows = [Row("decode", name, 2, "tok/s", ours, [20.0, 20.0], bandwidth=[40e9, 40e9], bytes_read=10**9)
            for name, ours in (("small.gguf", [30.0, 32.0]), ("large.gguf", [10.0, 10.0]))]
    report.chart(tmp_path / "x.png", {"bandwidth": {2: 40e9}, "cpu": "a CPU", "date": "2026-11-25T01:02"}, rows)
    picture = drawn(tmp_path / "x.png")
    (axes,) = picture.figure.axes
    assert {"small.gguf", "large.gguf", "2 threads, 40 GB/s", "tokens per second", "Decoding, a CPU, 2026-11-25",
            "tinymia", "llama.cpp", "memory ceiling", "31", "20", "10"} <= {*picture.words}
    blue, grey, white = ([*bytes.fromhex(c[1:])] for c in (report.BLUE, report.GREY, "#ffffff"))
    for y, ours in ((0, 31), (1, 10)):                    # the first model stands on top, ours above theirs
        assert picture.pixel(axes, ours - 1, y - 0.25) == blue and picture.pixel(axes, 19, y + 0.25) == grey
    assert picture.pixel(axes, 12.5, 0.75) == white
    assert picture.pixel(axes, 40, 0.3) == picture.pixel(axes, 40, 1) == [0] * 3
    assert axes.transData.transform((0, 0))[1] > axes.transData.transform((0, 1))[1]


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_decoded_token_are_all_weights_but_the_embedding(tiny, tied):
    ours = Ours(Path(tiny(wtype="Q8_0", tied=tied)), 1)
    weights = ours.model.weights
    rest = sum(w.nbytes for name, w in weights.items() if name != "token_embd.weight")
    assert ours.bytes_read == rest + (weights["token_embd.weight"].nbytes if tied else 0)


def test_decode_makes_the_passes_it_is_asked_for(monkeypatch):
    ours, seen = Ours(Path(tinymia.load().path), 1), []
    forward = tinymia.forward
    monkeypatch.setattr(tinymia, "forward", lambda m, ids, *args: seen.append(len(ids)) or forward(m, ids, *args))
    assert ours.decode(prompt(5, 100), 3) > 0
    assert seen == [5, 1, 1, 1]


def test_a_process_is_measured_apart_from_what_starts_it():
    big = np.ones(300 << 20, np.uint8)  # in memory here; Linux would count it into the peak of a child
    slow = "import time; time.sleep(.2); print(1, flush=True); time.sleep(.2)"
    took = machine.spawn([sys.executable, "-S", "-c", slow])
    assert 0.2 < took.first < took.total - 0.19 and 3e6 < took.peak < 1e8 < big.nbytes
    with pytest.raises(tinymia.Error, match=r"failed with status 3: so it is"):
        machine.spawn([sys.executable, "-S", "-c", "import sys; print('so it is', file=sys.stderr); sys.exit(3)"])


def test_the_first_run_finds_no_kernels(bench, no_llama_cpp, tiny, monkeypatch):
    found = []

    def spawn(command, env=None):
        found.append((command, os.listdir(env["NUMBA_CACHE_DIR"])))
        return machine.Spawned(1.0, 2.0, 3)

    monkeypatch.setattr(measure, "spawn", spawn)
    model = tiny()
    _, out, _ = bench("-m", model, "--only", "first", "-t", "1")
    assert [(command[1:3], command[4], files) for command, files in found] == [(["-m", "tinymia"], Path(model), [])]
    assert [(cells[0], cells[4]) for cells in table(out)] == [("first", "2")]


def test_bandwidth_counts_every_byte():
    assert machine.read(np.arange(1000, dtype=np.int64)) == 499500
    assert machine.Bandwidth(1 << 20)(2) > 1e7


@live
def test_llama_cpp_gets_the_same_tokens(tmp_path):
    model = tinymia.load()
    program = theirs.compile_program(tmp_path)
    best = {f"#{n}": model.run(prompt(n, model.config.n_vocab)) for n in (2, 5, 9, 20, 40, 80)}
    best[measure.TEXT] = model.run(measure.TEXT)
    for text, run in best.items():
        out = subprocess.run([program, model.path, "1", text], capture_output=True, text=True, check=True).stdout
        assert out.rstrip("\n") == model.piece(int(run.logits[-1].argmax()))


# ------------------------------------------------------------------------------------------------ what is wrong


def test_without_llama_cpp_ours_is_measured(bench, no_llama_cpp):
    status, out, err = bench("--only", "small,start", "-t", "1")
    assert status == 1 and out.count("no llama.cpp to compare with: pip install 'tinymia[verify]'") == 1
    assert [(cells[0], cells[5], cells[6]) for cells in table(out)] == [("small", "–", "–"), ("start", "–", "–")]
    assert "Traceback" not in err


def test_a_model_that_does_not_load_is_named_and_the_next_one_runs(bench, no_llama_cpp, tmp_path, tiny):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    status, out, _ = bench("-m", broken, "-m", tmp_path / "none.gguf", "-m", tiny(), "--only", "small,keep", "-t", "1")
    assert status == 1 and [cells[0] for cells in table(out)] == ["small", "keep"]
    assert out.count(f"{broken}: not measured: ") == 1 and out.count(f"{tmp_path / 'none.gguf'}: not measured: ") == 1
    assert bench("-m", broken, "--only", "keep", "-t", "1")[0] == 2


def test_a_model_that_does_not_fit_is_not_loaded(bench, no_llama_cpp, tiny, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: (10**6, 1000))
    status, out, _ = bench("-m", tiny(), "--only", "keep", "-t", "1")
    assert status == 2 and "needs 0.00 GB of memory, and 0.00 GB are free" in out


@live
def test_llama_cpp_that_does_not_fit_is_left_out(bench, tiny, monkeypatch):
    size = Path(tiny()).stat().st_size
    monkeypatch.setattr(machine, "memory", lambda: (2 * size, 2 * size - 1))
    status, out, _ = bench("-m", tiny(), "--only", "prefill", "-t", "1")
    assert status == 1 and "llama.cpp, which keeps a second copy of the weights, needs" in out
    assert table(out)[0][5] == "–"


@pytest.mark.parametrize("wrong", ["0", "-1", "x", "", "100000", "1.5"])
def test_a_wrong_thread_count_is_named_and_the_others_run(bench, no_llama_cpp, tiny, wrong):
    status, out, _ = bench("-m", tiny(), "--only", "keep", f"--threads={wrong},1")
    assert status == 1 and [cells[2] for cells in table(out)] == ["1"]
    assert f"--threads {wrong or '(nothing)'}: it must be 1 to {machine.cpus()}" in out
    status, out, err = bench("-m", tiny(), f"--threads={wrong}")
    assert (status, out) == (2, "") and "it must be 1 to" in err


def test_a_prompt_that_does_not_fit_is_said_and_is_no_failure(bench, no_llama_cpp, tiny, monkeypatch):
    monkeypatch.setattr(command, "QUICK", measure.Sizes(prefill=(8, 600), decode=4, small=4))
    model = tiny()
    _, out, _ = bench("-m", model, "--only", "prefill", "-t", "1")
    assert [cells[0] for cells in table(out)] == ["prefill 8"]
    assert f"{Path(model).stem}: no prompt of 600 tokens: its context has room for 512" in out


def test_a_part_that_fails_leaves_the_others(bench, no_llama_cpp, tiny, monkeypatch):
    def fail(command, env=None):
        raise tinymia.Error("python failed with status 3: so it is")

    monkeypatch.setattr(measure, "spawn", fail)
    status, out, _ = bench("-m", tiny(), "--only", "start,keep", "-t", "1")
    assert status == 1 and [cells[0] for cells in table(out)] == ["keep"]
    assert "1 threads, start: python failed with status 3: so it is" in out


@pytest.mark.parametrize(("flags", "words"), [
    (["--only", "speed"], "--only speed: the parts are decode"),
    (["--out", "/no/such/folder/x"], "there is no folder"),
])
def test_flags_that_cannot_be(bench, flags, words):
    status, out, err = bench(*flags)
    assert (status, out) == (2, "") and words in err


def test_ctrl_c_prints_what_was_measured(bench, no_llama_cpp, tiny, monkeypatch):
    def interrupt(case):
        raise KeyboardInterrupt

    monkeypatch.setitem(measure.PARTS, "keep", interrupt)
    status, out, _ = bench("-m", tiny(), "--only", "prefill,keep", "-t", "1")
    assert status == 130 and table(out)[0][0] == "prefill 32" and "interrupted" in out


@live
def test_quantise_makes_files_of_other_formats(tiny, capsys, monkeypatch):
    from bench import quantise

    source = tiny(wtype="F16", seed=5)
    monkeypatch.setattr(sys, "argv", ["quantise", source, "Q8_0"])
    assert quantise.main() == 0
    made = capsys.readouterr().out.strip()
    assert {w.type_name for w in tinymia.load(made).weights.values() if len(w.shape) == 2} >= {"Q8_0"}
    monkeypatch.setattr(sys, "argv", ["quantise", source, "Q9"])
    assert quantise.main() == 2 and capsys.readouterr().err.startswith("error: Q9: llama.cpp makes ")


@pytest.mark.parametrize("argv", [
    ["verify_figures.py"], ["verify_figures.py", "--decoding"], ["quantise.py", "x.gguf", "Q4_0"],
    ["sweep.py", "no.gguf"], ["sweep.py", "model.gguf", "--at", "99"],
], ids=" ".join)
def test_every_script_without_llama_cpp_or_with_a_wrong_flag_ends_with_one_line(tiny, tmp_path, argv):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('not here')")
    argv = [tiny() if word == "model.gguf" else word for word in argv]
    path = os.pathsep.join(map(str, [tmp_path, ROOT / "tests", ROOT]))
    ran = subprocess.run([sys.executable, str(ROOT / "bench" / argv[0]), *argv[1:]], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": path}, timeout=100)
    assert ran.returncode == 2 and ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1, ran.stderr


def test_a_random_model_has_the_shape_of_a_real_one(tmp_path, monkeypatch, capsys):
    """It has as many weights, values about 1 in every layer, and the same seed gives the same file."""
    from bench import random_model

    sizes = {name: sum(int(np.prod(shape)) for shape, _ in random_model.tensors(shape).values())
             for name, shape in random_model.SHAPES.items()}
    assert sizes["tinyllama"] == 1_100_048_384 and sizes["llama2-7b"] == 6_738_415_616      # as their authors count
    monkeypatch.setattr(random_model, "N_VOCAB", 512)
    paths = [str(tmp_path / f"{i}.gguf") for i in range(2)]
    for path in paths:
        monkeypatch.setattr(sys, "argv", ["random_model", path, "small"])
        assert random_model.main() == 0
    a, b = (Path(path).read_bytes() for path in paths)
    model = tinymia.load(paths[0], threads=1)
    assert len(model.tokenize(measure.TEXT)) == 6
    run = model.run(prompt(9, 512), keep=["l_out", "result_norm"])
    assert a == b and model.config.n_head_kv == 2 and model.config.n_vocab == 512
    assert {w.type_name for w in model.weights.values()} == {"F16", "F32"}
    assert all(0.2 < np.sqrt(np.mean(run[name] ** 2)) < 5 for name in run)
    monkeypatch.setattr(sys, "argv", ["random_model", str(tmp_path / "no" / "x.gguf"), "small"])
    capsys.readouterr()     # of compiling, where kernels are new
    assert random_model.main() == 2 and capsys.readouterr().err.startswith("error: ")


@live
def test_the_table_of_decoding(tmp_path, monkeypatch, capsys):
    """It is the table of docs/verify.md, here for one format and two prompts."""
    from bench import verify_figures as figures

    monkeypatch.setattr(figures, "SCRIPTS", ["法国的首都是"])
    monkeypatch.setattr(figures, "LLAMA2", ["Hello world"])
    monkeypatch.setattr(figures, "GENERATED", 8)
    monkeypatch.setattr(sys, "argv", ["verify_figures", "--decoding", "--only", "Q4_K_S"])
    assert figures.main() == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | Q4_K_S | " in line]
    assert [(line[0], line[2], line[3], line[6]) for line in lines] == [
        ("| d64g4", "2", "2", "2 |"), ("| d80g2", "2", "2", "2 |")]
    if llvmlite.binding.get_host_cpu_features().get("avx512f"):
        assert all(len(set(line[5].split(" of "))) == 1 for line in lines), lines


def test_gradients_are_timed(monkeypatch, capsys, tiny):
    """A row for each numerics and number; with torch two more."""
    from bench import gradients

    torch = ["--torch"] * (importlib.util.find_spec("torch") is not None)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["gradients", tiny(), "--tokens", "6", "--repeats", "1", *torch])
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert gradients.main() == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 + 2 * len(torch) and all(" 6 tokens  forward " in row and row.endswith(" x") for row in rows)
