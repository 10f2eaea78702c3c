"""Words of 64 bits that threads share: atomic reads, writes and sums, and a pause for a thread that waits."""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .simd import INDEX, call

WORD = ir.IntType(64)


def _on_word(result, emit, n_values: int):
    """Make f(address, ...) from `emit(builder, pointer, values)`, which writes its instruction."""
    word = types.int64

    def typed(args):
        def codegen(context, builder, sig, values):
            done = emit(builder, builder.inttoptr(values[0], WORD.as_pointer()), values[1:])
            return context.get_dummy_value() if result is types.none else done

        return result(*[word] * (n_values + 1)), codegen

    if n_values == 0:
        return intrinsic(lambda _, address: typed((address,)))
    if n_values == 1:
        return intrinsic(lambda _, address, value: typed((address, value)))
    return intrinsic(lambda _, address, old, new: typed((address, old, new)))


load_word = _on_word(types.int64, lambda b, at, values: b.load(at, align=8), 0)
store_word = _on_word(types.none, lambda b, at, values: b.store(values[0], at, align=8), 1)
atomic_load = _on_word(types.int64, lambda b, at, values: b.load_atomic(at, "seq_cst", 8), 0)
atomic_store = _on_word(types.none, lambda b, at, values: b.store_atomic(values[0], at, "seq_cst", 8), 1)
atomic_add = _on_word(types.int64, lambda b, at, values: b.atomic_rmw("add", at, values[0], "seq_cst"), 1)
# compare_and_swap(address, old, new): write `new` if the word is `old`, and return whether it was.
compare_and_swap = _on_word(
    types.boolean, lambda b, at, values: b.extract_value(b.cmpxchg(at, *values, "seq_cst", "seq_cst"), 1), 2
)


PAUSES = {"x86_64": ("llvm.x86.sse2.pause", []), "i686": ("llvm.x86.sse2.pause", []),
          "aarch64": ("llvm.aarch64.hint", [1]), "arm64": ("llvm.aarch64.hint", [1])}


@intrinsic
def pause(_):
    """Wait for a moment, in which the core's other hardware thread may run; do nothing on a CPU not in PAUSES."""

    def codegen(context, builder, sig, args):
        name, numbers = PAUSES.get(builder.module.triple.split("-")[0], (None, []))
        if name:
            call(builder, name, ir.VoidType(), [ir.Constant(INDEX, number) for number in numbers])
        return context.get_dummy_value()

    return types.none(), codegen
