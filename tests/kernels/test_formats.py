"""The promises of superblock formats, of quantised activations, and of types without kernels."""

import ctypes
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from formats import MANY, as_activation, halves, quantise_k, random_bytes, random_weights
from test_kernels import run_python

import tinymia_kernels as tk
from tinymia_files import decode, decode_now, read_gguf, types
from tinymia_kernels.machine import cpu
from tinymia_kernels.products import activations, superblocks_many

SUPERBLOCKS = [fmt for fmt in tk.FORMATS.values() if fmt.activation == "Q8_K"]
DECODED = [types.decodable(gguf.GGMLQuantizationType[name]) for name in (*decode.TABLES, "NVFP4")]
names = {"ids": lambda fmt: fmt.name}


@pytest.fixture
def rng():
    return np.random.default_rng(20240117)


# Activations.


def odd_activations(rng):
    """Rows of 512 with what rounding, signs, zeros and extreme numbers may get wrong."""
    x = (rng.standard_normal((40, 512)) * 10.0 ** rng.integers(-6, 7, (40, 1))).astype(np.float32)
    x[1] = 0
    x[2, 256:] = 0
    x[3, :256] = np.arange(256) % 127 + 0.5  # between two quants
    x[3, 0] = -127
    x[4, :256] = np.where(np.arange(256) % 2, 1, -1)  # the first of those as far from zero decides the sign
    x[5, :256] = np.where(np.arange(256) % 2, -1, 1)
    x[6] = 1e-40  # 127 / x is inf
    x[7] = 3e38 * np.sign(x[7])
    x[8] = -0.0
    return x


def records_of(y, n_tok, n_blocks):
    """q [n_tok, n_blocks, 256], b [..., 16], s [..., 8], d [..., 4], c [..., 64] of Q8_K records."""
    start = -y.ctypes.data % 64
    records = y[start : start + n_tok * n_blocks * 576].reshape(n_tok, n_blocks, 576)
    parts = (0, 256, np.int8), (256, 288, np.int16), (288, 304, np.int16), (304, 320, np.float32), (320, 576, np.int32)
    return [np.ascontiguousarray(records[..., a:b]).view(dtype) for a, b, dtype in parts]


def quantise_here(x, bias=0):
    y, stride = activations.new_records_k(len(x), x.shape[1])
    assert stride == 576 * x.shape[1] // 256
    activations.quantise_q8_k(x, y, bias, 0, len(x))
    return y


def test_superblocks_of_activations_are_those_of_ggml(rng):
    x = odd_activations(rng)
    q, b, s, d, c = records_of(quantise_here(x, 4), 40, 2)
    want, scale = quantise_k(x)
    assert np.array_equal(q, want) and q.min() >= -127
    assert np.array_equal(d, np.repeat(scale[..., None], 4, -1))
    for part, n, factor in ((b, 16, 1), (s, 32, 1), (c, 4, -4)):
        assert np.array_equal(part, factor * want.reshape(40, 2, -1, n).sum(-1))


def test_a_nan_among_activations_is_not_lost():
    x = np.ones((1, 512), np.float32)
    x[0, 300] = np.nan
    d = records_of(quantise_here(x), 1, 2)[3]
    assert np.array_equal(np.isnan(d[0, :, 0]), [False, True])


def test_panels_hold_the_records_with_a_token_in_each_lane(rng):
    x = rng.standard_normal((19, 512)).astype(np.float32)
    y = quantise_here(x)
    q, b, _, d, _ = records_of(y, 19, 2)
    room = np.full(superblocks_many.superblock_panel_bytes(19, 512), 7, np.uint8)
    superblocks_many.fill_superblock_panels(y, 19, 2, room, 0, 2)
    start = -room.ctypes.data % 64
    blocks = room[start : start + 2 * 2 * 4672].reshape(2, 2, 4672)  # panel, superblock, byte
    for t in range(32):
        panel, lane = blocks[t // 16], t % 16
        quants = panel[..., :4096].reshape(2, 64, 16, 4)[:, :, lane].copy().view(np.int8).reshape(2, 256)
        sums = panel[..., 4096:4608].reshape(2, 8, 16, 4)[:, :, lane].copy().view(np.int16).reshape(2, 16)
        scales = panel[..., 4608:].copy().view(np.float32)[:, lane]
        if t < 19:
            assert np.array_equal(quants, q[t]) and np.array_equal(sums, b[t]) and np.array_equal(scales, d[t, :, 0])
        else:
            assert not quants.any() and not sums.any() and not scales.any()


# Dot products, also with factors that no sane file has.


@pytest.mark.parametrize("fmt", SUPERBLOCKS, **names)
def test_a_superblock_of_the_largest_numbers_does_not_overflow(fmt, rng):
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        raw = np.full(3 * fmt.type_size, fill, np.uint8)
        for at in halves(fmt):
            for block in range(3):
                raw[block * fmt.type_size + at :][:2] = 0x00, 0x3C
        weights = gguf.dequantize(raw, gguf.GGMLQuantizationType(fmt.type)).reshape(1, 768).astype(np.float64)
        x = np.where(rng.integers(0, 2, (MANY + 1, 768)), np.float32(1), np.float32(-1))
        x[0] = 1
        want = as_activation(x, "Q8_K") @ weights.T
        for n_tok in (1, 4, MANY + 1):
            got = tk.matmul(x[:n_tok], raw, fmt, 1)
            assert np.abs(got - want[:n_tok]).max() <= 3e-7 * np.abs(weights).sum()


@pytest.mark.parametrize("fmt", SUPERBLOCKS, **names)
def test_rows_that_are_no_multiple_of_four_and_tokens_of_sixteen(fmt, rng):
    raw, _ = random_weights(fmt, rng, 9, 512)
    x = rng.standard_normal((33, 512)).astype(np.float32)
    whole = tk.matmul(x, raw, fmt, 9)
    for n_out, n_tok in ((1, 33), (3, 8), (6, 17), (9, 32)):
        some = tk.matmul(x[:n_tok], raw[: n_out * fmt.row_bytes(512)], fmt, n_out)
        assert np.array_equal(some, whole[:n_tok, :n_out])


# Types without kernels.


@pytest.mark.parametrize("fmt", DECODED, **names)
def test_decoded_weights_equal_gguf(fmt, rng, monkeypatch):
    n_rows, n_in = 21, 512
    monkeypatch.setattr(decode, "SLICE", 4 * n_in)  # several slices, the last not full
    raw = random_bytes(fmt, rng, n_rows, n_in)
    with np.errstate(all="ignore"):
        want = gguf.dequantize(raw, gguf.GGMLQuantizationType(fmt.type))
    kept, decoded = decode.decode(raw.reshape(-1), fmt, n_rows, n_in)
    assert (kept.name, kept.type) == (fmt.name, fmt.type) and not decoded.flags.writeable
    got = tk.dequantize(decoded, kept, n_rows, n_in)
    if fmt.name in decode.TABLES:
        assert np.array_equal(got, want) and kept.type_size == 276
    else:
        assert np.array_equal(got, want.astype(np.float16))
    x = rng.standard_normal((MANY + 1, n_in)).astype(np.float32)
    for n_tok in (2, MANY + 1):
        y = as_activation(x[:n_tok], "Q8_K" if fmt.block_size == 256 else "Q8_0")
        for numerics, seen in (("ggml", y), ("f32", x[:n_tok].astype(np.float64))):
            product = tk.matmul(x[:n_tok], decoded, kept, n_rows, numerics)
            scale = np.linalg.norm(x, axis=1).max() * np.linalg.norm(got, axis=1).max()
            assert np.abs(product - seen @ got.astype(np.float64).T).max() < 1e-6 * scale


def test_numbers_too_large_for_f16_become_f32():
    fmt = tk.FORMATS[2]  # Q4_0: quants of up to 7 times d
    raw = np.zeros((3, 2 * 18), np.uint8)
    raw[2, :2] = np.array([60000], np.float16).view(np.uint8)
    kept, decoded = decode.decode(raw.reshape(-1), fmt, 3, 64)
    assert kept.type_size == 4 and tk.dequantize(decoded, kept, 3, 64)[2, 0] == -8 * np.float32(np.float16(60000))


def test_activations_are_checked_beside_plain_numbers():
    fmt, _ = decode.decode(np.zeros(36, np.uint8), tk.FORMATS[2], 1, 64)
    with pytest.raises(ValueError, match="rows of 65 weights: Q4_0 rows are multiples of 32 weights"):
        tk.matmul(np.zeros((1, 65), np.float32), np.zeros(130, np.uint8), fmt, 1)


def test_a_file_with_a_decoded_type(rng, tmp_path, capsys):
    path, fmt = tmp_path / "some.gguf", DECODED[3]
    raw = random_bytes(fmt, rng, 3, 512)
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("a", "b"):
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(fmt.type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_gguf(path)[1]
    tensor = tensors["a"]
    assert capsys.readouterr().err == ""  # nobody needs it yet
    decode_now(path, [tensor])
    assert capsys.readouterr().err == f"tinymia: {path}: decoding 1 tensors of type IQ2_XS to bytes: 0.0 MB of memory\n"
    assert "stored" in vars(tensor) and "stored" not in vars(tensors["b"])
    tensor = tensors["b"]
    assert (tensor.type_name, tensor.shape) == ("IQ2_XS", (3, 512)) and "stored" not in vars(tensor)
    assert np.array_equal(tensor.numpy(), gguf.dequantize(raw, gguf.GGMLQuantizationType(fmt.type)))
    assert tensor.stored is tensor.stored and tensor.stored.fmt.name == tensor.type_name == "IQ2_XS"


def test_types_that_nobody_decodes():
    for kind in (4, 15, 24, 26, 36, 999):  # removed, Q8_K, I8, I32, removed, unknown
        assert types.decodable(kind) is None


def test_the_cost_of_decoding_is_one_line(capsys):
    decode.say_cost(Path("a.gguf"), [(DECODED[0], 256000), (DECODED[1], 256000)])
    said = "decoding 2 tensors of type IQ1_M, IQ1_S to bytes: 0.6 MB of memory"
    assert capsys.readouterr().err == f"tinymia: a.gguf: {said}\n"
    decode.say_cost(Path("a.gguf"), [])
    assert capsys.readouterr().err == ""


# Beside ggml itself, where llama-cpp-python is installed: the same bits.


vnni = pytest.mark.skipif(not cpu.HAS_VNNI, reason="needs a CPU with AVX-512 VNNI: sums are in the order of its code")


def ggml():
    llama_cpp = pytest.importorskip("llama_cpp", exc_type=ImportError,
                                    reason="needs llama.cpp: pip install 'tinymia[verify]'")
    folder = Path(llama_cpp.__file__).parent / "lib"
    try:
        ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        lib = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        lib.ggml_cpu_init()
        return lib
    except (OSError, AttributeError):
        pytest.skip("needs a llama.cpp whose libraries show ggml's functions, as its Linux wheels do")


def at(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def test_activations_equal_ggml_bit_for_bit(rng):
    x, lib = odd_activations(rng), ggml()
    q, b, _, d, _ = records_of(quantise_here(x), 40, 2)
    theirs = np.zeros((40, 2, 292), np.uint8)
    lib.quantize_row_q8_K(at(x), at(theirs), ctypes.c_int64(x.size))
    scale = theirs[..., :4].copy().view(np.float32)
    assert np.array_equal(q, theirs[..., 4:260].copy().view(np.int8)) and np.array_equal(d[..., :1], scale)
    set_by_ggml = scale[..., 0] != 0  # ggml leaves the sums of a group of zeros as they were
    assert np.array_equal(b[set_by_ggml], theirs[..., 260:].copy().view(np.int16)[set_by_ggml])


@vnni
@pytest.mark.parametrize("fmt", [*SUPERBLOCKS, tk.FORMATS[39], *DECODED[2:7]], **names)
def test_dot_products_equal_ggml_bit_for_bit(fmt, rng):
    lib, n_in, n_out = ggml(), 1280, 11
    name = fmt.name.lower().replace("_k", "_K") + ("_q8_K" if fmt.block_size == 256 else "_q8_0")
    dot, quantise = getattr(lib, "ggml_vec_dot_" + name), getattr(lib, "quantize_row_" + name[-4:])
    raw, _ = random_weights(fmt, rng, n_out, n_in)
    x = rng.standard_normal((MANY - 1, n_in)).astype(np.float32)
    want, one, y = np.zeros((len(x), n_out), np.float32), ctypes.c_float(), np.zeros(2048, np.uint8)
    for t in range(len(x)):
        quantise(at(x[t]), at(y), ctypes.c_int64(n_in))
        for i in range(n_out):
            row = np.ascontiguousarray(raw.reshape(n_out, -1)[i])
            dot(n_in, ctypes.byref(one), ctypes.c_size_t(0), at(row), ctypes.c_size_t(0), at(y), ctypes.c_size_t(0), 1)
            want[t, i] = one.value
    if not isinstance(fmt, tk.Format):
        fmt, raw = decode.decode(raw, fmt, n_out, n_in)
    assert np.array_equal(tk.matmul(x, raw, fmt, n_out), want)


@vnni
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 8, 10, 11, 13])
def test_iq4_nl_with_one_token_equals_ggml_bit_for_bit(groups, rng):
    lib, fmt, n_in, one = ggml(), tk.FORMATS[20], 32 * groups, ctypes.c_float()
    raw, _ = random_weights(fmt, rng, 11, n_in)
    x, y, want = rng.standard_normal((1, n_in)).astype(np.float32), np.zeros(2048, np.uint8), []
    lib.quantize_row_q8_0(at(x), at(y), ctypes.c_int64(n_in))
    for row in raw.reshape(11, -1):
        args = ctypes.byref(one), ctypes.c_size_t(0), at(row.copy()), ctypes.c_size_t(0), at(y), ctypes.c_size_t(0), 1
        lib.ggml_vec_dot_iq4_nl_q8_0(n_in, *args)
        want.append(one.value)
    assert tk.matmul(x, raw, fmt, 11)[0].tolist() == want


# Other CPUs.

PROBE = """
import sys
import numpy as np
import tinymia_kernels as tk
rng = np.random.default_rng(3)
x = rng.standard_normal((9, 512)).astype(np.float32)
for kind, n_tok in ((12, 2), (20, 2), (23, 9)):  # Q4_K, IQ4_NL, IQ4_XS
    fmt = tk.FORMATS[kind]
    raw = rng.integers(0, 60, (5, 512 // fmt.block_size, fmt.type_size), dtype=np.uint8)
    raw[..., :2] = 0x11, 0x22
    sys.stdout.buffer.write(tk.matmul(x[:n_tok], raw.reshape(-1), fmt, 5).tobytes())
"""


def test_portable_instructions_give_the_same_bits(tmp_path):
    cache = os.environ.get("NUMBA_CACHE_DIR", tmp_path)
    here, plain = (run_python(PROBE, cache, TINYMIA_PORTABLE=portable)[0] for portable in "01")
    assert len(here) == 4 * 5 * (2 + 2 + 9) and here == plain
