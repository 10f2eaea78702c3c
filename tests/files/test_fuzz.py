"""The fuzzer itself: it must see what it is there for."""
import os
import sys
import time

import pytest
from conftest import SHARED
from forked import in_child

if not (SHARED / "tools" / "fuzz_gguf.py").exists():
    pytest.skip("needs tools/fuzz_gguf.py of the folder `shared` beside the project", allow_module_level=True)
pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'tinymia[bpe]'", exc_type=ImportError)
import fuzz


def says(text, status):
    print(text, file=sys.stderr)
    return status


@pytest.mark.parametrize("function, args, kind", [
    (says, ("tinymia: f.gguf: note", 0), "ok"), (says, ("error: f.gguf: no", 2), "clean"),
    (says, ("error: f.gguf: no\nerror: twice", 2), "dirty"), (says, ("no", 2), "dirty"),
    (says, ("error: no", 1), "dirty"),
    (says, ("Traceback (most recent call last):", 0), "dirty"), (int, ("x",), "dirty"), (os._exit, (0,), "crash"),
    (os.abort, (), "crash"), (time.sleep, (60,), "hang"),
], ids=str)
def test_every_kind_of_end(function, args, kind):
    assert fuzz.verdict(in_child(function, *args, timeout=20 if kind != "hang" else 0.3)) == kind


@pytest.mark.parametrize("name", fuzz.SEEDS)
def test_the_models_whose_mutants_are_tried_run(tmp_path, name):
    assert fuzz.command(fuzz.SEEDS[name](tmp_path / "f.gguf")) == 0


def test_forty_mutants_are_errors_or_models(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "20", "Q4_K_M", "gpt2"])
    assert not fuzz.main()
    assert capfd.readouterr().out.count("20 mutants") == 2
