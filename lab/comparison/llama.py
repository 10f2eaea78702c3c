"""llama.cpp in this process, through llama-cpp-python: its tensors are read, and changed, as it computes them.

llama.cpp calls back after each step of its graph (ggml-backend.cpp: ggml_backend_sched_compute_splits). At that moment
the tensor is complete and no later step has begun, so the rest of the graph continues with what is written into it.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tinymia import Error, Model

from .ggml import Ggml, best, decode, package, quiet, tokenize, why
from .llama_names import Names, step


class Item(NamedTuple):
    """One tensor of llama.cpp."""

    name: str               # our name
    theirs: str             # llama.cpp's name
    value: np.ndarray       # float32, in our shape
    step: int = 0           # 0 for the pass over the prompt, 1 for the first token after it, ...


@dataclass
class Outcome:
    """Everything that a run of llama.cpp gives besides its tensors."""

    version: str
    steps: Counter[str] = field(default_factory=Counter)    # tensors without a name here, by kind
    unknown: Counter[str] = field(default_factory=Counter)  # names that are in no table here
    tokens: list[int] | None = None                         # its ids of the prompt's text
    output: list[int] | None = None                         # the tokens that it generated
    absent: list[str] = field(default_factory=list)         # our names that it did not have when recorded


class Callback:
    """The function that llama.cpp calls for each tensor: it names the tensor, edits it, and passes it on."""

    def __init__(self, llama_cpp: Any, model: Model, n_tok: int, wanted: set[str], outcome: Outcome,
                 edit: Callable[[str, np.ndarray], np.ndarray | None], put: Callable[[Item], None]):
        self.ggml, self.model = Ggml(llama_cpp), model
        self.wanted, self.outcome, self.edit, self.put = wanted, outcome, edit, put
        self.error: BaseException | None = None
        self.begin(0, n_tok, n_tok)
        self.function = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._call)

    def begin(self, step: int, n_tok: int, n_kv: int) -> None:
        """Prepare for a pass: its number, its tokens, and all positions so far."""
        self.step, self.names = step, Names(self.model)
        self.sizes = {**self.model.config.sizes(), "n_tok": n_tok, "n_kv": n_kv}

    def _call(self, t: int, ask: bool, _: Any) -> bool:
        if self.error is not None:
            return False
        if ask:  # say yes to all: a tensor that is not asked for may be fused with the next one, and never exist
            return True
        try:
            self.take(t)
        except BaseException as e:  # ctypes would print the exception and continue
            self.error = e
        return self.error is None

    def take(self, t: int) -> None:
        """Name, edit and pass on the tensor at this address; count it if it has no name here."""
        theirs, op = self.ggml.label(t)
        names = self.names.ours(theirs, op)
        if not names:
            what = step(theirs, op)
            if self.step == 0:
                kind = what or re.sub(r"\d+", "*", f"{theirs} {op}")
                (self.outcome.steps if what else self.outcome.unknown)[kind] += 1
        elif self.wanted.intersection(names):
            array, raw = self.ggml.read(t)
            for name, part in zip(names, np.split(array, len(names), -1)):
                if name in self.wanted:
                    self.take_part(t, name, part, raw, theirs, op)

    def take_part(self, t: int, name: str, array: np.ndarray, raw: np.ndarray, theirs: str, op: str) -> None:
        """Hand on a tensor of ours, a view of the bytes `raw`."""
        shape = tuple(self.sizes[d] for d in self.model.table[name][0].dims)
        part = array[..., : shape[-1]] if self.model.table[name][0].dims[-1] == "n_kv" else array  # padded there
        if part.size != math.prod(shape):
            self.outcome.unknown[f"{theirs} {op} of {list(array.shape)}, where ours is {list(shape)}"] += 1
            return
        value = np.array(part, np.float32).reshape(shape)
        new = self.edit(name, value) if self.step == 0 else None
        if new is not None:
            part[...] = new.reshape(part.shape)
            self.ggml.write(t, raw)
            value = np.array(part, np.float32).reshape(shape)
        self.put(Item(name, theirs, value, self.step))


def compute(
    model: Model,
    ids: Sequence[int],
    text: str | None,
    wanted: set[str],
    edit: Callable[[str, np.ndarray], np.ndarray | None],
    put: Callable[[Item], None],
    *,
    threads: int,
    flash: bool,
    repack: bool,
    n: int,
    setup: Callable[[Any, Any], None] | None = None,
) -> Outcome:
    """Run llama.cpp over `ids`, then over n greedy tokens, one pass each; `put` gets every wanted tensor of every pass.

    Tensors of the pass over `ids` go through `edit` first. On the CPU, with K and V in F16 and, unless repack is set,
    with weights as they lie in the file. A text, if given, is tokenised by llama.cpp too. setup(llama_cpp, context) is
    called when the context exists. Raises Error.
    """
    llama_cpp = package()
    outcome = Outcome(llama_cpp.__version__)
    with quiet(llama_cpp) as log:
        llama_cpp.llama_backend_init()
        callback = Callback(llama_cpp, model, len(ids), wanted, outcome, edit, put)
        mp = llama_cpp.llama_model_default_params()
        mp.n_gpu_layers, mp.use_extra_bufts = 0, repack
        llama = llama_cpp.llama_model_load_from_file(os.fsencode(model.path), mp)
        if not llama:
            raise Error(f"{model.path}: llama.cpp cannot load it: {why(log)}")
        context = None
        try:
            cp = llama_cpp.llama_context_default_params()
            cp.n_ctx = cp.n_batch = cp.n_ubatch = -(-(len(ids) + n) // 256) * 256
            if model.config.freqs == "rope_factors_long.weight":   # llama.cpp chooses them by the size of the context
                cp.n_ctx = max(cp.n_ctx, (model.config.n_original // 256 + 1) * 256)
            cp.n_threads = cp.n_threads_batch = threads
            cp.flash_attn_type = 1 if flash else 0
            cp.offload_kqv = cp.op_offload = False
            cp.cb_eval = callback.function
            context = llama_cpp.llama_init_from_model(llama, cp)
            if not context:
                raise Error(f"{model.path}: llama.cpp cannot make a context: {why(log)}")
            if setup is not None:
                setup(llama_cpp, context)
            vocab = llama_cpp.llama_model_get_vocab(llama)
            outcome.tokens = None if text is None else tokenize(llama_cpp, vocab, text)

            def run(step: int, tokens: list[int], start: int) -> None:
                callback.begin(step, len(tokens), start + len(tokens))
                decode(llama_cpp, context, tokens, start)
                if callback.error is not None:
                    raise callback.error

            run(0, list(ids), 0)
            output: list[int] = []
            outcome.output = output if n else None
            for step in range(1, n + 1):
                output.append(best(llama_cpp, context, vocab))
                if llama_cpp.llama_vocab_is_eog(vocab, output[-1]):
                    break
                run(step, output[-1:], len(ids) + step - 1)
        finally:
            if context:
                llama_cpp.llama_free(context)
            llama_cpp.llama_model_free(llama)
    return outcome
