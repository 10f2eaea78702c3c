"""The arithmetic of tinymia: numba kernels on NumPy arrays and on GGUF block formats. Knows nothing of models.

    matmul.py      products with weights as they lie in the file, and unpacking rows    } what Python calls:
    attention.py   scores, softmax, weighted sums, and all of it in one                 } arrays are checked, prepared
    ops.py         RMS norm, rotary positions, SiLU, GELU, soft caps                    } and handed to the threads
    arithmetic.py  the functions of tinymia.py's arithmetic, by all of these
    format.py      the register of block formats
    formats/       one class per block format: where its bits lie, and the few functions that read them
    products/      the loops that formats are put into, by family: floats, blocks of 32, superblocks of 256;
                   all of a family's jobs together, and the activations beside them
    attention_kernels.py  the compiled loops of attention; soft_max_rows.py those of the softmax
    machine/       what knows of LLVM, the CPU, the cache of compiled code and threads

Whoever wants to know how a product with Q4_K is computed reads formats/k_quants.py, products/superblocks.py and
superblock_sums.py, and products/loops.py around them. `python -m tinymia_kernels Q4_K` prints the parts as a tree.
"""

from .arithmetic import Arithmetic
from .attention import attention, kq, kqv, soft_max, store_keys, store_values
from .format import FORMATS, Format, register
from .formats import expanded
from .machine.jit import announce_done, compiling
from .machine.threads import Pool, physical_cores
from .matmul import dequantize, get_rows, matmul, matmul_several
from .ops import gelu, rms_norm, rope, rope_angles, silu, soft_cap

EXPANDED = expanded.EXPANDED.format

__all__ = [
    "EXPANDED", "FORMATS", "Arithmetic", "Format", "Pool", "announce_done", "attention", "compiling", "dequantize",
    "gelu", "get_rows", "kq", "kqv", "matmul", "matmul_several", "physical_cores", "register", "rms_norm", "rope",
    "rope_angles", "silu", "soft_cap", "soft_max", "store_keys", "store_values",
]
