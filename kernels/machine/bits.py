"""Unpacking numbers of a few bits, in vectors of bytes."""

from .jit import inline
from .lanes import bits_of, concat
from .vectors import load_u8x32, load_u32x1


@inline
def nibbles(v):
    """The low four bits of each byte, then the high four bits of each byte."""
    return concat(v & 15, v >> 4)


@inline
def low_pairs(v):
    """Bits 0 and 1 of each byte, then bits 2 and 3 of each byte."""
    return concat(v, v >> 2) & 3


@inline
def high_pairs(v):
    """Bits 4 and 5 of each byte, then bits 6 and 7 of each byte."""
    return concat(v >> 4, v >> 6) & 3


@inline
def quants_of_2_bits(at):
    """256 quants from 64 bytes at an address: bits 0-1 of 32 bytes, then their bits 2-3, 4-5, 6-7; then the others."""
    a, b = load_u8x32(at), load_u8x32(at + 32)
    return low_pairs(a), high_pairs(a), low_pairs(b), high_pairs(b)


@inline
def quants_of_4_bits(at):
    """256 quants from 128 bytes at an address: for each 32 bytes their low nibbles, then their high nibbles."""
    a, b, c, d = load_u8x32(at), load_u8x32(at + 32), load_u8x32(at + 64), load_u8x32(at + 96)
    return nibbles(a), nibbles(b), nibbles(c), nibbles(d)


@inline
def single_bits(h):
    """256 numbers, 0 or 1, from 32 bytes: bit 0 of each byte, then bit 1 of each byte, and so on up to bit 7."""
    return (concat(h, h >> 1) & 1, concat(h >> 2, h >> 3) & 1, concat(h >> 4, h >> 5) & 1, concat(h >> 6, h >> 7) & 1)


@inline
def fifth_bits(address):
    """The 32 bits at an address, each as a byte that is 0 or 16."""
    return bits_of(load_u32x1(address)) << 4
