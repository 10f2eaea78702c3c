"""`tinymia verify`: the comparison of every tensor with llama.cpp's; its flags.

The comparison itself is in llama_comparison.py, the one with float64 (--self) in self_comparison.py, and what both give
and show in verify_result.py. docs/verify.md explains the numbers.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from tinymia import Error, Model

from ..flags.action_flags import Output, change_flags, patch_flags, read_actions
from ..flags.arguments import prompt_flags, prompt_ids
from ..flags.command import Command
from ..flags.parser import Parser, least
from .llama_comparison import verify
from .self_comparison import verify_self
from .verify_result import SelfVerification, Verdict, Verification, pictures

__all__ = ["SelfVerification", "Verification", "command", "verify", "verify_self"]


def add_flags(p: Parser) -> None:
    """Add the flags of the prompt, of what is compared with what and how closely, and of actions."""
    prompt_flags(p)
    p.add_argument("--tolerance", type=float, metavar="NMSE",
                   help="default: 1e-6 for float weights, 1e-4 for quantised; with --inject 1e-10 and 1e-6; more with "
                   "--flash")
    p.add_argument("--only", action="append", default=[], metavar="NAME",
                   help="these tensors only (more than once)")
    p.add_argument("--inject", action="store_true",
                   help="give each op llama.cpp's inputs, so that an error shows where it is made")
    p.add_argument("--flash", action="store_true", help="llama.cpp with its flash attention, as it runs by default")
    p.add_argument("--repack", action="store_true", help="llama.cpp with repacked weights, as it runs by default")
    p.add_argument("-n", "--n-predict", type=least(0), default=0, metavar="N",
                   help="generate N tokens greedily, one pass each; compare those passes and the text")
    p.add_argument("--record", type=Output, metavar="FILE.npz", help="write llama.cpp's tensors there as well")
    p.add_argument("--against", metavar="FILE.npz",  # never beside --record
                   help="compare with a recording; llama.cpp is not needed")
    p.add_argument("--self", action="store_true", help="compare both numerics with float64, without llama.cpp")
    patch_flags(p.add_argument_group("patch both"))
    change_flags(p.add_argument_group("change both"))


def before(args: Namespace) -> None:
    """Raise Error for flags that do not go together."""
    if args.self:
        alone = {"--flash": args.flash, "--repack": args.repack, "--record": args.record, "--against": args.against,
                 "-n": args.n_predict, "--numerics": args.numerics != "ggml", "the actions": args.specs}
        for flag, given in alone.items():
            if given:
                why = "compares both numerics" if flag == "--numerics" else "runs without llama.cpp"
                raise Error(f"{flag} and --self do not go together: --self {why}")


def run(args: Namespace, model: Model, out: Path | None) -> Verdict:
    """Make the comparison that the flags describe."""
    prompt = prompt_ids(args, model)
    if args.self:
        return verify_self(model, prompt, tolerance=args.tolerance, only=args.only or ("l_out", "result_output"),
                           inject=args.inject, out=out)
    return verify(model, prompt, tolerance=args.tolerance, only=args.only, inject=args.inject, flash=args.flash,
                  repack=args.repack, record=args.record, against=args.against, actions=read_actions(args, model),
                  n_predict=args.n_predict, out=out)


def text(found: Verdict) -> str:
    """The text that the terminal shows."""
    return str(found)


def status(found: Verdict) -> int:
    """The exit status: 0 equal, 1 different."""
    return 0 if found.ok else 1


command = Command(
    "verify", "Compare every tensor with llama.cpp's, computed in the same process.\nExit status: 0 equal, 1 different,"
    " 2 for an error. docs/verify.md explains the numbers.", add_flags, run, text, pictures, before=before,
    status=status, numerics="ggml", resumes=False)
