"""A pool of threads over which a kernel's rows are split. Kernels run without the GIL.

Handing chunks over and waiting for the last one costs about 15 microseconds on two cores (measured with a kernel that
does nothing; queue.SimpleQueue is C and waits without polling), so small work stays on the calling thread.
"""

import os
import threading
import weakref
from pathlib import Path
from queue import SimpleQueue


def physical_cores() -> int:
    """Cores this process may run on, two hardware threads of a core counted once (Linux; elsewhere os.cpu_count())."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(tuple((topology / part).read_text().strip() for part in ("physical_package_id", "core_id")))
        except OSError:
            cores.add(cpu)
    return max(1, len(cores))


def _work(tasks: SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        replies, kernel, args, i0, i1 = task
        try:
            kernel(*args, i0, i1)
            replies.put(None)
        except BaseException as error:  # handed to the thread that asked
            replies.put(error)
        del task, replies, kernel, args  # keep no arrays alive while waiting


def _dismiss(queues: list) -> None:
    for tasks in queues:
        tasks.put(None)


class Pool:
    """`n` threads, the calling one among them; started when first needed, again after a fork, never when n is 1."""

    def __init__(self, n: int | None = None):
        self.n = physical_cores() if n is None else n
        if self.n < 1:
            raise ValueError(f"a pool of {n} threads: at least 1")
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self._queues: list[SimpleQueue] = []
        self._lock = threading.Lock()

    def _start(self) -> None:
        with self._lock:
            if not self._queues:
                queues = [SimpleQueue() for _ in range(self.n - 1)]
                for tasks in queues:
                    threading.Thread(target=_work, args=(tasks,), name="tinymia", daemon=True).start()
                weakref.finalize(self, _dismiss, queues).atexit = False
                self._queues = queues

    def run(self, kernel, n_items: int, *args) -> None:
        """kernel(*args, i0, i1) on contiguous chunks of range(n_items), one a thread; raises what a chunk raised."""
        n = min(self.n, n_items)
        if n <= 1:
            kernel(*args, 0, n_items)
            return
        if not self._queues:
            self._start()
        bounds = [n_items * k // n for k in range(n + 1)]
        replies: SimpleQueue = SimpleQueue()
        for k in range(1, n):
            self._queues[k - 1].put((replies, kernel, args, bounds[k], bounds[k + 1]))
        errors = []
        try:
            kernel(*args, 0, bounds[1])
        finally:  # the others write into the caller's arrays: wait for them in any case
            errors = [error for _ in range(1, n) if (error := replies.get()) is not None]
        if errors:
            raise errors[0]


_pools: "weakref.WeakSet[Pool]" = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


SMALL = 1 << 16  # bytes a thread must have to work on to be worth waking


def run(pool: Pool | None, n_bytes: int, kernel, n_items: int, *args) -> None:
    """kernel(*args, 0, n_items), over the pool when there is one and enough to do for two threads."""
    if pool is None or pool.n == 1 or n_bytes < 2 * SMALL:
        kernel(*args, 0, n_items)
    else:
        pool.run(kernel, n_items, *args)
