"""UNROLLED: superblocks of 256 weights with their tables looked up, 276 bytes, 8.625 bits a weight; only in memory.

    byte 0 .. 255    256 .. 271   272 .. 275
         q           s            d             weight = d s (q - 128)

q is unsigned, s signed, a scale for 16 weights; d is a float32. The IQ1, IQ2 and IQ3 types name vectors of 4 or 8
weights by their places in tables of hundreds. They are turned into this when they are loaded, which loses nothing: the
product of their three numbers has at most 22 bits.
Source: ggml-cpu/tiled/tiled.cpp, tiled_unpack_src0 (the numbers that dot products see).
"""

from .formats import superblock_format
from .machine.jit import inline
from .machine.lanes import first
from .machine.vectors import f32x8, load_f32x1, load_i8x16, load_u8x64, to_i32
from .superblocks import BIAS_BY_LANE


@inline
def quants(block):
    return load_u8x64(block), load_u8x64(block + 64), load_u8x64(block + 128), load_u8x64(block + 192)


@inline
def scales(block):
    return to_i32(load_i8x16(block + 256))


@inline
def factor(block):
    return f32x8(first(load_f32x1(block + 272)))


UNROLLED = superblock_format("UNROLLED", -1, 276, 128, 16, BIAS_BY_LANE, quants, scales, factor)
