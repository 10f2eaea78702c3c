"""Every command and every cell of the pages in examples/ runs, and prints what the page says."""
from pathlib import Path

import make_pages
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", make_pages.PAGES)
def test_page(name):
    old, new = make_pages.render(EXAMPLES / name)
    assert make_pages.SCORE.sub("#", old) == make_pages.SCORE.sub("#", new)
    assert make_pages.same(old, new)


def test_a_wrong_output_is_noticed():
    assert make_pages.same('a 1.23|b 92|\noutput: " 6 5 4"', 'a 1.24|b 93|\noutput: " 6 5 4"')
    assert not make_pages.same('output: " 6 5 4"', 'output: " 6 5 5"')
    assert not make_pages.same("a 1.23|", "a 1.43|")
