"""Task vectors against plain runs of whole prompts: no cache, no batch, an action at a time."""
import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
from conftest import command, shared

import tinymia
from tinymia_lab.commands import task_vector
from tinymia_lab.measure import in_context, task_trials
from tinymia_lab.measure.in_context import Prompt, Reader, variants
from tinymia_lab.measure.task_files import Task, read_task

TASKS = ["copycat-next-letters", "copycat-first-letters"]
SMALL = {"n_dev": 6, "n_test": 5}


@pytest.fixture(scope="module", params=["ggml", "f32"])
def model(request, copycat_in):
    return copycat_in(request.param)


@pytest.fixture(scope="module")
def found(copycat):
    return task_vector.task_vector(copycat, TASKS, vector="own", conflict=True, **SMALL)


def theta_of(model, task, drawn, layer):
    """l_out of the layer at the last token, over prompts as text, averaged."""
    texts = [task.template.prompt(drawn.shown, x) for x, _ in drawn.dummies]
    return np.mean([model.run(text, keep=[f"l_out-{layer}"])[f"l_out-{layer}"][-1] for text in texts], axis=0)


def says(model, task, text, answer, layer=None, theta=None):
    """Whether greedy decoding after the text, theta put in, gives the whole answer."""
    at = len(model.tokenize(text)) - 1
    actions = [] if layer is None else [tinymia.Patch(f"l_out-{layer}", theta[None], at=at)]
    n = len(model.tokenize(text + task.template.answer(answer))) - at - 1
    return model.generate(text, n=n, actions=actions).text == task.template.answer(answer)


@pytest.mark.parametrize("name", ["copycat-capital", "copycat-next-letters", "copycat-reverse-digits"])
def test_every_layer_equals_plain_runs(model, name):
    task = read_task(name)
    drawn = task_trials.draw(task, task.shots, 2, 4, 4, seed=3)[0]
    results = []
    for one in drawn:
        (alone, *hits), theta = task_trials.dev_trial(model, task_trials.make_trial(model, task, one))
        x, y = one.query
        assert alone == says(model, task, task.template.prompt([], x), y)
        for layer in range(model.config.n_layer):
            want = theta_of(model, task, one, layer)
            np.testing.assert_allclose(theta[layer], want, rtol=0, atol=1e-4 * np.abs(want).max())
            assert hits[layer] == says(model, task, task.template.prompt([], x), y, layer, want), (x, layer)
        results.append(hits)
    assert 0 < np.mean(results) < 1


def test_the_tables_equal_plain_runs(copycat, found):
    for i, name in enumerate(TASKS):
        task = read_task(name)
        dev, test = task_trials.draw(task, task.shots, 2, **SMALL, seed=0)
        assert found.dev_hits.shape == (2, 6, 7) and found.tests.shape == (2, 5, 3, 3)
        assert not {d.query for d in dev} & {d.query for d in test}
        layer = int(found.layer[i])
        np.testing.assert_array_equal([found.baseline[i], *found.by_layer[i]], found.dev_hits[i].mean(0))
        assert found.by_layer[i, layer] == found.by_layer[i].max() > found.by_layer[i, :layer].max(initial=-1)
        want = []
        for one in test:
            x, y = one.query
            bare, full = task.template.prompt([], x), task.template.prompt(one.shown, x)
            theta = theta_of(copycat, task, one, layer)
            want.append([says(copycat, task, bare, y), says(copycat, task, bare, y, layer, theta),
                         says(copycat, task, full, y)])
        np.testing.assert_array_equal(found.tests[i, :, 0], want)
        np.testing.assert_array_equal(found.accuracy[i], np.mean(want, axis=0))
        mean = np.mean([theta_of(copycat, task, one, layer) for one in dev], axis=0)
        np.testing.assert_allclose(found.vectors[i, layer], mean, rtol=0, atol=1e-4 * np.abs(mean).max())
        assert [one["layer"] for one in found.lens[i]] == [layer, min(layer + 2, 5)]
        want = copycat.lens(mean, 5, "prob")[0]
        np.testing.assert_allclose([p for _, p in found.lens[i][0]["best"]], [p for _, p in want], atol=1e-3)
        assert found.lens[i][0]["best"][0][0] == want[0][0]


def test_copycat_has_task_vectors(found):
    """Numbers of the model card: letters come out with the vector, not without."""
    assert found.accuracy[:, 0].max() <= 0.2 and found.accuracy[:, 1:].min() >= 0.8
    assert [found.lens[i][1]["best"][0][0].strip() for i in (0, 1)] == ["next", "first"]


def test_conflict_equals_plain_runs(copycat, found):
    a, b = (read_task(name) for name in TASKS)
    tests = task_trials.draw(a, a.shots, 2, **SMALL, seed=0)[1]
    other, layer, want = dict(b.pairs), int(found.layer[1]), []
    items = task_trials.conflict_prompts(copycat, a, b, tests, b.shots, 2, 0)
    asked = [one for one in tests if other.get(one.query[0], one.query[1]) != one.query[1]]
    assert len(asked) == len(items) == np.isfinite(found.conflict_hits[0, 1, :, 0]).sum() > 0
    for one, (dummies, prompts) in zip(asked, items):
        x, y = one.query
        full = a.template.prompt(one.shown, x)
        assert all(p.ids == copycat.tokenize(full) for p in prompts)
        ends = [copycat.run(p.ids, keep=[f"l_out-{layer}"])[f"l_out-{layer}"][-1] for p in dummies]
        theta = np.mean(ends, axis=0)
        want.append([says(copycat, a, full, y), says(copycat, a, full, other[x]),
                     says(copycat, a, full, y, layer, theta), says(copycat, a, full, other[x], layer, theta)])
        texts = [copycat.detokenize(p.ids) for p in dummies]
        assert not any(text.startswith(f"{x} to") or f", {x} to" in text for text in texts)
    np.testing.assert_array_equal(found.conflict_hits[0, 1, : len(want)], want)
    assert np.isnan(found.conflict[0, 0]).all()
    assert found.conflict[0, 1, 3] > found.conflict[0, 1, 1]    # the vector's task takes over


@pytest.mark.parametrize("how", [
    {}, {"numerics": "f32"}, {"wtype": "Q4_0"}, {"rope_scale": 4.0, "n_head_kv": 4}, {"d_head": 32, "n_head_kv": 1},
])
@pytest.mark.parametrize("k", [1, 3])
def test_versions_in_a_batch_equal_runs_one_by_one(load, how, k):
    model = load(**how)
    c = model.config
    ids = [1, *np.random.default_rng(0).integers(3, c.n_vocab, 8).tolist()]
    rows = np.random.default_rng(1).standard_normal((c.n_layer, c.n_embd)).astype(np.float32)
    reader = Reader(model)
    reader.run(Prompt(ids[: 10 - k], [*ids[10 - k :], 5]))
    cache = reader.before(Prompt(ids[: 10 - k], [0]))
    before = [v.copy() for v in cache.v]

    def put(x, ctx):
        x[ctx.layer * k] = rows[ctx.layer]
        return x

    got = variants(model, cache, ids[-k:], c.n_layer, [tinymia.Replace("l_out", put)])
    for il in range(c.n_layer):
        want = model.run(ids, actions=[tinymia.Patch(f"l_out-{il}", rows[il][None], at=len(ids) - k)]).logits[-k:]
        np.testing.assert_allclose(got[il], want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert cache.n == len(ids) - k and all((a == b).all() for a, b in zip(before, cache.v))


def test_versions_of_rows_equal_runs_of_their_own():
    model = tinymia.load(shared("models/stories260K-f32.gguf"), threads=1, numerics="f32")
    ids = model.tokenize("Once upon a time there was a")
    reader, c = Reader(model), model.config
    reader.run(Prompt(ids, [1]))
    patch = [tinymia.Scale("l_out-2", 0.5, at=-1)]
    got = variants(model, reader.before(Prompt(ids, [1])), ids[-1:], 1, patch)[0, 0]
    want = model.run(ids, actions=[tinymia.Scale("l_out-2", 0.5, at=-1)]).logits[-1]
    np.testing.assert_allclose(got, want, atol=1e-4)
    many = variants(model, model.cache(), [1], c.n_ctx + 1, [])     # as many rows as one likes: each has its own place
    np.testing.assert_array_equal(many[c.n_ctx, 0], model.run([1]).logits[0])


def test_a_reader_gives_what_a_fresh_run_gives(copycat):
    reader = Reader(copycat)
    shown = "Egypt -> Cairo, Norway -> Oslo,"
    for text in (f"{shown} Estonia ->", f"{shown} France ->", "France ->"):
        ids = copycat.tokenize(text)
        np.testing.assert_allclose(reader.run(Prompt(ids, [7])).logits[-1], copycat.run(ids).logits[-1], atol=1e-4)
        reader.before(Prompt(ids, [7]))


def scores(model, ids, answer, actions=()):
    """Probability and worst rank of an answer, from one pass over prompt and answer."""
    rows = model.run([*ids, *answer[:-1]], actions=actions).logits[len(ids) - 1 :].astype(np.float64)
    shares = np.exp(rows - rows.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    ranks = [1 + int((row > row[i]).sum()) for row, i in zip(rows, answer)]
    return np.prod([share[i] for share, i in zip(shares, answer)]), max(ranks)


def test_probability_and_rank_equal_plain_runs(copycat, found):
    task = read_task(TASKS[0])
    layer, (_, test) = int(found.layer[0]), task_trials.draw(task, task.shots, 2, **SMALL, seed=0)
    for one, got in zip(test, found.tests[0]):
        trial, theta = task_trials.make_trial(copycat, task, one), theta_of(copycat, task, one, layer)
        patch = tinymia.Patch(f"l_out-{layer}", theta[None], at=len(trial.bare.ids) - 1)
        want = [scores(copycat, *trial.bare), scores(copycat, *trial.bare, [patch]), scores(copycat, *trial.full)]
        np.testing.assert_allclose(got[1], [p for p, _ in want], atol=1e-4)
        assert [rank == 1 for _, rank in want] == got[0].tolist() == (got[2] == 1).tolist()
    np.testing.assert_allclose(found.probability, found.tests[:, :, 1].mean(1))
    np.testing.assert_array_equal(found.rank, np.median(found.tests[:, :, 2], axis=1))


def test_a_rank_counts_what_is_better_and_of_ties_what_comes_before():
    logits = np.array([[0, 3, 2, 3, 1], [5, 0, 0, 0, 0]], np.float32)
    assert [in_context.rank(logits[:1], [i]) for i in range(5)] == [5, 1, 3, 2, 4]
    assert in_context.rank(logits, [1, 0]) == 1 and in_context.rank(logits, [3, 0]) == 2
    assert in_context.rank(logits, [1, 4]) == 5


def test_added_difference_of_means_equals_plain_runs(copycat, tmp_path):
    """theta minus the bare query's own row, averaged over the development queries, added at each layer."""
    task = read_task(TASKS[0])
    added = task_vector.task_vector(copycat, TASKS[0], vector="add", out=tmp_path / "run.npz", **SMALL)
    dev, _ = task_trials.draw(task, task.shots, 2, **SMALL, seed=0)
    bare = [copycat.tokenize(task.template.prompt([], one.query[0])) for one in dev]
    for layer in range(copycat.config.n_layer):
        name = f"l_out-{layer}"
        rows = [theta_of(copycat, task, one, layer) - copycat.run(ids, keep=[name])[name][-1]
                for one, ids in zip(dev, bare)]
        want = np.mean(rows, axis=0)
        np.testing.assert_allclose(added.vectors[0, layer], want, rtol=0, atol=1e-4 * np.abs(want).max())
        for j, (one, ids) in enumerate(zip(dev, bare)):
            (_, y), vector = one.query, added.vectors[0, layer].astype(np.float32)
            text = task.template.prompt([], one.query[0]) + task.template.answer(y)
            n = len(copycat.tokenize(text)) - len(ids)
            add = tinymia.Add(name, vector, at=len(ids) - 1)
            says = copycat.generate(ids, n, [add]).text == task.template.answer(y)
            assert added.dev_hits[0, j, 1 + layer] == says
    assert added.accuracy[0, 1] >= 0.6 > added.accuracy[0, 0]
    again = task_vector.task_vector(copycat, TASKS[0], vector="add", out=tmp_path / "run.npz", **SMALL)
    assert same(again, added)
    with pytest.raises(tinymia.Error, match="settings vector is 'add', not 'mean'"):
        task_vector.task_vector(copycat, TASKS[0], out=tmp_path / "run.npz", **SMALL)


def test_the_mean_vector_equals_plain_runs(copycat, found):
    """The default: one vector per task, the mean of theta over the development queries, put in everywhere."""
    mean = task_vector.task_vector(copycat, TASKS, conflict=True, **SMALL)
    np.testing.assert_allclose(mean.vectors, found.vectors, rtol=0, atol=1e-4)
    for i, name in enumerate(TASKS):
        task, layer = read_task(name), int(mean.layer[i])
        dev, test = task_trials.draw(task, task.shots, 2, **SMALL, seed=0)
        for queries, hits in ((dev, mean.dev_hits[i, :, 1 + layer]), (test, mean.tests[i, :, 0, 1])):
            vector = mean.vectors[i, layer].astype(np.float32)
            want = [says(copycat, task, task.template.prompt([], x), y, layer, vector)
                    for (x, y), _, _ in queries]
            np.testing.assert_array_equal(hits, want)
        np.testing.assert_array_equal(mean.tests[i, :, :, [0, 2]], found.tests[i, :, :, [0, 2]])
    assert mean.accuracy[:, 1].min() >= 0.8
    with pytest.raises(tinymia.Error, match="vector 'median': it must be mean, own, add"):
        task_vector.task_vector(copycat, TASKS, vector="median")


def test_a_prefix_stands_once_and_may_hold_special_tokens(copycat):
    task = read_task("copycat-capital", prefix="<s>Egypt -> Cairo,")
    prompt = in_context.make_prompt(copycat, task, [("Norway", "Oslo")], "<s>", "Paris")
    want = copycat.tokenize("Egypt -> Cairo,Norway -> Oslo, ")[1:]
    assert prompt.ids[:2] == [1, 1] and prompt.ids.count(1) == 2    # BOS, the prefix's, and none for the query's text
    assert copycat.detokenize(prompt.ids).count("Cairo") == 1 and prompt.ids[2 : len(want)] == want[: len(want) - 2]
    bare = in_context.make_prompt(copycat, replace(task, front=()), [], "France", "Paris")
    assert bare.ids == copycat.tokenize("<s>Egypt -> Cairo,France ->", bos=False)
    whole = task_vector.task_vector(copycat, "copycat-capital", prefix="Egypt -> Cairo, ", n_dev=2, n_test=2)
    assert whole.about["prompts"]["bare"][0]["text"].count("Cairo") == 1


def test_the_table_says_where_no_layer_does_better(copycat):
    """A task of nonsense: no vector can answer it."""
    nonsense = Task("nonsense", tuple((a, b) for a, b in zip("abcdefghijkl", "qrstuvwxyzqr")))
    found = task_vector.task_vector(copycat, nonsense, n_dev=3, n_test=3)
    assert found.by_layer.max() == 0
    accuracies, why, *_ = task_vector.tables(found)
    assert accuracies.splitlines()[1].split()[3] == "-" and why.startswith("-: nonsense: ") and "--bos" in why
    assert not any(text.startswith("the mean vector") for text in task_vector.tables(found))


def same(a, b):
    equal = [np.array_equal(x, b.arrays()[name], equal_nan=True) for name, x in a.arrays().items()]
    return all(equal) and a.lens == b.lens


def test_a_seed_gives_the_tables_again_and_executors_give_the_same(copycat, found):
    assert same(found, task_vector.task_vector(copycat, TASKS, vector="own", conflict=True, **SMALL))
    alone = task_vector.task_vector(copycat, TASKS[1], vector="own", **SMALL)
    np.testing.assert_array_equal(alone.dev_hits[0], found.dev_hits[1])
    np.testing.assert_array_equal(alone.tests[0], found.tests[1])
    assert not np.array_equal(alone.vectors, task_vector.task_vector(copycat, TASKS[1], seed=1, **SMALL).vectors)
    for executor in (ThreadPoolExecutor(2), ProcessPoolExecutor(2, get_context("spawn"))):
        with executor:
            spread = task_vector.task_vector(copycat, TASKS, vector="own", conflict=True, executor=executor, **SMALL)
        assert same(found, spread), type(executor)


@pytest.mark.parametrize("stop", [("dev_trial", 3), ("measure_trial", 7), ("conflict_trial", 2)])
@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_a_stopped_run_goes_on_where_it_was(copycat, found, monkeypatch, tmp_path, capsys, stop, suffix):
    name, n = stop
    calls, measure, out = [], getattr(task_vector, name), tmp_path / f"run{suffix}"

    def stopping(*args):
        calls.append(args)
        if len(calls) == n:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(task_vector, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        task_vector.task_vector(copycat, TASKS, vector="own", conflict=True, out=out, **SMALL)
    assert "the same command goes on from there" in capsys.readouterr().err
    before = len(calls)
    whole = task_vector.task_vector(copycat, TASKS, vector="own", conflict=True, out=out, **SMALL)
    conflicts = int(np.isfinite(found.conflict_hits[..., 0]).sum())
    total = {"dev_trial": 12, "measure_trial": 10, "conflict_trial": conflicts}[name]
    assert len(calls) - before == total - (n - 1)   # what was done is not done again
    assert same(found, whole) and same(whole, task_vector.TaskVector.load(out))
    with pytest.raises(tinymia.Error, match="settings seed is 0, not 1"):
        task_vector.task_vector(copycat, TASKS, vector="own", conflict=True, out=out, seed=1, **SMALL)


def test_impossible_experiments_are_refused(copycat):
    few = Task("few", tuple(read_task("copycat-capital").pairs[:7]))
    with pytest.raises(tinymia.Error, match="few has 7 pairs: 5 demonstrations, 2 dummies and a query need 8"):
        task_vector.task_vector(copycat, few)
    with pytest.raises(tinymia.Error, match="different answers"):
        task_vector.task_vector(copycat, ["copycat-capital", "copycat-past"], conflict=True)
    for name in ("shots", "dummies", "n_dev", "n_test"):
        with pytest.raises(tinymia.Error, match=f"{name} is 0: it must be 1 or more"):
            task_vector.task_vector(copycat, "copycat-capital", **{name: 0})
    with pytest.raises(tinymia.Error, match="seed is -1"):
        task_vector.task_vector(copycat, "copycat-capital", seed=-1)


def test_the_command_prints_draws_and_keeps(drawn, tmp_path, capsys):
    png, html, npz = (tmp_path / f"v{suffix}" for suffix in (".png", ".html", ".npz"))
    small = ["--n-dev", "6", "--n-test", "5"]
    outs = [word for path in (png, html, npz) for word in ("-o", str(path))]
    assert tinymia.main(["task-vector", *TASKS, "--conflict", *small, *outs]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["task", "dev", "test", "layer", "baseline", "vector", "regular"]
    assert "the mean vector through the lens" in out and "conflict:" in out
    assert "copycat-next-letters" in html.read_text("utf-8")
    status, again, _ = command("task-vector", *TASKS, "--conflict", *small, "-o", npz)
    assert status == 0 and again == out
    status, text, _ = command("task-vector", *TASKS, "--conflict", *small, "--json")
    found, picture = task_vector.TaskVector.load(npz), drawn(png)
    lines, bars = picture.figure.axes
    assert {*TASKS, "baseline", "task vector", "regular", *"012345"} <= {*picture.words}
    np.testing.assert_array_equal([line.get_ydata() for line in lines.get_lines()], found.by_layer)
    assert found.accuracy[1].tolist() == [0, 1, 0.8]
    assert picture.pixel(bars, 1, 0.9) == [0x2A, 0x6F, 0xBB]                 # with the vector: blue, up to 1
    assert picture.pixel(bars, 1 + 0.8 / 3, 0.7) == [0x3A, 0x9A, 0x55]       # with examples: green, up to 0.8
    assert picture.pixel(bars, 1 + 0.8 / 3, 0.9) == picture.pixel(bars, 1 - 0.8 / 3, 0.1) == [255] * 3
    assert status == 0 and json.loads(text)["accuracy"] == found.accuracy.tolist()


def test_the_command_with_the_papers_template_tells_of_long_answers():
    status, _, err = command("task-vector", "person-language", "--template", "hendel", "--n-dev", "1", "--n-test", "1",
                             "--shots", "1", "--dummies", "1")
    assert status == 0 and "answers have several tokens; the first counts" in err, err


@pytest.mark.parametrize(("args", "says"), [
    ([], "no task"),
    (["nothing-such"], "no task is called 'nothing-such'"),
    (["copycat-capital", "--template", "{x}"], "template '{x}'"),
    (["copycat-capital", "--shots", "0"], "--shots 0"),
    (["copycat-capital", "--shots", "90"], "90 demonstrations"),
    (["copycat-capital", "-o", "v.txt"], "kinds of file"),
])
def test_the_commands_errors_are_one_line(args, says):
    status, out, err = command("task-vector", *args)
    error = err.strip().splitlines()[-1]
    assert status == 2 and not out and error.startswith("error: ") and says in error and "Traceback" not in err
