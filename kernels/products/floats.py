"""Rows of plain numbers, 16 or 32 bits each: products with a few tokens, and unpacking.

Sums are taken in the order of ggml's code for x86-64 with AVX-512, so that results are ggml's bit for bit: 16 lanes at
a time (llamafile/sgemm.cpp, tinyBLAS), and where a row does not divide evenly, as ggml_vec_dot_* in vec.cpp do. One
token and several are summed alike, so a token's result is the same whatever the batch.
"""

from typing import Any

import numpy as np

from ..machine.lanes import even, first, fma, odd, total
from ..machine.simd import address_of, store
from ..machine.template import STAMPED, abstract, part
from ..machine.vectors import f32x16, load_f32x1, load_f32x16, load_f32x32
from .loops import Products, totals


class Floats(Products):
    """A format of plain numbers. Activations are float32 numbers, rounded to the format; lengths count weights."""

    BLOCK, FAR, MANY_FROM = 1, True, 32
    CHUNK = 16  # weights per call of `weights`

    @abstract
    def weights(address):
        """f32x16, or f32x32 where CHUNK is 32: the weights from an address on."""

    @abstract
    def weight(address):
        """f32x1: the weight at an address."""

    @part
    def start(y):
        return address_of(y)

    @part
    def step(acc, v, x):
        """The sum, a chunk of weights v further."""
        return fma(v, load_f32x16(x), acc)

    @part
    def dot(row, n, x):
        """The dot product of a row with one token."""
        if n % fmt.CHUNK:
            return fmt.uneven(row, n, x)
        acc = f32x16(0)
        for i in range(0, n, fmt.CHUNK):
            acc = fmt.step(acc, fmt.weights(row + fmt.SIZE * i), x + 4 * i)
        return total(acc)

    @part
    def tile(row, row2, n, x, stride):
        if n % fmt.CHUNK:
            y, z = x + 2 * stride, x + 3 * stride
            a = fmt.dot(row, n, x), fmt.dot(row, n, x + stride), fmt.dot(row, n, y), fmt.dot(row, n, z)
            b = fmt.dot(row2, n, x), fmt.dot(row2, n, x + stride), fmt.dot(row2, n, y), fmt.dot(row2, n, z)
            return a, b
        a = b = f32x16(0), f32x16(0), f32x16(0), f32x16(0)
        for i in range(0, n, fmt.CHUNK):
            v, w, at = fmt.weights(row + fmt.SIZE * i), fmt.weights(row2 + fmt.SIZE * i), x + 4 * i
            a, b = fmt.step_four_tokens(a, v, at, stride), fmt.step_four_tokens(b, w, at, stride)
        return totals(a), totals(b)

    @part
    def stack(row, stride, n, x):
        second, third, fourth = row + stride, row + 2 * stride, row + 3 * stride
        if n % fmt.CHUNK:
            return fmt.dot(row, n, x), fmt.dot(second, n, x), fmt.dot(third, n, x), fmt.dot(fourth, n, x)
        a = b = c = d = f32x16(0)
        for i in range(0, n, fmt.CHUNK):
            at, k = x + 4 * i, fmt.SIZE * i
            a, b = fmt.step(a, fmt.weights(row + k), at), fmt.step(b, fmt.weights(second + k), at)
            c, d = fmt.step(c, fmt.weights(third + k), at), fmt.step(d, fmt.weights(fourth + k), at)
        return total(a), total(b), total(c), total(d)

    @part
    def uneven(row, n, x):
        """The dot product of a row that does not divide into chunks: 64 weights at a time, and the rest one by one."""
        a = b = c = d = f32x16(0)
        for i in range(0, n - 63, 64):
            v, at = row + fmt.SIZE * i, x + 4 * i
            a, b = fmt.step(a, fmt.weights(v), at), fmt.step(b, fmt.weights(v + 16 * fmt.SIZE), at + 64)
            c = fmt.step(c, fmt.weights(v + 32 * fmt.SIZE), at + 128)
            d = fmt.step(d, fmt.weights(v + 48 * fmt.SIZE), at + 192)
        return fmt.rest(total((a + c) + (b + d)), row, n, x)

    @part
    def rest(acc, row, n, x):
        """The sum with the last n % 64 weights: products in float32, their sum in float64."""
        acc = np.float64(acc)
        for i in range(n - n % 64, n):
            acc += first(fmt.weight(row + fmt.SIZE * i) * load_f32x1(x + 4 * i))
        return np.float32(acc)

    @part
    def unpack(row, n, to):
        for i in range(0, n - fmt.CHUNK + 1, fmt.CHUNK):
            store(to + 4 * i, fmt.weights(row + fmt.SIZE * i))
        for i in range(n - n % fmt.CHUNK, n):
            store(to + 4 * i, fmt.weight(row + fmt.SIZE * i))

    @classmethod
    def kernels(cls) -> dict[str, Any]:
        """What Python calls: `matmul` for float32 activations as well; rows are unpacked from MANY_FROM tokens on."""
        many = {"matmul_many": cls.matmul_unpacked} if cls.MANY_FROM else {}
        return super().kernels() | {"matmul_f32": cls.matmul} | many


class FloatPairs(Floats):
    """Plain numbers whose products are summed pair by pair, as the instruction VDPBF16PS does; 32 at a time."""

    CHUNK, MANY_FROM = 32, 0

    @part
    def step(acc, v, x):
        """Of each pair the second product is added first."""
        y = load_f32x32(x)
        return fma(even(v), even(y), fma(odd(v), odd(y), acc))

    @part
    def uneven(row, n, x):
        """The same as in Floats for chunks of 32, which are added in float64."""
        a = b = f32x16(0)
        for i in range(0, n - 63, 64):
            v, at = row + fmt.SIZE * i, x + 4 * i
            a, b = fmt.step(a, fmt.weights(v), at), fmt.step(b, fmt.weights(v + 32 * fmt.SIZE), at + 128)
        return fmt.rest(np.float64(total(a)) + np.float64(total(b)), row, n, x)


fmt: Floats = STAMPED
