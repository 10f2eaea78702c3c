"""Templates: the parts that a class must bring so that kernels are made from it; a new format is one file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tinymia_kernels as tk
from tinymia_kernels.__main__ import main, table
from tinymia_kernels.machine.jit import specialise
from tinymia_kernels.machine.template import STAMPED, Template, abstract, entry, part

KERNELS = Path(tk.__file__).resolve().parent


class Family(Template):
    """A sum of two parts, times a number."""

    SIZE: int

    @abstract
    def left(x):
        """The left part."""

    @part
    def right(x):
        return x

    @part
    def both(x):
        return fmt.left(x) + fmt.right(x)

    @entry
    def total(x):
        return fmt.SIZE * fmt.both(x)


fmt: Family = STAMPED


def test_a_class_brings_parts_and_gets_kernels():
    class Plus(Family):
        SIZE = 2

        @part
        def left(x):
            return 10 * x

    class Minus(Family):
        SIZE = 3
        left = Plus.left  # before it is stamped: the part itself

        @part
        def right(x):
            return -x

    Plus.stamp()
    Minus.stamp()
    assert (Plus.total(1), Minus.total(1)) == (2 * 11, 3 * 9)
    assert Plus.total.py_func.__name__ == "total_Plus"


def test_a_missing_part_is_an_error_that_names_class_and_part():
    class Forgetful(Family):
        SIZE = 2

    with pytest.raises(TypeError, match=r"Forgetful lacks the part left, which Family asks for: The left part\."):
        Forgetful.stamp()


def test_a_missing_number_is_an_error():
    class Sizeless(Family):
        @part
        def left(x):
            return x

    with pytest.raises(TypeError, match="Sizeless lacks the number SIZE, which Family asks for"):
        Sizeless.stamp()


def test_a_part_that_nobody_asks_for_is_an_error():
    class Misspelt(Family):
        SIZE = 2

        @part
        def left(x):
            return x

        @part
        def rihgt(x):
            return x

    with pytest.raises(TypeError, match="Misspelt has a part rihgt, which nothing in Family asks for"):
        Misspelt.stamp()


def test_a_number_that_nobody_asks_for_is_an_error():
    class Large(Family):
        SIZE, SIZ = 2, 3

    with pytest.raises(TypeError, match="Large has a part SIZ, which nothing in Family asks for"):
        Large.stamp()


def test_other_parameters_than_declared_are_an_error():
    class Wider(Family):
        SIZE = 2

        @part
        def left(x, y):
            return x

    with pytest.raises(TypeError, match=r"Wider\.left\(x, y\) is declared as Family\.left\(x\)"):
        Wider.stamp()


def test_a_template_that_asks_for_what_is_not_there_is_an_error():
    class Curious(Family):
        SIZE = 2

        @part
        def left(x):
            return fmt.middle(x)

    with pytest.raises(TypeError, match=r"Curious\.left asks for fmt\.middle, which Curious does not have"):
        Curious.stamp()


def test_every_format_would_miss_each_of_its_own_parts():
    """A format without any one of the parts or numbers that its family declares as abstract is refused."""
    tried = 0
    for made_of in (fmt.made_of for fmt in tk.FORMATS.values()):
        own = {name: value for name, value in vars(made_of).items() if not name.startswith("_")}
        own = {name: value for name, value in own.items() if name not in ("parts", "format")}
        for name in own:
            inherited = next((vars(base)[name] for base in made_of.__mro__[1:] if name in vars(base)), None)
            if name == "TYPE" or not (inherited is None or isinstance(inherited, abstract)):
                continue  # without TYPE a class is not a format; and a default is not missed
            rest = {other: value for other, value in own.items() if other != name}
            with pytest.raises(TypeError, match=f"Incomplete lacks the (part|number) {name}, which"):
                type("Incomplete", made_of.__bases__, rest)
            tried += 1
    assert tried > 3 * len(tk.FORMATS)


def test_a_template_is_not_given_names_that_it_does_not_use():
    def template(x):
        return x + SIZE

    with pytest.raises(TypeError, match=r"test: the template .*template uses no SIZ"):
        specialise(template, "test", SIZ=1)


SIZE = 0

# A new format: blocks of 32 weights, a float32 scale behind 32 signed bytes.
TOY = '''
"""A format of no file."""

from ..machine.lanes import first
from ..machine.template import part
from ..machine.vectors import f32x8, load_f32x1, load_u8x32
from ..products.blocks_many import ManyTokens


class TOY(ManyTokens):
    """9 bits per weight: weight = d * quant.

        byte  0-31        32-35
              quants, i8  d, f32
    """

    TYPE, SIZE, BIAS = 1000, 36, 128

    @part
    def quants(row, j):
        return load_u8x32(row + 36 * j) ^ 128

    @part
    def scale(row, j):
        return f32x8(first(load_f32x1(row + 36 * j + 32)))
'''

# Random weights in that format: products of 1, 5 and 20 tokens and unpacked rows, beside NumPy; what the command says.
USE = """
import numpy as np
import tinymia_kernels as tk
from tinymia_kernels.__main__ import main
from formats import as_activation
rng = np.random.default_rng(1)
fmt = tk.FORMATS[1000]
quants, d = rng.integers(-128, 128, (7, 3, 32)).astype(np.int8), rng.standard_normal((7, 3, 1)).astype(np.float32)
raw = np.concatenate([quants.view(np.uint8), d.view(np.uint8)], -1).reshape(-1)
weights = (quants * d).reshape(7, 96)
assert np.array_equal(tk.dequantize(raw, fmt, 7, 96), weights)
x = rng.standard_normal((20, 96)).astype(np.float32)
want = as_activation(x, "Q8_0") @ weights.astype(np.float64).T
for n_tok in (1, 5, 20):
    got = tk.matmul(x[:n_tok], raw, fmt, 7)
    assert np.abs(got - want[:n_tok]).max() < 1e-5 * np.abs(want).max()
main([])
main(["toy"])
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package to which a file may be added, and what runs code with it."""
    shutil.copytree(KERNELS, tmp_path / "tinymia_kernels", ignore=shutil.ignore_patterns("__pycache__"))

    def run(code):
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
        env = {**os.environ, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True)

    return tmp_path / "tinymia_kernels", run


def test_a_new_format_is_one_file(package):
    folder, run = package
    (folder / "formats" / "toy.py").write_text(TOY)
    done = run(USE)
    assert done.returncode == 0, done.stderr
    assert "| TOY | 9 | 32 | 36 | Q8_0 | weight = d * quant |" in done.stdout
    lines = TOY.splitlines()
    assert f"class TOY, formats/toy.py:{lines.index('class TOY(ManyTokens):') + 1}\n" in done.stdout
    assert f" formats/toy.py:{lines.index('    def quants(row, j):')} " in done.stdout  # its decorator's line


def test_a_class_without_a_type_in_the_folder_of_formats_is_an_error(package):
    folder, run = package
    (folder / "formats" / "toy.py").write_text(TOY.replace("TYPE, SIZE, BIAS = 1000,", "SIZE, BIAS ="))
    done = run("import tinymia_kernels")
    assert done.returncode == 1 and "class TOY does not state its TYPE" in done.stderr.splitlines()[-1]


def test_a_type_that_is_taken_is_an_error(package):
    folder, run = package
    (folder / "formats" / "toy.py").write_text(TOY.replace("1000", "12"))
    done = run("import tinymia_kernels")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: ggml type 12 TOY is already registered as 12 Q4_K"


@pytest.mark.parametrize("fmt", [*tk.FORMATS.values(), tk.EXPANDED], ids=lambda fmt: fmt.name)
def test_the_command_shows_a_format(fmt, capsys):
    assert main([fmt.name]) == 0
    out = capsys.readouterr().out
    for name in ("matmul", "unpack_rows"):
        assert f"\n{name} " in out
    for line in out.splitlines():  # every place is one: the line, or one of the next, defines what is named
        words = line.split()
        if len(words) > 1 and ".py:" in words[1] and words[0] != fmt.name:
            file, number = words[1].split(":")
            text = (KERNELS / file).read_text().splitlines()[int(number) - 1 :][:2]
            assert any(f"def {words[0]}(" in here for here in text), line


def test_the_command_says_which_formats_there_are(capsys):
    assert main(["Q7_K"]) == 2
    assert "no block format is called 'Q7_K': it is one of" in capsys.readouterr().err
    assert main([]) == 0 and capsys.readouterr().out.strip() == table()


def test_a_kernel_file_has_at_most_250_lines():
    long = {path.name: n for path in KERNELS.rglob("*.py") if (n := len(path.read_text().splitlines())) > 250}
    assert not long


def test_only_the_machine_knows_of_llvm():
    for path in KERNELS.rglob("*.py"):
        if path.parent.name != "machine":
            assert "llvmlite" not in path.read_text() and "numba." not in path.read_text(), path
