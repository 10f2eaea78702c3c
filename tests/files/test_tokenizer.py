"""Text to ids and back."""
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from rawgguf import Info, Raw
from tiny import vocabulary

import tinymia


@pytest.fixture(scope="module")
def llama2(llama_vocab, tmp_path_factory):
    """The real vocabulary with one small layer of noise, so that it loads as a model."""
    g = Raw.read(llama_vocab)
    sizes = {"embedding_length": 32, "block_count": 1, "feed_forward_length": 32, "attention.head_count": 1,
             "attention.head_count_kv": 1}
    for key, value in sizes.items():
        g = g.set("llama." + key, 4, value)
    g = g.set("llama.rope.dimension_count", 4, 32)
    shapes = {"token_embd": (32, 32000), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
                                                "ffn_down")}
    for name, dims in shapes.items():
        g.tensors.append(Info(name + ".weight", dims, 0, len(g.data)))
        g.data += np.random.default_rng(len(g.data)).standard_normal(dims, np.float32).tobytes()
    return tinymia.load(g.write(tmp_path_factory.mktemp("vocab") / "llama2.gguf"))


def cases():
    """llama.cpp's own test file for this vocabulary: texts, and their ids without BOS."""
    texts = Path(shared("models/llama2-vocab.inp")).read_text("utf-8").split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in Path(shared("models/llama2-vocab.out")).read_text().split("\n")]
    assert len(texts) == 47
    return list(zip(texts, ids, strict=True))


def test_all_47_strings_of_llama_cpp(llama2):
    for text, ids in cases():
        assert llama2.tokenize(text, bos=False) == ids, repr(text)
        assert llama2.tokenize(text, bos=False, special=False) == ids, repr(text)
        assert llama2.tokenize(text) == [1, *ids]


def test_ids_of_llama_2_give_the_text_back(llama2):
    for text, ids in cases():
        assert llama2.detokenize(ids) == text, repr(text)
        assert llama2.detokenize([1, *ids]) == text                              # BOS adds nothing to a text


def test_the_posts_prompt_has_the_posts_positions(llama2):
    """Token 0 is BOS and the last token of `France ->` is 2, as the post counts."""
    assert [llama2.piece(i) for i in llama2.tokenize("France ->")] == ["<s>", " France", " ->"]
    assert len(llama2.tokenize("Egypt -> Cairo, Norway -> Oslo, Estonia ->")) == 14
    assert len(llama2.tokenize("1 2 3 to 3 2 1, 5 6 7 to 7 ")) == 25
    assert len(llama2.tokenize("4 5 6 to 6 ")) == 11


def test_special_tokens_in_the_prompt(llama2):
    assert llama2.tokenize("a<s>b</s>", bos=False) == [*llama2.tokenize("a", bos=False), 1,
                                                       *llama2.tokenize("b", bos=False), 2]
    assert llama2.tokenize("<s>", bos=False) == [1]
    plain = llama2.tokenize("a<s>b</s>", bos=False, special=False)
    assert 1 not in plain and 2 not in plain and llama2.detokenize(plain).strip() == "a<s>b</s>"
    assert llama2.tokenize("< s>", bos=False)[0] != 1


def test_bos_and_eos_as_the_metadata_says(tiny):
    def ids(**meta):
        return tinymia.load(tiny(meta={f"tokenizer.ggml.{k}": v for k, v in meta.items()})).tokenize("the fox")

    plain = ids()
    assert plain[0] == 1 and 1 not in plain[1:] and plain[-1] != 2
    assert ids(add_bos_token=True) == plain
    assert ids(add_bos_token=False) == plain[1:]
    assert ids(add_eos_token=True) == [*plain, 2]
    assert ids(bos_token_id=5) == [5, *plain[1:]]
    model = tinymia.load(tiny(meta={"tokenizer.ggml.add_bos_token": False}))
    assert model.tokenize("the fox", bos=True) == plain and model.tokenize("the fox", bos=False) == plain[1:]


def test_without_a_prefix_space_the_text_comes_back(tiny):
    model = tinymia.load(tiny(meta={"tokenizer.ggml.add_space_prefix": False}))
    assert model.detokenize(model.tokenize("the fox")) == "the fox"


@pytest.mark.parametrize("text", ["", " ", "the fox", "  the  fox  ", "The FOX!", "a\nb\tc\r\n", "naïve café", "日本語",
                                  "🦙.cpp", "e\u0301",
                                  "\x00\x01", "▁", "<s>", "<0x41>", "\ufeff", "fox" * 50, "𝔘𝔫𝔦", "؟العربية",
                                  "\U0010ffff"])
def test_every_text_comes_back_from_its_ids(model, text):
    """Every text has ids and comes back, by bytes where letters are missing."""
    ids = model.tokenize(text, special=False)
    assert all(0 <= i < model.config.n_vocab for i in ids)
    got = model.detokenize(ids)
    assert got == text.replace("▁", " ")


def test_lone_surrogates_are_refused(model):
    with pytest.raises(tinymia.Error, match="the text is not valid UTF-8 at character 1"):
        model.tokenize("a\ud800")


def test_pieces_are_shown_as_people_read_them(model):
    assert model.piece(0) == "<unk>" and model.piece(1) == "<s>" and model.piece(3) == "<0x00>"
    assert model.piece(model.tokenize("the")[1]).startswith(" ")
    for i in range(model.config.n_vocab):
        assert "\n" not in model.piece(i) and "▁" not in model.piece(i)


def test_bytes_join_into_characters_while_streaming(tiny):
    """A model that says é, byte by byte: nothing is shown before the character is whole."""
    model = tinymia.load(tiny())
    heard = []
    e = list("é!".encode())
    gen = model.generate([1], n=3, on_text=heard.append, actions=say([*e[:2], ord("!")], model))
    assert gen.text == "é!" and "".join(heard) == "é!" and heard[0] == "é"
    heard.clear()
    gen = model.generate([1], n=2, on_text=heard.append, actions=say([0xC3, ord("!")], model))
    assert gen.text == "\ufffd!" and "".join(heard) == gen.text
    heard.clear()
    gen = model.generate([1], n=1, on_text=heard.append, actions=say([0xF0], model))
    assert gen.text == "\ufffd" and "".join(heard) == gen.text


def say(tokens, model):
    """Actions that make the model choose these byte tokens one after another."""
    wanted = iter([3 + b for b in tokens])

    def force(x, ctx):
        x[-1] = 0
        x[-1, next(wanted)] = 9
        return x

    return [tinymia.Replace("result_output", force, when="all")]


@pytest.mark.parametrize("name", ["Phi-3-mini", "a PHI3 of ours", "Phi-4"])
def test_special_tokens_of_phi_3_take_the_white_space_after_them(tiny, name):
    """They do by the model's name, <s>, <unk> and <|endoftext|> excepted. llama.cpp is the judge of 300 texts."""
    C = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'", exc_type=ImportError)
    tokens, scores, types = (list(x) for x in vocabulary(384))
    tokens[380:383], types[380:383] = ["<|endoftext|>", "<|user|>", "<|mark|>"], [3, 3, 4]
    path = tiny(meta={"general.name": name}, pieces=(tokens, scores, types))
    llama, ours = C.Llama(path, vocab_only=True, verbose=False), tinymia.load(path).tokenizer
    r = random.Random(3)
    parts = [*ours.special, " ", "\n", "\t ", "the", "fox \u2003", "\x0b", "\x1c", "  ", "\r\n"]
    texts = ["".join(r.choices(parts, k=r.randint(2, 9))) for _ in range(300)]
    for text in texts:
        for special in (True, False):
            assert ours.encode(text, special=special) == llama.tokenize(text.encode(), True, special), repr(text)
    assert (ours.encode("<|user|> \n the") == ours.encode("<|user|>the")) == (name != "Phi-4")
