"""Every command and every cell of the README, the manual and the walks runs, and prints what the page says."""
import make_pages
import pytest


@pytest.mark.parametrize("name", make_pages.PAGES)
def test_a_page_is_what_its_commands_print(name):
    if reason := make_pages.lacking(name):
        pytest.skip(reason)
    old, new = make_pages.render(name)
    assert make_pages.SCORE.sub("#", old) == make_pages.SCORE.sub("#", new)
    assert make_pages.same(old, new)


def test_a_wrong_output_is_noticed():
    assert make_pages.same('a 1.23|b 92|\noutput: " 6 5 4"', 'a 1.24|b 93|\noutput: " 6 5 4"')
    assert not make_pages.same('output: " 6 5 4"', 'output: " 6 5 5"')
    assert not make_pages.same("a 1.23|", "a 1.43|")


def test_a_page_leaves_lines_out_where_it_did_before():
    assert make_pages.shown(["a", "b", "c", "d", "e"], ["A", "...", "D", "E"]) == ["a", "...", "d", "e"]
    assert make_pages.shown(["a", "b"], ["A"]) == ["a", "b"]
