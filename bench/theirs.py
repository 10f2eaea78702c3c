"""llama.cpp as the benchmark runs it, with its default settings: in this process, and as a separate program.

In this process it runs through the C functions of llama-cpp-python, which cost a few microseconds per call. The program
is first_token.c, compiled against the same library, because the time of a Python process would include the import of
llama-cpp-python.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from tinymia import Error
from tinymia_lab.comparison.ggml import package, quiet, why


def llama_cpp() -> Any:
    """Import llama-cpp-python. Raises Error, which says how to install it."""
    try:
        return package()
    except Error as e:
        reason = str(e).partition("(")[2].rstrip(")")
        raise Error(f"no llama.cpp to compare with: pip install 'tinymia[verify]' ({reason})") from e


def about() -> dict[str, str]:
    """The version, and the CPU features that its library was built for."""
    lib = llama_cpp()
    return {"llama_cpp": lib.__version__, "llama_cpp_built_for": lib.llama_print_system_info().decode().strip(" |")}


class Theirs:
    """A loaded model with a context of n_ctx positions, whose passes are timed."""

    def __init__(self, path: Path, threads: int, n_ctx: int):
        self.lib, self.context, self.model = llama_cpp(), None, None
        with quiet(self.lib) as log:
            self.lib.llama_backend_init()
            self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
            if not self.model:
                raise Error(f"{path}: llama.cpp cannot load it: {why(log)}")
            settings = self.lib.llama_context_default_params()
            settings.n_ctx = settings.n_batch = n_ctx
            settings.n_threads = settings.n_threads_batch = threads
            self.context = self.lib.llama_init_from_model(self.model, settings)
            if not self.context:
                self.close()
                raise Error(f"{path}: llama.cpp cannot make a context: {why(log)}")

    def close(self) -> None:
        """Free the model and its context."""
        with quiet(self.lib):
            if self.context:
                self.lib.llama_free(self.context)
            self.lib.llama_model_free(self.model)
        self.context = self.model = None

    def prefill(self, ids: list[int]) -> float:
        """The seconds of one pass over a prompt, with logits of its last token."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        tokens = (self.lib.llama_token * len(ids))(*ids)
        clock = time.perf_counter()
        self._pass(tokens, len(ids))
        return time.perf_counter() - clock

    def decode(self, ids: list[int], n: int) -> float:
        """The seconds of n passes over one token each, after a prompt."""
        self.prefill(ids)
        token = (self.lib.llama_token * 1)(ids[0])
        clock = time.perf_counter()
        for _ in range(n):
            self._pass(token, 1)
        return time.perf_counter() - clock

    def _pass(self, tokens: Any, n: int) -> None:
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, n))
        if status:
            raise Error(f"llama.cpp gave up on {n} tokens: llama_decode returned {status}")
        self.lib.llama_get_logits(self.context)  # waits until the pass is done


def compile_program(folder: Path) -> Path:
    """Compile first_token.c to a program in `folder`. Raises Error without a C compiler or llama.h."""
    root = Path(llama_cpp().__file__).parent
    compiler = shutil.which("cc") or shutil.which("gcc")
    header = next((h for h in (root.parent / "include" / "llama.h", root / "include" / "llama.h") if h.exists()), None)
    if compiler is None or header is None:
        raise Error(f"llama.cpp's start-up is not measured: no {'llama.h beside llama_cpp' if compiler else 'cc'}")
    program, lib = folder / "first_token", root / "lib"
    p = subprocess.run([compiler, "-O2", "-o", program, Path(__file__).with_name("first_token.c"), f"-I{header.parent}",
                        f"-L{lib}", "-lllama", f"-Wl,-rpath,{lib}"], capture_output=True, text=True)
    if p.returncode:
        raise Error(f"llama.cpp's start-up is not measured: first_token.c does not compile: {p.stderr.strip()}")
    return program
