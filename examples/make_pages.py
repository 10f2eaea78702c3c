"""Run every command of the pages in this folder and of the model card, and write what they print into the pages.

    python examples/make_pages.py            # run all, write the outputs
    python examples/make_pages.py --check    # run all, compare; exit status 1 when an output differs

In a page, the block ```text that follows a block ```bash is what bash printed; blocks ```sh are not run, because they
are about files that are not here. In a notebook all code cells run in one process, as Jupyter would run them, and what
a cell printed is its output. --check lets scores differ by 5 %, because processors round differently; words may not.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGES = ("task_vectors.md", "task_vectors.ipynb", "../models/README.md")
RUN = re.compile(r"(```bash\n(.*?)```\n\n```text\n)(.*?)(```\n)", re.S)
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
        path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        before = os.getcwd()
        os.chdir(folder)
        try:
            yield {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path}
        finally:
            os.chdir(before)


def page(text: str) -> str:
    """A page with its outputs as they are now."""
    with workplace() as env:

        def block(match: re.Match[str]) -> str:
            p = subprocess.run(["bash", "-euo", "pipefail", "-c", match[2]], env=env, capture_output=True, text=True)
            if p.returncode:
                raise SystemExit(f"{match[2]}exit status {p.returncode}: {p.stderr}")
            lines = [line for line in p.stdout.splitlines(True) if not line.startswith("tinymia: compil")]
            return match[1] + "".join(lines) + match[4]

        return RUN.sub(block, text)


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


def render(path: Path) -> tuple[str, str]:
    """The page as it stands, and as it should."""
    text = path.read_text("utf-8")
    return text, (notebook if path.suffix == ".ipynb" else page)(text)


def same(a: str, b: str) -> bool:
    """Whether two pages agree: all words, and the scores to 5 %."""
    if SCORE.sub("#", a) != SCORE.sub("#", b):
        return False
    return all(abs(float(x) - float(y)) <= 0.02 + 0.05 * float(x) for x, y in zip(SCORE.findall(a), SCORE.findall(b)))


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        print(__doc__)
        return 0 if argv[0] in ("-h", "--help") else 2
    good = True
    for path in (HERE / name for name in PAGES):
        old, new = render(path)
        if argv:
            good = good and same(old, new)
            print(f"{'ok ' if same(old, new) else 'NOT'} {path.name}")
        else:
            path.write_text(new, "utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
