"""Attribution patching: each cell against a central difference, the cells that are checked against the sweep itself."""
import numpy as np
import pytest
from conftest import command, prompt

import tinymia
from tinymia_lab import sweep
from tinymia_lab.commands.sweep import Sweep, picture

CLEAN, CORRUPT = "Egypt -> Cairo, France ->", "Egypt -> Cairo, Norway ->"
POSITIONS, TENSORS = ["l_out", "kqv_out", "ffn_out"], ["l_out", "kqv_out", "ffn_out", "kqv", "kq_soft_max"]


@pytest.fixture(scope="module")
def exact(tiny):
    return tinymia.load(tiny(n_layer=3), numerics="plain", dtype="float64")


def ends():
    """Two prompts that differ in one token."""
    clean = prompt(7)
    return clean, [*clean[:3], 350, *clean[4:]]


def difference(model, ids, actions, answer, against):
    row = model.run(ids, actions=actions).logits[-1]
    return row[answer] - row[against]


def moved(x, tensor, column, last, far):
    """x with one piece moved by `far`, an array of x's shape."""
    x, rows, part = x.copy(), slice(-1 if last else None, None), np.zeros_like(x)
    if tensor in POSITIONS:
        part[column] = far[column]
    else:
        part[column, rows] = far[column, rows]
    return x + part


@pytest.mark.parametrize("noising", [False, True])
@pytest.mark.parametrize("tensor, at", [*[(name, "all") for name in TENSORS], ("kqv", "last")])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_cell_is_the_slope_towards_the_patch(exact, tensor, at, noising, steps):
    """By central differences: of the base run, or of runs in the middle of each third of the way between embeddings."""
    clean, corrupt = ends()
    found = sweep(exact, clean, corrupt, 300, 301, tensor=tensor, at=at, noising=noising, estimate=True, steps=steps)
    base, other = (clean, corrupt) if noising else (corrupt, clean)
    own, source = (exact.run(ids, keep=["inp_embd", tensor]) for ids in (base, other))
    high, low = (difference(exact, ids, [], 300, 301) for ids in (clean, corrupt))
    start, h = high if noising else low, 1e-5
    for (i, column), got in np.ndenumerate(found.logit_difference):
        name, slopes = f"{tensor}-{i}", []
        far = source[name] - own[name]
        for share in [0] if steps == 1 else [1 / 6, 3 / 6, 5 / 6]:
            between = tinymia.Patch("inp_embd", own["inp_embd"] + share * (source["inp_embd"] - own["inp_embd"]))

            def moved_by(h, name=name, far=far, column=column, between=between):
                move = tinymia.Replace(name, lambda x, ctx: moved(x, tensor, column, at == "last", h * far))
                return difference(exact, base, [between, move], 300, 301)

            slopes.append((moved_by(h) - moved_by(-h)) / (2 * h))
        want = (start + np.mean(slopes) - low) / (high - low)
        assert got == pytest.approx(want, rel=1e-5, abs=1e-7), (name, column)
    assert np.ptp(found.logit_difference) > 0


@pytest.mark.parametrize("tensor", ["l_out", "kqv"])
def test_what_is_checked_is_the_sweep(copycat_f32, tensor, tmp_path):
    """The largest cells; all of them if there are not more. The file keeps both, and is not made again."""
    whole = sweep(copycat_f32, CLEAN, CORRUPT, tensor=tensor)
    path = tmp_path / "estimate.npz"
    found = sweep(copycat_f32, CLEAN, CORRUPT, tensor=tensor, estimate=True, check=5, out=path)
    known = np.isfinite(found.exact)
    assert known.sum() == 5 and np.abs(found.logit_difference[known]).min() >= np.abs(
        found.logit_difference[~known]).max()
    np.testing.assert_allclose(found.exact[known], whole.logit_difference[known], atol=1e-6)
    everything = sweep(copycat_f32, CLEAN, CORRUPT, tensor=tensor, estimate=True, check=1000)
    np.testing.assert_allclose(everything.exact, whole.logit_difference, atol=1e-6)
    assert np.corrcoef(everything.exact.ravel(), everything.logit_difference.ravel())[0, 1] > 0.9
    again = sweep(copycat_f32, CLEAN, CORRUPT, tensor=tensor, estimate=True, check=5, out=path)
    np.testing.assert_array_equal(again.exact, found.exact)
    np.testing.assert_array_equal(Sweep.load(path).logit_difference, found.logit_difference)
    with pytest.raises(tinymia.Error, match="holds another run: its settings steps is 1, not 2"):
        sweep(copycat_f32, CLEAN, CORRUPT, tensor=tensor, estimate=True, check=5, steps=2, out=path)


def test_layers_are_chosen(copycat_f32):
    whole = sweep(copycat_f32, CLEAN, CORRUPT, estimate=True)
    some = sweep(copycat_f32, CLEAN, CORRUPT, estimate=True, layers="1,4", check=2)
    np.testing.assert_allclose(some.logit_difference, whole.logit_difference[[1, 4]], atol=1e-6)
    assert some.exact.shape == (2, 7) and whole.exact.shape == (6, 7) and np.isnan(whole.exact).all()


def test_the_words_say_that_it_is_an_estimate(copycat_f32):
    found = sweep(copycat_f32, CLEAN, CORRUPT, estimate=True, steps=2, check=3)
    lines = repr(found).splitlines()
    assert "estimated in 2 steps" in picture(found).title
    assert lines[-1].startswith("correlation of these 3: ") and lines[-5].split() == ["layer", "position", "estimate",
                                                                                      "exact"]
    assert "nan" not in "\n".join(map("\n".join, picture(found).hovers))


@pytest.mark.parametrize("how, says", [
    (dict(steps=2), "--steps and --check go with --estimate"),
    (dict(check=2), "--steps and --check go with --estimate"),
    (dict(estimate=True, metric="kl"), "an estimate is of the logit difference, and there is none of metric kl"),
    (dict(estimate=True, steps=0), "steps is 0: it must be 1 or more"),
    (dict(estimate=True, check=-1), "check is -1: it must be 0 or more"),
    (dict(estimate=True, steps=1.5), "steps is 1.5; it must be a whole number"),
])
def test_what_does_not_go_together(copycat_f32, how, says):
    with pytest.raises(tinymia.Error, match=says):
        sweep(copycat_f32, CLEAN, CORRUPT, **how)


def test_the_command():
    two = ["sweep", "--clean", CLEAN, "--corrupt", CORRUPT]
    status, out, _ = command(*two, "--estimate", "--check", "2")
    assert status == 0 and "estimated in 1 step" in out and "correlation of these 2" in out
    for flags, says in ((["--check", "2"], "--steps and --check go with --estimate"),
                        (["--estimate", "--steps", "0"], "--steps"),
                        (["--estimate", "--metric", "rank"], "an estimate is of the logit difference")):
        status, _, err = command(*two, *flags)
        assert status == 2 and says in err and err.count("\n") == 1, err
    status, _, err = command("sweep", "--pairs", "copycat-capitals", "--estimate")
    assert status == 2 and "--estimate" in err, err
