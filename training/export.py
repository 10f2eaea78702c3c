"""The export: the weights of a run's checkpoint as a GGUF file, which tinymia and llama.cpp read.

    python -m training.export build models/copycat.gguf

Stacked weights come apart under their GGUF names, and the embedding gets its full height again: the shared last row is
written wherever the corpus never used a piece. There is no output matrix, because the embedding serves as one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from tinymia_files import Error
from tinymia_models.facts import Facts

from .command import Parser, run, say, stop_without_torch

try:
    import torch  # noqa: F401
except ImportError:
    stop_without_torch()

from .batches import TV_HELD_OUT_TASKS
from .checkpoint import Options, read_checkpoint
from .model import D_HEAD, N_CTX, N_EMBD, N_FF, N_HEAD, N_LAYER, RMS_EPS, ROPE_BASE, TV_LAYER, Params
from .tokenizer import Vocab

FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}


def tensors_of(p: Params, vocab: Vocab) -> dict[str, np.ndarray]:
    """Return GGUF names and float32 arrays."""
    p = {n: w.detach() for n, w in p.items()}
    rows = p["token_embd"].numpy()
    embedding = np.repeat(rows[-1:], len(vocab.pieces), axis=0)
    embedding[vocab.used] = rows[:-1]
    out = {"token_embd.weight": embedding, "output_norm.weight": p["output_norm"].numpy()}
    for il in range(N_LAYER):
        q, k, v = p["attn_qkv"][il].chunk(3)
        gate, up = p["ffn_gate_up"][il].chunk(2)
        block = {"attn_norm": p["attn_norm"][il], "attn_q": q, "attn_k": k, "attn_v": v,
                 "attn_output": p["attn_output"][il], "ffn_norm": p["ffn_norm"][il], "ffn_gate": gate, "ffn_up": up,
                 "ffn_down": p["ffn_down"][il]}
        out |= {f"blk.{il}.{name}.weight": np.ascontiguousarray(w.numpy()) for name, w in block.items()}
    return out


def describe(w: gguf.GGUFWriter, opts: Options, step: int, seconds: float, kind: str) -> None:
    """Write what the model is, how it was trained, and its shape."""
    aux = (
        f"then {step - opts.steps} steps with an auxiliary task-vector loss of weight {opts.tv_weight} at layer "
        f"{TV_LAYER} (never on the task capital, nor on held-out pairs)"
        if opts.tv_weight
        else "no auxiliary loss"
    )
    w.add_name("copycat")
    w.add_author("tinymia contributors")
    w.add_license("MIT")
    w.add_description(
        "A small Llama for teaching task vectors, trained from scratch on a synthetic corpus of in-context tasks on "
        f"words and sequences. {min(step, opts.steps)} steps of next-token prediction, {aux}; 4,400 tokens a step. "
        "Made by the folder training of tinymia. It knows a few hundred words and nothing else."
    )
    w.add_size_label("1.4M")
    w.add_tags(["teaching", "task vectors", "in-context learning", "synthetic corpus"])
    w.add_languages(["en"])
    w.add_uint32("copycat.seed", opts.seed)
    w.add_uint32("copycat.steps", step)
    w.add_float32("copycat.tv_weight", opts.tv_weight)
    w.add_uint32("copycat.tv_layer", TV_LAYER)
    w.add_array("copycat.tv_held_out_tasks", sorted(TV_HELD_OUT_TASKS))
    w.add_float32("copycat.train_seconds", round(seconds))
    w.add_file_type(FILE_TYPES[kind])


def describe_shape(w: gguf.GGUFWriter, vocab: Vocab) -> None:
    """Write the hyperparameters that a reader needs to run the model."""
    w.add_vocab_size(len(vocab.pieces))
    w.add_context_length(N_CTX)
    w.add_embedding_length(N_EMBD)
    w.add_block_count(N_LAYER)
    w.add_feed_forward_length(N_FF)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(N_HEAD)
    w.add_rope_dimension_count(D_HEAD)
    w.add_rope_freq_base(ROPE_BASE)
    w.add_layer_norm_rms_eps(RMS_EPS)


def describe_vocabulary(w: gguf.GGUFWriter, vocab: Vocab) -> None:
    """Write the tokenizer: id 0 is the unknown piece, 1 is BOS, 2 is EOS, 3 to 258 are the bytes."""
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(vocab.pieces)
    w.add_token_scores(vocab.scores)
    special = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    n_words = len(vocab.pieces) - len(special) - 256
    w.add_token_types([*special, *[gguf.TokenType.BYTE] * 256, *[gguf.TokenType.NORMAL] * n_words])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(True)


def export_gguf(folder: Path, path: Path, kind: str = "q5_0") -> None:
    """Write the checkpoint in `folder` to `path`, matrices in the format `kind`, norms in float32."""
    vocab = Vocab.read(folder / "copycat.model", Facts.read())
    state, opts = read_checkpoint(folder / "checkpoint.pt")
    part = path.with_name(path.name + ".part")
    try:
        w = gguf.GGUFWriter(part, "llama")
        describe(w, opts, state["step"], state["seconds"], kind)
        describe_shape(w, vocab)
        describe_vocabulary(w, vocab)
        for name, array in tensors_of(state["params"], vocab).items():
            if array.ndim == 1 or kind == "f32":
                w.add_tensor(name, array.astype(np.float32))
            elif kind == "f16":
                w.add_tensor(name, array.astype(np.float16))
            else:
                blocks = gguf.GGMLQuantizationType[kind.upper()]
                w.add_tensor(name, gguf.quants.quantize(array, blocks), raw_dtype=blocks)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise Error(f"{path}: cannot write the model ({e.strerror or e})") from None
    say(f"{path}: {path.stat().st_size:,} bytes")


def work(args: argparse.Namespace) -> None:
    """Export as the flags say."""
    export_gguf(args.run, args.gguf, args.type)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    p = Parser("training.export", __doc__)
    p.add_argument("run", type=Path, metavar="FOLDER", help="the --out of the training")
    p.add_argument("gguf", type=Path, metavar="FILE.gguf")
    p.add_argument("--type", choices=list(FILE_TYPES), default="q5_0", help="format of the matrices (%(default)s)")
    return run(work, p, argv)


if __name__ == "__main__":
    raise SystemExit(main())
