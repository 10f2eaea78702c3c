"""The forward pass against naive.py: every named tensor, every weight type, both numerics.

Two questions are asked.  Is each op right by itself: naive.py computes every tensor from the engine's own inputs to it,
so errors do not add up and a bound can be tight (OP).  And is the whole right: from the tokens on, in float64 (WHOLE).
The second one cannot be tight for 8-bit activations: float32 and float64 differ by 1e-7, now and then that tips a value
over a rounding step, a step is 1/127 of the block's largest value, and from there on the two round different numbers.
"""
import naive
import numpy as np
import pytest
from conftest import TYPES, prompt
from naive import nmse

import tinymia

# Bounds on sum (a-b)^2 / sum b^2 of any tensor; in brackets the worst found over all shapes below, 1 to 300 tokens.
OP = 2e-12                      # one op (8e-13: Qcur, whose angles are float32 products, as ggml's are)
WHOLE = 2e-11                   # f32 from the tokens on (6e-12)
WHOLE_GGML = {"F32": 2e-7,      # the cache and the pattern are F16 (4e-8)
              "F16": 1e-6,      # (2e-7)
              "BF16": 2e-5,     # steps eight times as high (7e-6)
              "Q8_0": 1e-3, "Q4_0": 1e-3, "Q4_1": 1e-3, "Q5_0": 1e-3, "Q5_1": 1e-3}     # 8-bit activations (3e-4)
ATTENTION = 1e-8                # fused, from Qcur, Kcur, Vcur to kqv_merged, over the F16 steps of the pattern (6e-10)


def whole_bound(numerics, wtype):
    return WHOLE if numerics == "f32" else WHOLE_GGML[wtype]


SHAPES = {
    "one head a key": dict(n_head=8, n_head_kv=8),
    "groups of 2": dict(n_head=8, n_head_kv=4),
    "groups of 4": dict(n_head=8, n_head_kv=2),
    "groups of 8": dict(n_head=8, n_head_kv=1),
    "groups of 3": dict(n_embd=96, n_head=6, n_head_kv=2),
    "one head": dict(n_head=1, n_head_kv=1),
    "one layer": dict(n_layer=1),
    "d_head 48": dict(n_embd=96, n_head=2, n_head_kv=1),
    "d_head 80": dict(n_embd=160, n_head=2, n_head_kv=2),
    "d_head 128": dict(n_embd=128, n_head=1, n_head_kv=1),
    "d_head 6": dict(n_embd=66, n_head=11, n_head_kv=11),
    "wider keys": dict(d_head=24, d_head_v=16),
    "wider values": dict(d_head=16, d_head_v=40),
    "heads wider than n_embd": dict(d_head=32, d_head_v=32),
    "part of a head turns": dict(n_rot=6),
    "odd n_ff and n_vocab": dict(n_ff=101, n_vocab=397),
    "tied output": dict(tied=True),
    "biases": dict(bias=True),
    "linear scaling": dict(rope_scale=4.0),
    "rope_freqs": dict(rope_freqs=True, rope_base=500000.0),
    "a large eps": dict(eps=0.1),
    "Llama-1's": dict(eps=1e-6, n_head_kv=4),
}
LENGTHS = [1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129, 300]


def tensors(model, ids, **how):
    run = model.run(ids, keep=["all"], **how)
    return {name: run[name] for name in run.names}


def worst(got, want):
    errors = {name: nmse(got[name], want[name]) for name in got}
    name = max(errors, key=errors.get)
    return errors[name], name


def check(model, path, ids, op, whole):
    got, m = tensors(model, ids), naive.read(path)
    want = naive.forward(m, ids, model.numerics)
    assert list(got) == list(want) == model.names()
    assert all(np.isfinite(v).all() for v in got.values())
    e, name = worst(got, naive.forward(m, ids, model.numerics, given=got))
    assert e <= op, f"{name} from the engine's own inputs: {e:.2g}"
    e, name = worst(got, want)
    assert e <= whole, f"{name} from the tokens on: {e:.2g}"
    return got


@pytest.mark.parametrize("numerics", ["f32", "ggml"])
@pytest.mark.parametrize("wtype", TYPES)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_every_weight_type_is_near_the_naive_reference(tiny, load, wtype, numerics, tied):
    how = dict(wtype=wtype, tied=tied)
    whole = whole_bound(numerics, wtype)
    for n in (1, 2, 37):
        check(load(numerics, **how), tiny(**how), prompt(n), OP, whole)


@pytest.mark.parametrize("numerics", ["f32", "ggml"])
@pytest.mark.parametrize("wtype", ["F32", "Q8_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_near_the_naive_reference(tiny, load, shape, wtype, numerics):
    how = dict(wtype=wtype, **SHAPES[shape])
    model, path = load(numerics, **how), tiny(**how)
    whole = whole_bound(numerics, wtype)
    got = check(model, path, prompt(19, how.get("n_vocab", 384)), OP, whole)
    c, n = model.config, 19
    assert got["Qcur-0"].shape == (n, c.n_head, c.d_head) and got["Kcur-0"].shape == (n, c.n_head_kv, c.d_head)
    assert got["kqv-0"].shape == (c.n_head, n, c.d_head_v)


@pytest.mark.parametrize("numerics", ["f32", "ggml"])
@pytest.mark.parametrize("wtype", ["F16", "Q4_0"])
def test_every_length_is_near_the_naive_reference(tiny, load, wtype, numerics):
    model, m = load(numerics, wtype=wtype), naive.read(tiny(wtype=wtype))
    for n in LENGTHS:
        ids = prompt(n)
        got = tensors(model, ids)
        e, name = worst(got, naive.forward(m, ids, numerics, given=got))
        assert e <= OP, f"{name}, {n} tokens: {e:.2g}"
        fused = model.run(ids, keep=["Qcur", "Kcur", "Vcur", "kqv_merged"])
        given = {k: fused[k] for k in fused.names}
        want = naive.forward(m, ids, numerics, given=given)
        for il in range(model.config.n_layer):
            e = nmse(fused[f"kqv_merged-{il}"], want[f"kqv_merged-{il}"])
            assert e <= ATTENTION, f"fused attention, layer {il}, {n} tokens: {e:.2g}"


def test_shapes_as_the_table_says(model):
    ids = prompt(7)
    got, c, n = tensors(model, ids), model.config, 7
    layer = {
        "norm": (n, c.n_embd), "attn_norm": (n, c.n_embd),
        "Qcur_pre": (n, c.n_head, c.d_head), "Kcur_pre": (n, c.n_head_kv, c.d_head),
             "Vcur": (n, c.n_head_kv, c.d_head_v),
        "Qcur": (n, c.n_head, c.d_head), "Kcur": (n, c.n_head_kv, c.d_head),
        "kq": (c.n_head, n, n), "kq_soft_max": (c.n_head, n, n), "kqv": (c.n_head, n, c.d_head_v),
        "kqv_merged": (n, c.n_head * c.d_head_v), "kqv_out": (n, c.n_embd),
        "ffn_inp": (n, c.n_embd), "norm_ffn": (n, c.n_embd), "ffn_norm": (n, c.n_embd), "ffn_gate": (n, c.n_ff),
        "ffn_up": (n, c.n_ff), "ffn_silu": (n, c.n_ff), "ffn_gate_par": (n, c.n_ff), "ffn_out": (n, c.n_embd),
        "l_out": (n, c.n_embd),
    }
    want = {"inp_embd": (n, c.n_embd)} | {f"{k}-{il}": s for il in range(c.n_layer) for k, s in layer.items()}
    want |= {"norm": (n, c.n_embd), "result_norm": (n, c.n_embd), "result_output": (n, c.n_vocab)}
    assert {k: v.shape for k, v in got.items()} == want
    assert all(v.dtype == np.float32 and v.flags.c_contiguous and v.flags.owndata for v in got.values())
    assert model.names() == list(want)


def test_names_are_in_the_order_of_computation(model):
    seen = []
    model.run(prompt(3), actions=[tinymia.Replace("all", lambda x, ctx: seen.append(ctx.name))])
    assert seen == model.names()


def test_an_attention_pattern_sums_to_1_and_sees_no_future(model):
    """Rows sum to 1, nothing looks ahead, and kq is full: the mask comes with the softmax."""
    run = model.run(prompt(9), keep=["kq-1", "kq_soft_max-1"])
    p = run["kq_soft_max-1"]
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    assert (p[:, np.triu_indices(9, 1)[0], np.triu_indices(9, 1)[1]] == 0).all() and (p >= 0).all()
    assert np.abs(run["kq-1"]).min() > 0


@pytest.mark.parametrize("numerics", ["f32", "ggml"])
@pytest.mark.parametrize("how", [dict(), dict(n_head=8, n_head_kv=1, wtype="Q4_0"),
                                 dict(d_head=24, d_head_v=40, n_head_kv=4, wtype="F16")],
                         ids=["plain", "groups", "widths"])
def test_fused_attention_equals_attention_by_names(load, how, numerics):
    """The only branch of forward: bit for bit, so that looking at a pattern changes nothing."""
    model = load(numerics, **how)
    for n in (1, 2, 17, 64, 150):
        fused = model.run(prompt(n), keep=["kqv_merged", "l_out"])
        both = model.run(prompt(n), keep=["kqv_merged", "l_out", "kq_soft_max"])
        for name in fused.names:
            np.testing.assert_array_equal(fused[name], both[name], err_msg=f"{name}, {n} tokens")
        np.testing.assert_array_equal(fused.logits, both.logits)


@pytest.mark.parametrize("numerics", ["f32", "ggml"])
@pytest.mark.parametrize("wtype", ["F32", "BF16", "Q5_1"])
@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 1, 5], [11, 1], [1, 11], [3, 9]], ids=str)
def test_decoding_equals_the_prompt_pass(load, wtype, numerics, parts):
    """To the bit with f32. With ggml a token alone is summed otherwise than one of several, as in llama.cpp."""
    model, ids = load(numerics, wtype=wtype), prompt(12)
    whole = model.run(ids, keep=["l_out", "Kcur", "kqv_merged", "result_norm"])
    cache, at, tolerance = model.cache(), 0, 0 if numerics == "f32" else 1e-12
    for n in parts:
        part = model.run(ids[at:at + n], keep=whole.names, cache=cache)
        for name in whole.names:
            assert nmse(part[name], whole[name][at:at + n]) <= tolerance, (name, at)
        assert nmse(part.logits, whole.logits[at:at + n]) <= tolerance
        at += n


def test_patterns_while_decoding_count_what_the_cache_holds(model):
    """n_kv counts what the cache holds."""
    ids, cache = prompt(9), model.cache()
    model.run(ids[:6], cache=cache)
    part = model.run(ids[6:], cache=cache, keep=["kq", "kq_soft_max", "kqv"])
    whole = model.run(ids, keep=["kq", "kq_soft_max", "kqv"])
    assert part["kq-0"].shape == (4, 3, 9)
    for name in whole.names:
        np.testing.assert_allclose(part[name], whole[name][:, 6:], rtol=1e-5, atol=1e-6)


def test_a_prompt_does_not_see_the_future(model):
    a, b = prompt(12), prompt(12)
    b[8:] = prompt(12, seed=9)[8:]
    np.testing.assert_array_equal(model.run(a).logits[:8], model.run(b).logits[:8])


@pytest.mark.parametrize("numerics", ["f32", "ggml"])
@pytest.mark.parametrize("wtype", ["F32", "Q4_1"])
def test_start_in_the_middle(load, wtype, numerics):
    model, ids = load(numerics, wtype=wtype, n_layer=3), prompt(10)
    whole = model.run(ids, keep=["all"])
    for il in (1, 2, 3):
        part = model.run(ids, start=(il, whole[f"l_out-{il - 1}"]), keep=["result_norm"])
        np.testing.assert_array_equal(part.logits, whole.logits)
        np.testing.assert_array_equal(part["result_norm"], whole["result_norm"])
    part = model.run(ids, start=(0, whole["inp_embd"]))
    np.testing.assert_array_equal(part.logits, whole.logits)
    for bad in ((4, whole["l_out-0"]), (-1, whole["l_out-0"]), (1, whole["l_out-0"][:5]), (1, whole["ffn_up-0"])):
        with pytest.raises(tinymia.Error, match=r"it takes a layer up to 3 and \[10, 64\]"):
            model.run(ids, start=bad)
    with pytest.raises(tinymia.Error, match=r"l_out-0 .* never fired"):   # what lies before the start never fires
        model.run(ids, start=(2, whole["l_out-1"]), actions=[tinymia.Scale("l_out-0", 2.0)])


def test_last_row_of_logits(load):
    for wtype in ("F32", "Q4_0"):
        model = load(wtype=wtype)
        whole, last = model.run(prompt(20)), model.run(prompt(20), logits="last")
        assert whole.logits.shape == (20, 384) and last.logits.shape == (1, 384) and last.logits.dtype == np.float32
        assert nmse(last.logits, whole.logits[-1:]) <= 1e-12
    with pytest.raises(tinymia.Error, match="logits='first': it must be all or last"):
        model.run(prompt(3), logits="first")


def test_logits_are_the_last_tensor(model):
    run = model.run(prompt(5), keep=["result_output"])
    np.testing.assert_array_equal(run.logits, run["result_output"])


def test_the_same_every_time(load):
    for numerics in ("f32", "ggml"):
        model = load(numerics, wtype="Q4_0")
        a = tensors(model, prompt(33))
        b = tensors(model, prompt(33))
        assert all((a[k] == b[k]).all() for k in a)


def test_activations_far_from_one(tiny, load):
    """Weights that make a tensor 1e4 times larger or smaller: F16 scales and sums must not overflow quietly."""
    for wtype in ("F32", "Q4_0", "Q4_1"):
        for factor in (1e-3, 1e3):
            def spoil(name, x, factor=factor):
                return x * np.float32(factor) if name.endswith(("token_embd.weight", "ffn_gate.weight")) else x

            path = tiny(wtype=wtype, spoil=spoil, seed=int(factor))
            for numerics in ("f32", "ggml"):
                check(tinymia.load(path, 1, numerics), path, prompt(9), OP, 1e-9 if numerics == "f32" else 2e-3)


def test_prompts_that_do_not_fit(load):
    model = load(n_ctx=16)
    assert model.run(prompt(16)).logits.shape == (16, 384)
    for bad, says in ((prompt(17), "the prompt has 17 tokens; the context has room for 16"), ([], "has no tokens"),
                      *(([i], f"token id {i} is out of range: there are 384") for i in (384, -1, 2**40))):
        with pytest.raises(tinymia.Error, match=says):
            model.run(bad)
    cache = model.cache()
    model.run(prompt(10), cache=cache)
    with pytest.raises(tinymia.Error, match="16"):
        model.run(prompt(7), cache=cache)
    model.run(prompt(6), cache=cache)                                    # and the refusal left the cache as it was


def test_a_cache_of_another_model(load):
    """No kernel sees an array of another shape or type than it expects."""
    model = load()
    for how in (dict(n_layer=1), dict(n_head_kv=4), dict(n_embd=96, n_head=6),
                dict(d_head=24, d_head_v=40, n_head_kv=4)):
        other = load(**how)
        with pytest.raises(tinymia.Error, match="this cache was made by another model, or for other numerics"):
            model.run(prompt(3), cache=other.cache())
    with pytest.raises(tinymia.Error, match="for other numerics"):
        model.run(prompt(3), cache=load("f32").cache())


def test_a_cache_survives_a_failure(model):
    """An error in the middle of a pass leaves nothing that a later pass would read."""
    def fail(x, ctx):
        raise ZeroDivisionError("told by the test")

    cache = model.cache()
    model.run(prompt(5), cache=cache)
    for bad, kind, says in ((tinymia.Replace("l_out-0", fail), ZeroDivisionError, "^told by the test$"),
                            (tinymia.Scale("l_out-0", float("nan")), tinymia.Error, "the logits are not finite")):
        with pytest.raises(kind, match=says):
            model.run(prompt(9)[5:], cache=cache, actions=[bad])
        assert cache.n == 5
    got = model.run(prompt(5)[2:], cache=cache).logits
    np.testing.assert_allclose(got, model.run([*prompt(5), *prompt(5)[2:]]).logits[5:], rtol=1e-4, atol=1e-5)


def test_a_long_generation_grows_the_cache(load):
    """Capacity doubles on the way; what was stored before stays. With f32, bit for bit."""
    model = load("f32", n_ctx=512)
    cache, ids = model.cache(), prompt(200)
    rows = [model.run([i], cache=cache).logits[0] for i in ids]
    np.testing.assert_array_equal(np.stack(rows), model.run(ids).logits)


def test_a_long_generation_with_ggml_is_one_pass_up_to_rounding(load):
    """A last bit of a key or value can tip over a rounding step of the F16 cache, in llama.cpp as well."""
    model = load(n_ctx=512)
    cache, ids = model.cache(), prompt(200)
    rows = [model.run([i], cache=cache).logits[0] for i in ids]
    assert 0 < nmse(np.stack(rows), model.run(ids).logits) <= 1e-8
