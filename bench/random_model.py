"""A model of a real model's shape with random weights, for timing: `python -m bench.random_model OUT.gguf SHAPE`.

The speed of an engine does not depend on what the weights are. Matrices are F16, norms F32; bench/quantise.py makes
other formats of the file. The vocabulary has as many pieces as Llama 2's, but they are made up: the model says nothing.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import gguf
import numpy as np

from tinymia import Error
from tinymia_files import check_target

N_VOCAB = 32000
WORDS = "▁Once ▁upon ▁a ▁time ,".split()     # those of the prompt of `start`, which has 6 tokens as with Llama 2's


class Shape(NamedTuple):
    """The sizes of a model."""

    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_ctx: int


SHAPES = {
    "tinyllama": Shape(2048, 22, 32, 4, 5632, 2048),        # 1.1 billion weights, 2.2 GB
    "llama2-7b": Shape(4096, 32, 32, 32, 11008, 4096),      # 6.7 billion, 13.5 GB
    "small": Shape(256, 2, 4, 2, 704, 2048),                # 18 million, 36 MB: to try the programs
}


def tensors(s: Shape) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and spread of every tensor: spreads keep activations about 1; those of norms are around 1."""
    n_kv = s.n_embd // s.n_head * s.n_head_kv
    made: dict[str, tuple[tuple[int, ...], float]] = {"token_embd": ((N_VOCAB, s.n_embd), 0.3)}
    for il in range(s.n_layer):
        rows = {"attn_q": s.n_embd, "attn_k": n_kv, "attn_v": n_kv, "attn_output": s.n_embd, "ffn_gate": s.n_ff,
                "ffn_up": s.n_ff}
        made |= {f"blk.{il}.{name}": ((s.n_embd,), 0.1) for name in ("attn_norm", "ffn_norm")}
        made |= {f"blk.{il}.{name}": ((n_out, s.n_embd), s.n_embd**-0.5) for name, n_out in rows.items()}
        made[f"blk.{il}.ffn_down"] = (s.n_embd, s.n_ff), 0.5 * s.n_ff**-0.5
    return made | {"output_norm": ((s.n_embd,), 0.1), "output": ((N_VOCAB, s.n_embd), s.n_embd**-0.5)}


def write(path: str, name: str, seed: int = 1) -> None:
    """Write the model of a shape, one tensor after another, so that memory holds only one. Raises Error."""
    check_target(path)
    s, rng = SHAPES[name], np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, "llama")
    w.add_name(f"random-{name}")
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layer)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_head_kv)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    begun = list(dict.fromkeys(word[: i + 1] for word in WORDS for i in range(len(word))))  # words grow by one letter
    w.add_tokenizer_model("llama")
    w.add_token_list([*pieces, *begun, *(f"▁w{i}" for i in range(N_VOCAB - len(pieces) - len(begun)))])
    w.add_token_scores([0.0] * len(pieces) + [-float(i) for i in range(N_VOCAB - len(pieces))])
    w.add_token_types([2, 3, 3] + [6] * 256 + [1] * (N_VOCAB - len(pieces)))    # unknown, control, byte, normal
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    made = tensors(s)
    for tensor, (shape, _) in made.items():
        dtype = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        w.add_tensor_info(f"{tensor}.weight", shape, dtype, dtype.itemsize * int(np.prod(shape)))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for shape, spread in made.values():
        x = rng.standard_normal(shape, np.float32) * np.float32(spread)
        w.write_tensor_data(x.astype(np.float16) if len(shape) > 1 else x + 1)
    w.close()


def main() -> int:
    """Write the model that the command line names. Returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", metavar="OUT.gguf")
    p.add_argument("shape", choices=SHAPES)
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    try:
        write(args.out, args.shape, args.seed)
    except (Error, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
