"""Groups of heads, FFNs and edges of attention ablated: against single heads, and against the arithmetic itself."""
import json

import numpy as np
import pytest
from conftest import command
from pictures import colour

import tinymia
from tinymia_lab.commands.ablate import ablate
from tinymia_lab.commands.ablate_groups import GroupAblation, ablate_groups
from tinymia_lab.measure.knockout import Work, changes, instead, read_group

PROMPT = "Egypt -> Cairo, Norway -> Oslo, Estonia ->"
SETS = ["France -> Paris, Italy ->", "Egypt -> Cairo, Norway ->"]


@pytest.fixture
def model(copycat_f32):
    return copycat_f32


def ablated(model, group, keep=(), mode="zero", at=None, prompt=PROMPT, **how):
    """(the run with a group ablated, its ids)."""
    ids = model.tokenize(prompt)
    put = instead(model, mode, how.get("prompts"), how.get("pool", "mean"), how.get("other"), at, len(ids))
    rows = list(range(len(ids))) if at is None else [at % len(ids)]
    work = Work(ids, read_group(model, group, len(ids)), put, rows)
    return model.run(ids, keep=keep, actions=changes(model, work)), ids


@pytest.mark.parametrize("how", [
    {}, {"at": -1}, {"mode": "mean", "prompts": SETS}, {"mode": "mean", "prompts": SETS, "pool": "last", "at": [2, 3]},
    {"mode": "resample", "other": "France -> Paris, Poland -> Warsaw, Italy ->"},
    {"mode": "resample", "other": "Italy ->", "at": -1},
])
def test_a_group_of_one_head_equals_that_head_alone(model, how):
    single = ablate(model, PROMPT, "Tallinn", "Oslo", layers="2-3", heads="1,3", **how)
    heads = [(2, 1), (2, 3), (3, 1), (3, 3)]
    found = ablate_groups(model, PROMPT, [f"{il}.{h}" for il, h in heads], "Tallinn", "Oslo", **how)
    np.testing.assert_allclose(found.plain, single.plain, atol=1e-4)
    want = [[single.values[m, il, h] for il, h in heads] for m in range(4)]
    np.testing.assert_allclose(found.values, want, atol=2e-4)
    assert found.best.tolist() == [single.best[il, h] for il, h in heads]


def test_heads_of_a_group_are_all_silent_and_no_other_is(model):
    run, _ = ablated(model, "2.1,attn-4,0-1.2-3", ["kqv_merged"])
    plain = model.run(PROMPT, keep=["kqv_merged"])
    silent = {(2, 1), *((4, h) for h in range(4)), (0, 2), (0, 3), (1, 2), (1, 3)}
    for il in range(6):
        heads = run[f"kqv_merged-{il}"].reshape(-1, 4, 32)
        assert all((not heads[:, h].any()) == ((il, h) in silent) for h in range(4)), il
    np.testing.assert_array_equal(run["kqv_merged-0"][:, :64], plain["kqv_merged-0"][:, :64])


def test_an_ffn_without_output_leaves_the_residual_as_attention_left_it(model):
    run, _ = ablated(model, "ffn-1,ffn-3-4", ["ffn_inp", "l_out", "ffn_out"])
    for il in range(6):
        assert (run[f"l_out-{il}"] == run[f"ffn_inp-{il}"]).all() == (il in (1, 3, 4))
    mean, _ = ablated(model, "ffn-2", ["ffn_out"], mode="mean", prompts=SETS)
    want = np.mean([model.run(p, keep=["ffn_out-2"])["ffn_out-2"].mean(0, dtype=float) for p in SETS], axis=0)
    np.testing.assert_allclose(mean["ffn_out-2"], np.tile(want, (len(mean["ffn_out-2"]), 1)), atol=1e-5)
    other = "France -> Paris, Poland -> Warsaw, Italy ->"
    swapped, _ = ablated(model, "ffn-2", ["ffn_out"], mode="resample", other=other)
    np.testing.assert_array_equal(swapped["ffn_out-2"], model.run(other, keep=["ffn_out-2"])["ffn_out-2"])


def test_a_cut_edge_gives_its_attention_to_what_is_still_seen(model):
    """The pattern, from kq in float64 without the edge; every other row as it was."""
    run, ids = ablated(model, "3.3@-1:1-2", ["kq", "kq_soft_max", "kqv"])
    plain = model.run(ids, keep=["kq", "kq_soft_max", "Vcur"])
    n, got = len(ids), run["kq_soft_max-3"]
    kept = [j for j in range(n) if j not in (1, 2)]
    scores = plain["kq-3"][3, -1, kept].astype(float) / np.sqrt(32)
    want = np.zeros(n)
    want[kept] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    np.testing.assert_allclose(got[3, -1], want, atol=1e-6)
    np.testing.assert_allclose(run["kqv-3"][3, -1], want @ plain["Vcur-3"][:, 3].astype(float), atol=1e-5)
    assert not got[3, -1, 1:3].any()
    np.testing.assert_array_equal(got[:3], plain["kq_soft_max-3"][:3])
    np.testing.assert_array_equal(got[3, :-1], plain["kq_soft_max-3"][3, :-1])


def test_an_edge_without_a_head_is_cut_in_all_heads_and_layers(model):
    run, ids = ablated(model, "@4-6:2", ["kq_soft_max"])
    plain = model.run(ids, keep=["kq_soft_max"])
    for il in range(6):
        pattern = run[f"kq_soft_max-{il}"]
        assert not pattern[:, 4:7, 2].any() and plain[f"kq_soft_max-{il}"][:, 4:7, 2].any()
        np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)


def test_what_copycat_copies_goes_along_the_edge_to_the_answer(model):
    """A list task: the last token reads what it copies; cutting all of that is worse than cutting anything else."""
    found = ablate_groups(model, PROMPT, ["@-1:9", "@-1:1", "@-1:5"], "Tallinn", "Oslo", out=None)
    assert int(np.abs(found.effects[2]).argmax()) == 0


def test_runs_go_on_from_a_file(model, tmp_path):
    out = tmp_path / "g.npz"
    whole = ablate_groups(model, PROMPT, ["ffn-1", "2.1,3.3"], out=out)
    half = GroupAblation.load(out)
    half.values[:, 1], half.best[1] = np.nan, -1
    half.save(out)
    again = ablate_groups(model, PROMPT, ["ffn-1", "2.1,3.3"], out=out)
    np.testing.assert_array_equal(again.values, whole.values)
    with pytest.raises(tinymia.Error, match="holds another run"):
        ablate_groups(model, PROMPT, ["ffn-1", "2.1"], out=out)


@pytest.mark.parametrize(("group", "says"), [
    ("", "'' is not a part"), ("2", "'2' is not a part"), ("2.1,", "'' is not a part"), ("ffn", "'ffn' is not a part"),
    ("ffn-1@2:1", "is not a part"), ("2.9", "head 9 is out of range"), ("9.1", "layer 9 is out of range"),
    ("attn-4-9", "layer 6 is out of range"), ("ffn-6", "layer 6 is out of range"), ("3-2.1", "chooses no layer"),
    ("2.1@99:1", "position 99 is out of range"), ("2.1@3:-99", "position -99 is out of range"),
    ("2.1@3:0-3", "head 2.1 at position 3 would see nothing"), ("@0:0", "would see nothing"),
    ("2.1@3:0-1,2.1@3:2-3", "head 2.1 at position 3 would see nothing"), ("2.1@3:5", "does not see later positions"),
])
def test_wrong_groups_are_one_clear_line(model, group, says):
    with pytest.raises(tinymia.Error, match=says) as e:
        ablate_groups(model, PROMPT, [group])
    assert "\n" not in str(e.value)


def test_the_command_prints_and_draws_groups(drawn, tmp_path, capsys):
    html, png = tmp_path / "g.html", tmp_path / "g.png"
    base = ["ablate", "-p", PROMPT, "--answer", "Tallinn", "--against", "Oslo"]
    groups = ["--ffn", "--layers", "1-2", "--group", "2.1,3.3", "--group", "@-1:1"]
    assert tinymia.main([*map(str, (*base, *groups, "-o", html, "-o", png))]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines() if line.startswith(("ffn-", "2.1,3.3", "@-1:1"))]
    assert {*rows} == {"ffn-1", "ffn-2", "2.1,3.3", "@-1:1"} and "ffn-2" in html.read_text("utf-8")
    (shown,) = drawn(png).maps
    assert shown.rows == ["2.1,3.3", "@-1:1", "ffn-1", "ffn-2"] and (
        "logit of ▁Tallinn - logit of ▁Oslo" in " ".join(shown.title.split()))
    values = [float(shown.text(i, 0)) for i in range(4)]
    ends = {1: colour(1, -1, 1, diverging=True), -1: colour(-1, -1, 1, diverging=True)}
    strongest = int(np.abs(values).argmax())
    assert shown.colour(strongest, 0) == ends[np.sign(values[strongest])]
    resample = ["--mode", "resample", "--other", "Italy ->", "--at", "-1"]
    status, out, _ = command(*base, "--group", "3.3", *resample, "--json")
    assert status == 0 and json.loads(out)["groups"] == ["3.3"]
    for args, says in ((["--group", "2.1", "--heads", "1"], "--heads and --layers choose among single heads"),
                       (["--group", "nonsense"], "is not a part"),
                       (["--group", "2.1", "--mode", "mean"], "--mode mean needs --prompts FILE")):
        status, _, err = command(*base, *args)
        assert status == 2 and says in err.splitlines()[-1], err
