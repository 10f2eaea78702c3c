"""What lies on disk, read and written here alone; everything read is hostile until checked.

    gguf.py        the index of a GGUF file, and its tensors where they lie in the map; split.py models of several
    hparams.py     the model's shape out of the metadata
    tokenizer.py   text to ids and back: spm.py by sentencepiece, bpe.py by tokenizers, vocab.py what both have
    tensors.py     saved activations: raw float32, .npy, .npz
"""

from .errors import Error, FileError, GGUFError, printable, short
from .gguf import Tensor, decode_now
from .hparams import read_hparams
from .split import read_gguf
from .tensors import as_rows, check_target, read_tensor, write_atomic, write_tensors
from .tokenizer import Text, read_tokenizer
from .vocab import Tokenizer

__all__ = [
    "Error", "FileError", "GGUFError", "Tensor", "Text", "Tokenizer", "as_rows", "check_target", "decode_now",
    "printable", "read_gguf", "read_hparams", "read_tensor", "read_tokenizer", "short", "write_atomic", "write_tensors",
]
