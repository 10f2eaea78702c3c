"""The conditions of a measurement: CPU, versions, memory and its bandwidth; and timing a process from outside."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np

import tinymia
from tinymia import Error
from tinymia_kernels import physical_cores

ROOT = Path(__file__).parents[1]


def cpu() -> str:
    """The name of the CPU, and LLVM's name for it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    return f"{name} ({llvm.get_host_cpu_name()})"


def cpus() -> int:
    """The number of hardware threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """The current commit, with a + if files differ from it; None outside a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, check=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True, text=True)
        return name.stdout.strip() + "+" * bool(changed.stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None


def about(command: str) -> dict[str, Any]:
    """The date, the command, the computer and the versions."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "command": command, "cpu": cpu(),
        "cores": physical_cores(), "cpus": cpus(), "memory": memory()[0], "os": platform.platform(),
        "python": platform.python_version(), "tinymia": tinymia.__version__, "commit": commit(),
        "numba": numba.__version__, "llvmlite": llvmlite.__version__, "numpy": np.__version__,
    }


def memory() -> tuple[int, int]:
    """The bytes of memory: (total, available now). On Linux; elsewhere (0, 0), which stands for unknown."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return 0, 0
    total, free = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return total, free


def need(n_bytes: int, what: str) -> None:
    """Raise Error if fewer than n_bytes of memory are available; `what` names what needs them."""
    free = memory()[1]
    if free and n_bytes > free:
        raise Error(f"{what} needs {n_bytes / 1e9:.2f} GB of memory, and {free / 1e9:.2f} GB are free")


# ---------------------------------------------------------------------------------------- bandwidth


@numba.njit(nogil=True)
def read(x):
    """Sum x, int64 [n]: one load per number, and almost nothing else."""
    total = 0
    for i in range(len(x)):
        total += x[i]
    return total


class Bandwidth:
    """Measures the bytes per second that threads read together from an array that is larger than the caches."""

    def __init__(self, n_bytes: int):
        self.x = np.ones(n_bytes // 8, np.int64)
        read(self.x[:8])

    def __call__(self, threads: int, tries: int = 3) -> float:
        """The bytes per second of the best of several tries."""
        parts = np.array_split(self.x, threads)
        return max(self._once(parts) for _ in range(tries))

    def _once(self, parts: Sequence[np.ndarray]) -> float:
        others = [threading.Thread(target=read, args=(part,)) for part in parts[1:]]
        clock = time.perf_counter()
        for other in others:
            other.start()
        read(parts[0])
        for other in others:
            other.join()
        return self.x.nbytes / (time.perf_counter() - clock)


# ---------------------------------------------------------------------------------------- processes


class Spawned(NamedTuple):
    """The time and the memory that a process took."""

    first: float    # seconds to its first byte of output
    total: float    # seconds to its end
    peak: int       # bytes, the most it had in memory (ru_maxrss), pages of mapped files among them


def spawn(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Spawned:
    """Run a command and drop its output. If it fails, raise Error with the last line of its stderr."""
    launch = [sys.executable, "-S", "-E", str(Path(__file__).with_name("spawn.py"))]
    p = subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, env={**os.environ, **(env or {})},
                       cwd=ROOT, errors="replace")
    first, total, peak, status = (p.stdout.split() + ["1"] * 4)[:4]
    if p.returncode or status != "0":
        words = p.stderr.strip().splitlines() or ["it does not say why"]
        raise Error(f"{Path(command[0]).name} failed with status {status}: {words[-1]}")
    return Spawned(float(first), float(total), int(peak))
