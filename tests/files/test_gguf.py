"""Reading GGUF: what is read equals what gguf-py reads, and what is hostile gets one line of error."""
import os
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import TYPES, command, nobody
from rawgguf import Raw, string
from tiny import write_gguf

import tinymia


@pytest.fixture(scope="module")
def raw(tiny):
    return Raw.read(tiny())


def refused(path, *words, run=False):
    """The error: one line, of the module's own kind, that names the file and all of `words` (case aside)."""
    with pytest.raises(tinymia.Error) as e:
        model = tinymia.load(path, threads=1)
        if run:
            model.run([1, 5, 300])
    text = str(e.value)
    assert "\n" not in text and len(text) < 500, text
    for word in words:
        assert word.lower() in text.lower(), f"{word!r} is not named in: {text}"
    return text


# ------------------------------------------------------------------------------------------------ equal to gguf-py


@pytest.mark.parametrize("wtype", TYPES)
def test_tensors_are_those_of_gguf_py(tiny, load, wtype):
    weights, reader = load(wtype=wtype).weights, gguf.GGUFReader(tiny(wtype=wtype))
    assert set(weights) == {t.name for t in reader.tensors}
    for t in reader.tensors:
        w = weights[t.name]
        assert (w.name, w.type_name) == (t.name, t.tensor_type.name) and w.shape == tuple(map(int, reversed(t.shape)))
        assert np.asarray(w.raw).tobytes() == t.data.tobytes()
        want = gguf.quants.dequantize(t.data, t.tensor_type)
        got = w.numpy()
        assert got.dtype == np.float32 and got.shape == w.shape
        np.testing.assert_array_equal(got, want)        # bit for bit: the formats leave nothing to choose


def test_weights_are_used_where_they_lie(model):
    w = model.weights["blk.0.ffn_up.weight"]
    assert not np.asarray(w.raw).flags.writeable and not np.asarray(w.raw).flags.owndata
    w.numpy()[:] = 0                                                     # a copy: nobody else sees this
    assert w.numpy().any()


def test_the_config_is_read_from_the_metadata(load):
    c = load(n_embd=96, n_layer=3, n_head=6, n_head_kv=2, n_ff=80, n_vocab=397, eps=1e-3, rope_base=5e5, rope_scale=4,
             n_ctx=77,
             n_rot=8, d_head=12, d_head_v=20).config
    got = (c.n_embd, c.n_layer, c.n_head, c.n_head_kv, c.n_ff, c.n_vocab, c.n_ctx, c.ropes[0].n_rot, c.d_head,
           c.d_head_v)
    assert got == (96, 3, 6, 2, 80, 397, 77, 8, 12, 20)
    assert c.eps == pytest.approx(1e-3) and c.ropes[0].base == pytest.approx(5e5)
    assert c.ropes[0].scale == pytest.approx(0.25)                       # what positions are multiplied by


def test_head_sizes_default_to_a_share_of_n_embd(tiny):
    c = tinymia.load(tiny(n_embd=64, n_head=4, meta={"llama.attention.head_count_kv": None}, n_head_kv=4)).config
    assert (c.n_head_kv, c.d_head, c.d_head_v) == (4, 16, 16)
    # key_length alone leaves values as they were (llama-model.cpp: n_embd_head_v is n_embd / n_head by default)
    assert tinymia.load(tiny(n_embd=64, n_head=4, d_head=24)).config.d_head_v == 16


def test_files_of_version_2_are_read(load):
    a, b = load(version=2), load()
    np.testing.assert_array_equal(a.run([1, 5, 300]).logits, b.run([1, 5, 300]).logits)


def test_an_alignment_of_64_is_read(raw, tmp_path, model):
    g = raw.set("general.alignment", 4, 64)
    g.alignment, data = 64, b""
    for t in g.tensors:
        size = int(np.prod(t.dims)) * 4
        old = raw.where(t.name).offset
        t.offset, data = len(data), data + raw.data[old:old + size] + bytes(-size % 64)
    g.data = data
    got = tinymia.load(g.write(tmp_path / "a.gguf"))
    np.testing.assert_array_equal(got.run([1, 5, 300]).logits, model.run([1, 5, 300]).logits)


@pytest.mark.parametrize("kind,value", [(0, 3), (1, -3), (2, 3), (3, -3), (4, 3), (5, -3), (6, 0.5), (7, True),
                                        (8, "é"), (10, 3),
                                        (11, -3), (12, 0.5), (9, (8, ["a", "b"])), (9, (4, [1, 2])), (9, (12, [])),
                                        (9, (7, [True]))])
def test_metadata_of_every_kind_is_stepped_over(raw, tmp_path, kind, value):
    g = raw.copy()
    g.kv.insert(3, ("test.key", kind, value))
    assert tinymia.load(g.write(tmp_path / "a.gguf")).config.n_embd == 64


def test_numbers_of_another_width_are_the_same_numbers(raw, tmp_path):
    g = raw.set("llama.block_count", 10, 2).set("llama.rope.freq_base", 12, 10000.0).set("llama.embedding_length", 5,
                                                                                         64)
    assert tinymia.load(g.write(tmp_path / "a.gguf")).config.n_layer == 2


def test_harmless_tensors_do_no_harm(raw, tmp_path, model):
    g = raw.copy()
    g.tensors.append(type(g.tensors[0])("blk.0.attn_rot_embd.weight", (8,), 0, len(g.data)))
    g.data += bytes(32)
    got = tinymia.load(g.write(tmp_path / "a.gguf"))
    np.testing.assert_array_equal(got.run([1, 5]).logits, model.run([1, 5]).logits)


def test_a_large_vocabulary_opens_fast(raw, tmp_path):
    """Llama-3's 128,256 tokens and 280,147 merges: gguf-py takes eight seconds to open them."""
    n = 128_256
    tokens = next(v for k, _, v in raw.kv if k == "tokenizer.ggml.tokens")[1]
    tokens = tokens + [f"▁w{i}" for i in range(n - len(tokens))]
    types = next(v for k, _, v in raw.kv if k == "tokenizer.ggml.token_type")[1]
    g = raw.set("tokenizer.ggml.tokens", 9, (8, tokens))
    g = g.set("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, n) + np.arange(0, -n, -1, np.float32).tobytes())
    g = g.set("tokenizer.ggml.token_type", 9, struct.pack("<IQ", 5, n)
              + np.array(types + [1] * (n - len(types)), np.int32).tobytes())
    merges = [string(f"m{i} x{i}") for i in range(280_147)]
    g = g.set("tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, len(merges)) + b"".join(merges))
    g = g.set("llama.vocab_size", 4, n)
    for name in ("token_embd.weight", "output.weight"):
        g = g.tensor(name, dims=(64, n), kind=1, offset=len(g.data))
        g.data += bytes(n * 64 * 2)
    model = tinymia.load(g.write(tmp_path / "a.gguf"))
    assert model.config.n_vocab == n and model.piece(n - 1) == f" w{n - 1 - len(types)}"


# ------------------------------------------------------------------------------------------------ not a model at all


def test_what_is_no_model(tmp_path):
    refused(tmp_path / "absent.gguf", "absent.gguf")
    refused(tmp_path, tmp_path.name)
    for content, word in ((b"", "empty"), (b"GGUF", "ends"), (b"PK\x03\x04" * 99, "not a GGUF"),
                          (b"GGUF" + b"\xff" * 99, "version"),
                          (b"\x93NUMPY" + b"\0" * 99, "not a GGUF"), (b"ggjt" + struct.pack("<I", 3) * 9, "not a GGUF"),
                          (b"GG", "GGUF")):
        f = tmp_path / "f.gguf"
        f.write_bytes(content)
        refused(f, "f.gguf", word)


def test_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "pipe", "regular file")


def test_a_file_without_permission_is_refused(tiny, tmp_path):
    f = tmp_path / "f.gguf"
    f.write_bytes(Path(tiny()).read_bytes())
    f.chmod(0)
    with nobody():
        refused(f, "f.gguf", "permission")


def test_other_versions_are_refused(raw, tmp_path):
    f = tmp_path / "f.gguf"
    for version, word in ((1, "version 1"), (4, "version 4"), (0, "version 0"), (3 << 24, "big-endian")):
        g = raw.copy()
        g.version = version
        refused(g.write(f), word, "2 and 3")
    refused(raw.write(f, magic=b"FUGG"), "not a GGUF")
    write_gguf(f)                                                         # a big-endian file as gguf-py writes it
    w = gguf.GGUFWriter(f, "llama", endianess=gguf.GGUFEndian.BIG)
    w.add_context_length(64)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    refused(f, "big-endian")


# ------------------------------------------------------------------------------------------------ truncated


def test_a_file_that_is_cut_anywhere_is_refused(raw, tmp_path):
    """The cuts are at every border between two parts, and one byte before and after it."""
    whole, f = raw.bytes(), tmp_path / "f.gguf"
    cuts = sorted({c for m in raw.marks for c in (m - 1, m, m + 1) if 0 < c < len(whole)})
    assert len(cuts) > 300
    for cut in cuts:
        f.write_bytes(whole[:cut])
        refused(f, "f.gguf")


# ------------------------------------------------------------------------------------ counts, lengths, offsets

HUGE = [2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("n", [0, *HUGE])
def test_absurd_counts_are_refused_at_once(raw, tmp_path, n):
    f = tmp_path / "f.gguf"
    refused(raw.write(f, n_tensors=n), "f.gguf")
    refused(raw.write(f, n_kv=n), "f.gguf")


def test_counts_off_by_one(raw, tmp_path):
    f = tmp_path / "f.gguf"
    refused(raw.write(f, n_tensors=len(raw.tensors) + 1), "f.gguf")
    refused(raw.write(f, n_kv=len(raw.kv) + 1), "f.gguf")
    refused(raw.write(f, n_kv=len(raw.kv) - 1), "f.gguf")


@pytest.mark.parametrize("n", HUGE)
def test_absurd_lengths_are_refused_at_once(raw, tmp_path, n):
    f, key = tmp_path / "f.gguf", "test.key"
    n = struct.pack("<Q", n)
    refused(raw.set(key, 8, n + b"abc").write(f), "f.gguf")                              # a string
    for kind in (0, 4, 7, 8, 9, 12):
        refused(raw.set(key, 9, struct.pack("<I", kind) + n).write(f), "f.gguf")         # an array
    g = raw.bytes().replace(string("llama.block_count"), n + b"llama.block_count")       # a key
    f.write_bytes(g)
    refused(f, "f.gguf")
    f.write_bytes(raw.bytes().replace(string("blk.1.attn_q.weight"), n + b"blk.1.attn_q.weight"))
    refused(f, "f.gguf")


@pytest.mark.parametrize("n", [0, 5, 255, 2**31, 2**32 - 1])
def test_absurd_number_of_dimensions(raw, tmp_path, n):
    refused(raw.tensor("blk.1.attn_q.weight", n_dims=n).write(tmp_path / "f.gguf"), "f.gguf")


@pytest.mark.parametrize("dims", [(0, 64), (64, 0), (64, 2**63), (2**64 - 1, 64), (2**32, 2**32), (2**31, 2**33),
                                  (63, 64), (64, 63),
                                  (4096,), (64, 64, 2), (2**16,) * 4, (32, 128), (64, 65)])
def test_absurd_dimensions_are_refused_at_once(raw, tmp_path, dims):
    """Products that wrap around 2^64 among them."""
    refused(raw.tensor("blk.1.attn_q.weight", dims=dims).write(tmp_path / "f.gguf"), "blk.1.attn_q.weight")


@pytest.mark.parametrize("offset", [1, 31, 33, 2**63, 2**64 - 32, 2**64 - 1, 2**40, 2**33])
def test_absurd_offsets_are_refused_at_once(raw, tmp_path, offset):
    refused(raw.tensor("blk.1.attn_q.weight", offset=offset).write(tmp_path / "f.gguf"), "blk.1.attn_q.weight")


def test_last_tensor_ends_with_the_file(raw, tmp_path):
    last = max(raw.tensors, key=lambda t: t.offset)
    refused(raw.tensor(last.name, offset=last.offset + 32 * 9).write(tmp_path / "f.gguf"), last.name)


def test_tensors_that_overlap_are_refused(raw, tmp_path):
    for other in ("blk.0.attn_k.weight", "token_embd.weight"):
        for shift in (0, 32):
            g = raw.tensor("blk.1.attn_k.weight", offset=raw.where(other).offset + shift)
            refused(g.write(tmp_path / "f.gguf"), "overlap", "attn_k" if "attn_k" in other else "token_embd")


def test_a_name_that_comes_twice_is_refused(raw, tmp_path):
    g = raw.copy()
    g.tensors.append(g.tensors[3])
    refused(g.write(tmp_path / "f.gguf"), g.tensors[3].name)
    g = raw.copy()
    g.where("blk.1.attn_k.weight").name = "blk.0.attn_k.weight"
    refused(g.write(tmp_path / "f.gguf"), "blk.0.attn_k.weight", "twice")
    g = raw.copy()
    g.kv.append(("llama.block_count", 4, 1))
    refused(g.write(tmp_path / "f.gguf"), "llama.block_count", "twice")


@pytest.mark.parametrize("n", [0, 1, 7, 33, 2**31, 2**32 - 1])
def test_absurd_alignments_are_refused_at_once(raw, tmp_path, n):
    refused(raw.set("general.alignment", 4, n).write(tmp_path / "f.gguf"), "f.gguf")


@pytest.mark.parametrize("kind", [13, 255, 2**31, 2**32 - 1])
def test_unknown_kinds_of_value(raw, tmp_path, kind):
    refused(raw.set("test.key", kind, bytes(8)).write(tmp_path / "f.gguf"), "test.key")
    refused(raw.set("test.key", 9, struct.pack("<IQ", kind, 1) + bytes(8)).write(tmp_path / "f.gguf"), "test.key")


def test_nested_arrays_do_not_recurse_forever(raw, tmp_path):
    refused(raw.set("test.key", 9, struct.pack("<IQ", 9, 1) * 20_000).write(tmp_path / "f.gguf"), "test.key")


# ------------------------------------------------------------------------------------------------ wrong metadata

REQUIRED = ["general.architecture", "llama.embedding_length", "llama.block_count", "llama.feed_forward_length",
            "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon", "llama.context_length",
            "tokenizer.ggml.model", "tokenizer.ggml.tokens"]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(raw, tmp_path, key):
    f = tmp_path / "f.gguf"
    refused(raw.drop(key).write(f), key)
    refused(raw.set(key, 9, (4, [1, 2, 3])).write(f), key)
    refused(raw.set(key, 7, True).write(f), key)
    if key.startswith("llama."):
        refused(raw.set(key, 8, "64").write(f), key)


@pytest.mark.parametrize("key", [k for k in REQUIRED if k.startswith("llama.") and "epsilon" not in k])
def test_sizes_out_of_range(raw, tmp_path, key):
    f = tmp_path / "f.gguf"
    for kind, value in ((4, 0), (5, -1), (5, -64), (4, 2**32 - 1), (10, 2**64 - 1), (10, 2**63)):
        refused(raw.set(key, kind, value).write(f), "f.gguf")


@pytest.mark.parametrize("key,kind,value", [
    ("llama.attention.head_count", 4, 3), ("llama.attention.head_count", 4, 2**31 - 1),
                                            ("llama.attention.head_count_kv", 4, 3),
    ("llama.attention.head_count_kv", 4, 0), ("llama.attention.head_count_kv", 4, 8),
                                            ("llama.attention.key_length", 4, 0),
    ("llama.attention.key_length", 4, 2**31), ("llama.attention.value_length", 4, 0),
                                            ("llama.attention.key_length", 8, "x"),
    ("llama.rope.dimension_count", 4, 0), ("llama.rope.dimension_count", 4, 15), ("llama.rope.dimension_count", 4, 18),
    ("llama.rope.dimension_count", 4, 2**31), ("llama.rope.freq_base", 6, 0.0),
                                            ("llama.rope.freq_base", 6, float("nan")),
    ("llama.rope.freq_base", 6, float("inf")), ("llama.rope.freq_base", 6, -1.0), ("llama.rope.freq_base", 8, "x"),
    ("llama.attention.layer_norm_rms_epsilon", 6, float("nan")), ("llama.attention.layer_norm_rms_epsilon", 6, -1.0),
    ("llama.attention.layer_norm_rms_epsilon", 6, float("inf")), ("llama.rope.scaling.factor", 6, float("nan")),
    ("llama.rope.scaling.factor", 6, -2.0), ("llama.rope.scaling.type", 8, "longrope"),
    ("llama.rope.scaling.type", 4, 1),
    ("llama.expert_count", 4, 8), ("general.architecture", 8, ""), ("general.architecture", 8, "llama\0"),
])
def test_a_wrong_value_is_named(raw, tmp_path, key, kind, value):
    text = refused(raw.set(key, kind, value).write(tmp_path / "f.gguf"), "f.gguf")
    if value == "longrope":
        assert "longrope" in text and "linear" in text and "yarn" in text


@pytest.mark.parametrize("arch", ["qwen2moe", "gpt2", "mamba", "clip"])
def test_other_architectures_are_refused_by_name(tiny, arch):
    refused(tiny(arch=arch), f"{arch}", "supported: llama")


# ------------------------------------------------------------------------------------------------ wrong tensors

WEIGHTS = ["token_embd", "output_norm", *(f"blk.1.{n}" for n in ("attn_norm", "attn_q", "attn_k", "attn_v",
                                                                 "attn_output", "ffn_norm",
                                                                 "ffn_gate", "ffn_up", "ffn_down"))]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_missing_tensor_is_named(raw, tmp_path, name):
    refused(raw.drop(name + ".weight").write(tmp_path / "f.gguf"), name + ".weight", "missing")


@pytest.mark.parametrize("name", [*WEIGHTS, "output"])
def test_a_wrong_shape_is_named(raw, tmp_path, name):
    t = raw.where(name + ".weight")
    less = (*t.dims[:-1], t.dims[-1] - 2)
    refused(raw.tensor(t.name, dims=less).write(tmp_path / "f.gguf"), "f.gguf")
    refused(raw.tensor(t.name, dims=(t.dims[0] // 2, *t.dims[1:])).write(tmp_path / "f.gguf"), "f.gguf")
    if len(t.dims) == 2 and t.dims[0] != t.dims[1]:
        refused(raw.tensor(t.name, dims=t.dims[::-1]).write(tmp_path / "f.gguf"), "f.gguf")
    refused(raw.tensor(t.name, dims=(1, int(np.prod(t.dims)))).write(tmp_path / "f.gguf"), t.name)


def test_wrong_shape_of_rope_freqs_and_biases(tiny, tmp_path):
    g = Raw.read(tiny(rope_freqs=True, bias=True, seed=7))
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.ffn_down.bias"):
        n, = g.where(name).dims
        refused(g.tensor(name, dims=(n // 2,)).write(tmp_path / "f.gguf"), name)


@pytest.mark.parametrize("kind", [99, 4, 5, 2**31, 2**32 - 1, 24, 27])
def test_unsupported_types_name_tensor_and_type(raw, tmp_path, kind):
    text = refused(raw.tensor("blk.1.ffn_up.weight", kind=kind).write(tmp_path / "f.gguf"), "blk.1.ffn_up.weight")
    known = {t.value: t.name for t in gguf.GGMLQuantizationType}
    assert known.get(kind, str(kind)) in text and "Q4_0" in text and "BF16" in text            # and what is supported


def test_type_of_another_size_does_not_fit(raw, tmp_path):
    """A quantised type on data that is shorter or longer than it says."""
    refused(raw.tensor("token_embd.weight", kind=0, dims=(64, 384 * 64)).write(tmp_path / "f.gguf"),
            "token_embd.weight")
    refused(raw.tensor("blk.1.ffn_up.weight", kind=2, dims=(65, 96)).write(tmp_path / "f.gguf"), "blk.1.ffn_up.weight")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight", "output.weight"])
def test_weights_that_are_no_numbers(tmp_path, name, bad):
    def spoil(n, x):
        if n == name:
            x[..., 3] = bad
        return x

    refused(write_gguf(tmp_path / "f.gguf", spoil=spoil), run=True)


# ------------------------------------------------------------------------------------------------ wrong vocabularies


def test_a_wrong_vocabulary_is_refused(raw, tmp_path):
    f = tmp_path / "f.gguf"
    value = {k: v for k, _, v in raw.kv}
    tokens, scores, types = (value["tokenizer.ggml." + k][1] for k in ("tokens", "scores", "token_type"))
    refused(raw.set("tokenizer.ggml.tokens", 9, (8, [])).write(f), "f.gguf")
    refused(raw.set("tokenizer.ggml.tokens", 9, (8, [])).set("tokenizer.ggml.scores", 9, (6, []))
            .set("tokenizer.ggml.token_type", 9, (5, [])).write(f), "f.gguf")
    refused(raw.set("tokenizer.ggml.tokens", 9, (8, tokens[:-1])).write(f), "f.gguf")
    refused(raw.set("tokenizer.ggml.scores", 9, (6, scores[:-1])).write(f), "f.gguf")
    refused(raw.set("tokenizer.ggml.token_type", 9, (5, types[:-1])).write(f), "f.gguf")
    refused(raw.set("tokenizer.ggml.tokens", 8, "abc").write(f), "tokenizer.ggml.tokens")
    refused(raw.set("tokenizer.ggml.scores", 8, "abc").write(f), "tokenizer.ggml.scores")
    refused(raw.set("tokenizer.ggml.scores", 9, (8, tokens)).write(f), "tokenizer.ggml.scores")
    refused(raw.set("tokenizer.ggml.model", 8, "nonsense").write(f), "tokenizer.ggml.model", "nonsense")
    for k in ("bos", "eos", "unknown"):
        for kind, v in ((5, -1), (8, "x"), (6, 1.0), (7, True), (9, (4, [1]))):
            refused(raw.set(f"tokenizer.ggml.{k}_token_id", kind, v).write(f), f"{k}_token_id")


def test_odd_vocabularies_still_load(raw, tmp_path):
    """Empty, double and broken pieces, scores that are no numbers, unknown types: files in the wild have them."""
    value = {k: v for k, _, v in raw.kv}
    tokens, types = (list(value["tokenizer.ggml." + k][1]) for k in ("tokens", "token_type"))
    tokens[-1], tokens[-2], tokens[-3] = "", tokens[-4], "\0"
    types[-5] = 77
    g = raw.set("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, len(tokens)) + b"".join(map(string, tokens[:-6]))
                + string(b"\xff\xfe") + b"".join(map(string, tokens[-5:])))
    model = tinymia.load(g.set("tokenizer.ggml.token_type", 9, (5, types)).write(tmp_path / "f.gguf"))
    assert model.tokenize("the fox")[0] == 1


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "x" * 10_000, "\r\0\t", "a\u2028b", "\u202eabc"], ids=ascii)
def test_hostile_names_make_one_short_line(raw, tmp_path, name):
    """Names from a file are printed without line ends and terminal escapes, and are cut."""
    info, f = type(raw.tensors[0]), tmp_path / "f.gguf"
    end = len(raw.data) + 32 * 99
    files = [raw.set(name, 13, b""), raw.set(name, 9, struct.pack("<IQ", 4, 2**60))]
    for key in ("general.architecture", "tokenizer.ggml.model", "llama.rope.scaling.type"):
        files.append(raw.set(key, 8, name))
    files += [raw.copy(), raw.copy()]
    files[-1].kv += [(name, 4, 1)] * 2
    files[-2].tensors.append(info(name, (64,), 0, end))
    for dims, kind in (((0,), 0), ((64,), 99), ((63,), 2), ((1, 1, 1, 1, 1), 0)):
        files.append(raw.copy())
        files[-1].tensors.append(info(name, dims, kind, 0))
    for g in files:
        text = refused(g.write(f), "f.gguf")
        assert text.isprintable(), repr(text)


def test_the_command_says_it_in_one_line(tmp_path):
    (tmp_path / "f.gguf").write_bytes(b"PK\x03\x04" * 99)
    code, out, err = command("-m", tmp_path / "f.gguf", "-p", "x")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and "f.gguf" in err


def test_every_mutant_is_an_error_or_a_model(raw, tmp_path):
    """The same mutants as the fuzzer's, in this process: an Error or a model, nothing else."""
    from conftest import SHARED

    if not (SHARED / "tools" / "fuzz_gguf.py").exists():
        pytest.skip("needs tools/fuzz_gguf.py of the folder `shared` beside the project")
    sys.path.insert(0, str(SHARED / "tools"))
    import random

    from fuzz_gguf import mutate

    whole, f, rng, loaded = raw.bytes(), tmp_path / "f.gguf", random.Random(1), 0
    for i in range(400):
        f.write_bytes(mutate(whole, rng, 20_000 if i % 2 else 8_000))
        try:
            loaded += bool(tinymia.load(f, threads=1))
        except tinymia.Error as e:
            assert "\n" not in str(e)
    assert loaded < 400
