"""The arithmetic of tinymia: numba kernels on NumPy arrays and on GGUF block formats. Nothing here knows of models.

    matmul.py      products with weights as they lie in the file, and unpacking rows    } what Python calls:
    attention.py   scores, softmax, weighted sums, and all of it in one                 } arrays are checked, prepared
    ops.py         RMS norm, rotary positions, SiLU, GELU, soft caps                    } and handed to the threads
    arithmetic.py  the functions of tinymia.py's arithmetic, by all of these
    format.py      the register of block formats
    formats/       one class per block format: where its bits lie, and the few functions that read them
    products/      the loops of matrix products, one family of formats per file: floats, blocks of 32, superblocks
                   of 256; and how activations are quantised for them
    attention_kernels.py  the compiled loops of attention; soft_max_rows.py: those of the softmax
    machine/       what knows of LLVM, the CPU, the cache of compiled code and threads

To see how a product with Q4_K is computed, read formats/k_quants.py, products/superblocks.py, superblock_sums.py
and products/loops.py. `python -m tinymia_kernels Q4_K` prints these parts as a tree.
"""

from .arithmetic import Arithmetic
from .attention import attention, kq, kqv, put, soft_max
from .format import FORMATS, Format, register
from .formats import expanded
from .machine.jit import announce_done, compiling
from .machine.threads import Pool, physical_cores
from .matmul import Matrix, dequantize, get_rows, matmul, matmul_several
from .ops import gelu, rms_norm, rope, rope_angles, silu, soft_cap

EXPANDED = expanded.EXPANDED.format

__all__ = [
    "EXPANDED", "FORMATS", "Arithmetic", "Format", "Matrix", "Pool", "announce_done", "attention", "compiling",
    "dequantize", "gelu", "get_rows", "kq", "kqv", "matmul", "matmul_several", "physical_cores", "put", "register",
    "rms_norm", "rope", "rope_angles", "silu", "soft_cap", "soft_max",
]
