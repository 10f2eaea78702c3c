"""The README and the manual: tables say what the code says, links lead somewhere, commands fit a terminal."""
import re
import subprocess
from pathlib import Path

import architectures
import pytest

import tinymia
from tinymia_engine.names import AFTER, ALIASES, BEFORE, LAYER
from tinymia_files import ARCHITECTURES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in ("models", "bench", "training")),
         *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def rows(page, first):
    """The cells of a Markdown table, by its first column; `first` is that column's title."""
    lines = (ROOT / "docs" / page).read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        table[cells[0]] = cells[1:]
    return table


def label(op, il):
    """The name of an op as the page writes it."""
    return op.base if il is None else f"{op.base}-L"


def test_the_table_of_names_is_that_of_the_code(copycat):
    """First the names of a Llama, in the order of computation, then all others."""
    llama = {label(op, il): ", ".join(op.dims) for op, il in copycat.table.values()}
    every = {label(op, None): ", ".join(op.dims) for op in (*BEFORE, *AFTER)}
    every |= {label(op, 0): ", ".join(op.dims) for op in LAYER}
    first, more = rows("names.md", "name"), rows("names.md", "further name")
    assert {name: cells[0] for name, cells in first.items()} == llama and list(first) == list(llama)
    assert {name: cells[0] for name, cells in more.items()} == {k: v for k, v in every.items() if k not in llama}
    order = [label(op, il) for part, il in ((BEFORE, None), (LAYER, 0), (AFTER, None)) for op in part]
    assert list(more) == [name for name in dict.fromkeys(order) if name in more]


def test_the_page_of_names_says_which_architectures_have_a_name(tmp_path):
    """An architecture counts if one of its shapes in tests/architectures.py has the name."""
    have = {}
    for arch, name in architectures.EVERY:
        model = tinymia.load(architectures.write(tmp_path / "a.gguf", arch, name), numerics="plain")
        for op, il in model.table.values():
            have.setdefault(label(op, il), dict())[arch] = True
    said = {name: cells[2].split(", ") for name, cells in rows("names.md", "further name").items()}
    assert {name: sorted(some) for name, some in said.items()} == {name: sorted(have[name]) for name in said}


def test_every_architecture_is_on_its_page():
    assert list(rows("architectures.md", "architecture")) == list(ARCHITECTURES)
    text = (ROOT / "docs" / "architectures.md").read_text("utf-8")
    neighbours = text.partition("of a head together in ")[2].partition(", and `i`")[0]
    assert set(neighbours.replace(" and ", ", ").split(", ")) == {k for k, a in ARCHITECTURES.items() if not a.halves}


def test_every_test_that_the_page_of_architectures_names_is_there():
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for (cell,) in rows("architectures.md", "what").values():
        for name in re.findall(r"`([^`]+)`", cell):
            assert (ROOT / name).exists() if "/" in name else f"def {name}(" in tests, name


def test_the_names_of_the_post_are_on_the_page():
    said = {base for cells in rows("names.md", "name").values() for base in re.findall(r"\w+", cells[2])}
    assert set(ALIASES) <= said


def test_every_action_is_on_its_page():
    page = {name.strip("`").partition("(")[0] for name in rows("actions.md", "action")}
    changes = {name for name in tinymia.__all__ if isinstance(getattr(tinymia, name), type)
               and issubclass(getattr(tinymia, name), tinymia.Action)}
    assert page == changes - {"Action", "Edit"}


def test_every_mode_of_numerics_is_on_its_page():
    assert {mode.strip("`") for mode in rows("numerics.md", "mode")} == set(tinymia.NUMERICS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    text = FENCED.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + page.stem)
def test_nothing_needs_the_folder_beside_the_project(page):
    assert "../shared" not in page.read_text("utf-8")


def test_the_manual_lists_all_its_pages():
    listed = (ROOT / "docs" / "README.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in listed, page.name


def test_the_readme_is_short_and_its_commands_fit_80_columns():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert text[: text.index("examples/sweep.png")].count("\n") <= 60
    for language, block in FENCED.findall(text):
        if language != "text":
            assert max(map(len, block.splitlines())) <= 80, block
    assert not re.search(r"\d+ passed", text)


def test_ci_finds_the_two_commands_of_the_readme_that_set_up():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    function = script[script.index("readme() {") : script.index("# Run them as a reader")]
    blocks = [block for _, block in FENCED.findall((ROOT / "README.md").read_text("utf-8"))]
    for word in re.findall(r'^run_readme "?([^"\n]+)"?$', script, re.M):
        found = subprocess.run(["bash", "-c", f'{function}\nreadme "$1"', "bash", word], cwd=ROOT, capture_output=True,
                               text=True, check=True).stdout
        assert found == next(block for block in blocks if block.startswith("python3 -m venv") and word in block)
