"""tinymia attend: patterns are the model's, scores mean what they say, the page shows them."""
import base64
import json

import naive
import numpy as np
import pytest
from browser import Browser
from conftest import command
from pictures import colour

import tinymia
from tinymia_lab.commands.attend import (
    Attention,
    attend,
    first_score,
    induction_score,
    previous_score,
    repeated_tokens,
    text,
)
from tinymia_lab.commands.attend import command as attend_command
from tinymia_lab.pictures.attention_page import pack

PROMPT = "Egypt -> Cairo, Norway -> Oslo, Estonia ->"


@pytest.fixture(scope="module")
def found(copycat):
    return attend(copycat, PROMPT)


def test_patterns_are_the_models(copycat, found):
    run = copycat.run(PROMPT, keep=["kq_soft_max"])
    assert found.patterns.shape == (6, 4, 11, 11) and found.layers == list(range(6)) and found.heads == list(range(4))
    for il in range(6):
        assert np.array_equal(found.patterns[il], run[f"kq_soft_max-{il}"])
    assert np.allclose(found.patterns.sum(-1), 1, atol=2e-3)


def test_patterns_are_those_of_the_float64_reference(stories):
    model = tinymia.load(stories, threads=1, numerics="f32")
    ids = model.tokenize("Once upon a time there was a time")
    found, want = attend(model, ids), naive.forward(naive.read(stories), ids)
    for il in range(model.config.n_layer):
        assert np.allclose(found.patterns[il], want[f"kq_soft_max-{il}"], atol=1e-5)
        for head in range(model.config.n_head):
            a = want[f"kq_soft_max-{il}"][head]
            before = sum(a[i, i - 1] for i in range(1, len(ids))) / (len(ids) - 1)
            start = sum(a[i, 0] for i in range(1, len(ids))) / (len(ids) - 1)
            assert found.previous[il, head] == pytest.approx(before, abs=1e-5)
            assert found.first[il, head] == pytest.approx(start, abs=1e-5)


def test_some_layers_and_heads(copycat, found):
    some = attend(copycat, PROMPT, layers=[4, 1], heads=[3])
    assert some.layers == [1, 4] and np.array_equal(some.patterns, found.patterns[[1, 4]][:, [3]])
    assert np.array_equal(some.previous, found.previous)  # scores are of all heads
    for how, words in (({"layers": [6]}, "layer 6 is out of range: there are 6 layers, 0 to 5"),
                       ({"heads": "0-4"}, "head 4"), ({"heads": []}, "no head")):
        with pytest.raises(tinymia.Error, match=words):
            attend(copycat, PROMPT, **how)


# ---------------------------------------------------------------------------------------- scores


def naive_induction(a, tokens):
    """The induction score by its definition: the weight of each query on keys whose token before is the query's."""
    per_query = []
    for i, token in enumerate(tokens):
        keys = [j + 1 for j in range(i) if tokens[j] == token]
        if keys:
            per_query.append(sum(a[i, j] for j in keys))
    return sum(per_query) / len(per_query) if per_query else np.nan


def perfect(tokens, look):
    """A head that gives all weight to the key look(i) of each query."""
    a = np.zeros((len(tokens), len(tokens)), np.float32)
    for i in range(len(tokens)):
        a[i, look(i)] = 1
    return a


def test_scores_of_perfect_heads():
    tokens = [1, 5, 6, 7, 5, 6, 7]
    before, start = perfect(tokens, lambda i: max(i - 1, 0)), perfect(tokens, lambda i: 0)
    copies = perfect(tokens, lambda i: i - 2 if i >= 4 else 0)
    both = np.stack([before, start, copies])
    assert previous_score(both).tolist() == pytest.approx([1, 1 / 6, 1 / 6])  # of query 1, whose token before is 0
    assert first_score(both).tolist() == pytest.approx([1 / 6, 1, 0.5])
    assert induction_score(both, tokens).tolist() == pytest.approx([0, 0, 1])
    assert np.isnan(induction_score(both, range(7))).all()
    assert np.isnan(previous_score(np.ones((2, 1, 1)))).all()


def test_induction_by_its_words():
    rng = np.random.default_rng(0)
    for n, vocab in ((12, 4), (9, 2), (8, 50)):
        tokens, a = rng.integers(0, vocab, n).tolist(), np.tril(rng.random((n, n)))
        a /= a.sum(1, keepdims=True)
        assert induction_score(a, tokens) == pytest.approx(naive_induction(a, tokens), nan_ok=True)


def test_induction_is_measured_on_random_tokens_that_repeat(copycat, found, stories):
    for model, copies in ((copycat, 3), (tinymia.load(stories, threads=1), 4)):  # copycat's context has 96 tokens
        ids = repeated_tokens(model, 0)
        assert ids[0] == model.tokenizer.bos and ids[1:] == ids[1:26] * copies and len(set(ids[1:])) == 25
        assert ids == repeated_tokens(model, 0) != repeated_tokens(model, 1)
    ids = repeated_tokens(copycat, 0)
    run = copycat.run(ids, keep=["kq_soft_max"])
    want = [[naive_induction(a, ids) for a in run[f"kq_soft_max-{il}"]] for il in range(6)]
    assert np.allclose(found.induction, want, atol=1e-6)
    assert found.about["prompts"]["repeated"]["tokens"] == ids
    assert not np.array_equal(attend(copycat, PROMPT, seed=1).induction, found.induction)


def test_a_prompt_of_one_token(copycat, capsys):
    one = attend(copycat, [5])
    assert one.patterns.shape == (6, 4, 1, 1) and np.isnan(one.previous).all() and not np.isnan(one.induction).any()
    assert "no token of the prompt has one" in text(one) and "nan" not in text(one)


def test_interventions_are_seen_in_the_prompt_alone(copycat, found):
    changed = attend(copycat, PROMPT, actions=[tinymia.Scale("kq-2", 0.0, heads=1)])
    flat = 1 / np.arange(1, 12)
    assert np.allclose(changed.patterns[2, 1], np.tril(np.repeat(flat[:, None], 11, 1)), atol=1e-3)
    assert np.array_equal(changed.patterns[2, 0], found.patterns[2, 0])
    assert np.array_equal(changed.induction, found.induction)


def test_saved_and_gone_on_with(copycat, found, tmp_path, monkeypatch, capsys):
    path, calls = tmp_path / "x.npz", []

    def stops(*args):
        calls.append(args)
        if len(calls) == 8:     # the prompt's six layers are done, and one of the random tokens'
            raise KeyboardInterrupt
        return induction_score(*args)

    monkeypatch.setattr("tinymia_lab.commands.attend.induction_score", stops)
    with pytest.raises(KeyboardInterrupt):
        attend(copycat, PROMPT, out=path)
    assert "attend: stopped at 7 of 12" in capsys.readouterr().err
    half = Attention.load(path)
    assert np.array_equal(half.patterns, found.patterns) and np.isnan(half.induction[1:]).all()
    again = attend(copycat, PROMPT, out=path)
    assert len(calls) == 8 + 6 and np.array_equal(again.induction, found.induction)
    attend(copycat, PROMPT, out=path)
    assert len(calls) == 14
    with pytest.raises(tinymia.Error, match="settings seed is 0, not 3"):
        attend(copycat, PROMPT, seed=3, out=path)


# ---------------------------------------------------------------------------------------- the command


def test_the_command_prints_the_scores(capsys, found):
    assert attend_command(["-p", PROMPT, "-t", "1"]) == 0
    out = capsys.readouterr().out
    best = np.unravel_index(found.previous.argmax(), found.previous.shape)
    line = next(line for line in out.splitlines() if line.startswith("to the token before"))
    assert line.split()[4] == f"{best[0]}.{best[1]}" and out.count("layer \\ head 0") == 4


def test_command_prints_one_heads_pattern(capsys):
    assert attend_command(["-p", "France ->", "-t", "1", "--layers", "2", "--heads", "3"]) == 0
    block = capsys.readouterr().out.split("attention of head 2.3")[1].splitlines()
    assert block[3].split()[0] == "<s>" and block[3].split()[1:] == ["1.00", "·", "·"]


def test_the_command_gives_one_json_object(capsys, found):
    args = ["-p", PROMPT, "-t", "1", "--json", "--layers", "0", "--heads", "1", "--numerics", "ggml"]
    assert attend_command(args) == 0
    data = json.loads(capsys.readouterr().out)
    assert np.array(data["patterns"]).shape == (1, 1, 11, 11) and data["heads"] == [1]
    assert np.allclose(data["first"], found.first)


@pytest.mark.parametrize("args,words", [
    ([], "-p or -f"), (["-p", "x", "--layers", "9"], "layer 9"), (["-p", "x", "--heads", "a"], "0,3-5"),
    (["-p", "x", "--scores", "x.html"], "--scores"), (["-p", "word " * 100], "96"),
])
def test_wrong_flags_of_the_command_are_one_line(args, words):
    status, out, err = command("attend", "-t", 1, *args)
    assert status == 2 and out == "" and err.splitlines()[-1].startswith("error: ") and words in err, err


def test_the_command_draws_patterns_and_scores(drawn, copycat_f32, tmp_path, capsys):
    from matplotlib import colormaps

    args = ["--layers", "1,3", "--heads", "2-3", "-o", str(tmp_path / "a.png"), "--scores", str(tmp_path / "s.png")]
    assert attend_command(["-p", PROMPT, "-t", "1", *args]) == 0
    picture, run = drawn(tmp_path / "a.png"), copycat_f32.run(PROMPT, keep=["kq_soft_max"])
    (panels,), pieces = picture.maps, [piece.replace(" ", "▁") for piece in map(copycat_f32.piece, run.tokens)]
    assert panels.rows == panels.columns == pieces * 2 and {"layer / head", "1", "3", "2"} <= {*picture.words}
    for y, il in enumerate((1, 3)):
        for x, head in enumerate((2, 3)):
            for i, j in ((0, 0), (10, 3), (10, 10), (4, 9)):      # the last one lies in the future
                weight = float(run[f"kq_soft_max-{il}"][head, i, j])
                want = colormaps["inferno"](weight**0.5, bytes=True)[:3]
                assert panels.colour(11 * y + i, 11 * x + j) == list(want), (il, head, i, j)
    before = np.mean([run["kq_soft_max-3"][:, i, i - 1] for i in range(1, 11)], axis=0)
    scores = drawn(tmp_path / "s.png").maps
    assert scores[0].title == "attention to the token before\ncolour: mean weight" and len(scores) == 4
    assert scores[0].rows == list("543210") and scores[0].columns == list("0123")
    for head in range(4):
        assert scores[0].text("3", str(head)) == f"{before[head]:.2f}"
        assert scores[0].colour("3", str(head)) == colour(before[head], 0, 1)


# ---------------------------------------------------------------------------------------- the page


def unpack(data, size, causal):
    """Weights out of the bytes, by the words at the top of attention_page.py."""
    if not causal:
        return (np.frombuffer(data, np.uint8).reshape(-1, size, size) / 255.0) ** 2
    each = size * (size + 1) // 2
    patterns = np.zeros((len(data) // each, size, size))
    for p, part in zip(patterns, np.frombuffer(data, np.uint8).reshape(-1, each)):
        at = 0
        for i in range(size):
            p[i, : i + 1] = (part[at : at + i + 1] / 255.0) ** 2
            at += i + 1
    return patterns


def test_bytes_hold_the_weights(found):
    data, causal = pack(found.patterns)
    assert causal and len(data) == 24 * 66
    assert np.abs(unpack(data, 11, True) - found.patterns.reshape(24, 11, 11)).max() <= 0.004
    full = np.full((1, 1, 3, 3), 1 / 3, np.float32)
    data, causal = pack(full)
    assert not causal and np.abs(unpack(data, 3, False) - full[0]).max() <= 0.004


def test_a_page_of_a_large_model_stays_small(copycat):
    rng = np.random.default_rng(0)
    patterns = np.tril(rng.random((32, 32, 50, 50), np.float32))
    assert len(base64.b64encode(pack(patterns)[0])) < 2e6


def test_page_shows_every_head_and_weight(tmp_path, capsys, found):
    assert attend_command(["-p", PROMPT, "-t", "1", "-o", str(tmp_path / "x.html")]) == 0
    with Browser(390, 800) as browser:
        browser.open(tmp_path / "x.html")
        assert browser.js("document.querySelectorAll('.attention .panel').length") == 4
        assert browser.js("document.querySelector('.attention h3').textContent").startswith("head 5.0")
        browser.click(*browser.middle(".attention .down"))
        browser.click(*browser.middle(".attention .panel:nth-child(3)"))
        assert browser.js("document.querySelector('.attention h3').textContent") == (
            f"head 4.2, previous token {found.previous[4, 2]:.2f}, first token {found.first[4, 2]:.2f}, "
            f"induction {found.induction[4, 2]:.2f}")
        browser.js("document.querySelector('.attention .large').focus()")
        for _ in range(3):
            browser.key("ArrowRight")
        told = browser.js("document.querySelector('.attention output').textContent")
        where, weight = told.rsplit(": ", 1)
        assert where == "head 4.2: query 10 ▁-> → key 3 ▁Cairo"
        assert float(weight) == pytest.approx(found.patterns[4, 2, 10, 3], abs=0.005)
        # The top left cell of a small panel is query 0, key 0, which has all the weight.
        browser.middle(".panel:nth-child(2) canvas")
        corner = "document.querySelector('.panel:nth-child(2) canvas').getBoundingClientRect()"
        browser.move(browser.js(f"{corner}.left") + 2, browser.js(f"{corner}.top") + 2)
        tip = browser.js("document.getElementById('tip').textContent")
        assert tip == "head 4.1: query 0 <s> → key 0 <s>: 1.000"
        browser.click(*browser.middle(".attention .tokens span:nth-of-type(6)"))
        assert "query 5 ▁Norway" in browser.js("document.querySelector('.attention output').textContent")
        assert browser.js("document.documentElement.scrollWidth") <= 390
        assert not browser.errors
