"""Every command of the lab has the same shape, and its result shows itself as the command prints it."""

import ast
import importlib
import inspect
import json
from pathlib import Path

import pytest

import tinymia_lab
from tinymia_lab.cli import module_of
from tinymia_lab.flags.command import Command
from tinymia_lab.runs.result import Result

PROMPT = "Egypt -> Cairo, Norway -> Oslo, Estonia ->"
NAMES = ["lens", "attend", "attribute", "trace", "report", "story", "sweep", "path", "ablate", "task_vector",
         "function_vector", "steer", "verify"]


def module(name):
    return importlib.import_module(module_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_command_is_a_function_its_result_its_words_its_flags_and_one_record(name):
    here = module(name)
    assert isinstance(here.command, Command) and here.command.name == name.replace("_", "-")
    assert inspect.unwrap(getattr(tinymia_lab, name)) is getattr(here, name)
    kind = getattr(tinymia_lab, inspect.signature(getattr(here, name)).return_annotation)
    assert issubclass(kind, Result)
    for part in ("add_flags", "run", "text"):
        assert getattr(here.command, part) is getattr(here, part)
    found, *others = inspect.signature(here.text).parameters.values()
    assert found.name == "found" and all(p.default is not p.empty for p in others)
    assert {p.name for p in others} == set(here.command.text_flags)
    assert set(inspect.signature(here.command.pictures).parameters) == {"found", *here.command.picture_flags}
    flags = {action.dest for action in here.command.parser()._actions}
    assert {*here.command.text_flags, *here.command.picture_flags} <= flags
    assert here.command.parser().get_default("kinds")


def test_printing_saving_and_opening_a_model_are_written_once():
    """No file in commands/ or comparison/ calls what flags/command.py calls for all of them."""
    lab = Path(tinymia_lab.__file__).parent
    for path in [*lab.glob("commands/*.py"), lab / "comparison/verify.py"]:
        called = {node.func.id for node in ast.walk(ast.parse(path.read_text("utf-8")))
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not called & {"print", "print_json", "emit", "open_model", "out_file", "parser", "Parser"}, path


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")


def results(model):
    yield tinymia_lab.lens(model, PROMPT)
    yield tinymia_lab.attend(model, PROMPT)
    yield tinymia_lab.attribute(model, PROMPT)
    yield tinymia_lab.trace(model, PROMPT)
    yield tinymia_lab.report(model, PROMPT, n=1)
    yield tinymia_lab.story(model, "France ->", "Norway ->")
    yield tinymia_lab.sweep(model, "France ->", "Norway ->", layers="2")
    yield tinymia_lab.path(model, "France ->", "Norway ->", "5.0:v")
    yield tinymia_lab.over_pairs(model, "attribute", "copycat-capitals")
    yield tinymia_lab.ablate(model, PROMPT, layers="2")
    yield module("ablate_groups").ablate_groups(model, PROMPT, ["ffn-1", "2.1"])
    yield tinymia_lab.steer(model, "France ->", ["Paris"], ["France"], n=1)
    yield tinymia_lab.task_vector(model, "copycat-capital", n_dev=2, n_test=2)
    yield tinymia_lab.function_vector(model, "copycat-capital", n_mean=2, n_effect=2, n_dev=2, n_test=2)
    yield tinymia_lab.verify_self(model, PROMPT, only="all")


def test_a_result_shows_what_its_command_prints_cut_to_a_screen(copycat, screen):
    """An interpreter or a notebook shows this, and not 22,000 characters of numbers."""
    for found in results(copycat):
        words = str(found).splitlines()
        lines = repr(found).splitlines()
        assert len(lines) <= 22 and max(map(len, lines)) <= 100, type(found)
        kept = lines if len(words) <= 22 else lines[:-1]
        assert kept == [line if len(line) <= 100 else line[:99] + "…" for line in words[: len(kept)]]
        if len(words) > 22:
            assert lines[-1] == f"... and {len(words) - 21} more lines"


def test_a_result_that_is_not_done_shows_its_name(copycat):
    found = tinymia_lab.task_vector(copycat, "copycat-capital", n_dev=2, n_test=2)
    found.lens = None
    assert repr(found).startswith("TaskVector(about, tasks, by_layer") and "\n" not in repr(found)


def test_the_words_of_a_steering_need_no_model_and_old_files_are_read(copycat, tmp_path):
    """A file of before `best` was kept has none of it; the same call completes it."""
    how = {"prompt": "France ->", "positive": ["Paris"], "negative": ["France"], "n": 1}
    found = tinymia_lab.steer(copycat, **how)
    found.save(tmp_path / "x.json")
    again = tinymia_lab.Steering.load(tmp_path / "x.json")
    assert repr(again) == repr(found) and again.best == found.best
    il = found.layers[0]
    assert found.best[il][0] == [piece for piece, _ in copycat.lens(found.vectors[il], 4)[0]]
    kept = json.loads((tmp_path / "x.json").read_text())
    del kept["best"]
    (tmp_path / "old.json").write_text(json.dumps(kept))
    assert tinymia_lab.Steering.load(tmp_path / "old.json").best == []
    assert tinymia_lab.steer(copycat, **how, out=tmp_path / "old.json").best == found.best
    assert tinymia_lab.Steering.load(tmp_path / "old.json").best == found.best
