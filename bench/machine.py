"""What a measurement stands on: CPU, versions, memory and its bandwidth, processes that are timed from outside."""

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
    """The CPU as it calls itself, and as LLVM does."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    return f"{name} ({llvm.get_host_cpu_name()})"


def cpus() -> int:
    """Hardware threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """The commit that runs, with + where files differ from it; None outside of a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, check=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True, text=True)
        return name.stdout.strip() + "+" * bool(changed.stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None


def about(command: str) -> dict[str, Any]:
    """Date, command, machine and versions."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "command": command, "cpu": cpu(),
        "cores": physical_cores(), "cpus": cpus(), "memory": memory()[0], "os": platform.platform(),
        "python": platform.python_version(), "tinymia": tinymia.__version__, "commit": commit(),
        "numba": numba.__version__, "llvmlite": llvmlite.__version__, "numpy": np.__version__,
    }


def memory() -> tuple[int, int]:
    """Bytes of memory: (all, what processes can have now). Linux; elsewhere (0, 0), which is taken for unknown."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return 0, 0
    total, free = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return total, free


def need(n_bytes: int, what: str) -> None:
    """Raise Error where so much memory is not to be had."""
    free = memory()[1]
    if free and n_bytes > free:
        raise Error(f"{what} needs {n_bytes / 1e9:.2f} GB of memory, and {free / 1e9:.2f} GB are free")


# ---------------------------------------------------------------------------------------- bandwidth


@numba.njit(nogil=True)
def read(x):
    """Sum of int64 [n]: one load a number, nothing else of weight."""
    total = 0
    for i in range(len(x)):
        total += x[i]
    return total


class Bandwidth:
    """Bytes a second that threads read together from an array too big for the caches."""

    def __init__(self, n_bytes: int):
        self.x = np.ones(n_bytes // 8, np.int64)
        read(self.x[:8])

    def __call__(self, threads: int, tries: int = 3) -> float:
        """The best of a few tries: what the memory can do."""
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
    """What a process took."""

    first: float    # seconds to its first byte of output
    total: float    # seconds to its end
    peak: int       # bytes, the most it had in memory (ru_maxrss), pages of mapped files among them


def spawn(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Spawned:
    """Run a command, its output read and dropped. Raises Error with its last line when it fails."""
    launch = [sys.executable, "-S", "-E", str(Path(__file__).with_name("spawn.py"))]
    p = subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, env={**os.environ, **(env or {})},
                       cwd=ROOT, errors="replace")
    first, total, peak, status = (p.stdout.split() + ["1"] * 4)[:4]
    if p.returncode or status != "0":
        words = p.stderr.strip().splitlines() or ["it does not say why"]
        raise Error(f"{Path(command[0]).name} failed with status {status}: {words[-1]}")
    return Spawned(float(first), float(total), int(peak))
