"""The registry of block formats: what a weight's bytes mean, and the kernels made from that.

A format file describes its layout, writes the small functions that rows.py asks for, and registers them; the rest of
the program finds the format in FORMATS by its ggml type number and never asks which one it is.
Source: ggml.h, enum ggml_type; gguf.GGML_QUANT_SIZES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from . import block_panels, panels, products, rows, stacks, superblocks
from . import unpack as unpacking
from .activations import first_record
from .jit import inline, specialise
from .simd import address_of

MANY = 8  # tokens from which quantised rows meet panels; for superblocks the sums change there, as in ggml


@dataclass(frozen=True)
class Format:
    """A block format: `block_size` weights lie in `type_size` bytes; dot products take activations as `activation`."""

    name: str
    type: int
    block_size: int
    type_size: int
    activation: str
    bias: int = field(default=0, repr=False)  # weight = scale * (quant - bias) + minimum
    many: int = field(default=0, repr=False)  # tokens from which matmul_many is taken; 0: never
    matmul: Callable | None = field(default=None, repr=False, compare=False)  # products.matmul_rows of this format
    matmul_one: Callable | None = field(default=None, repr=False, compare=False)  # one token, where ggml does otherwise
    matmul_f32: Callable | None = field(default=None, repr=False, compare=False)  # the same for float32 activations
    matmul_many: Callable | None = field(default=None, repr=False, compare=False)  # for many tokens at once
    unpack_rows: Callable | None = field(default=None, repr=False, compare=False)  # unpack.unpack_rows
    dot: Callable | None = field(default=None, repr=False, compare=False)  # float formats: rows.dot_floats, a part
    tile: Callable | None = field(default=None, repr=False, compare=False)  # float formats: rows.tile_floats
    vec_dot: Callable | None = field(default=None, repr=False, compare=False)  # float formats: rows.vec_dot_floats
    vec_dot_then_zeros: Callable | None = field(default=None, repr=False, compare=False)  # F32, F16

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
    suffix = "pairs" if pairs else "floats"
    parts |= {"nothing": getattr(rows, f"nothing_{suffix}"), "whole": getattr(rows, f"whole_{suffix}")}
    parts["add_64"] = specialise(getattr(rows, f"add_64_{suffix}"), f"add_64_{name}", part=True, **parts)
    parts["vec_dot"] = vec_dot = specialise(rows.vec_dot_floats, f"vec_dot_{name}", part=True, **parts)
    parts["dot"] = dot = specialise(rows.dot_floats, f"dot_{name}", part=True, **parts)
    tile = specialise(rows.tile_floats, f"tile_{name}", part=True, **parts)
    unpack = specialise(unpacking.unpack_floats, f"unpack_{name}", part=True, **parts)
    stack = specialise(stacks.stack_floats, f"stack_{name}", part=True, **parts)
    alone = specialise(stacks.stack_vec_dot, f"stack_vec_dot_{name}", part=True, **parts)
    matmul = specialise(products.matmul_rows, f"matmul_{name}", stack=stack, tile=tile, start=address_of, FAR=True)
    matmul_one = specialise(products.matmul_one, f"matmul_one_{name}", stack=alone, start=address_of, FAR=True)
    unpack_rows = specialise(unpacking.unpack_rows, f"unpack_rows_{name}", unpack=unpack)
    many = None if pairs else specialise(products.matmul_unpacked, f"matmul_many_{name}", unpack=unpack)
    least = 0 if pairs else 32
    zeros = None if pairs else specialise(rows.vec_dot_then_zeros, f"vec_dot_then_zeros_{name}", part=True, **parts)
    products_of = {"matmul": matmul, "matmul_one": matmul_one, "matmul_f32": matmul, "matmul_many": many}
    dots = {"dot": dot, "tile": tile, "vec_dot": vec_dot, "vec_dot_then_zeros": zeros}
    return register(Format(name, type, 1, size, name, 0, least, **products_of, unpack_rows=unpack_rows, **dots))


def register_quants(
    name: str, type: int, block_size: int, type_size: int, activation: str, bias: int, quants, scale, minimum=None,
    sums=None, fours: stacks.Fours | None = None, one=None,
) -> Format:  # fmt: skip
    """Enter a quantised format, see rows.py for quants, scale, minimum and bias, and for sums other than usual.

    fours: the same of four rows, see stacks.py, for formats whose rows share vectors when a single token comes. one: a
    template of stacks.py in place of the usual, where ggml adds up a single token in another order than several.
    """
    nothing, step, whole = sums or (rows.SCALE_MINIMUM if minimum else rows.SCALE)
    parts = {"quants": quants, "scale": scale, "minimum": minimum or rows.no_minimum, "BIAS": np.float32(bias)}
    groups = {
        "pair": specialise(rows.two_groups, f"two_groups_{name}", part=True, **parts),
        "single": specialise(rows.one_group, f"one_group_{name}", part=True, **parts),
        "step": step, "nothing": nothing, "whole": whole,
    }
    tile = specialise(rows.tile_quantised, f"tile_{name}", part=True, **groups)
    if fours:
        four = fours._asdict()
        four["add_group"] = specialise(stacks.add_group_template, f"add_group_{name}", part=True, **four)
        template = stacks.stack_scale_by_four if fours.scales_of_four else stacks.stack_scale
        template = stacks.stack_scale_minimum if minimum else template
        stack = specialise(template, f"stack_{name}", part=True, **four)
        alone = one and specialise(one, f"stack_one_{name}", part=True, **four)
    else:
        alone = None
        stack = specialise(stacks.stack_quantised, f"stack_{name}", part=True, **groups)
    unpack_template = unpacking.unpack_quantised_minimum if minimum else unpacking.unpack_quantised
    unpack = specialise(unpack_template, f"unpack_{name}", part=True, **parts)
    partial_sums = block_panels.apart if sums is rows.TWO_SUMS else block_panels.together
    minima = block_panels.add_minima if minimum else block_panels.no_minima
    panel = {"partial_sums": inline(partial_sums), "minima": inline(minima)}
    panel["tile"] = specialise(block_panels.tile_template, f"panel_tile_{name}", part=True, **panel)
    panel["unpack_row"] = specialise(block_panels.unpack_row_template, f"unpack_row_{name}", part=True, **parts)
    matmul_many = specialise(block_panels.matmul_panels, f"matmul_many_{name}", **panel)
    single = {"stack": alone, "start": first_record, "FAR": True}
    matmul_one = alone and specialise(products.matmul_one, f"matmul_one_{name}", **single)
    made = {"matmul_one": matmul_one, "matmul_many": matmul_many}
    fmt = Format(name, type, block_size, type_size, activation, bias, MANY, **made)
    return register(_with_kernels(fmt, stack, tile, unpack))


def superblock_format(
    name: str, type: int, type_size: int, bias: int, span: int, sums: superblocks.Sums,
    quants, scales, factor, minimums=None, min_factor=superblocks.no_factor,
) -> Format:  # fmt: skip
    """A format of superblocks of 256 weights, see superblocks.py.

    `span` weights have one scale; it is 0 for a format of which ggml adds up many tokens no otherwise than few.
    """
    lowest, minimums = minimums, minimums or superblocks.no_minimums
    parts = {"quants": quants, "scales": scales, "minimums": minimums, "factor": factor, "min_factor": min_factor}
    rest = specialise(sums.rest, f"rest_{name}", part=True, **parts, BIAS=np.int32(bias))
    steps = {"nothing": sums.nothing, "step": sums.step, "whole": sums.whole, "SIZE": type_size}
    steps["open_block"] = specialise(superblocks.open_template, f"open_{name}", part=True, **parts, rest=rest)
    dot = specialise(superblocks.dot_superblocks, f"dot_{name}", part=True, **steps)
    stack = specialise(stacks.stack_superblocks, f"stack_{name}", part=True, dot=dot)
    tile = specialise(superblocks.tile_superblocks, f"tile_{name}", part=True, **steps)
    unpack = specialise(
        unpacking.unpack_superblocks, f"unpack_{name}", part=True, **parts, SIZE=type_size, BIAS=np.float32(bias)
    )
    many = {"SIZE": type_size, "SPAN": span, "BIAS": np.int32(bias), "beside": lowest or scales}
    many["unpack_row"] = specialise(panels.unpack_row_template, f"unpack_row_{name}", part=True, **parts, **many)
    result = panels.result_minimums if lowest else panels.result_bias
    many["result"] = specialise(result, f"result_{name}", part=True, **many)
    many["block_sums"] = specialise(panels.block_sums_template, f"block_sums_{name}", part=True, **many)
    many["panel_sums"] = specialise(panels.panel_sums_template, f"panel_sums_{name}", part=True, **many)
    matmul_many = specialise(panels.matmul_panels, f"matmul_many_{name}", **many) if span else None
    fmt = Format(name, type, 256, type_size, "Q8_K", bias, MANY if span else 0, matmul_many=matmul_many)
    return _with_kernels(fmt, stack, tile, unpack)


def register_superblocks(*args) -> Format:
    """Enter a format of superblocks, see superblock_format."""
    return register(superblock_format(*args))


def _with_kernels(fmt: Format, stack, tile, unpack) -> Format:
    """The format with the kernels that are made of its dot product, its tile and its unpacking of a row."""
    name = fmt.name
    parts = {"stack": stack, "tile": tile, "start": first_record, "FAR": fmt.block_size < 256}
    matmul = specialise(products.matmul_rows, f"matmul_{name}", **parts)
    matmul_f32 = specialise(products.matmul_unpacked, f"matmul_f32_{name}", unpack=unpack)
    unpack_rows = specialise(unpacking.unpack_rows, f"unpack_rows_{name}", unpack=unpack)
    return replace(fmt, matmul=matmul, matmul_f32=matmul_f32, unpack_rows=unpack_rows)
