"""Files with more or other things in them than a Llama model needs: computed as they mean, or refused by name.

The judge is llama.cpp. What it does with each file stands here as a verdict, and is asked of it again where it is
installed: in a child process, for it may abort.
"""
import functools

import numpy as np
import pytest
from conftest import shared
from forked import in_child
from naive import nmse
from rawgguf import Info, Raw
from tiny import write_gguf

import tinymia

IDS = [1, 300, 310, 320, 330]
SAME, OTHER = "the same numbers as without it", "other numbers"     # the verdicts; words: refused, and they are named
PIECES = "tokenizer.ggml."


def add(raw, name, dims, numbers, kind=0):
    """Put one more tensor into a file; F32 unless the bytes come ready."""
    g = raw.copy()
    data = numbers if isinstance(numbers, bytes) else np.asarray(numbers, np.float32).tobytes()
    g.data += bytes(-len(g.data) % 32)
    g.tensors.append(Info(name, dims, kind, len(g.data)))
    g.data += data + bytes(-len(data) % 32)
    return g


def without(raw, *names):
    """Take tensors out of a file, and close the gaps: llama.cpp refuses files that have some."""
    g = raw.copy()
    ends = [*sorted(t.offset for t in g.tensors)[1:], len(g.data)]
    size = dict(zip(sorted(t.offset for t in g.tensors), ends, strict=True))
    g.tensors, g.data = [], b""
    for t in raw.tensors:
        if t.name not in names:
            g = add(g, t.name, t.dims, raw.data[t.offset:size[t.offset]], t.kind)
    return g


def tensor(name, dims, numbers, kind=0):
    return lambda g: add(g, name, dims, numbers, kind)


def key(name, kind, value):
    return lambda g: g.set(f"llama.{name}", kind, value)


def shape(name, *dims):
    return lambda g: g.tensor(name, dims=dims)


def metadata(raw, name):
    return next(v for k, _, v in raw.kv if k == PIECES + name)[1]


def pieces(g, more):
    """One token fewer or more than rows of the embedding."""
    n = 384 + more
    for name, kind, value in (("tokens", 8, "zzz"), ("token_type", 5, 1), ("scores", 6, -1.0)):
        g = g.set(PIECES + name, 9, (kind, [*metadata(g, name), value][:n]))
    return g


ONES, F16 = np.ones(64), np.full(64, 1.0, np.float16)
FILES = {  # what is done to a model of two layers: the verdict
    # scales
    **{f"scale of {n}": (tensor(f"blk.1.{n}.scale", (1,), [3]), OTHER) for n in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")},
    "scale of 1": (tensor("blk.0.attn_q.scale", (1,), [1]), SAME),
    "scale [1, 1]": (tensor("blk.0.attn_q.scale", (1, 1), [3]), OTHER),
    "scale [2]": (tensor("blk.0.attn_q.scale", (2,), [3, 3]), ["blk.0.attn_q.scale", "[2]"]),
    "scale of a norm": (tensor("blk.0.attn_norm.scale", (1,), [3]), ["blk.0.attn_norm.scale"]),
    "scale of the embedding": (tensor("token_embd.scale", (1,), [3]), ["token_embd.scale"]),
    "scale of an F32 output": (tensor("output.scale", (1,), [3]), ["output.scale"]),
    "weight.scale": (tensor("blk.0.attn_q.weight.scale", (1,), [3]),
                     ["attn_q.weight.scale", "called blk.0.attn_q.scale"]),
    "weight_scale": (tensor("blk.0.attn_q.weight_scale", (1,), [3]), ["blk.0.attn_q.weight_scale"]),
    "weight_scale_2": (tensor("blk.0.attn_q.weight_scale_2", (1,), [3]), ["blk.0.attn_q.weight_scale_2"]),
    "input_scale": (tensor("blk.0.attn_q.input_scale", (1,), [3]), SAME),
    "input_scale [2]": (tensor("blk.0.attn_q.input_scale", (2,), [3, 3]), ["blk.0.attn_q.input_scale"]),
    "input_scale of an F32 output": (tensor("output.input_scale", (1,), [3]), ["output.input_scale"]),
    "input_scale of no layer": (tensor("blk.7.attn_q.input_scale", (1,), [3]), ["blk.7.attn_q.input_scale"]),
    # tensors of other models
    **{name: (tensor(name, (n,), np.ones(n)), [name]) for name, n in {
        "blk.0.attn_q_norm.weight": 16, "blk.0.attn_k_norm.weight": 16, "blk.0.attn_norm.bias": 64,
        "blk.1.ffn_norm.bias": 64, "output_norm.bias": 64, "blk.0.post_attention_norm.weight": 64,
        "blk.0.post_ffw_norm.weight": 64, "blk.0.attn_sub_norm.weight": 64, "blk.0.attn_sinks.weight": 4,
        "token_embd_norm.weight": 64, "token_embd_norm.bias": 64, "rope_factors_long.weight": 8,
        "rope_factors_short.weight": 8, "blk.0.rope_freqs.weight": 8, "blk.0.layer_output_scale.weight": 1,
        "cls.bias": 2, "evil": 8}.items()},
    "fused q, k and v": (tensor("blk.0.attn_qkv.weight", (64, 128), np.ones((128, 64))), ["blk.0.attn_qkv.weight"]),
    "an expert's router": (tensor("blk.0.ffn_gate_inp.weight", (64, 8), np.ones((8, 64))), ["ffn_gate_inp"]),
    "a shared expert": (tensor("blk.0.ffn_up_shexp.weight", (64, 8), np.ones((8, 64))), ["ffn_up_shexp"]),
    "a third layer in the file": (tensor("blk.2.attn_norm.weight", (64,), ONES), ["blk.2.attn_norm", "2 layers"]),
    "fewer layers than the file": (key("block_count", 4, 1), ["blk.1.", "layer 1", "1 layers"]),
    "more layers than the file": (key("block_count", 4, 3), ["blk.2.", "missing"]),
    # tensors of this one
    "rope_freqs": (tensor("rope_freqs.weight", (8,), np.arange(1, 9)), OTHER),
    "bias of q": (tensor("blk.0.attn_q.bias", (64,), ONES), OTHER),
    "bias of q [64, 1]": (tensor("blk.0.attn_q.bias", (64, 1), ONES), OTHER),
    "bias of q [1, 64]": (tensor("blk.0.attn_q.bias", (1, 64), ONES), ["blk.0.attn_q.bias"]),
    "bias of q too short": (tensor("blk.0.attn_q.bias", (32,), ONES[:32]), ["blk.0.attn_q.bias"]),
    "biases of the FFN": (lambda g: add(add(g, "blk.0.ffn_up.bias", (96,), np.ones(96)),
                                        "blk.1.ffn_down.bias", (64,), ONES), OTHER),
    "scale and bias of q": (lambda g: add(add(g, "blk.0.attn_q.bias", (64,), ONES),
                                          "blk.0.attn_q.scale", (1,), [3]), OTHER),
    "scale and bias of ffn_up": (lambda g: add(add(g, "blk.0.ffn_up.bias", (96,), np.ones(96)),
                                               "blk.0.ffn_up.scale", (1,), [3]), OTHER),
    "norm [64, 1]": (shape("blk.0.attn_norm.weight", 64, 1), SAME),
    "norm [1, 64]": (shape("blk.0.attn_norm.weight", 1, 64), ["blk.0.attn_norm.weight"]),
    "output norm [64, 1, 1, 1]": (shape("output_norm.weight", 64, 1, 1, 1), SAME),
    "embedding [64, 384, 1]": (shape("token_embd.weight", 64, 384, 1), SAME),
    "q [64, 64, 1]": (shape("blk.0.attn_q.weight", 64, 64, 1), SAME),
    "q [64, 1, 64]": (shape("blk.0.attn_q.weight", 64, 1, 64), ["blk.0.attn_q.weight"]),
    # one value or one for each layer
    **{f"{n} {values}": (key(n, 9, (kind, values)), verdict) for n, kind, values, verdict in (
        ("attention.head_count", 4, [4, 4], SAME), ("attention.head_count_kv", 4, [2, 2], SAME),
        ("attention.head_count_kv", 5, [2, 2], SAME), ("feed_forward_length", 4, [96, 96], SAME),
        ("attention.head_count_kv", 4, [2, 2, 2], ["head_count_kv", "3", "2 layers"]),
        ("attention.head_count_kv", 4, [2], ["head_count_kv", "1", "2 layers"]),
        ("attention.head_count", 4, [4], ["head_count"]), ("feed_forward_length", 4, [96], ["feed_forward_length"]),
        ("attention.head_count_kv", 4, [2, 1], ["head_count_kv", "[2, 1]"]),
        ("attention.head_count_kv", 6, [2.0, 2.0], ["head_count_kv"]),
        ("embedding_length", 4, [64, 64], ["embedding_length"]),
        ("expert_used_count", 4, [0, 0], SAME), ("expert_used_count", 4, [1, 1], ["expert_used_count is [1, 1]"]),
        ("expert_used_count", 4, [0], ["expert_used_count"]), ("expert_count", 4, [0, 0], ["expert_count is [0, 0]"]),
        ("context_length", 4, [512, 512], ["context_length"]), ("block_count", 4, [2, 2], ["block_count"]),
        ("attention.layer_norm_rms_epsilon", 6, [1e-5, 1e-5], ["epsilon"]))},
    # keys that change the result
    "causal": (key("attention.causal", 7, True), SAME),
    "causal 0": (key("attention.causal", 4, 0), ["llama.attention.causal"]),
    **{f"{n} {value}": (key(n, 4, value), verdict) for n, value, verdict in (
        ("expert_count", 0, SAME), ("expert_count", 2, ["expert_count"]),
        ("expert_used_count", 2, ["expert_used_count"]),
        ("expert_group_count", 2, ["expert_group_count"]), ("nextn_predict_layers", 0, SAME),
        ("rope.dimension_count", 0, ["a whole number of at least 2"]), ("rope.dimension_count", 32, ["at most 16"]),
        ("feed_forward_length", 97, ["ffn_gate", "96", "97"]), ("attention.key_length", 8, ["rope.dimension_count"]),
        ("attention.value_length", 8, ["attn_v", "32", "16"]), ("block_count", 0, ["block_count"]),
        ("nextn_predict_layers", 1, ["nextn_predict_layers"]))},
    "no epsilon": (lambda g: g.drop("llama.attention.layer_norm_rms_epsilon"), ["epsilon", "missing"]),
    "epsilon 0": (key("attention.layer_norm_rms_epsilon", 6, 0.0), OTHER),
    "epsilon below 0": (key("attention.layer_norm_rms_epsilon", 6, -1e-5), ["epsilon", "a number of at least 0"]),
    "no frequency base": (lambda g: g.drop("llama.rope.freq_base"), SAME),
    "causal as a text": (key("attention.causal", 8, "false"), ["llama.attention.causal is 'false'"]),
    "causal by layer": (key("attention.causal", 9, (7, [True, False])), ["llama.attention.causal is [True, False]"]),
    "rope.scale_linear": (key("rope.scale_linear", 6, 4.0), OTHER),
    "rope.scaling.factor": (key("rope.scaling.factor", 6, 4.0), OTHER),
    "rope.scaling.attn_factor": (key("rope.scaling.attn_factor", 6, 2.0), OTHER),
    # keys that read as if they did
    **{n: (key(n, *value), SAME) for n, value in {
        "attention.scale": (6, 0.5), "attention.clamp_kqv": (6, 0.1), "logit_scale": (6, 0.5),
        "residual_scale": (6, 0.5), "embedding_scale": (6, 0.5),
        "final_logit_softcapping": (6, 5.0), "attn_logit_softcapping": (6, 5.0),
        "attention.sliding_window": (4, 2), "attention.sliding_window_pattern": (4, 2),
        "attention.max_alibi_bias": (6, 8.0), "attention.temperature_scale": (6, 0.5), "pooling_type": (4, 1),
        "embedding_length_out": (4, 32), "use_parallel_residual": (7, True), "attention.layer_norm_epsilon": (6, 0.5),
        "rope.scaling.alpha": (6, 2.0), "rope.scaling.yarn_beta_fast": (6, 2.0),
        "rope.dimension_sections": (9, (5, [4] * 4)), "attention.key_length_swa": (4, 8),
        "rope.freq_base_swa": (6, 5.0), "vocab_size": (4, 17),
        "expert_weights_scale": (6, 2.0), "expert_group_used_count": (4, 2), "swin_norm": (7, True),
        "classifier.output_labels": (9, (8, ["a", "b"])), "no_such_key": (4, 3)}.items()},
    # other kinds of file with the tensors of this one beside theirs
    "a LoRA adapter's": (tensor("blk.0.attn_q.weight.lora_a", (64, 4), np.ones(256)), ["attn_q.weight.lora_a"]),
    "an importance matrix's": (tensor("blk.0.attn_q.weight.in_sum2", (64,), ONES), ["attn_q.weight.in_sum2"]),
    "an image encoder's": (tensor("v.patch_embd.weight", (64,), ONES), ["v.patch_embd.weight"]),
    "a layer written 00": (tensor("blk.00.attn_q.scale", (1,), [3]), ["blk.00.attn_q.scale"]),
    "a layer of -1": (tensor("blk.-1.attn_q.scale", (1,), [3]), ["blk.-1.attn_q.scale"]),
    "an empty name": (tensor("", (4,), np.ones(4)), ["tensor without a name"]),
    "the embedding's bias": (tensor("token_embd.bias", (64,), ONES), ["token_embd.bias"]),
    "the output without its matrix": (lambda g: add(without(g, "output.weight"), "output.bias", (384,), np.ones(384)),
                                      ["output.bias"]),
    "the last norm's scale": (tensor("output_norm.scale", (1,), [2]), ["output_norm.scale"]),
    "rope_freqs too short": (tensor("rope_freqs.weight", (4,), np.ones(4)), ["rope_freqs.weight"]),
    "no last norm": (lambda g: without(g, "output_norm.weight"), ["output_norm.weight", "missing"]),
    "tokens never to be chosen": (lambda g: g.set(PIECES + "suppress_tokens", 9, (5, [3, 4])), SAME),
    # vocabularies that do not fit
    "a token fewer": (lambda g: pieces(g, -1), ["token_embd.weight", "384", "383"]),
    "a token more": (lambda g: pieces(g, 1), ["token_embd.weight", "384", "385"]),
    "types and scores to spare": (lambda g: g.set(PIECES + "token_type", 9, (5, [*metadata(g, "token_type"), 1]))
                                  .set(PIECES + "scores", 9, (6, [*metadata(g, "scores"), 1.0])), SAME),
    "scores that are whole": (lambda g: g.set(PIECES + "scores", 9, (5, list(map(int, metadata(g, "scores"))))), SAME),
    "bos 4294967295": (lambda g: g.set(PIECES + "bos_token_id", 4, 2**32 - 1), SAME),
    "bos -1": (lambda g: g.set(PIECES + "bos_token_id", 5, -1), ["bos_token_id", "-1"]),
}

# What is refused there and runs here, since it can mean one thing only.
LOOSER = {
    "attn_rot_embd": (tensor("blk.0.attn_rot_embd.weight", (8,), np.ones(8)), SAME),   # files/unused.py says why
    "output.bias": (tensor("output.bias", (384,), np.ones(384)), OTHER),
    "a bias in F16": (tensor("blk.0.attn_q.bias", (64,), F16.tobytes(), 1), OTHER),
    "a norm in F16": (lambda g: add(without(g, "blk.0.attn_norm.weight"),
                                    "blk.0.attn_norm.weight", (64,), F16.tobytes(), 1), OTHER),
    "a length of 64 bits": (key("context_length", 10, 512), SAME),
    "head counts of 8 bits": (key("attention.head_count_kv", 9, (0, [2, 2])), SAME),
    "bos as int32": (lambda g: g.set(PIECES + "bos_token_id", 5, 1), SAME),
    "heads turned in part": (key("rope.dimension_count", 4, 8), OTHER),
}
# What runs there and is refused here: a cache, and all that reuses one, relies on a token not seeing those after it.
STRICTER = {"not causal": (key("attention.causal", 7, False), ["llama.attention.causal", "False"])}
OURS = FILES | LOOSER | STRICTER


@pytest.fixture(scope="module")
def raw(tiny):
    return Raw.read(tiny())


def refused(path, *words):
    with pytest.raises(tinymia.GGUFError) as e:
        tinymia.load(path)
    text = str(e.value)
    assert text.isprintable() and path in text and all(w in text for w in words), text


@pytest.mark.parametrize("name", OURS)
def test_computed_as_it_means_or_refused_by_name(raw, model, tmp_path, name):
    change, verdict = OURS[name]
    path = change(raw).write(tmp_path / "f.gguf")
    if isinstance(verdict, list):
        return refused(path, *verdict)
    logits = tinymia.load(path, threads=1).run(IDS).logits
    assert np.array_equal(logits, model.run(IDS).logits) == (verdict == SAME)


@pytest.mark.parametrize("numerics", ["ggml", "f32", "plain"])
@pytest.mark.parametrize("wtype", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"])
def test_a_scale_of_2_is_a_weight_twice_as_large(tiny, tmp_path, name, wtype, numerics):
    """To the bit, for doubling is exact; with a bias, which attention adds after it and the FFN before it."""
    def double(tensor, x):
        twice = (f"blk.1.{name}.weight", *[f"blk.1.{name}.bias"] * name.startswith("ffn"))
        return 2 * x if tensor in twice else x

    path = tiny(wtype=wtype, bias=True, n_ff=128)
    scaled = add(Raw.read(path), f"blk.1.{name}.scale", (1,), [2]).write(tmp_path / "s.gguf")
    want = write_gguf(tmp_path / "w.gguf", wtype=wtype, bias=True, n_ff=128, spoil=double)
    scaled, want = (tinymia.load(path, threads=1, numerics=numerics) for path in (scaled, want))
    assert np.array_equal(scaled.run(IDS).logits, want.run(IDS).logits)
    weight = f"blk.1.{name}.weight"
    assert np.array_equal(scaled.weights[weight].numpy(), want.weights[weight].numpy())
    rows = np.array([3, 5])
    assert np.array_equal(scaled.rows(scaled.weights[weight], rows), want.rows(want.weights[weight], rows))


def nvfp4(raw, name, scale=None):
    """The weight as random NVFP4 blocks, with a scale where one is given."""
    info, rng = raw.where(name + ".weight"), np.random.default_rng(3)
    n_in, n_out = info.dims
    blocks = rng.integers(0, 256, (n_out, n_in // 64, 36), np.uint8)
    blocks[..., :4] = rng.integers(0x28, 0x40, blocks[..., :4].shape)                # scales of 0.25 to 2
    g = add(without(raw, info.name), info.name, info.dims, blocks.tobytes(), 40)
    return g if scale is None else add(g, name + ".scale", (1,), [scale])


NVFP4 = {
    "q": (lambda g: nvfp4(g, "blk.0.attn_q", 0.02), OTHER),
    "output": (lambda g: nvfp4(g, "output", 0.02), OTHER),
    "output and its input_scale": (lambda g: add(nvfp4(g, "output", 0.02), "output.input_scale", (1,), [5]), OTHER),
    "tied output with a scale": (lambda g: add(without(nvfp4(g, "token_embd"), "output.weight"),
                                               "output.scale", (1,), [2]),
                                 ["output.scale"]),
    "ffn with a bias and a scale": (lambda g: add(nvfp4(g, "blk.0.ffn_up", 0.02),
                                                  "blk.0.ffn_up.bias", (96,), np.ones(96)),
                                    ["blk.0.ffn_up.scale", "blk.0.ffn_up.bias"]),
}


@pytest.mark.parametrize("name", NVFP4)
def test_scales_of_nvfp4_are_judged_as_by_llama_cpp(raw, tmp_path, name):
    change, verdict = NVFP4[name]
    path = change(raw).write(tmp_path / "f.gguf")
    if verdict != OTHER:
        return refused(path, *verdict)
    weight = name.split()[0].replace("q", "blk.0.attn_q") + ".weight"
    model, g = tinymia.load(path, threads=1), Raw.read(path)
    plain = tinymia.load(g.drop(weight.replace("weight", "scale"), weight.replace("weight", "input_scale"))
                         .write(tmp_path / "g.gguf"), threads=1)
    want, kept = np.float32(0.02), "Qcur_pre-0" if "attn_q" in weight else "result_output"
    got = [m.run(IDS, keep=[kept])[kept] for m in (model, plain)]
    assert np.array_equal(got[0], got[1] * want)


def test_unknown_keys_are_named_once(raw, tmp_path, capsys):
    """On stderr, because they may be meant to change something; a key that llama.cpp reads for no Llama is not told."""
    tinymia.load(key("no_such_key", 4, 3)(raw).write(tmp_path / "f.gguf"))
    assert "llama.no_such_key" in capsys.readouterr().err
    tinymia.load(raw.set(PIECES + "suppress_tokens", 9, (5, [3])).write(tmp_path / "f.gguf"))
    assert "suppress_tokens changes nothing here" in capsys.readouterr().err
    tinymia.load(key("attention.sliding_window", 4, 3)(raw).write(tmp_path / "f.gguf"))
    assert capsys.readouterr().err == ""


ODD = {"bos_minus1": True, "causal_false": False, "dropped_types": True, "escname": False, "extra_qnorm": False,
       "layers_fewer": False, "nobosid": True, "nvfp4_scaled": True}


@pytest.mark.parametrize("name", ODD)
def test_every_odd_file_is_read_or_refused(name):
    path = shared(f"odd-files/{name}.gguf")
    if not ODD[name]:
        return refused(path)
    model = tinymia.load(path, threads=1)
    assert model.tokenize("Once upon a time") == [1, 403, 407, 261, 378]
    assert model.generate("Once upon a time", n=12).text == ", there was a little girl named Lily. She"


# ------------------------------------------------------------------------------- llama.cpp, live


@functools.cache
def llama():
    import test_llama  # skips where there is no llama.cpp

    return test_llama.llama_tensors


def theirs(path, ids):
    """llama.cpp's logits, or None where it does not load the file or gives up on it."""
    capture = llama().capture
    done = in_child(lambda: capture(path, ids, want=lambda name: False)[1], timeout=60)
    assert done.kind != "hang"
    return done.value if done.kind == "ok" else None


@pytest.mark.parametrize("name", FILES | {f"nvfp4 {n}": c for n, c in NVFP4.items()})
def test_llama_cpp_says_the_same(raw, tmp_path, name):
    change, verdict = FILES[name] if name in FILES else NVFP4[name.removeprefix("nvfp4 ")]
    path = change(raw).write(tmp_path / "f.gguf")
    logits = theirs(path, IDS)
    assert (logits is None) == isinstance(verdict, list)
    if logits is not None:
        assert nmse(tinymia.load(path, threads=1).run(IDS).logits, logits) <= 1e-12


@pytest.mark.parametrize("name", LOOSER)
def test_llama_cpp_refuses_more(raw, tmp_path, name):
    assert theirs(LOOSER[name][0](raw).write(tmp_path / "f.gguf"), IDS) is None


@pytest.mark.parametrize("name", ODD)
def test_llama_cpp_on_odd_files(name):
    path = shared(f"odd-files/{name}.gguf")
    ids = [1, 403, 407, 261, 378]
    logits = theirs(path, ids)
    assert (logits is not None) == (ODD[name] or name == "causal_false")
    if ODD[name]:
        assert nmse(tinymia.load(path, threads=1).run(ids).logits, logits) <= 1e-12
