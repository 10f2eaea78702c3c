"""Broken files by the thousand: each mutant of a model is loaded and run in a forked child of this warm process.

    python tests/fuzz.py 2000 SEED.gguf          mutants of a file
    python tests/fuzz.py 500 Q4_K_M gpt2         mutants of small models made here: one in Q4_K and Q6_K, one with a
                                                 vocabulary of gpt2's kind (needs the tokenizers library)

The command is run whole, `tinymia -m MUTANT -p Once -n 1`. What may come of it: ok (exit 0, nothing but notes on
stderr), or clean (exit 2 and one line `error: ...`). Anything else is a failure: dirty (another exit status, or a
traceback), crash (a signal), hang. The mutants are those of tools/fuzz_gguf.py in the folder `shared` beside the
project.
"""
import argparse
import collections
import contextlib
import random
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "shared" / "tools")]
import bpe_vocab  # noqa: E402
import numpy as np  # noqa: E402
from forked import in_child  # noqa: E402
from formats import random_bytes  # noqa: E402
from fuzz_gguf import mutate  # noqa: E402
from rawgguf import Info, Raw  # noqa: E402
from tiny import write_gguf  # noqa: E402

import tinymia  # noqa: E402
import tinymia_kernels as kernels  # noqa: E402


def q4_k_m(path):
    """A small model whose matrices are of the types that llama.cpp's Q4_K_M gives them: Q4_K, and Q6_K for some."""
    g = Raw.read(write_gguf(path, n_embd=256, n_layer=2, n_head=4, n_head_kv=2, n_ff=256))
    formats, data, rng = {f.name: f for f in kernels.FORMATS.values()}, g.data, np.random.default_rng(0)
    tensors, g.tensors, g.data = g.tensors, [], b""
    for t in tensors:
        name, size = t.name.removesuffix(".weight").rpartition(".")[2], 4 * int(np.prod(t.dims))
        raw, kind = data[t.offset:t.offset + size], t.kind
        if len(t.dims) == 2:
            fmt = formats["Q6_K" if name in ("output", "ffn_down", "attn_v") else "Q4_K"]
            raw, kind = random_bytes(fmt, rng, t.dims[1], t.dims[0]).tobytes(), fmt.type
        g.tensors.append(Info(t.name, t.dims, kind, len(g.data)))
        g.data += raw + bytes(-len(raw) % 32)
    return g.write(path)


SEEDS = {"Q4_K_M": q4_k_m, "gpt2": lambda path: write_gguf(path, meta=bpe_vocab.metadata())}


def command(path):
    """The exit status of the command, in this process."""
    try:
        return tinymia.main(["-m", str(path), "-p", "Once", "-n", "1", "--threads", "1"])
    except SystemExit as e:
        return e.code or 0


def verdict(done):
    if done.kind in ("crash", "hang"):
        return done.kind
    if done.kind == "ok" and done.value == 0 and "Traceback" not in done.said:
        return "ok"
    errors = [line for line in done.said.splitlines() if line.startswith("error: ")]
    clean = done.kind == "ok" and done.value == 2 and len(errors) == 1 and "Traceback" not in done.said
    return "clean" if clean else "dirty"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n", type=int)
    parser.add_argument("files", nargs="+", help="GGUF files, or Q4_K_M or gpt2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=20, help="seconds after which a mutant hangs")
    parser.add_argument("--keep", type=Path, help="a folder for the mutants that fail")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        mutant = Path(folder) / "mutant.gguf"
        for file in args.files:
            seed = Path(SEEDS[file](Path(folder) / "seed.gguf") if file in SEEDS else file)
            with contextlib.redirect_stdout(sys.stderr):
                if command(seed):  # also compiles the kernels, so that no child has to
                    raise SystemExit(f"{file}: not a model that runs, so its mutants show nothing")
            whole, rng, counts = seed.read_bytes(), random.Random(args.seed), collections.Counter()
            header = min(len(whole), 200_000)
            for i in range(args.n):
                mutant.write_bytes(mutate(whole, rng, min(header, 20_000) if i % 2 else header))
                done = in_child(command, mutant, timeout=args.timeout)
                kind = verdict(done)
                counts[kind] += 1
                if kind not in ("ok", "clean"):
                    failed = True
                    print(f"{file}, mutant {i}: {kind}: {done.value} {done.said.strip()[-300:]}", flush=True)
                    if args.keep:
                        args.keep.mkdir(parents=True, exist_ok=True)
                        mutant.replace(args.keep / f"{seed.stem}-{i}-{kind}.gguf")
            told = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
            print(f"{file}: {args.n} mutants: {told}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
