"""The cache of compiled kernels: where it is, and that it repairs itself after damage."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinymia_kernels.machine import jit

ROOT = Path(__file__).parents[2]
CODE = """
import numba, numpy as np, tinymia_kernels.machine.jit as jit
@jit.kernel
def twice(x):
    return x + x
assert twice(np.float32(4)) == 8
print(int(jit._announcer.kernels))
"""


def compiled(folder, **env):
    """(kernels that a new process compiles, what it says)."""
    code = folder / "one.py"    # a file: the cache keeps what has one
    code.write_text(CODE)
    known = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    p = subprocess.run([sys.executable, code], env={**known, "PYTHONPATH": str(ROOT), **env}, cwd=folder,
                       capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return int(p.stdout), p.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the script and a cache that holds its kernel."""
    folder = tmp_path_factory.mktemp("whole")
    assert compiled(folder, NUMBA_CACHE_DIR=str(folder / "cache"))[0] == 1
    assert compiled(folder, NUMBA_CACHE_DIR=str(folder / "cache"))[0] == 0
    return folder


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:100], lambda b: bytes(len(b)), lambda b: b[:-1]],
                         ids=["empty", "cut", "zeroed", "one byte less"])
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_cache_mends_itself(whole, damage, suffix):
    cache = whole / "cache"     # whole again after each of these tests
    files = list(cache.rglob(f"*.{suffix}"))
    assert files
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    n, said = compiled(whole, NUMBA_CACHE_DIR=str(cache))
    assert n == 1 and "cannot keep" not in said
    assert compiled(whole, NUMBA_CACHE_DIR=str(cache))[0] == 0


def test_without_jit_kernels_are_compiled_all_the_same(tmp_path):
    assert compiled(tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "c"), NUMBA_DISABLE_JIT="1")[0] == 1


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs os.getuid, which Linux and macOS have")
def test_no_folder_is_called_tilde(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(tmp_path))
    own = tmp_path / f"tinymia-{os.getuid()}"
    monkeypatch.setattr(jit.os.path, "expanduser", lambda p: p)     # an unknown uid
    for env in ({}, {"XDG_CACHE_HOME": "~/.cache"}, {"XDG_CACHE_HOME": "here"}, {"NUMBA_CACHE_DIR": "~/x"}):
        with monkeypatch.context() as m:
            for name, value in env.items():
                m.setenv(name, value)
            assert jit.cache_folder() == own / "kernels"
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)    # another user could have put kernels there
    assert not jit.cache_folder().exists() and str(jit.cache_folder()).startswith(os.devnull)
    own.rmdir()
    own.symlink_to(tmp_path)
    assert str(jit.cache_folder()).startswith(os.devnull)
