"""A GGUF in F16 in other formats, by llama.cpp: `python -m bench.quantise model-f16.gguf Q4_0 Q4_K_M ...`.

Writes model-Q4_0.gguf and so on beside it. Needs llama.cpp (pip install 'tinymia[verify]').
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from tinymia import Error
from tinymia_lab.comparison.ggml import package, quiet, why


def quantise(source: Path, name: str) -> Path:
    """Make a file of one format. Raises Error."""
    lib = package()
    kind = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{name}", None)
    if kind is None:
        known = [k.removeprefix("LLAMA_FTYPE_MOSTLY_") for k in dir(lib) if k.startswith("LLAMA_FTYPE_MOSTLY_")]
        raise Error(f"{name}: llama.cpp makes {', '.join(known)}", limit=1000)
    target = source.with_name(f"{source.stem.removesuffix('-f16').removesuffix('-F16')}-{name}.gguf")
    if target == source:
        raise Error(f"{source}: it would be written over itself")
    params = lib.llama_model_quantize_default_params()
    params.ftype = kind
    with quiet(lib) as log:
        if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
            raise Error(f"{source}: llama.cpp does not make {name} of it: {why(log)}")
    return target


def main() -> int:
    """Make the files that the command line names. Returns the exit status."""
    if len(sys.argv) < 3:
        print("usage: python -m bench.quantise FILE-f16.gguf FORMAT...", file=sys.stderr)
        return 2
    try:
        for name in sys.argv[2:]:
            print(quantise(Path(sys.argv[1]), name))
    except Error as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
