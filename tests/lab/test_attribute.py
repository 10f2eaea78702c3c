"""tinymia attribute: the parts are what they say, and add up to the logit."""
import json

import naive
import numpy as np
import pytest
from conftest import command, prompt
from pictures import NOT_THERE, colour

import tinymia
from tinymia_lab.commands.attribute import Attribution, attribute, pictures
from tinymia_lab.commands.attribute import command as attribute_command

PROMPT = "Egypt -> Cairo, Norway -> Oslo, France ->"


@pytest.fixture(scope="module")
def found(copycat):
    return attribute(copycat, PROMPT, "Paris", "Italy", neurons=3)


def total(found):
    return sum(value for _, value in found.parts())


def by_hand(path, ids, given, answer, against, position):
    """Embedding, heads and FFNs by their definition, in float64: a matrix product for each head's columns of Wo.

    `given`: the run's own tensors, by name; activations are not rounded before the products.
    """
    m = naive.read(path)
    w, n_head = m.w, m.meta["llama.attention.head_count"]
    x = np.asarray(given[f"l_out-{m.meta['llama.block_count'] - 1}"][position], np.float64)
    out = w["output.weight" if "output.weight" in w else "token_embd.weight"]
    scale = 1 / np.sqrt((x * x).mean() + m.meta["llama.attention.layer_norm_rms_epsilon"])

    def logit(term):
        last = term * scale * w["output_norm.weight"]
        return out[answer] @ last - (out[against] @ last if against is not None else 0)

    heads, ffn = [], []
    for il in range(m.meta["llama.block_count"]):
        wo, merged = w[f"blk.{il}.attn_output.weight"], given[f"kqv_merged-{il}"][position].astype(np.float64)
        width = len(merged) // n_head
        columns = [slice(h * width, h * width + width) for h in range(n_head)]
        heads.append([logit(wo[:, part] @ merged[part]) for part in columns])
        ffn.append(logit(given[f"ffn_out-{il}"][position].astype(np.float64)))
    return logit(w["token_embd.weight"][ids[position]]), np.array(heads), np.array(ffn)


KEEP = ["inp_embd", "kqv_merged", "ffn_out", "l_out"]


@pytest.mark.parametrize("numerics", ["ggml", "f32"])
@pytest.mark.parametrize("which", ["stories", "copycat"])
@pytest.mark.parametrize("position,difference", [(-1, False), (-1, True), (3, True)])
def test_parts_are_what_they_say_and_add_up_to_the_logit(request, which, numerics, position, difference):
    path = request.getfixturevalue("stories") if which == "stories" else None
    model = tinymia.load(path, threads=1, numerics=numerics)
    ids = model.tokenize("Once upon a time there was a" if path else PROMPT)
    run = model.run(ids, keep=KEEP)
    answer = int(run.logits[position].argmax())
    against = int(run.logits[position].argsort()[-2]) if difference else None
    found = attribute(model, ids, answer, against, position)
    logit = float(run.logits[position, answer]) - (float(run.logits[position, against]) if difference else 0)
    assert found.logit == pytest.approx(logit, rel=1e-6) and total(found) == pytest.approx(logit, rel=1e-4)
    embedding, heads, ffn = by_hand(model.path, ids, {n: run[n] for n in run.names}, answer, against, position)
    assert found.embedding == pytest.approx(embedding, rel=1e-4, abs=1e-5)
    assert np.allclose(found.heads, heads, rtol=1e-4, atol=1e-5) and np.allclose(found.ffn, ffn, rtol=1e-4, atol=1e-5)
    # What is left over is rounding, and small: of sums in float32, or of activations to 8 bits.
    size = sum(abs(value) for _, value in found.parts())
    rest = np.abs([*found.rounding, found.output_rounding]).sum()
    exact = numerics == "f32" or which == "stories"
    assert rest < (1e-5 if exact else 5e-3) * size and (exact or rest > 1e-5 * size)
    assert np.abs([*found.stream, found.output_stream]).sum() < 1e-5 * size
    assert not found.bias.any() and not found.output_bias
    if exact:
        assert embedding + heads.sum() + ffn.sum() == pytest.approx(logit, rel=1e-4, abs=1e-4)


def test_the_best_token_is_the_answer_unless_another_is_named(copycat, found):
    best = attribute(copycat, PROMPT)
    assert best.answer_piece == " Paris" == found.answer_piece and best.against is None
    assert best.logit == copycat.run(PROMPT).logits[-1].max()
    assert (found.against_piece, found.position, found.pieces[-1]) == (" Italy", 10, " ->")


def test_neurons_add_up_to_their_ffn(copycat, copycat_f32, found):
    run = copycat.run(PROMPT, keep=["ffn_gate_par-3", "l_out-5"])
    assert np.array_equal(found.activations, run["ffn_gate_par-3"][-1])
    assert found.neurons.sum() == pytest.approx(found.ffn[3], abs=0.01)
    exact = attribute(copycat_f32, PROMPT, "Paris", "Italy", neurons=3)
    assert exact.neurons.sum() == pytest.approx(exact.ffn[3], abs=1e-5)
    # One neuron by its definition: its column of ffn_down, through the final norm, as a logit.
    w, x = naive.read(copycat.path).w, run["l_out-5"][-1].astype(np.float64)
    i = int(np.abs(found.neurons).argmax())
    column = w["blk.3.ffn_down.weight"][:, i] * float(found.activations[i])
    last = column / np.sqrt((x * x).mean() + copycat.config.eps) * w["output_norm.weight"]
    logits = w["token_embd.weight"] @ last
    assert found.neurons[i] == pytest.approx(logits[found.answer] - logits[found.against], rel=1e-5)


def test_shared_keys_wide_values_and_biases(load):
    """Heads of another width than n_embd / n_head, two to a key, with a bias in every product."""
    ids = prompt(9)
    for wtype in ("F32", "Q4_0"):
        model = load(wtype=wtype, bias=True, n_head=4, n_head_kv=2, d_head_v=32)
        run = model.run(ids, keep=KEEP)
        found = attribute(model, ids, 300, 301)
        _, heads, ffn = by_hand(model.path, ids, {n: run[n] for n in run.names}, 300, 301, -1)
        assert np.allclose(found.heads, heads, rtol=1e-4, atol=1e-5) and np.allclose(found.ffn, ffn, rtol=1e-4)
        assert found.bias.all() and total(found) == pytest.approx(found.logit, rel=1e-4)
        assert np.abs(found.rounding).max() < (1e-4 if wtype == "F32" else 0.2)
        assert any(name == "bias of attn_output 1" for name, _ in found.parts())


def test_what_actions_put_in_has_a_part_of_its_own(copycat):
    plain = attribute(copycat, PROMPT, "Paris")
    zeros = tinymia.Ablate("kqv_merged-2", heads=[1, 3])
    silenced = attribute(copycat, PROMPT, "Paris", actions=[zeros])
    assert not silenced.heads[2, [1, 3]].any() and silenced.heads[2, [0, 2]].all()
    logits = copycat.run(PROMPT, actions=[zeros]).logits[-1]
    assert silenced.logit == pytest.approx(logits[plain.answer]) == pytest.approx(total(silenced))
    run = copycat.run("0 1 2 to 2 1", keep=["l_out"])
    for name in ("kqv_out-4", "ffn_inp-4", "l_out-4"):
        changed = attribute(copycat, PROMPT, "Paris", actions=[tinymia.Add(name, run["l_out-4"][-1], at=-1)])
        others = np.delete(changed.stream, 4)
        assert abs(changed.stream[4]) > 0.05 and np.abs(others).max() < 1e-4, name
        assert abs(changed.rounding).max() < 0.01 and changed.rounding.any()
        assert total(changed) == pytest.approx(changed.logit, rel=1e-6)
    for name in ("norm", "result_norm", "result_output"):
        halved = attribute(copycat, PROMPT, "Paris", actions=[tinymia.Scale(name, 0.5, at=-1)])
        assert halved.logit == pytest.approx(plain.logit / 2, rel=0.01)
        assert halved.output_stream == pytest.approx(-plain.logit / 2, rel=0.01)
        assert abs(halved.output_rounding) < 0.05 and total(halved) == pytest.approx(halved.logit, rel=1e-6)
        assert np.allclose(halved.heads, plain.heads, atol=1e-5)


def test_saved_and_gone_on_with(copycat, found, tmp_path, monkeypatch, capsys):
    import tinymia_lab.commands.attribute as module

    path, layer, calls = tmp_path / "x.npz", module._layer, []

    def stops(result, il, *how):
        calls.append(il)
        if len(calls) == 4:
            raise KeyboardInterrupt
        layer(result, il, *how)

    monkeypatch.setattr(module, "_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        attribute(copycat, PROMPT, "Paris", "Italy", neurons=3, out=path)
    assert "attribute: stopped at 4 of 7" in capsys.readouterr().err
    assert np.isnan(Attribution.load(path).heads).any(1).tolist() == [False] * 3 + [True] * 3
    again = attribute(copycat, PROMPT, "Paris", "Italy", neurons=3, out=path)
    again.save(path)
    n = len(calls)
    for kept in (again, attribute(copycat, PROMPT, "Paris", "Italy", neurons=3, out=path)):
        assert kept.parts() == found.parts() and np.array_equal(kept.neurons, found.neurons)
    assert len(calls) == n
    with pytest.raises(tinymia.Error, match="settings position is 10, not 2"):
        attribute(copycat, PROMPT, "Paris", "Italy", 2, neurons=3, out=path)


def test_the_cells_of_the_pictures_add_up(found):
    heads, layers = pictures(found)
    assert np.array_equal(heads.values, found.heads) and heads.diverging and heads.unit == "logits" and heads.upward
    assert np.nansum(layers.values) == pytest.approx(found.logit)
    assert list(layers.rows) == ["tokens", *"012345", "output"] and layers.values[0, 0] == found.embedding
    assert layers.hovers[-1][-1].endswith(f"sum up to here {found.logit:.2f}")


@pytest.mark.parametrize("how,words", [
    ({"answer": "Paris", "against": "Paris"}, "are the same: "), ({"answer": 9999}, "out of range"),
    ({"against": " Paris"}, "are the same: "), ({"position": 11}, "position 11"), ({"neurons": 6}, "layer 6 is out of"),
    ({"answer": " "}, "no text"), ({"out": "x.txt"}, "x.txt"),
])
def test_what_is_wrong_is_said(copycat, how, words):
    with pytest.raises(tinymia.Error, match=words):
        attribute(copycat, PROMPT, **how)


# ---------------------------------------------------------------------------------------- the command


def test_command_prints_the_parts_by_size(capsys, found):
    args = ["-p", PROMPT, "-t", "1", "--answer", "Paris", "--against", "Italy", "--neurons", "3", "--top", "5",
            "--numerics", "ggml"]
    assert attribute_command(args) == 0
    out = capsys.readouterr().out
    lines = out.split("parts by size, in logits\n")[1].split("\n\n")[0].splitlines()
    values = [float(line.rsplit(None, 1)[1]) for line in lines]
    assert lines[0].startswith("FFN 5") and values[:5] == sorted(values[:5], key=lambda v: -abs(v))
    assert sum(values[:-1]) == pytest.approx(values[-1], abs=1e-3) == pytest.approx(found.logit, abs=1e-3)
    neurons = out.split("neurons of FFN 3")[1].splitlines()[2:]
    assert int(neurons[0].split()[0]) == np.abs(found.neurons).argmax()
    assert sum(float(line.split()[-1]) for line in neurons[:7]) == pytest.approx(found.ffn[3], abs=1e-3)


def test_the_command_gives_one_json_object(capsys, found):
    args = ["-p", PROMPT, "-t", "1", "--answer", "Paris", "--against", "Italy", "--json"]
    assert attribute_command([*args, "--numerics", "ggml"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert np.allclose(data["heads"], found.heads) and data["logit"] == found.logit and data["neurons"] == []


@pytest.mark.parametrize("args,words", [
    ([], "-p or -f"), (["-p", "x", "--neurons", "9"], "layer 9"), (["-p", "x", "--top", "0"], "--top 0"),
    (["-p", "x", "--position", "7"], "position 7"), (["-p", "x", "-o", "x.gif"], ".npz, .json, .png, .html"),
])
def test_wrong_flags_of_the_command_are_one_line(args, words):
    status, out, err = command("attribute", "-t", 1, *args)
    assert status == 2 and out == "" and err.splitlines()[-1].startswith("error: ") and words in err, err


def test_the_command_draws_and_keeps(drawn, tmp_path, capsys):
    outs = [str(tmp_path / f"x.{s}") for s in ("png", "html", "npz")]
    assert attribute_command(["-p", PROMPT, "-t", "1", *(x for o in outs for x in ("-o", o))]) == 0
    found, (heads, layers) = Attribution.load(outs[2]), drawn(outs[0]).maps
    assert "logit of ▁Paris, " in heads.title and "by head\ncolour: logits" in heads.title
    assert "by layer" in layers.title
    assert heads.rows == list("543210") and heads.columns == list("0123")
    most = np.abs(found.heads).max()
    for il, head in ((5, 3), (0, 0), np.unravel_index(np.abs(found.heads).argmax(), found.heads.shape)):
        assert heads.text(str(il), str(head)) == f"{found.heads[il, head]:.2f}"
        assert heads.colour(str(il), str(head)) == colour(found.heads[il, head], -most, most, diverging=True)
    assert layers.rows == ["output", *"543210", "tokens"]
    assert layers.columns == ["embedding", "attention", "FFN", "rest"]
    assert layers.text("3", "FFN") == f"{found.ffn[3]:.2f}" and layers.text("tokens", "FFN") == "·"
    assert layers.colour("tokens", "FFN") == layers.colour("3", "embedding") == NOT_THERE
    assert "by head" in (tmp_path / "x.html").read_text()
