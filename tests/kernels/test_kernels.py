"""The promises of the kernels, each beside a slow NumPy oracle."""

import gc
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from formats import MANY, as_activation, lengths, quantise, random_weights, to_bf16, to_f16
from numba.core import types
from numba.extending import intrinsic

import tinymia_kernels as tk
from tinymia_kernels.machine import cpu, jit, simd, vectors
from tinymia_kernels.machine.jit import kernel
from tinymia_kernels.products import activations

FORMATS = list(tk.FORMATS.values())
BLOCKS = [fmt for fmt in FORMATS if fmt.block_size > 1]
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
each_block = pytest.mark.parametrize("fmt", BLOCKS, ids=lambda fmt: fmt.name)
caches = pytest.mark.parametrize("dtype", [np.float16, np.float32])


@pytest.fixture
def rng():
    return np.random.default_rng(20231224)


# Oracles.


def naive_matmul(x, weights, fmt, raw, numerics):
    if numerics == "f32":
        return x.astype(np.float64) @ weights.T
    if fmt.activation != "Q8_1":
        return as_activation(x, fmt.activation) @ weights.T
    # The minimum is multiplied with the rounded sum s, not with the sum of the rounded activations.
    quants, d, s = quantise(x)
    m = raw.reshape(len(weights), -1, fmt.type_size)[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float64)
    scaled = weights.reshape(len(weights), -1, 32) - m[..., None]
    return np.einsum("tgk,igk->ti", quants * d[..., None].astype(np.float64), scaled) + s.astype(np.float64) @ m.T


def naive_attention(q, k, v, n_past, scale):
    """kq, soft_max, kqv in float64, with the rounding of F16 caches."""
    n_tok, n_head, _ = q.shape
    n_kv, shared, dtype = n_past + n_tok, n_head // len(k), k.dtype
    keys, values = (np.repeat(cache[:, :n_kv].astype(np.float64), shared, 0) for cache in (k, v))
    kq = np.einsum("thd,hjd->htj", q.astype(dtype).astype(np.float64), keys)
    hidden = np.arange(n_kv) > n_past + np.arange(n_tok)[:, None]
    e = np.exp(scale * kq - (scale * kq).max(-1, keepdims=True)) * ~hidden
    p = e / e.sum(-1, keepdims=True)
    return kq, p, np.einsum("htj,hjd->htd", p.astype(np.float32).astype(dtype).astype(np.float64), values)


# Formats.


@by_name
def test_block_sizes_are_those_of_gguf(fmt):
    kind = gguf.GGMLQuantizationType(fmt.type)
    assert (fmt.name, (fmt.block_size, fmt.type_size)) == (kind.name, gguf.GGML_QUANT_SIZES[kind])


def test_these_formats_have_kernels():
    small = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"}
    large = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0"}
    assert {fmt.name for fmt in FORMATS} == small | large
    assert all(tk.FORMATS[fmt.type] is fmt for fmt in FORMATS)


def test_a_type_is_registered_once():
    with pytest.raises(ValueError, match="ggml type 2 other is already registered as 2 Q4_0"):
        tk.register(tk.Format(name="other", type=2, block_size=32, type_size=18, activation="Q8_0"))


@each_block
def test_a_row_is_a_whole_number_of_blocks(fmt):
    assert fmt.row_bytes(2 * fmt.block_size) == 2 * fmt.type_size
    with pytest.raises(ValueError, match=f"a row of 33 weights: {fmt.name} rows are multiples of {fmt.block_size}"):
        fmt.row_bytes(33)


@by_name
def test_unpacked_weights_equal_gguf_on_random_bytes(fmt, rng):
    n_rows, n_in = 50, lengths(fmt)[-1]
    raw = rng.integers(0, 256, n_rows * fmt.row_bytes(n_in), dtype=np.uint8)
    typed = raw.reshape(n_rows, -1).view({"F32": np.float32, "F16": np.float16}.get(fmt.name, np.uint8))
    with np.errstate(all="ignore"):
        want = gguf.dequantize(typed, gguf.GGMLQuantizationType(fmt.type)).astype(np.float32).reshape(n_rows, n_in)
    got = tk.dequantize(raw, fmt, n_rows, n_in)
    assert got.dtype == np.float32 and got.shape == (n_rows, n_in)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    number = ~np.isnan(want)
    assert np.array_equal(got[number].view(np.uint32), want[number].view(np.uint32))  # bits: -0.0 is not 0.0


@by_name
def test_rows_are_picked_by_number(fmt, rng):
    raw, weights = random_weights(fmt, rng, 5, lengths(fmt)[-1])
    assert np.array_equal(tk.get_rows(raw, fmt, 5, weights.shape[1], [4, 0, 4]), weights[[4, 0, 4]].astype(np.float32))
    assert tk.get_rows(raw, fmt, 5, weights.shape[1], []).shape == (0, weights.shape[1])
    for ids in ([5], [-1]):
        with pytest.raises(IndexError, match="there are 5 rows"):
            tk.get_rows(raw, fmt, 5, weights.shape[1], ids)


# Activations.


def read_records(y, n_tok, n_groups):
    """The four vectors of every record, cut into groups: q [..., 32], c, d, s [..., 8]."""
    start = -y.ctypes.data % 64
    records = y[start : start + (len(y) - 63) // 256 * 256].reshape(n_tok, -1, 256)
    q, c, d, s = (records[..., 64 * k : 64 * k + 64] for k in range(4))
    return [
        np.ascontiguousarray(part).view(dtype).reshape(n_tok, -1, 32 if dtype == np.int8 else 8)
        for part, dtype in ((q, np.int8), (c, np.int32), (d, np.float32), (s, np.float32))
    ]


@pytest.mark.parametrize("n_groups", [1, 2, 5])
def test_quantised_activations_are_those_of_ggml(n_groups, rng):
    x = (rng.standard_normal((40, 32 * n_groups)) * 10.0 ** rng.integers(-4, 5, (40, 1))).astype(np.float32)
    x[1] = 0
    x[2, :32] = np.arange(32) + 0.5  # products that lie between two quants
    x[2, 0] = 127
    x[3, 0] = 1e-30  # the scale is 0 as F16
    x[4, 0] = 3e38  # the scale is inf as F16
    y, _ = activations.new_records(40, 32 * n_groups)
    activations.quantise_q8(x, y, 8, True, 0, 40)
    q, c, d, s = read_records(y, 40, n_groups)
    with np.errstate(over="ignore"):
        want_q, want_d, want_s = quantise(x)
    assert np.array_equal(q[:, :n_groups], want_q)
    assert np.array_equal(c[:, :n_groups], -8 * want_q.reshape(40, n_groups, 8, 4).sum(-1))
    assert np.array_equal(d[:, :n_groups], np.repeat(want_d[..., None], 8, -1))
    assert np.array_equal(s[:, :n_groups], np.repeat(want_s[..., None], 8, -1), equal_nan=True)
    for part in (q, c, d, s):
        assert not part[:, n_groups:].any()


ODD_FLOATS = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.9, 65520, 1e30, 2**-24, 2**-25, 3e-8, 6.1e-5, 1e-40]


@pytest.mark.parametrize("kernel, oracle", [(activations.round_to_f16, to_f16), (activations.round_to_bf16, to_bf16)])
def test_16_bit_activations_are_rounded_to_even(kernel, oracle, rng):
    any_bits = rng.integers(0, 2**32, 5001, dtype=np.uint32).view(np.float32)
    x = np.concatenate([np.array(ODD_FLOATS, np.float32), any_bits])
    y = np.empty_like(x)
    kernel(x, y, 0, len(x))
    assert np.array_equal(y, oracle(x), equal_nan=True)


# Matrix products.


@pytest.mark.parametrize("numerics", ["ggml", "f32"])
@by_name
def test_matmul_equals_the_oracle(fmt, numerics, rng):
    for n_in in lengths(fmt):
        for n_tok in (1, 2, 4, 7, MANY, 19):
            raw, weights = random_weights(fmt, rng, 19, n_in)
            x = rng.standard_normal((n_tok, n_in)).astype(np.float32)
            got, want = tk.matmul(x, raw, fmt, 19, numerics), naive_matmul(x, weights, fmt, raw, numerics)
            assert got.dtype == np.float32 and got.shape == (n_tok, 19)
            size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weights, axis=1)
            assert np.abs(got - want).max() < 1e-6 * size.max()


ORDERS = ("F32", "F16", "BF16", "IQ4_NL")  # formats of which ggml adds up one token otherwise than two


@pytest.mark.parametrize("numerics", ["ggml", "f32"])
@by_name
def test_a_token_alone_equals_the_token_in_a_prompt(fmt, numerics, rng):
    """With "ggml" there are exceptions, where ggml has another order: superblocks with MANY tokens, ORDERS with one."""
    n_in = 8 * fmt.block_size if fmt.block_size > 1 else 256
    raw, _ = random_weights(fmt, rng, 37, n_in)
    x = rng.standard_normal((37, n_in)).astype(np.float32)
    together, few = tk.matmul(x, raw, fmt, 37, numerics), tk.matmul(x[: MANY - 1], raw, fmt, 37, numerics)
    alone = np.concatenate([tk.matmul(x[t : t + 1], raw, fmt, 37, numerics) for t in range(MANY - 1)])
    assert np.array_equal(few, alone) == (numerics == "f32" or fmt.name not in ORDERS)
    assert np.array_equal(together[20:30], tk.matmul(x[20:30], raw, fmt, 37, numerics))
    if fmt.matmul_many is None or numerics == "f32":
        assert np.array_equal(together[: MANY - 1], few)


# The order in which ggml_vec_dot_* adds up: 16 lanes, in float32. Products of numbers of 8 bits are exact, so that they
# can be rounded or not, as the CPU likes.


def few_bits(rng, *shape):
    return to_bf16(rng.standard_normal(shape).astype(np.float32))


def fold(lanes):
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


def vec_dot(name, x, y):
    """One dot product, as ggml's code for x86-64 with AVX-512 adds it up."""
    whole, products = len(x) // 64 * 64, x * y
    four = np.zeros((4, 16), np.float32)
    for block in products[:whole].reshape(-1, 64):
        if name == "BF16":  # VDPBF16PS: pairs, the second of them first, in two chains
            pairs = block.reshape(2, 16, 2)
            four[:2] = (four[:2] + pairs[..., 1]) + pairs[..., 0]
        else:
            four += block.reshape(4, 16)
    if name == "BF16":
        acc = np.float64(fold(four[0])) + np.float64(fold(four[1]))
    else:
        acc = fold((four[0] + four[2]) + (four[1] + four[3]))
    acc = acc if name == "F32" else np.float64(acc)
    for product in products[whole:]:
        acc = acc + product
    return np.float32(acc)


def one_chain(x, y):
    acc = np.zeros(16, np.float32)
    for block in (x * y).reshape(-1, 16):
        acc += block
    return fold(acc)


@pytest.mark.parametrize("n_in", [1, 17, 48, 64, 80, 128, 172, 256, 1024])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_with_one_token_are_summed_as_ggml_vec_dot_sums(name, n_in, rng):
    fmt = next(f for f in FORMATS if f.name == name)
    w, x = few_bits(rng, 37, n_in), few_bits(rng, 2, n_in)
    w, x = (to_f16(w), to_f16(x)) if name == "F16" else (w, x)
    raw = {"F32": w, "F16": w.astype(np.float16), "BF16": (w.view(np.uint32) >> 16).astype(np.uint16)}[name]
    raw = raw.view(np.uint8).reshape(-1)
    alone = tk.matmul(x[:1], raw, fmt, 37)[0]
    assert alone.tolist() == [vec_dot(name, row, x[0]) for row in w]
    assert np.array_equal(alone, tk.matmul(x[:1], raw, fmt, 37, pool=tk.Pool(3))[0])
    if n_in in (256, 1024):  # two tokens meet tinyBLAS
        assert not np.array_equal(alone, tk.matmul(x, raw, fmt, 37)[0])
        assert np.array_equal(tk.matmul(x[:1], raw, fmt, 37, "f32")[0], tk.matmul(x, raw, fmt, 37, "f32")[0])
    if n_in in (256, 1024) and name != "BF16":
        assert tk.matmul(x, raw, fmt, 37)[0].tolist() == [one_chain(row, x[0]) for row in w]


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 8, 10, 11])
def test_iq4_nl_with_one_token_is_summed_in_even_and_odd_groups(groups, rng):
    """ggml_vec_dot_iq4_nl_q8_0 does so; a group that is left over comes last, its product rounded by itself."""
    fmt = next(f for f in FORMATS if f.name == "IQ4_NL")
    raw, _ = random_weights(fmt, rng, 37, 32 * groups)
    x = rng.standard_normal((1, 32 * groups)).astype(np.float32)
    quants, d, _ = quantise(x)
    blocks = raw.reshape(37, groups, 18)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32) * d[0]
    values = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
    w = values[np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)]
    products = (w * quants[0]).reshape(37, groups, 8, 4).sum(-1)  # whole numbers
    want = []
    for row, scale in zip(products, scales):
        sums = np.zeros((2, 8), np.float32)
        for j in range(groups & -2):  # fused: float64 holds the product exactly
            sums[j % 2] = (np.float64(scale[j]) * row[j] + sums[j % 2]).astype(np.float32)
        acc = fold(sums[0] + sums[1])
        want.append(acc + scale[-1] * np.float32(row[-1].sum()) if groups % 2 else acc)
    assert tk.matmul(x, raw, fmt, 37)[0].tolist() == want


@pytest.mark.parametrize(("n_kv", "cap"), [(1, 16), (16, 16), (37, 48), (64, 64), (100, 112), (300, 320)])
@pytest.mark.parametrize("d", [8, 64, 80, 128])
def test_a_token_alone_attends_as_ggml_vec_dot_f16_sums_and_several_as_tinyblas(d, n_kv, cap, rng):
    """llama.cpp pads positions with zeros to a multiple of 256, so that values have no rest of a row."""
    q, k, v = few_bits(rng, 1, 4, d), np.zeros((2, cap, d), np.float16), np.zeros((2, d, cap), np.float16)
    k[:, :n_kv], v[:, :, :n_kv] = few_bits(rng, 2, n_kv, d), few_bits(rng, 2, d, n_kv)
    keys, values = k.astype(np.float32), v.astype(np.float32)
    scores = tk.kq(q, k, n_kv)
    assert scores[:, 0].tolist() == [[vec_dot("F16", to_f16(q[0, h]), keys[h // 2, j]) for j in range(n_kv)]
                                     for h in range(4)]
    p = to_f16(few_bits(rng, 4, 1, n_kv))
    wide = np.zeros((4, 320), np.float32)
    wide[:, :n_kv] = p[:, 0]
    of = np.zeros((2, d, 320), np.float32)
    of[:, :, :cap] = values
    got = tk.kqv(p, v)[:, 0]
    assert got.tolist() == [[vec_dot("F16", of[h // 2, i], wide[h]) for i in range(d)] for h in range(4)]
    several = tk.kqv(p, v, alone=False)[:, 0]
    assert several.tolist() == [[one_chain(of[h // 2, i], wide[h]) for i in range(d)] for h in range(4)]
    if n_kv == 300:
        assert not np.array_equal(got, several)
    assert np.array_equal(tk.kq(np.concatenate([q, q]), k, n_kv)[:, :1], tk.kq(q, k, n_kv, alone=False))


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("d", "n_past"), [(8, 5), (64, 70), (128, 200)])
def test_fused_attention_of_one_token_equals_its_three_steps(d, n_past, alone, rng):
    n_kv, cap = n_past + 1, (n_past + 16) // 16 * 16
    q, k, v = few_bits(rng, 1, 4, d), np.zeros((2, cap, d), np.float16), np.zeros((2, d, cap), np.float16)
    k[:, :n_kv], v[:, :, :n_kv] = few_bits(rng, 2, n_kv, d), few_bits(rng, 2, d, n_kv)
    pattern = tk.soft_max(tk.kq(q, k, n_kv, alone=alone), 0.3, n_past)
    steps = tk.kqv(pattern, v, alone=alone)[:, 0].reshape(1, -1)
    assert np.array_equal(tk.attention(q, k, v, n_past, 0.3, alone=alone), steps)


def test_several_tokens_are_not_alone():
    with pytest.raises(ValueError, match="2 tokens are not alone in their pass"):
        tk.kqv(np.zeros((2, 2, 16), np.float32), np.zeros((1, 8, 16), np.float16), alone=True)


@by_name
def test_threads_do_not_change_a_bit(fmt, rng):
    n_in = 256
    raw, _ = random_weights(fmt, rng, 301, n_in)
    x = rng.standard_normal((13, n_in)).astype(np.float32)
    assert np.array_equal(tk.matmul(x, raw, fmt, 301), tk.matmul(x, raw, fmt, 301, pool=tk.Pool(3)))


@by_name
def test_weights_may_be_read_only_and_lie_anywhere(fmt, rng):
    n_in = lengths(fmt)[-1]
    raw = random_weights(fmt, rng, 3, n_in)[0].copy()
    x = rng.standard_normal((2, n_in)).astype(np.float32)
    room = np.frombuffer(b"?" + raw.tobytes(), np.uint8)
    assert np.array_equal(tk.matmul(x, raw, fmt, 3), tk.matmul(x, room[1:], fmt, 3))
    assert raw.flags.writeable  # the caller's array is left as it was


SEVERAL = [("Q4_K", "Q4_K", "Q6_K"), ("Q4_0", "Q4_0"), ("Q8_0", "Q4_1", "F16", "F32", "Q4_0")]


@pytest.mark.parametrize("numerics", ["ggml", "f32"])
@pytest.mark.parametrize("names", SEVERAL, ids=" ".join)
def test_several_products_of_one_x_equal_one_after_another(names, numerics, rng):
    """Whatever formats are mixed, for few tokens and for many, with threads and without."""
    n_in, sizes, matrices = 512, (300, 100, 101, 1, 2), []
    for fmt, n_out in zip((fmt for name in names for fmt in FORMATS if fmt.name == name), sizes):
        matrices.append((random_weights(fmt, rng, n_out, n_in)[0], fmt, n_out))
    for n_tok in (1, 3, 33):
        x = rng.standard_normal((n_tok, n_in)).astype(np.float32)
        want = [tk.matmul(x, raw, fmt, n_out, numerics) for raw, fmt, n_out in matrices]
        for pool in (None, tk.Pool(3)):
            got = tk.matmul_several(x, [tk.Matrix.of(*each, n_in) for each in matrices], numerics, pool)
            assert len(got) == len(names) and all(np.array_equal(a, b) for a, b in zip(got, want))
    assert tk.matmul_several(x, [], numerics) == []


def test_several_products_of_one_x_quantise_it_once(rng, monkeypatch):
    module = sys.modules["tinymia_kernels.matmul"]  # the package has the function under this name
    prepared, prepare = [], module._prepare
    monkeypatch.setattr(module, "_prepare", lambda *args: prepared.append(1) or prepare(*args))
    fmt, x = tk.FORMATS[12], rng.standard_normal((2, 256)).astype(np.float32)
    raw = random_weights(fmt, rng, 5, 256)[0]
    five = tk.Matrix.of(raw, fmt, 5, 256)
    tk.matmul_several(x, [five] * 3)
    assert len(prepared) == 1
    with pytest.raises(ValueError, match="Q4_K weights of 6 rows of 256: 864 bytes, not 720"):
        tk.Matrix.of(raw, fmt, 6, 256)
    with pytest.raises(ValueError, match=r"activations \(2, 128\) do not fit weights of 5 rows of 256"):
        tk.matmul_several(x[:, :128].copy(), [five, five])


def test_matmul_refuses_what_does_not_fit(rng):
    fmt = tk.FORMATS[2]
    raw, _ = random_weights(fmt, rng, 4, 64)
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="Q4_0 weights of 5 rows of 64: 180 bytes, not 144"):
        tk.matmul(x, raw, fmt, 5)
    with pytest.raises(ValueError, match="a row of 65 weights"):
        tk.matmul(np.zeros((2, 65), np.float32), raw, fmt, 4)
    for wrong in (x.astype(np.float64), x[0], x[:, ::2], np.asfortranarray(np.zeros((2, 64), np.float32))):
        with pytest.raises(ValueError, match="contiguous float32"):
            tk.matmul(wrong, raw, fmt, 4)
    for wrong in (raw.view(np.int8), raw.reshape(4, -1), raw[::2]):
        with pytest.raises(ValueError, match="flat uint8"):
            tk.matmul(x, wrong, fmt, 4)
    with pytest.raises(ValueError, match="numerics is 'ggml' or 'f32', not 'f64'"):
        tk.matmul(x, raw, fmt, 4, "f64")


@by_name
def test_nan_and_inf_go_through(fmt, rng):
    n_in = lengths(fmt)[-1]
    raw, _ = random_weights(fmt, rng, 3, n_in)
    for bad in (np.nan, np.inf):
        x = np.ones((1, n_in), np.float32)
        x[0, n_in // 2] = bad
        for numerics in ("ggml", "f32"):
            assert not np.isfinite(tk.matmul(x, raw, fmt, 3, numerics)).any()


# The SIMD layer.


@jit.inline
def _dot4_both(q, x, fast, portable):
    acc = vectors.i32x8(7)
    for k in range(0, q.size, 32):
        qv, xv = vectors.load_u8x32(simd.address_of(q) + k), vectors.load_i8x32(simd.address_of(x) + k)
        simd.store(simd.address_of(fast) + k, cpu.dot4(acc, qv, xv))
        simd.store(simd.address_of(portable) + k, cpu.dot4_portable(acc, qv, xv))


def test_sums_of_four_products_are_exact(rng):
    q, x = rng.integers(0, 256, 3200).astype(np.uint8), rng.integers(-128, 128, 3200).astype(np.int8)
    q[:32], x[:32], q[32:64], x[32:64] = 255, -128, 255, 127
    fast, portable = np.zeros(800, np.int32), np.zeros(800, np.int32)
    _dot4_both(q, x, fast, portable)
    want = 7 + (q.astype(np.int32) * x).reshape(-1, 4).sum(1)
    assert np.array_equal(fast, want) and np.array_equal(portable, want)


@jit.inline
def _exp_all(x, y):
    for i in range(0, x.size, 16):
        v = vectors.exp(vectors.load_f32x16(simd.address_of(x) + 4 * i))
        simd.store(simd.address_of(y) + 4 * i, v)


def test_exp_is_as_exact_as_the_one_of_ggml(rng):
    x = np.concatenate([rng.uniform(-87, 88.7, 1 << 16), rng.uniform(-1, 1, 1 << 14), np.zeros(16)]).astype(np.float32)
    y = np.empty_like(x)
    _exp_all(x, y)
    want = np.exp(x.astype(np.float64))
    assert (np.abs(y - want) / np.spacing(want.astype(np.float32))).max() < 2.3  # 2.22 over 2 ** 22 numbers
    edges = np.array([0, -0.0, -np.inf, np.inf, np.nan, -1e4, -104.1, 89, 1e30, -3e38, -100] + 5 * [0], np.float32)
    _exp_all(edges, y)
    assert np.array_equal(y[:10], [1, 1, 0, np.inf, np.nan, 0, 0, np.inf, np.inf, 0], equal_nan=True)
    assert abs(y[10] - np.exp(-100.0)) <= 2**-149  # a subnormal number


# Attention.


@caches
@pytest.mark.parametrize("d_head, d_v", [(64, 64), (128, 80), (7, 5), (20, 16), (1, 1)])
def test_attention_equals_the_oracle_and_its_own_steps(dtype, d_head, d_v, rng):
    n_head, n_head_kv, n_past, n_tok, cap, scale = 6, 2, 17, 5, 32, 1 / np.sqrt(d_head)
    k, v = np.zeros((n_head_kv, cap, d_head), dtype), np.zeros((n_head_kv, d_v, cap), dtype)
    draw = lambda n, d: rng.standard_normal((n, n_head_kv, d)).astype(np.float32)  # noqa: E731
    past, now = (draw(n_past, d_head), draw(n_past, d_v)), (draw(n_tok, d_head), draw(n_tok, d_v))
    tk.put(k, v, *past, 0)
    tk.put(k, v, *now, n_past)
    for by_position, before, x in ((k, past[0], now[0]), (v.swapaxes(1, 2), past[1], now[1])):
        assert np.array_equal(by_position[:, :n_past], before.transpose(1, 0, 2).astype(dtype))
        assert np.array_equal(by_position[:, n_past : n_past + n_tok], x.transpose(1, 0, 2).astype(dtype))
        assert not by_position[:, n_past + n_tok :].any()
    q = rng.standard_normal((n_tok, n_head, d_head)).astype(np.float32)
    kq, p, kqv = naive_attention(q, k, v.swapaxes(1, 2), n_past, scale)
    got_kq = tk.kq(q, k, n_past + n_tok)
    got_p = tk.soft_max(got_kq, scale, n_past)
    got_kqv = tk.kqv(got_p, v)
    np.testing.assert_allclose(got_kq, kq, rtol=0, atol=2e-5)
    np.testing.assert_allclose(got_p, p, rtol=0, atol=2e-6)
    np.testing.assert_allclose(got_kqv, kqv, rtol=0, atol=1e-3 if dtype == np.float16 else 1e-5)
    assert np.array_equal(got_p == 0, np.broadcast_to(p == 0, got_p.shape))  # exactly 0 where masked
    for pool in (None, tk.Pool(3)):
        fused = tk.attention(q, k, v, n_past, scale, pool)
        assert np.array_equal(fused, got_kqv.transpose(1, 0, 2).reshape(n_tok, -1))


@caches
def test_a_long_prompt_is_split_over_threads_without_changing_a_bit(dtype, rng):
    k = rng.standard_normal((2, 160, 32)).astype(dtype)
    v = rng.standard_normal((2, 32, 160)).astype(dtype)
    q = rng.standard_normal((150, 4, 32)).astype(np.float32)
    pool = tk.Pool(2)
    kq, threaded = tk.kq(q, k, 150), tk.kq(q, k, 150, pool)
    p, p_threaded = tk.soft_max(kq, 0.2, 0), tk.soft_max(threaded, 0.2, 0, pool)
    assert np.array_equal(kq, threaded) and np.array_equal(p, p_threaded)
    assert np.array_equal(tk.kqv(p, v), tk.kqv(p, v, pool))
    assert np.array_equal(tk.attention(q, k, v, 0, 0.2), tk.attention(q, k, v, 0, 0.2, pool))


def test_scores_of_inf_and_nan_do_not_crash():
    kq = np.zeros((1, 2, 20), np.float32)
    kq[0, 0, :5] = -np.inf
    kq[0, 1] = -np.inf
    p = tk.soft_max(kq, 1.0, 18)
    assert np.array_equal(p[0, 0, :5], np.zeros(5)) and np.allclose(p[0, 0, 5:19], 1 / 14)
    assert np.isnan(p[0, 1]).all()
    kq[0, 0, 3] = np.nan
    assert np.isnan(tk.soft_max(kq, 1.0, 18)[0, 0, :19]).all()


def test_attention_refuses_what_does_not_fit():
    q, k, v = np.zeros((2, 4, 8), np.float32), np.zeros((2, 16, 8), np.float16), np.zeros((2, 8, 16), np.float16)
    x = np.zeros((1, 2, 8), np.float32)
    for call, message in [
        (lambda: tk.kq(q, k, 17), "room for 16 positions; 17 are needed"),
        (lambda: tk.kq(q, k[:, :10].copy(), 5), "room for 10 positions; 5 are needed, and a multiple of 16"),
        (lambda: tk.kq(q[:, :3].copy(), k, 5), "3 query heads are not a multiple of the 2 heads"),
        (lambda: tk.kq(q[:, :, :4].copy(), k, 5), "q is a contiguous float32"),
        (lambda: tk.kq(q, k.astype(np.float64), 5), "k is a contiguous float16 or float32"),
        (lambda: tk.attention(q, k, v.astype(np.float32), 0, 1.0), "do not fit"),
        (lambda: tk.attention(q, k, v, 15, 1.0), "room for 16 positions; 17 are needed"),
        (lambda: tk.attention(q, k, v, -1, 1.0), "do not fit"),
        (lambda: tk.put(k, v, x, x, 16), "room for 16 positions; 17 are needed"),
        (lambda: tk.put(k, v, x[:, :, :7].copy(), x, 0), "k is a contiguous float32"),
        (lambda: tk.put(k, v, x, x[:, :, :7].copy(), 0), "v is a contiguous float32"),
        (lambda: tk.put(k, v, x, x, -1), "do not fit"),
        (lambda: tk.put(k, v, x, np.concatenate([x, x]), 0), "do not fit"),
        (lambda: tk.put(k[:1].copy(), v, x, x, 0), "do not fit"),
        (lambda: tk.put(k, v[:1].copy(), x, x, 0), "do not fit"),
        (lambda: tk.put(k, v.astype(np.float32), x, x, 0), "do not fit"),
        (lambda: tk.soft_max(q, 1.0, -1), "n_past is -1"),
        (lambda: tk.kqv(np.zeros((4, 1, 17), np.float32), v), "room for 16 positions; 17 are needed"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# The other operations.


def test_rms_norm_divides_by_the_root_of_the_mean_square(rng):
    for n in (1, 16, 172, 2048):
        x = rng.standard_normal((3, n)).astype(np.float32)
        want = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(tk.rms_norm(x, 1e-5), want, rtol=3e-7)
    assert np.array_equal(tk.rms_norm(np.zeros((1, 4), np.float32), 1e-5), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="x is a contiguous float32"):
        tk.rms_norm(x.astype(np.float64), 1e-5)


def test_rope_turns_neighbouring_pairs_and_leaves_the_rest(rng):
    x = rng.standard_normal((3, 2, 10)).astype(np.float32)
    angle = rng.uniform(0, 6, (3, 4)).astype(np.float32)
    got = tk.rope(x, np.cos(angle), np.sin(angle))
    turned = (x[..., 0:8:2] + 1j * x[..., 1:8:2]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(got[..., 0:8:2], turned.real, atol=1e-6)
    np.testing.assert_allclose(got[..., 1:8:2], turned.imag, atol=1e-6)
    assert np.array_equal(got[..., 8:], x[..., 8:]) and not np.shares_memory(got, x)
    for cos, sin in ((angle, angle[:2]), (angle[:2], angle[:2]), (np.zeros((3, 6), np.float32),) * 2):
        with pytest.raises(ValueError, match=r"alike|do not fit"):
            tk.rope(x, cos, sin)


def test_silu_is_x_times_the_logistic_function(rng):
    x = (10 * rng.standard_normal((3, 111))).astype(np.float32)
    want = x / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(tk.silu(x), want, rtol=5e-7, atol=1e-37)
    assert np.array_equal(tk.silu(x), np.concatenate([tk.silu(x[t : t + 1]) for t in range(3)]))
    edges = np.array([[0, 1e4, -1e4, np.nan] * n for n in (4, 4)], np.float32)
    for row in (edges, edges[:, :4].copy()):  # by lanes and by the C library
        assert np.array_equal(tk.silu(row)[:, :4], [[0, 1e4, 0, np.nan]] * 2, equal_nan=True)


def test_nothing_in_nothing_out():
    empty = np.zeros((0, 64), np.float32)
    assert tk.matmul(empty, np.zeros(36, np.uint8), tk.FORMATS[2], 1).shape == (0, 1)
    assert tk.rms_norm(empty, 1e-5).shape == tk.silu(empty).shape == (0, 64)


# Threads.


@kernel
def count_visits(visits, chunks, i0, i1):
    """Each item's number grows by one, and the item that begins a chunk is marked."""
    for i in range(i0, i1):
        visits[i] += 1
    if i1 > i0:
        chunks[i0] = i1 - i0


@kernel
def fail_late(n, i0, i1):
    if i1 == n:
        raise OverflowError("in the last chunk")


@kernel
def fill_slowly(out, i0, i1):
    """The work grows with the item's number."""
    for i in range(i0, i1):
        x = 0.0
        for k in range(300 * i):
            x += 1.0 / (k + 1)
        out[i] = x


def test_chunks_cover_the_items_once():
    pool = tk.Pool(3)
    for n_items in (0, 1, 2, 3, 10, 1001):
        for _ in range(20):
            visits, chunks = np.zeros(n_items, np.int64), np.zeros(n_items, np.int64)
            pool.run(count_visits, n_items, visits, chunks)
            assert (visits == 1).all() and chunks.sum() == n_items
            assert np.count_nonzero(chunks) == min(12, n_items)  # four for each thread


def test_chunks_of_several_jobs_cover_their_items_once():
    pool = tk.Pool(3)
    for sizes in ((1, 1), (1000, 10), (5, 0, 2000, 30), (7,), (100,) * 8, (3,) * 9, ()):
        for _ in range(20):
            visits = [np.zeros(n, np.int64) for n in sizes]
            pool.run_several([(1000 * n, count_visits, n, (v, v.copy())) for n, v in zip(sizes, visits)])
            assert all((v == 1).all() for v in visits)


@intrinsic
def references(_, array):
    """The address of numba's count of references to an array; 0 where there is none."""

    def codegen(context, builder, sig, args):
        counted = context.make_array(sig.args[0])(context, builder, args[0]).meminfo
        return builder.ptrtoint(counted, context.get_value_type(types.intp))

    return types.intp(array), codegen


@kernel
def note_references(x, out, i0, i1):
    for i in range(i0, i1):
        out[i] = references(x)


def test_jobs_borrow_their_arrays():
    """What writes a job down ends before the job runs, and numba's own count of references with it."""
    x, out, pool = np.zeros(9), np.ones((2, 200), np.int64), tk.Pool(2)
    pool.run_several([(10**6, note_references, 200, (x, row)) for row in out])
    assert (out == 0).all()
    note_references(x, out[0], 0, 200)
    assert (out[0] != 0).all()


def test_unequal_chunks_and_sleeping_threads():
    want = np.zeros(200)
    fill_slowly(want, 0, 200)
    pool = tk.Pool(3)
    for nap in (0, 0, 0.1, 0, 0.1):
        time.sleep(nap)  # longer than the pool's patience: its threads sleep
        out = np.zeros(200)
        pool.run(fill_slowly, 200, out)
        assert np.array_equal(out, want)


def test_one_thread_is_the_caller():
    before = threading.active_count()
    visits = np.zeros(5, np.int64)
    tk.Pool(1).run(count_visits, 5, visits, np.zeros(5, np.int64))
    assert (visits == 1).all() and threading.active_count() == before
    with pytest.raises(ValueError, match="a pool of 0 threads"):
        tk.Pool(0)
    assert tk.Pool().n == tk.physical_cores() <= (os.cpu_count() or 1)


def test_errors_of_a_chunk_reach_the_caller():
    pool = tk.Pool(2)
    for _ in range(3):
        with pytest.raises(OverflowError, match="in the last chunk"):
            pool.run(fail_late, 200, 200)
        with pytest.raises(OverflowError, match="in the last chunk"):
            pool.run_several([(10**6, count_visits, 9, (np.zeros(9, np.int64), np.zeros(9, np.int64))),
                              (10**6, fail_late, 200, (200,))])
    visits = np.zeros(200, np.int64)
    pool.run(count_visits, 200, visits, visits.copy())
    assert (visits == 1).all()


def test_threads_end_with_their_pool():
    pool = tk.Pool(3)
    pool.run(count_visits, 9, np.zeros(9, np.int64), np.zeros(9, np.int64))
    started = [t for t in threading.enumerate() if t.name == "tinymia"]
    del pool
    gc.collect()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and sum(t.is_alive() for t in started) > len(started) - 2:
        time.sleep(0.01)
    assert sum(t.is_alive() for t in started) <= len(started) - 2


def test_threads_may_share_a_pool(rng):
    raw, _ = random_weights(tk.FORMATS[2], rng, 512, 512)
    x = rng.standard_normal((8, 512)).astype(np.float32)
    want, pool, wrong = tk.matmul(x, raw, tk.FORMATS[2], 512), tk.Pool(2), []

    def work():
        for _ in range(20):
            if not np.array_equal(tk.matmul(x, raw, tk.FORMATS[2], 512, pool=pool), want):
                wrong.append(1)
            several = tk.matmul_several(x, [tk.Matrix.of(raw, tk.FORMATS[2], 512, x.shape[1])] * 2, pool=pool)
            if not all(np.array_equal(y, want) for y in several):
                wrong.append(2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Other processes: a fork, the cache, another CPU.

PROBE = """
import os, sys
import numpy as np
import tinymia_kernels as tk
rng = np.random.default_rng(3)
fmt = tk.FORMATS[3]  # Q4_1
raw = rng.integers(0, 60, 64 * fmt.row_bytes(96), dtype=np.uint8)
x = rng.standard_normal((5, 96)).astype(np.float32)
"""
PRODUCT = PROBE + "sys.stdout.buffer.write(tk.matmul(x, raw, fmt, 64).tobytes()); tk.announce_done()"
SILU = PROBE + "sys.stdout.buffer.write(tk.silu(x).tobytes() + tk.rms_norm(x, 1e-5).tobytes())"
FORK = PROBE + """
import faulthandler
pool = tk.Pool(2)
x = rng.standard_normal((99, 96)).astype(np.float32)
want = tk.matmul(x, raw, fmt, 64, pool=pool)
faulthandler.dump_traceback_later(20, exit=True)
child = os.fork()
same = np.array_equal(tk.matmul(x, raw, fmt, 64, pool=pool), want)
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
"""


def run_python(code, cache, **environment):
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    env = {**os.environ, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(cache), **environment}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout, done.stderr.decode()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """An own cache folder, and the output of the first run with it."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, *run_python(PRODUCT, folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Linux and macOS have")
def test_a_pool_survives_a_fork(compiled):
    run_python(FORK, compiled[0])


def test_kernels_are_compiled_once_and_kept(compiled):
    folder, first, said = compiled
    lines = said.splitlines()
    assert lines[0].startswith(f"tinymia: compiling kernels for this CPU (once, then kept in {folder}")
    assert lines[1].startswith("tinymia: compiled 2 kernels in ") and len(lines) == 2
    second, said = run_python(PRODUCT, folder)
    assert said == "" and second == first


def test_a_change_in_any_file_of_the_package_makes_kernels_stale(tmp_path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "matmul.py").write_text("a = 1")
    (tmp_path / "machine" / "cpu.py").write_text("b = 1")
    stamps = [jit.source_stamp(tmp_path)]
    (tmp_path / "machine" / "cpu.py").write_text("b = 2")
    stamps.append(jit.source_stamp(tmp_path))
    (tmp_path / "machine" / "cpu.py").rename(tmp_path / "cpu.py")
    stamps.append(jit.source_stamp(tmp_path))
    (tmp_path / "note.txt").write_text("no source")
    assert len(set(stamps)) == 3 and jit.source_stamp(tmp_path) == stamps[2]
    assert jit.STAMP == jit.source_stamp(Path(tk.__file__).resolve().parent)


def test_a_damaged_cache_is_compiled_again(tmp_path):
    first, _ = run_python(SILU, tmp_path)
    for path in tmp_path.rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:100])
    again, said = run_python(SILU, tmp_path)
    assert again == first and "compiling" in said


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    product, said = run_python(SILU, tmp_path / "file")
    assert len(product) == 2 * 4 * 5 * 96
    assert said.count("cannot keep compiled kernels in") == 1 and "set NUMBA_CACHE_DIR" in said


def test_other_cpus_calculate_the_same(compiled):
    tmp_path, first, _ = compiled
    here = np.frombuffer(first, np.float32)
    plain = np.frombuffer(run_python(PRODUCT, tmp_path, TINYMIA_PORTABLE="1")[0], np.float32)
    assert np.array_equal(here, plain)  # the same integers, the same order
    if platform.machine() in ("x86_64", "AMD64"):
        old = run_python(PRODUCT, tmp_path, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="")[0]
        np.testing.assert_allclose(np.frombuffer(old, np.float32), here, rtol=1e-4, atol=1e-3 * np.abs(here).max())
