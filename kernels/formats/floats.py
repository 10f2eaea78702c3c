"""F32, F16, BF16: rows of single numbers, little-endian, any length."""

from ..machine.half import widen_bf16, widen_half
from ..machine.lanes import first, fma
from ..machine.template import STAMPED, part
from ..machine.vectors import load_f32x1, load_f32x16, load_u16x1, load_u16x16, load_u16x32
from ..products.floats import FloatPairs, Floats


class F32(Floats):
    """32 bits per weight: IEEE 754 binary32.

        S EEEEEEEE FFFFFFFFFFFFFFFFFFFFFFF      sign, exponent (bias 127), fraction; bit 31 first

    Source: IEEE 754-2019, 3.4 (binary32).
    """

    TYPE, SIZE, ACTIVATION = 0, 4, "F32"
    weights, weight = load_f32x16, load_f32x1

    @part
    def rest(acc, row, n, x):
        """The sum with the last n % 64 weights; the last n % 8 by fused multiply-adds, as in ggml's compiled loop."""
        for i in range(n - n % 64, n - n % 8):
            acc += first(fmt.weight(row + fmt.SIZE * i) * load_f32x1(x + 4 * i))
        for i in range(n - n % 8, n):
            acc = first(fma(fmt.weight(row + fmt.SIZE * i), load_f32x1(x + 4 * i), acc))
        return acc


class F16(Floats):
    """16 bits per weight: IEEE 754 binary16.

        S EEEEE FFFFFFFFFF      sign, exponent (bias 15), fraction; bit 15 first

    Source: IEEE 754-2019, 3.4 (binary16).
    """

    TYPE, SIZE, ACTIVATION = 1, 2, "F16"

    @part
    def weights(address):
        """Widen 16 numbers."""
        return widen_half(load_u16x16(address))

    @part
    def weight(address):
        """Widen one number."""
        return widen_half(load_u16x1(address))


class BF16(FloatPairs):
    """16 bits per weight: the upper half of an F32.

        S EEEEEEEE FFFFFFF      sign, exponent (bias 127), fraction; bit 15 first

    Source: ggml-impl.h, ggml_compute_bf16_to_fp32.
    """

    TYPE, SIZE, ACTIVATION = 30, 2, "BF16"

    @part
    def weights(address):
        """Widen 32 numbers."""
        return widen_bf16(load_u16x32(address))

    @part
    def weight(address):
        """Widen one number."""
        return widen_bf16(load_u16x1(address))


fmt: Floats = STAMPED
