"""Gradients by name: by central differences in float64, for every name of every architecture, and by torch."""
import tracemalloc

import architectures
import numpy as np
import pytest
from conftest import prompt, real_model
from formats import random_weights
from naive import nmse
from test_forward import SHAPES

import tinymia
import tinymia_backward
from tinymia import Ablate, Add, Logit, LogitDifference, LogProb, Loss, Patch, ProjectOut, Replace, Scale
from tinymia_engine import stream
from tinymia_files import Tensor
from tinymia_files.types import TYPES
from tinymia_kernels import FORMATS, Arithmetic

EVERY = pytest.mark.parametrize("arch, name", architectures.EVERY)
N_TOK = 11      # longer than the windows of 5 and 8
TWO = [LogitDifference(300, 301), Loss()]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """exact(arch, name): a model of that shape in float64, loaded once."""
    made, folder = {}, tmp_path_factory.mktemp("gradients")

    def make(arch="llama", name="plain", **more):
        key = repr((arch, name, sorted(more.items())))
        if key not in made:
            path = architectures.write(folder / f"{len(made)}.gguf", arch, name, **more)
            n_ctx = architectures.LONGER.get((arch, name))
            made[key] = tinymia.load(path, numerics="plain", dtype="float64", n_ctx=n_ctx)
        return made[key]

    return make


def values(metrics, logits, ids):
    """What the metrics are, from their definitions."""
    top = logits.max(1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    of = {
        Logit: lambda m: logits[m.at, m.token], LogitDifference: lambda m: logits[m.at, m.a] - logits[m.at, m.b],
        LogProb: lambda m: logp[m.at, m.token],
        Loss: lambda m: -np.mean([logp[i, ids[i + 1]] for i in (range(len(ids) - 1) if m.at is None else m.at)]),
    }
    return np.array([of[type(m)](m) for m in metrics])


def directional(model, ids, name, u, metrics, actions=(), start=None, h=2e-3):
    """d metrics / d h of the run in which h u is added to a tensor, by central differences of fourth order."""
    def at(h):
        push = Replace(name, lambda x, ctx: x + h * u)
        return values(metrics, model.run(ids, actions=[*actions, push], start=start).logits, ids)

    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def assert_gradient(model, ids, name, g, metrics, run, actions=(), start=None):
    """A random direction: the difference is at most 1e-6 of what such a product comes to."""
    u = np.random.default_rng(len(name)).standard_normal(run[name].shape) * np.sqrt(np.mean(run[name] ** 2))
    want = directional(model, ids, name, u, metrics, actions, start)
    for one, expected in zip(g[name], want):
        got, usual = np.sum(one * u), np.linalg.norm(one) * np.sqrt(np.mean(u**2))
        assert usual > 0 and abs(got - expected) <= 1e-6 * usual, (name, got, expected)


def assert_all_gradients(model, ids, metrics):
    """Every name of a model; a run begins at the layer of the tensor that is pushed."""
    g, n = model.gradients(ids, of=metrics, wrt="all", keep="all"), model.config.n_layer
    assert list(g) == list(model.table)
    np.testing.assert_allclose(g.value, values(metrics, g.run.logits, ids), rtol=1e-12)
    for tensor, (_, il) in model.table.items():
        il = n if il is None and not tensor.startswith("inp") else il
        start = None if il is None else (il, g.run[stream(model.config, il)])
        assert g[tensor].shape == (len(metrics), *g.run[tensor].shape) and g[tensor].dtype == np.float64
        assert_gradient(model, ids, tensor, g, metrics, g.run, start=start)


@EVERY
def test_every_name_of_every_architecture(exact, arch, name):
    """Each tensor is pushed in a random direction. Two metrics, which go back together."""
    assert_all_gradients(exact(arch, name), prompt(N_TOK), TWO)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_llama(tiny, shape):
    """Grouped heads, widths of heads, a tied output, biases, scaled RoPE."""
    model = tinymia.load(tiny(**SHAPES[shape]), numerics="plain", dtype="float64")
    assert_all_gradients(model, prompt(5), TWO)


@pytest.mark.parametrize("metric", [
    Logit(300), Logit("#300", at=2), LogitDifference("#7", 8, at=-3), LogProb(300), LogProb(301, at=[4]), Loss(),
    Loss(at=3), Loss(at=[0, -3])])
def test_every_metric(exact, metric):
    model, ids = exact(), prompt(7)
    bound = metric.bind(model, ids)
    g = model.gradients(ids, of=metric, wrt=["inp_embd", "Vcur-0", "ffn_gate-1", "norm", "result_output"], keep="all")
    assert isinstance(g.value, float) and g["Vcur-0"].shape == g.run["Vcur-0"].shape
    want = values([bound], g.run.logits, ids)
    np.testing.assert_allclose([g.value], want.reshape(1), rtol=1e-12)
    for name in g:
        u = np.random.default_rng(1).standard_normal(g[name].shape)
        expected = directional(model, ids, name, u, [bound])
        assert abs(np.sum(g[name] * u) - expected.item()) <= 1e-6 * np.linalg.norm(g[name])


def test_a_function_of_the_logits(exact):
    """It gets the logits of all positions, and says itself how they are differentiated."""
    model, ids = exact(), prompt(7)
    w = np.random.default_rng(2).standard_normal((7, model.config.n_vocab))
    g = model.gradients(ids, of=lambda x: ((w * x**2).sum(), 2 * w * x), wrt="l_out-0", keep=["l_out-0"])
    u = np.random.default_rng(3).standard_normal(g["l_out-0"].shape)

    def at(h):
        return (w * model.run(ids, actions=Add_rows("l_out-0", h * u)).logits ** 2).sum()

    assert g.value == pytest.approx(at(0), rel=1e-12)
    want = (8 * (at(1e-3) - at(-1e-3)) - (at(2e-3) - at(-2e-3))) / 12e-3
    assert np.sum(g["l_out-0"] * u) == pytest.approx(want, rel=1e-6)


def Add_rows(name, rows):
    return Replace(name, lambda x, ctx: x + rows)


def test_several_metrics_are_each_by_itself(exact):
    model, ids = exact("gemma3", "two rope bases"), prompt(N_TOK)
    metrics = [Logit(300), LogProb(12, at=2), Loss(), lambda x: (float(x.sum()), np.ones_like(x))]
    together = model.gradients(ids, of=metrics, wrt=["inp_embd", "kq-2", "l_out-*", "result_norm"])
    for i, metric in enumerate(metrics):
        alone = model.gradients(ids, of=metric, wrt=list(together))
        assert together.value[i] == alone.value
        for name in together:
            np.testing.assert_allclose(together[name][i], alone[name], rtol=1e-9, atol=1e-12 * abs(alone[name]).max())
    assert model.gradients(ids, of=metrics[:1], wrt="l_out-2")["l_out-2"].shape == (1, N_TOK, model.config.n_embd)


@EVERY
def test_what_is_asked_for_does_not_change_the_gradient(exact, monkeypatch, arch, name):
    """Attention in a few rows at a time or step by step, weights in panels, only the last row of logits or all."""
    model, ids = exact(arch, name), prompt(N_TOK)
    of = [LogitDifference(300, 301), LogProb(8)]
    whole = model.gradients(ids, of=of, wrt="all")
    monkeypatch.setattr(tinymia_backward, "ROWS", 6)        # three per metric
    monkeypatch.setattr(tinymia_backward, "PANEL", 50)
    steps = ("kq", "kq_scaled_2", "kq_soft_max", "kqv", "norm", "result_norm", "result_output_pre", "result_output")
    fused = [n for n, (op, il) in model.table.items() if op.base not in steps or (op.base == "norm" and il is not None)]
    for wrt in (fused, ["ffn_inp-1"], ["inp_embd"]):
        some = model.gradients(ids, of=of, wrt=wrt)
        assert list(some) == wrt and some.run.logits.shape[0] == 1
        np.testing.assert_allclose(some.value, whole.value, rtol=1e-12)
        for n in wrt:
            assert nmse(some[n], whole[n]) < 1e-24, n


def test_weights_are_never_unpacked_whole(load, monkeypatch):
    """A few rows at a time, each once for all tokens and metrics; of the output matrix only the rows in question."""
    model, ids, seen = load("f32", wtype="Q4_0", n_ff=160), prompt(9), []
    monkeypatch.setattr(tinymia_backward, "PANEL", 32)
    embed = model.ops.embed

    def noted(self, weight, rows):
        seen.append((weight.name, list(rows)))
        return embed(weight, rows)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.ops), "embed", noted)
        model.gradients(ids, of=[LogitDifference(300, 301), Logit(300)], wrt="inp_embd")
    rows = {}
    for name, some in seen[1:]:                             # the first are the embeddings of the prompt
        assert len(some) <= 32
        rows.setdefault(name, []).extend(some)
    assert rows.pop("output.weight") == [300, 301]
    assert len(rows) == 7 * model.config.n_layer
    for name, some in rows.items():
        assert some == list(range(model.weights[name].shape[0])), name


ON = ["inp_embd", "attn_norm-0", "Qcur-0", "Kcur_pre-1", "Vcur-0", "kq-1", "kq_soft_max-0", "kqv-1", "kqv_merged-0",
      "ffn_inp-0", "ffn_silu-1", "ffn_out-0", "l_out-0", "l_out-1", "norm", "result_output"]


@pytest.mark.parametrize("name", ON)
def test_gradients_go_through_actions(exact, name):
    """Every action that changes a value, on tensors of every shape: what comes before it is pushed, and itself."""
    model, ids = exact(), prompt(6)
    other = model.run(prompt(6, seed=5), keep=[name])
    heads = dict(heads=[1]) if {"n_head", "n_head_kv", "n_head*d_head_v"} & set(model.table[name][0].dims) else {}
    row = np.take(other[name], [3], model.table[name][0].dims.index("n_tok"))
    actions = [
        Scale(name, 0.7), Scale(name, -1.3, at=[-2, 4], **heads), Patch(name, other, src=2, at=4, **heads),
        Ablate(name, "zero", at=3), Ablate(name, "mean", at=[1, 5], **heads), Ablate(name, "mean"),
        Ablate(name, "resample", source=other, at=2), Ablate(name, "value", value=0.3, at=[5], **heads),
        Add(name, row, 0.5, at=[4, -1]), ProjectOut(name, row), ProjectOut(name, row, at=4, **heads),
    ]
    actions += [[Scale(name, 0.5), Ablate(name, "mean", at=5), Add(name, row, 2.0), Scale(name, 3.0, at=5)]]
    for some in actions:
        some = some if isinstance(some, list) else [some]
        before = ["inp_embd", "Vcur-0", "l_out-0", "ffn_gate-1"]
        g = model.gradients(ids, of=TWO, wrt=[*before, name], actions=some, keep=[*before, name])
        np.testing.assert_allclose(g.value, values(TWO, model.run(ids, actions=some).logits, ids), rtol=1e-12)
        for n in {*before, name}:
            u = np.random.default_rng(1).standard_normal(g.run[n].shape)
            want = directional(model, ids, n, u, TWO, some, h=2e-6)     # small beside the root of eps, for zeros
            scale = max(np.linalg.norm(one) for one in [*g[n], *model.gradients(ids, of=TWO, wrt=n)[n]])
            got = [np.sum(one * u) for one in g[n]]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * scale, err_msg=f"{some} {n}")


def test_a_patched_row_passes_nothing_on(exact):
    model, ids = exact(), prompt(6)
    other = model.run(prompt(6, seed=5), keep=["l_out-0"])
    g = model.gradients(ids, of=Logit(300), wrt=["ffn_out-0", "l_out-0"], actions=Patch("l_out-0", other, src=3, at=5))
    assert not g["ffn_out-0"][5].any() and g["ffn_out-0"][:5].any() and g["l_out-0"][5].any()


def square(x, ctx):
    return x * x


def test_a_replacement_needs_its_own_backward(exact):
    model, ids = exact(), prompt(6)
    with pytest.raises(tinymia.ActionError, match=r"no gradient goes through Replace\('ffn_out-1', fn=square\): give"):
        model.gradients(ids, of=Logit(300), wrt="l_out-0", actions=Replace("ffn_out-1", square))
    g = model.gradients(ids, of=Logit(300), wrt=["ffn_out-1", "l_out-1"], actions=Replace("ffn_out-1", square))
    assert g["ffn_out-1"].any()                                 # with respect to what it made: nothing goes through it
    replace = Replace("ffn_out-1", square, backward=lambda d, x, ctx: 2 * x * d)
    g = model.gradients(ids, of=TWO, wrt="l_out-0", actions=replace, keep="l_out-0")
    assert_gradient(model, ids, "l_out-0", g, TWO, g.run, [replace])
    wrong = Replace("ffn_out-1", square, backward=lambda d, x, ctx: d[0])
    with pytest.raises(tinymia.ActionError, match=r"backward returned the shape \[64\], not \[6, 64\]"):
        model.gradients(ids, of=Logit(300), wrt="l_out-0", actions=wrong)


class Doubled(tinymia.Action):
    def apply(self, x, ctx):
        return 2 * x


class Halved(tinymia.Edit):
    def edit(self, x, rows, which):
        return x[rows] / 2


@pytest.mark.parametrize("action, needs", [(Doubled, r"vjp\(d, x, ctx\)"), (Halved, r"edit_vjp\(d, dx, rows\)")])
def test_an_action_of_ones_own_says_what_it_needs(exact, action, needs):
    with pytest.raises(tinymia.ActionError, match=rf"no gradient goes through .*'l_out-1'.* needs a method {needs}"):
        exact().gradients(prompt(6), of=Logit(300), wrt="l_out-0", actions=action("l_out-1"))


def test_looking_changes_nothing_and_happens_once(exact, tmp_path):
    model, ids, seen = exact(), prompt(6), []
    looks = [tinymia.Log("all"), tinymia.Lens("l_out-0"), tinymia.Save("kq-0", tmp_path / "kq.npy"),
             Replace("l_out-1", lambda x, ctx: seen.append(1))]
    g = model.gradients(ids, of=Logit(300), wrt="inp_embd", actions=looks)
    np.testing.assert_array_equal(g["inp_embd"], model.gradients(ids, of=Logit(300), wrt="inp_embd")["inp_embd"])
    assert len(g.run.records) == len(model.table) + 2 and seen == [1] and (tmp_path / "kq.npy").exists()


QUANTISED = pytest.mark.parametrize("wtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_product_goes_back_in_every_format(fmt, monkeypatch):
    """d W in panels of rows, with a factor of the weight; d has rows and columns that are 0."""
    rng = np.random.default_rng(fmt.type)
    raw, w = random_weights(fmt, rng, 37, 2 * max(fmt.block_size, 16))
    weight = Tensor("w", w.shape, TYPES[fmt.type], raw, np.float32(0.5))
    d = rng.standard_normal((2, 5, 37)).astype(np.float32)
    d[0, 3], d[..., 11] = 0, 0
    monkeypatch.setattr(tinymia_backward, "PANEL", 8)
    got = tinymia_backward.linear(Arithmetic(1, "ggml"), d, tinymia_backward.Linear(weight, None))
    assert got.dtype == np.float32 and nmse(got, 0.5 * d.astype(np.float64) @ w) <= 1e-12
    assert not got[0, 3].any()


@QUANTISED
def test_quantised_weights_in_f32(tiny, wtype):
    """The gradient of the function itself, in float32: that of float64 (worst 2e-12)."""
    ids, path = prompt(70), tiny(wtype=wtype)
    fast = tinymia.load(path, numerics="f32", threads=1).gradients(ids, of=TWO, wrt="all")
    exact = tinymia.load(path, numerics="plain", dtype="float64").gradients(ids, of=TWO, wrt="all")
    for name in exact:
        assert fast[name].dtype == np.float32 and nmse(fast[name], exact[name]) <= 2e-11, name


@QUANTISED
def test_under_ggml_rounding_counts_as_identity(tiny, wtype):
    """The same as in f32, if there each tensor is replaced by ggml's, and the gradient goes through the replacement
    unchanged. Left over are the steps of F16 in the cache and in the pattern (worst 4e-7)."""
    ids, path = prompt(70), tiny(wtype=wtype)
    g = tinymia.load(path, threads=1).gradients(ids, of=TWO, wrt="all", keep="all")
    put = [Replace(name, lambda x, ctx: g.run[ctx.name], backward=lambda d, x, ctx: d) for name in g]
    judge = tinymia.load(path, numerics="f32", threads=1).gradients(ids, of=TWO, wrt="all", actions=put)
    for name in g:
        assert nmse(g[name], judge[name]) <= 2e-6, name


def test_one_token(exact):
    model = exact()
    g = model.gradients([1], of=Logit(300), wrt="all", keep="all")
    assert_gradient(model, [1], "l_out-0", model.gradients([1], of=[Logit(300)], wrt="l_out-0"), [
        Logit(300, at=[0])], g.run)
    with pytest.raises(tinymia.Error, match="Loss: the prompt has one token, and none that comes next"):
        model.gradients([1], of=Loss(), wrt="inp_embd")


def test_memory_grows_with_the_tokens_and_not_with_their_square(load):
    """Without a name of the attention pattern: 4 times the tokens take less than 5 times the memory."""
    model, peaks = load("f32", n_ctx=2048, n_head=8, n_head_kv=2), []
    model.gradients(prompt(9), of=Logit(300), wrt="inp_embd")
    for n in (512, 2048):
        ids = prompt(n)
        tracemalloc.start()
        model.gradients(ids, of=Logit(300), wrt="inp_embd")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0] and peaks[1] < 2048 * 2048 * 8 * 4, peaks


def test_a_gradient_is_a_source_of_actions(load):
    """A step along the gradient of the last row raises the logit by about the square of the gradient's length."""
    model, ids = load("f32"), prompt(6)
    g = model.gradients(ids, of=Logit(300), wrt="l_out-0")
    stepped = model.run(ids, actions=Add("l_out-0", g, 1e-2, row=-1, at=-1))
    rise = (stepped.logits[-1, 300] - g.value) / 1e-2
    assert rise == pytest.approx((g["l_out-0"][-1] ** 2).sum(), rel=0.05)


PARIS = "Egypt -> Cairo, France ->"


def test_words_are_tokens(copycat_f32):
    g = copycat_f32.gradients(PARIS, of=LogitDifference(" Paris", " Oslo"), wrt=["l_out-*", "kqv-3"])
    assert list(g) == [n for n in copycat_f32.table if n.startswith("l_out-") or n == "kqv-3"]
    assert g["kqv-3"].shape == (4, 7, 32) and g["l_out-3"].dtype == np.float32
    assert "value" in repr(g) and "l_out-0" in repr(g)


@pytest.mark.parametrize("of, says", [
    (Logit(" Parisian Oslo"), r"' Parisian Oslo' is not one token but \d+"),
    (Logit("Paris"), r"there is no token 'Paris'; did you mean ' Paris' \(with a space\)"),
    (Logit(2048), r"Logit: token id 2048 is out of range: the model has 2048 tokens, 0 to 2047"),
    (Logit(1.5), r"Logit: the token is 1.5; it must be a whole number"),
    (LogitDifference(" Paris", " Paris"), r"both tokens are ' Paris', and their difference is always 0"),
    (Logit(" Paris", at=7), r"position 7 is out of range: the prompt has 7 tokens, 0 to 6"),
    (Logit(" Paris", at=[1, 2]), r"it is of one position; for several of them, give a list of metrics"),
    (Logit(" Paris", at=0.5), r"Logit: positions 0.5: they must be whole numbers"),
    (Loss(at=-1), r"no token of the prompt comes after its last position, 6"),
    ([], r"of is an empty list"),
    (" Paris", r"of is ' Paris'; it must be Logit\(token\), LogitDifference"),
    (Logit, r"of is .*; it must be Logit\(token\)"),
    (lambda x: 1.0, r"of=.*<lambda> returned 1.0; it must return \(value, d value / d logits\)"),
    (lambda x: (1.0, x[0]), r"derivative of \[2048\]; they must be one number and \[7, 2048\]"),
    (lambda x: (1.0, None), r"of=.*d is None; it must be a number"),
    (lambda x: (float("nan"), x), r"the value of .* is nan"),
    (lambda x: (1.0, x * np.nan), r"the gradient with respect to l_out-5 is not finite"),
])
def test_what_cannot_be_differentiated(copycat_f32, of, says):
    with pytest.raises(tinymia.Error, match=says):
        copycat_f32.gradients(PARIS, of=of, wrt="l_out-5")


@pytest.mark.parametrize("wrt, says", [
    ("l_outs", r"no tensor is called 'l_outs'; closest: l_out"), ("l_out-6", r"this model has layers 0 to 5"),
    ([], r"wrt is empty"), (None, r"wrt is empty"), (3, r"wrt is 3; it must be a name, or a list of names"),
    ([3], r"a tensor is chosen by its name"),
])
def test_names_that_are_no_tensors(copycat_f32, wrt, says):
    with pytest.raises(tinymia.Error, match=says):
        copycat_f32.gradients(PARIS, of=Logit(" Paris"), wrt=wrt)


def test_what_was_not_asked_for(copycat_f32):
    g = copycat_f32.gradients(PARIS, of=Logit(" Paris"), wrt=["l_out-2", "l_out-3"])
    with pytest.raises(tinymia.UnknownName, match=r"'l_out-4' was not asked for: ask with wrt=\['l_out-4'\]"):
        g["l_out-4"]
    with pytest.raises(tinymia.UnknownName, match="'l_out' is 6 tensors, l_out-0 to l_out-5: read one at a time"):
        g["l_out"]


def test_numbers_that_are_not_finite_are_said(copycat_f32):
    nan = Replace("l_out-2", lambda x, ctx: x * np.nan)
    with pytest.raises(tinymia.Error, match="the logits are not finite"):
        copycat_f32.gradients(PARIS, of=Logit(" Paris"), wrt="l_out-4", actions=nan)
    back = Replace("l_out-2", lambda x, ctx: 2 * x, backward=lambda d, x, ctx: d * np.nan)
    with pytest.raises(tinymia.Error, match="the gradient with respect to l_out-1 is not finite"):
        copycat_f32.gradients(PARIS, of=Logit(" Paris"), wrt="l_out-1", actions=back)
    with pytest.raises(tinymia.ActionError, match="never fired"):
        copycat_f32.gradients(PARIS, of=Logit(" Paris"), wrt="l_out-1", actions=Scale("l_out-1", 2, when="decode"))


# ------------------------------------------------------------------------------- torch


def assert_torch_agrees(model, ids, a, b):
    """1e-4 of the largest element, for every name, under numerics f32; torch computes in float64."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    from torch_llama import Llama

    pairs = [
        (LogitDifference(a, b), lambda x: x[-1, a] - x[-1, b]),
        (Loss(), lambda x: torch.nn.functional.cross_entropy(x[:-1], torch.tensor(ids[1:]))),
    ]
    g = model.gradients(ids, of=[metric for metric, _ in pairs], wrt="all")
    for i, (value, want) in enumerate(Llama(model.path).gradients(ids, [of for _, of in pairs])):
        assert g.value[i] == pytest.approx(value, rel=1e-4, abs=1e-4)
        assert set(want) == set(model.table)
        for name, expected in want.items():
            assert np.abs(g[name][i] - expected).max() <= 1e-4 * np.abs(expected).max(), name


def test_torch_agrees_on_copycat(copycat_f32):
    ids = copycat_f32.tokenize("Egypt -> Cairo, Norway -> Oslo, France ->")
    assert_torch_agrees(copycat_f32, ids, *map(copycat_f32.tokenizer.one, (" Paris", " Oslo")))


def test_torch_agrees_on_stories(stories):
    assert_torch_agrees(tinymia.load(stories, numerics="f32", threads=1), prompt(20, 512), 300, 301)


def test_torch_agrees_on_smollm2():
    model = tinymia.load(real_model(), numerics="f32")
    ids = model.tokenize("The capital of France is")
    assert_torch_agrees(model, ids, *map(model.tokenizer.one, (" Paris", " Rome")))
