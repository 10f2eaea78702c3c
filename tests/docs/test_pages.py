"""The pages of docs that show code: it is run, and prints what they say."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from tinymia_kernels.__main__ import table

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.M | re.S)


@pytest.mark.parametrize("page", ["one-numbers-journey.md"])
def test_the_code_of_a_page_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    blocks = BLOCK.findall((DOCS / page).read_text())
    assert len(blocks) > 5 and all(said for _, said in blocks)
    for code, said in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, page, "exec"), names)
        assert out.getvalue() == said


def test_the_page_of_formats_has_the_table_of_the_register():
    assert table() in (DOCS / "formats.md").read_text()
