"""A pool of threads over which a kernel's items are split, cheaply enough for every operation of a decoded token.

A region is one kernel over all its items, cut into chunks. The calling thread writes down the kernel's address and
arguments and publishes a ticket; whoever has time, the caller included, takes chunks by counting the ticket up. Waiting
threads look at the ticket without Python's lock, so handing over costs less than a microsecond (bench/README.md). A
thread that sees nothing new for about half a millisecond goes to sleep, and is woken when the next region starts; until
it is there, the others do its share.
"""

import os
import threading
import weakref
from collections import deque
from functools import cache
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .atomics import atomic_add, atomic_load, atomic_store, compare_and_swap, load_word, pause, store_word
from .jit import inline, kernel, specialise
from .simd import address_of


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


# What threads share, in bytes from the start of a pool's memory; what different threads write is apart by 64.
TICKET = 0          # generation << 32 | chunks << 16 | chunks taken
FINISHED = 64       # chunks done
FAILED = 128        # chunks of which a kernel raised an exception
BUSY = 192          # 1 while a region runs
FUNCTION, ITEMS, GRAIN, STOP = 256, 264, 272, 280
ARGUMENTS = 320     # flattened as numba passes them, 8 bytes each
SHARED = 1024


@intrinsic
def hand_over(typing_context, function, address, arguments):
    """Store a kernel's arguments, all but i0 and i1, and return the address of code(arguments' address, i0, i1)."""
    kinds = (*arguments.types, types.intp, types.intp)
    typing_context.resolve_function_type(function, kinds, {})
    compiled = function.dispatcher.overloads[kinds]

    def codegen(context, builder, sig, values):
        packer = context.get_arg_packer(arguments.types)
        parts = [builder.extract_value(values[2], k) for k in range(len(arguments.types))]
        flat = packer.as_arguments(builder, parts)
        for k, value in enumerate(flat):
            at = builder.add(values[1], ir.Constant(values[1].type, 8 * k))
            builder.store(value, builder.inttoptr(at, value.type.as_pointer()))
        word = context.get_value_type(types.intp)
        code_type = ir.FunctionType(ir.IntType(32), [word, word, word])
        code = ir.Function(builder.module, code_type, builder.module.get_unique_name("chunk"))
        code.linkage = "internal"
        b = ir.IRBuilder(code.append_basic_block())
        declared = context.declare_function(builder.module, compiled.fndesc)
        loaded = []
        for k, value in enumerate(flat):
            at = b.add(code.args[0], ir.Constant(word, 8 * k))
            loaded.append(b.load(b.inttoptr(at, value.type.as_pointer())))
        extra = [b.alloca(a.type.pointee) for a in declared.args[:2]]  # numba's return value and exception
        b.ret(b.call(declared, [*extra, *loaded, *code.args[1:]]))
        context.add_linking_libs([compiled.library])
        return builder.ptrtoint(code, word)

    return types.intp(function, address, arguments), codegen


@intrinsic
def call(_, code, address, i0, i1):
    """code(address, i0, i1) -> 0, or another number when the kernel raised an exception."""

    def codegen(context, builder, sig, args):
        code_type = ir.FunctionType(ir.IntType(32), [a.type for a in args[1:]])
        return builder.call(builder.inttoptr(args[0], code_type.as_pointer()), args[1:])

    return types.int32(types.intp, types.intp, types.intp, types.intp), codegen


@inline
def aligned(shared):
    return (address_of(shared) + 63) & -64


@inline
def run_chunk(at, ticket):
    """Run the chunk that a ticket names, if it names one: whether it did."""
    chunk, chunks = ticket & 0xFFFF, ticket >> 16 & 0xFFFF
    if chunk >= chunks:
        return False
    n, grain = load_word(at + ITEMS), load_word(at + GRAIN)
    grains = (n + grain - 1) // grain
    i0, i1 = grains * chunk // chunks * grain, min(grains * (chunk + 1) // chunks * grain, n)
    if call(load_word(at + FUNCTION), at + ARGUMENTS, i0, i1) != 0:
        atomic_add(at + FAILED, 1)
    atomic_add(at + FINISHED, 1)
    return True


@kernel
def serve(shared, patience):
    """Take chunks of regions as they come, until none came for `patience` looks."""
    at, seen, looks = aligned(shared), -1, 0
    while looks < patience and load_word(at + STOP) == 0:
        if atomic_load(at + TICKET) >> 32 == seen:
            looks += 1
            pause()
            continue
        looks, ticket = 0, atomic_add(at + TICKET, 1)
        if not run_chunk(at, ticket):
            seen = ticket >> 32


body = None  # see jit.specialise


def region_template(shared, chunks, grain, n, arguments):
    """Run `body` over n items. Returns 0, 1 when a chunk failed, 2 when another thread's region is under way."""
    at = aligned(shared)
    if not compare_and_swap(at + BUSY, 0, 1):
        return 2
    store_word(at + FUNCTION, hand_over(body, at + ARGUMENTS, arguments))
    store_word(at + ITEMS, n)
    store_word(at + GRAIN, grain)
    store_word(at + FINISHED, 0)
    store_word(at + FAILED, 0)
    generation = (atomic_load(at + TICKET) >> 32) + 1 & 0x3FFFFFFF
    atomic_store(at + TICKET, generation << 32 | chunks << 16)
    while run_chunk(at, atomic_add(at + TICKET, 1)):
        pass
    while atomic_load(at + FINISHED) < chunks:
        pause()
    failed = load_word(at + FAILED)
    atomic_store(at + BUSY, 0)
    return min(failed, 1)


@cache
def region(function):
    """The region of a kernel, itself a kernel; kept on disk under a name with the kernel's file in it."""
    name = f"{Path(function.py_func.__code__.co_filename).stem}_{function.py_func.__name__}"
    return specialise(region_template, f"region_{name}", body=function)


PATIENCE = 20_000  # looks, 20 to 40 ns each


def _work(shared: np.ndarray, asleep: deque) -> None:
    nap = threading.Lock()
    nap.acquire()
    while True:
        serve(shared, PATIENCE)
        if shared[_word(shared, STOP)]:
            return
        asleep.append(nap)
        nap.acquire()  # released by who wakes this thread


def _word(shared: np.ndarray, offset: int) -> int:
    """Index of the number `offset` bytes after the first multiple of 64."""
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


class Pool:
    """`n` threads, the calling one among them; started when first needed, again after a fork, never when n is 1."""

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
        """kernel(*args, i0, i1) on contiguous chunks of range(n_items), four a thread; raises what a chunk raised."""
        chunks = min(4 * self.n if chunks is None else chunks, n_items, 255)
        if chunks <= 1 or self.n == 1:
            kernel(*args, 0, n_items)
            return
        if not self._started:
            self._start()
        if self._asleep:
            _wake(self._asleep)
        grain = GRAIN_OF_ROWS if n_items >= GRAIN_OF_ROWS * chunks else 1
        if region(kernel)(self._shared, chunks, grain, n_items, args):
            kernel(*args, 0, n_items)  # alone: the pool is taken, or to raise what a chunk raised


GRAIN_OF_ROWS = 24  # kernels take 4, 6, 8 or 24 rows at a time

_pools: "weakref.WeakSet[Pool]" = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


SMALL = 1 << 14  # bytes that are worth a chunk


def run(pool: Pool | None, n_bytes: int, kernel, n_items: int, *args) -> None:
    """kernel(*args, 0, n_items), over the pool when there is one and enough to do for two threads."""
    if pool is None or pool.n == 1 or n_bytes < 2 * SMALL:
        kernel(*args, 0, n_items)
    else:
        pool.run(kernel, n_items, *args, chunks=min(4 * pool.n, n_bytes // SMALL))
