"""The cost of running an empty kernel on two threads: `python bench/regions.py` prints microseconds per call.

Compared are numba's threading layers that are installed, Python threads with queues, and tinymia's pool; each number is
the least of many.
"""

import subprocess
import sys
import time
from queue import SimpleQueue
from threading import Thread

import numba
import numpy as np

from tinymia_kernels import Pool
from tinymia_kernels.machine.jit import kernel

LAYER = """
import os, sys, time
import numba, numpy as np
numba.config.THREADING_LAYER = sys.argv[1]
numba.set_num_threads(2)
@numba.njit(parallel=True, nogil=True)
def nothing(x):
    for i in numba.prange(2):
        x[i] = i
x = np.zeros(2)
nothing(x)
best = 1.0
for _ in range(300):
    clock = time.perf_counter()
    for _ in range(20):
        nothing(x)
    best = min(best, (time.perf_counter() - clock) / 20)
print(best)
"""


@kernel
def nothing(x, i0, i1):
    """Write one number per item: as little work as possible."""
    for i in range(i0, i1):
        x[i] = i


def least(call) -> float:
    """The seconds per call: the least of 300 means over 20 calls."""
    call()
    best = 1.0
    for _ in range(300):
        clock = time.perf_counter()
        for _ in range(20):
            call()
        best = min(best, (time.perf_counter() - clock) / 20)
    return best


def main() -> None:
    """Print the table."""
    x, pool = np.zeros(2), Pool(2)
    print(f"the kernel alone  {1e6 * least(lambda: nothing(x, 0, 2)):6.2f}")
    print(f"tinymia's pool    {1e6 * least(lambda: pool.run(nothing, 2, x)):6.2f}")
    tasks, replies = SimpleQueue(), SimpleQueue()

    def work() -> None:
        while (task := tasks.get()) is not None:
            nothing(*task)
            replies.put(None)

    def by_queues() -> None:
        tasks.put((x, 1, 2))
        nothing(x, 0, 1)
        replies.get()

    Thread(target=work, daemon=True).start()
    print(f"threads, queues   {1e6 * least(by_queues):6.2f}")
    for layer in ("workqueue", "omp", "tbb"):
        done = subprocess.run([sys.executable, "-c", LAYER, layer], capture_output=True, text=True)
        took = f"{1e6 * float(done.stdout):6.2f}" if done.returncode == 0 else "  not installed"
        print(f"numba {layer:12s}{took}")
    print(f"numba {numba.__version__}, 2 threads")


if __name__ == "__main__":
    main()
