"""Vocabularies that leave something out or say something odd: read as llama.cpp reads them, which is asked where it is
installed."""
import ctypes
import json

import numpy as np
import pytest
from bpe_vocab import metadata as bpe
from conftest import command
from forked import in_child
from tiny import vocabulary

import tinymia

TOKENS, SCORES, TYPES = vocabulary(384)
TEXTS = [
    "", " ", "the fox", " the fox", "  two  spaces ", "France -> Paris", " France ->", "café naïve", "日本語", "🦙.cpp",
    "a\nb\tc", "Hi\nyou", "naïve → 漢", "<s>", "the<s>fox", "</s></s>", "a</s>b", "<0x41>", "▁", "▁a", "x" * 60,
    "0 1 2 to 2 1 0", "<unk>", "a<unk>b", "[EMPTY_380]", "\x00\x01", "e\u0301", "Q7%",
]


def typed(change):
    """Token types after change(id, piece, type)."""
    return [change(i, piece, kind) for i, (piece, kind) in enumerate(zip(TOKENS, TYPES, strict=True))]


def named(**pieces):
    """Tokens with other texts: t380="x"."""
    return [pieces.get(f"t{i}", piece) for i, piece in enumerate(TOKENS)]


SPM = {  # what is told otherwise, None for not at all
    "as it should be": {},
    "no types": {"token_type": None},
    "all normal": {"token_type": [1] * 384},
    "bytes typed normal": {"token_type": typed(lambda i, p, t: 1 if t == 6 else t)},
    "one byte typed": {"token_type": typed(lambda i, p, t: 1 if t == 6 and i != 20 else t)},
    "no bos": {"bos_token_id": None},
    "no eos": {"eos_token_id": None},
    "no unknown": {"unknown_token_id": None},
    "no ids": {f"{k}_token_id": None for k in ("bos", "eos", "unknown")},
    "unknown is a byte": {"unknown_token_id": 10},
    "unknown is a word": {"unknown_token_id": 300},
    "unknown is bos": {"unknown_token_id": 1},
    **{f"{k} out of range": {f"{k}_token_id": i} for k, i in {
        "bos": 2**32 - 1, "eos": 384, "unknown": 32000, "padding": 2**32 - 1, "seperator": 999, "mask": 999, "eot": 384,
        "eom": 2**32 - 1, "fim_pre": 999, "fim_pad": 384, "prefix": 384, "middle": 999}.items()},
    "no blank before": {"add_space_prefix": False},
    "no bos before": {"add_bos_token": False},
    "words that are user-defined": {"token_type": typed(lambda i, p, t: 4 if p in ("the", "▁fox") else t)},
    **{f"words of type {k}": {"token_type": typed(lambda i, p, t, k=k: k if i % 7 == 0 and i > 259 else t)}
       for k in (0, 2, 3, 5, 77)},
    "<unk> is normal": {"token_type": typed(lambda i, p, t: 1 if i == 0 else t)},
    "an empty piece": {"tokens": named(t380="")},
    "the parts of an answer": {"tokens": named(t376="<|channel|>", t377="<|end|>", t378="<|return|>", t379="<|call|>")},
    "an answer of a tool": {"tokens": named(t376="<|tool_response>")},
    "no scores": {"scores": None},
}
BPE = {
    "bpe": {}, "bpe, no bos": {"bos_token_id": None}, "bpe, no eos": {"eos_token_id": None},
    "bpe, bos out of range": {"bos_token_id": 2**32 - 1}, "bpe, eos out of range": {"eos_token_id": 384},
    "bpe, unknown out of range": {"unknown_token_id": 999}, "bpe, no types": {"token_type": None},
    "bpe, smollm, no bos": {"pre": "smollm", "bos_token_id": None},
    "bpe, smollm, bos and none named": {"pre": "smollm", "bos_token_id": None, "add_bos_token": True},
    "bpe, no pre": {"pre": None},
}


@pytest.fixture
def write(tiny):
    def write(name):
        if name in BPE:
            pytest.importorskip("tokenizers",
                                reason="needs tokenizers: pip install 'tinymia[bpe]'", exc_type=ImportError)
            return tiny(meta=bpe(**{"pre": "llama-bpe"} | BPE[name]))
        return tiny(meta={f"tokenizer.ggml.{k}": v for k, v in SPM[name].items()})

    return write


def load(path):
    return tinymia.load(path, threads=1)


# ------------------------------------------------------------------------------- known values


@pytest.mark.parametrize("name", ["no types", "all normal", "bytes typed normal", "one byte typed"])
def test_bytes_are_known_by_their_names(write, model, name):
    """A letter without a piece becomes its bytes, whatever the types say, and the text comes back."""
    read = load(write(name))
    for text in ("Hi\nyou", "naïve → 漢"):
        assert read.tokenize(text) == model.tokenize(text) and 0 not in read.tokenize(text)
        if name != "one byte typed":
            assert read.detokenize(read.tokenize(text)) == text
    assert [read.tokenizer.ids[f"<0x{b:02X}>"] for b in "漢".encode()] == read.tokenize("漢", bos=False)[-3:]


def test_bytes_of_which_some_are_missing(tiny):
    """Those that there are stand for themselves, the unknown token for the others."""
    path = tiny(meta={"tokenizer.ggml.tokens": named(t9="zq"), "tokenizer.ggml.add_space_prefix": False})
    read = load(path)
    assert read.tokenize("H\nyou", bos=False) == load(path).tokenize("H\nyou", bos=False)
    assert read.tokenize("\x06", bos=False) == [0] and read.tokenize("\x07", bos=False) == [3 + 7]
    assert read.tokenize("\x07the\x06\x07", bos=False) == [10, *read.tokenize("the", bos=False), 0, 10]


def test_special_ids_of_a_file_that_names_none(write):
    k = load(write("no ids")).tokenizer
    assert (k.bos, k.eos, k.unknown, k.add_bos) == (1, 2, 0, True) and k.encode("the fox")[0] == 1
    k = load(write("bpe, no bos")).tokenizer
    assert (k.bos, k.unknown, k.encode("the fox")[0]) == (11, None, 11)
    k = load(write("bpe, no eos")).tokenizer
    assert k.eos == 11 and 11 in k.end


@pytest.mark.parametrize("name", [n for n in [*SPM, *BPE] if "out of range" in n])
def test_special_ids_out_of_range_are_noted_once(write, capsys, name):
    path = write(name)
    read = load(path)
    err = capsys.readouterr().err
    (key, value), = (SPM | BPE)[name].items()
    assert err.count("\n") == 1 and f"tokenizer.ggml.{key} is {value}" in err and path in err
    assert read.tokenizer.bos == (11 if name == "bpe, bos out of range" else 379 if name in BPE else 1)
    assert np.isfinite(read.run(read.tokenize("the fox")).logits).all()


def test_the_note_goes_to_stderr(write):
    status, out, err = command("-m", write("bos out of range"), "-p", "the fox", "-n", "1", "--json")
    assert status == 0 and "bos_token_id" in err and "bos_token_id" not in out


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("text", ["France ->", " France ->", "  two", "", " "])
def test_the_blank_that_encoding_puts_first_is_taken_off(model, text, bos):
    assert model.detokenize(model.tokenize(text, bos=bos)) == text


def test_only_the_first_blank_is_taken_off(model):
    """A blank after another special token stays, as in llama.cpp."""
    assert model.detokenize(model.tokenize("a</s>b")) == "a b"
    assert model.detokenize([2, *model.tokenize("a", bos=False)]) == " a"


@pytest.mark.parametrize("bos", [True, False])
def test_the_text_of_a_prompt_given_as_ids_is_recorded_without_it(model, tmp_path, bos):
    """So that what is read back is what was run."""
    ids = model.tokenize("the fox", bos=bos)
    model.run(ids, actions=[tinymia.Save("l_out-1", tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as saved:
        assert json.loads(str(saved["about"]))["prompt"] == "the fox"


# ------------------------------------------------------------------------------- llama.cpp, live


def theirs(path):
    """Ids, texts, pieces and special ids of llama.cpp."""
    import test_llama

    C = test_llama.llama_tensors.C
    params = C.llama_model_default_params()
    params.vocab_only = True
    vocab = C.llama_model_get_vocab(C.llama_model_load_from_file(path.encode(), params))
    n, room = C.llama_vocab_n_tokens(vocab), ctypes.create_string_buffer(8192)

    def text(size):
        return room.raw[:size]

    told = {"special": (C.llama_vocab_bos(vocab), C.llama_vocab_eos(vocab), C.llama_vocab_get_add_bos(vocab)),
            "ends": {i for i in range(n) if C.llama_vocab_is_eog(vocab, i)},
            "pieces": [text(C.llama_token_to_piece(vocab, i, room, len(room), 0, False)) for i in range(n)]}
    for line in TEXTS:
        for bos in (True, False):
            for special in (True, False):
                raw, ids = line.encode(), (C.llama_token * (4 * len(line) + 16))()
                size = C.llama_tokenize(vocab, raw, len(raw), ids, len(ids), bos, special)
                told[line, bos, special] = ids[:size]
                if not bos:
                    size = C.llama_detokenize(vocab, ids, size, room, len(room), False, False)
                    told[line, "text", special] = text(size)
    return told


@pytest.mark.parametrize("name", [*SPM, *BPE])
def test_llama_cpp_reads_the_same(write, name):
    import test_llama  # noqa: F401  skips where there is no llama.cpp

    path = write(name)
    done, k = in_child(theirs, path), load(path).tokenizer
    assert done.kind == "ok", done
    told = done.value
    assert told["special"] == (k.bos, k.eos, k.add_bos) and told["ends"] == k.end
    by_name = name in ("no types", "all normal", "bytes typed normal")
    for i, piece in enumerate(told["pieces"]):  # where bytes have lost their types it writes <0x0A>, we a line end
        assert k.bytes(i) == piece or (by_name and piece.startswith(b"<0x") and len(k.bytes(i)) == 1), (i, piece)
    for line in TEXTS:
        for special in (True, False):
            for bos in (True, False):
                assert k.encode(line, None if bos else False, special) == told[line, bos, special], (line, bos, special)
            if not by_name and name not in BPE:
                ids = told[line, False, special]
                assert k.decode(ids).encode() == told[line, "text", special], (line, special)
