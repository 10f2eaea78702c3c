"""Threads: how many changes nothing, several models may run at once, and a fork may run one too."""
import os
import threading

import numpy as np
import pytest
from conftest import command, prompt

import tinymia

IDS = prompt(40)


@pytest.mark.parametrize("numerics", ["ggml", "f32"])
@pytest.mark.parametrize("wtype", ["F32", "F16", "Q8_0", "Q4_1"])
def test_the_number_of_threads_changes_nothing(load, wtype, numerics):
    how = dict(wtype=wtype, n_head=8, n_head_kv=2)
    want = load(numerics, **how).run(IDS, keep=["all"])
    for threads in (2, 3, 7):
        got = load(numerics, threads=threads, **how).run(IDS, keep=["all"])
        for name in want.names:
            np.testing.assert_array_equal(got[name], want[name], err_msg=f"{name}, {threads} threads")
        np.testing.assert_array_equal(load(numerics, threads=threads, **how).run(IDS).logits, want.logits)
    tokens = load(numerics, **how).generate(IDS, n=5).tokens
    assert load(numerics, threads=2, **how).generate(IDS, n=5).tokens == tokens


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_a_senseless_number_of_threads(tiny, threads):
    with pytest.raises(tinymia.Error, match="thread"):
        tinymia.load(tiny(), threads=threads)


def in_threads(*jobs):
    """Results of functions run at the same time, errors included."""
    out, start = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(i):
        try:
            start.wait(30)
            out[i] = jobs[i]()
        except BaseException as e:
            out[i] = e

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
        assert not w.is_alive(), "a thread hangs"
    return out


def test_two_models_in_two_threads(tiny):
    models = [tinymia.load(tiny(wtype=t), threads=2) for t in ("F32", "Q4_0")]
    want = [m.generate(IDS, n=20).tokens for m in models]
    for _ in range(3):
        assert in_threads(*(lambda m=m: m.generate(IDS, n=20).tokens for m in models)) == want


def test_one_model_in_many_threads(tiny):
    model = tinymia.load(tiny(wtype="Q4_0"), threads=2)
    prompts = [prompt(n) for n in (5, 17, 33, 40)]
    want = [model.generate(p, n=8).tokens for p in prompts]
    assert in_threads(*(lambda p=p: model.generate(p, n=8).tokens for p in prompts)) == want


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Linux and macOS have")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_model_runs_on_after_a_fork(tiny):
    """The child of a process that has run a model runs it as well, and so does the parent afterwards."""
    model = tinymia.load(tiny(wtype="Q4_0"), threads=2)
    want = model.run(IDS).logits
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            same = np.array_equal(model.run(IDS).logits,
                                  want) and np.array_equal(tinymia.load(model.path, threads=2).run(IDS).logits, want)
            os.write(write, b"same" if same else b"other")
        finally:
            os._exit(0)
    os.close(write)
    import select

    ready, _, _ = select.select([read], [], [], 60)
    if not ready:
        os.kill(child, 9)
    said = os.read(read, 10) if ready else b"hangs"
    os.waitpid(child, 0)
    os.close(read)
    assert said == b"same"
    np.testing.assert_array_equal(model.run(IDS).logits, want)


def test_a_model_can_be_dropped_while_others_run(tiny):
    import gc

    a, b = tinymia.load(tiny(), threads=2), tinymia.load(tiny(wtype="F16"), threads=2)
    want = b.run(IDS).logits
    a.run(IDS)
    del a
    gc.collect()
    np.testing.assert_array_equal(b.run(IDS).logits, want)


def test_weights_outlive_the_model(tiny):
    """The map stays as long as a tensor of it is in use."""
    import gc

    w = tinymia.load(tiny()).weights["blk.0.ffn_up.weight"]
    gc.collect()
    assert np.isfinite(w.numpy()).all()


def test_no_thread_keeps_the_process_alive(tiny):
    """No thread keeps the interpreter alive."""
    code, out, _ = command("-m", tiny(), "-p", "the", "-n", "2", "-t", "2", timeout=60)
    assert code == 0 and out.startswith('output: "')
