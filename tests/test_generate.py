"""Generation and sampling: greedy, the filters against slow ones, seeds, and every way to stop."""
import math
from collections import Counter

import numpy as np
import pytest
from conftest import prompt

import tinymia
from tinymia import Replace

IDS = prompt(6)


def greedy(model, ids, n):
    """Slow: the whole prompt again for every token."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(model.run(ids, logits="last").logits[0].argmax()))
    return ids[-n:]


def choosing(tokens):
    """An action that makes the model choose these tokens, one after another."""
    wanted = iter(tokens)

    def force(x, ctx):
        x[-1] = -1
        x[-1, next(wanted)] = 9
        return x

    return [Replace("result_output", force, when="all")]


@pytest.mark.parametrize("numerics", ["ggml", "f32"])
@pytest.mark.parametrize("wtype", ["F32", "F16", "Q4_0"])
def test_greedy(load, wtype, numerics):
    model = load(numerics, wtype=wtype)
    gen = model.generate(IDS, n=10)
    want = greedy(model, IDS, 10)
    if 2 in want:
        want = want[:want.index(2) + 1]
    assert gen.tokens == want and gen.prompt_tokens == IDS and gen.stop_reason in ("length", "eos")
    assert gen.text == model.detokenize([t for t in gen.tokens if t != 2])


def test_text_or_ids(model):
    a, b = model.generate("the quick", n=5), model.generate(model.tokenize("the quick"), n=5)
    assert a.tokens == b.tokens and a.text == b.text and a.prompt_tokens == b.prompt_tokens


def test_nothing_to_generate(model):
    gen = model.generate(IDS, n=0)
    assert (gen.text, gen.tokens, gen.stop_reason) == ("", [], "length")


def test_stories_260k(stories):
    """A real model: the first words of its story, as every engine tells it."""
    model = tinymia.load(stories, threads=1)
    gen = model.generate("Once upon a time", n=32)
    assert gen.text.startswith(", there was a little girl named Lily."), gen.text
    assert gen.prompt_tokens[0] == 1 and gen.stop_reason == "length"


# ------------------------------------------------------------------------------------------------ ways to stop


def test_end_token(model):
    for n in (3, 9):
        gen = model.generate(IDS, n=n, actions=choosing([300, 301, 2, 302, 303]))
        assert gen.tokens == [300, 301, 2] and gen.stop_reason == "eos" and gen.text == model.detokenize([300, 301])


def test_stop_texts(model):
    ids = model.tokenize("the quick brown fox jumps over", bos=False)
    text = model.detokenize(ids)
    for stop in (["fox"], ["never", "fox"], [" fox jumps", "nothing"], ["k brown"]):
        heard = []
        gen = model.generate([1], n=len(ids), stop=stop, actions=choosing(ids), on_text=heard.append)
        first = min(text.find(s) for s in stop if s in text)
        assert gen.text == text[:first] == "".join(heard) and gen.stop_reason == "stop"
    gen = model.generate([1], n=len(ids), stop=["fox hunt", "over the"], actions=choosing(ids),
                         on_text=(heard := []).append)
    assert gen.text == text == "".join(heard) and gen.stop_reason == "length"  # a start of a stop text is not lost
    with pytest.raises(tinymia.Error):
        model.generate(IDS, n=3, stop=[""])


def test_stop_text_across_tokens(model):
    """Bytes of one character and pieces of one word: a stop text is found wherever the tokens are cut."""
    ids = [3 + b for b in "ab→cd".encode()]
    for stop in ("→", "b→c", "cd"):
        gen = model.generate([1], n=len(ids), stop=[stop], actions=choosing(ids))
        assert gen.text == "ab→cd"[:"ab→cd".index(stop)] and gen.stop_reason == "stop"


def test_the_contexts_end(load):
    """n_ctx positions and one more token, which nobody has to read."""
    model = load(n_ctx=16)
    gen = model.generate(prompt(12), n=50, actions=choosing([300] * 50))
    assert gen.stop_reason == "context" and len(gen.tokens) in (4, 5)
    assert model.generate(prompt(12), n=4, actions=choosing([300] * 4)).stop_reason == "length"
    assert len(model.generate(prompt(16), n=3, actions=choosing([300] * 3)).tokens) <= 1
    with pytest.raises(tinymia.Error, match="16"):
        model.generate(prompt(17), n=3)


def test_ctrl_c(model):
    calls = []

    def press(text):
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt

    gen = model.generate(IDS, n=50, actions=choosing([300] * 50), on_text=press)
    assert gen.stop_reason == "interrupted" and 2 <= len(gen.tokens) <= 4


def test_streamed_text_is_the_text(load):
    for seed in range(3):
        model, heard = load(), []
        gen = model.generate(prompt(4, seed=seed), n=25, temp=1.5, seed=seed, on_text=heard.append)
        assert "".join(heard) == gen.text and all(heard)


# ------------------------------------------------------------------------------------------------ sampling


def probabilities(logits, temp=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Slow and by the definitions: the probability of each token after the filters, then the temperature."""
    n = len(logits)
    order = sorted(range(n), key=lambda i: -logits[i])[:top_k or n]
    z = math.fsum(math.exp(logits[i]) for i in order)
    p = {i: math.exp(logits[i]) / z for i in order}
    kept, total = [], 0.0
    for i in order:
        if total < top_p:
            kept.append(i)
        total += p[i]
    kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
    e = {i: math.exp(logits[i] / temp - logits[order[0]] / temp) for i in kept}
    return {i: v / math.fsum(e.values()) for i, v in e.items()}


LOGITS = np.array([1.0, 3.0, 2.0, -1.0, 2.5, 0.0, -5.0, 1.5], np.float32)


@pytest.mark.parametrize("how", [dict(temp=1.0), dict(temp=0.5), dict(temp=2.0), dict(temp=1.0, top_k=1),
                                 dict(temp=1.0, top_k=3),
                                 dict(temp=1.0, top_p=0.5), dict(temp=1.0, top_p=0.9), dict(temp=1.0, top_p=1e-9),
                                 dict(temp=1.0, min_p=0.2),
                                 dict(temp=1.0, min_p=1.0), dict(temp=0.7, top_k=5, top_p=0.8, min_p=0.1),
                                 dict(temp=1.0, top_k=100)], ids=str)
def test_distribution(how):
    want = probabilities(LOGITS.astype(float), **how)
    sampler, n = tinymia.Sampler(seed=1, **how), 4000
    seen = Counter(sampler.sample(LOGITS) for _ in range(n))
    assert set(seen) <= set(want)
    for i, p in want.items():
        assert abs(seen[i] / n - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-9, (i, p, seen[i] / n)


def test_temperature_zero_is_greedy_whatever_else(model):
    assert model.generate(IDS, n=6, temp=0.0, top_k=3, top_p=0.5, seed=3).tokens == model.generate(IDS, n=6).tokens
    assert model.generate(IDS, n=6, temp=2.0, top_k=1, seed=3).tokens == model.generate(IDS, n=6).tokens
    assert tinymia.Sampler().sample(np.array([1, 5, 5, 2], np.float32)) == 1       # the first of equals


def test_tiny_temperatures_do_not_overflow():
    assert {tinymia.Sampler(temp=1e-30, seed=0).sample(LOGITS * 100) for _ in range(5)} == {1}


def test_seeds(model):
    def text(seed):
        return model.generate(IDS, n=12, temp=1.5, seed=seed).tokens

    assert text(1) == text(1) and text(2) == text(2)
    assert len({tuple(text(s)) for s in range(5)}) > 1
    assert len({tuple(text(None)) for _ in range(5)}) > 1


def test_repeat_penalty():
    """Positive logits of seen tokens are divided, negative ones multiplied (Keskar et al. 2019, as in llama.cpp)."""
    sampler = tinymia.Sampler(repeat_penalty=2.0)
    assert sampler.sample(LOGITS, []) == 1
    assert sampler.sample(LOGITS, [1]) == 4                              # 3.0 became 1.5
    assert sampler.sample(LOGITS, [1, 4, 4, 4]) == 2                     # once, however often it was seen
    x = np.array([-1.0, -1.5, -9.0], np.float32)
    assert sampler.sample(x, [0]) == 1                                   # -1 became -2
    assert x.tolist() == [-1.0, -1.5, -9.0]
    assert tinymia.Sampler(repeat_penalty=1.0).sample(LOGITS, [1]) == 1


def test_repeat_penalty_breaks_a_loop(model):
    loops = model.generate(IDS, n=40).tokens
    assert len(set(model.generate(IDS, n=40, repeat_penalty=1e6).tokens)) >= len(set(loops))


@pytest.mark.parametrize("how", [dict(temp=-1.0), dict(temp=math.nan), dict(temp=math.inf), dict(top_k=-1),
                                 dict(top_p=0.0), dict(top_p=1.5),
                                 dict(top_p=math.nan), dict(min_p=-0.1), dict(min_p=1.1), dict(repeat_penalty=0.0),
                                 dict(repeat_penalty=-1.0),
                                 dict(seed=-1)], ids=str)
def test_values_out_of_range(model, how):
    with pytest.raises(tinymia.Error) as e:
        model.generate(IDS, n=1, **({"temp": 1.0} | how))
    assert next(iter(how)).replace("_", "") in str(e.value).replace("_", "").replace("-", "").lower()


def test_actions_change_what_is_said(model):
    plain = model.generate(IDS, n=8).tokens
    assert model.generate(IDS, n=8, actions=[tinymia.Scale("l_out-1", -1.0, when="all")]).tokens != plain
    assert model.generate(IDS, n=8).tokens == plain


def test_the_prompt_pass_computes_one_row_of_logits(model):
    """A vocabulary of 32,000 times a long prompt is most of the work of a small model."""
    rows = []
    model.generate(IDS, n=2, actions=[Replace("l_out-1", lambda x, ctx: rows.append(len(x)), when="all")])
    assert rows == [6, 1]
    shapes, linear = [], type(model).linear

    def counting(self, *args, **more):
        y = linear(self, *args, **more)
        shapes.append(y.shape)
        return y

    model.linear = counting.__get__(model)
    try:
        model.generate(IDS, n=1)
    finally:
        del model.linear
    assert [s for s in shapes if s[1] == model.config.n_vocab] == [(1, model.config.n_vocab)]
