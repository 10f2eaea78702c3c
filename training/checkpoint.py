"""Checkpoints: all that a run needs to go on, in one file that is replaced as a whole."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tinymia_files import Error, write_atomic

from .model import Params
from .optimiser import Optimiser

UNREADABLE = (OSError, EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError)  # by torch.load


@dataclass
class Options:
    """The options that the weights of a run depend on. A checkpoint holds them; to resume a run, give the same."""

    seed: int = 0
    steps: int = 1900  # of stages 1 and 2 each; about 4,400 tokens per step
    tv_weight: float = 0.5
    vocab_size: int = 2048

    def check(self) -> None:
        """Raise Error for an option out of range."""
        if not 0 <= self.seed < 2**32:
            raise Error(f"--seed {self.seed}: it must be 0 to {2**32 - 1}")
        if not 1 <= self.steps <= 1_000_000:
            raise Error(f"--steps {self.steps}: it must be 1 to 1000000")
        if not 0 <= self.tv_weight <= 10:  # this also refuses nan
            raise Error(f"--tv-weight {self.tv_weight}: it must be 0 to 10")
        if not 512 <= self.vocab_size <= 32000:
            raise Error(f"--vocab-size {self.vocab_size}: it must be 512 to 32000")


def save_checkpoint(path: Path, p: Params, optimiser: Optimiser, step: int, seconds: float, opts: Options) -> None:
    """Write a checkpoint. Raise Error where that fails; the checkpoint before it is then still there."""
    state, data = {
        "params": {n: w.detach() for n, w in p.items()},
        "momentum": optimiser.momentum,
        "adam": optimiser.adam.state_dict(),
        "step": step,
        "seconds": seconds,
        "options": asdict(opts),
    }, io.BytesIO()
    torch.save(state, data)  # to memory first: torch reports a full disk by an error that does not say so

    def write(f: Any) -> None:
        f.write(data.getbuffer())
        f.flush()
        os.fsync(f.fileno())

    try:
        write_atomic(path, write)
    except Error as e:
        raise Error(f"{e}{'; the checkpoint before it is kept' if path.exists() else ''}") from None


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Options]:
    """Return the state in a checkpoint and the options of its run. Raise Error for a file that is none."""
    try:
        state = torch.load(path, weights_only=True)
        return state, Options(**state["options"])
    except FileNotFoundError:
        raise Error(f"{path}: no such file; python -m training.train makes it") from None
    except UNREADABLE as e:
        raise Error(f"{path}: not a checkpoint of a training ({e.__class__.__name__})") from None


def resume(
    path: Path, p: Params, optimiser: Optimiser, opts: Options, after_stage_1: bool = False
) -> tuple[int, float]:
    """Load weights and optimiser from a checkpoint; return the step to go on with and the seconds spent so far.

    after_stage_1: the checkpoint must be at the end of stage 1, and may come from a run of another --tv-weight, because
    stage 1 does not depend on it.
    """
    state, theirs = read_checkpoint(path)
    try:
        if after_stage_1:
            theirs.tv_weight = opts.tv_weight
            if state["step"] != opts.steps:
                raise Error(f"{path}: is at step {state['step']}, not at the end of stage 1 ({opts.steps})")
        if theirs != opts:
            raise Error(f"{path}: was made with {asdict(theirs)}, not {asdict(opts)}; use another --out")
        for name, w in p.items():
            w.data.copy_(state["params"][name])
        for name, m in optimiser.momentum.items():
            m.copy_(state["momentum"][name])
        optimiser.adam.load_state_dict(state["adam"])
        return state["step"], state["seconds"]
    except UNREADABLE as e:
        raise Error(f"{path}: not a checkpoint of this model ({e.__class__.__name__}); move it away to start anew"
                    ) from None
