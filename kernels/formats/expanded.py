"""The format that weights of the IQ1, IQ2 and IQ3 types are decoded to when they are loaded; it is in no file."""

from ..machine.lanes import first
from ..machine.template import part
from ..machine.vectors import f32x8, load_f32x1, load_i8x16, load_u8x64, to_i32
from ..products.superblock_sums import BiasByLane
from ..products.superblocks_many import ManyTokensWithBias


class EXPANDED(BiasByLane, ManyTokensWithBias):
    """8.625 bits per weight: weight = d * s * (q - 128); superblocks with their tables looked up.

        byte  0-255   256-271   272-275
              q, u8   s, i8     d, f32

    The IQ1, IQ2 and IQ3 types store indices into tables of vectors of 4 or 8 weights. Expanding them loses nothing: the
    product d * s * (q - 128) needs at most 22 bits, and a float32 has 24. s: one per 16 weights.
    Source: ggml-cpu/tiled/tiled.cpp, tiled_unpack_src0 (the numbers that dot products see).
    """

    TYPE, SIZE, BIAS, SPAN = -1, 276, 128, 16

    @part
    def quants(block):
        """Load the bytes 0 to 255."""
        return load_u8x64(block), load_u8x64(block + 64), load_u8x64(block + 128), load_u8x64(block + 192)

    @part
    def scales(block):
        """Load the signed bytes 256 to 271."""
        return to_i32(load_i8x16(block + 256))

    @part
    def factor(block):
        """Load the float32 number at byte 272."""
        return f32x8(first(load_f32x1(block + 272)))
