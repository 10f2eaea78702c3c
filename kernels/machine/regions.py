"""The memory that the threads of a pool share, and the compiled code by which they share work.

A job is one kernel with its arguments; its items (rows, or heads) are cut into chunks. A region is one job, or several,
whose chunks are handed out and waited for together. The calling thread writes the jobs to the shared memory and
publishes a ticket; every free thread, the caller included, takes chunks by incrementing the ticket, see threads.py.
"""

from functools import cache
from pathlib import Path

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .atomics import atomic_add, atomic_load, atomic_store, compare_and_swap, load_word, pause, store_word
from .jit import inline, kernel, specialise
from .simd import address_of

# Shared words, in bytes from the start of a pool's memory. Words that different threads write are 64 bytes apart, so
# that no two of them lie in one cache line.
TICKET = 0          # generation << 32 | chunks << 16 | chunks taken
FINISHED = 64       # chunks done
FAILED = 128        # chunks of which a kernel raised an exception
BUSY = 192          # 1 while a region runs
STOP = 256          # 1 when the threads are to end
N_JOBS = 264        # jobs of the region
JOBS = 320          # the jobs, one after another
MAX_JOBS = 8

# A job, in bytes from its start.
FUNCTION, ITEMS, GRAIN = 0, 8, 16   # the address of its code; its items; items that are not cut apart
FIRST, CHUNKS = 24, 32              # the number of its first chunk in the region, and how many chunks it is cut into
ARGUMENTS = 40                      # flattened as numba passes them, 8 bytes each
JOB = 512

SHARED = JOBS + MAX_JOBS * JOB


def borrowed(context, builder, kind, value):
    """An argument without its reference count: the caller keeps arrays alive until the region has ended.

    One call writes a job down and another runs it, and numba drops its own references at the end of each call.
    """
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo, array.parent = (ir.Constant(pointer.type, None) for pointer in (array.meminfo, array.parent))
        value = array._getvalue()
    return value


@intrinsic
def hand_over(typing_context, function, address, arguments):
    """Store a kernel's arguments, all but i0 and i1. Returns the address of code(address of the arguments, i0, i1)."""
    kinds = (*arguments.types, types.intp, types.intp)
    typing_context.resolve_function_type(function, kinds, {})
    compiled = function.dispatcher.overloads[kinds]

    def codegen(context, builder, sig, values):
        packer = context.get_arg_packer(arguments.types)
        parts = [borrowed(context, builder, t, builder.extract_value(values[2], k)) for k, t in enumerate(arguments)]
        flat = packer.as_arguments(builder, parts)
        if ARGUMENTS + 8 * len(flat) > JOB:
            raise TypeError(f"{function.dispatcher.py_func.__name__}: {len(flat)} words of arguments, too many")
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
def call_code(_, code, address, i0, i1):
    """code(address, i0, i1) -> 0, or another number when the kernel raised an exception."""

    def codegen(context, builder, sig, args):
        code_type = ir.FunctionType(ir.IntType(32), [a.type for a in args[1:]])
        return builder.call(builder.inttoptr(args[0], code_type.as_pointer()), args[1:])

    return types.int32(types.intp, types.intp, types.intp, types.intp), codegen


@inline
def aligned(shared):
    """The address at which a pool's memory begins: a multiple of 64."""
    return (address_of(shared) + 63) & -64


@inline
def run_chunk(at, ticket):
    """Run the chunk that a ticket names. Returns False if all chunks were taken already."""
    chunk, chunks = ticket & 0xFFFF, ticket >> 16 & 0xFFFF
    if chunk >= chunks:
        return False
    job = at + JOBS
    for _ in range(load_word(at + N_JOBS) - 1):
        if chunk >= load_word(job + JOB + FIRST):
            job += JOB
    chunk, chunks = chunk - load_word(job + FIRST), load_word(job + CHUNKS)
    n, grain = load_word(job + ITEMS), load_word(job + GRAIN)
    grains = (n + grain - 1) // grain
    i0, i1 = grains * chunk // chunks * grain, min(grains * (chunk + 1) // chunks * grain, n)
    if call_code(load_word(job + FUNCTION), job + ARGUMENTS, i0, i1) != 0:
        atomic_add(at + FAILED, 1)
    atomic_add(at + FINISHED, 1)
    return True


@kernel
def serve(shared, patience):
    """Wait for regions and run their chunks; return after `patience` looks at the ticket without a new one."""
    at, seen, looks = aligned(shared), -1, 0
    while looks < patience and load_word(at + STOP) == 0:
        if atomic_load(at + TICKET) >> 32 == seen:
            looks += 1
            pause()
            continue
        looks, ticket = 0, atomic_add(at + TICKET, 1)
        if not run_chunk(at, ticket):
            seen = ticket >> 32


@inline
def write_job(job, code, n, grain, first, chunks):
    """Write a job, whose arguments are stored already, to the shared memory: its code, items and chunks."""
    store_word(job + FUNCTION, code)
    store_word(job + ITEMS, n)
    store_word(job + GRAIN, grain)
    store_word(job + FIRST, first)
    store_word(job + CHUNKS, chunks)


@inline
def run_region(at, n_jobs, chunks):
    """Publish the region, take chunks of it, and wait until all are done. Returns 0, or 1 when a chunk failed."""
    store_word(at + N_JOBS, n_jobs)
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


body = None  # the kernel that a template is specialised for


def region_template(shared, chunks, grain, n, arguments):
    """Run the kernel `body` over n items. Returns 0; 1 if a chunk failed; 2 if another thread's region is running."""
    at = aligned(shared)
    if not compare_and_swap(at + BUSY, 0, 1):
        return 2
    write_job(at + JOBS, hand_over(body, at + JOBS + ARGUMENTS, arguments), n, grain, 0, chunks)
    return run_region(at, 1, chunks)


def job_template(shared, number, first, chunks, grain, n, arguments):
    """Write the kernel `body` over n items to the shared memory, as one job of a region that `take` has reserved."""
    job = aligned(shared) + JOBS + number * JOB
    write_job(job, hand_over(body, job + ARGUMENTS, arguments), n, grain, first, chunks)


@cache
def region(function):
    """The compiled function that runs a kernel as a region; kept on disk under the names of the kernel and its file."""
    return specialise(region_template, f"region_{_name(function)}", body=function)


@cache
def job(function):
    """The compiled function that writes a kernel down as one job of several; kept on disk like a region."""
    return specialise(job_template, f"job_{_name(function)}", body=function)


def _name(function) -> str:
    return f"{Path(function.py_func.__code__.co_filename).stem}_{function.py_func.__name__}"


@kernel
def take(shared):
    """Reserve the pool for a region of several jobs. Returns False if another thread is using it."""
    return compare_and_swap(aligned(shared) + BUSY, 0, 1)


@kernel
def release(shared):
    """Free a pool that `take` has reserved, without running anything."""
    atomic_store(aligned(shared) + BUSY, 0)


@kernel
def run_jobs(shared, n_jobs, chunks):
    """Run the jobs that were written down, and free the pool. Returns 0, or 1 if a chunk failed."""
    return run_region(aligned(shared), n_jobs, chunks)
