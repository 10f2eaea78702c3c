"""llama.cpp in this process, through llama-cpp-python: its tensors taken, and changed, as it computes them.

llama.cpp calls back after each step of its graph (ggml-backend.cpp: ggml_backend_sched_compute_splits). The tensor is
then whole and no later step has begun: what is written into it is what the rest of the graph goes on with.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tinymia import Error, Model

# llama.cpp's name and, where several tensors share it, ggml's operation: our names for them, first to last.
# Two of its names mean something else here: its kqv_out is what goes into Wo (kqv_merged), its attn_out what comes out.
# Source: llama-graph.cpp (build_norm, build_qkv, build_attn_mha, build_ffn) and models/llama.cpp, 2026.
NAMES: dict[tuple[str, str], tuple[str, ...]] = {
    ("embd", ""): ("inp_embd",),
    ("norm", "RMS_NORM"): ("norm", "norm_ffn"),
    ("attn_norm", ""): ("attn_norm",),
    ("Qcur", "RESHAPE"): ("Qcur_pre",),
    ("Qcur", "ROPE"): ("Qcur",),
    ("Kcur", "RESHAPE"): ("Kcur_pre",),
    ("Kcur", "ROPE"): ("Kcur",),
    ("Vcur", "RESHAPE"): ("Vcur",),
    ("kq", ""): ("kq",),
    ("kq_soft_max", ""): ("kq_soft_max",),
    ("kqv", ""): ("kqv",),
    ("kqv_out", ""): ("kqv_merged",),
    ("attn_out", ""): ("kqv_out",),
    ("ffn_inp", ""): ("ffn_inp",),
    ("ffn_norm", ""): ("ffn_norm",),
    ("ffn_gate", ""): ("ffn_gate",),
    ("ffn_gate_b", ""): ("ffn_gate",),
    ("ffn_gate_s", ""): ("ffn_gate",),
    ("ffn_up", ""): ("ffn_up",),
    ("ffn_up_b", ""): ("ffn_up",),
    ("ffn_up_s", ""): ("ffn_up",),
    ("ffn_swiglu", ""): ("ffn_gate_par",),
    ("ffn_out", ""): ("ffn_out",),
    ("l_out", ""): ("l_out",),
    ("result_norm", ""): ("result_norm",),
    ("result_output", ""): ("result_output",),
}
FUSED = {"ffn_silu": "inside ffn_swiglu there"}
FLASH = {name: "inside FLASH_ATTN_EXT there" for name in ("kq", "kq_soft_max", "kqv")}
STEPS = {  # pattern of "name OPERATION": what llama.cpp computes besides, of which we have no tensor
    r"cache_[kv]_l\d+ .*": "the KV cache",
    r"[QKV]cur-\d+ (MUL_MAT|MUL|ADD)": "projections before they are cut into heads",
    r".+ \(\w+\) (VIEW|PERMUTE|TRANSPOSE|RESHAPE)": "views",
    r"ffn_(gate|up|down)(_b)?-\d+ (MUL_MAT|ADD)": "products before their bias or scale",
    r"node_\d+ (MUL_MAT|GET_ROWS|FLASH_ATTN_EXT)": "unnamed",
}


class Item(NamedTuple):
    """One tensor of llama.cpp's."""

    name: str               # ours
    theirs: str
    value: np.ndarray       # float32, in our shape
    step: int = 0           # 0 for the pass over the prompt, 1 for the first token after it, ...


@dataclass
class Outcome:
    """What llama.cpp said besides its tensors."""

    version: str
    steps: Counter[str] = field(default_factory=Counter)    # what has no name here, by kind
    unknown: Counter[str] = field(default_factory=Counter)  # names that no table here knows
    tokens: list[int] | None = None                         # its ids of the prompt's text
    output: list[int] | None = None                         # tokens it went on with
    absent: list[str] = field(default_factory=list)         # names of ours that it did not have when recorded


class Names:
    """From llama.cpp's names to ours, as the tensors come."""

    def __init__(self, model: Model):
        self.table, self.seen = model.table, set[str]()
        self.before = set[str]()  # names of what a bias or a scale makes into the tensor that is ours
        for il, block in enumerate(model.weights.blk):
            for base, w in (("ffn_gate", block.ffn_gate), ("ffn_up", block.ffn_up)):
                steps = [base, *[f"{base}_b"] * (w.bias is not None), *[f"{base}_s"] * (w.weight.scale is not None)]
                self.before |= {f"{step}-{il}" for step in steps[:-1]}

    def ours(self, name: str, op: str) -> str | None:
        """Our exact name for this tensor, None if it has none."""
        base, dash, layer = name.rpartition("-")
        base = base or layer
        if name in self.before:
            return None
        for our in NAMES.get((base, op), NAMES.get((base, ""), ())):
            exact = our + dash + layer if dash else our
            if exact in self.table and exact not in self.seen:
                self.seen.add(exact)
                return exact
        return None


def step(name: str, op: str) -> str | None:
    """What a tensor without a name of ours is, None if that is not known."""
    for pattern, what in STEPS.items():
        if re.fullmatch(pattern, f"{name} {op}"):
            return f"{what} ({op})" if what == "unnamed" else what
    return None


class Head(ctypes.Structure):
    """The first fields of struct ggml_tensor (ggml.h)."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4),
                ("nb", ctypes.c_size_t * 4)]


class Ggml:
    """The functions of ggml that read and write a tensor."""

    SIGNATURES: ClassVar = {
        "ggml_get_name": (ctypes.c_char_p, ctypes.c_void_p),
        "ggml_op_desc": (ctypes.c_char_p, ctypes.c_void_p),
        "ggml_nbytes": (ctypes.c_size_t, ctypes.c_void_p),
        "ggml_nelements": (ctypes.c_int64, ctypes.c_void_p),
        "ggml_backend_tensor_get": (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_backend_tensor_set": (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t),
    }

    get_name: Any
    op_desc: Any
    nbytes: Any
    nelements: Any
    backend_tensor_get: Any
    backend_tensor_set: Any

    def __init__(self, package: Any):
        folder = Path(package.__file__).parent / "lib"
        found = sorted(folder.glob("*ggml-base*"))
        if not found:
            raise Error(f"llama-cpp-python {package.__version__} has no ggml-base library in its folder lib")
        lib = ctypes.CDLL(str(found[0]))
        for name, (result, *arguments) in self.SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def label(self, t: int) -> tuple[str, str]:
        """(name, operation) of the tensor at this address."""
        return self.get_name(t).decode("utf-8", "replace"), self.op_desc(t).decode()

    def read(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """(values with ggml's dimensions last to first, the bytes that they are a view of)."""
        head = Head.from_address(t)
        ne, nb = head.ne[:], head.nb[:]
        kinds: dict[int, np.dtype[Any]] = {0: np.dtype(np.float32), 1: np.dtype(np.float16)}
        dtype = kinds.get(head.type)
        if math.prod(ne) != self.nelements(t) or dtype is None or nb[0] != dtype.itemsize:
            raise Error(f"llama.cpp's {self.label(t)[0]} is of ggml type {head.type} and shape {ne}, and floats are "
                        "expected: this version of llama.cpp may lay its tensors out in a way of its own")
        raw = np.empty(self.nbytes(t), np.uint8)
        self.backend_tensor_get(t, raw.ctypes.data, 0, raw.size)
        return np.ndarray(ne[::-1], dtype, raw, 0, nb[::-1]), raw

    def write(self, t: int, raw: np.ndarray) -> None:
        """Put all bytes of a tensor back."""
        self.backend_tensor_set(t, raw.ctypes.data, 0, raw.size)


def package() -> Any:
    """llama_cpp, or an error that says how to have it."""
    try:
        import llama_cpp
    except Exception as e:  # a package whose library does not load raises what it likes
        reason = f"{type(e).__name__}: {e}"
        raise Error(f"verify runs llama.cpp beside tinymia: pip install 'tinymia[verify]' ({reason})") from e
    return llama_cpp


@contextlib.contextmanager
def quiet(llama_cpp: Any) -> Iterator[list[str]]:
    """Keep llama.cpp's log from the terminal; gives its last lines, newest first."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: Any) -> None:
        lines[:] = [text.decode("utf-8", "replace").strip(), *lines[:19]]

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        before = getattr(getattr(llama_cpp, "_logger", None), "llama_log_callback", None)
        llama_cpp.llama_log_set(before or llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


def why(log: list[str]) -> str:
    """The last words of a log, newest line first."""
    return "; ".join([line for line in log if line][:2]) or "it does not say why"


class Callback:
    """What llama.cpp calls: names each tensor, edits it, hands it on."""

    def __init__(self, llama_cpp: Any, model: Model, n_tok: int, wanted: set[str], outcome: Outcome,
                 edit: Callable[[str, np.ndarray], np.ndarray | None], put: Callable[[Item], None]):
        self.ggml, self.model = Ggml(llama_cpp), model
        self.wanted, self.outcome, self.edit, self.put = wanted, outcome, edit, put
        self.error: BaseException | None = None
        self.begin(0, n_tok, n_tok)
        self.function = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._call)

    def begin(self, step: int, n_tok: int, n_kv: int) -> None:
        """Before each pass."""
        self.step, self.names = step, Names(self.model)
        self.sizes = {**self.model.config.sizes(), "n_tok": n_tok, "n_kv": n_kv}

    def _call(self, t: int, ask: bool, _: Any) -> bool:
        if self.error is not None:
            return False
        if ask:  # a tensor that nobody asks for may be computed in one step with the next, and never exist
            return True
        try:
            self.take(t)
        except BaseException as e:  # ctypes would print it and go on
            self.error = e
        return self.error is None

    def take(self, t: int) -> None:
        theirs, op = self.ggml.label(t)
        name = self.names.ours(theirs, op)
        if name is None:
            what = step(theirs, op)
            if self.step == 0:
                kind = what or re.sub(r"\d+", "*", f"{theirs} {op}")
                (self.outcome.steps if what else self.outcome.unknown)[kind] += 1
        elif name in self.wanted:
            array, raw = self.ggml.read(t)
            dims = self.model.table[name][0].dims
            shape = tuple(self.sizes[d] for d in dims)
            part = array[..., : shape[-1]] if dims[-1] == "n_kv" else array  # n_kv is padded there
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
    """llama.cpp over `ids`, then over n greedy tokens, a pass each; every wanted tensor of every pass goes to `put`.

    Those of the pass over `ids` go through `edit` first.
    CPU only, K and V in F16 and, unless `repack`, weights used as they lie in the file. `text`, when given, is
    tokenised by llama.cpp too. setup(llama_cpp, context) is called once the context is there.
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


def tokenize(llama_cpp: Any, vocab: Any, text: str) -> list[int]:
    raw = text.encode()
    out = (llama_cpp.llama_token * (len(raw) + 16))()
    return out[: max(llama_cpp.llama_tokenize(vocab, raw, len(raw), out, len(out), True, True), 0)]


def decode(llama_cpp: Any, context: Any, ids: list[int], start: int) -> None:
    """Compute these tokens, with logits for each."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
        status = llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise Error(f"llama.cpp gave up on {len(ids)} tokens: llama_decode returned {status}")


def best(llama_cpp: Any, context: Any, vocab: Any) -> int:
    """The token with the greatest logit, after the last row."""
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(logits, (llama_cpp.llama_vocab_n_tokens(vocab),)).argmax())
