"""Rows of plain numbers, 16 or 32 bits each: products with a few tokens, and unpacking.

Sums are taken in the order of ggml's code for x86-64 with AVX-512, so that results equal ggml's bit for bit: 16 lanes
at a time (llamafile/sgemm.cpp, tinyBLAS), and as ggml_vec_dot_* in vec.cpp where a row does not divide evenly. ggml
always sums the only token of a pass by ggml_vec_dot_*; numerics "ggml" takes that order, which is `vec_dot`, for a pass
of one token. Otherwise one token and several are summed alike, so a token's result is the same whatever the batch.
"""

from typing import Any

import numpy as np

from ..machine.lanes import add_in_turn, even, first, fma, odd, total
from ..machine.simd import address_of, store
from ..machine.template import STAMPED, abstract, part
from ..machine.vectors import f32x16, load_f32x1, load_f32x16, load_f32x32, to_f64
from .loops import Products, totals


class Floats(Products):
    """A format of plain numbers. Activations are float32 numbers, rounded to the format; lengths count weights."""

    BLOCK, FAR, MANY_FROM, ONE_APART = 1, True, 32, True
    CHUNK = 16  # weights per call of `weights`

    @abstract
    def weights(address):
        """f32x16, or f32x32 where CHUNK is 32: the weights that begin at an address."""

    @abstract
    def weight(address):
        """f32x1: the weight at an address."""

    @part
    def start(y):
        """The address of the first activation in y."""
        return address_of(y)

    @part
    def products(row, x):
        """A chunk of weights, each times the activation in its place."""
        return fmt.weights(row) * load_f32x16(x)

    @part
    def step(acc, v, x):
        """The sum with a chunk of weights v, times the activations at x, added."""
        return fma(v, load_f32x16(x), acc)

    @part
    def dot(row, n, x):
        """The dot product of a row with one token."""
        if n % fmt.CHUNK:
            return fmt.vec_dot(row, n, x)
        acc = f32x16(0)
        for i in range(0, n, fmt.CHUNK):
            acc = fmt.step(acc, fmt.weights(row + fmt.SIZE * i), x + 4 * i)
        return total(acc)

    @part
    def tile(row, row2, n, x, stride):
        """Sum two rows with four tokens, a chunk at a time; odd lengths go through vec_dot."""
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
        """Sum four rows side by side, a chunk at a time; odd lengths go through vec_dot."""
        second, third, fourth = row + stride, row + 2 * stride, row + 3 * stride
        if n % fmt.CHUNK:
            return fmt.dot(row, n, x), fmt.dot(second, n, x), fmt.dot(third, n, x), fmt.dot(fourth, n, x)
        a = b = c = d = f32x16(0)
        for i in range(0, n, fmt.CHUNK):
            at, k = x + 4 * i, fmt.SIZE * i
            a, b = fmt.step(a, fmt.weights(row + k), at), fmt.step(b, fmt.weights(second + k), at)
            c, d = fmt.step(c, fmt.weights(third + k), at), fmt.step(d, fmt.weights(fourth + k), at)
        return total(a), total(b), total(c), total(d)

    # The order of ggml_vec_dot_*: 64 weights at a time in several sums, which are added up at the end; then one by one.

    @part
    def no_chains():
        """The several sums before the first 64 weights."""
        return f32x16(0), f32x16(0), f32x16(0), f32x16(0)

    @part
    def add_64(acc, row, x):
        """The several sums with the next 64 weights added."""
        a, b = fmt.step(acc[0], fmt.weights(row), x), fmt.step(acc[1], fmt.weights(row + 16 * fmt.SIZE), x + 64)
        c = fmt.step(acc[2], fmt.weights(row + 32 * fmt.SIZE), x + 128)
        return a, b, c, fmt.step(acc[3], fmt.weights(row + 48 * fmt.SIZE), x + 192)

    @part
    def sum_of_chains(acc):
        """The total of the several sums."""
        return total((acc[0] + acc[2]) + (acc[1] + acc[3]))

    @part
    def rest(acc, row, n, x):
        """The sum with the last n % 64 weights: products in float32, their sum in float64."""
        acc = np.float64(acc)
        for i in range(n - n % 64, n - n % fmt.CHUNK, fmt.CHUNK):
            acc = add_in_turn(acc, to_f64(fmt.products(row + fmt.SIZE * i, x + 4 * i)))
        for i in range(n - n % fmt.CHUNK, n):
            acc += first(fmt.weight(row + fmt.SIZE * i) * load_f32x1(x + 4 * i))
        return np.float32(acc)

    @part
    def vec_dot(row, n, x):
        """The dot product of a row with one token, in the order of ggml_vec_dot_*."""
        acc = fmt.no_chains()
        for i in range(0, n - 63, 64):
            acc = fmt.add_64(acc, row + fmt.SIZE * i, x + 4 * i)
        return fmt.rest(fmt.sum_of_chains(acc), row, n, x)

    @part
    def vec_dot_then_zeros(row, n, x):
        """vec_dot of a row of n weights, a multiple of 16, as if zeros filled it up to a multiple of 64."""
        acc, most = fmt.no_chains(), n & -64
        for i in range(0, most, 64):
            acc = fmt.add_64(acc, row + fmt.SIZE * i, x + 4 * i)
        a, b, c, d = acc
        at, y = row + fmt.SIZE * most, x + 4 * most
        if n - most > 0:
            a = fmt.step(a, fmt.weights(at), y)
        if n - most > 16:
            b = fmt.step(b, fmt.weights(at + 16 * fmt.SIZE), y + 64)
        if n - most > 32:
            c = fmt.step(c, fmt.weights(at + 32 * fmt.SIZE), y + 128)
        return fmt.sum_of_chains((a, b, c, d))

    @part
    def stack_one(row, stride, n, x):
        """Sum four rows in the order of ggml_vec_dot_*, in which ggml always sums the only token of a pass."""
        second, third, fourth = row + stride, row + 2 * stride, row + 3 * stride
        a = b = c = d = fmt.no_chains()
        for i in range(0, n - 63, 64):
            at, k = x + 4 * i, fmt.SIZE * i
            a, b = fmt.add_64(a, row + k, at), fmt.add_64(b, second + k, at)
            c, d = fmt.add_64(c, third + k, at), fmt.add_64(d, fourth + k, at)
        p, q, r, s = fmt.sum_of_chains(a), fmt.sum_of_chains(b), fmt.sum_of_chains(c), fmt.sum_of_chains(d)
        return fmt.rest(p, row, n, x), fmt.rest(q, second, n, x), fmt.rest(r, third, n, x), fmt.rest(s, fourth, n, x)

    @part
    def unpack(row, n, to):
        """Write the weights as float32, a chunk at a time, the last ones singly."""
        for i in range(0, n - fmt.CHUNK + 1, fmt.CHUNK):
            store(to + 4 * i, fmt.weights(row + fmt.SIZE * i))
        for i in range(n - n % fmt.CHUNK, n):
            store(to + 4 * i, fmt.weight(row + fmt.SIZE * i))

    @classmethod
    def kernels(cls) -> dict[str, Any]:
        """The kernels that Python calls: `matmul` for float32 activations as well, matmul_unpacked for many tokens."""
        many = {"matmul_many": cls.matmul_unpacked} if cls.MANY_FROM else {}
        return super().kernels() | {"matmul_f32": cls.matmul} | many


class FloatPairs(Floats):
    """Plain numbers whose products are summed pair by pair, as the instruction VDPBF16PS does; 32 at a time."""

    CHUNK, MANY_FROM = 32, 0

    @part
    def products(row, x):
        """The 32 products of the next weights with activations."""
        return fmt.weights(row) * load_f32x32(x)

    @part
    def step(acc, v, x):
        """The sum with 32 products added, the second of each pair before the first."""
        y = load_f32x32(x)
        return fma(even(v), even(y), fma(odd(v), odd(y), acc))

    @part
    def no_chains():
        """The two sums before the first 64 weights."""
        return f32x16(0), f32x16(0)

    @part
    def add_64(acc, row, x):
        """The two sums with the next 64 weights added, 32 to each."""
        return fmt.step(acc[0], fmt.weights(row), x), fmt.step(acc[1], fmt.weights(row + 32 * fmt.SIZE), x + 128)

    @part
    def sum_of_chains(acc):
        """The total of the two sums, in float64."""
        return np.float64(total(acc[0])) + np.float64(total(acc[1]))


fmt: Floats = STAMPED
