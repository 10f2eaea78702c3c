"""`tinymia verify`: every tensor beside llama.cpp's, live where llama.cpp is and from recordings where it is not.

The recordings in tests/data were made from the models below, and are made anew by
`PYTHONPATH=tests python tests/lab/test_verify.py`.
"""
import importlib.util
import json
import sys
import threading
import time
from pathlib import Path

import llvmlite.binding
import naive
import numpy as np
import pytest
from conftest import TYPES, command, prompt
from rawgguf import Raw
from tiny import write_gguf

import tinymia
import tinymia_kernels
import tinymia_lab.comparison.llama
import tinymia_lab.comparison.llama_comparison
from tinymia_engine.names import AFTER, BEFORE, LAYER
from tinymia_lab.comparison import compare
from tinymia_lab.comparison.compare import Feed, Others, distance, divergence
from tinymia_lab.comparison.edits import Edits
from tinymia_lab.comparison.llama import Item
from tinymia_lab.comparison.llama_names import CUT, FLASH, FUSED, NAMES, UNNAMED, Names, step
from tinymia_lab.comparison.reference import Reference
from tinymia_lab.comparison.verify import SelfVerification, Verification, pictures, verify, verify_self

DATA = Path(__file__).parents[1] / "data"
TEXT = "the quick brown fox jumps over"
RECORDED = {  # two models of our own, as tests/tiny.py writes them
    "gqa-F32": dict(wtype="F32", n_head=4, n_head_kv=2, rope_scale=4.0),
    "tied-Q8_0": dict(wtype="Q8_0", n_head=4, n_head_kv=1, tied=True, rope_base=500000.0),
}
live = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None,
                          reason="needs llama.cpp: pip install 'tinymia[verify]'")


@pytest.fixture(params=RECORDED)
def recording(request, tiny):
    """(path of the model, path of llama.cpp's tensors for TEXT)"""
    return tiny(**RECORDED[request.param]), DATA / f"{request.param}.npz"


@pytest.fixture
def main(capsys):
    """main(flags...): (status, stdout, stderr) of `tinymia verify`."""

    def run(*args):
        status = tinymia.main(["verify", "-t", "1", *map(str, args)])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def llvm_features():
    return {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}


def names(model):
    return [n for n in model.names() if not n.startswith("ffn_silu")]


# ------------------------------------------------------------------------------------------------ names


def test_every_name_has_a_counterpart_or_a_reason():
    """The table of names is that of all architectures."""
    ours = {name for several in NAMES.values() for name in several} | {*CUT.values(), *UNNAMED.values()}
    assert ours | set(FUSED) == {op.base for op in (*BEFORE, *LAYER, *AFTER)}
    assert set(FLASH) == {"kq", "kq_scaled_2", "kq_soft_max", "kqv"}    # flash attention caps the scores, too


def test_names_that_have_moved(model):
    """llama.cpp's kqv_out is before Wo and ours after it; norm comes twice a layer, Qcur three times."""
    ours = Names(model)
    layer = [("norm-0", "RMS_NORM", "norm-0"), ("Qcur-0", "MUL_MAT", None), ("Qcur-0", "RESHAPE", "Qcur_pre-0"),
             ("Qcur-0", "ROPE", "Qcur-0"), ("kqv_out-0", "CONT", "kqv_merged-0"),
             ("attn_out-0", "MUL_MAT", "kqv_out-0"),
             ("norm-0", "RMS_NORM", "norm_ffn-0"), ("norm-0", "RMS_NORM", None),
             ("ffn_swiglu-0", "SWIGLU", "ffn_gate_par-0"),
             ("embd", "GET_ROWS", "inp_embd"), ("norm", "RMS_NORM", "norm"), ("l_out-9", "ADD", None)]
    for theirs, op, want in layer:
        assert ours.ours(theirs, op) == ([want] if want else []), (theirs, op)


def test_with_biases_the_sum_has_the_name(load):
    ours = Names(load(bias=True))
    assert ours.ours("ffn_gate-1", "MUL_MAT") == [] and ours.ours("ffn_gate_b-1", "ADD") == ["ffn_gate-1"]


def test_with_scales_the_scaled_has_the_name(load, tmp_path):
    """After the bias in the feed-forward block; before it, and unnamed, where heads are made."""
    from test_odd_files import add

    def names(path, *scaled):
        g = Raw.read(path)
        for i, name in enumerate(scaled):
            g = add(g, f"blk.1.{name}.scale", (1,), [2 + i])
        return Names(tinymia.load(g.write(tmp_path / "f.gguf"), threads=1))

    ours = names(load(bias=True).path, "ffn_gate", "ffn_up")
    assert ours.ours("ffn_gate-1", "MUL_MAT") == ours.ours("ffn_gate_b-1", "ADD") == []
    assert ours.ours("ffn_gate_s-1", "MUL") == ["ffn_gate-1"] and ours.ours("ffn_gate_b-0", "ADD") == ["ffn_gate-0"]
    ours = names(load().path, "ffn_up")
    assert ours.ours("ffn_up-1", "MUL_MAT") == [] and ours.ours("ffn_up_s-1", "MUL") == ["ffn_up-1"]
    assert ours.ours("ffn_gate-1", "MUL_MAT") == ["ffn_gate-1"]


def test_steps_are_known_one_by_one():
    for name, op in (("cache_k_l0 (view)", "SET_ROWS"), ("Qcur-0", "MUL_MAT"), ("node_31", "GET_ROWS"),
                     ("kqv-3 (permuted)", "PERMUTE"), ("ffn_down-0", "MUL_MAT")):
        assert step(name, op), name
    for name, op in (("Qcur_normed-0", "MUL"), ("node_31", "SOFT_MAX"), ("ffn_moe_out-0", "ADD")):
        assert step(name, op) is None, name


# ------------------------------------------------------------------------------------------------ the machinery


def test_a_distance_is_relative_and_equal_bits_are_said():
    b = np.array([3, 4], np.float32)
    assert distance(b, b.copy()) == {"nmse": 0.0, "max_abs": 0.0, "identical": True}
    assert distance(b + np.float32([0, 1]), b) == {"nmse": 1 / 25, "max_abs": 1.0, "identical": False}
    assert distance(b, np.zeros(2, np.float32))["nmse"] == np.inf
    assert distance(np.array([0.0], np.float32), np.array([-0.0], np.float32))["identical"] is False
    assert np.isnan(distance(np.array([np.nan, 1], np.float32), b)["nmse"])
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, (1 << 20) - 7)).astype(np.float32)
    assert distance(a, b)["nmse"] == pytest.approx(naive.nmse(a, b), rel=1e-12)
    assert distance(a, b)["max_abs"] == pytest.approx(np.abs(a.astype(float) - b).max())


def test_a_divergence_is_kl_and_agreement():
    a = np.array([[0, 0], [2, 1]], np.float32)
    assert divergence(a, a) == {"kl": {"mean": 0.0, "max": 0.0}, "greedy": {"equal": 2, "of": 2}}
    out = divergence(a, np.array([[0, 0], [1, 2]], np.float32))
    p = 1 / (1 + np.e)
    want = (1 - p) * np.log((1 - p) / p) + p * np.log(p / (1 - p))
    assert out["kl"]["max"] == pytest.approx(want) and out["greedy"] == {"equal": 1, "of": 2}


def test_feed_stays_just_ahead_and_stops_when_told():
    made, alive = [], threading.active_count()

    def produce(put):
        for i in range(1000):
            made.append(i)
            put(i)

    feed = Feed(produce)
    items = iter(feed)
    assert [next(items), next(items)] == [0, 1]
    time.sleep(0.05)
    assert len(made) <= 4
    feed.close()
    assert threading.active_count() == alive


def test_feed_hands_errors_on():
    def produce(put):
        put(1)
        raise tinymia.Error("no")

    feed = Feed(produce)
    with pytest.raises(tinymia.Error, match="no"):
        list(feed)


def test_the_other_order_waits_and_a_missing_name_is_found_out_in_its_layer(model):
    order = ["inp_embd", "Vcur-0", "Qcur-0", "l_out-0", "Qcur-1", "l_out-1", "norm"]
    taken = []

    def items():
        for name in order:
            taken.append(name)
            yield Item(name, name, np.zeros(1, np.float32))

    others = Others(items(), model)
    assert others.take("Qcur-0").name == "Qcur-0" and others.take("Vcur-0").name == "Vcur-0"
    assert others.take("kqv_out-0") is None and taken[-1] == "l_out-0"      # which ends layer 0
    assert others.take("l_out-0").name == "l_out-0" and others.take("ffn_inp-1") is None
    assert others.take("norm").name == "norm" and others.take("result_norm") is None


def test_the_other_order_goes_on_pass_by_pass(model):
    def items():
        for at, name in [(0, "inp_embd"), (0, "l_out-1"), (0, "norm"), (1, "inp_embd"), (1, "l_out-0")]:
            yield Item(name, name, np.full(1, at, np.float32), at)

    others = Others(items(), model)
    assert others.take("inp_embd").step == 0 and others.take("l_out-0") is None
    assert others.begin(1)                                                  # whatever is left of the first is let go
    assert others.take("inp_embd").step == 1 and others.take("l_out-0").step == 1 and others.take("norm") is None
    assert not others.begin(2)


def test_another_engine_that_ends_early_ends_the_passes(model):
    ids, rows = prompt(5), []
    keep = [tinymia.Replace("result_output", lambda x, ctx: rows.append(x))]
    model.run(ids, actions=keep)
    others = Others(iter([Item("result_output", "", rows[0])]), model)
    out = compare.compare(model, ids, others, ["result_output"], {"result_output"}, steps=3)
    assert out.steps == 0 and out.rows[0]["identical"] and out.best == [int(rows[0][-1].argmax())]


# ------------------------------------------------------------------------------------------------ float64


@pytest.mark.parametrize("how", [dict(wtype="Q8_0"), dict(bias=True, tied=True, rope_scale=4.0, n_head_kv=1),
                                 dict(rope_freqs=True, d_head=32, d_head_v=32, n_rot=16, rope_base=500000.0)])
def test_the_reference_is_the_naive_one(tiny, how):
    """Two float64 programs by different hands agree to float64's own rounding."""
    path, ids, got = tiny(**how), prompt(9), {}
    Reference(path).forward(ids, got.__setitem__)
    want = naive.forward(naive.read(path), ids)
    assert list(got) == list(want) == tinymia.load(path, threads=1).names()
    for name in want:
        assert got[name].dtype == np.float64 and naive.nmse(got[name], want[name]) < 1e-26, name


def test_self_finds_the_rounding_of_ggml_and_none_in_f32(tiny, model):
    """f32 is the model's own function; ggml's activations of 8 bits are not, and each product adds to it."""
    out = verify_self(tiny(wtype="Q8_0"), TEXT, threads=1)
    assert out["ok"] and out["verdict"].startswith("equal: f32 is the model's own function")
    assert [r["name"] for r in out["rows"]] == ["l_out-0", "l_out-1", "result_output"]
    for row in out["rows"]:
        assert row["f32"]["nmse"] < 1e-11 and 1e-7 < row["ggml"]["nmse"] < 1e-2
    assert out["f32"]["kl"]["max"] < 1e-9 < out["ggml"]["kl"]["max"] and out["f32"]["greedy"]["equal"] == 20
    assert verify_self(model, TEXT)["ggml"]["worst"] < 1e-4                    # F32 weights: only the cache is F16


def test_self_injected_shows_where_rounding_is_done(tiny, model):
    out = verify_self(tiny(wtype="Q8_0"), prompt(9), only="all", inject=True, threads=1)
    rounding = {r["name"] for r in out["rows"] if r["ggml"]["nmse"] > 1e-9}
    products = {op.base for op, _ in model.table.values() if op.op == "mul_mat"}
    assert {n.partition("-")[0] for n in rounding} == products
    assert all(r["f32"]["nmse"] < 1e-11 for r in out["rows"])


def test_self_finds_a_fault(tiny, monkeypatch, main):
    monkeypatch.setattr(tinymia_kernels.Arithmetic, "silu", lambda self, x: x)
    status, out, _ = main("-m", tiny(), "-p", TEXT, "--self", "--only", "ffn*-1", "--only", "ffn_silu-0")
    assert status == 1
    assert out.splitlines()[-1].startswith("DIFFERENT: f32 is further than 1e-06 from float64, first at ffn_silu-0")


# ------------------------------------------------------------------------------------------------ recordings


def test_recorded_tensors_are_ours(recording):
    """Numerics without llama.cpp: every tensor that it had, from the tokens on and op by op."""
    path, npz = recording
    model = tinymia.load(path, threads=1)
    for inject in (False, True):
        out = verify(model, TEXT, against=npz, inject=inject)
        assert out["ok"], out["verdict"]
        assert [r["name"] for r in out["rows"]] == names(model) and out["absent"] == []
        assert out["tokens_equal"] and out["llama_cpp"]
        assert out["lacking"] == {"ffn_silu": FUSED["ffn_silu"]}
        assert out["tolerance"] == {"F32": (1e-6, 1e-10), "Q8_0": (1e-4, 1e-6)}[npz.stem.split("-")[1]][inject]
    assert out["greedy"]["equal"] == out["greedy"]["of"] == len(model.tokenize(TEXT))
    assert verify(model, TEXT, against=npz, n_predict=8)["output"]["equal"]


def test_recorded_passes_of_decoding(recording):
    """Each of the 8 passes, tensor by tensor; fewer where fewer are asked for."""
    path, npz = recording
    model = tinymia.load(path, threads=1)
    for inject in (False, True):
        out = verify(model, TEXT, against=npz, inject=inject, n_predict=8)
        assert out["ok"] and out["passes"] == 9 and out["of_decoding"] == 8 * len(names(model)), out["verdict"]
        assert [row["name"] for row in out["decoding"]] == names(model)
        assert all(row["passes"] == 8 for row in out["decoding"])
    out = verify(model, TEXT, against=npz, n_predict=3, only="l_out")
    assert out["ok"] and out["passes"] == 4 and out["of_decoding"] == 6


def test_a_fault_of_decoding_alone_is_named(recording, monkeypatch):
    """Keys stored at a wrong place after the prompt: its pass is right, kq of the next one is not."""
    path, npz = recording
    right = tinymia_kernels.Arithmetic.put

    def wrong(self, keys, values, k, v, n):
        right(self, keys, values, k, v, n)
        if n:
            keys[:, n - 1] = keys[:, n]
            keys[:, n] = 0

    monkeypatch.setattr(tinymia_kernels.Arithmetic, "put", wrong)
    out = verify(path, TEXT, against=npz, n_predict=2, threads=1)
    assert not out["ok"] and not any(row["over"] for row in out["rows"]) and out["first"] == "kq-0"
    assert "kq-0" in out["verdict"]
    out = verify(path, TEXT, against=npz, n_predict=2, threads=1, inject=True)
    assert {row["name"] for row in out["decoding"] if row["over"]} == {"kq-0", "kq-1"}


def test_where_texts_part_the_token_and_the_margin_are_said(recording, monkeypatch, tmp_path, main):
    """The recording is changed: another token is better by 0.25 after the third pass."""
    path, npz = recording
    model = tinymia.load(path, threads=1)
    with np.load(npz) as f:
        arrays = dict(f)
    about = json.loads(str(arrays["about"]))
    logits = arrays["result_output@3"]
    second, best = np.argsort(logits[0])[-2:]
    margin = float(logits[0, best] - logits[0, second])
    logits[0, second] = logits[0, best] + np.float32(0.25)
    about["llama.cpp"]["output"] = [*about["llama.cpp"]["output"][:3], int(second)]
    kept = {k: v for k, v in arrays.items() if int(k.partition("@")[2] or 0) < 4}
    np.savez(tmp_path / "r.npz", **(kept | {"about": json.dumps(about)}))
    out = verify(model, TEXT, against=tmp_path / "r.npz", n_predict=4, tolerance=1)
    parts = out["output"]["parts"]
    assert parts == {"token": 3, "ours": best, "theirs": second, "margin_ours": pytest.approx(margin, abs=1e-4),
                     "margin_theirs": pytest.approx(0.25, abs=1e-5)}
    apart = "the greedy continuations differ from token 4 on, where the two best logits are 0.25 apart"
    assert not out["ok"] and apart in out["verdict"]
    status, text, _ = main("-m", path, "-p", TEXT, "--against", tmp_path / "r.npz", "-n", 4, "--tolerance", 1)
    assert status == 1 and "token 4: the logit of" in text and "leads by 0.25 there" in text


def test_what_rounds_otherwise_is_judged_op_by_op(recording, tmp_path, monkeypatch):
    """With flash, a tensor of the whole pass may be far off although each op is right; a wrong op is still found."""
    path, npz = recording
    model = tinymia.load(path, threads=1)
    with np.load(npz) as f:
        arrays = dict(f)
    about = json.loads(str(arrays["about"]))
    about["llama.cpp"]["flash"] = True
    arrays = {k: v for k, v in arrays.items() if k.partition("-")[0] not in FLASH}
    np.savez(tmp_path / "r.npz", **(arrays | {"about": json.dumps(about)}))
    monkeypatch.setattr(tinymia_lab.comparison.llama_comparison, "default_tolerance",
                        lambda model, inject, flash: 1e-6 if inject else 0.0)
    with monkeypatch.context() as m:
        right = tinymia_kernels.Arithmetic.attention
        m.setattr(tinymia_kernels.Arithmetic, "attention", lambda *args: right(*args) * np.float32(1.0001))  # 1e-8
        out = verify(model, TEXT, against=tmp_path / "r.npz", flash=True, n_predict=8)
        assert out["ok"] and out["first"] == "kqv_merged-0" and out["by_op"]["ok"], out["verdict"]
        assert out["verdict"].startswith("equal: each op by itself is within 1e-06") and "by rounding" in out["verdict"]
        assert not verify(model, TEXT, against=tmp_path / "r.npz", flash=True, tolerance=1e-12)["ok"]
        m.setattr(tinymia_kernels.Arithmetic, "attention", lambda *args: right(*args) * np.float32(1.01))
        out = verify(model, TEXT, against=tmp_path / "r.npz", flash=True)
        assert not out["ok"] and out["by_op"]["first"] == "kqv_merged-0" and "op by op" in out["verdict"]


def test_the_fused_attention_is_judged_when_nobody_asks_for_the_pattern(recording):
    out = verify(recording[0], TEXT, against=recording[1], only=["kqv_merged", "result_output"], threads=1)
    assert out["ok"] and [r["name"] for r in out["rows"]] == ["kqv_merged-0", "kqv_merged-1", "result_output"]


def test_a_fault_is_named(recording, monkeypatch):
    """A wrong op shows where it is made: without inject it is the first of many, with inject the only one."""
    path, npz = recording
    model, right = tinymia.load(path, threads=1), tinymia_kernels.Arithmetic.rope
    monkeypatch.setattr(tinymia_kernels.Arithmetic, "rope",
                        lambda self, x, cos, sin, halves: right(self, x, cos, -sin, halves))
    out = verify(model, TEXT, against=npz)
    assert not out["ok"] and out["first"] == "Qcur-0" and sum(r["over"] for r in out["rows"]) > 20
    assert out["verdict"].startswith("DIFFERENT:") and "first Qcur-0" in out["verdict"]
    out = verify(model, TEXT, against=npz, inject=True)
    assert {r["name"] for r in out["rows"] if r["over"]} == {"Qcur-0", "Kcur-0", "Qcur-1", "Kcur-1"}


def test_no_number_is_within_a_tolerance(recording, monkeypatch):
    model = tinymia.load(recording[0], threads=1)
    monkeypatch.setattr(compare, "distance", lambda a, b: {"nmse": np.nan, "max_abs": np.nan, "identical": False})
    assert not verify(model, TEXT, against=recording[1])["ok"]


def test_a_name_that_llama_cpp_lacks_is_said(recording, tmp_path, main):
    path, npz = recording
    with np.load(npz) as f:
        arrays = dict(f)
    about = json.loads(str(arrays["about"]))
    del arrays["ffn_up-1"]
    about["llama.cpp"] |= {"absent": ["ffn_up-1"], "unknown": {"ffn_upper-* MUL_MAT": 1}}
    np.savez(tmp_path / "r.npz", **(arrays | {"about": json.dumps(about)}))
    status, out, _ = main("-m", path, "-p", TEXT, "--against", tmp_path / "r.npz")
    assert status == 1 and "\nnot found in llama.cpp: ffn_up-1\n" in out and "ffn_upper-* MUL_MAT (x1)" in out
    assert out.splitlines()[-1].startswith("DIFFERENT: llama.cpp has no 'ffn_up-1'")


def test_what_cannot_be_compared_is_refused_in_one_line(tiny, recording, tmp_path, main):
    path, npz = recording
    other = tiny(**RECORDED["gqa-F32" if "Q8_0" in str(npz) else "tied-Q8_0"])
    same_shape = tiny(**{**RECORDED[npz.stem], "seed": 5})
    saved = tmp_path / "saved.npz"
    tinymia.load(path, threads=1).run(TEXT, actions=[tinymia.Save("l_out", saved)])
    with np.load(npz) as f:
        arrays = dict(f)
    about = json.loads(str(arrays["about"]))
    about["llama.cpp"]["steps"] = 3
    np.savez(tmp_path / "broken.npz", **(arrays | {"about": json.dumps(about)}))
    np.savez(tmp_path / "cut.npz", **(arrays | {"l_out-1": arrays["l_out-1"][1:]}))
    for words, *args in (
        ("not what verify --record writes", "-m", path, "-p", TEXT, "--against", tmp_path / "broken.npz"),
        ("l_out-1 is [", "-m", path, "-p", TEXT, "--against", tmp_path / "cut.npz"),
        ("another prompt: 'the quick", "-m", path, "-p", "the dog", "--against", npz),
        ("recorded from another model", "-m", same_shape, "-p", TEXT, "--against", npz),
        ("recorded from another model", "-m", other, "-p", TEXT, "--against", npz),
        ("recorded with flash False", "-m", path, "-p", TEXT, "--against", npz, "--flash"),
        ("recorded with actions []", "-m", path, "-p", TEXT, "--against", npz, "--scale", "l_out-0", 2),
        ("recorded with -n 8, and this run has -n 9", "-m", path, "-p", TEXT, "--against", npz, "-n", 9),
        ("not a recording of llama.cpp", "-m", path, "-p", TEXT, "--against", saved),
        ("no-such.npz: cannot be read", "-m", path, "-p", TEXT, "--against", "no-such.npz"),
        ("recordings are .npz files", "-m", path, "-p", TEXT, "--record", tmp_path / "x.npy"),
        ("either made (record) or compared", "-m", path, "-p", TEXT, "--record", npz, "--against", npz),
        ("there is no folder", "-m", path, "-p", TEXT, "--record", tmp_path / "no" / "x.npz"),
        ("no tensor is called 'kqx'", "-m", path, "-p", TEXT, "--against", npz, "--only", "kqx"),
        ("llama.cpp has no ffn_silu", "-m", path, "-p", TEXT, "--against", npz, "--only", "ffn_silu"),
        ("llama.cpp has no kq: kq is inside FLASH_ATTN_EXT", "-m", path, "-p", TEXT, "--only", "kq", "--flash"),
        ("tolerance -1.0", "-m", path, "-p", TEXT, "--against", npz, "--tolerance", -1),
        ("no prompt", "-m", path),
        ("tinymia verify --help", "-m", path, "-p", TEXT, "--bogus"),
        ("--flash and --self", "-m", path, "-p", TEXT, "--self", "--flash"),
        ("the actions and --self", "-m", path, "-p", TEXT, "--self", "--scale", "l_out", 2),
        ("--ablate-mode goes with", "-m", path, "-p", TEXT, "--ablate-mode", "mean"),
        ("when=all does not go with it", "-m", path, "-p", TEXT, "--scale", "l_out", 2, "--when", "all"),
        ("ffn_silu-0 cannot be changed in llama.cpp", "-m", path, "-p", TEXT, "--scale", "ffn_silu-0", 2),
        ("kqv-1 cannot be changed", "-m", path, "-p", TEXT, "--scale", "kqv-1", 2, "--flash"),
        ("the context has room for 512", "-m", path, "-p", TEXT, "-n", 600),
    ):
        status, out, err = main(*args)
        assert status == 2 and out == "" and err.startswith("error: ") and words in err, (words, err)
        assert err.count("\n") == 1


def test_without_llama_cpp_it_says_what_to_install(tiny, monkeypatch, main):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    status, out, err = main("-m", tiny(), "-p", TEXT)
    assert status == 2 and out == "" and "pip install 'tinymia[verify]'" in err


def test_the_table_has_a_line_per_tensor(recording, main):
    path, npz = recording
    status, out, err = main("-m", path, "-p", TEXT, "--against", npz, "--tolerance", 1)
    lines = [line.split() for line in out.splitlines()]
    assert status == 0 and lines[0] == ["name", "llama.cpp", "shape", "NMSE", "max", "|diff|"] and err == ""
    model = tinymia.load(path, threads=1)
    n = len(names(model))
    assert [line[0] for line in lines[1 : n + 1]] == names(model)
    assert lines[1][:4] == ["inp_embd", "embd", f"[{len(model.tokenize(TEXT))},", "64]"]
    assert next(line for line in lines if line[:1] == ["kqv_out-1"])[1] == "attn_out-1"
    assert f"equal: {n} of {n}" in out or "the worst is" in out
    assert "KL divergence" in out and out.splitlines()[-1].startswith("equal: ")


def test_json_is_the_result(recording, main):
    path, npz = recording
    status, out, _ = main("-m", path, "-p", TEXT, "--against", npz, "--only", "l_out-1", "--json")
    data = json.loads(out)
    assert status == 0 and data["ok"] and [r["name"] for r in data["rows"]] == ["l_out-1"]
    want = verify(path, TEXT, against=npz, only="l_out-1", threads=1)
    assert data == want.to_json()
    status, out, _ = main("-m", path, "-p", TEXT, "--self", "--json")
    assert status == 0 and json.loads(out)["rows"][0]["ggml"]["nmse"] > 0


def test_a_comparison_is_kept_in_a_file_and_drawn_like_every_result(recording, tmp_path, main):
    """A cell per tensor: the layers are the rows, and what no layer has is in the row called model."""
    path, npz = recording
    kept, png, html = (tmp_path / f"x.{suffix}" for suffix in ("npz", "png", "html"))
    how = ["-m", path, "-p", TEXT, "--against", npz, "-n", 2]
    status, out, _ = main(*how, "-o", kept, "-o", png, "-o", html)
    found = Verification.load(kept)
    assert status == 0 and str(found) + "\n" == out and found.ok and found["ok"] is found.ok
    assert "kl" in found and "kl2" not in found and found.get("ok") is True and found.get("nothing", 3) == 3
    assert (found["prompt"], found["inject"], found["model"]) == (TEXT, False, str(path))
    assert found.about["command"] == "verify" and found.about["settings"]["n_predict"] == 2
    (picture,) = pictures(found)
    assert list(picture.rows) == ["model", "0", "1"] and TEXT in picture.title
    for row in found.rows:
        base, _, il = row["name"].rpartition("-") if row["name"][-1].isdigit() else (row["name"], "", "model")
        cell = picture.rows.index(il), picture.columns.index(base)
        assert picture.texts[cell[0]][cell[1]] == ("=" if row["identical"] else f"{row['nmse']:.2e}")
        assert picture.values[cell] == pytest.approx(np.log10(max(row["nmse"], 1e-16)))
    assert np.isfinite(picture.values).sum() == len(found.rows)
    assert png.read_bytes()[1:4] == b"PNG" and "distance from llama.cpp" in html.read_text("utf-8")


def test_a_verdict_is_not_taken_from_a_file(recording, tmp_path, main):
    """The program of today is verified each time; a file of another run is left as it is."""
    path, npz = recording
    kept = tmp_path / "x.json"
    how = ["-m", path, "-p", TEXT, "--against", npz, "--only", "l_out", "-o", kept]
    assert main(*how)[0] == 0
    said = json.loads(kept.read_text())
    kept.write_text(json.dumps(said | {"ok": False, "verdict": "DIFFERENT: once"}))
    status, out, _ = main(*how)
    assert status == 0 and out.splitlines()[-1].startswith("equal: ") and json.loads(kept.read_text()) == said
    status, out, err = main("-m", path, "-p", TEXT, "--against", npz, "-o", kept)
    assert status == 2 and out == "" and "holds another run: its settings only" in err
    assert json.loads(kept.read_text()) == said
    with pytest.raises(tinymia.Error, match="two outputs would go there"):
        verify(path, TEXT, against=None, record=npz.with_name("x.npz"), out=npz.with_name("x.npz"), threads=1)


def test_self_is_kept_and_drawn_for_both_numerics(tiny, tmp_path, main):
    kept = tmp_path / "x.json"
    status, out, _ = main("-m", tiny(wtype="Q8_0"), "-p", TEXT, "--self", "-o", kept)
    found = SelfVerification.load(kept)
    assert status == 0 and str(found) + "\n" == out
    f32, ggml = pictures(found)
    assert "f32 from float64" in f32.title and "ggml from float64" in ggml.title
    assert f32.values[np.isfinite(f32.values)].max() < -11 < -7 < ggml.values[np.isfinite(ggml.values)].min()
    status, out, err = main("-m", tiny(), "-p", TEXT, "--self", "--numerics", "f32")
    assert status == 2 and "--numerics and --self" in err


# ------------------------------------------------------------------------------------------------ actions, twice


def edits_of(action, model, ids):
    """Our tensor after the action, and what lab/comparison/edits.py makes of the one before it."""
    (name,) = tinymia.match(action.name, model.table)
    before = model.run(ids, keep=[name])[name]
    return model.run(ids, actions=[action], keep=[name])[name], Edits([action], model, len(ids))(name, before), before


N = 6
ROWS = {64: np.linspace(-1, 1, N * 64, dtype=np.float32).reshape(N, 64)}


@pytest.mark.parametrize("action", [
    tinymia.Patch("l_out-0", ROWS[64]), tinymia.Patch("l_out-0", ROWS[64][:1], at=2),
    tinymia.Patch("l_out-0", ROWS[64], src=[0, -1], at=[3, 1]), tinymia.Patch("l_out-0", ROWS[64], at=[-1, 2]),
    tinymia.Patch("l_out-1", ROWS[64], src=1, at=-2), tinymia.Patch("kqv_merged-0", ROWS[64], heads=[1, 3]),
    tinymia.Ablate("kqv_merged-1", heads=2), tinymia.Ablate("kqv_merged-1", mode="mean", heads=[0, 3], at=[1, 4]),
    tinymia.Ablate("Kcur-0", mode="value", value=0.5, heads=1), tinymia.Ablate("kq_soft_max-0", heads=2, at=-1),
    tinymia.Ablate("ffn_out-0", mode="resample", source=ROWS[64], at=[2, 3]), tinymia.Ablate("Vcur-1", mode="mean"),
    tinymia.Ablate("ffn_out-1", mode="value", value=ROWS[64][0]), tinymia.Add("l_out-0", ROWS[64], -2.0, row=3, at=-1),
    tinymia.Add("l_out-0", ROWS[64][2], 0.5), tinymia.ProjectOut("l_out-1", ROWS[64][2], at=[0, 5]),
    tinymia.Scale("kq-1", 0.5, heads=[0, 2]), tinymia.Scale("Qcur-1", 3.0, at=[1, -1], heads=0),
    tinymia.Replace("ffn_inp-0", lambda x, ctx: x[::-1] * ctx.layer + len(ctx.positions)),
    tinymia.Replace("ffn_inp-0", lambda x, ctx: None),
    tinymia.Scale("l_out-0", 2.0, at=[False, True, False, False, True, False]),
    tinymia.Ablate("kqv_merged-1", heads=[False, False, True, False]),
    tinymia.Patch("l_out-0", (ROWS[64], ROWS[64][:4] * 3), src=-1, at=[True] + [False] * 5),
    tinymia.Patch("l_out-0", (ROWS[64], ROWS[64][2:3]), at=[1, 3]),
    tinymia.Add("l_out-1", (ROWS[64], ROWS[64][:4]), 2.0, row=-1),
    tinymia.ProjectOut("ffn_inp-0", (ROWS[64][1], ROWS[64][4])), tinymia.ProjectOut("ffn_out-1", ROWS[64][5]),
    tinymia.ProjectOut("Qcur-0", np.sin(np.arange(64, dtype=np.float32)).reshape(1, 4, 16), at=[0, -1]),
    tinymia.Ablate("ffn_out-0", mode="resample", source=(ROWS[64], ROWS[64] ** 2), at=[2, 3]),
], ids=lambda a: f"{type(a).__name__}-{a.name}-{getattr(a, 'at', None)}-{getattr(a, 'heads', None)}")
def test_edits_are_the_actions(model, action):
    ours, again, before = edits_of(action, model, prompt(N))
    assert again is None or np.array_equal(ours, again)      # to the bit
    assert (ours is not None and (ours != before).any()) or isinstance(action, tinymia.Replace)


def test_edits_come_one_after_another(model):
    ids = prompt(N)
    one = np.ones(64, np.float32)
    actions = [tinymia.Scale("l_out-0", 2.0), tinymia.Add("l_out-0", one), tinymia.Scale("l_out-0", 3.0)]
    before = model.run(ids, keep=["l_out-0"])["l_out-0"]
    got = Edits(actions, model, N)("l_out-0", before)
    assert np.allclose(got, (2 * before + 1) * 3) and Edits(actions, model, N)("l_out-1", before) is None


# ------------------------------------------------------------------------------------------------ live


@live
@pytest.mark.parametrize("wtype", TYPES)
def test_live_every_type_is_equal(tiny, wtype):
    model = tinymia.load(tiny(wtype=wtype, n_embd=128, n_ff=160, n_head=8, n_head_kv=2), threads=1)
    for inject in (False, True):
        out = verify(model, prompt(23), inject=inject)
        assert out["ok"], out["verdict"]
        assert [r["name"] for r in out["rows"]] == names(model) and not out["unknown"] and not out["absent"]


@live
@pytest.mark.parametrize("how", [
    dict(bias=True), dict(tied=True, n_head_kv=1), dict(rope_scale=4.0, rope_freqs=True), dict(d_head=80, d_head_v=80),
    dict(rope_base=500000.0, n_head=8, n_head_kv=1), dict(n_embd=96, n_head=2, n_head_kv=1),
], ids=lambda how: " ".join(how))
def test_live_every_feature_is_equal(tiny, how):
    out = verify(tiny(wtype="Q8_0", **how), TEXT, threads=1, n_predict=12)
    assert out["ok"] and not out["unknown"], (out["verdict"], out["unknown"])
    assert out["output"]["equal"] and out["tokens_equal"]


@live
@pytest.mark.parametrize("how", [
    *(dict(wtype=wtype, n_embd=128, n_ff=160, n_head=8, n_head_kv=2, tied=True) for wtype in TYPES),
    *(dict(wtype=wtype, d_head=d, d_head_v=d) for wtype in ("F16", "Q8_0") for d in (8, 48, 64, 80)),
    dict(wtype="F32", n_embd=72, n_head=3, n_head_kv=1, n_ff=100), dict(wtype="BF16", n_embd=96, n_head=3, n_head_kv=1),
], ids=lambda how: " ".join(map(str, how.values())))
@pytest.mark.parametrize("threads", [1, 2])
def test_live_every_pass_of_decoding_has_llama_cpps_bits(tiny, how, threads):
    """AVX-512 only: elsewhere ggml adds up otherwise. Prompts of one token, of two and of many."""
    model = tinymia.load(tiny(**how), threads=threads)
    for n in (1, 2, 19):
        out = verify(model, prompt(n), n_predict=20)
        assert out["ok"] and out["output"]["equal"] and not out["absent"], out["verdict"]
        if "avx512f" in llvm_features():
            assert out["identical"] == len(names(model)), out["verdict"]
            every = out["identical_decoding"] == out["of_decoding"] == 20 * len(names(model))
            assert every or 2 in out["output"]["ours"]
    assert verify(model, prompt(19), n_predict=4, inject=True)["ok"]


@live
def test_live_prompts_of_two_tokens_with_flash_are_rounding(tiny):
    """Over a whole pass such prompts have been up to 0.055 apart, each op by itself at most 8e-8."""
    for wtype in ("Q4_0", "Q8_0"):
        model = tinymia.load(tiny(wtype=wtype, n_embd=128, n_ff=160), threads=1)
        for i in range(3, 360, 30):
            out = verify(model, [1, i], flash=True)
            assert out["ok"] and out["by_op"]["worst"]["nmse"] < 1e-6, out["verdict"]


@live
def test_live_flash_and_repack(tiny):
    model = tinymia.load(tiny(wtype="Q4_0", n_embd=128, n_ff=160), threads=1)
    out = verify(model, prompt(33), flash=True)
    assert out["ok"] and set(out["lacking"]) == {"ffn_silu", "kq", "kq_soft_max", "kqv"} and not out["unknown"]
    assert not {r["name"].partition("-")[0] for r in out["rows"]} & {"kq", "kq_soft_max", "kqv"}
    assert verify(model, prompt(33), flash=True, inject=True)["ok"]
    assert verify(model, prompt(33), repack=True, inject=True)["ok"]


@live
@pytest.mark.parametrize("name", ["inp_embd", "attn_norm-0", "Qcur_pre-1", "Qcur-0", "Kcur_pre-0", "Kcur-1", "Vcur-0",
                                  "kq-1", "kq_soft_max-0", "kqv-1", "kqv_merged-0", "kqv_out-1", "ffn_inp-0",
                                  "norm_ffn-1", "ffn_gate-0", "ffn_up-1", "ffn_gate_par-0", "ffn_out-1", "l_out-0",
                                  "norm", "result_norm"])
def test_live_patching_is_patching(model, name):
    """A tensor changed in both: each goes on alike, and not as before; what came before it is untouched."""
    ids = prompt(12)
    before = verify(model, ids)
    action = tinymia.Scale(name, 1.5, at=[3, -2])
    out = verify(model, ids, actions=[action])
    assert out["ok"], out["verdict"]
    assert [r["name"] for r in out["rows"] if r["edited"]] == [name]
    assert verify(model, ids, actions=[action], inject=True)["ok"]
    logits = model.run(ids).logits, model.run(ids, actions=[action]).logits
    assert not np.array_equal(*logits) and before["ok"]


@live
@pytest.mark.parametrize("name", ["l_out-0", "Qcur-1", "Kcur_pre-0", "kqv_merged-1", "ffn_gate-0", "kqv-1"])
def test_live_a_direction_projected_out_leaves_every_bit_the_same(load, name):
    """One row or many: a sum whose order depends on the number of rows would show here."""
    model = load(n_embd=128, n_ff=160, n_head=8, n_head_kv=2)
    for n, at in ((1, None), (2, -1), (33, None), (33, [3, -2])):
        row = np.moveaxis(model.run(prompt(n, seed=1), keep=[name])[name], name.startswith("kqv-"), 0)[0]
        out = verify(model, prompt(n), actions=[tinymia.ProjectOut(name, row.reshape(-1), at=at)], n_predict=2)
        assert out["ok"], out["verdict"]
        if "avx512f" in llvm_features():
            assert out["identical"] == len(names(model)) and out["identical_decoding"] == out["of_decoding"], n


@live
def test_live_a_patch_that_one_side_misses_is_seen(model, monkeypatch):
    """The guard of the test above: with llama.cpp left alone, everything after the patched tensor differs."""
    monkeypatch.setattr(tinymia_lab.comparison.llama.Ggml, "write", lambda self, t, raw: None)
    out = verify(model, prompt(12), actions=[tinymia.Scale("Kcur-1", 1.5)])
    assert not out["ok"] and out["first"] == "kq-1"


@live
def test_live_several_actions_and_the_text_after(model, tmp_path):
    saved = tmp_path / "rows.npz"
    model.run("the dog sleeps in the", actions=[tinymia.Save("l_out-0", saved)])
    actions = [tinymia.Patch("l_out-0", saved, src=-1, at=2), tinymia.Ablate("kqv_merged-1", heads=[0, 2]),
               tinymia.Add("l_out-1", np.linspace(-1, 1, 64), 2.0, at=-1), tinymia.Replace("Vcur-1", lambda x, ctx: -x)]
    out = verify(model, TEXT, actions=actions, n_predict=12)
    assert out["ok"] and out["output"]["equal"] and len(out["output"]["ours"]) == 12, out["verdict"]
    assert {r["name"] for r in out["rows"] if r["edited"]} == {"l_out-0", "kqv_merged-1", "l_out-1", "Vcur-1"}


@live
def test_live_record_then_against(tiny, tmp_path, main):
    path, npz = tiny(wtype="Q4_0", n_embd=128, n_ff=160), tmp_path / "r.npz"
    flags = ["-m", path, "-p", TEXT, "-n", 4]
    change = ["--ablate", "1.2", "--scale", "l_out-0", "1.5", "--at", "-1"]
    status, first, _ = main(*flags, *change, "--record", npz)
    assert status == 0 and f"recorded: {npz}" in first
    status, again, _ = main(*flags, *change, "--against", npz)
    assert status == 0 and first.replace(f"recorded: {npz}\n", "") == again
    assert main(*flags, "--against", npz)[0] == 2                             # recorded with other actions
    model = tinymia.load(path, threads=1)
    patch = tinymia.Patch("l_out-0", npz, src=1, at=1)                        # a saved file like any other
    patched = model.run(TEXT, actions=[patch], keep=["l_out-0"])["l_out-0"]
    assert np.array_equal(patched[1], np.load(npz)["l_out-0"][1])


@live
def test_live_a_partial_recording_compares_what_it_holds(model, tmp_path):
    npz = tmp_path / "r.npz"
    verify(model, TEXT, only=["l_out", "kq-1"], record=npz)
    out = verify(model, TEXT, against=npz)
    assert out["ok"] and [r["name"] for r in out["rows"]] == ["l_out-0", "kq-1", "l_out-1", "result_output"]
    with pytest.raises(tinymia.Error, match="holds no kq-0"):
        verify(model, TEXT, against=npz, only="kq")
    with pytest.raises(tinymia.Error, match="--inject needs every tensor"):
        verify(model, TEXT, against=npz, inject=True)


@live
def test_live_a_name_that_moves_is_listed(model, monkeypatch):
    """A version of llama.cpp that gives a tensor another name would look like this."""
    moved = {k: v for k, v in NAMES.items() if k[0] != "ffn_inp"}
    monkeypatch.setattr(tinymia_lab.comparison.llama_names, "NAMES", moved)
    out = verify(model, TEXT)
    assert not out["ok"] and out["absent"] == ["ffn_inp-0", "ffn_inp-1"]
    assert out["unknown"] == {"ffn_inp-* ADD": 2} and "llama.cpp has no 'ffn_inp-0, ffn_inp-1'" in out["verdict"]
    assert not any(r["over"] for r in out["rows"])


@live
def test_live_the_recordings_are_this_llama_cpps(recording, tmp_path):
    """llama.cpp computes the recorded tensors here, too, to the tolerance of another CPU."""
    path, npz = recording
    verify(path, TEXT, threads=1, record=tmp_path / "r.npz", n_predict=8)
    with np.load(npz) as old, np.load(tmp_path / "r.npz") as new:
        assert set(old.files) == set(new.files)
        assert all(naive.nmse(new[n], old[n]) < 1e-4 for n in old.files if n != "about")


@live
def test_live_the_command_runs_as_for_a_user(tiny):
    """llama.cpp's own log does not appear."""
    status, out, err = command("verify", "-m", tiny(), "-p", TEXT, "-t", 1, "--only", "l_out", "-n", 3)
    assert status == 0 and "error" not in err and "llama_" not in err
    assert out.splitlines()[-1].startswith("equal: ")


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    for name, how in RECORDED.items():
        path = write_gguf(f"{name}.gguf", **how)
        print(name, verify(path, TEXT, threads=1, record=DATA / f"{name}.npz", n_predict=8)["verdict"])
        Path(path).unlink()
