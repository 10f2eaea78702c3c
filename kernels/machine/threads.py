"""A pool of threads over which a kernel's items are split, cheaply enough for every operation of a decoded token.

The calling thread writes the work down and publishes a ticket, see regions.py; every free thread, the caller included,
takes chunks of it. Waiting threads watch the ticket without holding Python's lock (the GIL), so handing work over costs
less than a microsecond (bench/README.md). A thread that sees no new ticket for about half a millisecond goes to
sleep. It is woken when the next region starts; until it is awake, the other threads do its share.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .regions import MAX_JOBS, SHARED, STOP, job, region, release, run_jobs, serve, take


def physical_cores() -> int:
    """The number of cores that this process may run on (Linux: both hardware threads of a core count once)."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores: set[Any] = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(tuple((topology / part).read_text().strip() for part in ("physical_package_id", "core_id")))
        except OSError:
            cores.add(cpu)
    return max(1, len(cores))


PATIENCE = 20_000  # looks at the ticket before a thread goes to sleep; a look takes 20 to 40 ns


def _work(shared: np.ndarray, asleep: deque) -> None:
    nap = threading.Lock()
    nap.acquire()
    while True:
        serve(shared, PATIENCE)
        if shared[_word(shared, STOP)]:
            return
        asleep.append(nap)
        nap.acquire()  # blocks until _wake releases it


def _word(shared: np.ndarray, offset: int) -> int:
    """The index of the word that lies `offset` bytes after the first multiple of 64."""
    return (-shared.ctypes.data % 64 + offset) // 8


def _dismiss(shared: np.ndarray, asleep: deque) -> None:
    shared[_word(shared, STOP)] = 1
    _wake(asleep)


def _wake(asleep: deque) -> None:
    while asleep:
        try:
            asleep.pop().release()
        except IndexError:  # another thread was faster
            return


Job = tuple[int, Any, int, tuple]  # (n_bytes, kernel, n_items, args) as in `run`; tuples are the fastest to make


class Pool:
    """A pool of n threads, the calling one included. They start when first needed, and again after a fork."""

    def __init__(self, n: int | None = None):
        self.n = physical_cores() if n is None else n
        if self.n < 1:
            raise ValueError(f"a pool of {n} threads: at least 1")
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self._shared = np.zeros((SHARED + 64) // 8, np.int64)
        self._asleep: deque = deque()
        self._started = False
        self._lock = threading.Lock()

    def _start(self) -> None:
        with self._lock:
            if not self._started:
                for _ in range(self.n - 1):
                    threading.Thread(
                        target=_work, args=(self._shared, self._asleep), name="tinymia", daemon=True
                    ).start()
                weakref.finalize(self, _dismiss, self._shared, self._asleep).atexit = False
                self._started = True

    def run(self, kernel, n_items: int, *args, chunks: int | None = None) -> None:
        """Run kernel(*args, i0, i1) on contiguous chunks of range(n_items), four per thread; raise what one raised."""
        chunks = min(4 * self.n if chunks is None else chunks, n_items, 255)
        if chunks <= 1 or self.n == 1:
            kernel(*args, 0, n_items)
            return
        self._make_ready()
        if region(kernel)(self._shared, chunks, _grain(n_items, chunks), n_items, args):
            kernel(*args, 0, n_items)  # in this thread: the pool is in use, or a chunk raised, and so will this

    def run_several(self, jobs: Sequence[Job]) -> None:
        """Run several jobs in one region, so that the threads are started and waited for only once."""
        jobs = [each for each in jobs if each[2]]
        size = sum(n_bytes for n_bytes, *_ in jobs)
        budget = min(4 * self.n, size // SMALL, 255 - MAX_JOBS)
        parts = [min(n_items, max(1, round(budget * n_bytes / size))) if size else 1 for n_bytes, _, n_items, _ in jobs]
        if not 1 < len(jobs) <= MAX_JOBS or self.n == 1 or not take(self._shared):
            for n_bytes, kernel, n_items, args in jobs:
                run(self, n_bytes, kernel, n_items, *args)
            return
        try:
            for k, ((_, kernel, n, args), chunks) in enumerate(zip(jobs, parts)):
                job(kernel)(self._shared, k, sum(parts[:k]), chunks, _grain(n, chunks), n, args)
        except BaseException:
            release(self._shared)
            raise
        self._make_ready()
        if run_jobs(self._shared, len(jobs), sum(parts)):
            for _, kernel, n_items, args in jobs:
                kernel(*args, 0, n_items)  # in this thread, to raise what a chunk raised

    def _make_ready(self) -> None:
        if not self._started:
            self._start()
        if self._asleep:
            _wake(self._asleep)


def _grain(n_items: int, chunks: int) -> int:
    return GRAIN_OF_ROWS if n_items >= GRAIN_OF_ROWS * chunks else 1


GRAIN_OF_ROWS = 24  # chunks are multiples of this, since kernels take 4, 6, 8 or 24 rows at a time

_pools: "weakref.WeakSet[Pool]" = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


SMALL = 1 << 14  # bytes of work per chunk; less is not worth handing over


def run(pool: Pool | None, n_bytes: int, kernel, n_items: int, *args) -> None:
    """Run kernel(*args, 0, n_items), on the threads of the pool if n_bytes of work are enough for two of them."""
    if pool is None or pool.n == 1 or n_bytes < 2 * SMALL:
        kernel(*args, 0, n_items)
    else:
        pool.run(kernel, n_items, *args, chunks=min(4 * pool.n, n_bytes // SMALL))


def run_several(pool: Pool | None, jobs: Sequence[Job]) -> None:
    """Run several jobs as `run` does, handed over to the threads all at once when they are large enough to repay it."""
    if pool is None or pool.n == 1:
        for _, kernel, n_items, args in jobs:
            kernel(*args, 0, n_items)
    elif sum(n_bytes for n_bytes, *_ in jobs) < 4 * SMALL * len(jobs):
        for n_bytes, kernel, n_items, args in jobs:
            run(pool, n_bytes, kernel, n_items, *args)
    else:
        pool.run_several(jobs)
