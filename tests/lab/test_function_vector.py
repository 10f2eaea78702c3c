"""Function vectors against plain runs of whole prompts: no cache, no batch, a head at a time."""
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import command
from pictures import colour

import tinymia
from tinymia_lab.commands import function_vector
from tinymia_lab.measure import head_effects
from tinymia_lab.measure.in_context import Prompt
from tinymia_lab.measure.task_files import Task, read_task

TASKS = ["copycat-next-letters", "copycat-first-letters"]
SMALL = {"n_mean": 8, "n_effect": 4, "n_dev": 5, "n_test": 6, "top": 5}


@pytest.fixture(scope="module", params=["ggml", "f32"])
def model(request, copycat_in):
    return copycat_in(request.param)


@pytest.fixture(scope="module")
def found(copycat):
    return function_vector.function_vector(copycat, TASKS, **SMALL)


def likelihood(model, prompt, actions=()):
    """The product of the answer's probabilities, from one pass over prompt and answer."""
    ids = prompt.ids + prompt.answer
    rows = model.run(ids, actions=actions).logits[len(prompt.ids) - 1 : -1].astype(np.float64)
    shares = [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in rows]
    return float(np.prod([share[i] for share, i in zip(shares, prompt.answer)]))


def prompts_of(model, name, **how):
    task = read_task(name)
    return head_effects.draw_prompts(model, task, task.shots, **{k: v for k, v in (SMALL | how).items() if k != "top"},
                                     seed=0)


@pytest.mark.parametrize("name", ["copycat-capital", "copycat-next-letters"])
def test_every_head_equals_a_plain_run(model, name):
    """One token an answer, and two ("▁" and the letter)."""
    prompts, c = prompts_of(model, name), model.config
    means = np.mean([head_effects.head_outputs(model, p) for p in prompts.mean], axis=0)
    kept = [model.run(p.ids, keep=["kqv"]) for p in prompts.mean]
    for il in range(c.n_layer):
        want = np.mean([run[f"kqv-{il}"][:, -1] for run in kept], axis=0)                   # [n_head, d_head_v]
        np.testing.assert_allclose(means[il], want, rtol=0, atol=1e-4 * np.abs(want).max())
    for prompt in prompts.shuffled[:2]:
        effects, at = head_effects.head_effects(model, (prompt, means)), len(prompt.ids) - 1
        for il in range(c.n_layer):
            for head in range(c.n_head):
                patch = tinymia.Patch(f"kqv_merged-{il}", means[il].reshape(1, -1), at=at, heads=head)
                want = likelihood(model, prompt, [patch]) - likelihood(model, prompt)
                assert effects[il, head] == pytest.approx(want, abs=2e-4), (il, head)


def test_heads_share_keys_and_values(load):
    """n_head_kv < n_head, other widths, one token."""
    model = load(numerics="f32", d_head=32, d_head_v=16, n_head_kv=1)
    c = model.config
    prompt = Prompt([1, *np.random.default_rng(0).integers(3, c.n_vocab, 9).tolist()], [7])
    means = np.random.default_rng(1).standard_normal((c.n_layer, c.n_head, c.d_head_v)).astype(np.float32)
    effects = head_effects.head_effects(model, (prompt, means))
    for il, head in np.ndindex(c.n_layer, c.n_head):
        patch = tinymia.Patch(f"kqv_merged-{il}", means[il].reshape(1, -1), at=-2, heads=head)    # the answer follows
        want = likelihood(model, prompt, [patch]) - likelihood(model, prompt)
        assert effects[il, head] == pytest.approx(want, rel=1e-3, abs=1e-7)
    assert np.abs(effects).max() > 1e-5


def test_a_head_given_what_it_has_changes_nothing(copycat):
    prompt = prompts_of(copycat, "copycat-next-letters").shuffled[0]
    assert np.abs(head_effects.head_effects(copycat, (prompt, head_effects.head_outputs(copycat, prompt)))).max() < 1e-5


@pytest.mark.parametrize("how", [{}, {"bias": True}])
def test_the_vector_is_the_sum_of_what_the_heads_write(load, how):
    model = load(numerics="f32", **how)
    c = model.config
    means = np.random.default_rng(0).standard_normal((c.n_layer, c.n_head, c.d_head_v))
    heads = [[1, 3], [0, 2], [1, 0]]
    want = np.zeros(c.n_embd)
    for il, head in heads:
        wo = model.weights[f"blk.{il}.attn_output.weight"].numpy().astype(np.float64)   # [n_embd, n_head * d_head_v]
        want += wo[:, head * c.d_head_v : (head + 1) * c.d_head_v] @ means[il, head]
    np.testing.assert_allclose(head_effects.written(model, means, heads), want, rtol=1e-5, atol=1e-5)


def test_the_tables_equal_plain_runs(copycat, found):
    c = copycat.config
    np.testing.assert_allclose(found.effects, found.prompt_effects.mean(axis=(0, 1)))
    best = sorted(found.effects.ravel(), reverse=True)[: SMALL["top"]]
    assert all([found.effects[il, h] for il, h in heads] == best for heads in found.heads)
    for i, name in enumerate(TASKS):
        prompts = prompts_of(copycat, name)
        assert found.hits[i].shape == (6, 2, c.n_layer + 2)
        np.testing.assert_allclose(found.vectors[i], head_effects.written(copycat, found.means[i], found.heads[i]))
        for hits, (bare, shuffled, shown) in zip(found.hits[i, :3], prompts.test):
            for row, prompt in zip(hits, (bare, shuffled)):
                adds = [[], *([tinymia.Add(f"l_out-{il}", found.vectors[i], at=len(prompt.ids) - 1)]
                              for il in range(c.n_layer))]
                want = [copycat.generate(prompt.ids, len(prompt.answer), add).tokens == prompt.answer for add in adds]
                want.append(copycat.generate(shown.ids, len(shown.answer)).tokens == shown.answer)
                np.testing.assert_array_equal(row, want)
        np.testing.assert_array_equal(found.accuracy[i], found.hits[i].mean(0))


def test_prompts_are_drawn_as_the_seed_says(copycat):
    task = read_task("copycat-capital")
    prompts = prompts_of(copycat, task.name, n_test=50)
    answers, texts = dict(task.pairs), [copycat.detokenize(p.ids) for p in prompts.shuffled]
    tests = {copycat.detokenize(bare.ids).strip() for bare, _, _ in prompts.test}
    assert len(tests) == 24                                                                 # 30 % of 80
    for text, prompt in zip(texts, prompts.shuffled):
        *shown, query = (part.strip() for part in text.split(","))
        pairs = [tuple(part.split(" -> ")) for part in shown]
        assert len(pairs) == task.shots and sorted(y for _, y in pairs) == sorted(answers[x] for x, _ in pairs)
        assert copycat.detokenize(prompt.answer).strip() == answers[query.removesuffix(" ->")]
        assert not {f"{x} ->" for x, _ in pairs} & tests and query not in tests
    mixed = [tuple(part.strip().split(" -> ")) for text in texts for part in text.split(",")[:-1]]
    assert sum(answers[x] != y for x, y in mixed) > len(mixed) / 2
    for prompt in prompts.mean:
        *shown, _ = copycat.detokenize(prompt.ids).split(",")
        assert all(answers[x] == y for x, y in (part.strip().split(" -> ") for part in shown))


def test_copycat_has_one_head_that_carries_the_task(found):
    assert found.heads[0][0] == [3, 3] and found.effects[3, 3] > 0.2
    assert np.sort(found.effects.ravel())[-2] < 0.1
    assert found.accuracy[:, 0, 0].max() <= 0.2 and found.accuracy[:, 0, 1].min() >= 0.5


def test_each_layer_is_chosen_on_development_queries_for_bare_and_shuffled(copycat, found):
    """If the vector has no effect on one of the two, the other keeps its layer, and the table shows a -."""
    for i, name in enumerate(TASKS):
        prompts = prompts_of(copycat, name)
        tests = {tuple(bare.ids) for bare, _, _ in prompts.test}
        assert len(prompts.dev) == 5 and not tests & {tuple(bare.ids) for bare, _, _ in prompts.dev}
        for hits, query in zip(found.dev_hits[i, :2], prompts.dev):
            np.testing.assert_array_equal(hits, head_effects.measure_query(copycat, (query, found.vectors[i])))
        np.testing.assert_array_equal(found.dev_accuracy[i], found.dev_hits[i].mean(0))
    told = replace(found, dev_accuracy=np.zeros_like(found.dev_accuracy), accuracy=np.zeros_like(found.accuracy))
    told.dev_accuracy[0, 1, [1 + 2, 1 + 4]], told.accuracy[0, :, 1:-1] = 0.5, np.arange(6) / 10
    assert told.layers.tolist() == [[-1, 2], [-1, -1]]
    table, why, *_ = function_vector.tables(told)
    assert table.splitlines()[1].split()[3:9] == ["0.00", "-", "-", "0.00", "2", "0.20"]
    assert why.startswith(f"-: {TASKS[0]} (bare), {TASKS[1]} (bare), {TASKS[1]} (shuffled): ")


def test_own_heads_are_the_tasks_own_and_coef_makes_the_vector_longer(copycat, found):
    own = function_vector.function_vector(copycat, TASKS, heads="own", coef=-1.5, **SMALL)
    np.testing.assert_array_equal(own.prompt_effects, found.prompt_effects)
    for i, heads in enumerate(own.heads):
        effects = own.prompt_effects[i].mean(0)
        assert [effects[il, h] for il, h in heads] == sorted(effects.ravel(), reverse=True)[: SMALL["top"]]
        np.testing.assert_allclose(own.vectors[i], -1.5 * head_effects.written(copycat, own.means[i], heads), rtol=1e-6)
    assert own.heads[0] != own.heads[1]
    text = function_vector.tables(own)[-1]
    assert all(f"{name}: head, effect" in text for name in TASKS)


def same(a, b):
    equal = [np.array_equal(x, b.arrays()[name], equal_nan=True) for name, x in a.arrays().items()]
    return all(equal) and a.heads == b.heads


def test_a_seed_gives_the_tables_again_and_an_executor_gives_the_same(copycat, found):
    assert same(found, function_vector.function_vector(copycat, TASKS, **SMALL))
    assert not same(found, function_vector.function_vector(copycat, TASKS, seed=1, **SMALL))
    with ThreadPoolExecutor(2) as executor:
        assert same(found, function_vector.function_vector(copycat, TASKS, executor=executor, **SMALL))


@pytest.mark.parametrize("stop", [("head_outputs", 11), ("head_effects", 2), ("measure_query", 8)])
def test_a_stopped_run_goes_on_where_it_was(copycat, found, monkeypatch, tmp_path, stop):
    name, n = stop
    calls, measure, out = [], getattr(function_vector, name), tmp_path / "run.npz"

    def stopping(*args):
        calls.append(args)
        if len(calls) == n:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(function_vector, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        function_vector.function_vector(copycat, TASKS, out=out, **SMALL)
    before = len(calls)
    whole = function_vector.function_vector(copycat, TASKS, out=out, **SMALL)
    assert len(calls) - before == {"head_outputs": 16, "head_effects": 8, "measure_query": 22}[name] - (n - 1)
    assert same(found, whole) and same(whole, function_vector.FunctionVector.load(out))
    with pytest.raises(tinymia.Error, match="settings top is 5, not 6"):
        function_vector.function_vector(copycat, TASKS, out=out, **SMALL | {"top": 6})


def test_impossible_experiments_are_refused(copycat):
    few = Task("few", tuple(read_task("copycat-capital").pairs[:12]))
    with pytest.raises(tinymia.Error, match="few has 12 pairs: 10 demonstrations and a query, apart from 4 test"):
        function_vector.function_vector(copycat, few)
    with pytest.raises(tinymia.Error, match="top is 25: the model has 24 heads"):
        function_vector.function_vector(copycat, "copycat-capital", top=25)
    for name in ("shots", "top", "n_mean", "n_effect", "n_test"):
        with pytest.raises(tinymia.Error, match=f"{name} is 0"):
            function_vector.function_vector(copycat, "copycat-capital", **{name: 0})


def test_the_command_prints_draws_and_keeps(drawn, tmp_path, capsys):
    png, html, npz = (tmp_path / f"v{suffix}" for suffix in (".png", ".html", ".npz"))
    small = ["--n-mean", "8", "--n-effect", "4", "--n-test", "6", "--top", "5"]
    outs = [word for path in (png, html, npz) for word in ("-o", str(path))]
    assert tinymia.main(["function-vector", *TASKS, "copycat-capital", *small, *outs]) == 0
    out = capsys.readouterr().out
    assert out.startswith("task") and "heads of the vector\nhead, effect\n3.3 " in out
    assert "copycat-capital: answered with shuffled examples as well as with right ones" in out
    assert "causal indirect effect" in html.read_text("utf-8")
    status, text, _ = command("function-vector", *TASKS, "copycat-capital", *small, "-o", npz, "--json")
    found = function_vector.FunctionVector.load(npz)
    assert status == 0 and json.loads(text)["effects"] == found.effects.tolist()
    picture, effects = drawn(png), found.effects
    (shown,), most = picture.maps, np.abs(effects).max()
    assert shown.title == "causal indirect effect of each head (probability of the answer)"
    assert shown.rows == list("543210") and shown.columns == list("0123") and {*TASKS} <= {*picture.words}
    for il, head in ((3, 3), (0, 0), (5, 2)):
        assert shown.colour(str(il), str(head)) == colour(effects[il, head], -most, most, diverging=True)


@pytest.mark.parametrize(("args", "says"), [([], "no task"), (["copycat-capital", "--top", "0"], "--top 0")])
def test_the_commands_errors_are_one_line(args, says):
    status, out, err = command("function-vector", *args)
    error = err.strip().splitlines()[-1]
    assert status == 2 and not out and error.startswith("error: ") and says in error and "Traceback" not in err
