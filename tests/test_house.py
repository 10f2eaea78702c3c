"""The house keeps its plan: which file may import which, and how long a file may be."""

import ast
from functools import cache
from pathlib import Path

import conftest
import pytest

import tinymia

ROOT = Path(__file__).parent.parent
LIMITS = {"kernels": 250, "lab": 250}


@cache
def modules() -> dict[str, Path]:
    """Every module of the installed packages by its import name; an __init__ by the name of its package."""
    found = {name: ROOT / f"{name}.py" for name in ("tinymia", "tinymia_backward")}
    for folder in ("kernels", "engine", "files", "lab", "models"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([f"tinymia_{folder}", *(part for part in parts if part != "__init__")])] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """The modules of ours that a module imports, those inside functions and under TYPE_CHECKING included."""
    path, known = modules()[name], modules()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & known.keys()
            found |= submodules | ({base} if len(submodules) < len(node.names) else set())
    return frozenset(found & known.keys() - {name})


def circles(names: set[str]) -> list[set[str]]:
    """Groups of modules of which each imports every other one, directly or through others."""
    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for one in imports(todo.pop()) & names - seen:
                seen.add(one)
                todo.append(one)
        return seen

    below = {name: reached(name) for name in names}
    groups = {frozenset(b for b in below[a] if a in below[b]) for a in names if a in below[a]}
    return sorted((set(group) for group in groups), key=sorted)


def of(folder: str) -> set[str]:
    return {name for name in modules() if f"{name}.".startswith(f"tinymia_{folder}.")}


def test_the_graph_of_imports_is_read_right():
    """Relative imports, modules of a package, and imports inside functions: what the other tests rest on."""
    assert "tinymia_files.errors" in imports("tinymia_files") and "tinymia_lab.cli" in imports("tinymia")
    assert {"tinymia_lab.runs.streams", "tinymia_files"} <= imports("tinymia_lab.pictures.page")
    assert {"tinymia_lab.commands.lens"} <= imports("tinymia_lab")
    assert circles({"tinymia", *of("lab")}), "tinymia.main reaches into lab, lab rests on tinymia: that one is meant"


def test_no_two_files_of_the_lab_import_each_other():
    assert not circles(of("lab"))


@pytest.mark.parametrize("folder", ["kernels", "engine", "files"])
def test_no_two_files_below_the_engine_import_each_other(folder):
    """A package's __init__, which collects names from its files, does not count."""
    assert not circles({name for name in of(folder) if modules()[name].name != "__init__.py"})


@pytest.mark.parametrize("room", ["measure", "pictures", "runs", "flags"])
def test_the_rooms_of_the_lab_do_not_import_what_stands_above_them(room):
    up = {(name, one) for name in of(f"lab.{room}") for one in imports(name)
          if one.startswith(("tinymia_lab.commands", "tinymia_lab.comparison", "tinymia_lab.cli"))}
    assert not up


@pytest.mark.parametrize("room,above", [("runs", ("measure", "pictures", "flags")), ("measure", ("pictures", "flags")),
                                        ("pictures", ("measure", "flags"))])
def test_the_rooms_of_the_lab_stand_in_order(room, above):
    """Results at the bottom; measurements and pictures on them, apart from each other; flags on both."""
    up = {(name, one) for name in of(f"lab.{room}") for one in imports(name)
          if one.startswith(tuple(f"tinymia_lab.{other}" for other in above))}
    assert not up


@pytest.mark.parametrize("folder,above", [
    ("kernels", ("tinymia", "engine", "files", "lab", "models")), ("files", ("tinymia", "engine", "lab")),
    ("engine", ("tinymia", "tinymia_backward", "lab")),
])
def test_imports_point_down_to_files_and_kernels(folder, above):
    names = set().union(*({one} if one.startswith("tinymia") else of(one) for one in above))
    assert not {(name, one) for name in of(folder) for one in imports(name) & names}


@pytest.mark.parametrize("folder", LIMITS)
def test_a_file_can_be_read_in_one_sitting(folder):
    long = {str(path.relative_to(ROOT)): n for path in (ROOT / folder).rglob("*.py")
            if (n := len(path.read_text("utf-8").splitlines())) > LIMITS[folder]}
    assert not long


def test_the_story_is_in_the_first_half_of_a_short_file():
    lines = (ROOT / "tinymia.py").read_text("utf-8").splitlines()
    forward = next(node for node in ast.parse("\n".join(lines)).body
                   if isinstance(node, ast.FunctionDef) and node.name == "forward")
    assert len(lines) <= 850 and forward.lineno < len(lines) / 2
    assert forward.end_lineno - forward.lineno + 1 <= 60


@pytest.mark.parametrize("leave", [
    lambda model: setattr(model, "generate", model.generate), lambda model: setattr(model.ops, "alone", True),
    lambda model: model.tokenizer.end.add(5), lambda model: model.about.clear(),
    lambda model: model.weights.blk[1].attn_norm.fill(1), lambda model: model.weights.output_norm.fill(1),
], ids=["a method", "an op", "a token", "a dictionary", "a layer's weights", "the last norm"])
def test_what_a_test_leaves_in_a_shared_model_is_seen(tiny, leave):
    model = tinymia.load(tiny(), threads=1)
    was = conftest.state(model)
    model.run("the fox")
    assert conftest.state(model) == was
    leave(model)
    assert conftest.state(model) != was


def nodes(kind):
    """(place, node) of everything of this kind in the tests."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, kind):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_a_skipped_test_says_what_it_needs():
    """The reason begins with "needs": what is missing and, if possible, how to get it."""
    mute = []
    for place, call in nodes(ast.Call):
        kind = ast.unparse(call.func)
        if kind in ("pytest.skip", "pytest.importorskip", "pytest.mark.skip", "pytest.mark.skipif"):
            said = call.args[:1] if kind == "pytest.skip" else [k.value for k in call.keywords if k.arg == "reason"]
            if not said or (isinstance(said[0], ast.Constant) and not said[0].value.startswith("needs ")):
                mute.append(place)
    assert not mute


def test_an_expected_error_is_expected_with_its_message():
    """It uses match=, or looks at what `as` gives; otherwise any other error would pass. Ctrl-C has no message."""
    bare = []
    for place, node in nodes(ast.With):
        for call in [item.context_expr for item in node.items if not item.optional_vars]:
            if (isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.raises"
                    and not call.keywords and ast.unparse(call.args[0]) != "KeyboardInterrupt"):
                bare.append(place)
    assert not bare


def described():
    """(place, docstring) of every module, public class, function and method of the project, and of every kernel."""
    kernels = {"inline", "kernel", "part", "template"}
    for folder in ("engine", "kernels", "files", "lab", "models", "training", "bench", "."):
        paths = (ROOT / folder).rglob("*.py") if folder != "." else [ROOT / "tinymia.py", ROOT / "setup.py"]
        for path in sorted(paths):
            tree = ast.parse(path.read_text("utf-8"))
            yield f"{path.relative_to(ROOT)}", ast.get_docstring(tree)
            for node in [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]:
                inside = [n for n in getattr(node, "body", ()) if isinstance(node, ast.ClassDef)]
                for one in [node, *(n for n in inside if isinstance(n, ast.FunctionDef))]:
                    marks = {ast.unparse(d).partition("(")[0] for d in one.decorator_list}
                    hidden = one.name.startswith("_") or node.name.startswith("_")
                    if not hidden or marks & kernels:
                        yield f"{path.relative_to(ROOT)}:{one.lineno} {one.name}", ast.get_docstring(one)


def test_every_public_function_and_every_kernel_has_a_docstring():
    assert not [place for place, text in described() if not text]


def test_a_docstring_makes_sense_without_the_name_of_its_function():
    """It begins with a verb or with a noun phrase, and not with a word that continues the name."""
    wrong = {"Of", "As", "What", "Whether", "Where", "If", "By"}
    assert not [place for place, text in described() if text and text.split()[0] in wrong]
