"""tinymia trace: every op has its formula, every formula and every number is the model's."""
import json
import re

import numpy as np
import pytest
from conftest import command, prompt

import tinymia
from tinymia_engine.names import AFTER, BEFORE, LAYER
from tinymia_lab.commands.trace import Trace, op_text, text, trace
from tinymia_lab.commands.trace import command as trace_command
from tinymia_lab.measure.formulas import TOLD

PROMPT = "Egypt -> Cairo, Norway -> Oslo, Estonia ->"


@pytest.fixture(scope="module")
def found(copycat):
    return trace(copycat, PROMPT, None)


def test_every_name_is_told_in_the_order_of_computation(copycat, found):
    assert [op["name"] for op in found.ops] == copycat.names()
    assert TOLD.keys() == {op.base for op in [*BEFORE, *LAYER, *AFTER]}
    for op in found.ops:
        assert op["formula"].strip() and op["sentence"].endswith(".") and "{" not in op["formula"] + op["sentence"]


@pytest.mark.parametrize("position", [-1, 4])
@pytest.mark.parametrize("numerics", ["ggml", "f32"])
def test_values_are_the_runs(copycat_in, position, numerics):
    model = copycat_in(numerics)
    run, told = model.run(PROMPT, keep=["all"]), trace(model, PROMPT, None, position)
    for op in told.ops:
        dims = [name for name, _ in op["shape"]]
        x = run[op["name"]]
        assert [size for _, size in op["shape"]] == list(x.shape), op["name"]
        row = np.moveaxis(x, dims.index("n_tok"), 0)[position].reshape(-1)
        assert op["first"] == row[:6].tolist() and op["size"] == row.size, op["name"]
        assert op["norm"] == pytest.approx(float(np.sqrt((row.astype(np.float64) ** 2).sum())), rel=1e-12)
    p = np.exp(run.logits[position].astype(np.float64) - run.logits[position].max())
    p /= p.sum()
    assert [model.piece(i) for i in np.argsort(-p)[:5]] == [piece for piece, _ in told.best]
    assert [share for _, share in told.best] == pytest.approx(sorted(p)[:-6:-1], rel=1e-5)


def rope(x, position, base=10000.0):
    """RoPE as the formula says it: pair p of each head is rotated by i * base^(-2p / n_rot)."""
    out = x.copy()
    for p in range(x.shape[-1] // 2):
        t = position * base ** (-2 * p / x.shape[-1])
        a, b = x[..., 2 * p], x[..., 2 * p + 1]
        out[..., 2 * p], out[..., 2 * p + 1] = a * np.cos(t) - b * np.sin(t), a * np.sin(t) + b * np.cos(t)
    return out


def test_formulas_are_what_is_computed(load):
    """Each formula, beside its evaluation from the run's own inputs and the weights: it gives the run's own output."""
    model, ids = load(numerics="f32"), prompt(7)
    c, run = model.config, model.run(ids, keep=["all"])
    causal = np.tri(7, dtype=bool)

    def w(name):
        return model.weights[f"{name}.weight"].numpy()

    def rms(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.eps)

    def e(kq):
        return np.where(causal, np.exp(kq / np.sqrt(c.d_head)), 0)

    il, t = 1, {name.removesuffix("-1"): run[name].astype(np.float64) for name in run.names if name.endswith("-1")}
    b, x = f"blk.{il}.", run["l_out-0"].astype(np.float64)
    heads = (7, -1, c.d_head)
    turned = "pair p of each head: (a, b) -> (a cos t - b sin t, a sin t + b cos t)\nt = i * 10000^(-2p / 16)"
    want = {
        "norm": ("norm = x / sqrt(mean(x²) + 1e-05)", rms(x)),
        "attn_norm": ("attn_norm = norm * weight", t["norm"] * w(b + "attn_norm")),
        "Qcur_pre": ("Qcur_pre[i, h] = Wq[h] attn_norm[i]", (t["attn_norm"] @ w(b + "attn_q").T).reshape(heads)),
        "Kcur_pre": ("Kcur_pre[i, h] = Wk[h] attn_norm[i]", (t["attn_norm"] @ w(b + "attn_k").T).reshape(heads)),
        "Vcur": ("Vcur[i, h] = Wv[h] attn_norm[i]", (t["attn_norm"] @ w(b + "attn_v").T).reshape(heads)),
        "Qcur": (turned, np.stack([rope(row, i) for i, row in enumerate(t["Qcur_pre"])])),
        "Kcur": (turned, np.stack([rope(row, i) for i, row in enumerate(t["Kcur_pre"])])),
        "kq": ("kq[h, i, j] = Qcur[i, h] . Kcur[j, h // 2]",
               np.stack([t["Qcur"][:, h] @ t["Kcur"][:, h // 2].T for h in range(c.n_head)])),
        "kq_soft_max": ("kq_soft_max[h, i, j] = exp(kq[h, i, j] / sqrt(16)) / sum over j' <= i of the same",
                        e(t["kq"]) / e(t["kq"]).sum(-1, keepdims=True)),
        "kqv": ("kqv[h, i] = sum over j of kq_soft_max[h, i, j] * Vcur[j, h // 2]",
                np.stack([t["kq_soft_max"][h] @ t["Vcur"][:, h // 2] for h in range(c.n_head)])),
        "kqv_merged": ("kqv_merged[i] = kqv[0, i], kqv[1, i], ... side by side", np.concatenate(list(t["kqv"]), -1)),
        "kqv_out": ("kqv_out[i] = Wo kqv_merged[i]", t["kqv_merged"] @ w(b + "attn_output").T),
        "ffn_inp": ("ffn_inp = x + kqv_out", x + t["kqv_out"]),
        "norm_ffn": ("norm_ffn = ffn_inp / sqrt(mean(ffn_inp²) + 1e-05)", rms(t["ffn_inp"])),
        "ffn_norm": ("ffn_norm = norm_ffn * weight", t["norm_ffn"] * w(b + "ffn_norm")),
        "ffn_gate": ("ffn_gate[i] = Wgate ffn_norm[i]", t["ffn_norm"] @ w(b + "ffn_gate").T),
        "ffn_up": ("ffn_up[i] = Wup ffn_norm[i]", t["ffn_norm"] @ w(b + "ffn_up").T),
        "ffn_silu": ("ffn_silu = ffn_gate / (1 + exp(-ffn_gate))", t["ffn_gate"] / (1 + np.exp(-t["ffn_gate"]))),
        "ffn_gate_par": ("ffn_gate_par = ffn_silu * ffn_up", t["ffn_silu"] * t["ffn_up"]),
        "ffn_out": ("ffn_out[i] = Wdown ffn_gate_par[i]", t["ffn_gate_par"] @ w(b + "ffn_down").T),
        "l_out": ("l_out = ffn_inp + ffn_out", t["ffn_inp"] + t["ffn_out"]),
    }
    told = {op["name"]: op for op in trace(model, ids, None).ops}
    assert want.keys() == t.keys()
    for name, (formula, value) in want.items():
        assert told[f"{name}-1"]["formula"] == formula
        assert np.allclose(value, t[name], rtol=1e-3, atol=1e-4), name
    last = run["l_out-1"].astype(np.float64)
    for name, formula, value in (
        ("inp_embd", "inp_embd[i] = token_embd[token i]", w("token_embd")[ids]),
        ("norm", want["norm"][0], rms(last)),
        ("result_norm", "result_norm = norm * weight", rms(last) * w("output_norm")),
        ("result_output", "result_output[i, v] = Woutput[v] . result_norm[i]",
         (rms(last) * w("output_norm")) @ w("output").T),
    ):
        assert told[name]["formula"] == formula and np.allclose(value, run[name], rtol=1e-3, atol=1e-4), name
    assert "2 heads share one of them." in told["Kcur_pre-1"]["sentence"]


def test_inputs_and_weights_are_named_with_their_shapes(copycat, found):
    told = {op["name"]: op for op in found.ops}
    for op in told.values():
        for source in op["inputs"]:
            assert source["name"] == "tokens" or source["shape"] == told[source["name"]]["shape"]
        if op["weight"]:
            tensor = copycat.weights[op["weight"]["name"]]
            assert op["weight"]["type"] == tensor.type_name
            assert [size for _, size in op["weight"]["shape"]] == list(tensor.shape)
            sizes = copycat.config.sizes()
            for dim, size in op["weight"]["shape"]:
                assert np.prod([sizes[part] for part in dim.split("*")]) == size, (op["name"], dim)
    assert told["norm-3"]["inputs"] == [{"role": "x", "name": "l_out-2", "shape": told["l_out-2"]["shape"]}]
    assert told["result_output"]["weight"]["name"] == "token_embd.weight"


@pytest.mark.parametrize("how,words", [
    ({"bias": True}, "Qcur_pre[i, h] = Wq[h] attn_norm[i] + bias"),
    ({"rope_scale": 4.0}, "t = i * 10000^(-2p / 16) * 0.25"), ({"rope_freqs": True}, "/ rope_freqs[p]"),
])
def test_formulas_know_the_model(load, how, words):
    model = load(**how)
    told = trace(model, prompt(5), [1]).ops
    assert any(words in op["formula"] for op in told)
    assert all((op["bias"] is not None) == ("bias" in how and op["op"] == "mul_mat" and "-" in op["name"]
                                            and op["weight"] is not None) for op in told)


def test_the_trace_shows_interventions(copycat):
    told = {op["name"]: op for op in trace(copycat, PROMPT, [2], actions=[tinymia.Scale("ffn_out-2", 0.0)]).ops}
    assert not any(told["ffn_out-2"]["first"]) and told["ffn_gate_par-2"]["norm"] > 0
    assert told["l_out-2"]["first"] == told["ffn_inp-2"]["first"]


def test_an_op_that_was_changed_says_so_and_how(copycat):
    """The value as it was computed is shown beside the changed one, to which the formula does not apply."""
    source = copycat.run("Egypt -> Cairo, Norway ->", keep="l_out-2")
    actions = [tinymia.Patch("l_out-2", source, src=-1, at=-1), tinymia.Scale("l_out-2", 2.0, at=-1),
               tinymia.Scale("ffn_out-2", 0.5, at=[0, 2]), tinymia.Scale("kqv-2", 1.0), tinymia.Lens("l_out-2", 3),
               tinymia.Scale("norm-2", 2.0, when="decode")]
    with pytest.raises(tinymia.Error, match="never fired"):
        trace(copycat, PROMPT, [2], actions=actions)
    found, plain = trace(copycat, PROMPT, [2], actions=actions[:-1]), copycat.run(PROMPT, keep="all")
    told = {op["name"]: op for op in found.ops}
    assert {name for name, op in told.items() if op["changed"]} == {"l_out-2", "ffn_out-2", "kqv-2"}
    how = told["l_out-2"]["changed"]
    computed = copycat.run(PROMPT, actions=[actions[2], tinymia.Save("l_out-2")]).records[0].value
    assert how["by"] == [repr(a) for a in actions[:2]] and how["rows"] == [10]
    assert how["first"] == computed[10, :6].tolist() and how["norm"] == pytest.approx(np.linalg.norm(computed[10]))
    assert told["l_out-2"]["first"] == (2 * source["l_out-2"][-1, :6]).tolist()
    assert told["ffn_out-2"]["changed"]["rows"] == [0, 2]
    assert told["ffn_out-2"]["first"] == plain["ffn_out-2"][10, :6].tolist() == told["ffn_out-2"]["changed"]["first"]
    words = text(found)
    assert "changed by Patch('l_out-2', row -1 of Run('Egypt" in words and "as computed, row 10: " in words
    assert "row 10 is as it was computed" in words and "every value is as it was computed" in words
    assert max(map(len, words.splitlines())) <= 100
    assert all(op["changed"] is None for op in trace(copycat, PROMPT, [2]).ops)


def test_changed_ops_are_in_the_json(capsys, copycat):
    assert trace_command(["-p", "France ->", "-t", "1", "--layer", "2", "--json", "--scale", "ffn_out-2", "0"]) == 0
    ops = {op["name"]: op for op in json.loads(capsys.readouterr().out)["ops"]}
    assert ops["ffn_out-2"]["changed"]["rows"] == [0, 1, 2] and ops["l_out-2"]["changed"] is None


def test_text_fits_in_100_columns_and_shows_the_numbers(found, load):
    assert max(map(len, text(found).splitlines())) <= 100
    wide = trace(load(bias=True, rope_freqs=True, d_head_v=32), prompt(5), None)
    assert max(map(len, text(wide).splitlines())) <= 100
    op = next(op for op in found.ops if op["name"] == "kqv_out-2")
    lines = op_text(op, 10).splitlines()
    assert lines[0] == "kqv_out-2  [n_tok 11, n_embd 128]  mul_mat"
    assert lines[1].strip() == "kqv_out[i] = Wo kqv_merged[i]"
    assert "blk.2.attn_output.weight Q5_0 [n_embd 128, n_head*d_head_v 128]" in "\n".join(lines)
    assert f"row 10: {op['first'][0]:.4g} " in "\n".join(lines) and f"norm {op['norm']:.4g}" in "\n".join(lines)


def test_layers_that_are_left_out_are_named(copycat):
    out = text(trace(copycat, PROMPT, "1,4"))
    headings = [line for line in out.splitlines() if line.startswith(("...", "----"))]
    assert [re.match(r"\S+ ([a-z]+ \S+( to \d)?)", line)[1].rstrip(":") for line in headings] == [
        "layer 0", "layer 1", "layers 2 to 3", "layer 4", "layer 5", "the end"]


def test_saved_and_read_again(copycat, tmp_path):
    for name in ("x.npz", "x.json"):
        first = trace(copycat, PROMPT, [0], out=tmp_path / name)    # the function itself keeps it there
        assert Trace.load(tmp_path / name) == first == trace(copycat, PROMPT, [0], out=tmp_path / name)
        with pytest.raises(tinymia.Error, match="settings layers"):
            trace(copycat, PROMPT, [1], out=tmp_path / name)


# ---------------------------------------------------------------------------------------- the command


def test_command_tells_layer_0_unless_asked(capsys):
    assert trace_command(["-p", "France ->", "-t", "1"]) == 0
    out = capsys.readouterr().out
    assert "l_out-0" in out and "norm-1" not in out and "layers 1 to 5: the same" in out and "after ▁-> comes" in out
    assert trace_command(["-p", "France ->", "-t", "1", "--all", "--position", "0"]) == 0
    out = capsys.readouterr().out
    assert "l_out-5  [" in out and "row 0: " in out and "after <s> comes" in out


def test_the_command_gives_one_json_object(capsys, copycat):
    assert trace_command(["-p", "France ->", "-t", "1", "--layer", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["ops"]) == 1 + 21 + 3 and data["layers"] == [2] and data["best"][0][0] == " Italy"


@pytest.mark.parametrize("args,words", [
    ([], "-p or -f"), (["-p", "x", "--layer", "9"], "layer 9"), (["-p", "x", "--layer", "1", "--all"], "--all"),
    (["-p", "x", "--position", "-9"], "position -9"), (["-p", "x", "-o", "x.png"], ".npz, .json"),
])
def test_wrong_flags_of_the_command_are_one_line(args, words):
    status, out, err = command("trace", "-t", 1, *args)
    assert status == 2 and out == "" and err.splitlines()[-1].startswith("error: ") and words in err, err
