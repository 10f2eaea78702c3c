"""Every command of the lab on every architecture: small random models, judged by plain runs and actions."""
import architectures
import numpy as np
import pytest
from conftest import prompt
from naive import nmse

import tinymia
import tinymia_lab as lab
from tinymia_engine import softmax
from tinymia_lab.commands.report_page import report_page
from tinymia_lab.commands.story_page import story_page
from tinymia_lab.measure import head_effects
from tinymia_lab.measure.in_context import Prompt
from tinymia_lab.measure.task_files import Task

# One shape of each. Where an architecture allows it, values have another width than keys, and heads share keys.
WIDTHS = dict(n_head=4, n_head_kv=2, d_head=24, d_head_v=16)
SHAPES = {
    "llama": ("plain", WIDTHS), "qwen2": ("biases", WIDTHS), "qwen3": ("grouped heads", WIDTHS),
    "smollm3": ("every fourth layer without RoPE", WIDTHS), "mistral3": ("yarn and temperature", WIDTHS),
    "granite": ("four multipliers", WIDTHS), "olmo2": ("windows by a list", dict(n_head_kv=2, d_head_v=32)),
    "phi3": ("all in one", WIDTHS), "gemma2": ("caps and windows", WIDTHS), "gemma3": ("two rope bases", WIDTHS),
}
CLEAN = prompt(12)
CORRUPT = [*CLEAN[:4], CLEAN[4] + 1, *CLEAN[5:]]
TASK = Task("small", [("fox", "hill"), ("dog", "sun"), ("girl", "house"), ("river", "birds"), ("quick", "lazy"),
                      ("brown", "little")], shots=1)


@pytest.fixture(scope="module", params=SHAPES)
def model(request, tmp_path_factory):
    name, more = SHAPES[request.param]
    path = architectures.write(tmp_path_factory.mktemp("lab") / f"{request.param}.gguf", request.param, name, **more)
    return tinymia.load(path, threads=1, numerics="f32")


@pytest.fixture(scope="module")
def run(model):
    return model.run(CLEAN, keep=["kq_soft_max", "l_out", "ffn_gate_par"])


@pytest.fixture(scope="module")
def answers(model, run):
    """The best tokens of the clean and of the corrupt run."""
    best = int(run.logits[-1].argmax())
    return best, int(next(i for i in model.run(CORRUPT).logits[-1].argsort()[::-1] if i != best))


def difference(logits, answers):
    return float(logits[-1, answers[0]]) - float(logits[-1, answers[1]])


def test_every_architecture_is_here(model):
    assert set(SHAPES) == set(architectures.SHAPES)
    assert model.config.d_head != model.config.d_head_v and model.config.n_head > model.config.n_head_kv


def test_the_lens_of_the_last_layer_is_the_output(model, run):
    found = lab.lens(model, CLEAN, score="prob")
    assert found.best[-1, :, 0].tolist() == run.logits.argmax(1).tolist()
    want = np.take_along_axis(softmax(run.logits), found.best[-1], 1)
    np.testing.assert_allclose(found.probabilities[-1], want, rtol=1e-4, atol=1e-7)


def test_attend_shows_the_patterns_of_the_run(model, run):
    found = lab.attend(model, CLEAN)
    for il, layer in enumerate(model.config.layers):
        pattern = run[f"kq_soft_max-{il}"]
        np.testing.assert_array_equal(found.patterns[il], pattern)
        ago = np.arange(12)[:, None] - np.arange(12)
        assert not pattern[:, (ago < 0) | (ago >= (layer.window or 99))].any() and (pattern[:, ago == 0] > 0).all()
        np.testing.assert_allclose(pattern.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("position", [-1, 3])
def test_an_attribution_adds_up_to_the_logit_difference(model, run, answers, position):
    """Through norms after the blocks, multipliers and soft caps, in all its parts, and in the neurons of a layer."""
    found = lab.attribute(model, CLEAN, *answers, position=position, neurons=1)
    want = float(run.logits[position, answers[0]]) - float(run.logits[position, answers[1]])
    parts = np.array([value for _, value in found.parts()])
    size = np.abs(parts).sum()
    assert found.logit == pytest.approx(want, abs=1e-6) and abs(parts.sum() - want) < 1e-9 * size
    rest = np.abs([*found.rounding, found.output_rounding, *found.stream, found.output_stream])
    assert rest.sum() < 1e-5 * size                     # what heads, FFNs, biases and the embedding leave over
    assert found.neurons.sum() == pytest.approx(found.ffn[1], abs=1e-5 * size)
    np.testing.assert_array_equal(found.activations, run["ffn_gate_par-1"][position])
    assert np.abs(found.heads).min() > 0


def test_a_head_is_worth_what_its_share_of_the_stream_is(model, answers):
    """The largest head of the last layer, from Wo, the stream before and after the norm behind the block, and float64.

    Each number of the block's output passes on to the stream by the same factor, which is read off the run.
    """
    c, w, last = model.config, model.weights, model.config.n_layer - 1
    names = [f"{name}-{last}" for name in ("kqv_merged", "kqv_out", "ffn_inp")]
    kept = model.run(CLEAN, keep=[*names, f"l_out-{last - 1}", f"l_out-{last}"])
    merged, out, after, before, x = (
        kept[name][-1].astype(np.float64) for name in (*names, f"l_out-{last - 1}", f"l_out-{last}"))
    found = lab.attribute(model, CLEAN, *answers)
    head = int(np.abs(found.heads[last]).argmax())
    columns = slice(head * c.d_head_v, (head + 1) * c.d_head_v)
    wo = model.rows(w.blk[last].attn_output.weight, np.arange(c.n_embd)).astype(np.float64)
    written = wo[:, columns] @ merged[columns] * (after - before) / out

    rows = model.rows(w.output.weight, np.array(answers)).astype(np.float64)
    size = np.sqrt((x * x).mean() + c.eps)
    product, made = (rows @ (w.output_norm * term / size) for term in (x, written))
    factor = np.full(2, c.logit_scale or 1.0)
    if c.logit_soft_cap:                        # here a factor of the logits, too: the cap's share of each
        factor = c.logit_soft_cap * np.tanh(product / c.logit_soft_cap) / product
    assert found.heads[last, head] == pytest.approx((made * factor)[0] - (made * factor)[1], rel=1e-3, abs=1e-4)


def test_a_trace_tells_every_op(model):
    found = lab.trace(model, CLEAN, None)
    assert [op["name"] for op in found.ops] == list(model.table)
    kept = model.run(CLEAN, keep=["all"])
    for op in found.ops:
        assert op["formula"] and op["sentence"], op
        row = kept[op["name"]]
        assert op["size"] * len(CLEAN) == row.size, op["name"]


def test_a_report_and_a_story_are_pages(model, answers):
    one = lab.report(model, CLEAN, n=2)
    assert one.outputs == [model.generate(CLEAN, 2).text] and report_page(one).endswith("</html>\n")
    told = lab.story(model, CLEAN, CORRUPT, *answers)
    np.testing.assert_array_equal(told.sweep.values, lab.sweep(model, CLEAN, CORRUPT, *answers).values)
    np.testing.assert_array_equal(told.attribution.heads, lab.attribute(model, CLEAN, *answers).heads)
    assert story_page(told).endswith("</html>\n")


@pytest.mark.parametrize("tensor", ["l_out", "kqv", "kq_soft_max", "ffn_out"])
def test_a_sweep_is_made_of_patched_runs(model, answers, tensor):
    found = lab.sweep(model, CLEAN, CORRUPT, *answers, tensor=tensor)
    clean = model.run(CLEAN, keep=[tensor])
    ends = [difference(model.run(ids).logits, answers) for ids in (CORRUPT, CLEAN)]
    columns = (4, 8, 11) if tensor in ("l_out", "ffn_out") else range(model.config.n_head)
    for il in {0, model.config.n_layer - 1}:
        for j in columns:
            heads = {} if tensor in ("l_out", "ffn_out") else {"heads": j}
            at = {"src": j, "at": j} if not heads else {}
            got = difference(model.run(CORRUPT, actions=[tinymia.Patch(f"{tensor}-{il}", clean, **at, **heads)]).logits,
                             answers)
            cell = found.values[il, j] * (ends[1] - ends[0]) + ends[0]
            assert cell == pytest.approx(got, abs=2e-4), (il, j)
    if tensor == "l_out":
        np.testing.assert_allclose(found.values[:, :4], 0, atol=1e-3)          # before the word that differs
        assert found.values[-1, -1] == pytest.approx(1, abs=1e-4)              # the whole of what the output reads


def test_the_last_layer_s_stream_is_all_that_the_logits_read(model, run):
    patched = model.run(CORRUPT, actions=[tinymia.Patch(f"l_out-{model.config.n_layer - 1}", run)])
    np.testing.assert_array_equal(patched.logits, run.logits)


def test_an_ablated_head_is_one_whose_output_is_zero(model, answers):
    found = lab.ablate(model, CLEAN, *answers)
    for il, head in np.ndindex(model.config.n_layer, model.config.n_head):
        logits = model.run(CLEAN, actions=[tinymia.Ablate(f"kqv-{il}", heads=head)]).logits
        at = found.metrics.index("logit-difference")
        assert found.values[at, il, head] == pytest.approx(difference(logits, answers), abs=2e-4), (il, head)


def test_heads_of_a_function_vector_equal_patched_runs(model):
    c, rng = model.config, np.random.default_rng(1)
    task = Prompt(CLEAN, [7])
    means = rng.standard_normal((c.n_layer, c.n_head, c.d_head_v)).astype(np.float32)
    effects = head_effects.head_effects(model, (task, means))

    def likelihood(*actions):
        return float(softmax(model.run(CLEAN, actions=actions).logits[-1:])[0, 7])

    for il, head in np.ndindex(c.n_layer, c.n_head):
        patch = tinymia.Patch(f"kqv_merged-{il}", means[il].reshape(1, -1), at=-1, heads=head)
        assert effects[il, head] == pytest.approx(likelihood(patch) - likelihood(), rel=2e-3, abs=1e-7), (il, head)


def test_task_vectors_and_function_vectors_are_found(model):
    """Random weights know no task: the vectors are judged by where they come from, and accuracies by their range."""
    tv = lab.task_vector(model, TASK, n_dev=2, n_test=2, dummies=1)
    assert tv.vectors[0].shape == (model.config.n_layer, model.config.n_embd) and np.isfinite(tv.vectors[0]).all()
    fv = lab.function_vector(model, TASK, n_mean=2, n_effect=2, n_dev=2, n_test=2, top=3)
    assert fv.effects.shape == (model.config.n_layer, model.config.n_head) and np.isfinite(fv.vectors[0]).all()
    assert len(fv.heads[0]) == 3


def test_a_steered_text_is_that_of_the_add_action(model):
    found = lab.steer(model, CLEAN, [CLEAN[:5]], [CORRUPT[:5]], layers=[1], coef=[3.0], n=3)
    rows = [model.run(ids[:5], keep=["l_out-1"])["l_out-1"][-1] for ids in (CLEAN, CORRUPT)]
    np.testing.assert_allclose(found.vectors[1], rows[0] - rows[1], rtol=1e-5, atol=1e-5)
    add = tinymia.Add("l_out-1", found.vectors[1], 3.0, when="all")
    assert found.texts[0]["tokens"] == model.generate(CLEAN, 3, [add]).tokens


@pytest.mark.parametrize("command", ["sweep", "attribute", "ablate", "attend", "lens"])
def test_many_pairs(model, command):
    pairs = [{"clean": "the quick fox", "corrupt": "the quick dog", "answer": "hill", "against": "sun"},
             {"clean": "the lazy dog", "corrupt": "the lazy fox", "answer": "sun", "against": "hill"}]
    found = lab.over_pairs(model, command, pairs)
    assert len(found.values) == 2 and np.isfinite(found.values).any()
    if command == "attribute":
        np.testing.assert_allclose(np.nansum(found.values, axis=(1, 2, 3)), found.clean, rtol=1e-6)


def test_verify_finds_no_op_that_is_wrong(model, tmp_path):
    """With llama.cpp's inputs for each op, and in decoding."""
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'", exc_type=ImportError)
    name, more = SHAPES[model.config.arch]
    # llama.cpp has no values of another width than the keys, and in two architectures no width but n_embd / n_head.
    width = None if model.config.arch in ("qwen2", "phi3") else more.get("d_head")
    more = {**more, "d_head": width, "d_head_v": width}
    path = architectures.write(tmp_path / "same-widths.gguf", model.config.arch, name, **more)
    for how in ({"inject": True}, {"n_predict": 2}, {"flash": True}):
        found = lab.verify(tinymia.load(path, threads=1), CLEAN, **how)
        assert found["verdict"].startswith("equal") and not found["unknown"] and not found["absent"], found["verdict"]


def test_verify_says_how_far_rounding_is_from_float64_without_llama_cpp(model):
    found = lab.verify_self(model, CLEAN, only="all")
    assert found["ok"] and found["verdict"].startswith("equal: f32 is the model's own function"), found["verdict"]
    assert {row["name"] for row in found.rows} == set(model.table)


def test_the_logits_agree_with_float64(model, run):
    """The runs that judge the commands are themselves right."""
    exact = tinymia.load(model.path, numerics="plain", dtype="float64").run(CLEAN).logits
    assert nmse(run.logits, exact) < 1e-9
