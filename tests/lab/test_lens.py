"""tinymia lens: what it sees is what the model says, and what it shows is what it saw."""
import argparse
import json

import naive
import numpy as np
import pytest
from browser import Browser
from conftest import command
from pictures import colour

import tinymia
from tinymia_lab.commands.lens import Lens, details, lens, pictures
from tinymia_lab.commands.lens import command as lens_command

PROMPT = "Egypt -> Cairo, Norway -> Oslo, Estonia ->"


@pytest.fixture(scope="module")
def found(copycat):
    return lens(copycat, PROMPT, k=4, target="Tallinn")


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_last_layer_is_what_the_model_says(copycat, found):
    logits = copycat.run(PROMPT).logits                                         # [n_tok, n_vocab]
    p, t = softmax(logits), copycat.tokenizer.one(" Tallinn")
    assert found.names == [f"l_out-{il}" for il in range(6)] and found.best.shape == (6, len(logits), 4)
    assert np.array_equal(found.best[-1, :, 0], logits.argmax(1))
    assert np.array_equal(found.scores[-1], np.sort(logits, 1)[:, :-5:-1])
    assert np.allclose(found.probabilities[-1], np.sort(p, 1)[:, :-5:-1], rtol=1e-5)
    assert np.allclose(found.entropy[-1], -(p * np.log(p)).sum(1), rtol=1e-4)
    assert found.target == t and np.array_equal(found.target_score[-1], logits[:, t])
    assert np.array_equal(found.target_rank[-1], (logits > logits[:, t:t + 1]).sum(1))
    assert np.allclose(found.target_probability[-1], p[:, t], rtol=1e-5)
    assert found.target_rank[-1, -1] == 0 and found.best_pieces[-1][-1][0] == " Tallinn"


@pytest.mark.parametrize("score", ["raw", "logit", "prob"])
@pytest.mark.parametrize("name", ["l_out", "kqv_out-1", "ffn_inp-?", "inp_embd", "result_norm"])
def test_as_the_models_own_lens(copycat, name, score):
    found, run = lens(copycat, PROMPT, name, 3, score), copycat.run(PROMPT, keep=[name])
    assert found.names == run.names
    for i, tensor in enumerate(run.names):
        want = copycat.lens(run[tensor], 3, score)
        assert found.best_pieces[i] == [[piece for piece, _ in row] for row in want]
        assert np.array_equal(found.scores[i], np.array([[s for _, s in row] for row in want], np.float32))


def test_every_layer_is_that_of_the_float64_reference(stories):
    """Every layer against the slow reference: its own residual stream, norm, output and softmax."""
    model = tinymia.load(stories, threads=1, numerics="f32")
    ids, m = model.tokenize("Once upon a time there was"), naive.read(stories)
    found, tensors, t = lens(model, ids, k=1, target=ids[-1]), naive.forward(m, ids), ids[-1]
    for i, name in enumerate(found.names):
        x = tensors[name]
        normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + model.config.eps) * m.w["output_norm.weight"]
        logits = normed @ m.w["output.weight" if "output.weight" in m.w else "token_embd.weight"].T
        p = softmax(logits)
        assert np.array_equal(found.best[i, :, 0], logits.argmax(1))
        assert np.allclose(found.scores[i, :, 0], logits.max(1), rtol=1e-4)
        assert np.allclose(found.entropy[i], -(p * np.log(p)).sum(1), rtol=1e-4)
        assert np.allclose(found.target_probability[i], p[:, t], rtol=1e-3)
        assert np.array_equal(found.target_rank[i], (logits > logits[:, t:t + 1]).sum(1))


def test_many_rows_go_in_parts(copycat, monkeypatch):
    whole = lens(copycat, PROMPT, target="Tallinn")
    monkeypatch.setattr("tinymia_lab.commands.lens.ROWS", 3)
    parts = lens(copycat, PROMPT, target="Tallinn")
    for name, array in whole.arrays().items():
        assert np.array_equal(array, getattr(parts, name)), name


def test_the_lens_sees_interventions(copycat, found):
    silenced = lens(copycat, PROMPT, k=4, target="Tallinn", actions=[tinymia.Scale("kqv_out-3", 0.0)])
    assert np.array_equal(silenced.scores[:3], found.scores[:3])
    logits = copycat.run(PROMPT, actions=[tinymia.Scale("kqv_out-3", 0.0)]).logits
    assert np.array_equal(silenced.scores[-1], np.sort(logits, 1)[:, :-5:-1])
    assert not np.array_equal(silenced.scores[3:], found.scores[3:])
    assert silenced.about["settings"]["actions"][0] == {
        "action": "Scale", "name": "kqv_out-3", "at": None, "heads": None, "when": "prompt", "factor": 0.0}


def test_saved_and_gone_on_with(copycat, found, tmp_path, monkeypatch, capsys):
    path = tmp_path / "lens.npz"
    output, calls = lens.__globals__["_fill"], []

    def stops(result, i, *how):
        calls.append(i)
        if len(calls) == 4:
            raise KeyboardInterrupt
        output(result, i, *how)

    monkeypatch.setattr("tinymia_lab.commands.lens._fill", stops)
    with pytest.raises(KeyboardInterrupt):
        lens(copycat, PROMPT, k=4, target="Tallinn", out=path)
    assert "stopped at 3 of 6" in capsys.readouterr().err
    assert np.isnan(Lens.load(path).entropy).any(1).tolist() == [False] * 3 + [True] * 3
    again = lens(copycat, PROMPT, k=4, target="Tallinn", out=path)
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    for name, array in found.arrays().items():
        assert np.array_equal(array, getattr(again, name)), name
    assert again.best_pieces == found.best_pieces
    assert lens(copycat, PROMPT, k=4, target="Tallinn", out=path).about == found.about and len(calls) == 7
    with pytest.raises(tinymia.Error, match="settings k is 4, not 5"):
        lens(copycat, PROMPT, k=5, target="Tallinn", out=path)


def test_the_pictures_show_best_tokens_and_target(copycat, found):
    best, target = pictures(found)
    assert best.y == "layer" and list(best.rows) == list("012345") and best.columns == found.pieces and best.upward
    assert best.texts[5][-1] == " Tallinn" and best.values[5, -1] == found.probabilities[5, -1, 0]
    assert target.texts[5][-1] == "0" and target.values[5, -1] == found.target_probability[5, -1]
    assert np.array_equal(pictures(found, "entropy")[0].values, found.entropy)
    assert "▁Tallinn" in best.hovers[5][-1] and "86.1%" in best.hovers[5][-1] and "rank 0" in best.hovers[5][-1]
    assert len(pictures(lens(copycat, "France ->", ["l_out-0", "ffn_out"]))) == 1


def test_rows_of_several_tensors_have_their_names(copycat):
    best, = pictures(lens(copycat, "France ->", ["l_out-0", "inp_embd"]))
    assert best.y == "tensor" and list(best.rows) == ["inp_embd", "l_out-0"]


def test_details_tell_one_position(found):
    lines = details(found, -1).splitlines()
    assert lines[0] == "position 10, ▁->" and lines[2].split()[:2] == ["5", "▁Tallinn"]
    assert [line.split()[0] for line in lines[2:]] == list("543210")


def test_a_row_of_nan_has_no_best_tokens(copycat, capsys):
    x = copycat.run(PROMPT, keep="l_out-5")["l_out-5"]
    x[3] = np.nan
    for score in ("raw", "logit", "prob"):
        rows = copycat.lens(x, 2, score)
        assert rows[3] == [] and [len(row) for row in rows] == [2] * 3 + [0] + [2] * (len(x) - 4)
    found, before = lens(copycat, PROMPT, "l_out-5", 2, target=7), lens(copycat, PROMPT, "l_out-5", 2, target=7)
    lens.__globals__["_fill"](found, 0, copycat, x, "logit")
    assert found.best[0, 3].tolist() == [-1, -1] and found.best_pieces[0][3] == ["", ""]
    assert np.isnan(found.entropy[0, 3]) and np.isnan(found.scores[0, 3]).all()
    rest = [i for i in range(len(x)) if i != 3]
    assert np.array_equal(found.best[0, rest], before.best[0, rest])

    def spoil(x, ctx):
        x[1] = np.nan
        return x

    from tinymia_lab.cli import Printer
    printer = Printer(argparse.Namespace(json=False), copycat)
    actions = [tinymia.Replace("l_out-5", spoil), tinymia.Lens("l_out-5", 2)]
    with pytest.raises(tinymia.Error, match="not finite"):
        copycat.run("France ->", actions=actions, on_record=printer.record)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "1: NaN: no tokens" and "|" in lines[1] and "|" in lines[3]


def test_the_outputs_bias_is_no_part_of_the_raw_score(tiny, tmp_path):
    """raw is (x * norm weight) W^T, whatever the model adds to its logits."""
    from rawgguf import Info, Raw

    g = Raw.read(tiny())
    bias = np.linspace(-50, 50, 384, dtype=np.float32)
    g.tensors.append(Info("output.bias", (384,), 0, len(g.data)))
    g.data += bias.tobytes()
    path = g.write(tmp_path / "bias.gguf")
    plain, biased = (tinymia.load(p, threads=1) for p in (tiny(), path))
    ids = [1, 300, 310]
    np.testing.assert_allclose(biased.run(ids).logits, plain.run(ids).logits + bias, rtol=1e-5, atol=1e-5)
    x = plain.run(ids, keep="l_out-1")["l_out-1"]
    assert biased.lens(x, 5, "raw") == plain.lens(x, 5, "raw")
    assert biased.lens(x, 5, "logit") != plain.lens(x, 5, "logit")
    raw = [lens(model, ids, k=5, score="raw") for model in (plain, biased)]
    assert np.array_equal(raw[0].best, raw[1].best) and np.array_equal(raw[0].scores, raw[1].scores)
    assert biased.lens(x, 1, "logit")[2][0][0] == biased.piece(int(biased.run(ids).logits[2].argmax()))


@pytest.mark.parametrize("how,words", [
    ({"names": "kq"}, "the lens sees tensors of"), ({"names": "lout"}, "closest"), ({"k": 0}, "at least 1"),
    ({"score": "x"}, "raw, logit or prob"), ({"target": ""}, "no text"), ({"target": 2048}, "out of range"),
    ({"out": "x.txt"}, "x.txt"),
])
def test_what_is_wrong_is_said(copycat, how, words):
    with pytest.raises(tinymia.Error, match=words):
        lens(copycat, "France ->", **how)


# ---------------------------------------------------------------------------------------- the command


def test_command_prints_a_table(copycat):
    status, out, err = command("lens", "-p", PROMPT, "-t", 1, "--target", "Tallinn", env={"COLUMNS": "200"})
    assert status == 0 and "copycat" in err and "\x1b" not in out
    top = next(line for line in out.splitlines() if line.startswith("5 "))
    assert top.endswith(" 85%  ▁Talli…")
    assert "position 10, ▁->" in out


def test_command_colours_a_terminal_unless_asked_not_to(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for no_colour, want in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_colour)
        monkeypatch.setenv("TERM", "xterm")
        assert lens_command(["-p", "France ->", "-t", "1"]) == 0
        assert ("\x1b[48;" in capsys.readouterr().out) == want


def test_the_command_gives_one_json_object(capsys):
    assert lens_command(["-p", "France ->", "-t", "1", "--json", "--tensor", "l_out-5", "-k", "2"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["names"] == ["l_out-5"] and data["best_pieces"][0][-1][0] == " Italy" and data["target"] is None
    assert data["about"]["prompts"]["prompt"]["pieces"] == ["<s>", " France", " ->"]


def test_the_command_takes_interventions(capsys):
    assert lens_command(["-p", "France ->", "-t", "1", "--json", "--scale", "l_out-5", "0", "--at", "-1"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert max(data["probabilities"][-1][-1]) == pytest.approx(1 / 2048, rel=1e-3)


@pytest.mark.parametrize("args,words", [
    ([], "-p or -f"), (["-p", "x", "-o", "x.gif"], ".npz, .json, .png, .html"),
    (["-p", "x", "--tensor", "Vcur"], "the lens sees"), (["-p", "x", "--position", "9"], "position 9"),
    (["-p", "x", "--colour", "red"], "entropy"),
])
def test_wrong_flags_of_the_command_are_one_line(args, words):
    status, out, err = command("lens", "-t", 1, *args)
    assert status == 2 and out == "" and err.splitlines()[-1].startswith("error: ") and words in err, err


def test_the_command_draws_and_keeps(drawn, tmp_path, capsys):
    outs = [str(tmp_path / f"x.{s}") for s in ("png", "html", "npz")]
    assert lens_command(["-p", PROMPT, "-t", "1", *(x for o in outs for x in ("-o", o))]) == 0
    (best,), p = drawn(outs[0]).maps, Lens.load(outs[2]).probabilities[..., 0]
    assert best.rows == list("543210") and best.columns[:3] == ["<s>", "▁Egypt", "▁->"] and len(best.columns) == 11
    assert best.title == f"l_out through the logit lens: {PROMPT}\ncolour: probability of the best token"
    assert best.text("5", -1) == "▁Tallinn" and best.text("5", "▁Norway") == "▁->"
    for il, i in ((5, 10), (0, 0), (3, 7)):
        assert best.colour(str(il), i) == colour(p[il, i], 0, 1)


def test_page_tells_the_best_tokens(tmp_path, capsys):
    assert lens_command(["-p", PROMPT, "-t", "1", "-k", "3", "-o", str(tmp_path / "x.html")]) == 0
    with Browser(390, 800, dark=True) as browser:
        browser.open(tmp_path / "x.html")
        browser.move(*browser.middle("tbody tr:first-child td:last-child"))
        tip = browser.js("document.getElementById('tip').textContent")
        assert tip.startswith("l_out-5, position 10 ▁->")
        assert tip.splitlines()[1].split() == ["▁Tallinn", "10.99", "85.5%"]
        browser.js("document.querySelector('.heatmap table').focus()")
        browser.key("ArrowDown")
        assert browser.js("document.getElementById('tip').textContent").startswith("l_out-4, position 10")
        browser.key("Escape")
        assert browser.js("document.getElementById('tip').hidden")
        assert browser.js("document.documentElement.scrollWidth") <= 390
        assert not browser.errors
