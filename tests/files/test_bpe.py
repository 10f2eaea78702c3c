"""Byte-level BPE: Llama 3's kind of vocabulary.

Three judges: words written down by hand and a slow BPE of a few lines; llama.cpp's own test strings, where a source
tree of llama.cpp is at hand (TINYMIA_LLAMA_CPP=folder, such as vendor/llama.cpp of llama-cpp-python's source
distribution); and llama.cpp itself where it is installed.
"""
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bpe_vocab import LETTERS, SPECIAL, metadata, naive_ids
from conftest import command
from rawgguf import Raw

import tinymia
from tinymia_files import read_gguf, read_tokenizer
from tinymia_files.bpe import KNOWN

pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'tinymia[bpe]'", exc_type=ImportError)


@pytest.fixture
def bpe(tiny):
    """bpe(pre, ...): a model with the small vocabulary."""
    return lambda pre="llama-bpe", **more: tinymia.load(tiny(meta=metadata(pre, **more)), threads=1)


# ------------------------------------------------------------------------------- by hand

WORDS = [  # pre-tokenizer, text and its words, cut at |
    ("gpt-2", "It's| 12345| cafés|!!|  | two|\n|lines"),
    ("gpt-2", "a|   | b|\t|c|\n|d"),
    ("mpt", "x|12345|y"),
    ("llama-bpe", "It|'s| |123|45| cafés|!!|  | two|\n|lines"),
    ("llama-bpe", "WE|'LL|\n\n|go|...\n|ok"),
    ("llama-bpe", "a|  | b|(c|)|  "),
    ("qwen2", "It|'S| |1|2|3| cafés|!!\n\n| ok"),
    ("smollm", "It|'s| |1|2|3| cafés|!!|  | two"),
    ("starcoder", "x|1|2|=|3"),
    ("falcon", "a|.|b| |$+|123|45|'|s| ok"),
    ("deepseek-llm", "a|\n| b|!| |12345|日本語"),
    ("deepseek-coder", "a|\n| b|!| |1|2|日本語"),
    ("default", "a|.|b| |123|4"),
    ("tekken", "Camel|Case| |1|2|/x"),
    ("seed-coder", "a|!!|\n|b"),
    ("viking", "a| b|,| c|1|2"),
]


@pytest.mark.parametrize("pre, cut", WORDS)
def test_words_written_by_hand(bpe, pre, cut):
    """A text is cut as the named pre-tokenizer cuts it, and each word is merged by itself."""
    words = cut.split("|")
    model, meta = bpe(pre), metadata(pre)
    tokens, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
    want = naive_ids(words, tokens, merges, KNOWN[pre].whole_words)
    assert model.tokenize("".join(words), bos=False) == want


def test_no_pre_tokenizer_is_llama_cpps_default(bpe):
    text = "a.b 1234 it's\n\n ok"
    assert bpe(None).tokenize(text) == bpe("default").tokenize(text)


def test_a_word_that_is_a_token_needs_no_merges(bpe):
    """ignore_merges: Llama 3 takes a token that its merges could never make; SmolLM2 spells it out."""
    spare = 384 - len(SPECIAL) - 1                                       # made by the last merge, part of no other
    tokens, merges = list(metadata()["tokenizer.ggml.tokens"]), metadata()["tokenizer.ggml.merges"][:-1]
    tokens[spare] = "Ġqzqz"
    assert bpe("llama-bpe", tokens=tokens, merges=merges).tokenize(" qzqz", bos=False) == [spare]
    assert len(bpe("smollm", tokens=tokens, merges=merges).tokenize(" qzqz", bos=False)) == 5


TEXTS = ["", " ", "the fox", "  the  fox  ", "a\nb\tc\r\n", "naïve café", "日本語", "🦙.cpp", "e\u0301", "\x00\x01",
         "Ġ", "▁", "\ufeff", "fox" * 50, "𝔘𝔫𝔦", "؟العربية", "\U0010ffff", "<|eot_id|>", "<user>"]


@pytest.mark.parametrize("pre", KNOWN)
def test_every_pre_tokenizer_keeps_every_text(bpe, pre):
    model = bpe(pre)
    for text in TEXTS:
        ids = model.tokenize(text, bos=False, special=False)
        assert model.detokenize(ids) == text, repr(text)


def test_special_tokens_are_recognised_or_plain_text(bpe):
    model = bpe()
    bos, end, eot, tag, user = range(384 - len(SPECIAL), 384)
    a, b = model.tokenize("a", bos=False), model.tokenize("b", bos=False)
    assert model.tokenize("a<|eot_id|>b") == [bos, *a, eot, *b]
    with pytest.warns(tinymia.Note, match="begins with"):
        assert model.tokenize("<|begin_of_text|>a") == [bos, bos, *a]
    plain = model.tokenize("a<|eot_id|>b", bos=False, special=False)
    assert eot not in plain and model.detokenize(plain) == "a<|eot_id|>b"
    assert model.tokenize("a<user>b", bos=False, special=False) == [*a, user, *b]      # user-defined: always
    assert model.detokenize([*a, eot, bos, user]) == "a<user>"                          # control tokens add no text
    assert [model.piece(i) for i in (bos, eot)] == ["<|begin_of_text|>", "<|eot_id|>"]
    assert model.tokenizer.end == {end, eot} and tag not in model.tokenizer.end


def test_bos_comes_first_where_the_pre_tokenizer_says_so(bpe):
    """Llama 3's pre-tokenizers put BOS first where the file does not say; the others do not."""
    bos, eos = 384 - len(SPECIAL), 385 - len(SPECIAL)
    plain = bpe().tokenize("the fox")[1:]
    assert bpe("llama3").tokenize("the fox") == [bos, *plain]
    assert bpe(add_bos_token=False).tokenize("the fox") == plain
    assert bpe("smollm").tokenize("the fox")[0] != bos and bpe("smollm", add_bos_token=True).tokenize("x")[0] == bos
    assert bpe(add_eos_token=True).tokenize("the fox") == [bos, *plain, eos]
    assert bpe(bos_token_id=None).tokenize("the fox") == [11, *plain]   # llama.cpp's default, whatever token 11 is
    assert bpe("smollm", bos_token_id=None).tokenize("the fox") == bpe("smollm").tokenize("the fox")


def test_end_tokens_stop_a_generation(bpe):
    """EOS and EOT of the metadata, and what llama.cpp knows by its text."""
    for token in ("<|end_of_text|>", "<|eot_id|>"):
        model = bpe()
        i = model.tokenizer.one(token)

        def force(x, ctx, i=i):
            x[-1] = 0
            x[-1, i] = 9
            return x

        gen = model.generate("the", n=5, actions=[tinymia.Replace("result_output", force, when="all")])
        assert gen.stop_reason == "eos" and gen.tokens == [i] and gen.text == ""
    user = 383
    assert user in bpe(eot_token_id=user).tokenizer.end
    assert user in bpe(eom_token_id=user).tokenizer.end


def test_one_token_by_its_text(bpe):
    model = bpe()
    i = model.tokenizer.one(" the")
    assert model.tokenizer.pieces[i] == "Ġthe" and model.piece(i) == " the"
    assert model.tokenizer.one("<|eot_id|>") == 381 and model.tokenizer.one("#5") == 5
    assert model.tokenizer.one("\n") == model.tokenizer.pieces.index("Ċ")
    with pytest.raises(tinymia.Error, match="not one token"):
        model.tokenizer.one(" reverse the order")


def test_pieces_as_people_read_them(bpe):
    model = bpe()
    pieces = [model.piece(i) for i in range(384)]
    assert all(len(p.splitlines()) == 1 for p in pieces)
    by_letter = {LETTERS[b]: b for b in range(256)}
    for i in range(384 - len(SPECIAL)):
        if len(model.tokenizer.pieces[i]) == 1:
            b = by_letter[model.tokenizer.pieces[i]]
            assert model.tokenizer.bytes(i) == bytes([b])
            if b > 127:
                assert pieces[i] == f"<0x{b:02X}>"
    # An embedding may have more rows than the vocabulary has tokens.
    assert model.tokenizer.piece(384) == "<384>" and model.tokenizer.bytes(384) == b""


def test_bytes_join_into_characters_while_streaming(bpe):
    model, heard = bpe(), []
    wanted = iter(model.tokenizer.pieces.index(LETTERS[b]) for b in "🦙!".encode())

    def force(x, ctx):
        x[-1] = 0
        x[-1, next(wanted)] = 9
        return x

    gen = model.generate([1], n=5, on_text=heard.append, actions=[tinymia.Replace("result_output", force, when="all")])
    assert gen.text == "🦙!" and heard == ["🦙", "!"]


# ------------------------------------------------------------------------------- what is wrong with a file


def refused(path, *words):
    with pytest.raises(tinymia.GGUFError) as e:
        tinymia.load(path)
    text = str(e.value)
    assert text.isprintable() and Path(path).name in text and all(w in text for w in words), text
    return text


def test_an_unknown_pre_tokenizer_is_refused(tiny):
    text = refused(tiny(meta=metadata("klingon")), "klingon", "tokenizer.ggml.pre", "llama-bpe", "smollm", "qwen2")
    assert all(name in text for name in KNOWN)
    status, out, err = command("-m", tiny(meta=metadata("klingon")), "-p", "a")
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and "klingon" in err


def test_a_vocabulary_without_merges_is_refused(tiny, tmp_path):
    path = tiny(meta=metadata(merges=None))
    refused(path, "tokenizer.ggml.merges", "missing")
    raw = Raw.read(tiny(meta=metadata()))
    refused(raw.set("tokenizer.ggml.merges", 9, (8, [])).write(tmp_path / "a.gguf"), "tokenizer.ggml.merges", "empty")
    refused(raw.set("tokenizer.ggml.merges", 9, (4, [1, 2])).write(tmp_path / "b.gguf"), "tokenizer.ggml.merges")
    refused(raw.set("tokenizer.ggml.merges", 8, "a b").write(tmp_path / "c.gguf"), "tokenizer.ggml.merges")


@pytest.mark.parametrize("merges", [["q notatoken"], ["Ġq z"]])
def test_merges_that_make_no_token(tiny, tmp_path, merges):
    """Said when a text is first cut; a run on ids is not held up."""
    raw = Raw.read(tiny(meta=metadata()))
    model = tinymia.load(raw.set("tokenizer.ggml.merges", 9, (8, merges)).write(tmp_path / "f.gguf"), threads=1)
    assert np.isfinite(model.run([1, 2]).logits).all()
    with pytest.raises(tinymia.GGUFError, match=r"f\.gguf.*tokenizer\.ggml\.merges"):
        model.tokenize("the fox")


@pytest.mark.parametrize("merges", [["nospace"], [" a"], [" "], ["", "x"]])
def test_merges_that_are_no_pairs_are_passed_over(tiny, tmp_path, merges):
    """llama.cpp ignores them, too."""
    raw, pair = Raw.read(tiny(meta=metadata())), metadata()["tokenizer.ggml.merges"][0]
    both = raw.set("tokenizer.ggml.merges", 9, (8, [*merges, pair])).write(tmp_path / "f.gguf")
    one = raw.set("tokenizer.ggml.merges", 9, (8, [pair])).write(tmp_path / "g.gguf")
    assert tinymia.load(both, threads=1).tokenize("the fox") == tinymia.load(one, threads=1).tokenize("the fox")


@pytest.mark.parametrize("key, kind, value", [
    ("token_type", 9, (5, [1] * 3)), ("bos_token_id", 8, "x"), ("eos_token_id", 5, -1), ("eot_token_id", 6, 1.0),
    ("fim_pad_token_id", 7, True), ("pre", 4, 3), ("pre", 8, ""), ("tokens", 9, (8, [])), ("model", 8, "gpt3"),
    ("pre", 9, (8, ["llama-bpe"])), ("add_bos_token", 9, (4, [1, 2])), ("add_eos_token", 8, "yes"),
])
def test_wrong_metadata_of_a_vocabulary_are_refused(tiny, tmp_path, key, kind, value):
    raw = Raw.read(tiny(meta=metadata()))
    refused(raw.set(f"tokenizer.ggml.{key}", kind, value).write(tmp_path / "f.gguf"))


def test_bytes_that_no_token_spells(tiny, tmp_path):
    """They are left out, as by llama.cpp, and part what stands around them: never joined over the gap."""
    tokens = ["a", "b", "ab", *(f"t{i}" for i in range(381))]
    meta = metadata(tokens=tokens, token_type=[1] * 384, merges=["a b"], add_bos_token=False)
    meta |= {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.eos_token_id": None}
    model = tinymia.load(tiny(meta=meta), threads=1)
    assert model.tokenize("ab") == [2] and model.tokenize("acb") == [0, 1] and model.tokenize("ccc") == []


def test_without_the_library_ids_run_and_texts_say_what_to_install(tiny):
    """The model opens and runs on ids; a text says what to install."""
    path = tiny(meta=metadata())
    code = f"""if True:
        import sys
        sys.modules["tokenizers"] = None
        import tinymia
        model = tinymia.load({path!r}, threads=1)
        assert model.run([1, 2, 3]).logits.shape == (3, 384)
        assert model.detokenize([model.tokenizer.one(" the")]) == " the"
        try:
            model.tokenize("the")
        except tinymia.Error as e:
            print(e)"""
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)}
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert p.returncode == 0 and "pip install 'tinymia[bpe]'" in p.stdout and Path(path).name in p.stdout, p.stderr


def test_a_large_vocabulary_opens_fast(tiny, tmp_path):
    """It has as many tokens and merges as Llama 3: opening does no work that a run on ids does not need."""
    raw, letters = Raw.read(tiny(meta=metadata())), [LETTERS[b] for b in range(256)]
    made = [a + b + c for a in letters[:80] for b in letters[:80] for c in letters[:43]]
    tokens = (letters + [a + b for a in letters[:80] for b in letters[:80]] + made)[:128256]
    merges = [f"{a} {b}" for a in letters[:80] for b in letters[:80]] + [f"{m[:2]} {m[2]}" for m in tokens[6656:]]
    merges += [f"{m[0]} {m[1:]}" for m in tokens[6656:]]
    raw = raw.set("tokenizer.ggml.tokens", 9, (8, tokens)).set("tokenizer.ggml.merges", 9, (8, merges))
    raw = raw.set("tokenizer.ggml.token_type", 9, (5, [1] * len(tokens)))
    path = Path(raw.write(tmp_path / "large.gguf"))
    clock = time.process_time()
    tokenizer = read_tokenizer(read_gguf(path)[0], path)
    assert time.process_time() - clock < 2 and "_bpe" not in vars(tokenizer)            # 0.25 s on a good day


# ------------------------------------------------------------------------------- llama.cpp's own test strings


def source_tree():
    """A folder with llama.cpp's models/ggml-vocab-*.gguf, or None."""
    places = [Path(p) for p in [os.environ.get("TINYMIA_LLAMA_CPP")] if p]
    try:
        import llama_cpp

        places.append(Path(llama_cpp.__file__).parents[1] / "vendor" / "llama.cpp")      # installed from its source
    except ImportError:
        pass
    return next((p for p in places if (p / "models" / "ggml-vocab-llama-bpe.gguf").exists()), None)


VOCABULARIES = ["llama-bpe", "gpt-2", "deepseek-llm", "deepseek-coder", "qwen2", "qwen35", "starcoder", "refact",
                "falcon", "mpt", "command-r", "llama-spm", "phi-3"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_strings_of_llama_cpp(name):
    tree = source_tree()
    if tree is None:
        pytest.skip("needs a source tree of llama.cpp: TINYMIA_LLAMA_CPP=folder")
    path = tree / "models" / f"ggml-vocab-{name}.gguf"
    tokenizer = read_tokenizer(read_gguf(path)[0], path)
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in Path(f"{path}.out").read_text().split("\n")]
    ids = ids[:len(texts)] if not any(ids[len(texts):]) else ids
    assert len(texts) == len(ids) >= 47
    for text, want in zip(texts, ids, strict=True):
        for special in (True, False):
            assert tokenizer.encode(text, bos=False, special=special) == want, repr(text)
        if name not in ("llama-spm", "phi-3"):
            assert tokenizer.decode(want) == text


# ------------------------------------------------------------------------------- llama.cpp, live

POOLS = ["abcXYZ ", "  \t\n\r", "0123456789", "'sSdDrRevEllm", "!?.,;:-_()[]{}/\\\"#$%&*+<=>@^`|~", "éüñßàøÅĀŁ",
         "абвГД", "日本語漢字かなカナ", "한국어", "مرحبا", "हिन्दी", "🦙🚀👍🏽\u200d",
         "\xa0\u2003\u3000\x85\u200b\u2028", "½²Ⅷ٣９", "ǅᾳʰªΩ", "\u0301", "。、！？‘’“”…—", "\x00\x01\x1c\x7f"]


def strings(n, special):
    r = random.Random(n)
    for _ in range(n):
        pools = r.sample(POOLS, r.randint(1, 4))
        text = "".join(r.choice(r.choice(pools)) for _ in range(r.randint(1, 24)))
        yield text + r.choice(special) + text[:3] if special and r.random() < 0.15 else text


def same_as_llama_cpp(path, n):
    """The ids of random texts, and the tokens that end a generation."""
    C = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'", exc_type=ImportError)
    llama = C.Llama(str(path), vocab_only=True, verbose=False)
    ours = read_tokenizer(read_gguf(Path(path))[0], Path(path))
    for text in strings(n, ours.special):
        for special in (True, False):
            ids = ours.encode(text, special=special)
            assert ids == llama.tokenize(text.encode(), True, special), repr(text)
    vocab = C.llama_model_get_vocab(llama.model)
    assert ours.end == {i for i in range(len(ours.pieces)) if C.llama_vocab_is_eog(vocab, i)}


@pytest.mark.parametrize("pre", KNOWN)
def test_every_pre_tokenizer_live(tiny, pre):
    same_as_llama_cpp(tiny(meta=metadata(pre)), 150)


@pytest.mark.parametrize("name", [*VOCABULARIES, "gpt-neox", "aquila"])
def test_every_vocabulary_of_llama_cpp_gives_its_ids(name):
    tree = source_tree()
    if tree is None:
        pytest.skip("needs a source tree of llama.cpp: TINYMIA_LLAMA_CPP=folder")
    same_as_llama_cpp(tree / "models" / f"ggml-vocab-{name}.gguf", 200)


def test_a_run_is_the_same_run(tiny):
    """A text, its tokens, and greedy text after it, end to end."""
    C = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'", exc_type=ImportError)
    path = tiny(meta=metadata())
    model, llama = tinymia.load(path, threads=1), C.Llama(path, n_ctx=64, n_threads=1, verbose=False, flash_attn=False)
    ids = model.tokenize("the quick brown fox")
    assert ids == llama.tokenize(b"the quick brown fox", True, True)
    got = model.generate(ids, n=16)
    want = [t for t, _ in zip(llama.generate(ids, temp=0.0, repeat_penalty=1.0), range(16), strict=False)]
    assert got.tokens == want[:len(got.tokens)]
    text = [t for t in got.tokens if t not in model.tokenizer.end]
    assert got.text == llama.detokenize(text, ids).decode(errors="replace")
