"""Ablation of heads against plain runs of the whole prompt with an Ablate or Patch action, a head at a time."""
import json
import pickle
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import pytest
from browser import Browser
from conftest import prompt, shared
from pictures import colour

import tinymia
from tinymia_lab.commands import ablate
from tinymia_lab.measure import head_ablation

PROMPT = "Egypt -> Cairo, Norway -> Oslo, Estonia ->"
OTHER = "Peru -> Lima, Japan -> Tokyo, Estonia ->"
SET = ["Egypt -> Arabic, Norway ->", "cat -> cats, dog ->", "4 5 6 to 6"]


@pytest.fixture(scope="module")
def found(copycat):
    return ablate.ablate(copycat, PROMPT, "Tallinn", "Oslo")


def metrics(row, plain, answer, against):
    """The metrics in float64, by their formulas in textbooks."""
    row, plain = row.astype(np.float64), plain.astype(np.float64)
    q, p = (np.exp(x) / np.exp(x).sum() for x in (row, plain))
    return [row[answer] - row[against], row[answer], q[answer], (p * np.log(p / q)).sum()]


def naive(model, ids, found, action):
    """The same arrays from a run of the whole prompt for each head; action(layer, head) ablates it."""
    plain, c = model.run(ids).logits[-1], model.config
    values, best = np.full_like(found.values, np.nan), np.full_like(found.best, -1)
    for il, head in np.ndindex(c.n_layer, c.n_head):
        row = model.run(ids, actions=[action(il, head)]).logits[-1]
        values[:, il, head], best[il, head] = metrics(row, plain, found.answer, found.against), row.argmax()
    return values, best


def check(model, ids, found, action):
    values, best = naive(model, ids, found, action)
    scale = np.abs(values).max((1, 2), keepdims=True)
    np.testing.assert_allclose(found.values / scale, values / scale, rtol=0, atol=1e-5)
    assert (found.best == best).mean() > 0.99      # where two logits are equal but for rounding, either is the best
    assert np.abs(found.effects).max((1, 2)).min() > 1e-3


def mean_of(model, prompts, il, pool):
    """The mean row of kqv_merged, [1, n_head * d_head_v]: the means of prompts weigh the same."""
    rows = [model.run(p, keep=[f"kqv_merged-{il}"])[f"kqv_merged-{il}"].astype(np.float64) for p in prompts]
    return np.mean([r[-1] if pool == "last" else r.mean(0) for r in rows], axis=0)[None]


@pytest.mark.parametrize("at", [None, -1, [3, -2]])
@pytest.mark.parametrize("numerics", ["ggml", "f32"])
def test_zeroed_heads_equal_plain_runs(copycat_in, numerics, at):
    model = copycat_in(numerics)
    found = ablate.ablate(model, PROMPT, "Tallinn", "Oslo", at=at)
    check(model, PROMPT, found, lambda il, head: tinymia.Ablate(f"kqv_merged-{il}", heads=head, at=at))


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("at", [None, -1])
def test_heads_at_their_mean_equal_plain_runs(copycat, pool, at):
    found = ablate.ablate(copycat, PROMPT, "Tallinn", mode="mean", prompts=SET, pool=pool, at=at)
    rows = [mean_of(copycat, SET, il, pool) for il in range(copycat.config.n_layer)]
    check(copycat, PROMPT, found,
          lambda il, head: tinymia.Ablate(f"kqv_merged-{il}", "value", value=rows[il], heads=head, at=at))


def test_resampled_heads_equal_plain_runs(copycat):
    found, other = ablate.ablate(copycat, PROMPT, mode="resample", other=OTHER), copycat.run(OTHER, keep=["kqv_merged"])
    check(copycat, PROMPT, found,
          lambda il, head: tinymia.Ablate(f"kqv_merged-{il}", "resample", source=other, heads=head))
    other = copycat.run(SET[0], keep=["kqv_merged"])                                    # of another length
    found = ablate.ablate(copycat, PROMPT, mode="resample", other=SET[0], at=[-2, -1])
    check(copycat, PROMPT, found,
          lambda il, head: tinymia.Patch(f"kqv_merged-{il}", other, [-2, -1], at=[-2, -1], heads=head))


def test_stories_260k_equals_plain_runs():
    """More rows than one batch holds: 5 layers, 8 heads on 4."""
    model, ids = tinymia.load(shared("models/stories260K-f32.gguf"), threads=1), prompt(90, 512)
    found = ablate.ablate(model, ids)
    assert 1 < head_ablation.ROWS // len(ids) < model.config.n_head
    check(model, ids, found, lambda il, head: tinymia.Ablate(f"kqv_merged-{il}", heads=head))


def test_heads_that_share_keys_and_values(load):
    model, ids = load(d_head=32, d_head_v=16, n_head_kv=1, bias=True), prompt(20)
    check(model, ids, ablate.ablate(model, ids),
          lambda il, head: tinymia.Ablate(f"kqv_merged-{il}", heads=head))


def test_a_head_given_what_it_has_changes_nothing(copycat):
    found = ablate.ablate(copycat, PROMPT, mode="resample", other=PROMPT)
    assert np.abs(found.effects).max() < 1e-5


def test_the_default_answers_are_the_two_best_tokens(copycat, found):
    """The model's best token against its best one after that."""
    row = copycat.run(PROMPT).logits[-1]
    first, second = np.argsort(-row)[:2]
    plain = ablate.ablate(copycat, PROMPT, layers=[0], heads=[1])
    assert (plain.answer, plain.against) == (first, second) and found.answer_piece == " Tallinn"
    assert ablate.ablate(copycat, PROMPT, int(second), layers=[0], heads=[1]).against == first


def test_layers_and_heads_that_are_asked_for(copycat, found):
    part = ablate.ablate(copycat, PROMPT, "Tallinn", "Oslo", layers="1,4-5", heads="2")
    asked = np.zeros((6, 4), bool)
    asked[[1, 4, 5], 2] = True
    np.testing.assert_allclose(part.values[:, asked], found.values[:, asked], rtol=1e-5)
    assert np.isnan(part.values[:, ~asked]).all() and (part.best[~asked] == -1).all()
    assert len(ablate.ranked(part, "kl")) == 3


def test_the_table_goes_by_the_size_of_the_effect(found):
    for i, metric in enumerate(ablate.METRICS):
        sizes = [abs(found.effects[i, il, head]) for il, head in ablate.ranked(found, metric)]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) == 24
    lines = ablate.heads_table(found, "logit-difference", 3).splitlines()
    assert len(lines) == 5 and lines[2].startswith("0.3 ") and lines[0].split()[1:4] == ["effect", "logit-difference",
                                                                                        "*"]


def same(a, b):
    equal = all(np.array_equal(x, b.arrays()[name], equal_nan=True) for name, x in a.arrays().items())
    return equal and a.best_pieces == b.best_pieces


class Elsewhere(Executor):
    """Does what it gets as another process would: arguments and results are pickled."""

    def submit(self, fn, *args):
        fn, args = pickle.loads(pickle.dumps((fn, args)))
        future = Future()
        future.set_result(pickle.loads(pickle.dumps(fn(*args))))
        return future


@pytest.mark.parametrize("executor", [ThreadPoolExecutor(2), Elsewhere()], ids=lambda e: type(e).__name__)
def test_an_executor_gives_the_same(copycat, found, executor):
    with executor:
        assert same(found, ablate.ablate(copycat, PROMPT, "Tallinn", "Oslo", executor=executor))
        plain = ablate.ablate(copycat, PROMPT, mode="mean", prompts=SET, at=-1)
        assert same(plain, ablate.ablate(copycat, PROMPT, mode="mean", prompts=SET, at=-1, executor=executor))


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_a_stopped_run_goes_on_where_it_was(copycat, monkeypatch, tmp_path, stop, suffix):
    """3 prompts, then 6 layers."""
    calls, out, how = [], tmp_path / f"run{suffix}", {"mode": "mean", "prompts": SET}

    def stopping(function):
        def call(*args):
            calls.append(args)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return function(*args)
        return call

    whole = ablate.ablate(copycat, PROMPT, **how)
    for name in ("pooled", "ablate_layer"):
        monkeypatch.setattr(ablate, name, stopping(getattr(ablate, name)))
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate(copycat, PROMPT, **how, out=out)
    found = ablate.ablate(copycat, PROMPT, **how, out=out)
    assert len(calls) == 9 + 1 and same(found, whole) and same(whole, ablate.Ablation.load(out))
    with pytest.raises(tinymia.Error, match="another run"):
        ablate.ablate(copycat, PROMPT, **how, at=-1, out=out)


@pytest.mark.parametrize(("how", "says"), [
    ({"mode": "half"}, "mode 'half'"), ({"mode": "mean"}, "mode mean goes with a set of prompts"),
    ({"prompts": SET}, "mode mean goes with a set of prompts"), ({"mode": "resample"}, "goes with another prompt"),
    ({"mode": "mean", "prompts": []}, "a list of one or more"), ({"pool": "max"}, "pool 'max'"),
    ({"mode": "mean", "prompts": [PROMPT, "a " * 200]}, "prompt 2 of the mean's prompts has"),
    ({"mode": "resample", "other": "France ->"}, "has 3 tokens and the prompt 11: they do not align"),
    ({"mode": "resample", "other": "France ->", "at": 5}, "position 5 is out of range: the other prompt has 3"),
    ({"at": 11}, "position 11 is out of range: the prompt has 11"), ({"at": [-1, 10]}, "each only once"),
    ({"at": []}, "no position"), ({"layers": "6"}, "layer 6 is out of range"), ({"heads": [4]}, "head 4 is out of"),
    ({"answer": "Oslo", "against": "Oslo"}, "are the same: "), ({"answer": 2048}, "out of range"),
    ({"answer": ""}, "no text"),
])
def test_what_is_wrong_is_said(copycat, how, says):
    with pytest.raises(tinymia.Error, match=says):
        ablate.ablate(copycat, PROMPT, **how)


def test_the_command_prints_draws_and_keeps(drawn, tmp_path, capsys):
    (tmp_path / "set").write_text("\n".join(SET) + "\n")
    outs = [tmp_path / f"heads{suffix}" for suffix in (".png", ".html", ".npz")]
    args = ["-p", PROMPT, "--answer", "Tallinn", "--mode", "mean", "--prompts", tmp_path / "set", "--metric", "kl"]
    assert tinymia.main([*map(str, ("ablate", *args, *(x for o in outs for x in ("-o", o)), "-k", 4))]) == 0
    out = capsys.readouterr().out
    assert "KL divergence from the unchanged run (nats), the largest first\nhead  effect" in out
    (shown,), kl = drawn(outs[0]).maps, ablate.Ablation.load(outs[2]).values[ablate.METRICS.index("kl")]
    assert "change of KL divergence from the unchanged run (nats)" in " ".join(shown.title.split())
    assert shown.rows == list("543210") and shown.columns == list("0123") and kl.shape == (6, 4)
    for il, head in ((5, 3), (0, 0), (2, 1)):
        assert shown.text(str(il), str(head)) == f"{kl[il, head]:.2f}"
        assert shown.colour(str(il), str(head)) == colour(kl[il, head], -kl.max(), kl.max(), diverging=True)
    assert tinymia.main(["ablate", *map(str, args), "-o", str(outs[2]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == ablate.Ablation.load(outs[2]).values.tolist()
    with Browser(390, 800, dark=True) as browser:
        browser.open(outs[1])
        browser.move(*browser.middle("tbody tr:first-child td:last-child"))
        tip = browser.js("document.getElementById('tip').textContent")
        assert tip.startswith("head 5.3, says ▁Tallinn\nlogit-difference") and not browser.errors


@pytest.mark.parametrize(("args", "says"), [
    ([], "-p or -f"), (["-p", "x", "--heads", "9"], "head 9 is out of range"), (["-p", "x", "-k", "0"], "-k 0"),
    (["-p", "x", "--mode", "mean", "--prompts", "none.txt"], "none.txt: cannot be read: No such file"),
    (["-p", "x", "--metric", "rank"], "logit-difference"), (["-p", "x", "--at", "a"], "position"),
])
def test_the_commands_errors_are_one_line(capsys, args, says):
    status = tinymia.main(["ablate", *args])
    out, err = capsys.readouterr()
    error = err.strip().splitlines()[-1]
    assert status == 2 and not out and error.startswith("error: ") and says in error and "Traceback" not in err
