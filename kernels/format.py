"""The register of block formats: all that the rest of the program knows about a format.

A file in formats/ describes a format as a class, see products/loops.py. From the class a `Format` is made, and entered
in FORMATS under its ggml type number. Code that has a tensor looks its Format up there, and needs no `if type == ...`.
Source: ggml.h, enum ggml_type; gguf.GGML_QUANT_SIZES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Format:
    """A block format: `block_size` weights lie in `type_size` bytes; products take activations as `activation` says."""

    name: str
    type: int  # ggml's number of the format
    block_size: int
    type_size: int
    activation: str  # F32, F16, BF16, Q8_0, Q8_1 or Q8_K: how activations are rounded before a product
    bias: int = field(default=0, repr=False)  # weight = scale * (quant - bias) + minimum
    many_from: int = field(default=0, repr=False)  # matmul_many is taken from so many tokens on; 0: never
    matmul: Callable[..., None] | None = field(default=None, repr=False, compare=False)
    # For a pass of one token, where ggml sums that in another order than several tokens; None: matmul serves both.
    matmul_one: Callable[..., None] | None = field(default=None, repr=False, compare=False)
    matmul_f32: Callable[..., None] | None = field(default=None, repr=False, compare=False)
    matmul_many: Callable[..., None] | None = field(default=None, repr=False, compare=False)
    unpack_rows: Callable[..., None] | None = field(default=None, repr=False, compare=False)
    made_of: Any = field(default=None, repr=False, compare=False)  # the class that describes it

    def row_bytes(self, n_in: int) -> int:
        """Bytes of a row of n_in weights; ValueError when n_in is not a multiple of block_size."""
        if n_in % self.block_size:
            raise ValueError(f"a row of {n_in} weights: {self.name} rows are multiples of {self.block_size} weights")
        return n_in // self.block_size * self.type_size

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, its share of the block's scales included."""
        return 8 * self.type_size / self.block_size


FORMATS: dict[int, Format] = {}


def register(fmt: Format) -> Format:
    """Enter a format under its ggml type; ValueError when the type or the name is taken."""
    taken = [known for known in FORMATS.values() if fmt.type == known.type or fmt.name == known.name]
    if taken:
        raise ValueError(f"ggml type {fmt.type} {fmt.name} is already registered as {taken[0].type} {taken[0].name}")
    FORMATS[fmt.type] = fmt
    return fmt
