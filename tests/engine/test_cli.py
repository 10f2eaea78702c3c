"""The command, run as a user runs it or through main(argv): what it prints, what it writes, how it fails."""
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import command, nobody

import tinymia

PROMPT = "the quick brown fox"
IMPORT_NAMES = Path(tinymia.__file__).parent


@pytest.fixture
def cli(tiny, capsys):
    """cli(args...): (status, stdout, stderr) of main on the plain tiny model, one thread, 3 tokens."""

    def run(*args, model=None, n=3):
        argv = ["-m", str(model or tiny()), "-t", "1", "-n", str(n), *map(str, args)]
        try:
            status = tinymia.main(argv)
        except SystemExit as e:
            status = e.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def fails(result, *words):
    """Exit 2, nothing on stdout, one last line `error: ...` that names `words`; returns it."""
    status, out, err = result
    lines = err.strip().splitlines()
    assert status == 2 and out == "" and "Traceback" not in err, (out, err)
    assert lines and lines[-1].startswith("error: ") and sum(line.startswith("error:") for line in lines) == 1, err
    for w in words:
        assert str(w) in lines[-1], f"{w!r} is not named in: {lines[-1]}"
    return lines[-1]


# ------------------------------------------------------------------------------------------------ output


def test_output_as_in_the_post(cli, model):
    status, out, err = cli("-p", PROMPT, n=5)
    assert status == 0
    assert out == f'output: "{model.generate(PROMPT, n=5).text}"\n'
    ids = model.tokenize(PROMPT)
    rows = [line.split(None, 2) for line in err.splitlines() if re.match(r"\d+ ", line)]
    assert [(int(a), int(b)) for a, b, _ in rows] == list(enumerate(ids))          # index, id, piece
    assert rows[0][2] == "<s>" and rows[1][2].strip() in ("▁the", "the")


def test_long_and_short_names(cli):
    want = cli("-p", PROMPT)[1]
    assert cli("--prompt", PROMPT)[1] == want
    assert cli("--prompt", PROMPT, "--n-predict", 3, "--threads", 2)[1] == want


def test_lens_to_the_letter(cli, model):
    """`Layer #1 kqv_out-1:`, then one line per position: `0: дар 0.35|oure 0.35|`, two significant digits."""
    for flag in ("--logit-lens", "--ll"):
        status, out, _ = cli("-p", PROMPT, flag, "kqv_out", 3)
        run, want = model.run(PROMPT, keep=["kqv_out"]), []
        for il in range(2):
            want.append(f"Layer #{il} kqv_out-{il}:")
            for i, row in enumerate(model.lens(run[f"kqv_out-{il}"], k=3)):
                want.append(f"{i}: " + "".join(f"{piece} {score:.2g}|" for piece, score in row))
        assert status == 0 and out.splitlines()[:-1] == want and out.splitlines()[-1].startswith('output: "')


def test_the_flag_of_lens_scores_chooses_them(cli, model):
    x = model.run(PROMPT, keep=["l_out-1"])["l_out-1"]
    for score in ("raw", "logit", "prob"):
        out = cli("-p", PROMPT, "--ll", "l_out-1", 1, "--lens-score", score)[1].splitlines()
        piece, value = model.lens(x, 1, score)[2][0]
        assert out[3] == f"2: {piece} {value:.2g}|"
    assert cli("-p", PROMPT, "--ll", "l_out-1", 1)[1].splitlines()[3] == f"2: {piece} {model.lens(x, 1)[2][0][1]:.2g}|"


def test_lens_again_and_again(cli):
    out = cli("-p", PROMPT, "--ll", "l_out-0", 2, "--ll", "kqv_out-1", 1, "--ll", "inp_embd", 1)[1]
    assert [line for line in out.splitlines() if line.endswith(":")] == ["inp_embd:", "Layer #0 l_out-0:",
                                                                         "Layer #1 kqv_out-1:"]


def test_prompt_from_a_file(cli, tmp_path):
    (tmp_path / "p.txt").write_text(PROMPT + "\n")
    want = cli("-p", PROMPT)[1]
    assert cli("-f", tmp_path / "p.txt")[1] == want == cli("--file", tmp_path / "p.txt")[1]
    fails(cli("-f", tmp_path / "absent"), "absent")
    fails(cli("-f", tmp_path), tmp_path)
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    fails(cli("-f", tmp_path / "p.txt"), "p.txt")
    fails(cli("-f", tmp_path / "p.txt", "-p", "x"))


def test_the_flags_of_bos_and_special_tokens_hold(cli):
    def ids(*args):
        return [int(line.split()[1]) for line in cli(*args)[2].splitlines() if re.match(r"\d+ ", line)]

    plain = ids("-p", PROMPT)
    assert plain[0] == 1 and ids("-p", PROMPT, "--no-bos") == plain[1:]
    assert ids("-p", "the<s>", "--no-bos")[-1] == 1
    assert 1 not in ids("-p", "the<s>", "--no-bos", "--no-special")
    fails(cli("-p", "", "--no-bos"), "no tokens")
    assert ids("-p", "") == [1]


def test_the_flag_of_numerics_chooses_them(cli, tiny, load):
    path = tiny(wtype="Q4_0")
    for numerics in ("ggml", "f32"):
        out = cli("-p", PROMPT, "--numerics", numerics, model=path, n=8)[1]
        assert out == f'output: "{load(numerics, wtype="Q4_0").generate(PROMPT, n=8).text}"\n'
    fails(cli("-p", PROMPT, "--numerics", "f16"), "f16")


def test_the_flags_of_sampling_reach_the_sampler(cli, model):
    how = dict(temp=1.2, top_k=20, top_p=0.9, min_p=0.01, repeat_penalty=1.3, seed=4)
    args = [x for k, v in how.items() for x in ("--" + k.replace("_", "-"), v)]
    assert cli("-p", PROMPT, *args, n=8)[1] == f'output: "{model.generate(PROMPT, n=8, **how).text}"\n'
    for flag, value in (("--temp", "-1"), ("--top-p", "2"), ("--min-p", "nan"), ("--top-k", "x"), ("--seed", "x"),
                        ("--repeat-penalty", "0")):
        fails(cli("-p", PROMPT, "--temp", 1, flag, value), value)


def test_the_flag_of_stop_texts_ends_the_text(cli, model):
    text = model.generate(PROMPT, n=12).text
    stop = text[4:6]
    out = cli("-p", PROMPT, "--stop", "never there", "--stop", stop, n=12)[1]
    assert out == f'output: "{text[:text.index(stop)]}"\n'


def test_the_contexts_end_is_said(cli, tiny):
    status, out, err = cli("-p", "the", model=tiny(n_ctx=8), n=50)
    assert status == 0 and out.startswith('output: "') and ("context" in err or "eos" in err)
    fails(cli("-p", "the " * 50, model=tiny(n_ctx=8)), "8")


def test_version_and_help_are_printed(cli):
    status, out, _ = cli("--version")
    assert status == 0 and tinymia.__version__ in out
    status, out, _ = cli("--help")
    assert status == 0
    for flag in ("--logit-lens", "--save", "--patch", "--patch-avg", "--ablate", "--select", "--draw", "--print-cgraph",
                 "--list-tensors",
                 "--log", "--add", "--add-token", "--project-out-token", "--scale", "--at", "--when", "--numerics",
                 "--json",
                 "--verbose", "--version", "--no-bos", "--lens-score", "--temp", "--stop", "-m", "-p", "-f", "-n",
                 "-t"):
        assert flag in out, flag
    assert "--from-token-idx 13 --to-token-idx 2" in out                 # the post's commands as examples


def test_verbose_goes_to_stderr(cli):
    quiet, loud = cli("-p", PROMPT), cli("-p", PROMPT, "--verbose")
    assert loud[1] == quiet[1] and len(loud[2]) > len(quiet[2])


def test_the_graph_is_printed_op_by_op(cli, model, tiny):
    """Every op in order: name, op, shape, inputs, weight and its type."""
    for args in (("-p", PROMPT), ()):
        status, out, _ = cli("--print-cgraph", *args)
        lines = [line for line in out.splitlines() if not line.startswith("output:")]
        assert status == 0 and [line.split()[0] for line in lines][-len(model.names()):] == model.names()
    line = next(line for line in lines if line.startswith("ffn_up-1 "))
    for word in ("mul_mat", "ffn_norm-1", "blk.1.ffn_up.weight", "F32"):
        assert word in line
    out = cli("--print-cgraph", model=tiny(wtype="Q5_0", tied=True))[1]
    assert "token_embd.weight" in out.splitlines()[-1] and "Q5_0" in out.splitlines()[-1]


def test_all_weights_are_listed(cli, model):
    status, out, _ = cli("--list-tensors")
    assert status == 0 and len(out.splitlines()) == len(model.weights)
    for line, w in zip(out.splitlines(), model.weights.values(), strict=True):
        assert w.name in line and w.type_name in line and str(w.shape[0]) in line


def test_the_log_has_a_line_per_tensor(cli, model):
    out = cli("-p", PROMPT, "--log", "l_out", "--log", "norm")[1].splitlines()
    assert [line.split()[0] for line in out[:3]] == ["l_out-0", "l_out-1", "norm"]
    x = model.run(PROMPT, keep=["l_out-0"])["l_out-0"]
    assert f"rms {np.sqrt((x.astype(float) ** 2).mean()):.4g}" in out[0] and str(list(x.shape)) in out[0]


def test_everything_is_in_one_json_object(cli, model, tmp_path):
    status, out, _ = cli("-p", PROMPT, "--json", "--ll", "l_out-1", 2, "--log", "norm", "--save", "l_out-0",
                           tmp_path / "x")
    d = json.loads(out)
    text = json.dumps(d, ensure_ascii=False)
    assert status == 0 and out.count("\n") == 1
    assert d["output"] == model.generate(PROMPT, n=3).text
    (piece, score), = model.lens(model.run(PROMPT, keep=["l_out-1"])["l_out-1"][-1], 1)[0]
    assert all(word in text for word in (json.dumps(piece, ensure_ascii=False), "l_out-1", "norm", str(tmp_path / "x")))
    assert d["lens"][0]["rows"][-1]["best"][0] == [piece, pytest.approx(score)]
    assert [t["id"] for t in d["tokens"]] == model.tokenize(PROMPT)
    assert json.loads(cli("--json", "--print-cgraph", "--list-tensors")[1])["cgraph"][0]["name"] == "inp_embd"


# ------------------------------------------------------------------------------------------------ the post's commands


def test_the_posts_task_vector(cli, model, tmp_path):
    """Save a row of one prompt, patch it into another, word for word as the post writes it."""
    long, short, file = "the fox jumps over the dog ->", "the fox ->", tmp_path / "l_out-0"
    assert cli("--prompt", long, "--save", "l_out-0", file)[0] == 0
    run = model.run(long, keep=["l_out-0"])
    assert file.read_bytes() == run["l_out-0"].tobytes()
    i, j = len(run.tokens) - 1, len(model.tokenize(short)) - 1
    want = f'output: "{model.generate(short, n=3, actions=[tinymia.Patch("l_out-0", run, src=i, at=j)]).text}"\n'
    assert cli("--prompt", short, "--patch", "l_out-0", file, "--from-token-idx", i, "--to-token-idx", j)[1] == want
    assert cli("--prompt", short, "--patch", "l_out-0", file, i, j)[1] == want
    assert cli("--prompt", short, "--patch", "l_out-0", file, -1, -1)[1] == want
    assert cli("--prompt", short, "--patch", "l_out-0", file, "--from-token-idx", -1, "--to-token-idx", -1)[1] == want
    assert want != cli("--prompt", short)[1]
    avg = [tinymia.Patch("l_out-0", run["l_out-0"][-1], at=-1)]
    assert cli("--prompt", short, "--patch-avg", "l_out-0", file, file, -1, -1)[1] == \
        f'output: "{model.generate(short, n=3, actions=avg).text}"\n'


def test_patching_with_the_same_prompt_changes_nothing(cli, tmp_path):
    want = cli("-p", PROMPT, n=8)[1]
    for name in ("l_out-0", "kqv_out-1", "kq_soft_max-0", "Kcur-1"):
        for suffix in ("", ".npy", ".npz"):
            f = tmp_path / f"{name}{suffix}"
            assert cli("-p", PROMPT, "--save", name, f)[0] == 0
            assert cli("-p", PROMPT, "--patch", name, f, n=8)[1] == want
            assert cli("-p", PROMPT, "--patch", name, f, 2, 2, n=8)[1] == want


def test_many_tensors_are_saved_in_one_file(cli, tmp_path):
    for name, suffix in (("l_out-0", ".npy"), ("l_out", ".npz"), ("all", ".npz")):
        assert cli("-p", PROMPT, "--save", name, tmp_path / f"{name}{suffix}")[0] == 0
    x = np.load(tmp_path / "l_out-0.npy")
    with np.load(tmp_path / "l_out.npz") as f:
        assert (f["l_out-0"] == x).all() and "l_out-1" in f.files
    with np.load(tmp_path / "all.npz") as f:
        assert (f["l_out-0"] == x).all() and "kq_soft_max-1" in f.files
    fails(cli("-p", PROMPT, "--save", "l_out", tmp_path / "raw"), "npz")
    assert not (tmp_path / "raw").exists()


def logits(cli, tmp_path, *args):
    f = tmp_path / "out.npy"
    result = cli("-p", PROMPT, *args, "--save", "result_output", f)
    assert result[0] == 0, result[2]
    return np.load(f)


def python(model, *actions):
    return model.run(PROMPT, actions=actions).logits


def test_changes_equal_the_python_ones(cli, model, tmp_path):
    A, S, Add, P = tinymia.Ablate, tinymia.Scale, tinymia.Add, tinymia.ProjectOut
    token = model.tokenize("fox", bos=False)[-1]
    piece, e = model.piece(token), model.weights["token_embd.weight"].numpy()[token]
    v = tmp_path / "v"
    v.write_bytes(np.linspace(-1, 1, 64, dtype=np.float32).tobytes())
    vec = np.fromfile(v, np.float32)
    cases = [
        (["-a", "1,6"], [A("kqv_merged-0", heads=[1]), A("kqv_merged-1", heads=[2])]),
        (["--ablate", "0.1,1.2"], [A("kqv_merged-0", heads=[1]), A("kqv_merged-1", heads=[2])]),
        (["-a", "1.0", "--ablate-mode", "mean"], [A("kqv_merged-1", heads=[0], mode="mean")]),
        (["-s", "1", "2"], [A("kqv_merged-1", heads=[0, 1, 3])]),
        (["--select", "0", "3"], [A("kqv_merged-0", heads=[0, 1, 2])]),
        (["--scale", "l_out-0", "0.5"], [S("l_out-0", 0.5)]),
        (["--scale", "l_out-0", "-2", "--at", "-1"], [S("l_out-0", -2.0, at=-1)]),
        (["--scale", "ffn_out", "2", "--at", "1,2"], [S("ffn_out", 2.0, at=[1, 2])]),
        (["--add", "l_out-0", str(v)], [Add("l_out-0", vec)]),
        (["--add", "l_out-0", str(v), "-1.5", "--at", "2"], [Add("l_out-0", vec, -1.5, at=2)]),
        (["--add-token", "l_out-0", piece, "-1"], [Add("l_out-0", e, -1.0)]),
        (["--add-token", "l_out-0", f"#{token}", "2", "--at", "-1"], [Add("l_out-0", e, 2.0, at=-1)]),
        (["--project-out-token", "l_out-0", piece], [P("l_out-0", e)]),
        (["--scale", "l_out-0", "2", "--scale", "l_out-1", "3", "--at", "0"],
         [S("l_out-0", 2.0), S("l_out-1", 3.0, at=0)]),
        (["--add", "l_out-0", str(v), "--scale", "l_out-0", "3"], [Add("l_out-0", vec), S("l_out-0", 3.0)]),
        (["--scale", "l_out-0", "3", "--add", "l_out-0", str(v)], [S("l_out-0", 3.0), Add("l_out-0", vec)]),
    ]
    plain = model.run(PROMPT).logits
    for args, actions in cases:
        got, want = logits(cli, tmp_path, *args), python(model, *actions)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=str(args))
        assert (got != plain).any(), args


def test_the_flag_when_chooses_the_passes(cli, model):
    for when in ("prompt", "decode", "all"):
        out = cli("-p", PROMPT, "--scale", "l_out-1", "-1", "--when", when, n=6)[1]
        want = model.generate(PROMPT, n=6, actions=[tinymia.Scale("l_out-1", -1.0, when=when)]).text
        assert out == f'output: "{want}"\n'
    fails(cli("-p", PROMPT, "--scale", "l_out-1", "-1", "--when", "never"), "never")


def test_attention_patterns_are_drawn(drawn, cli, model, tmp_path):
    from matplotlib import colormaps

    assert cli("-p", PROMPT, "-d", tmp_path / "a.png")[0] == 0
    picture, run = drawn(tmp_path / "a.png"), model.run(PROMPT, keep=["kq_soft_max"])
    (panels,), n = picture.maps, len(run.tokens)
    pieces = [model.piece(i).replace(" ", "▁") for i in run.tokens]
    assert panels.rows == pieces * 2 and panels.columns == pieces * 4
    for il, head, i, j in ((0, 0, 2, 1), (1, 3, 2, 0), (1, 2, 1, 2)):
        want = colormaps["inferno"](float(run[f"kq_soft_max-{il}"][head, i, j]) ** 0.5, bytes=True)[:3]
        assert panels.colour(n * il + i, n * head + j) == list(want)
    status, _, err = cli("-p", PROMPT, "--draw", tmp_path / "absent" / "a.png")
    fails((status, "", err), "absent")


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("args,words", [
    ([], ["prompt"]), (["-p", "x", "--nonsense"], ["--nonsense"]), (["-p", "x", "-n", "-1"], ["-1"]),
                                        (["-p", "x", "-n", "x"], ["x"]),
    (["-p", "x", "-t", "0"], ["0"]), (["-p", "x", "--ll", "l_ou", "3"], ["l_ou", "l_out"]),
                                        (["-p", "x", "--ll", "l_out", "x"], ["x"]),
    (["-p", "x", "--ll", "l_out", "0"], ["0"]), (["-p", "x", "--ll", "l_out"], ["--logit-lens"]),
                                        (["-p", "x", "--ll", "ffn_up", "3"], ["ffn_up"]),
    (["-p", "x", "--patch", "l_out-0", "absent", "0", "0"], ["absent"]),
                                        (["-p", "x", "--patch", "l_out-0"], ["--patch"]),
    (["-p", "x", "--patch", "l_out-0", "absent", "0"], ["--patch"]), (["-p", "x", "-a", "99"], ["2 layers"]),
                                        (["-p", "x", "-a", "0.4"], ["4"]),
    (["-p", "x", "-a", "-1"], ["-1"]), (["-p", "x", "-a", "x"], ["x"]), (["-p", "x", "-a", ""], []),
                                        (["-p", "x", "-a", "1.2.3"], ["2.3"]),
    (["-p", "x", "-s", "2", "0"], ["2"]), (["-p", "x", "-s", "0", "4"], ["4"]),
                                        (["-p", "x", "--scale", "l_out-0", "x"], ["x"]),
    (["-p", "x", "--scale", "l_out-0", "nan"], []), (["-p", "x", "--scale", "l_out-0", "2", "--at", "99"], ["99"]),
    (["-p", "x", "--scale", "l_out-0", "2", "--at", "x"], ["x"]), (["-p", "x", "--at", "1"], ["--at"]),
    (["-p", "x", "--add-token", "l_out-0", "two tokens or more", "1"], ["two tokens"]),
                                        (["-p", "x", "--add-token", "l_out-0", "#99999", "1"], ["99999"]),
    (["-p", "x", "--from-token-idx", "1"], ["--from-token-idx"]), (["-p", "x", "--lens-score", "best"], ["best"]),
    (["-p", "x", "--scale", "l_out-0", "2", "--when", "decode", "-n", "1"], ["l_out-0"]),
                                        (["-p", "x", "--stop", ""], []),
    (["-p", "\udcff"], []), (["stray"], ["stray"]),
], ids=lambda v: " ".join(v).replace("\udcff", "bytes") if isinstance(v, list) else None)
def test_wrong_flags_are_one_line_each(cli, args, words):
    fails(cli(*args), *words)


def test_without_a_model_the_bundled_one_runs(capsys):
    """A line says so. If the file of -m does not exist, that is an error, and the bundled model does not run."""
    assert tinymia.main(["-p", "France ->", "-n", "1"]) == 0
    out = capsys.readouterr()
    assert out.out == 'output: " Italy"\n' and out.err.startswith("no -m: the bundled model copycat runs\n")
    for argv, word in (([], "prompt"), (["-m", "absent.gguf", "-p", "x"], "absent.gguf")):
        status = tinymia.main(argv)
        out = capsys.readouterr()
        fails((status, out.out, out.err), word)


def test_debug_shows_the_traceback(tiny):
    code, _, err = command("-m", "absent.gguf", "-p", "x", "--debug")
    assert code != 0 and "Traceback" in err


def test_patch_file_of_another_model(cli, tiny, tmp_path):
    for suffix in ("", ".npy", ".npz"):
        f = tmp_path / f"x{suffix}"
        assert cli("-p", "the fox", "--save", "l_out-0", f, model=tiny(n_embd=96, n_layer=3, seed=3))[0] == 0
        if f.stat().st_size // 4 % 64 == 0 and not suffix:
            continue                                                     # a raw file has no more to tell than its size
        fails(cli("-p", "the fox", "--patch", "l_out-0", f, 0, 0), f.name if suffix else "l_out-0")


def test_indices_out_of_range(cli, model, tmp_path):
    f, n = tmp_path / "x", len(model.tokenize(PROMPT))
    cli("-p", PROMPT, "--save", "l_out-0", f)
    for src, to in ((n, 0), (-n - 1, 0), (0, n), (0, -n - 1), (10**6, 0)):
        fails(cli("-p", PROMPT, "--patch", "l_out-0", f, src, to), "l_out-0", src if to == 0 else to)


def limited(n_bytes):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    return limit


@pytest.mark.parametrize("suffix", ["", ".npy", ".npz"])
def test_a_full_disk_leaves_no_partial_file(tiny, tmp_path, suffix):
    """RLIMIT_FSIZE makes writes fail as a full disk does; an older file stays as it was."""
    f = tmp_path / f"x{suffix}"
    f.write_bytes(b"old")
    cache = {"NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", str(tmp_path / "cache"))}
    result = command("-m", tiny(), "-p", PROMPT * 3, "-n", "1", "--save", "l_out-0", f, preexec_fn=limited(1000),
                     env=cache)
    fails(result, f.name)
    assert f.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir() if p.name != "cache"] == [f.name]


def test_no_permission_to_save(tiny, tmp_path):
    """A model that was opened before, a folder that must not be written to."""
    model = tinymia.load(tiny(), threads=1)
    model.run([1])
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with nobody(), pytest.raises(tinymia.Error, match=r"(?i)x.*permission"):
        model.run([1, 5], actions=[tinymia.Save("l_out-0", tmp_path / "x")])


def test_piping_to_head_is_no_error(tiny):
    """Reading one line and leaving: exit 0 and not a word on stderr."""
    p = subprocess.Popen([sys.executable, "-m", "tinymia", "-m", tiny(), "-p", "the " * 60, "-n", "3", "--ll", "l_out",
                          "300"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert p.stdout.readline().startswith(b"Layer #0 l_out-0:")
    p.stdout.close()
    err = p.stderr.read().decode()
    p.stderr.close()
    assert p.wait(60) == 0 and "Traceback" not in err and "BrokenPipe" not in err and "error" not in err


def environment(**more):
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p), **more}


def test_stdout_on_a_full_device(tiny):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which Linux has")
    with open("/dev/full", "wb") as full:
        code, _, err = command("-m", tiny(), "-p", "the", "-n", "2", stdout=full, stderr=subprocess.PIPE,
                               capture_output=False)
    assert code == 2 and "error:" in err and "Traceback" not in err


def test_ctrl_c_ends_it_cleanly(tiny):
    endless = tiny(n_ctx=50_000, n_layer=4, seed=6)                 # a seed that says nothing like </s> for long
    p = subprocess.Popen([sys.executable, "-m", "tinymia", "-m", endless, "-p", "the", "-n", "40000", "-t", "1"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    line = b""
    while not line.startswith(b"1 ") and p.poll() is None:         # the token table is the last thing before the work
        line = p.stderr.readline()
    time.sleep(0.3)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert b"Traceback" not in err and p.returncode == 130
    assert out == b"" or out.startswith(b'output: "')


def test_output_in_any_locale(tiny):
    """Pieces are UTF-8 whatever the terminal says."""
    code, out, err = command("-m", tiny(), "-p", "→é", "-n", "1", "--ll", "inp_embd", "5",
                             env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert code == 0 and out.startswith("inp_embd:") and "Traceback" not in err


@pytest.mark.parametrize("state", ["read-only", "a file", "absent"])
def test_kernels_work_where_no_cache_can_be_kept(tiny, tmp_path, state):
    """Kernels still work where compiled ones cannot be kept."""
    cache = tmp_path / "cache"
    if state == "read-only":
        if hasattr(os, "getuid") and os.getuid() == 0:
            pytest.skip("needs a user other than root, who may write everywhere")
        cache.mkdir(mode=0o555)
    elif state == "a file":
        cache.write_text("")
    else:
        cache = tmp_path / "a" / "b" / "cache"
    code, out, err = command("-m", tiny(), "-p", "the", "-n", "1", env={"NUMBA_CACHE_DIR": str(cache)})
    assert code == 0 and out.startswith('output: "') and "Traceback" not in err and "error" not in err.lower()


def test_the_file_runs_as_a_script(tiny):
    """`python tinymia.py` is the same command."""
    p = subprocess.run([sys.executable, IMPORT_NAMES / "tinymia.py", "--version"], capture_output=True,
                       env=environment(), timeout=60)
    assert p.returncode == 0 and tinymia.__version__ in p.stdout.decode()


def test_importing_loads_only_what_starting_needs():
    """Plotting, llama.cpp and torch are not loaded."""
    heavy = ("matplotlib", "llama_cpp", "torch", "sentencepiece", "tinymia_lab")
    code = f"import sys, tinymia; print(*(m for m in {heavy} if m in sys.modules))"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), timeout=60)
    assert p.returncode == 0 and p.stdout.decode().strip() == ""
