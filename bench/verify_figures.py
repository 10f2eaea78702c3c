"""The figures of docs/verify.md: every weight format that llama-quantize makes, on random models and on stories260K.

    PYTHONPATH=tests python bench/verify_figures.py [--stories stories260K-f32.gguf] [--only Q4_K_M ...] [--quick]
    PYTHONPATH=tests python bench/verify_figures.py --decoding [--vocab llama2-vocab.gguf] [--real smollm2]

Needs llama.cpp (pip install 'tinymia[verify]'). Prints Markdown tables; the first command takes about ten minutes on
two cores, the second one five.
"""

import argparse
import ctypes
import os
import sys
import tempfile
from collections import Counter

import gguf
import numpy as np
from tiny import write_gguf

import tinymia
import tinymia_files
import tinymia_kernels
from tinymia_lab.comparison.ggml import package, quiet, why
from tinymia_lab.comparison.verify import verify
from tinymia_models.stores import find

FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S",
           "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "IQ3_S", "IQ3_M"]
WEIGHED = ["Q2_K_S", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]  # want an importance matrix
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

# Of decoding: the formats, two of the models above (both with heads that share keys, one with tied output) and twenty
# prompts: ten of those that llama.cpp tests its tokenizers with (models/ggml-vocab-llama-spm.gguf.inp), ten in other
# scripts. With a vocabulary of few words most of them become bytes.
DECODED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K_S", "Q6_K"]
DECODED_SHAPES = ("d64g4", "d80g2")
LLAMA2 = ["ied 4 ½ months", "Äpfel", "Hello world", " Hello World!", " this is 🦙.cpp", "w048 7tuijk dsdfhu",
          "нещо на Български", "កាន់តែពិសេសអាចខលចេញ",
          "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～", "Cửa Việt"]
SCRIPTS = ["Η πρωτεύουσα της Γαλλίας είναι", "Столица Франции — это", "法国的首都是", "フランスの首都は",
           "프랑스의 수도는", "عاصمة فرنسا هي", "בירת צרפת היא", "फ्रांस की राजधानी", "ประเทศฝรั่งเศส",
           "საფრანგეთის დედაქალაქი"]
CHAT = "<|im_start|>user\nWho was Ada Lovelace?<|im_end|>\n<|im_start|>assistant\n"
REAL = ["The capital of France is", "Die Hauptstadt von Frankreich ist", "La capitale de la France est",
        "Столица Франции — это", "法国的首都是", "フランスの首都は", "عاصمة فرنسا هي",
        "फ्रांस की राजधानी", "def quicksort(arr):", "🚀 to the moon 🌕", CHAT]
GENERATED = 64


def prompt(n: int, n_vocab: int) -> list[int]:
    """A prompt of n tokens: BOS and random ids."""
    return [1, *np.random.default_rng([0, n]).integers(3, n_vocab, n - 1).tolist()]


def formats() -> list[str]:
    """The formats to measure: FORMATS, and every new one that has kernels and that llama-quantize makes."""
    new = [fmt.name for fmt in tinymia_kernels.FORMATS.values() if fmt.name not in FORMATS]
    return FORMATS + [name for name in new if hasattr(package(), f"LLAMA_FTYPE_MOSTLY_{name}")] + WEIGHED


def quantize(source: str, target: str, name: str) -> str:
    """Make a file of this format by llama.cpp, where need be with an importance matrix of ones."""
    if name == "F32":
        return source
    llama_cpp = package()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}", -1), 1
    if params.ftype < 0:
        raise tinymia.Error(f"{name}: llama-quantize makes {', '.join(formats())}", limit=1000)
    if name in WEIGHED:
        matrices = [t for t in gguf.GGUFReader(source).tensors if len(t.shape) == 2]
        ones = (ctypes.c_float * 4096)(*[1.0] * 4096)
        entry = llama_cpp.llama_model_imatrix_data
        rows = [entry(t.name.encode(), ones, int(t.shape[0])) for t in matrices]
        importance = (entry * (len(rows) + 1))(*rows)  # the last one, without a name, ends it
        params.imatrix = ctypes.cast(importance, type(params.imatrix))
    with quiet(llama_cpp) as log:
        if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
            raise tinymia.Error(f"llama-quantize refuses: {why(log)}")
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


def decoding(model: tinymia.Model, texts: list[str]) -> str:
    """Cells of the table of decoding: prompts, passes after the prompt's, tensors with equal bits, texts."""
    passes = same = of = texts_equal = tokens_equal = 0
    for text in texts:
        out = verify(model, text, n_predict=GENERATED)
        passes += out["passes"] - 1
        same += out["identical"] + out["identical_decoding"]
        of += len(out["rows"]) + out["of_decoding"]
        texts_equal += out["output"]["equal"]
        tokens_equal += out["tokens_equal"]
    return f"{len(texts)} | {tokens_equal} | {passes} | {same} of {of} | {texts_equal}"


def never_ends(name: str, x: np.ndarray) -> np.ndarray:
    """The weights of a random model whose texts do not end early: the end token's row is zeros, so its logit is 0."""
    if name in ("output.weight", "token_embd.weight"):
        x[2] = 0
    return x


def decoding_table(folder: str, args: argparse.Namespace) -> None:
    """Every tensor of every pass while both engines go on greedily."""
    print("\n| model | weights | prompts | same ids | passes of decoding | tensors bit-identical | same text |")
    print("|---|---|---|---|---|---|---|")
    pieces = None
    if args.vocab:
        vocabulary = tinymia_files.read_tokenizer(tinymia_files.read_gguf(args.vocab)[0], args.vocab)
        if not hasattr(vocabulary, "scores"):
            raise tinymia.Error(f"{args.vocab}: a vocabulary of sentencepiece is needed")
        pieces = vocabulary.pieces, vocabulary.scores, [int(kind) for kind in vocabulary.types]
    for shape in DECODED_SHAPES:
        how = SHAPES[shape]
        source = write_gguf(f"{folder}/{shape}-decoding.gguf", n_embd=256, n_ff=512, n_layer=2, seed=len(shape),
                            d_head_v=how["d_head"], pieces=pieces, n_vocab=len(pieces[0]) if pieces else 384,
                            spoil=never_ends, **how)
        for name in args.only or DECODED:
            path = quantize(source, f"{folder}/{shape}-{name}.gguf", name)
            print(f"| {shape} | {name} | {decoding(tinymia.load(path, args.threads), LLAMA2 + SCRIPTS)} |")
            if path != source:
                os.unlink(path)
        os.unlink(source)
    if args.real:
        model = tinymia.load(args.real, args.threads)
        print(f"| {model.config.name} | {repr(model).split(', ')[-2]} | {decoding(model, REAL)} |")


def prompt_tables(folder: str, args: argparse.Namespace) -> None:
    """Every tensor of the pass over prompts, in every format; of stories260K the greedy text as well."""
    shapes = dict(list(SHAPES.items())[:2]) if args.quick else SHAPES
    lengths = LENGTHS[:2] if args.quick else LENGTHS

    def write(shape: str, wtype: str = "F32") -> str:
        how = SHAPES[shape]
        return write_gguf(f"{folder}/{shape}-{wtype}.gguf", n_embd=256, n_ff=512, n_layer=2, seed=len(shape),
                          d_head_v=how["d_head"], wtype=wtype, **how)

    sources = {shape: write(shape) for shape in shapes}
    if args.stories:
        sources["stories260K"] = args.stories
    print("| weights | worst NMSE | where | bit-identical | each op by itself (--inject) | bit-identical | types |")
    print("|---|---|---|---|---|---|---|")
    for name in args.only or formats():
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


def main() -> int:
    """Print the tables; the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stories", metavar="FILE")
    p.add_argument("--only", nargs="+", metavar="FORMAT", help="default: all")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--quick", action="store_true", help="two shapes, prompts of 2 and 33 tokens")
    p.add_argument("--decoding", action="store_true", help="the table of decoding instead")
    p.add_argument("--vocab", metavar="FILE", help="with --decoding: random models with the vocabulary of this GGUF")
    p.add_argument("--real", metavar="FILE", help="with --decoding: this trained model as well")
    args = p.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    try:
        package()
        for path in filter(None, (args.stories, args.vocab, args.real)):
            tinymia_files.read_gguf(find(path))     # raises Error now for a file that is not a model
        with tempfile.TemporaryDirectory() as folder:
            if args.decoding:
                decoding_table(folder, args)
            else:
                prompt_tables(folder, args)
    except tinymia.Error as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
