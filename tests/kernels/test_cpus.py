"""Kernels compiled for other CPUs: the same integers everywhere, and the dot product instruction where there is one."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from formats import random_weights

import tinymia_kernels as tk
from tinymia_kernels.machine import cpu

X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = "+sse3,+ssse3,+sse4.1,+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+lzcnt"
CPUS = {  # environment of a process that compiles for it, and formats: compiling all of them takes a minute each
    "portable": ({"TINYMIA_PORTABLE": "1"}, "Q5_1 Q8_0 Q6_K"),
    "avx2": ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2}, "Q4_0 Q8_0 Q4_K"),
    "baseline": ({"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}, "Q4_0 Q4_K F16"),
}

# argv: where to put the products, and formats.
PRODUCTS = """
import sys
import numpy as np
from test_cpus import products
np.savez(sys.argv[1], **products(sys.argv[2:]))
"""

# Numba made to compile for another CPU what is never called; argv: formats. Prints whether there is a pause, and how
# often each kernel has the dot product instructions.
AARCH64 = """
import platform, sys
import llvmlite.binding as llvm
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
llvm.get_process_triple = lambda: "aarch64-unknown-linux-gnu"
import numba
from numba import types
platform.machine = lambda: "aarch64"
import tinymia_kernels as tk
from tinymia_kernels.machine import atomics
@numba.njit
def wait():
    atomics.pause()
wait.compile(())
print("yield" in wait.inspect_asm(()).split() or "hint" in wait.inspect_asm(()).split())
u8, weights = types.Array(types.uint8, 1, "C"), types.Array(types.uint8, 1, "C", readonly=True)
out, i64 = types.Array(types.float32, 2, "C"), types.int64
signature = u8, i64, weights, i64, i64, out, i64, i64
formats = {fmt.name: fmt for fmt in tk.FORMATS.values()}
for name in sys.argv[1:]:
    for kernel in (formats[name].matmul, formats[name].matmul_many):
        kernel.compile(signature)
        words = kernel.inspect_asm(kernel.signatures[0]).split()
        print(kernel.py_func.__name__, words.count("usdot"), words.count("sdot"))
"""


def run_python(code, cache, *args, **environment):
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_CPU_", "TINYMIA_PORTABLE"))}
    env |= {"PYTHONPATH": path, "NUMBA_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def products(names):
    """The products of formats with 1, 5 and 20 tokens."""
    made = {}
    for fmt in (fmt for fmt in tk.FORMATS.values() if fmt.name in names):
        rng = np.random.default_rng(fmt.type)
        n_in = 64 if fmt.block_size == 1 else max(96, fmt.block_size)
        raw, _ = random_weights(fmt, rng, 6, n_in)
        x = rng.standard_normal((20, n_in)).astype(np.float32)
        for n_tok in (1, 5, 20):
            made[f"{fmt.name} {n_tok}"] = tk.matmul(x[:n_tok], raw, fmt, 6)
    return made


def why_not(name):
    if name != "portable" and not X86:
        return "needs an x86-64 CPU"
    if name == "avx2" and not {"avx2", "fma", "f16c"} <= cpu.FEATURES:
        return "needs a CPU with AVX2, FMA and F16C"


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """For each CPU, what its process made; two of them compile at the same time."""
    folder = tmp_path_factory.mktemp("cpus")

    def start(name):
        environment, formats = CPUS[name]
        run_python(PRODUCTS, folder / name, folder / f"{name}.npz", *formats.split(), **environment)
        return dict(np.load(folder / f"{name}.npz"))

    names = [name for name in CPUS if not why_not(name)]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(start, names), strict=True))


@pytest.mark.parametrize("name", CPUS)
def test_products_on_other_cpus(name, others):
    if why_not(name):
        pytest.skip(why_not(name))
    here, there = products(CPUS[name][1].split()), others[name]
    assert there.keys() == here.keys() and len(here) == 9
    for key, product in there.items():
        if name != "baseline":
            assert np.array_equal(product, here[key]), key  # the same integers, the same order
        else:  # products and sums are rounded apart where there is no fma
            np.testing.assert_allclose(product, here[key], rtol=1e-4, atol=1e-5 * np.abs(here[key]).max(), err_msg=key)


@pytest.mark.parametrize(
    "features, formats", [("+neon,+dotprod,+i8mm", "Q4_0 Q8_0 Q4_K Q6_K"), ("+neon,+dotprod", "Q8_0 Q4_K")]
)
def test_kernels_for_aarch64_use_the_dot_product(features, formats, tmp_path):
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    pauses, *lines = run_python(AARCH64, tmp_path, *formats.split(), **environment).splitlines()
    assert pauses == "True" and len(lines) == 2 * len(formats.split())
    for line in lines:
        name, usdot, sdot = line.split()
        assert int(usdot if "i8mm" in features else sdot) >= 16, name
