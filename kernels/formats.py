"""The registry of block formats: what a weight's bytes mean, and the kernels made from that.

A format file describes its layout, writes the small functions that rows.py asks for, and registers them; the rest of
the program finds the format in FORMATS by its ggml type number and never asks which one it is.
Source: ggml.h, enum ggml_type; gguf.GGML_QUANT_SIZES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import rows
from . import unpack as unpacking
from .activations import first_record
from .jit import specialise
from .lanes import total
from .simd import address_of


@dataclass(frozen=True)
class Format:
    """A block format: `block_size` weights lie in `type_size` bytes; dot products take activations as `activation`."""

    name: str
    type: int
    block_size: int
    type_size: int
    activation: str
    bias: int = field(default=0, repr=False)  # weight = scale * (quant - bias) + minimum
    matmul: Callable | None = field(default=None, repr=False, compare=False)  # rows.matmul_rows of this format
    matmul_f32: Callable | None = field(default=None, repr=False, compare=False)  # the same for float32 activations
    unpack_rows: Callable | None = field(default=None, repr=False, compare=False)  # unpack.unpack_rows
    dot: Callable | None = field(default=None, repr=False, compare=False)  # float formats: rows.dot_floats, a part
    tile: Callable | None = field(default=None, repr=False, compare=False)

    def row_bytes(self, n_in: int) -> int:
        """Bytes of a row of n_in weights; ValueError when n_in is no multiple of block_size."""
        if n_in % self.block_size:
            raise ValueError(f"a row of {n_in} weights: {self.name} rows are multiples of {self.block_size} weights")
        return n_in // self.block_size * self.type_size


FORMATS: dict[int, Format] = {}


def register(fmt: Format) -> Format:
    """Enter a format under its ggml type; ValueError when the type or the name is taken."""
    taken = [known for known in FORMATS.values() if fmt.type == known.type or fmt.name == known.name]
    if taken:
        raise ValueError(f"ggml type {fmt.type} {fmt.name} is already registered as {taken[0].type} {taken[0].name}")
    FORMATS[fmt.type] = fmt
    return fmt


def register_floats(name: str, type: int, size: int, weights, weight, pairs: bool = False) -> Format:
    """Enter a format of single numbers of `size` bytes, see rows.py for weights and weight.

    With `pairs`, `weights` gives 32 numbers at once and the dot product takes them pair by pair.
    """
    parts = {"weights": weights, "weight": weight, "SIZE": size, "CHUNK": 32 if pairs else 16}
    parts["step"] = rows.step_pairs if pairs else rows.step_floats
    parts["rest"] = specialise(rows.rest_f32 if name == "F32" else rows.rest_f64, f"rest_{name}", part=True, **parts)
    uneven = rows.uneven_pairs if pairs else rows.uneven_floats
    parts["uneven"] = specialise(uneven, f"uneven_{name}", part=True, **parts)
    parts["dot"] = dot = specialise(rows.dot_floats, f"dot_{name}", part=True, **parts)
    tile = specialise(rows.tile_floats, f"tile_{name}", part=True, **parts)
    unpack = specialise(unpacking.unpack_floats, f"unpack_{name}", part=True, **parts)
    matmul = specialise(rows.matmul_rows, f"matmul_{name}", dot=dot, tile=tile, start=address_of)
    unpack_rows = specialise(unpacking.unpack_rows, f"unpack_rows_{name}", unpack=unpack)
    return register(Format(name, type, 1, size, name, 0, matmul, matmul, unpack_rows, dot, tile))


def register_quants(
    name: str, type: int, block_size: int, type_size: int, activation: str, bias: int, quants, scale, minimum=None
) -> Format:
    """Enter a quantised format, see rows.py for quants, scale, minimum and bias."""
    parts = {"quants": quants, "scale": scale, "minimum": minimum or rows.no_minimum, "BIAS": np.float32(bias)}
    groups = {
        "pair": specialise(rows.two_groups, f"two_groups_{name}", part=True, **parts),
        "single": specialise(rows.one_group, f"one_group_{name}", part=True, **parts),
        "step": rows.step_scale_minimum if minimum else rows.step_scale,
        "nothing": rows.nothing_scale_minimum if minimum else rows.nothing_scale,
        "whole": rows.whole_scale_minimum if minimum else total,
    }
    dot = specialise(rows.dot_quantised, f"dot_{name}", part=True, **groups)
    tile = specialise(rows.tile_quantised, f"tile_{name}", part=True, **groups)
    unpack_template = unpacking.unpack_quantised_minimum if minimum else unpacking.unpack_quantised
    unpack = specialise(unpack_template, f"unpack_{name}", part=True, **parts)
    matmul = specialise(rows.matmul_rows, f"matmul_{name}", dot=dot, tile=tile, start=first_record)
    f32 = {"dot": FORMATS[0].dot, "tile": FORMATS[0].tile, "unpack": unpack}
    matmul_f32 = specialise(rows.matmul_unpacked, f"matmul_f32_{name}", **f32)
    unpack_rows = specialise(unpacking.unpack_rows, f"unpack_rows_{name}", unpack=unpack)
    return register(Format(name, type, block_size, type_size, activation, bias, matmul, matmul_f32, unpack_rows))
