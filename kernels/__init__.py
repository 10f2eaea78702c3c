"""The arithmetic of tinymia: numba kernels on NumPy arrays and on GGUF block formats. Knows nothing of models.

    matmul.py       products with weights as they lie in the file, unpacking rows
    formats.py      the registry of block formats; one family each is described in
                    floats.py, q8.py, q4_q5.py, k_quants.py, iq4.py, mxfp4.py, ternary.py, unrolled.py
    products.py     the kernels of products, made for each format of
        rows.py         two rows with four tokens, block_panels.py many tokens at once
        superblocks.py  the same for formats of 256 weights, panels.py for many tokens at once
        stacks.py       four rows with one token
    unpack.py       float32 rows
    activations.py  rounding and quantising activations before a product
    attention.py    scores, softmax, weighted sums, and all of it in one; attention_rows.py holds its kernels
    ops.py          RMS norm, rotary positions, SiLU
    sampling.py     a token from logits
    threads.py      the pool over which items are split
    jit.py          compilation, its cache, its announcement
    notes.py        lines for the user, on stderr
    simd.py         LLVM vectors in numba, lanes.py functions on them, vectors.py the ones used here
    cpu.py          what only some CPUs have, beside a portable form
"""

from . import floats, iq4, k_quants, mxfp4, q4_q5, q8, ternary  # noqa: F401  each registers its formats
from .attention import attention, kq, kqv, soft_max, store_keys, store_values
from .formats import FORMATS, Format
from .jit import announce_done, compiling
from .matmul import dequantize, get_rows, matmul
from .notes import note
from .ops import rms_norm, rope, rope_angles, silu
from .sampling import Sampler, softmax
from .threads import Pool, physical_cores
from .unrolled import UNROLLED

__all__ = [
    "FORMATS", "UNROLLED", "Format", "Pool", "Sampler", "announce_done", "attention", "compiling", "dequantize",
    "get_rows", "kq", "kqv", "matmul", "note", "physical_cores", "rms_norm", "rope", "rope_angles", "silu", "soft_max",
    "softmax", "store_keys", "store_values",
]  # fmt: skip
