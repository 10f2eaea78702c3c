"""Generation and sampling: greedy, the filters against slow ones, seeds, and every way to stop."""
import inspect
import math
import warnings
from collections import Counter

import numpy as np
import pytest
from conftest import prompt

import tinymia
import tinymia_lab
from tinymia import Replace
from tinymia_engine import best, softmax

IDS = prompt(6)


def greedy(model, ids, n):
    """Slow: the whole prompt again for every token."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(model.run(ids, logits="last").logits[0].argmax()))
    return ids[-n:]


def said(model, tokens):
    """The text that tokens add to another, the first one's blank included."""
    return b"".join(map(model.tokenizer.bytes, tokens)).decode("utf-8", "replace")


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
def test_greedy_decoding_takes_the_best_token(load, wtype, numerics):
    model = load(numerics, wtype=wtype)
    gen = model.generate(IDS, n=10)
    want = greedy(model, IDS, 10)
    if 2 in want:
        want = want[:want.index(2) + 1]
    assert gen.tokens == want and gen.prompt_tokens == IDS and gen.stop_reason == ("eos" if 2 in want else "length")
    assert gen.text == said(model, [t for t in gen.tokens if t != 2])


def test_a_text_and_its_ids_give_the_same(model):
    a, b = model.generate("the quick", n=5), model.generate(model.tokenize("the quick"), n=5)
    assert a.tokens == b.tokens and a.text == b.text and a.prompt_tokens == b.prompt_tokens


def test_no_tokens_asked_for_are_no_tokens(model):
    gen = model.generate(IDS, n=0)
    assert (gen.text, gen.tokens, gen.stop_reason) == ("", [], "length")


def test_stories260k_tells_its_story(stories):
    """A real model: the first words of its story, as every engine tells it."""
    model = tinymia.load(stories, threads=1)
    gen = model.generate("Once upon a time", n=32)
    assert gen.text.startswith(", there was a little girl named Lily."), gen.text
    assert gen.prompt_tokens[0] == 1 and gen.stop_reason == "length"


# ------------------------------------------------------------------------------------------------ ways to stop


def test_an_end_token_ends_the_text(model):
    for n in (3, 9):
        gen = model.generate(IDS, n=n, actions=choosing([300, 301, 2, 302, 303]))
        assert gen.tokens == [300, 301, 2] and gen.stop_reason == "eos" and gen.text == said(model, [300, 301])


def test_a_stop_text_is_not_part_of_the_text(model):
    ids = model.tokenize("the quick brown fox jumps over", bos=False)
    text = said(model, ids)
    for stop in (["fox"], ["never", "fox"], [" fox jumps", "nothing"], ["k brown"]):
        heard = []
        gen = model.generate([1], n=len(ids), stop=stop, actions=choosing(ids), on_text=heard.append)
        first = min(text.find(s) for s in stop if s in text)
        assert gen.text == text[:first] == "".join(heard) and gen.stop_reason == "stop"
    gen = model.generate([1], n=len(ids), stop=["fox hunt", "over the"], actions=choosing(ids),
                         on_text=(heard := []).append)
    assert gen.text == text == "".join(heard) and gen.stop_reason == "length"  # a start of a stop text is not lost
    with pytest.raises(tinymia.Error, match="an empty stop text would end every text at once"):
        model.generate(IDS, n=3, stop=[""])


def test_stop_text_across_tokens(model):
    """Bytes of one character and pieces of one word: a stop text is found wherever the tokens are cut."""
    ids = [3 + b for b in "ab→cd".encode()]
    for stop in ("→", "b→c", "cd"):
        gen = model.generate([1], n=len(ids), stop=[stop], actions=choosing(ids))
        assert gen.text == "ab→cd"[:"ab→cd".index(stop)] and gen.stop_reason == "stop"


def test_the_text_ends_where_the_context_is_full(load):
    """Tokens fill the n_ctx positions, and one more comes after them: it is chosen, and needs no pass of its own."""
    model = load(n_ctx=16)
    gen = model.generate(prompt(12), n=50, actions=choosing([300] * 50))
    assert gen.stop_reason == "context" and gen.tokens == [300] * 5
    assert model.generate(prompt(12), n=5, actions=choosing([300] * 5)).stop_reason == "length"
    gen = model.generate(prompt(16), n=3, actions=choosing([300] * 3))
    assert gen.stop_reason == "context" and gen.tokens == [300]
    with pytest.raises(tinymia.Error, match="16"):
        model.generate(prompt(17), n=3)


def test_ctrl_c_gives_the_text_so_far(model):
    calls = []

    def press(text):
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt

    gen = model.generate(IDS, n=50, actions=choosing([300] * 50), on_text=press)
    assert gen.stop_reason == "interrupted" and gen.tokens == [300] * 3 and gen.text == said(model, [300] * 3)


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
def test_samples_follow_the_distribution(how):
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


def test_the_same_seed_gives_the_same_text(model):
    def text(seed):
        return model.generate(IDS, n=12, temp=1.5, seed=seed).tokens

    assert text(1) == text(1) and text(2) == text(2)
    assert len({tuple(text(s)) for s in range(5)}) > 1
    assert len({tuple(text(None)) for _ in range(5)}) > 1


def test_a_repeat_penalty_divides_and_multiplies_logits():
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
    """Tokens of the prompt count as seen: with a penalty as large as this one, every token is a new one."""
    plain = model.generate(IDS, n=40).tokens
    assert len({*IDS, *plain}) < 46 and len({*IDS, *model.generate(IDS, n=40, repeat_penalty=1e6).tokens}) == 46


@pytest.mark.parametrize("how", [dict(temp=-1.0), dict(temp=math.nan), dict(temp=math.inf), dict(top_k=-1),
                                 dict(top_p=0.0), dict(top_p=1.5),
                                 dict(top_p=math.nan), dict(min_p=-0.1), dict(min_p=1.1), dict(repeat_penalty=0.0),
                                 dict(repeat_penalty=-1.0),
                                 dict(seed=-1)], ids=str)
def test_values_out_of_range(model, how):
    (name, bad), = how.items()
    with pytest.raises(tinymia.Error, match=f"^{name} is {bad}: it must be a (whole )?number"):
        model.generate(IDS, n=1, **({"temp": 1.0} | how))


def test_actions_change_what_is_said(model):
    plain = model.generate(IDS, n=8).tokens
    assert model.generate(IDS, n=8, actions=[tinymia.Scale("l_out-1", -1.0, when="all")]).tokens != plain
    assert model.generate(IDS, n=8).tokens == plain


def test_the_prompt_pass_computes_one_row_of_logits(model, monkeypatch):
    """A vocabulary of 32,000 times a long prompt is most of the work of a small model."""
    rows = []
    model.generate(IDS, n=2, actions=[Replace("l_out-1", lambda x, ctx: rows.append(len(x)), when="all")])
    assert rows == [6, 1]
    shapes, linear = [], type(model.ops).linear

    def counting(ops, x, layer):
        y = linear(ops, x, layer)
        shapes.append(y.shape)
        return y

    monkeypatch.setattr(type(model.ops), "linear", counting)
    model.generate(IDS, n=1)
    assert [s for s in shapes if s[1] == model.config.n_vocab] == [(1, model.config.n_vocab)]


# ------------------------------------------------------------------------------------------------ what is asked for


def test_a_text_after_a_cache_goes_on_with_it(model):
    """No second BOS, and no blank of its own: both parts have the ids of the whole."""
    whole = "the quick brown fox"
    for at in (3, 9):
        cache = model.cache()
        ids = model.run(whole[:at], cache=cache).tokens + (last := model.run(whole[at:], cache=cache)).tokens
        assert ids == model.tokenize(whole)
        np.testing.assert_allclose(last.logits[-1], model.run(whole).logits[-1], rtol=1e-4, atol=1e-5)


def test_a_text_that_begins_with_bos_keeps_both_with_a_note(model):
    with pytest.warns(tinymia.Note, match="begins with <s>"):
        assert model.tokenize("<s>the fox")[:2] == [1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.tokenize("<s>the fox", bos=False)[0] == 1
        assert model.tokenize("<s>the fox", special=False)[:2] != [1, 1]


@pytest.mark.parametrize("ids", [[[1, 5]], [1.0, 5.0], ["text"], np.array([1.0]), np.array([[1, 5]]), [True, False],
                                 np.array([True]), (i for i in [1, 5]), None, 5, {1, 5}, [None], [1, 10**30], b"the",
                                 [], [-1], [384], {"a": 1}, [[1], [1, 5]], np.array(5),
                                 np.array([], np.float32)], ids=str)
def test_ids_of_the_wrong_kind_are_one_error_before_any_work(model, ids):
    seen = []
    look = Replace("inp_embd", lambda x, ctx: seen.append(1))
    says = ("must be whole numbers|is out of range( of any model|: there are 384)|the prompt has no tokens|"
            "a prompt is text or token ids")
    for call in (lambda: model.run(ids, actions=look), lambda: model.generate(ids, 1, look)):
        with pytest.raises(tinymia.Error, match=says) as e:
            call()
        assert "\n" not in str(e.value) and not seen
    with pytest.raises(tinymia.Error, match=r"^a text is a str, not "):
        model.tokenize(ids)


def test_ids_of_every_integer_kind_are_taken(model):
    want = model.run([1, 5]).logits
    for ids in ((1, 5), np.array([1, 5], np.uint8), [np.int32(1), np.int64(5)], range(1, 6, 4)):
        np.testing.assert_array_equal(model.run(ids).logits, want)


@pytest.mark.parametrize("i", [-1, 384, 1.0, True, "1", None])
def test_pieces_of_ids_that_are_not_there(model, i):
    for call in (model.piece, lambda i: model.detokenize([i]), lambda i: model.detokenize([1, i])):
        with pytest.raises(tinymia.Error, match="token id"):
            call(i)
    assert model.detokenize([]) == ""


def test_a_stop_text_needs_no_list(model):
    ids = model.tokenize("the quick brown fox", bos=False)
    for stop in ("brown", ["brown"], ("brown",)):
        assert model.generate([1], n=len(ids), stop=stop, actions=choosing(ids)).text == " the quick "
    assert model.generate([1], n=4, stop=None, actions=choosing(ids)).stop_reason == "length"
    for stop in ("", [""], [3], ["a", None]):
        with pytest.raises(tinymia.Error, match="stop text"):
            model.generate(IDS, n=3, stop=stop)


def test_a_control_token_as_a_stop_text_stops(tiny):
    """It adds nothing to the text, so that no text could be found."""
    model = tinymia.load(tiny(meta={"tokenizer.ggml.eos_token_id": 5}))
    gen = model.generate([1], n=5, stop=["<s>"], actions=choosing([300, 301, 1, 302, 303]))
    assert gen.tokens == [300, 301, 1] and gen.stop_reason == "stop" and gen.text == said(model, [300, 301])
    with pytest.raises(tinymia.Error, match="control token"):
        model.generate([1], n=5, stop="<s>the")


@pytest.mark.parametrize("name,right", [("max_tokens", "n"), ("n_predict", "n"), ("max_new_tokens", "n"),
                                        ("temperature", "temp"), ("repetition_penalty", "repeat_penalty"),
                                        ("tempp", "temp"), ("topk", "top_k"), ("zzz", "seed")])
def test_arguments_of_other_programs_are_told_their_names_here(model, name, right):
    with pytest.raises(tinymia.Error, match=f"{name}.*{right}") as e:
        model.generate(IDS, **{name: 3})
    assert isinstance(e.value, TypeError) and "__init__" not in str(e.value)


@pytest.mark.parametrize("call,right", [
    (lambda model: tinymia.load(n_threads=2), "load has no argument 'n_threads': here it is called threads"),
    (lambda model: tinymia.Patch("l_out-1", None, srcs=-1), "Patch has no argument 'srcs': here it is called src"),
    (lambda model: tinymia.Lens("l_out-1", top=3), "Lens has no argument 'top': here it is called k"),
    (lambda model: model.run(IDS, action=[]), "run has no argument 'action': here it is called actions"),
    (lambda model: tinymia_lab.attend(model, IDS, layer=1), "attend has no argument 'layer': here it is called layers"),
    (lambda model: tinymia_lab.lens(model, IDS, zzz=1), "lens has no argument 'zzz'; it has model, prompt, names, k"),
    (lambda model: tinymia_lab.verify(model, IDS, injekt=True), "here it is called inject"),
    (lambda model: tinymia_lab.lens("copycat", "a"), "lens takes a model and not its name: tinymia.load('copycat')"),
    (lambda model: tinymia_lab.sweep(model="x", clean="a", corrupt="b"), "tinymia.load('x') gives one"),
])
def test_a_wrong_argument_of_other_functions_is_told_with_the_right_one(model, call, right):
    with pytest.raises(TypeError) as e:
        call(model)
    assert isinstance(e.value, tinymia.Error) and right in str(e.value)


def test_functions_keep_their_names_and_arguments():
    assert tinymia_lab.lens is tinymia_lab.lens and tinymia_lab.lens.__name__ == "lens"
    assert [*inspect.signature(tinymia_lab.lens).parameters][:2] == ["model", "prompt"]
    assert "positions that a run may have" in tinymia.load.__doc__


@pytest.mark.parametrize("n", [-1, 1.5, True, "3", None])
def test_n_is_a_whole_number(model, n):
    with pytest.raises(tinymia.Error, match="n is"):
        model.generate(IDS, n=n)


# ------------------------------------------------------------------------------------------------ the best k


def test_the_best_k_are_those_of_a_stable_sort():
    """This holds for every k, with many ties, infinities and both zeros; of equal scores the first comes first."""
    rng = np.random.default_rng(0)
    for trial in range(300):
        n = int(rng.integers(1, 200))
        x = rng.integers(-3, 4, (int(rng.integers(1, 4)), n)).astype(np.float32) * (0.5 if trial % 2 else -0.0)
        if trial % 3 == 0:
            x[rng.random(x.shape) < 0.2] = rng.choice([np.inf, -np.inf])
        if trial % 7 == 0:
            x = rng.standard_normal(x.shape).astype(np.float32 if trial % 14 else np.float64)
        for k in {1, n, n + 3, int(rng.integers(1, n + 1))}:
            want = np.argsort(-x, axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(best(x, k), want)
            np.testing.assert_array_equal(best(x[0], k), want[0])


def test_nan_comes_last_among_the_best():
    np.testing.assert_array_equal(best(np.array([np.nan, 1, np.nan, 3], np.float32), 3), [3, 1, 0])


class Sorting:
    """Draws as Sampler did: the whole vocabulary sorted, every probability computed."""

    def __init__(self, temp, top_k=0, top_p=1.0, min_p=0.0, seed=None):
        self.temp, self.top_k, self.top_p, self.min_p = temp, top_k, top_p, min_p
        self.random = np.random.default_rng(seed)

    def sample(self, logits):
        ids = np.argsort(-logits, kind="stable")[: self.top_k or None]
        p = softmax(logits[ids].astype(np.float64))
        keep = (np.cumsum(p) - p < self.top_p) & (p >= self.min_p * p[0])
        keep[0] = True
        return int(self.random.choice(ids[keep], p=softmax(logits[ids[keep]].astype(np.float64) / self.temp)))


@pytest.mark.parametrize("how", [{}, {"top_k": 40}, {"top_k": 1}, {"top_k": 9999}, {"top_p": 0.9}, {"top_p": 1e-9},
                                 {"top_p": 0.9999}, {"min_p": 0.05}, {"min_p": 1e-9}, {"min_p": 1.0},
                                 {"top_k": 50, "top_p": 0.8, "min_p": 0.01}], ids=str)
def test_a_seed_draws_the_tokens_that_a_whole_sort_draws(how):
    rng = np.random.default_rng(1)
    for temp, spread in ((0.7, 3), (1.0, 0.01), (1.5, 8), (5.0, 1)):
        ours, theirs = (kind(temp=temp, seed=7, **how) for kind in (tinymia.Sampler, Sorting))
        for _ in range(40):
            logits = (rng.standard_normal(3000) * spread).astype(np.float32)
            assert ours.sample(logits) == theirs.sample(logits)


@pytest.mark.parametrize("how", [{"temp": 1e-310}, {"temp": 5e-324}, {"temp": 1e-30}, {"temp": 1e300},
                                 {"temp": 1e-310, "top_p": 0.9}, {"temp": 1e-307, "top_k": 3, "min_p": 0.1},
                                 {"repeat_penalty": 1e-308}, {"repeat_penalty": 1e308}, {"repeat_penalty": 5e-324},
                                 {"temp": 1.0, "repeat_penalty": 1e-308},
                                 {"temp": 1e-310, "repeat_penalty": 1e-308}], ids=str)
def test_numbers_at_the_ends_of_their_range(how):
    logits = np.array([0.0, 3.0, 2.9, -1.0, -0.0], np.float32)
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        drawn = {tinymia.Sampler(seed=s, **how).sample(logits * scale, seen) for s in range(5)
                 for scale in (1, np.float32(1e37)) for seen in ([], [0, 2, 3])}
    assert drawn <= set(range(5))
    if how.get("temp", 1.0) < 1e-29 and "repeat_penalty" not in how:
        assert drawn == {1}


@pytest.mark.parametrize("logits,want", [([np.inf, 1, 2], {0}), ([1, np.inf, np.inf], {1, 2}),
                                         ([-np.inf, 1, 0], {1, 2}), ([-np.inf] * 3, {0, 1, 2})], ids=str)
def test_infinite_logits_are_sampled_without_a_warning(logits, want):
    x = np.array(logits, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for how in ({}, {"top_k": 2}, {"top_p": 0.99}):
            drawn = {tinymia.Sampler(temp=1.0, seed=s, **how).sample(x) for s in range(30)}
            assert drawn <= want and (how or drawn == want)
        assert tinymia.Sampler().sample(x) == min(want)


def test_nan_is_no_logit():
    for temp in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN"):
            tinymia.Sampler(temp=temp).sample(np.array([1, np.nan], np.float32))


@pytest.mark.parametrize("how", [{"temp": "hot"}, {"temp": None}, {"temp": True}, {"top_k": 2.5}, {"top_k": 1.0},
                                 {"top_p": "1"}, {"min_p": None}, {"seed": 1.5}, {"seed": True},
                                 {"repeat_penalty": "2"}, {"temp": 10**400}, {"repeat_penalty": 10**400},
                                 {"stop": 5}, {"stop": b"x"}],
                         ids=lambda how: str(how)[:30])
def test_values_of_another_kind(model, how):
    with pytest.raises(tinymia.Error, match=next(iter(how))):
        model.generate(IDS, n=1, **how)
