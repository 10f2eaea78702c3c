"""All reading and writing of files. A file that is read may be hostile, so everything in it is checked first.

    gguf.py        the index of a GGUF file, and its tensors as views of the mapped file;
                   split.py: models in several files
    config.py      the shape of a model; architectures.py: what sets architectures apart, as a table
    hparams.py     reads that shape from the metadata, key by key (metadata.py); rope.py what of it is about positions;
                   unused.py: tensors and keys that do not change the numbers
    tokenizer.py   text to ids and back: spm.py by sentencepiece, bpe.py by tokenizers, vocab.py for both
    tensors.py     saved activations: raw float32, .npy, .npz
    disk.py        how files are read, text and JSON of any kind; outputs.py: how files are written
"""

from .architectures import ARCHITECTURES
from .config import Config, Layer, Rope
from .disk import dumps, expand, note, plain, read_json, read_text, reading
from .errors import ActionError, Error, FileError, GGUFError, Note, UnknownName, printable, short
from .gguf import Tensor, decode_now
from .hparams import read_hparams
from .outputs import check_apart, check_target, place, write_atomic
from .split import read_gguf
from .tensors import as_rows, read_npz, read_tensor, write_tensors
from .tokenizer import Text, read_tokenizer
from .unused import check_tensors
from .vocab import Tokenizer

__all__ = [
    "ARCHITECTURES",
    "ActionError",
    "Config",
    "Error",
    "FileError",
    "GGUFError",
    "Layer",
    "Note",
    "Rope",
    "Tensor",
    "Text",
    "Tokenizer",
    "UnknownName",
    "as_rows",
    "check_apart",
    "check_target",
    "check_tensors",
    "decode_now",
    "dumps",
    "expand",
    "note",
    "place",
    "plain",
    "printable",
    "read_gguf",
    "read_hparams",
    "read_json",
    "read_npz",
    "read_tensor",
    "read_text",
    "read_tokenizer",
    "reading",
    "short",
    "write_atomic",
    "write_tensors",
]
