"""tinymia story, from two prompts to heads: the single commands judge its numbers, made-up grids its words."""
import html.parser
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import real_model
from pictures import colour

import tinymia
from tinymia_lab import ablate, attribute, story, sweep
from tinymia_lab.commands.story import carriers
from tinymia_lab.commands.story_page import story_page
from tinymia_lab.commands.story_result import honest, stretches, text, where

CLEAN, CORRUPT = "Egypt -> Cairo, France ->", "Egypt -> Cairo, Norway ->"


@pytest.fixture(scope="module")
def model(copycat_f32):
    return copycat_f32


@pytest.fixture(scope="module")
def found(model):
    return story(model, CLEAN, CORRUPT, others=["Egypt -> Cairo, Italy ->"])


def test_its_numbers_are_those_of_the_commands(model, found):
    one = sweep(model, CLEAN, CORRUPT)
    np.testing.assert_array_equal(found.sweep.logit_difference, one.logit_difference)
    heads = sweep(model, CLEAN, CORRUPT, tensor="kqv", at="last")
    np.testing.assert_array_equal(found.moved.logit_difference, heads.logit_difference)
    np.testing.assert_array_equal(found.attribution.heads, attribute(model, CLEAN, "Paris", "Oslo").heads)
    np.testing.assert_array_equal(found.ablation.values, ablate(model, CLEAN, "Paris", "Oslo").values)
    run = model.run(CLEAN, keep=["kq_soft_max"])
    for (il, head), pattern in zip(found.heads, found.patterns):
        np.testing.assert_allclose(pattern, run[f"kq_soft_max-{il}"][head, -1], rtol=1e-6)


def test_the_head_is_silenced_on_every_prompt(model, found):
    il, head = found.heads[0]
    assert [prompt for prompt, *_ in found.without] == [CLEAN, CORRUPT, "Egypt -> Cairo, Italy ->"]
    one = ablate(model, CLEAN, "Paris", "Oslo", layers=[il], heads=[head])
    assert found.without[0][4] == pytest.approx(one.values[2, il, head], rel=1e-5)
    assert found.without[0][3] == one.best_pieces[il][head]


def test_heads_are_told_of_by_what_their_output_alone_brings():
    moved = np.array([[0.1, -0.5], [0.2, 0.2]])
    assert carriers(moved, np.array([[9.0, 0.0], [1.0, 2.0]]), 3) == [(0, 1), (1, 1), (1, 0)]


def with_grid(found, rows):
    return replace(found, sweep=replace(found.sweep, logit_difference=np.array(rows, float)))


def test_where_the_difference_sits_is_read_off_the_sweep(found):
    n = len(found.pieces)
    grid = np.zeros((4, n))
    grid[:2, 5], grid[2, 3], grid[3, 6] = 1, 0.2, 0.9
    made = with_grid(found, grid)
    assert stretches(made) == [(0, 1, 5), (2, 2, None), (3, 3, 6)]
    lines = where(made)
    assert "After layers 0 to 1 it sits at token 5, ' France'" in lines[0] and "brings 1.00 of" in lines[0]
    assert "no single token brings half" in lines[1] and "0.20" in lines[1] and "0.90" in lines[2]
    grid[2] = 0
    grid[2, 6] = 0.8
    moved = where(with_grid(found, grid))[-1]
    assert moved.startswith("So in layer 2 it moves from token 5") and "goes from 0.00 to 0.80" in moved
    grid[:] = 0
    grid[:, 6] = 1
    assert where(with_grid(found, grid))[-1].endswith("never has to move.")


@pytest.mark.parametrize("after,said", [
    ([" a", " b"], "not needed for the best token in any of the 2 prompts"),
    ([" a", " x"], "needed for the best token in 1 of 2 prompts and not in 1"),
    ([" x", " x"], "needed for the best token in all 2 prompts"),
])
def test_the_words_about_the_ablation_say_what_it_found(found, after, said):
    made = replace(found, without=[["p", " a", 0.9, after[0], 0.5], ["q", " b", 0.8, after[1], 0.1]])
    assert said in honest(made)[-1]


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        if tag == "a":
            self.links.append(attrs["href"])


def test_every_bright_cell_leads_to_what_explains_it(found):
    made = Page(story_page(found))
    assert made.links and {link.removeprefix("#") for link in made.links} <= made.ids
    bright = int((np.abs(found.sweep.logit_difference) >= 0.5).sum())
    assert sum(link.startswith(("#token-", "#layer-")) for link in made.links) == bright
    for il, head in found.heads:
        assert made.links.count(f"#head-{il}-{head}") >= 3       # in the three maps


def test_the_command_prints_writes_and_gives_json(drawn, tmp_path, capsys):
    files = [tmp_path / "s.html", tmp_path / "s.png"]
    written = [word for file in files for word in ("-o", str(file))]
    assert tinymia.main(["story", "--clean", CLEAN, "--corrupt", CORRUPT, *written]) == 0
    out = capsys.readouterr().out
    assert "1. The answers." in out and "4. Is it the whole story?" in out
    assert "http" not in re.sub(r"http-equiv", "", files[0].read_text())
    assert tinymia.main(["story", "--clean", CLEAN, "--corrupt", CORRUPT, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sweep"]["answer_piece"] == " Paris" and len(said["heads"]) == 3
    stream, *heads = drawn(files[1]).maps
    assert [one.title.split(":")[0] for one in heads] == ["attribution", "patch", "ablation"]
    assert stream.columns[5] == "5 ▁France/▁No…" and stream.rows == list("543210")
    moved = np.array(said["sweep"]["logit_difference"])
    for il, position in ((0, 5), (5, 6), (2, 1), (3, 5)):
        assert stream.text(str(il), position) == f"{moved[il, position]:.2f}"
        assert stream.colour(str(il), position) == colour(moved[il, position], -1, 1, diverging=True)
    ((il, head), *_) = said["heads"]
    effects = np.array([[float(heads[1].text(str(il), str(head))) for head in range(4)] for il in range(6)])
    assert effects[il, head] == effects.max() and heads[1].rows == list("543210") and heads[1].columns == list("0123")
    assert heads[1].colour(str(il), str(head)) == colour(1, -1, 1, diverging=True)


@pytest.mark.parametrize("words,said", [
    (["--clean", CLEAN], "it needs --corrupt TEXT"),
    (["--clean", CLEAN, "--corrupt", CLEAN], "after both prompts the best"),
    (["--clean", CLEAN, "--corrupt", "France ->"], "the prompts do not align"),
    (["--clean", CLEAN, "--corrupt", CORRUPT, "--heads", "0"], "--heads 0: it must be a whole number, 1 or more"),
    (["--clean", CLEAN, "--corrupt", CORRUPT, "--answer", "#9999"], "token"),
])
def test_a_wrong_call_gets_one_line(words, said, capsys):
    assert tinymia.main(["story", *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and said in errors[0]


def test_the_capital_story_of_a_real_model():
    """Facts of SmolLM2, found by hand and with torch: shared by nobody who trained it to show them."""
    model = tinymia.load(real_model(), numerics="f32")
    found = story(model, "The capital of France is", "The capital of Italy is",
                  others=[f"The capital of {c} is" for c in ("Spain", "Japan", "Germany")])
    assert stretches(found) == [(0, 22, 3), (23, 29, 4)] and found.heads[0] == [23, 4]
    assert np.unravel_index(np.abs(found.attribution.heads).argmax(), found.attribution.heads.shape) == (23, 4)
    assert found.attribution.heads[23, 4] == pytest.approx(3.01, abs=0.01)
    assert found.patterns[0].argmax() == 3 and found.patterns[0, 3] == pytest.approx(0.90, abs=0.01)
    after = {prompt: (then, round(p, 2)) for prompt, _, _, then, p in found.without}
    assert after["The capital of France is"] == (" Paris", 0.14) and after["The capital of Italy is"][0] == " the"
    kept = [after[f"The capital of {c} is"][0] for c in ("Spain", "Japan", "Germany")]
    assert kept == [" Madrid", " Tokyo", " Berlin"]
    assert "1 of 5 prompts and not in 4" in text(found)
