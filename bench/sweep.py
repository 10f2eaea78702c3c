"""Activation patching of l_out, layer by position: the sweep beside one run per cell, and beside TransformerLens.

    python bench/sweep.py model.gguf [--at 1] [--layers 0,7,14,21] [--threads 2]
    python bench/sweep.py stories260K-f32.gguf --transformer-lens      # pip install torch 'transformer-lens<4'

Two prompts of random tokens, equal but for one token: by default the one in the middle. Of the plain runs (Model.run
with one Patch, logits of the last position) a seeded sample is timed and scaled to all cells; their logit differences
are held against the sweep's. TransformerLens runs all cells, in float32, on the same number of threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import tinymia
from tinymia import Error, Model, Patch
from tinymia_lab.commands.sweep import Sweep, sweep
from tinymia_lab.flags.arguments import chosen

ANSWER, AGAINST = 300, 301      # ids whose logits are compared


def prompts(model: Model, n_tok: int, at: int) -> tuple[list[int], list[int]]:
    """The ids of two prompts that differ at one position."""
    ids = [1, *np.random.default_rng(n_tok).integers(300, model.config.n_vocab, n_tok - 1).tolist()]
    return ids, [*ids[:at], ids[at] - 1, *ids[at + 1 :]]


def timed_sweep(args: argparse.Namespace, layers: list[int] | None, numerics: str = "ggml") -> tuple[float, Sweep]:
    """The least time of the repeats, each with a newly loaded model, so that the two unpatched runs are included."""
    seconds = []
    for _ in range(args.repeats):
        model = tinymia.load(args.model, args.threads, numerics)
        pair = prompts(model, args.tokens, args.at)
        model.run(pair[0], logits="last")       # so that pages are read and kernels compiled before
        clock = time.perf_counter()
        found = sweep(model, *pair, ANSWER, AGAINST, layers=layers)
        seconds.append(time.perf_counter() - clock)
    return min(seconds), found


def beside_plain_runs(args: argparse.Namespace) -> None:
    """Print a row of the table."""
    model = tinymia.load(args.model, args.threads)
    layers, n_tok = chosen(args.layers, model.config.n_layer, "layer"), args.tokens
    clean, corrupt = prompts(model, n_tok, args.at)
    n_cell = len(layers) * n_tok
    picks = np.random.default_rng(args.seed).choice(n_cell, min(args.sample, n_cell), replace=False).tolist()
    cells = [(i // n_tok, i % n_tok) for i in picks]
    seconds, found = timed_sweep(args, layers)
    kept = model.run(clean, keep=["l_out"], logits="last")
    clock = time.perf_counter()
    rows = [model.run(corrupt, actions=[Patch(f"l_out-{layers[i]}", kept, src=at, at=at)], logits="last").logits[0]
            for i, at in cells]
    plain = (time.perf_counter() - clock) / len(cells) * len(layers) * n_tok
    zero, one = (run["logit-difference"] for run in (found.corrupt, found.clean))
    found_rows = [float(found.logit_difference[cell]) * (one - zero) + zero for cell in cells]
    error = max(abs(float(row[ANSWER]) - float(row[AGAINST]) - f) for row, f in zip(rows, found_rows))
    print(f"| {model.path.stem} | {n_tok}, differ at {args.at} | {len(layers)} of {model.config.n_layer} | "
          f"{seconds:.2f} s | {plain:.1f} s ({len(cells)} of {len(layers) * n_tok} cells timed) | "
          f"{plain / seconds:.1f} x | {error:.1e} |")


def hooked(model: Model) -> Any:
    """The model in TransformerLens, with weights in float32."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    c, w = model.config, model.weights
    t = HookedTransformer(HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_ctx, d_head=c.d_head, n_heads=c.n_head, d_mlp=c.n_ff,
        n_key_value_heads=None if c.n_head_kv == c.n_head else c.n_head_kv, d_vocab=c.n_vocab, act_fn="silu",
        normalization_type="RMS", final_rms=True, gated_mlp=True, eps=c.eps, positional_embedding_type="rotary",
        rotary_adjacent_pairs=True, rotary_dim=c.ropes[0].n_rot, rotary_base=int(c.ropes[0].base), dtype=torch.float32,
        device="cpu"))

    def weight(name: str, *shape: int) -> torch.Tensor:
        """A weight [n_out, n_in] as [n_in, n_out], or in the given shape."""
        x = torch.from_numpy(np.array(w[f"{name}.weight"].numpy(), np.float32))
        return x.T.reshape(shape) if shape else x if x.ndim == 1 else x.T

    def heads(name: str) -> torch.Tensor:
        """A weight of queries, keys or values as [n_head, d_model, d_head]."""
        return weight(name).reshape(c.n_embd, -1, c.d_head).permute(1, 0, 2)

    state = {name: torch.zeros_like(x) if ".b_" in name else x for name, x in t.state_dict().items()}
    state |= {"embed.W_E": weight("token_embd").T, "ln_final.w": weight("output_norm"),
              "unembed.W_U": weight("output" if "output.weight" in w else "token_embd")}
    kv = "_" if c.n_head_kv != c.n_head else ""
    for il in range(c.n_layer):
        here, blk = f"blocks.{il}.", f"blk.{il}."
        state |= {
            f"{here}ln1.w": weight(f"{blk}attn_norm"), f"{here}ln2.w": weight(f"{blk}ffn_norm"),
            f"{here}attn.W_Q": heads(f"{blk}attn_q"), f"{here}attn.{kv}W_K": heads(f"{blk}attn_k"),
            f"{here}attn.{kv}W_V": heads(f"{blk}attn_v"),
            f"{here}attn.W_O": weight(f"{blk}attn_output", c.n_head, c.d_head, c.n_embd),
            f"{here}mlp.W_gate": weight(f"{blk}ffn_gate"), f"{here}mlp.W_in": weight(f"{blk}ffn_up"),
            f"{here}mlp.W_out": weight(f"{blk}ffn_down"),
        }
    t.load_state_dict(state)
    return t


def beside_transformer_lens(args: argparse.Namespace) -> None:
    """Print a row of the table."""
    try:
        import torch
        from transformer_lens import patching
    except Exception as e:  # a package whose library does not load raises what it likes
        raise Error("--transformer-lens needs two packages: pip install torch 'transformer-lens<4' "
                    f"({type(e).__name__}: {e})") from e
    model = tinymia.load(args.model, args.threads, "f32")
    torch.set_num_threads(model.threads)
    torch.set_grad_enabled(False)
    theirs, n_cell = hooked(model), model.config.n_layer * args.tokens
    clean, corrupt = (torch.tensor([ids]) for ids in prompts(model, args.tokens, args.at))
    ours = model.run(clean[0].tolist()).logits
    logits, kept = theirs.run_with_cache(clean)
    error = float(np.abs(logits[0].numpy() - ours).max())
    if error > 1e-3 * float(np.abs(ours).max()):
        raise SystemExit(f"the models differ: logits by up to {error:.1e}")

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, ANSWER] - logits[0, -1, AGAINST]

    seconds = []
    for _ in range(args.repeats):
        clock = time.perf_counter()
        _, kept = theirs.run_with_cache(clean)
        grid = patching.generic_activation_patch(
            theirs, corrupt, kept, metric, patching.layer_pos_patch_setter, "resid_post", ("layer", "pos"))
        seconds.append(time.perf_counter() - clock)
    mine, found = timed_sweep(args, None, "f32")
    zero, one = (run["logit-difference"] for run in (found.corrupt, found.clean))
    worst = float(np.abs(found.logit_difference * (one - zero) + zero - grid.numpy()).max())
    print(f"| {model.path.stem}, f32 | {args.tokens}, differ at {args.at} | {n_cell} | {mine:.3f} s | "
          f"{min(seconds):.2f} s | {min(seconds) / mine:.0f} x | {worst:.1e} (logits {error:.1e}) |")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="FILE")
    p.add_argument("--tokens", type=int, default=64, metavar="N")
    p.add_argument("--at", type=int, metavar="POS", help="where the prompts differ (default: the middle)")
    p.add_argument("--layers", metavar="LIST", help="such as 0,3-5: of both sweeps")
    p.add_argument("--sample", type=int, default=24, metavar="N", help="number of plain runs that are timed")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--threads", type=int)
    p.add_argument("--transformer-lens", action="store_true")
    args = p.parse_args(argv)
    args.at = args.tokens // 2 if args.at is None else args.at
    try:
        if not 0 < args.at < args.tokens or args.sample < 1 or args.repeats < 1:
            raise Error("--at must be 1 to --tokens minus 1; --sample and --repeats must be at least 1")
        (beside_transformer_lens if args.transformer_lens else beside_plain_runs)(args)
    except Error as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
