"""What lies on disk, read and written here alone; everything read is hostile until checked.

    gguf.py        the index of a GGUF file, and its tensors where they lie in the map
    hparams.py     the model's shape out of the metadata
    tokenizer.py   text to ids and back, by sentencepiece on the file's own vocabulary
    tensors.py     saved activations: raw float32, .npy, .npz
"""

from .errors import Error, FileError, GGUFError, short
from .gguf import Tensor, read_gguf
from .hparams import read_hparams
from .tensors import as_rows, check_target, read_tensor, write_atomic, write_tensors
from .tokenizer import Text, Tokenizer

__all__ = [
    "Error", "FileError", "GGUFError", "Tensor", "Text", "Tokenizer",
    "as_rows", "check_target", "read_gguf", "read_hparams", "read_tensor", "short", "write_atomic", "write_tensors",
]
