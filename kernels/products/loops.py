"""The parts that products of all families share: loops over rows and tokens, and the base class of formats.

Weights are read 16 rows at a time, and multiplied with the activations of all tokens before the next 16 are read, so
that they stay in the CPU's nearest cache:

    n_tok = 1          `stack`: four rows with one token
    n_tok >= 4         `tile`: two rows with four tokens
    float32 inputs     rows are unpacked to float32 first, then multiplied four rows by six tokens, or by two
"""

from typing import Any, ClassVar

import numpy as np

from ..format import Format, register
from ..machine.jit import inline
from ..machine.lanes import fma, total
from ..machine.simd import address_of, keep
from ..machine.template import STAMPED, Template, abstract, entry, part
from ..machine.vectors import f32x16, load_f32x16

ROWS = 16  # rows that are multiplied with all tokens before the next rows are read


class Products(Template):
    """The loops of every format. A class that sets TYPE is a format: its kernels are made, and it is registered.

    Addresses are plain numbers, and kernels do not check them. `row` is the address of a row of weights, `x` that of a
    token's activations, as the family stores them: float32 numbers, or the records that activations.py describes.
    """

    TYPE: ClassVar[int]  # ggml's number of the format; negative for a format that no file holds: it is not registered
    BLOCK: int  # weights per block
    SIZE: int  # bytes per block
    ACTIVATION: str  # how activations are rounded: see Format.activation
    HALVES: tuple[int, ...] = ()  # byte offsets of the F16 numbers in a block, for tests that write blocks
    BIAS = 0  # weight = scale * (quant - BIAS) + minimum
    FAR = False  # True: the four rows of `stack` lie n_rows / 4 apart, so that memory is read as four long streams
    ONE_APART = False  # True: ggml sums the only token of a pass in another order, which `stack_one` has
    MANY_FROM = 0  # from this number of tokens on, `matmul_many` is called; 0: the format has none

    format: ClassVar[Format]

    @abstract
    def start(y):
        """The address at which the activations begin in their array y."""

    @abstract
    def stack(row, stride, n, x):
        """Four sums: dot products of four rows, `stride` bytes apart, with one token. n: the row's length as in `tile`.

        Decoding uses each weight once, so its speed is limited by memory. Reading four distant rows at the same time
        keeps more loads in flight than reading one row after another, and the four sums do not depend on each other.
        """

    @part
    def stack_one(row, stride, n, x):
        """Four sums like those of `stack`, for the only token of a pass."""
        return fmt.stack(row, stride, n, x)

    @abstract
    def tile(row, row2, n, x, stride):
        """Two times four sums: dot products of two rows with four tokens, `stride` bytes apart.

        Weights are unpacked once for four tokens. n: the length of a row, in weights, groups or superblocks, as the
        family counts it. Each sum is the same as that of `stack`, bit for bit.
        """

    @abstract
    def step(acc, weights, x):
        """The sums `acc` of one row and one token after the next weights, which the family has unpacked, are added."""

    @part
    def step_four_tokens(sums, weights, x, stride):
        """`step` for the sums of four tokens, whose activations lie `stride` bytes apart."""
        a, b, c, d = sums
        a, b = fmt.step(a, weights, x), fmt.step(b, weights, x + stride)
        c, d = fmt.step(c, weights, x + 2 * stride), fmt.step(d, weights, x + 3 * stride)
        return a, b, c, d

    @abstract
    def unpack(row, n, to):
        """Write the n weights of a row as float32 to an address, rounded like the reference code of the format."""

    @entry
    def matmul(y, stride, w, row_bytes, n, out, i0, i1):
        """Write out[t, i] = row i of w . activations t, for the rows i0 to i1.

        y: the activations of all tokens, `stride` bytes per token. w: rows of row_bytes bytes. n: as in `tile`.
        """
        n_tok, w, y = out.shape[0], address_of(w), fmt.start(y)
        for begin in range(i0, i1, ROWS):
            end = min(begin + ROWS, i1)
            for t in range(0, n_tok - 3, 4):
                for i in range(begin, end, 2):
                    k = min(i + 1, end - 1)
                    a, b = fmt.tile(w + i * row_bytes, w + k * row_bytes, n, y + t * stride, stride)
                    out[t, i], out[t + 1, i], out[t + 2, i], out[t + 3, i] = a
                    out[t, k], out[t + 1, k], out[t + 2, k], out[t + 3, k] = b
        apart, step = ((i1 - i0) // 4, 1) if fmt.FAR else (1, 4)
        for i in range(i0, i0 + (i1 - i0) // 4 * step, step):
            for t in range(n_tok - n_tok % 4, n_tok):
                sums = fmt.stack(w + i * row_bytes, apart * row_bytes, n, y + t * stride)
                out[t, i], out[t, i + apart], out[t, i + 2 * apart], out[t, i + 3 * apart] = sums
        for i in range(i1 - (i1 - i0) % 4, i1):
            for t in range(n_tok - n_tok % 4, n_tok):
                out[t, i] = fmt.stack(w + i * row_bytes, 0, n, y + t * stride)[0]

    @entry
    def matmul_one(y, stride, w, row_bytes, n, out, i0, i1):
        """Write out[0, i] = row i of w . the activations, for the only token of a pass; arguments as in `matmul`."""
        w, y = address_of(w), fmt.start(y)
        apart, step = ((i1 - i0) // 4, 1) if fmt.FAR else (1, 4)
        for i in range(i0, i0 + (i1 - i0) // 4 * step, step):
            sums = fmt.stack_one(w + i * row_bytes, apart * row_bytes, n, y)
            out[0, i], out[0, i + apart], out[0, i + 2 * apart], out[0, i + 3 * apart] = sums
        for i in range(i1 - (i1 - i0) % 4, i1):
            out[0, i] = fmt.stack_one(w + i * row_bytes, 0, n, y)[0]

    @entry
    def matmul_unpacked(x, stride, w, row_bytes, n, out, i0, i1):
        """Do the same as `matmul` with float32 activations and unpacked rows; n: weights per row, a multiple of 16."""
        # 64 more than 4 n: rows at distances of a power of two would share the same few lines of the nearest cache.
        row_stride = 4 * n + 64
        unpacked = np.empty(ROWS * row_stride, np.uint8)
        n_tok, w, x, rows = out.shape[0], address_of(w), address_of(x), address_of(unpacked)
        for begin in range(i0, i1, ROWS):
            end = min(begin + ROWS, i1)
            for i in range(begin, min(begin + ROWS, (end + 3) // 4 * 4)):
                fmt.unpack(w + min(i, end - 1) * row_bytes, n, rows + row_stride * (i - begin))
            for t in range(0, n_tok - 5, 6):
                for i in range(begin, end, 4):
                    at = rows + row_stride * (i - begin)
                    a, b, c, d, e, f = four_rows_six_tokens(at, row_stride, n, x + t * stride, stride)
                    for k in range(min(4, end - i)):
                        out[t, i + k], out[t + 1, i + k], out[t + 2, i + k] = a[k], b[k], c[k]
                        out[t + 3, i + k], out[t + 4, i + k], out[t + 5, i + k] = d[k], e[k], f[k]
            for t in range(n_tok - n_tok % 6, n_tok, 2):
                m = min(t + 1, n_tok - 1)
                for i in range(begin, end, 4):
                    at = rows + row_stride * (i - begin)
                    a, b = four_rows_two_tokens(at, row_stride, n, x + t * stride, (m - t) * stride)
                    for k in range(min(4, end - i)):
                        out[t, i + k], out[m, i + k] = a[k], b[k]
        keep(unpacked)

    @entry
    def unpack_rows(w, row_bytes, ids, out, i0, i1):
        """Write out[i] = row ids[i] of w, as float32, for i0 <= i < i1."""
        n, w, to = out.shape[1], address_of(w), address_of(out)
        for i in range(i0, i1):
            fmt.unpack(w + ids[i] * row_bytes, n, to + 4 * n * i)

    @classmethod
    def kernels(cls) -> dict[str, Any]:
        """The kernels that Python calls, by their names in Format."""
        one = {"matmul_one": cls.matmul_one} if cls.ONE_APART else {}
        return {"matmul": cls.matmul, "matmul_f32": cls.matmul_unpacked, "unpack_rows": cls.unpack_rows} | one

    def __init_subclass__(cls) -> None:
        """Make a format of a class that sets TYPE; a class that does not is a base of other classes."""
        super().__init_subclass__()
        if "TYPE" in vars(cls):
            cls.stamp()
            cls.format = Format(
                name=cls.__name__, type=cls.TYPE, block_size=cls.BLOCK, type_size=cls.SIZE, bias=cls.BIAS,
                activation=cls.ACTIVATION, many_from=cls.MANY_FROM, made_of=cls, **cls.kernels(),
            )
            if cls.TYPE >= 0:
                register(cls.format)


fmt: Products = STAMPED


# Four rows of float32 with six tokens, and with two: each row's 16 lanes are added up at the end.


@inline
def four_rows_six_tokens(row, stride, n, x, x_stride):
    """Dot products of four rows, `stride` bytes apart, with six tokens, x_stride bytes apart: four sums per token."""
    z = f32x16(0)
    a = b = c = d = e = f = z, z, z, z
    for i in range(0, 4 * n, 64):
        at, v = x + i, row + i
        w = load_f32x16(v), load_f32x16(v + stride), load_f32x16(v + 2 * stride), load_f32x16(v + 3 * stride)
        a, b = step_four_rows(a, w, at), step_four_rows(b, w, at + x_stride)
        c, d = step_four_rows(c, w, at + 2 * x_stride), step_four_rows(d, w, at + 3 * x_stride)
        e, f = step_four_rows(e, w, at + 4 * x_stride), step_four_rows(f, w, at + 5 * x_stride)
    return totals(a), totals(b), totals(c), totals(d), totals(e), totals(f)


@inline
def four_rows_two_tokens(row, stride, n, x, x_stride):
    """Dot products of four rows, `stride` bytes apart, with two tokens, x_stride bytes apart: four sums per token."""
    z = f32x16(0)
    a = b = z, z, z, z
    for i in range(0, 4 * n, 64):
        at, v = x + i, row + i
        w = load_f32x16(v), load_f32x16(v + stride), load_f32x16(v + 2 * stride), load_f32x16(v + 3 * stride)
        a, b = step_four_rows(a, w, at), step_four_rows(b, w, at + x_stride)
    return totals(a), totals(b)


@inline
def step_four_rows(acc, w, x):
    """The sums of four rows for one token, with the next 16 weights added."""
    v = load_f32x16(x)
    return fma(w[0], v, acc[0]), fma(w[1], v, acc[1]), fma(w[2], v, acc[2]), fma(w[3], v, acc[3])


@inline
def totals(acc):
    """The sums of the lanes of four vectors."""
    return total(acc[0]), total(acc[1]), total(acc[2]), total(acc[3])
