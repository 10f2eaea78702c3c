"""Whatever declares architecture `llama`: a tiny random model with each family's metadata.

Each against naive.py in both numerics, and against llama.cpp where it is installed: tensor by tensor, and its ids.
Head counts keep the family's ratio, and everything that is not a width is the family's own.
"""
import naive
import numpy as np
import pytest
from bpe_vocab import metadata
from conftest import prompt
from naive import nmse
from tiny import vocabulary

import tinymia
import tinymia_kernels as kernels

YARN = {"type": "yarn", "factor": 16.0, "original_context_length": 256}


def bpe(pre, **more):
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'tinymia[bpe]'", exc_type=ImportError)
    return metadata(pre, **more)


def scaling(**keys):
    return {f"llama.rope.scaling.{k}": v for k, v in keys.items()}


def infill():
    """CodeLlama's vocabulary ends with pieces that part a prompt to be filled in."""
    tokens, scores, kinds = vocabulary(380)
    extra = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    return {"tokenizer.ggml.tokens": tokens + extra, "tokenizer.ggml.scores": scores + [-1000.0] * 4,
            "tokenizer.ggml.token_type": kinds + [1] * 4, "tokenizer.ggml.prefix_token_id": 380,
            "tokenizer.ggml.suffix_token_id": 381, "tokenizer.ggml.middle_token_id": 382,
            "tokenizer.ggml.eot_token_id": 383}


FAMILIES = {  # what tiny.write_gguf is told; `meta` may be a function, for what needs the tokenizers library
    "Llama 1": dict(n_head=8, n_head_kv=8, eps=1e-6, n_ctx=2048, meta={"llama.rope.freq_base": None}),
    "Llama 2": dict(n_head=8, n_head_kv=8, eps=1e-5, n_ctx=4096),
    "Llama 2 70B": dict(n_embd=128, n_head=16, n_head_kv=2, eps=1e-5, n_ctx=4096, n_ff=224),
    "Llama 2, yarn of 64k": dict(n_head=8, n_head_kv=8, n_ctx=4096,
                                 meta=scaling(**YARN) | {"llama.rope.scaling.finetuned": True}),
    "CodeLlama": dict(n_head=8, n_head_kv=8, n_ctx=16384, rope_base=1e6, meta=infill()),
    "CodeLlama 34B": dict(n_embd=128, n_head=16, n_head_kv=2, n_ctx=16384, rope_base=1e6),
    "Llama 3": dict(n_embd=128, n_head=8, n_head_kv=2, n_ctx=8192, rope_base=5e5, meta=lambda: bpe("llama-bpe")),
    "Llama 3.1": dict(n_embd=128, n_head=8, n_head_kv=2, n_ctx=131072, rope_base=5e5, rope_freqs=True,
                      meta=lambda: bpe("llama-bpe")),
    "Llama 3.2 1B": dict(n_embd=128, n_head=8, n_head_kv=2, d_head=16, d_head_v=16, n_ctx=131072, rope_base=5e5,
                         rope_freqs=True, tied=True, meta=lambda: bpe("llama-bpe")),
    "Llama 3.2 3B": dict(n_embd=96, n_head=6, n_head_kv=2, d_head=16, d_head_v=16, n_ctx=131072, rope_base=5e5,
                         rope_freqs=True, tied=True, meta=lambda: bpe("llama-bpe")),
    "Mistral 7B": dict(n_embd=128, n_head=8, n_head_kv=2, n_ff=448, n_ctx=32768, rope_base=1e4),
    "Mistral 7B v0.3": dict(n_embd=128, n_head=8, n_head_kv=2, n_ff=448, n_ctx=32768, rope_base=1e6),
    "Mistral Nemo": dict(n_embd=160, n_head=8, n_head_kv=2, d_head=16, d_head_v=16, n_ctx=131072, rope_base=1e6,
                         meta=lambda: bpe("tekken")),
    "TinyLlama": dict(n_embd=64, n_head=8, n_head_kv=1, n_ff=176, n_ctx=2048),
    "SmolLM2 135M": dict(n_embd=144, n_head=9, n_head_kv=3, n_ff=384, n_ctx=8192, rope_base=1e5, tied=True,
                         meta=lambda: bpe("smollm", add_bos_token=False)),
    "SmolLM2 1.7B": dict(n_head=8, n_head_kv=8, n_ff=256, n_ctx=8192, rope_base=130000.0, tied=True,
                         meta=lambda: bpe("smollm", add_bos_token=False)),
    "Yi": dict(n_embd=64, n_head=8, n_head_kv=1, n_ctx=4096, rope_base=5e6,
               meta={"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}),
    "DeepSeek Coder": dict(n_head=8, n_head_kv=8, n_ctx=16384, rope_base=1e5, eps=1e-6,
                           meta=lambda: bpe("deepseek-coder", add_bos_token=True)
                           | scaling(type="linear", factor=4.0)),
    "biases": dict(n_head=8, n_head_kv=2, bias=True, rope_base=1e6, n_ctx=32768),
    "old linear scaling": dict(meta={"llama.rope.scale_linear": 2.0}),
    "yarn, Llama 3's base": dict(n_embd=128, n_head=2, n_head_kv=1, rope_base=5e5, n_ctx=4096,
                                 meta=scaling(type="yarn", factor=4.0, original_context_length=1024)),
    "yarn with attn_factor": dict(n_embd=128, n_head=2, n_head_kv=1, n_ctx=4096,
                                  meta=scaling(type="yarn", factor=3.7, original_context_length=1000,
                                               attn_factor=0.7)),
    "yarn of the whole context": dict(n_ctx=300, meta=scaling(type="yarn", factor=4.0)),
    "yarn and rope_freqs": dict(rope_freqs=True, n_ctx=512, meta=scaling(type="yarn", factor=8.0)),
    "yarn by 1": dict(meta=scaling(type="yarn", factor=1.0)),
    "linear with attn_factor": dict(meta=scaling(type="linear", factor=4.0, attn_factor=1.25)),
    "no scaling": dict(meta=scaling(type="none", factor=4.0)),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    how = dict(FAMILIES[request.param])
    if callable(how.get("meta")):
        how["meta"] = how["meta"]()
    return how


# Bounds as in test_forward.py, with more room for angles: a yarn frequency is one more float32 product.
OP, WHOLE = 1e-11, {"f32": 1e-10, "ggml": 2e-7}


@pytest.mark.parametrize("numerics", ["f32", "ggml"])
def test_against_the_naive_pass(tiny, family, numerics):
    """Every tensor of 70 tokens: by itself, from the engine's own inputs to it, and from the tokens on."""
    path, ids = tiny(**family), prompt(70)
    model, m = tinymia.load(path, threads=1, numerics=numerics), naive.read(path)
    run = model.run(ids, keep=["all"])
    got = {n: run[n] for n in run.names}
    for limit, want in ((OP, naive.forward(m, ids, numerics, given=got)),
                        (WHOLE[numerics], naive.forward(m, ids, numerics))):
        errors = {n: nmse(got[n], want[n]) for n in got}
        name = max(errors, key=errors.get)
        assert set(got) == set(want) and errors[name] <= limit, f"{name}: {errors[name]:.2g}"


@pytest.mark.parametrize("wtype", ["F32", "Q8_0"])
def test_tensors_and_ids_are_those_of_llama_cpp(tiny, family, wtype):
    """Every tensor of 40 tokens, and the ids of a text."""
    import test_llama  # skips where there is no llama.cpp

    path = tiny(wtype=wtype, **family)
    test_llama.check(path, prompt(40), wtype, bias=family.get("bias", False))
    model = tinymia.load(path, threads=1)
    for text in ("the quick brown fox", "France -> Paris, 123 4567!", " ▁<PRE> the▁<EOT>", ""):
        assert model.tokenize(text) == test_llama.llama_tensors.tokenize(path, text), repr(text)


@pytest.mark.parametrize("how", [
    dict(type="yarn", factor=32.0, original_context_length=128), dict(type="yarn", factor=0.5),
    dict(type="yarn", factor=16.0, original_context_length=4096, attn_factor=1.3), dict(type="linear", factor=4.0),
    dict(type="linear", factor=4.0, attn_factor=1.25),
], ids=str)
@pytest.mark.parametrize("rope_base, d_head", [(1e4, 64), (5e5, 128)])
def test_angles_are_ggmls_bit_for_bit(tiny, how, rope_base, d_head):
    """200 positions: Q and K turned, from the same inputs, are the same bytes as llama.cpp's."""
    import test_llama

    path = tiny(n_embd=d_head, n_head=1, n_head_kv=1, n_layer=1, n_ctx=2048, rope_base=rope_base, meta=scaling(**how))
    ids = prompt(200)
    find = test_llama.theirs(path, ids)[0]
    pre = ["Qcur_pre-0", "Kcur_pre-0"]
    shape = (200, 1, d_head)
    run = tinymia.load(path, threads=1).run(ids, keep=["Qcur-0", "Kcur-0"],
                                            actions=[tinymia.Patch(n, find(n).reshape(shape)) for n in pre])
    for name in ("Qcur-0", "Kcur-0"):
        assert run[name].tobytes() == find(name).tobytes(), name


def test_yarn_by_its_definition(tiny):
    """Worked by hand: d_head 64, base 10000, factor 4, 1024 positions trained for.

    Pair i turns 1024 / (2 pi 10000^(i/32)) times there: 32 times at i = 5.65, once at i = 17.7, so pairs up to 5 keep
    their angle, pairs from 18 on have a quarter of it, and pair 10 is 5/13 of the way.  Lengths grow by 1 + 0.1 ln 4.
    """
    c = tinymia.load(tiny(n_embd=64, n_head=1, n_head_kv=1, n_layer=1, meta=scaling(
        type="yarn", factor=4.0, original_context_length=1024))).config.ropes[0]
    assert c.yarn == (5, 18) and c.scale == 0.25 and abs(c.gain - (1 + 0.1 * np.log(4))) < 1e-6
    cos, sin = kernels.rope_angles(np.array([7]), c.n_rot, c.base, c.scale, c.gain, c.yarn, None, "f32")
    angle = np.arctan2(sin, cos)[0]
    turns = 7 * 10000.0 ** (-np.arange(32) / 32)
    share = 5 / 13
    for i, want in ((0, turns[0] - 2 * np.pi), (5, turns[5]), (10, turns[10] * (1 - share + share / 4)),
                    (18, turns[18] / 4), (31, turns[31] / 4)):
        assert abs(angle[i] - want) < 1e-6, i
    assert np.allclose(np.hypot(cos, sin), c.gain, rtol=1e-6)


def test_infill_tokens_of_code_llama(tiny):
    """The metadata name them; if not, their text does, and then they are control tokens, as in llama.cpp."""
    model = tinymia.load(tiny(meta=infill()))
    assert model.tokenizer.end == {2, 383} and 380 not in model.tokenize("the▁<PRE>fox")
    unnamed = {k: None if k.endswith(("fix_token_id", "dle_token_id")) else v for k, v in infill().items()}
    model = tinymia.load(tiny(meta=unnamed))
    assert 380 in model.tokenize("the▁<PRE>fox") and model.detokenize([380, 381, 382]) == ""


def test_user_defined_pieces_are_always_recognised(tiny):
    """This holds with and without special tokens; the longest piece comes first, as in llama.cpp."""
    import test_llama

    tokens, _, kinds = vocabulary(384)
    kinds = [4 if t in ("the", "▁fox", "qu") else k for t, k in zip(tokens, kinds, strict=True)]
    assert kinds.count(4) >= 1
    path = tiny(meta={"tokenizer.ggml.token_type": kinds})
    model = tinymia.load(path, threads=1)
    for text in ("the quick fox", "thethe foxthe", " then ▁fox</s>the"):
        for special in (True, False):
            want = test_llama.llama_tensors.tokenize(path, text, special=special)
            assert model.tokenize(text, special=special) == want, (text, special)


@pytest.mark.parametrize("keys, words", [
    (dict(type="longrope"), ["longrope", "none, linear, yarn"]), (dict(type="yarn", factor=1e-6), ["factor", "1e-06"]),
    (dict(type="yarn", factor=1e9), ["factor"]), (dict(type="yarn", original_context_length=0), ["original_context"]),
    (dict(type="yarn", attn_factor=-1.0), ["attn_factor"]),
    (dict(type="yarn", attn_factor=float("nan")), ["attn_factor"]),
    (dict(type="yarn", factor=float("nan")), ["factor"]),
], ids=str)
def test_scaling_that_cannot_be_meant(tiny, keys, words):
    path = tiny(meta=scaling(**keys))
    with pytest.raises(tinymia.GGUFError) as e:
        tinymia.load(path)
    assert path in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    with pytest.raises(tinymia.GGUFError, match="base"):
        tinymia.load(tiny(rope_base=1.0, meta=scaling(type="yarn", factor=2.0)))
