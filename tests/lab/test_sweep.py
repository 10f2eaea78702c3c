"""The sweep against plain runs of whole prompts, one Patch per cell: no cache, no batch."""
import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from conftest import command, prompt, shared
from pictures import colour

import tinymia
from tinymia_lab.commands.sweep import Sweep, picture, sweep
from tinymia_lab.measure import patching
from tinymia_lab.measure.branches import Branches
from tinymia_lab.runs import executors

CLEAN, CORRUPT = "Egypt -> Cairo, France ->", "Egypt -> Cairo, Norway ->"
POSITIONS, HEADS = ["l_out", "kqv_out", "ffn_out"], ["kqv", "kq_soft_max"]
METRICS = ["logit_difference", "probability", "kl", "rank"]


def by_hand(rows, clean, answer, against):
    """The four metrics of rows [.., n_vocab], from their definitions; the logit difference as it is."""
    x, y = np.asarray(rows, np.float64), np.asarray(clean, np.float64)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    q = np.exp(y) / np.exp(y).sum()
    ahead = x > x[..., answer, None]
    ahead[..., :answer] |= x[..., :answer] == x[..., answer, None]
    return [x[..., answer] - x[..., against], p[..., answer], (q * np.log(q / p)).sum(-1), ahead.sum(-1)]


def naive(model, clean, corrupt, tensor, noising=False, last=False):
    """Logits at the last position of every cell [n_layer, n_column, n_vocab], of the clean and of the corrupt run."""
    base, other = (clean, corrupt) if noising else (corrupt, clean)
    source, c = model.run(other, keep=[tensor]), model.config
    columns = range(len(clean) if tensor in POSITIONS else c.n_head)

    def patch(il, column):
        if tensor in POSITIONS:
            return tinymia.Patch(f"{tensor}-{il}", source, src=column, at=column)
        at = -1 if last else None
        return tinymia.Patch(f"{tensor}-{il}", source, src=at, at=at, heads=column)

    cells = [[model.run(base, actions=[patch(il, j)]).logits[-1] for j in columns] for il in range(c.n_layer)]
    return np.array(cells), model.run(clean).logits[-1], model.run(corrupt).logits[-1]


def check(model, clean, corrupt, tensor, atol=1e-4, **how):
    cells, one, zero = naive(model, clean, corrupt, tensor, how.get("noising", False), how.get("at") == "last")
    answer = int(one.argmax())
    against = int(next(i for i in zero.argsort()[::-1] if i != answer))
    found = sweep(model, clean, corrupt, answer, against, tensor=tensor, **how)
    ld, probability, kl, rank = by_hand(cells, one, answer, against)
    ends = [by_hand(row, one, answer, against)[0] for row in (zero, one)]
    assert found.values is found.logit_difference and found.kl.shape == cells.shape[:2]
    np.testing.assert_allclose(found.logit_difference * (ends[1] - ends[0]) + ends[0], ld, rtol=0, atol=atol)
    np.testing.assert_allclose(found.probability, probability, rtol=0, atol=atol)
    np.testing.assert_allclose(found.kl, kl, rtol=0, atol=atol)
    np.testing.assert_array_equal(found.rank, rank)
    assert np.ptp(ld) > 0.01                                    # that something was patched at all
    return found


# ---------------------------------------------------------------------------------------- equal to plain runs


@pytest.mark.parametrize("noising", [False, True], ids=["denoising", "noising"])
@pytest.mark.parametrize("tensor", POSITIONS + HEADS)
def test_a_sweep_of_copycat_equals_a_run_per_cell(copycat, tensor, noising):
    clean, corrupt = copycat.tokenize(CLEAN), copycat.tokenize(CORRUPT)
    check(copycat, clean, corrupt, tensor, noising=noising)


@pytest.mark.parametrize("tensor", HEADS)
def test_only_the_last_row_of_a_head(copycat, tensor):
    check(copycat, copycat.tokenize(CLEAN), copycat.tokenize(CORRUPT), tensor, at="last")


@pytest.mark.parametrize("numerics", ["ggml", "f32"])
@pytest.mark.parametrize("tensor", POSITIONS + HEADS)
def test_a_sweep_of_stories260k_equals_a_run_per_cell(tensor, numerics):
    model = tinymia.load(shared("models/stories260K-f32.gguf"), threads=1, numerics=numerics)
    clean = model.tokenize("Once upon a time Tom was in the park.")
    corrupt = [*clean[:5], clean[5] + 1, *clean[6:]]
    check(model, clean, corrupt, tensor)


@pytest.mark.parametrize("how", [
    {"wtype": "Q4_0", "n_head_kv": 1}, {"wtype": "Q8_0", "bias": True}, {"wtype": "Q5_1", "d_head": 32, "d_head_v": 64},
    {"wtype": "Q4_0", "numerics": "f32"}], ids=str)
@pytest.mark.parametrize("tensor", ["l_out", "kqv_out", *HEADS])
def test_a_sweep_of_quantised_weights_equals_a_run_per_cell(load, how, tensor):
    """Two words differ, one of them the last: the runs differ there from the first layer on."""
    clean = prompt(17)
    check(load(**how), clean, [*clean[:6], 9, *clean[7:16], 12], tensor)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_batches_of_any_size(copycat, monkeypatch, rows):
    monkeypatch.setattr(patching, "ROWS", rows)
    check(copycat, copycat.tokenize(CLEAN), copycat.tokenize(CORRUPT), "kqv_out")


# ---------------------------------------------------------------------------------------- nothing more than is needed


@pytest.mark.parametrize("name", [*POSITIONS, *HEADS])
def test_a_run_into_itself_changes_nothing(copycat, load, name):
    """Exactly: cells that are known without computing, and the same cells computed."""
    ids = prompt(13)
    for model in (copycat, load(wtype="Q4_0")):
        found = sweep(model, ids, ids, 5, 6, tensor=name, metric="kl")
        assert (found.values == 0).all() and np.isnan(found.logit_difference).all()
        plain = model.run(ids).logits[-1]
        np.testing.assert_array_equal(found.probability, found.clean["probability"])
        assert set(found.rank.ravel()) == {found.corrupt["rank"]}
        setting = patching.Setting(tuple(ids), tuple(ids), name, False, False, 5, 6)
        runs = patching.make_runs(model, setting)
        for il in range(model.config.n_layer):
            batch = patching.Batch(setting, il, [3, 2, 2], [12, 4, 0] if name in HEADS else [3, 2, 2])
            np.testing.assert_array_equal(patching.patched(model, batch, runs), [plain] * 3)


def test_a_cell_starts_at_its_layer_and_position(copycat, monkeypatch):
    clean, corrupt = copycat.tokenize(CLEAN), copycat.tokenize(CORRUPT)
    n, at = len(clean), next(i for i, (a, b) in enumerate(zip(clean, corrupt)) if a != b)
    assert 0 < at < n - 1
    seen, run = [], tinymia.Model.run

    def watch(self, ids, *args, **how):
        seen.append((len(ids), how.get("start", (None,))[0], how.get("logits")))
        return run(self, ids, *args, **how)

    monkeypatch.setattr(tinymia.Model, "run", watch)
    n_layer = copycat.config.n_layer
    for tensor, first in (("l_out", 1), ("ffn_out", 0)):
        seen.clear()
        sweep(copycat, clean, corrupt, tensor=tensor)
        below = sum(n - p for p in range(at, n))
        assert seen == [(n, None, "last"), (n, None, "last"),
                        *((below if il < n_layer - 1 else 1, il + first, "last") for il in range(n_layer))]


# ---------------------------------------------------------------------------------------- branches


@pytest.mark.parametrize("pattern", [False, True], ids=["fused", "pattern"])
@pytest.mark.parametrize("how", [{}, {"n_head_kv": 1, "wtype": "Q4_0"}, {"numerics": "f32", "d_head": 24}], ids=str)
def test_branches_are_the_sequences_that_they_stand_for(load, how, pattern):
    """Every tensor of every row, also across the border of 64 positions."""
    model, ids, starts = load(**how), prompt(69), [68, 66, 60, 60, 3]
    tails = [prompt(70 - s, seed=s)[1:] for s in starts]
    base, whole = model.cache(), [ids[:s] + tail for s, tail in zip(starts, tails)]
    model.run(ids, cache=base)
    before = [x.copy() for x in (*base.k, *base.v)]
    tokens = [i for tail in tails for i in tail]
    keep = ["Qcur", "kqv_merged", "l_out", "result_output"] + ["kq_soft_max", "kqv"] * pattern
    got = model.run(tokens, keep=keep, cache=Branches(base, starts, len(whole[0])))
    last = model.run(tokens, cache=Branches(base, starts, len(whole[0])), logits="last").logits
    at = 0
    for i, (ids, start) in enumerate(zip(whole, starts)):
        want, rows = model.run(ids, keep=keep), slice(at, at + len(ids) - start)
        for name in got.names:
            x, y = ((np.moveaxis(r[name], 1, 0) if name.startswith(("kq_", "kqv-")) else r[name]) for r in (got, want))
            np.testing.assert_array_equal(x[rows], y[start:], err_msg=f"{name} of branch {i}")
        np.testing.assert_array_equal(last[i], want.logits[-1])
        at = rows.stop
    assert base.n == 69 and all((a[:, :64] == b[:, :64]).all() for a, b in zip(before, (*base.k, *base.v)))


def test_actions_at_positions_act_on_every_branch(model):
    ids, base, vector = prompt(9), model.cache(), np.ones(64, np.float32)
    model.run(ids, cache=base)
    for at in (-1, 7, [7, 8]):
        add = tinymia.Add("l_out-0", vector, at=at)
        got = model.run(ids[8:] + ids[6:], actions=[add], cache=Branches(base, [8, 6], 9), logits="last").logits
        alone = model.run(ids, actions=[tinymia.Add("l_out-0", vector, at=[p for p in np.ravel(at) if p in (-1, 8)])]
                          if np.isin([-1, 8], at).any() else []).logits[-1]
        np.testing.assert_array_equal(got, [alone, model.run(ids, actions=[add]).logits[-1]])


def test_branches_that_cannot_be(model):
    base = model.cache()
    model.run(prompt(9), cache=base)
    for starts, end in (([], 9), ([3, 5], 9), ([10], 12), ([-1], 9), ([9], 9)):
        with pytest.raises(tinymia.Error, match="start"):
            Branches(base, starts, end)
    with pytest.raises(tinymia.Error, match="2 tokens for branches that have 3 together"):
        model.run([5, 6], cache=Branches(base, [8, 7], 9))
    with pytest.raises(tinymia.Error, match="the context has room for 512"):
        model.run(prompt(504), cache=Branches(base, [9], 513))


# ---------------------------------------------------------------------------------------- prompts, tokens, errors


def test_the_best_tokens_are_the_default(copycat):
    found = sweep(copycat, CLEAN, CORRUPT)
    assert (found.answer_piece, found.against_piece) == (" Paris", " Oslo")
    named = sweep(copycat, CLEAN, CORRUPT, "Paris", "Oslo")
    np.testing.assert_array_equal(found.values, named.values)
    assert found.values[-1, -1] == pytest.approx(1) and (found.values[:, 0] == 0).all()
    noising = sweep(copycat, CLEAN, CORRUPT, noising=True)
    assert noising.values[-1, -1] == pytest.approx(0, abs=1e-6) and (noising.values[:, 0] == 1).all()


@pytest.mark.parametrize("corrupt,message", [
    ("Egypt -> Cairo ->", r"the clean one has 7 tokens, the corrupt one 5; they part at position 4: '.*' and '.*'"),
    (CLEAN + " Paris", "the clean one has 7 tokens, the corrupt one 8; they part at position 7: the end and ' Paris'"),
])
def test_prompts_of_different_length(copycat, corrupt, message):
    with pytest.raises(tinymia.Error, match=message):
        sweep(copycat, CLEAN, corrupt)


def test_prompts_whose_words_moved_do_not_align(copycat):
    """The prompts have the same number of tokens, but a word has two in one of them, so that the next word moves."""
    def ids(*pieces):
        return [copycat.tokenizer.one(f"#{i}") for i in pieces]

    space = [i for i in range(300, 2048) if copycat.piece(i).startswith(" ")][:5]
    inner = next(i for i in range(300, 2048) if copycat.piece(i)[:1].isalpha())
    a, b, c, d, e = space
    with pytest.raises(tinymia.Error, match=r"at positions 2 to 4 stand '.*' and '.*': .* has moved; words"):
        sweep(copycat, ids(1, a, b, inner, c, d), ids(1, a, e, c, b, d))
    for clean, corrupt in (((1, a, b, c), (1, b, c, d)), ((1, a, inner, c), (1, b, d, c))):
        patching.check_aligned(copycat, ids(*clean), ids(*corrupt))     # a row of words; a word of two for two words


@pytest.mark.parametrize("how,message", [
    ({"tensor": "lout"}, "tensor 'lout': it must be one of l_out, kqv_out"),
    ({"metric": "ld"}, "metric 'ld': it must be one of logit-difference"),
    ({"at": "last"}, "at=last goes with kqv and kq_soft_max"),
    ({"layers": "3-9"}, "layer 6 is out of range: there are 6 layers"),
    ({"answer": 5000}, "token #5000 is out of range: the model has 2048"),
    ({"answer": "Paris", "against": "Paris"}, "is the same in both runs"),
])
def test_what_cannot_be_done(copycat, how, message):
    with pytest.raises(tinymia.Error, match=message):
        sweep(copycat, CLEAN, CORRUPT, **how)


# ---------------------------------------------------------------------------------------- stopped, spread, shown


def test_a_stopped_sweep_goes_on(copycat, tmp_path, monkeypatch):
    path, whole, run = tmp_path / "s.npz", sweep(copycat, CLEAN, CORRUPT), patching.run_batch
    done = []

    def stop(model, batch):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(batch.layer)
        return run(model, batch)

    monkeypatch.setattr("tinymia_lab.commands.sweep.run_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(copycat, CLEAN, CORRUPT, out=path)
    kept = Sweep.load(path)
    assert not np.isnan(kept.kl[done]).any() and np.isnan(kept.kl).any()
    monkeypatch.setattr("tinymia_lab.commands.sweep.run_batch", lambda model, batch: (
        run(model, batch) if batch.layer not in done else pytest.fail("done twice")))
    again = sweep(copycat, CLEAN, CORRUPT, out=path, metric="kl")
    for name in METRICS:
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
        np.testing.assert_array_equal(getattr(Sweep.load(path), name), getattr(whole, name))
    with pytest.raises(tinymia.Error, match="holds another run: its settings noising is False, not True"):
        sweep(copycat, CLEAN, CORRUPT, noising=True, out=path)


@pytest.mark.parametrize("executor", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_executors_give_the_same_as_one_process(copycat, monkeypatch, executor):
    alone = sweep(copycat, CLEAN, CORRUPT, tensor="kqv")
    if executor is ThreadPoolExecutor:
        monkeypatch.setattr(tinymia, "load", lambda *a: pytest.fail("threads share the model"))
    with executor(2) as workers:
        found = sweep(copycat, CLEAN, CORRUPT, tensor="kqv", executor=workers)
    for name in METRICS:
        np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))


def test_workers_of_dask_open_the_file_by_themselves(copycat):
    """Two worker processes; each opens the model's file by itself, once."""
    distributed = pytest.importorskip("distributed", reason="needs dask: pip install 'tinymia[test]'")
    alone = sweep(copycat, CLEAN, CORRUPT, tensor="kqv")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, \
            distributed.Client(cluster) as client:
        found = sweep(copycat, CLEAN, CORRUPT, tensor="kqv", executor=client.get_executor())
        opened = client.run(lambda: executors._open.cache_info().misses)
    assert list(opened.values()) == [1, 1]
    for name in METRICS:
        np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))


def test_the_picture_shows_the_sweep(copycat):
    found = sweep(copycat, CLEAN, CORRUPT)
    drawn = picture(found)
    assert drawn.diverging and drawn.span[0] == -drawn.span[1] and drawn.span[1] >= 1 and drawn.upward
    assert drawn.columns[5] == "5 ▁France/▁Norway" and list(drawn.rows) == list("012345")
    assert drawn.title == "l_out, clean into corrupt (denoising)" and "layer 2, position 5" in drawn.hover(2, 5)
    found.metric = "rank"
    assert not picture(found).diverging and picture(found).unit == "rank of ▁Paris"


def test_the_command_prints_draws_and_keeps(drawn, tmp_path, capsys):
    files = [tmp_path / f"s{suffix}" for suffix in (".npz", ".png", ".html")]
    flags = [x for file in files for x in ("-o", file)]
    this = ("sweep", "--clean", CLEAN, "--corrupt", CORRUPT, "--tensor", "kqv", "--at", "last")
    assert tinymia.main([*map(str, (*this, *flags))]) == 0
    title = "kqv, last position, clean into corrupt (denoising)"
    assert title in capsys.readouterr().out and title in files[2].read_text("utf-8")
    (shown,), moved = drawn(files[1]).maps, Sweep.load(files[0]).logit_difference
    assert " ".join(shown.title.split()) == (
        f"{title} colour: logit of ▁Paris minus logit of ▁Oslo, from 0 (as corrupt) to 1 (as clean)")
    assert shown.rows == list("543210") and shown.columns == list("0123") and moved.shape == (6, 4)
    most = max(1, np.abs(moved).max())
    for il, head in ((5, 0), (0, 3), np.unravel_index(moved.argmax(), moved.shape)):
        assert shown.text(str(il), str(head)) == f"{moved[il, head]:.2f}"
        assert shown.colour(str(il), str(head)) == colour(moved[il, head], -most, most, diverging=True)
    status, out, err = command(*this, "-o", files[0], "--json", "--metric", "rank")
    found = json.loads(out)
    assert status == 0 and found["metric"] == "rank" and found["answer_piece"] == " Paris", err
    np.testing.assert_array_equal(found["kl"], Sweep.load(files[0]).kl)
    status, out, err = command("sweep", "--clean", CLEAN, "--corrupt", "France ->")
    assert status == 2 and err.splitlines()[-1].startswith("error: the prompts do not align") and not out
