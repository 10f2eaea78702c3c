"""tinymia report: one page that holds what the commands find, and works by mouse, by finger and by keyboard."""
import json
import re

import numpy as np
import pytest
from browser import Browser
from conftest import command, prompt

import tinymia
from tinymia_lab.commands.attribute import attribute
from tinymia_lab.commands.lens import lens
from tinymia_lab.commands.report import command as report_command
from tinymia_lab.commands.report import report
from tinymia_lab.commands.report_page import bars, report_page, words

PROMPT = "Egypt -> Cairo, Norway -> Oslo, Estonia ->"
CHANGES = [tinymia.Ablate("kqv_merged-1", heads=[1]), tinymia.Scale("kqv_out-4", 0.0, at=-1)]


@pytest.fixture(scope="module")
def found(copycat):
    return report(copycat, PROMPT, against="Italy", n=6, actions=CHANGES)


@pytest.fixture(scope="module")
def path(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_page(found), "utf-8")
    return path


def test_it_holds_what_the_commands_find(copycat, found):
    for steps, output, one, split in zip(([], CHANGES), found.outputs, found.lenses, found.attributions):
        assert output == copycat.generate(PROMPT, 6, steps).text
        assert np.array_equal(one.best, lens(copycat, PROMPT, target="Tallinn", actions=steps).best)
        assert split.parts() == attribute(copycat, PROMPT, "Tallinn", "Italy", actions=steps).parts()
    assert found.outputs[0].startswith(" Tallinn") and found.outputs[0] != found.outputs[1]
    logits = [copycat.run(PROMPT, actions=steps).logits[-1].astype(np.float64) for steps in ([], CHANGES)]
    for piece, *shares in found.comes:
        i = copycat.tokenizer.one(piece)
        want = [np.exp(row[i] - row.max()) / np.exp(row - row.max()).sum() for row in logits]
        assert shares == pytest.approx(want, rel=1e-4)
    run = copycat.run(PROMPT, keep=["kq_soft_max"], actions=CHANGES)
    assert np.array_equal(found.attention.patterns[4], run["kq_soft_max-4"])


def test_without_interventions_there_is_one_of_each(copycat):
    plain = report(copycat, PROMPT, n=0)
    assert plain.outputs == [""] and len(plain.lenses) == len(plain.attributions) == 1
    page = report_page(plain)
    assert "with interventions" not in page and "the model ran unchanged" in page and page.count("<h2") == 7


def test_actions_while_decoding_change_the_text_alone(copycat, found):
    ban = tinymia.Scale("l_out-5", 0.0, when="decode")
    late = report(copycat, PROMPT, n=6, actions=[ban])
    assert late.outputs[1] != late.outputs[0] and late.lenses[0].to_json() == late.lenses[1].to_json()
    assert [row[1] for row in late.comes] == [row[2] for row in late.comes]


def test_texts_in_the_page_are_escaped(copycat):
    text = "</script><script>alert(1)</script><b>&"
    page = report_page(report(copycat, text, n=2))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_interventions_are_described_in_words():
    action = {"action": "Ablate", "name": "kqv_merged-3", "at": [1, -1], "heads": None, "when": "all", "mode": "mean",
              "value": 0.0, "source": None}
    assert words(action) == "Ablate kqv_merged-3, at 1, -1, when all, mode mean"
    assert words({"action": "Scale", "name": "norm", "at": None, "when": "prompt", "factor": 0.5}) == (
        "Scale norm, factor 0.5")


def test_bars_are_as_long_as_their_numbers(found):
    most = max(abs(value) for _, value in found.attributions[0].parts())
    html = bars(found.attributions[0], most)
    shown = re.findall(r"<td>([+-][\d.]+)<td class=bar><i style=\"margin-left:([\d.]+)%;width:([\d.]+)%", html)
    assert len(shown) == 16
    for value, left, width in (map(float, row) for row in shown):
        assert width == pytest.approx(50 * abs(value) / most, abs=0.06)
        assert left == pytest.approx(50 if value > 0 else 50 - width, abs=0.11)


def test_a_page_of_a_large_model_stays_small(load):
    """32 layers of 32 heads, 50 tokens, with interventions."""
    model = load(n_layer=32, n_head=32, n_head_kv=8, n_embd=256, d_head=8, d_head_v=8, n_ff=32)
    large = report(model, prompt(50), n=4, actions=[tinymia.Scale("ffn_out-3", 0.5)])
    assert large.attention.patterns.shape == (32, 32, 50, 50)
    assert len(report_page(large).encode()) < 4e6


@pytest.mark.parametrize("how,words", [
    ({"n": -1}, "must be 0 or more"), ({"layers": "7"}, "layer 7"), ({"against": "Tallinn"}, "are the same: "),
])
def test_what_is_wrong_is_said(copycat, how, words):
    with pytest.raises(tinymia.Error, match=words):
        report(copycat, PROMPT, **how)


def test_too_long_for_a_page(copycat, monkeypatch):
    monkeypatch.setattr("tinymia_lab.commands.report.MOST", 800)
    with pytest.raises(tinymia.Error, match="choose layers, 3 or so"):
        report(copycat, PROMPT, n=1)
    assert report(copycat, PROMPT, n=1, layers="0,3-4").attention.layers == [0, 3, 4]


# ---------------------------------------------------------------------------------------- the page


def shown(browser):
    return browser.js("(t=>t.hidden?'':t.textContent)(document.getElementById('tip'))")


def test_the_page_can_be_clicked_through(path, found):
    with Browser(1100, 900) as browser:
        browser.open(path)
        tokens = browser.js("[...document.querySelectorAll('.token')].map(t=>[...t.childNodes].map(c=>c.textContent))")
        ids = found.about["prompts"]["prompt"]["tokens"]
        assert tokens[9] == ["9", "▁Estonia", str(ids[9])] and len(tokens) == len(ids)
        said = browser.js("[...document.querySelectorAll('.said b')].map(b=>b.textContent)")
        assert said == found.outputs
        assert browser.js("[...document.querySelectorAll('#interventions~ol li')].map(e=>e.textContent)") == [
            "Ablate kqv_merged-1, heads 1, mode zero", "Scale kqv_out-4, at -1, factor 0.0"]
        # A link of the table of contents leads to its section.
        for key in ("lens", "attention", "attribution"):
            browser.js("scrollTo(0,0)")
            browser.click(*browser.middle(f"nav a[href='#{key}']"))
            assert browser.js(f"document.getElementById('{key}').getBoundingClientRect().top") < 900
            assert browser.js("location.hash") == f"#{key}"
        # Lens: pointed at with the mouse.
        for which, one in enumerate(found.lenses):
            figure = f"(document.querySelectorAll('section:has(#lens) table')[{which}])"
            cell = browser.js(f"(c=>{{c.scrollIntoView({{block:'center'}});const b=c.getBoundingClientRect();"
                              f"return[b.x+9,b.y+9]}})({figure}.querySelector('tbody tr td:last-child'))")
            browser.move(1, 1)  # a scrolling hides what was told of the cell that came under the mouse
            browser.move(*cell)
            tip = shown(browser)
            best = one.best_pieces[5][10][0].replace(" ", "▁")
            assert tip.startswith("l_out-5, position 10") and tip.splitlines()[1].split()[0] == best
            assert f"▁Tallinn: rank {one.target_rank[5, 10]}" in tip
        # Attention: another layer, another head.
        browser.click(*browser.middle(".attention .down"))
        browser.click(*browser.middle(".attention .panel:nth-child(2)"))
        assert browser.js("document.querySelector('.attention h3').textContent").startswith("head 4.1, previous token")
        # Attribution: a head's part.
        cell = browser.middle("section:has(#attribution) .heatmap tbody tr:nth-child(4) td:nth-child(3)")
        browser.move(1, 1)
        browser.move(*cell)
        value = found.attributions[0].heads[2, 1]
        assert shown(browser) == f"layer 2, head 1\nlogits {value:.4g}"
        browser.click(*browser.middle("summary"))
        told = json.loads(browser.js("document.querySelector('details[open] pre').textContent"))
        assert told["model"]["sha256"] == found.about["model"]["sha256"] and told["settings"]["n"] == 6
        assert not browser.errors


def test_by_keyboard_on_a_dark_phone(path, found, tmp_path):
    with Browser(390, 800, dark=True) as browser:
        browser.open(path)
        assert browser.js("document.documentElement.scrollWidth") <= 390
        assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
        # Everything that can be reached by Tab, in order: links, tables, attention's controls, details.
        reached = browser.js("[...document.querySelectorAll('a,select,button:not(:disabled),[tabindex],summary')]"
                             ".filter(e=>e.tabIndex>=0).map(e=>e.tagName)")
        assert reached[:7] == ["A"] * 7 and reached[7:10] == ["TABLE", "TABLE", "SELECT"] and reached[-1] == "SUMMARY"
        assert reached.count("TABLE") == 2 + 4 and "CANVAS" in reached
        browser.js("document.querySelector('section:has(#lens) table').focus()")
        for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
            browser.key(key)
        assert shown(browser).startswith("l_out-4, position 1 ▁Egypt")
        browser.key("Escape")
        assert shown(browser) == ""
        browser.js("document.querySelector('section:has(#attribution) table[tabindex]').focus()")
        browser.key("ArrowRight")
        assert shown(browser).startswith("layer 5, head 0")
        browser.js("document.querySelector('.attention .large').focus()")
        for _ in range(2):
            browser.key("ArrowUp")
        assert "query 8 ," in browser.js("document.querySelector('.attention output').textContent")
        browser.picture(tmp_path / "phone.png")
        assert not browser.errors


# ---------------------------------------------------------------------------------------- the command


def test_command_writes_a_page_and_prints_the_texts(tmp_path, capsys):
    args = ["-p", PROMPT, "-t", "1", "-n", "6", "--scale", "kqv_out-4", "0", "--at", "-1", "--ablate", "1.1"]
    assert report_command([*args, "-o", str(tmp_path / "r.html")]) == 0
    out = capsys.readouterr().out
    assert out.startswith('output: " Tallinn') and "with interventions: " in out
    assert "Scale kqv_out-4, at -1, factor 0.0" in (tmp_path / "r.html").read_text("utf-8")


def test_the_command_gives_one_json_object(capsys, found):
    assert report_command(["-p", "France ->", "-t", "1", "-n", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["outputs"] == [" Italy"] and data["attributions"][0]["answer_piece"] == " Italy"
    assert np.array(data["attention"]["patterns"]).shape == (6, 4, 3, 3) and data["lenses"][0]["names"][5] == "l_out-5"


@pytest.mark.parametrize("args,words", [
    ([], "-p or -f"), (["-p", "x", "-o", "x.npz"], "the kinds of file are .html"),
    (["-p", "x", "-n", "-1"], "-n -1: it must be a whole number, 0 or more"),
    (["-p", "x", "--scale", "lout-1", "0"], "closest"),
])
def test_wrong_flags_of_the_command_are_one_line(args, words):
    status, out, err = command("report", "-t", 1, *args)
    assert status == 2 and out == "" and err.splitlines()[-1].startswith("error: ") and words in err, err
