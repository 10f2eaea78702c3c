"""Actions on named tensors: the post's semantics, each action's arithmetic, and where and when it is done."""
import dataclasses
import re

import numpy as np
import pytest
from conftest import prompt

import tinymia
from tinymia import Ablate, Add, Lens, Log, Patch, ProjectOut, Replace, Save, Scale

IDS = prompt(9)
OTHER = prompt(9, seed=5)


@pytest.fixture(scope="module")
def clean(model):
    return model.run(IDS, keep=["all"])


@pytest.fixture(scope="module")
def other(model):
    return model.run(OTHER, keep=["all"])


def do(model, *actions, ids=IDS, keep=("all",), **how):
    return model.run(ids, keep=list(keep), actions=list(actions), **how)


def changed(a, b):
    return [n for n in a.names if not np.array_equal(a[n], b[n])]


def differs_only_at(a, b, rows):
    """Whether exactly these rows of [n_tok, ...] differ."""
    return sorted(np.flatnonzero((a != b).reshape(len(a), -1).any(1)).tolist()) == sorted(rows)


# ------------------------------------------------------------------------------------------------ the post's semantics


def test_no_action_no_change(model, clean):
    plain = model.run(IDS)
    np.testing.assert_array_equal(plain.logits, clean.logits)
    looked = do(model, Lens("l_out", 3), Log("all"), Save("kq_soft_max"), Replace("all", lambda x, ctx: None), keep=[])
    np.testing.assert_array_equal(looked.logits, plain.logits)


@pytest.mark.parametrize("numerics", ["ggml", "f32"])
@pytest.mark.parametrize("wtype", ["F32", "Q4_0"])
def test_replacing_a_tensor_by_itself_changes_nothing(load, wtype, numerics):
    """Bit for bit, every tensor of the model, whole and row by row."""
    model = load(numerics, wtype=wtype)
    clean, plain = model.run(IDS, keep=["all"]), model.run(IDS)
    for name in model.names():
        for patch in (Patch(name, clean), Patch(name, clean[name], src=[3, -1], at=[3, 8]), Patch(name, clean, at=4)):
            again = model.run(IDS, actions=[patch])
            np.testing.assert_array_equal(again.logits, plain.logits, err_msg=f"{name} {patch.at}")


def test_a_patch_changes_later_tensors_only(model, clean, other):
    for i, name in enumerate(clean.names):
        run = do(model, Patch(name, other))
        np.testing.assert_array_equal(run[name], other[name])
        assert not set(changed(run, clean)) & set(clean.names[:i]), name
        assert name == "result_output" or clean.names[-1] in changed(run, clean), name


def test_a_patch_at_a_token_leaves_the_tokens_before_it_alone(model, clean, other):
    run = do(model, Patch("l_out-0", other, src=-1, at=5))
    assert differs_only_at(run["l_out-0"], clean["l_out-0"], [5])
    np.testing.assert_array_equal(run["l_out-0"][5], other["l_out-0"][8])
    assert differs_only_at(run.logits, clean.logits, [5, 6, 7, 8])


def test_patching_the_whole_residual_makes_the_other_run(model, other):
    run = do(model, Patch("inp_embd", other), keep=[])
    np.testing.assert_array_equal(run.logits, other.logits)


def test_nothing_stays_attached_to_the_model(model, clean):
    do(model, Scale("all", 0.5), keep=[])
    np.testing.assert_array_equal(model.run(IDS).logits, clean.logits)


# ------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("name", ["inp_embd", "norm-1", "Qcur_pre-0", "Kcur-1", "Vcur-0", "kq-0", "kq_soft_max-1",
                                  "kqv-0", "kqv_merged-1",
                                  "ffn_up-0", "l_out-1", "norm", "result_output"])
def test_scale_and_zero_and_value_everywhere(model, clean, name):
    np.testing.assert_array_equal(do(model, Scale(name, -0.5))[name], clean[name] * np.float32(-0.5))
    assert not do(model, Ablate(name))[name].any()
    assert (do(model, Ablate(name, mode="value", value=0.25))[name] == 0.25).all()


def token_axis(x, name):
    return np.moveaxis(x, 1, 0) if name.startswith("kq") and not name.startswith(("kqv_m", "kqv_o")) else x


@pytest.mark.parametrize("name", ["l_out-0", "Qcur-1", "kqv-0", "kq_soft_max-1", "ffn_gate-0"])
@pytest.mark.parametrize("at,rows", [(0, [0]), (-1, [8]), ([2, 5], [2, 5]), ([-2, 0], [0, 7]), (np.array([4]), [4]),
                                     (None, list(range(9)))],
                         ids=str)
def test_an_action_changes_the_rows_of_its_positions(model, clean, name, at, rows):
    for action in (Scale(name, 2.0, at=at), Ablate(name, at=at, mode="value", value=9.0)):
        run = do(model, action)
        assert differs_only_at(token_axis(run[name], name), token_axis(clean[name], name),
                               [r for r in rows if token_axis(clean[name], name)[r].any()])


@pytest.mark.parametrize("name,axis", [("Qcur-0", 1), ("Qcur_pre-1", 1), ("Kcur-0", 1), ("Vcur-1", 1), ("kq-0", 0),
                                       ("kq_soft_max-1", 0),
                                       ("kqv-1", 0)])
def test_an_action_changes_only_its_heads(model, clean, name, axis):
    run = do(model, Ablate(name, heads=[1]))
    want = clean[name].copy()
    want[(slice(None),) * axis + (1,)] = 0
    np.testing.assert_array_equal(run[name], want)


def test_heads_of_the_merged_tensor(model, clean):
    """Head h is columns h * d_head_v to (h + 1) * d_head_v; the same as zeroing the head in kqv."""
    run = do(model, Ablate("kqv_merged-1", heads=[0, 3], at=-1))
    want = clean["kqv_merged-1"].reshape(9, 4, 16).copy()
    want[8, [0, 3]] = 0
    np.testing.assert_array_equal(run["kqv_merged-1"], want.reshape(9, 64))
    np.testing.assert_array_equal(run.logits, do(model, Ablate("kqv-1", heads=[0, 3], at=-1)).logits)
    np.testing.assert_array_equal(do(model, Scale("kqv_merged-0", 3.0, heads=2))["kqv_merged-0"].reshape(9, 4, 16)[:,
                                                                                                                   2],
                                  clean["kqv_merged-0"].reshape(9, 4, 16)[:, 2] * np.float32(3))


def test_ablating_by_the_mean_takes_it_over_the_positions(model, clean):
    x = clean["l_out-0"]
    np.testing.assert_allclose(do(model, Ablate("l_out-0", mode="mean"))["l_out-0"], np.tile(x.mean(0), (9, 1)),
                               rtol=1e-5, atol=1e-6)
    got = do(model, Ablate("l_out-0", mode="mean", at=[2, -1]))["l_out-0"]
    assert differs_only_at(got, x, [2, 8])
    np.testing.assert_allclose(got[2], x.mean(0), rtol=1e-5, atol=1e-6)
    kqv = clean["kqv-0"].copy()                              # [n_head, n_tok, d_head]: the mean is over tokens
    kqv[2] = kqv[2].mean(0)
    np.testing.assert_allclose(do(model, Ablate("kqv-0", heads=2, mode="mean"))["kqv-0"], kqv, rtol=1e-5, atol=1e-6)


def test_ablating_by_resampling_takes_the_rows_of_another_run(model, clean, other):
    got = do(model, Ablate("kqv-1", heads=[1], at=[3, 4], mode="resample", source=other))["kqv-1"]
    want = clean["kqv-1"].copy()
    want[1, 3:5] = other["kqv-1"][1, 3:5]
    np.testing.assert_array_equal(got, want)


def test_ablate_value_of_a_row(model):
    row = np.arange(64, dtype=np.float32)
    assert (do(model, Ablate("l_out-1", mode="value", value=row, at=2))["l_out-1"][2] == row).all()


def test_add_adds_a_vector_times_a_coefficient(model, clean):
    v = np.linspace(-1, 1, 64, dtype=np.float32)
    x = clean["l_out-0"]
    np.testing.assert_allclose(do(model, Add("l_out-0", v))["l_out-0"], x + v, rtol=1e-6)
    got = do(model, Add("l_out-0", v, coef=-3.0, at=-1))["l_out-0"]
    assert differs_only_at(got, x, [8])
    np.testing.assert_allclose(got[8], x[8] - 3 * v, rtol=1e-5, atol=1e-6)


def test_project_out_removes_the_part_along_a_direction(model, clean):
    d = np.random.default_rng(0).standard_normal(64).astype(np.float32) * 7
    x, unit = clean["l_out-0"].astype(np.float64), d.astype(np.float64) / np.linalg.norm(d.astype(np.float64))
    got = do(model, ProjectOut("l_out-0", d))["l_out-0"]
    np.testing.assert_allclose(got, x - np.outer(x @ unit, unit), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got @ unit, 0, atol=1e-5)
    got = do(model, ProjectOut("l_out-0", d, at=[1, 2]))["l_out-0"]
    assert differs_only_at(got, clean["l_out-0"], [1, 2])
    with pytest.raises(tinymia.ActionError, match=r"projection of l_out-0: the direction has length 0\.0"):
        do(model, ProjectOut("l_out-0", np.zeros(64, np.float32)))


def test_every_source_of_a_patch_gives_the_same_rows(model, other, tmp_path):
    """A run, an array of the whole tensor, one row, a saved file of each kind, and the mean of two."""
    want = other["l_out-0"]
    model.run(OTHER, actions=[Save("l_out-0", tmp_path / f"x{suffix}") for suffix in ("", ".npy", ".npz")])
    for source in (other, want, tmp_path / "x", str(tmp_path / "x.npy"), tmp_path / "x.npz"):
        assert (do(model, Patch("l_out-0", source, src=2, at=6))["l_out-0"][6] == want[2]).all()
        np.testing.assert_array_equal(do(model, Patch("l_out-0", source))["l_out-0"], want)
    assert (do(model, Patch("l_out-0", want[3], at=6))["l_out-0"][6] == want[3]).all()
    twice = do(model, Patch("l_out-0", (other, tmp_path / "x.npy"), src=2, at=6))["l_out-0"][6]
    np.testing.assert_allclose(twice, want[2], rtol=1e-6)
    half = do(model, Patch("l_out-0", (want, 3 * want), src=[1, 2], at=[2, 1]))["l_out-0"]
    np.testing.assert_allclose(half[[2, 1]], 2 * want[[1, 2]], rtol=1e-6)


def test_patch_between_prompts_of_different_lengths(model, clean):
    """The post's use: the last token of a long prompt into the last of a short one."""
    short = model.run(IDS[:3], keep=["l_out"])
    run = do(model, Patch("l_out-0", clean, src=8, at=2), ids=IDS[:3], keep=["l_out"])
    assert (run["l_out-0"][2] == clean["l_out-0"][8]).all() and (run["l_out-0"][:2] == short["l_out-0"][:2]).all()
    with pytest.raises(tinymia.ActionError, match="patch of l_out-0: 9 rows for 3 positions"):
        do(model, Patch("l_out-0", clean), ids=IDS[:3])
    # A row of the pattern has as many keys as its prompt.
    with pytest.raises(tinymia.ActionError, match=r"array \[1, 4, 9\].* do not fit kq_soft_max-0, here \[1, 4, 3\]"):
        do(model, Patch("kq_soft_max-0", clean, src=8, at=2), ids=IDS[:3])


@pytest.mark.parametrize("patch", [dict(src=9, at=0), dict(src=-10, at=0), dict(src=0, at=9), dict(src=0, at=-10),
                                   dict(src=[0, 1], at=[0]),
                                   dict(src=1), dict(at=99)], ids=str)
def test_patch_positions_out_of_range(model, other, patch):
    with pytest.raises(tinymia.Error, match="l_out-0"):
        do(model, Patch("l_out-0", other, **patch))


@pytest.mark.parametrize("source,says", [
    (np.zeros(63), "63 numbers are not rows of 64, the width of l_out-0"),
    (np.zeros((9, 32)), "the source is 32 wide; l_out-0 is 64 wide"),
    (np.zeros((2, 9, 64)), r"the source is \[2, 9, 64\]; l_out-0 is \[n_tok, n_embd 64\]"),
    (np.zeros((0, 64)), "the source.* has 0 rows"),
    (np.zeros(()), r"the source is \[\]; l_out-0 is \[n_tok, n_embd 64\]"),
    ("absent", "^absent: cannot be read: No such file"),
], ids=lambda s: str(getattr(s, "shape", s))[:20])
def test_sources_that_do_not_fit(model, source, says):
    with pytest.raises(tinymia.Error, match=says):
        do(model, Patch("l_out-0", source, src=0, at=0))
    with pytest.raises(tinymia.Error, match=says):
        do(model, Add("l_out-0", source))


def test_a_file_of_another_model(load, model, tmp_path):
    wide = load(n_layer=3, n_embd=96, seed=3)
    wide.run(prompt(3), actions=[Save("l_out-0", tmp_path / f"x{suffix}") for suffix in ("", ".npy", ".npz")])
    another = r"saved from another model \(.*n_embd 96, .*\); this one is .*n_embd 64, "
    for suffix, says in ((".npy", another), (".npz", another), ("", "288 numbers are not rows of 64")):
        with pytest.raises(tinymia.Error, match=rf"x{suffix}: {says}") as e:
            do(model, Patch("l_out-0", tmp_path / f"x{suffix}", src=0, at=0))
        assert "\n" not in str(e.value)
    do(model, Save("ffn_up-0", tmp_path / "u"))             # the right model, a tensor of another width
    with pytest.raises(tinymia.Error, match="u: 864 numbers are not rows of 64, the width of l_out-0"):
        do(model, Patch("l_out-0", tmp_path / "u", src=0, at=0), ids=IDS[:2])


def test_nan_and_infinity_are_found(model):
    for bad in (np.nan, np.inf):
        with pytest.raises(tinymia.Error, match=r"the logits are not finite: .* NaN or infinity"):
            do(model, Ablate("l_out-0", mode="value", value=bad))


def test_replace_puts_in_what_the_function_returns(model, clean):
    run = do(model, Replace("l_out-0", lambda x, ctx: x[::-1]))
    np.testing.assert_array_equal(run["l_out-0"], clean["l_out-0"][::-1])
    run = do(model, Replace("l_out-0", lambda x, ctx: x.astype(np.float64)))
    np.testing.assert_array_equal(run.logits, clean.logits)
    for bad in (lambda x, ctx: x[:-1], lambda x, ctx: x[0], lambda x, ctx: 0.0):
        with pytest.raises(tinymia.Error, match="l_out-0"):
            do(model, Replace("l_out-0", bad))
    with pytest.raises(tinymia.Error, match="replacement of l_out-0: 5 is not a function"):
        do(model, Replace("l_out-0", 5))


def test_what_a_function_is_told(model):
    seen = []

    def look(x, ctx):
        seen.append((ctx.name, ctx.layer, list(ctx.positions), ctx.phase, x.shape))

    model.generate(IDS, n=3, actions=[Replace("l_out-1", look, when="all"), Replace("inp_embd", look, when="decode")])
    assert seen == [("l_out-1", 1, list(range(9)), "prompt", (9, 64)),
                    ("inp_embd", None, [9], "decode", (1, 64)), ("l_out-1", 1, [9], "decode", (1, 64)),
                    ("inp_embd", None, [10], "decode", (1, 64)), ("l_out-1", 1, [10], "decode", (1, 64))]


def test_a_function_gets_a_copy(model, clean):
    kept = []

    def write(x, ctx):
        kept.append(x)
        x[:] = 7

    run = do(model, Replace("l_out-0", write))
    np.testing.assert_array_equal(run.logits, clean.logits)
    kept[0][:] = 8
    np.testing.assert_array_equal(run["l_out-0"], clean["l_out-0"])


def test_what_is_kept_is_a_copy(model):
    a = do(model)
    before = a["l_out-0"].copy()
    model.run(OTHER)
    do(model, Scale("all", 2.0))
    np.testing.assert_array_equal(a["l_out-0"], before)
    assert not any(np.shares_memory(a["l_out-0"], a[n]) for n in a.names if n != "l_out-0")


def test_an_exception_of_a_function_comes_through(model):
    with pytest.raises(ZeroDivisionError, match=r"^division by zero$"):
        do(model, Replace("l_out-0", lambda x, ctx: 1 / 0))


# ------------------------------------------------------------------------------------------------ order


def test_order_given_is_order_applied(model, clean):
    v, x = np.ones(64, np.float32), clean["l_out-0"]
    run = do(model, Add("l_out-0", v), Scale("l_out-0", 2.0))
    np.testing.assert_allclose(run["l_out-0"], (x + 1) * 2, rtol=1e-6)
    run = do(model, Scale("l_out-0", 2.0), Add("l_out-0", v))
    np.testing.assert_allclose(run["l_out-0"], x * 2 + 1, rtol=1e-6)


def test_what_is_saved_is_what_was_there_in_that_order(model, clean):
    run = do(model, Save("l_out-0"), Scale("l_out-0", 2.0), Save("l_out-0"), keep=[])
    first, second = (r.value for r in run.records)
    np.testing.assert_array_equal(first, clean["l_out-0"])
    np.testing.assert_array_equal(second, 2 * clean["l_out-0"])


# ------------------------------------------------------------------------------------------------ when


def logits_of(model, *actions, n=5):
    """Logits of each pass of a generation."""
    rows = []
    model.generate(IDS, n=n, actions=[*actions, Replace("result_output", lambda x, ctx: rows.append(x[-1].copy()),
                                                        when="all")])
    return rows


def test_when_chooses_the_passes_of_an_action(model):
    """`prompt` and `decode` at a tensor that the cache does not keep act on their own passes only; `all` on both."""
    fired = {w: [] for w in ("prompt", "decode", "all")}
    model.generate(IDS, n=4, actions=[Replace("l_out-1", lambda x, ctx, w=w: fired[w].append(ctx.phase),
                                              when=w) for w in fired])
    assert fired == {"prompt": ["prompt"], "decode": ["decode"] * 3, "all": ["prompt"] + ["decode"] * 3}
    plain = logits_of(model)
    assert (logits_of(model, Scale("l_out-1", -1.0))[0] != plain[0]).any()
    after = logits_of(model, Scale("l_out-1", -1.0, when="decode"))
    assert (after[0] == plain[0]).all() and (after[1] != plain[1]).any()
    assert dataclasses.fields(Scale("l_out-1", 2.0))[0].name == "name" and Scale("l_out-1", 2.0).when == "prompt"


def test_the_cache_keeps_what_the_prompt_pass_left(model):
    """A change of the values during the prompt is seen by every later token."""
    plain = logits_of(model)
    for name in ("Vcur-1", "Kcur-1", "l_out-0"):
        after = logits_of(model, Scale(name, -2.0))
        assert len(after) == 5 and all((a != b).any() for a, b in zip(after, plain, strict=True)), name


def test_positions_count_on_while_decoding(model):
    """`at` counts in the whole sequence, and -1 is the newest token."""
    seen = []
    look = Replace("l_out-0", lambda x, ctx: seen.append(list(ctx.positions)), when="all")
    model.generate(IDS, n=4, actions=[look])
    assert seen == [list(range(9)), [9], [10], [11]]
    rows = []
    model.generate(IDS, n=4, actions=[Ablate("l_out-0", at=[10, 2], when="all"),
                                      Replace("l_out-0", lambda x, ctx: rows.append([bool(r.any()) for r in x]),
                                              when="all")])
    assert rows == [[i != 2 for i in range(9)], [True], [False], [True]]
    rows.clear()
    model.generate(IDS, n=3, actions=[Ablate("l_out-0", at=-1, when="all"),
                                      Replace("l_out-0", lambda x, ctx: rows.append([bool(r.any()) for r in x]),
                                              when="all")])
    assert rows == [[i != 8 for i in range(9)], [False], [False]]


def test_an_unknown_when_is_refused(model):
    for action in (Scale("l_out-0", 2.0, when="sometimes"), Lens("l_out-0", when="")):
        with pytest.raises(tinymia.Error, match="prompt"):
            do(model, action)


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("pattern,want", [
    ("l_out-1", ["l_out-1"]), ("l_out", ["l_out-0", "l_out-1", "l_out-2"]),
                                          ("l_out-*", ["l_out-0", "l_out-1", "l_out-2"]),
    ("l_out-[12]", ["l_out-1", "l_out-2"]), ("ffn_gate", ["ffn_gate-0", "ffn_gate-1", "ffn_gate-2"]),
                                          ("inp_embd", ["inp_embd"]),
    ("?cur-0", ["Vcur-0", "Qcur-0", "Kcur-0"]), ("norm", ["norm"]), ("norm-*", ["norm-0", "norm-1", "norm-2"]),
    ("kq", ["kq-0", "kq-1", "kq-2"]), ("kqv", ["kqv-0", "kqv-1", "kqv-2"]),
                                          ("result_*", ["result_norm", "result_output"]),
    ("kq_soft_max_ext-1", ["kq_soft_max-1"]), ("kq_soft_max_ext", ["kq_soft_max-0", "kq_soft_max-1", "kq_soft_max-2"]),
    ("kqv_merged_cont-0", ["kqv_merged-0"]), ("kqv_merged_cont", ["kqv_merged-0", "kqv_merged-1", "kqv_merged-2"]),
])
def test_names_bases_globs_and_aliases(load, pattern, want):
    assert load(n_layer=3).run(IDS, keep=[pattern]).names == want


def test_the_pattern_all_means_every_name(model):
    assert do(model).names == model.names()


@pytest.mark.parametrize("name,hint", [
    ("l_ou-1", "; closest: l_out-1, "), ("l_out-2", ": this model has layers 0 to 1, l_out-0 to l_out-1"),
    ("kqv_ot", "; closest: kqv_out, "), ("out", "; closest: l_out, "), ("L_OUT-0", ""), ("", ""), ("-", ""),
    ("l_out-", "; closest: l_out-"), ("l_out-01", "; closest: l_out-"), ("cur", "; closest: "),
    ("attn_out-0", "; closest: attn_norm-0, "), ("l_out-[", "; closest: l_out-"),
])
def test_an_unknown_name_is_refused_with_the_closest_ones(model, name, hint):
    says = "^" + re.escape(f"no tensor is called {name!r}{hint}") + ("" if hint.endswith((" ", "-")) else "$")
    for action in (Scale(name, 2.0), Lens(name), Save(name), Patch(name, np.zeros(64))):
        with pytest.raises(tinymia.UnknownName, match=says) as e:
            do(model, action, keep=[])
        assert "\n" not in str(e.value)
    with pytest.raises(tinymia.UnknownName, match=says):
        model.run(IDS, keep=[name])


def test_a_name_that_was_not_kept(model):
    run = model.run(IDS, keep=["l_out-0"])
    with pytest.raises(tinymia.Error, match="l_out-1"):
        run["l_out-1"]


def test_actions_that_never_fired(model):
    with pytest.raises(tinymia.Error, match="l_out-0"):
        model.run(IDS, actions=[Scale("l_out-0", 2.0, when="decode")])
    with pytest.raises(tinymia.Error, match="l_out-0"):
        model.generate(IDS, n=1, actions=[Scale("l_out-0", 2.0, when="decode")])
    with pytest.raises(tinymia.Error, match="99"):
        model.run(IDS, actions=[Scale("l_out-0", 2.0, at=99)])
    with pytest.raises(tinymia.Error, match="l_out-0"):
        model.generate(IDS, n=3, actions=[Scale("l_out-0", 2.0, at=99, when="decode")])


@pytest.mark.parametrize("action,says", [
    (lambda: Ablate("l_out-0", heads=[0]), "l_out-0 has no heads; kqv_merged, kqv, .* have"),
    (lambda: Ablate("kqv-0", heads=[4]), r"kqv-0: head \[4\] is out of range: there are 4 heads, 0 to 3"),
    (lambda: Ablate("kqv-0", heads=-1), r"kqv-0: head \[-1\] is out of range: there are 4 heads, 0 to 3"),
    (lambda: Ablate("Kcur-0", heads=[2]), r"Kcur-0: head \[2\] is out of range: there are 2 heads, 0 to 1"),
    (lambda: Ablate("l_out-0", mode="median"), "ablation mode 'median': it must be zero, mean, resample or value"),
    (lambda: Ablate("l_out-0", mode="resample"), "ablation of l_out-0: a source goes with mode resample"),
    (lambda: Scale("l_out-0", 2.0, at=9), "l_out-0: position 9 is out of range: the prompt has 9 tokens, 0 to 8"),
    (lambda: Scale("l_out-0", 2.0, at=-10), "l_out-0: position -10 is out of range: the prompt has 9 tokens, 0 to 8"),
    (lambda: Ablate("l_out-0", mode="value", value=np.zeros(5)), r"do not fit l_out-0, here \[9, 64\]"),
    (lambda: Lens("l_out-0", k=0), "the lens shows 0 tokens per row: it must be at least 1"),
    (lambda: Lens("l_out-0", score="best"), "lens score 'best': it must be raw, logit or prob"),
    (lambda: Lens("ffn_up-0"), r"ffn_up-0 is \[n_tok, n_ff\]; the lens sees tensors of \[n_tok, n_embd\]"),
    (lambda: Lens("kq-0"), r"kq-0 is \[n_head, n_tok, n_kv\]; the lens sees tensors of \[n_tok, n_embd\]"),
], ids=range(13))
def test_actions_that_make_no_sense(model, action, says):
    with pytest.raises(tinymia.Error, match=says) as e:
        do(model, action())
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------ looking


def lens_oracle(model, m, x, score, eps=1e-5):
    x = np.asarray(x, np.float64)
    if score != "raw":
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    s = (x * m.w["output_norm.weight"]) @ m.w["output.weight"].T
    if score == "prob":
        e = np.exp(s - s.max(-1, keepdims=True))
        s = e / e.sum(-1, keepdims=True)
    return s


@pytest.mark.parametrize("score", ["raw", "logit", "prob"])
def test_the_lens_is_that_of_the_oracle(model, tiny, clean, score):
    import naive

    want = lens_oracle(model, naive.read(tiny()), clean["l_out-0"], score)
    got = model.lens(clean["l_out-0"], k=5, score=score)
    assert len(got) == 9 and all(len(row) == 5 for row in got)
    for row, scores in zip(got, want, strict=True):
        best = np.argsort(-scores)[:5]
        assert [p for p, _ in row] == [model.piece(i) for i in best]
        np.testing.assert_allclose([s for _, s in row], scores[best], rtol=1e-4)


def test_lens_of_the_last_residual_is_the_output(model, clean):
    got = model.lens(clean["l_out-1"], k=3, score="logit")
    for row, logits in zip(got, clean.logits, strict=True):
        np.testing.assert_allclose([s for _, s in row], np.sort(logits)[::-1][:3], rtol=1e-5)


def test_lens_of_one_row_and_of_all_tokens(model, clean):
    one, (row,) = model.lens(clean["l_out-0"], k=4)[2], model.lens(clean["l_out-0"][2], k=4)
    assert [piece for piece, _ in row] == [piece for piece, _ in one]
    # One row alone is summed in another order, as ggml does.
    np.testing.assert_allclose([s for _, s in row], [s for _, s in one], rtol=1e-6)
    assert len(model.lens(clean["l_out-0"][2], k=10**9)[0]) == model.config.n_vocab
    for bad in (np.zeros(63), np.zeros((2, 2, 64)), clean["ffn_up-0"]):
        with pytest.raises(tinymia.Error, match=r"the lens takes rows of n_embd = 64 numbers, not \["):
            model.lens(bad)


def test_records_hold_what_the_actions_kept(model, clean):
    lens, log, save = Lens("l_out", 3), Log("kq-0"), Save("Kcur-1")
    records = do(model, lens, log, save, keep=[]).records
    assert [(r.name, r.layer) for r in records] == [("kq-0", 0), ("l_out-0", 0), ("Kcur-1", 1), ("l_out-1", 1)]
    assert [type(r.action) for r in records] == [Log, Lens, Save, Lens]
    assert all(list(r.positions) == list(range(9)) for r in records)
    assert records[1].value == model.lens(clean["l_out-0"], 3)
    np.testing.assert_array_equal(records[2].value, clean["Kcur-1"])
    assert records[0].value["shape"] == [4, 9, 9]
    x = clean["kq-0"].astype(np.float64)
    got = [records[0].value[k] for k in ("mean", "rms", "min", "max")]
    np.testing.assert_allclose(got, [x.mean(), np.sqrt((x * x).mean()), x.min(), x.max()], rtol=1e-5)


def test_actions_are_values_that_cannot_be_changed(model):
    """They print themselves, compare, and cannot be changed under a run's feet."""
    assert Scale("l_out-0", 2.0, at=3) == Scale("l_out-0", 2.0, at=3) != Scale("l_out-0", 3.0, at=3)
    assert "Scale" in repr(Scale("l_out-0", 2.0)) and "l_out-0" in repr(Scale("l_out-0", 2.0))
    with pytest.raises(dataclasses.FrozenInstanceError, match="'name'"):
        Scale("l_out-0", 2.0).name = "x"


# ------------------------------------------------------------------------------------------------ files


def test_a_saved_file_holds_the_tensor_and_where_it_is_from(model, clean, tmp_path):
    """Raw: ggml's bytes, as mia wrote them. With NumPy's formats come shape and where the numbers are from."""
    saves = [Save("Qcur-1", tmp_path / f"q{s}") for s in ("", ".npy", ".npz")]
    model.run(IDS, actions=[*saves, Save("l_out", tmp_path / "all.npz")])
    q = clean["Qcur-1"]
    assert (tmp_path / "q").read_bytes() == q.tobytes()
    np.testing.assert_array_equal(np.load(tmp_path / "q.npy"), q)
    with np.load(tmp_path / "q.npz") as f:
        np.testing.assert_array_equal(f["Qcur-1"], q)
    with np.load(tmp_path / "all.npz") as f:
        assert {n for n in f.files if n.startswith("l_out")} == {"l_out-0", "l_out-1"}
    for suffix in (".npy", ".npz"):                        # name, tokens and model travel with the numbers
        text = (tmp_path / f"q{suffix}").read_bytes()
        if suffix == ".npz":
            with np.load(tmp_path / "q.npz") as f:
                text = str(f["about"]).encode()
        assert all(word in text for word in (b"tokens", b"model", b"tiny"))
    assert not [p for p in tmp_path.iterdir() if p.name not in {"q", "q.npy", "q.npz", "all.npz"}]


def test_one_raw_file_holds_one_tensor(model, tmp_path):
    with pytest.raises(tinymia.Error, match="npz"):
        model.run(IDS, actions=[Save("l_out", tmp_path / "x")])
    assert not list(tmp_path.iterdir())


def test_save_joins_the_passes_while_decoding(model, tmp_path):
    gen = model.generate(IDS, n=4, actions=[Save("l_out-0", tmp_path / "x.npy", when="all")])
    whole = model.run([*IDS, *gen.tokens[:3]], keep=["l_out-0"])["l_out-0"]
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), whole, rtol=1e-4, atol=1e-5)


def test_saving_where_one_cannot(model, tmp_path):
    absent = tmp_path / "absent"
    for path, why in ((absent / "x", f"there is no folder {absent}"), (tmp_path, "is a folder")):
        with pytest.raises(tinymia.Error, match=f"^{re.escape(str(path))}: cannot be written: .*{re.escape(why)}"):
            model.run(IDS, actions=[Save("l_out-0", path)])


@pytest.mark.parametrize("content", [b"", b"abc", b"\x93NUMPY", b"PK\x03\x04abc",
                                     b"\x93NUMPY\x01\x00\xff\xff{'descr': '|O'}",
                                     np.lib.format.magic(1, 0)], ids=range(6))
@pytest.mark.parametrize("suffix", ["", ".npy", ".npz"])
def test_a_broken_file_is_not_a_saved_tensor(model, tmp_path, content, suffix):
    (tmp_path / f"x{suffix}").write_bytes(content)
    says = "not a saved tensor: " if suffix else r"(\d bytes are not a|not) raw float32"
    with pytest.raises(tinymia.Error, match=rf"x{re.escape(suffix)}: {says}") as e:
        do(model, Patch("l_out-0", tmp_path / f"x{suffix}", src=0, at=0))
    assert "\n" not in str(e.value)


def test_pickles_are_not_loaded(model, tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.savez(tmp_path / "x.npz", **{"l_out-0": np.array([{"a": 1}], object)})
    for name in ("x.npy", "x.npz"):
        with pytest.raises(tinymia.Error, match=f"{name}: not a saved tensor: an array of object"):
            do(model, Patch("l_out-0", tmp_path / name, src=0, at=0))


# ------------------------------------------------------------------------------------------------ what is asked for


def mask(n, *places):
    return [i in places for i in range(n)]


@pytest.mark.parametrize("at,rows", [(mask(9, 0), [0]), (np.array(mask(9, 8, 2)), [2, 8]), (range(2, 4), [2, 3]),
                                     ((np.int64(5), -1), [5, 8]), (np.int8(3), [3]), (mask(9, *range(9)), range(9))],
                         ids=str)
def test_a_mask_of_positions_chooses_where_it_is_true(model, clean, at, rows):
    assert differs_only_at(do(model, Scale("l_out-0", 2.0, at=at))["l_out-0"], clean["l_out-0"], rows)


def test_a_mask_of_heads_chooses_where_it_is_true(model, clean):
    for heads in (mask(4, 2), np.array(mask(4, 2)), [2], 2):
        run = do(model, Ablate("kqv-1", heads=heads))
        assert [i for i in range(4) if not run["kqv-1"][i].any()] == [2]
    run = do(model, Ablate("Kcur-1", heads=mask(2, 1)))         # there are as many as the tensor has, not as queries
    assert not run["Kcur-1"][:, 1].any() and np.array_equal(run["Kcur-1"][:, 0], clean["Kcur-1"][:, 0])


def test_a_mask_of_source_rows_and_of_targets(model, clean, other):
    run = do(model, Patch("l_out-0", other, src=mask(9, 1, 7), at=mask(9, 2, 8)))
    assert differs_only_at(run["l_out-0"], clean["l_out-0"], [2, 8])
    np.testing.assert_array_equal(run["l_out-0"][[2, 8]], other["l_out-0"][[1, 7]])


@pytest.mark.parametrize("given", [mask(3, 0), mask(9), True, np.True_, 1.5, 1.0, [1.0], np.array([2.0]), float("nan"),
                                   "1", ["1"], [[1]], np.array([[1]]), [], np.array([], np.intp), {1}, [True, 1],
                                   [None], (i for i in [1]), 10**30], ids=str)
def test_what_is_no_place_is_refused_before_the_run(model, given):
    seen = []
    look = Replace("inp_embd", lambda x, ctx: seen.append(1))
    for where in ({"at": given}, {"heads": given}):
        with pytest.raises(tinymia.Error, match="kqv-1: ") as e:
            do(model, look, Scale("kqv-1", 2.0, **where))
        assert "\n" not in str(e.value)
    with pytest.raises(tinymia.Error, match="l_out-0"):
        do(model, look, Patch("l_out-0", np.zeros((9, 64)), src=given, at=0))
    assert len(seen) <= 1                      # a mask of positions is held against the prompt when its tensor comes


def test_a_mask_is_of_the_prompts_tokens(model):
    """While decoding it chooses none of the new tokens, and for decoding alone it says so."""
    rows = []
    look = Replace("l_out-0", lambda x, ctx: rows.append([bool(r.any()) for r in x]), when="all")
    model.generate(IDS, n=3, actions=[Ablate("l_out-0", at=mask(9, 2), when="all"), look])
    assert rows == [[i != 2 for i in range(9)], [True], [True]]
    with pytest.raises(tinymia.Error, match="mask"):
        model.generate(IDS, n=3, actions=Ablate("l_out-0", at=mask(9, 2), when="decode"))


@pytest.mark.parametrize("when", ["decode", "all"])
def test_a_mean_over_one_row_would_change_nothing_and_is_refused(model, when):
    with pytest.raises(tinymia.Error, match="one row"):
        model.generate(IDS, n=3, actions=[Ablate("l_out-0", mode="mean", when=when)])
    with pytest.raises(tinymia.Error, match="one row"):
        model.run(IDS[:1], actions=[Ablate("l_out-0", mode="mean")])
    with pytest.raises(tinymia.Error, match="one row"):         # one row of these is computed
        model.run(IDS, actions=[Ablate("result_norm", mode="mean")], logits="last")


def test_a_value_goes_with_mode_value(model):
    for how in ({"mode": "zero", "value": 3.0}, {"mode": "mean", "value": 0.0}, {"mode": "value"}):
        with pytest.raises(tinymia.Error, match="value goes with mode value"):
            do(model, Ablate("l_out-0", **how))


def test_positions_that_never_come_are_told_of(model):
    with pytest.warns(tinymia.Note, match=r"\[99\] never came: the last one was 10"):
        model.generate(IDS, n=3, actions=[Scale("l_out-0", 1.5, at=[9, 99], when="decode")])
    with pytest.warns(tinymia.Note, match=r"\[-20\]"):
        model.generate(IDS, n=3, actions=[Scale("l_out-0", 1.5, at=[-20, -1], when="all")])


def test_one_action_needs_no_list(model, clean):
    action = Scale("l_out-0", 2.0)
    np.testing.assert_array_equal(model.run(IDS, keep="l_out-0", actions=action)["l_out-0"], 2 * clean["l_out-0"])
    assert model.generate(IDS, n=4, actions=action).tokens == model.generate(IDS, n=4, actions=[action]).tokens
    assert model.run(IDS, keep="l_out-0", actions=(a for a in [action])).names == ["l_out-0"]
    for bad in ("l_out", ["l_out"], 3, None):
        with pytest.raises(tinymia.Error, match="not an action"):
            model.run(IDS, actions=bad)


# ------------------------------------------------------------------------------------------------ several sources


def test_rows_are_chosen_before_the_mean_is_taken(model, tmp_path):
    """The post's --patch-avg: the last rows of two prompts, however long each is."""
    runs = [model.run(prompt(n), keep="l_out-0", actions=Save("l_out-0", tmp_path / f"{n}.npz")) for n in (4, 7, 9)]
    want = np.mean([run["l_out-0"][-1] for run in runs], axis=0)
    files = tuple(tmp_path / f"{n}.npz" for n in (4, 7, 9))
    for sources in (tuple(runs), files, (runs[0], files[1], runs[2]["l_out-0"])):
        got = do(model, Patch("l_out-0", sources, src=-1, at=-1))["l_out-0"]
        np.testing.assert_allclose(got[8], want, rtol=1e-6)
    got = do(model, Patch("l_out-0", tuple(runs), src=[-1, 1], at=[3, 4]))["l_out-0"]
    np.testing.assert_allclose(got[[3, 4]], np.mean([r["l_out-0"][[-1, 1]] for r in runs], axis=0), rtol=1e-6)
    got = do(model, Patch("l_out-0", tuple(runs), at=[1, 3]))["l_out-0"]        # the same positions of each
    np.testing.assert_allclose(got[[1, 3]], np.mean([r["l_out-0"][[1, 3]] for r in runs], axis=0), rtol=1e-6)
    with pytest.raises(tinymia.Error, match="4 rows, 0 to 3"):
        do(model, Patch("l_out-0", tuple(runs), src=5, at=-1))
    for action in (Patch("l_out-0", tuple(runs)), Ablate("l_out-0", mode="resample", source=tuple(runs))):
        with pytest.raises(tinymia.Error, match="no mean"):
            do(model, action)


def test_one_row_and_many_rows_have_a_mean(model, other):
    row = np.ones((1, 64), np.float32)
    got = do(model, Patch("l_out-0", (row, other), at=[2, 5]))["l_out-0"]
    np.testing.assert_allclose(got[[2, 5]], (row + other["l_out-0"][[2, 5]]) / 2, rtol=1e-6)


def test_every_action_takes_several_sources(model, clean):
    a, b = (model.run(prompt(n), keep="l_out-0") for n in (4, 7))
    x = clean["l_out-0"]
    got = do(model, Add("l_out-0", (a, b), 2.0, row=-1))["l_out-0"]
    np.testing.assert_allclose(got, x + a["l_out-0"][-1] + b["l_out-0"][-1], rtol=1e-4, atol=1e-5)
    d = [np.eye(64, dtype=np.float32)[i] for i in (3, 4)]
    got = do(model, ProjectOut("l_out-0", (d[0], d[1])))["l_out-0"]
    np.testing.assert_allclose(got @ (d[0] + d[1]), 0, atol=1e-5)
    two = [model.run(prompt(9, seed=s), keep="kqv-1") for s in (5, 6)]
    got = do(model, Ablate("kqv-1", mode="resample", source=tuple(two)))["kqv-1"]
    np.testing.assert_allclose(got, (two[0]["kqv-1"] + two[1]["kqv-1"]) / 2, rtol=1e-5, atol=1e-6)
    for source in ((), ["a", "b"], object(), {1}):
        says = "a tuple of no sources" if source == () else "a source is a file, an array, a Run, or a tuple of these"
        with pytest.raises(tinymia.Error, match=f"^l_out-0: {says}"):
            do(model, Patch("l_out-0", source, src=0, at=0))


def test_a_file_of_another_tensor_is_told_of(model, clean, tmp_path):
    model.run(IDS, actions=[Save("l_out-0", tmp_path / "x.npz"), Save("ffn_up-0", tmp_path / "u.npy")])
    for action in (Patch("l_out-1", tmp_path / "x.npz", src=-1, at=-1), Add("l_out-1", tmp_path / "x.npz", row=-1)):
        with pytest.warns(tinymia.Note, match=r"x\.npz holds l_out-0; its rows go to l_out-1"):
            do(model, action)
    with pytest.raises(tinymia.Error, match=r"u\.npy holds ffn_up-0, 96 wide; l_out-0 is 64 wide"):
        do(model, Patch("l_out-0", tmp_path / "u.npy", src=-1, at=-1))
    (tmp_path / "junk").write_bytes(b"abcdefgh")
    with pytest.raises(tinymia.Error, match="junk: 2 numbers are not rows of 64"):
        do(model, Patch("l_out-0", tmp_path / "junk", src=-1, at=-1))


# ------------------------------------------------------------------------------------------------ what is printed


def test_a_layer_out_of_range_is_told_what_there_is(model):
    for name in ("l_out-14", "kqv_merged_cont-2", "norm-7"):
        with pytest.raises(tinymia.UnknownName, match="this model has layers 0 to 1"):
            model.run(IDS, keep=name)


def test_a_run_is_read_by_name(model):
    run = model.run(IDS, keep=["l_out-1", "kqv_merged-0"])
    assert list(run) == run.names and "l_out-1" in run and "l_out-0" not in run
    np.testing.assert_array_equal(run["kqv_merged_cont-0"], run["kqv_merged-0"])
    for name, words in (("lout-1", "closest: l_out-1"), ("l_out-9", "layers 0 to 1"), ("l_out", "2 tensors"),
                        ("l_out-0", r"ask with keep=\['l_out-0'\]; kept: kqv_merged-0, l_out-1"), (3, "by its name")):
        with pytest.raises(tinymia.UnknownName, match=words):
            run[name]


def test_what_prints_itself_says_what_it_is(model, tmp_path):
    run = model.run("the quick brown fox", keep="l_out")
    assert repr(run).startswith("Run('the quick brown fox', ") and "l_out-0" in repr(run)
    assert "row -1 of Run('the quick" in repr(Patch("l_out-0", run, src=-1, at=-1)) and len(repr(run)) < 90
    assert "x.npz" in repr(Patch("l_out-0", tmp_path / "x.npz", 2, at=3))
    assert "[9, 64]" in repr(Add("a", np.zeros((9, 64))))
    assert repr(Scale("l_out-0", 2.0, at=[3])) == "Scale('l_out-0', factor=2.0, at=[3])"
    assert repr(Replace("a", logits_of)) == "Replace('a', fn=logits_of)"
    assert "tiny: 2 layers of 4 heads, 64 wide, 384 tokens, F32" in repr(model)


# ------------------------------------------------------------------------------------------------ what is given


@pytest.mark.parametrize("bad", [True, "2", b"2", 1j, 10**400, None, object(), [1, [2]], np.array([True])],
                         ids=lambda v: repr(v)[:12])
def test_a_factor_a_coefficient_and_a_value_are_numbers(model, bad):
    """Before the run; Python would take True for 1 and "2" for 2."""
    for action in (Scale("l_out-0", bad), Add("l_out-0", np.ones(64), bad), Ablate("l_out-0", mode="value", value=bad)):
        with pytest.raises(tinymia.Error, match=r"number|a value goes with"):
            action.bind("l_out-0", model.table["l_out-0"][0], model)
    for good in (2, np.float32(2), np.array(2), np.full(64, 2.0), [2] * 64):
        doubled = model.run(IDS, actions=Scale("l_out-0", good), keep="l_out-0")["l_out-0"]
        assert np.array_equal(doubled, 2 * model.run(IDS, keep="l_out-0")["l_out-0"])


@pytest.mark.parametrize("action", [Scale("l_out-0", [1, 2]), Ablate("l_out-0", mode="value", value=np.ones(63))])
def test_numbers_that_do_not_fit_are_told_with_the_shape(model, action):
    with pytest.raises(tinymia.ActionError, match=r"its numbers do not fit l_out-0, here \[\d, 64\]"):
        model.run(IDS, actions=action)


@pytest.mark.parametrize("argument,bad,says", [
    ("keep", 3, "keep is 3; it must be a name"), ("keep", True, "keep is True; it must be a name"),
    ("keep", b"l_out-0", "a tensor is chosen by its name"),
    *(("cache", bad, r"cache is .*; it must be what Model\.cache\(\) gives") for bad in (3, {}, "x")),
    *(("start", bad, r"start is .*; it must be \(layer, x\), x of shape \[9, 64\]") for bad in (3, (1,))),
    ("start", (1.0, np.ones((9, 64))), "the layer of start is 1.0; it must be a whole number"),
    *(("start", (1, bad), "x of start is .*; it must be a number, or an array of numbers")
      for bad in ("x", np.ones((9, 64)) * 1j, None)),
    *(("actions", bad, "(None|3|'a') is not an action") for bad in (None, 3, {"a": 1})),
    ("logits", True, "logits=True: it must be all or last"),
], ids=lambda v: repr(v)[:20])
def test_an_argument_of_another_kind_is_one_error(model, argument, bad, says):
    with pytest.raises(tinymia.Error, match=says) as e:
        model.run(IDS, **{argument: bad})
    assert "\n" not in str(e.value)
    assert model.run(IDS, keep=None).names == []
