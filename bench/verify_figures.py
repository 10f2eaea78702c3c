"""The figures of docs/verify.md: every weight format that llama-quantize makes, on random models and on stories260K.

    PYTHONPATH=tests python bench/verify_figures.py [--stories stories260K-f32.gguf] [--only Q4_K_M ...] [--quick]

Needs llama.cpp (pip install 'tinymia[verify]'). Prints two Markdown tables; about ten minutes on two cores.
"""

import argparse
import ctypes
import os
import sys
import tempfile
from collections import Counter

import gguf
import llama_cpp
import numpy as np
from tiny import write_gguf

import tinymia
import tinymia_kernels
from tinymia_lab.comparison.verify import verify

FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S",
           "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "IQ3_S", "IQ3_M"]
WEIGHED = ["Q2_K_S", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]  # want an importance matrix
# A format that has kernels and that llama-quantize makes is measured, also when it is new.
FORMATS += [fmt.name for fmt in tinymia_kernels.FORMATS.values()
            if fmt.name not in FORMATS and hasattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{fmt.name}")]
# d_head 64, 80, 128; 1, 2, 3, 4, 8 query heads a KV head; rope base 1e4, 5e5; linear scaling; tied or not. Rows of
# attn_output are no multiple of 256 where d_head is 80: llama-quantize then takes another type.
SHAPES: dict[str, dict] = {
    "d64g1": {"d_head": 64, "n_head": 4, "n_head_kv": 4},
    "d64g4": {"d_head": 64, "n_head": 8, "n_head_kv": 2, "rope_base": 5e5, "tied": True},
    "d80g2": {"d_head": 80, "n_head": 4, "n_head_kv": 2, "rope_scale": 4.0},
    "d128g8": {"d_head": 128, "n_head": 8, "n_head_kv": 1, "rope_base": 5e5, "rope_scale": 2.0, "tied": True},
    "d64g3": {"d_head": 64, "n_head": 6, "n_head_kv": 2},
}
LENGTHS = (2, 33, 200)
TEXTS = ["Once upon a time", "One day, Tim", "Lily and Ben", "The sun was", "There was a big dog", "Mom said",
         "The cat", "In the park", "A little bird", "Tom had a red ball", "She was very sad", "The boy and the girl",
         "It was a cold", "Sara likes to", '"Can I play', "Dad went to", "The bear", "They all laughed", "Max the dog",
         "At night"]


def prompt(n: int, n_vocab: int) -> list[int]:
    return [1, *np.random.default_rng([0, n]).integers(3, n_vocab, n - 1).tolist()]


def quantize(source: str, target: str, name: str) -> str:
    """Make a file of this format by llama.cpp, where need be with an importance matrix of ones."""
    if name == "F32":
        return source
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"), 1
    if name in WEIGHED:
        matrices = [t for t in gguf.GGUFReader(source).tensors if len(t.shape) == 2]
        ones = (ctypes.c_float * 4096)(*[1.0] * 4096)
        entry = llama_cpp.llama_model_imatrix_data
        rows = [entry(t.name.encode(), ones, int(t.shape[0])) for t in matrices]
        importance = (entry * (len(rows) + 1))(*rows)  # the last one, without a name, ends it
        params.imatrix = ctypes.cast(importance, type(params.imatrix))
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
        raise tinymia.Error("llama-quantize refuses")
    return target


def figures(path: str, prompts: list[list[int]], worst: dict, threads: int) -> None:
    """Worst NMSE, plain and op by op, over these prompts, into `worst`."""
    model = tinymia.load(path, threads)
    worst.setdefault("types", Counter()).update(w.type_name for w in model.weights.values() if len(w.shape) == 2)
    for ids in prompts:
        for how in ("plain", "inject"):
            out = verify(model, ids, inject=how == "inject")
            got = worst.setdefault(how, {"nmse": -1.0, "same": 0, "of": 0, "over": 0})
            got["same"], got["of"] = got["same"] + out["identical"], got["of"] + len(out["rows"])
            got["over"] += sum(row["over"] for row in out["rows"])
            if out["absent"] or out["unknown"]:
                raise SystemExit(f"{path}: names: {out['absent']} {out['unknown']}")
            if out["worst"]["nmse"] > got["nmse"]:
                got["nmse"], got["name"] = out["worst"]["nmse"], f"{out['worst']['name']}, {len(ids)} tokens"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stories", metavar="FILE")
    p.add_argument("--only", nargs="+", default=FORMATS + WEIGHED, metavar="FORMAT")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--quick", action="store_true", help="two shapes, prompts of 2 and 33 tokens")
    args = p.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # llama-quantize talks
    shapes = dict(list(SHAPES.items())[:2]) if args.quick else SHAPES
    lengths = LENGTHS[:2] if args.quick else LENGTHS
    with tempfile.TemporaryDirectory() as folder:
        def write(shape: str, wtype: str = "F32") -> str:
            how = SHAPES[shape]
            return write_gguf(f"{folder}/{shape}-{wtype}.gguf", n_embd=256, n_ff=512, n_layer=2, seed=len(shape),
                              d_head_v=how["d_head"], wtype=wtype, **how)

        sources = {shape: write(shape) for shape in shapes}
        if args.stories:
            sources["stories260K"] = args.stories
        print("| weights | worst NMSE | where | bit-identical | each op by itself (--inject) | bit-identical | types |")
        print("|---|---|---|---|---|---|---|")
        for name in args.only:
            worst: dict = {}
            try:
                for shape, source in sources.items():
                    if name != "MXFP4":
                        path = quantize(source, f"{folder}/{shape}-{name}.gguf", name)
                    elif shape in shapes:  # llama-quantize makes it for mixtures of experts only; llama.cpp runs it
                        path = write(shape, name)
                    else:
                        continue
                    n_vocab = 512 if shape == "stories260K" else 384
                    figures(path, [prompt(n, n_vocab) for n in lengths], worst, args.threads)
                    if path != source:
                        os.unlink(path)
            except tinymia.Error as e:
                print(f"| {name} | {str(e).replace(folder + '/', '')} ||||||")
                continue
            a, b = worst["plain"], worst["inject"]
            print(f"| {name} | {a['nmse']:.1e}{' OVER' * bool(a['over'])} | {a['name'] if a['nmse'] else ''} | "
                  f"{a['same']} of {a['of']} | {b['nmse']:.1e}{' OVER' * bool(b['over'])} | {b['same']} of {b['of']} | "
                  f"{', '.join(f'{t} x{n}' for t, n in worst['types'].most_common())} |")
        if args.stories:
            print("\n| stories260K | prompts | the same 64 greedy tokens | worst KL, nats |\n|---|---|---|---|")
            for name in ("F32", "F16", "Q8_0"):
                model = tinymia.load(quantize(args.stories, f"{folder}/stories-{name}.gguf", name), args.threads)
                runs = [verify(model, text, only="result_output", n_predict=64) for text in TEXTS]
                same = sum(run["output"]["equal"] for run in runs)
                print(f"| {name} | {len(runs)} | {same} | {max(run['kl']['max'] for run in runs):.1e} |")


if __name__ == "__main__":
    main()
