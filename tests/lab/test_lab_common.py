"""The parts that all commands of the lab share: results and their files, flags, progress, heatmaps, pages, answers."""
import argparse
import hashlib
import html.parser
import json
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
from pictures import NOT_THERE, colour
from test_split import cut

import tinymia
from tinymia_lab.commands import (
    ablate,
    attend,
    attribute,
    function_vector,
    lens,
    report,
    steer,
    sweep,
    task_vector,
    trace,
)
from tinymia_lab.flags.arguments import check_file, chosen, emit, out_file, parser
from tinymia_lab.measure import head_ablation
from tinymia_lab.measure.answers import answer_token, kl, logit_difference, probability, rank
from tinymia_lab.pictures.colours import ink, rgb
from tinymia_lab.pictures.heatmap import Heatmap, paint
from tinymia_lab.pictures.heatmap_png import draw_png
from tinymia_lab.pictures.page import page
from tinymia_lab.pictures.terminal import fit, table, visible, wide
from tinymia_lab.runs.progress import Progress, clock, keeping
from tinymia_lab.runs.result import Result, about, model_hash, resume


@dataclass
class Found(Result):
    scores: np.ndarray
    ids: np.ndarray
    names: list
    best: float


@pytest.fixture
def found(copycat):
    scores = np.array([[0.1, np.nan], [-2.5, 3e30]], np.float32)
    return Found(about(copycat, "look", {"layer": 3, "heads": (1, 2)}, prompt="France ->"), scores,
                 np.array([1, 1023], np.int64), ["a", " b"], float("nan"))


# ---------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_saved_and_read_again(found, tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    found.save(path)
    again = Found.load(path)
    for name in ("scores", "ids"):
        a, b = getattr(found, name), getattr(again, name)
        assert a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    assert again.names == found.names and again.best is None
    assert again.about == found.about and again.about["settings"] == {"layer": 3, "heads": [1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_about_repeats_the_run(found, copycat):
    a = found.about
    assert a["command"] == "look"
    pieces = ["<s>", " France", " ->"]
    assert a["prompts"] == {"prompt": {"text": "France ->", "tokens": [1, 1023, 262], "pieces": pieces}}
    assert a["model"]["sha256"] == hashlib.sha256(copycat.path.read_bytes()).hexdigest()
    assert a["model"]["numerics"] == "ggml" and a["versions"]["tinymia"] == tinymia.__version__
    two = about(copycat, "x", {}, both=["France ->", [1, 1023]])["prompts"]["both"]
    assert [p["tokens"] for p in two] == [[1, 1023, 262], [1, 1023]]


def test_hash_of_a_split_model_knows_every_part(tiny, tmp_path):
    parts = cut(tiny(), tmp_path, [range(10), range(10, 21)])
    first, second = (model_hash(tinymia.load(part, threads=1)) for part in parts)
    hashes = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]
    assert first == second == hashlib.sha256("".join(hashes).encode()).hexdigest()


def test_json_has_null_for_what_is_no_number(found):
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["scores"][0][1] is None and data["best"] is None and data["ids"] == [1, 1023]


def test_a_run_resumes_only_from_its_own_file(found, copycat, tmp_path):
    path = tmp_path / "x.npz"
    assert resume(path, found.about, Found) is None and resume(None, found.about, Found) is None
    found.save(path)
    assert np.isnan(resume(path, found.about, Found).scores[0, 1])
    elsewhere = json.loads(json.dumps(found.about))
    elsewhere["model"]["path"], elsewhere["versions"] = "/there", {}
    assert resume(path, elsewhere, Found) is not None
    for settings, prompt, word in (({"layer": 4, "heads": [1, 2]}, "France ->", "settings layer is 3, not 4"),
                                   ({"layer": 3, "heads": (1, 2)}, "Italy ->", "its prompt text is")):
        with pytest.raises(tinymia.Error, match=word):
            resume(path, about(copycat, "look", settings, prompt=prompt), Found)


def test_files_that_hold_no_result(found, tmp_path):
    @dataclass
    class Other(Result):
        scores: np.ndarray

    found.save(tmp_path / "x.npz")
    with pytest.raises(tinymia.Error, match="Found"):
        Other.load(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", a=np.zeros(2))
    (tmp_path / "y.json").write_text("[1]")
    (tmp_path / "z.npz").write_bytes(b"junk")
    for name in ("y.npz", "y.json", "z.npz", "absent.npz"):
        with pytest.raises(tinymia.Error, match=name):
            Found.load(tmp_path / name)
    (tmp_path / "w.json").write_text('{"kind": "Found", "arrays": {"scores": "<f4"}}')
    with pytest.raises(tinymia.Error, match="not a saved result: it has no 'scores'"):
        Found.load(tmp_path / "w.json")
    with pytest.raises(tinymia.Error, match=r"\.npz or a \.json"):
        found.save(tmp_path / "x.txt")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(tinymia.Error, match=r"not a saved result, which is an \.npz or a \.json file"):
        Found.load(tmp_path / "model.gguf")


# ---------------------------------------------------------------------------------------------- progress


def test_progress_is_silent_without_a_terminal(capsys):
    with Progress(3, "sweep") as bar:
        bar.step(2)
    assert bar.done == 2 and capsys.readouterr().err == ""


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(4, "sweep") as bar:
        bar.step(4)
        assert "sweep" in bar.line(2.0) and "4/4" in bar.line(2.0)
    assert capsys.readouterr().err.endswith("\r\x1b[K")
    half = Progress(8, "sweep", done=4)
    half.step(2)
    assert half.line(10.0).endswith("6/8, 10 s left")  # by the speed of this run alone


def test_a_duration_is_written_as_people_read_it():
    assert [clock(s) for s in (4.6, 65, 3725)] == ["5 s", "1:05", "1:02:05"]


def test_what_is_stopped_is_kept(found, tmp_path, capsys):
    path = tmp_path / "x.npz"
    with pytest.raises(KeyboardInterrupt), keeping(found, path, 4, "look") as bar:
        found.scores[0, 1] = 7
        bar.step()
        raise KeyboardInterrupt
    assert Found.load(path).scores[0, 1] == 7
    assert "look: stopped at 1 of 4" in (err := capsys.readouterr().err) and f"kept in {path}" in err
    with pytest.raises(ZeroDivisionError, match="division"), keeping(found, path, 4, "look", 1) as bar:
        found.scores[0, 1] = 1 / 4
        bar.step()
        found.scores[0, 0] = 1 / 0
    assert Found.load(path).scores[0, 1] == 0.25
    with pytest.raises(ZeroDivisionError, match="division"), keeping(found, tmp_path / "y.npz", 4, "look"):
        found.scores[0, 0] = 1 / 0
    assert not (tmp_path / "y.npz").exists()  # nothing was done


STOPPED = """
import sys, time, numpy as np
sys.argv = ["tinymia", "look"]
import tinymia, tinymia_lab.cli as cli
from tests_stopped import command
cli.SUBCOMMANDS += ("look",)
sys.modules["tinymia_lab.commands.look"] = sys.modules["tests_stopped"]
raise SystemExit(tinymia.main())
"""
COMMAND = """
import time, numpy as np
from dataclasses import dataclass
from tinymia_lab.runs.progress import keeping
from tinymia_lab.runs.result import Result

@dataclass
class Slow(Result):
    scores: np.ndarray

def command(argv):
    found = Slow({}, np.full(100, np.nan))
    with keeping(found, "slow.npz", 100, "look") as bar:
        for i in range(100):
            found.scores[i] = i
            bar.step()
            print(i, flush=True)
            time.sleep(0.2)
    return 0
"""


def test_control_c_leaves_a_file_and_status_130(tmp_path):
    (tmp_path / "tests_stopped.py").write_text(COMMAND)
    p = subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         cwd=tmp_path)
    while (line := p.stdout.readline()) and line.strip() != "2":
        pass
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=30)[1]
    assert p.returncode == 130 and "kept in slow.npz" in err and "Traceback" not in err, err
    with np.load(tmp_path / "slow.npz") as f:
        assert f["scores"][:3].tolist() == [0, 1, 2] and np.isnan(f["scores"][-1])


def test_saved_now_and_then(found, tmp_path, monkeypatch):
    monkeypatch.setattr("tinymia_lab.runs.progress.EVERY", 0.01)
    with keeping(found, tmp_path / "x.npz", 2, "look") as bar:
        bar.step()
        time.sleep(0.02)
        assert not (tmp_path / "x.npz").exists()
        bar.step()
        assert (tmp_path / "x.npz").exists()


# ---------------------------------------------------------------------------------------------- heatmaps


def grid(**how):
    values = np.array([[0.0, 0.5, np.nan], [-1.0, 1.0, 0.25]])
    return Heatmap(values, ["0", "1"], ["<s>", " a", "<b>&"], "Title <1>", "token", "layer", "logits", **how)


def test_heatmap_in_a_terminal(monkeypatch):
    monkeypatch.setenv("COLORTERM", "truecolor")
    lines = grid().terminal(80, False).splitlines()
    assert lines[0] == "Title <1>" and lines[2].split() == ["layer", "<s>", "▁a", "<b>&"]
    assert [line.split() for line in lines[3:]] == [["0", "0.00", "0.50", "·"], ["1", "-1.00", "1.00", "0.25"]]
    assert [line[:1] for line in grid(upward=True).terminal(80, False).splitlines()[3:]] == ["1", "0"]
    narrow = grid().terminal(16, False)
    assert max(map(wide, narrow.splitlines()[2:])) <= 16 and narrow.count("layer") == 2
    assert "\x1b" not in narrow and grid().terminal(80, True).count("\x1b[48;2;") == 5  # not the cell that is not there
    monkeypatch.delenv("COLORTERM")
    assert "\x1b[48;5;16;97m" in paint("x", np.array([0, 0, 0])) and "48;5;231;30m" in paint("x", np.array([255] * 3))
    assert "48;5;209;30m" in paint("x", np.array([255, 135, 95]))


def test_heatmap_shows_texts_that_harm_no_terminal():
    text = grid(texts=[["\x1b[2J", "\n", "x"], ["a" * 40, "日本", "·"]]).terminal(80, False)
    assert "\x1b" not in text and "↵" in text and "a" * 11 + "…" in text


def test_colours_span_the_numbers_of_a_heatmap():
    assert grid().span == (-1, 1) and grid(limits=(0, 2)).span == (0, 2)
    assert Heatmap(np.array([[1.0, 3.0]]), ["r"], ["a", "b"], "", "", "", "", diverging=True).span == (-3, 3)
    empty = Heatmap(np.full((1, 1), np.nan), ["r"], ["a"], "", "", "", "")
    assert empty.span == (0, 1) and "·" in empty.terminal(80, True) and "class=none" in empty.html()
    blue, white, orange = rgb(np.array([-1.0, 0.0, 1.0]), -1, 1, True).astype(int)
    assert blue[2] > 80 > blue[0] and white.min() > 240 and orange[0] > 100 > orange[2]
    lightness = rgb(np.linspace(0, 1, 20), 0, 1, False) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()  # it can be read in grey
    assert ink(np.array([[255, 255, 255], [0, 0, 0]], np.uint8)).tolist() == [True, False]


def test_heatmap_refuses_what_does_not_fit():
    with pytest.raises(tinymia.Error, match="Title"):
        grid(texts=[["a", "b"], ["c", "d"]])


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_a_heatmap_is_a_table_in_html():
    tags = Tags(grid(hovers=[['"q"\nline 2', "", ""], ["", "", "</td><script>"]]).html())
    cells = [attrs for tag, attrs in tags.seen if tag == "td"]
    assert len(cells) == 6 and cells[0]["data-tip"] == '"q"\nline 2' and cells[5]["data-tip"] == "</td><script>"
    assert cells[2]["class"] == "none" and cells[4]["style"].startswith("background:#")
    assert "script" not in [tag for tag, _ in tags.seen] and "<b>&" in tags.text
    assert Tags(grid().html()).seen[0][0] == "figure"
    assert "layer 1, token ▁a\nlogits 1" in [a.get("data-tip") for _, a in Tags(grid().html()).seen]


def test_page_needs_nothing_else():
    text = page("A <title>", [grid().html(), "<p>more</p>"])
    tags = Tags(text)
    assert text.startswith("<!DOCTYPE html>") and "A <title>" in tags.text
    assert not {"src", "href"} & {key for _, attrs in tags.seen for key in attrs} and "http" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in tags.seen
    assert "prefers-color-scheme:dark" in text


def test_a_heatmap_is_drawn_with_its_texts(drawn, tmp_path):
    draw_png(tmp_path / "x.png", [grid(diverging=True, texts=[["$a", "\u4e2d", "x"]] * 2)])
    draw_png(tmp_path / "two.png", [grid(), Heatmap(np.zeros((3, 900)), list("abc"), ["t"] * 900, "", "", "", "")])
    (one,), (first, wide_one) = (drawn(tmp_path / name).maps for name in ("x.png", "two.png"))
    assert one.title == first.title == "Title <1>\ncolour: logits" and one.axes.get_xlabel() == "token"
    assert one.rows == ["0", "1"] and one.columns == ["<s>", "▁a", "<b>&"]
    assert [one.text("1", i) for i in range(3)] == ["$a", "U+4E2D", "x"] and first.text("0", "▁a") == "0.50"
    for row, column, value in (("1", "<s>", -1), ("0", "▁a", 0.5), ("1", "▁a", 1), ("0", "<s>", 0)):
        assert one.colour(row, column) == colour(value, -1, 1, diverging=True)
        assert first.colour(row, column) == colour(value, -1, 1)
    assert one.colour("0", "<b>&") == NOT_THERE
    assert not wide_one.texts and wide_one.rows == list("abc") and len(wide_one.columns) < 900   # labels find room


# ---------------------------------------------------------------------------------------------- text


def test_text_for_a_terminal():
    assert visible("  a b\n\x07") == "▁▁a b↵\ufffd" and wide("日本a\u0301") == 5
    assert fit("abcdef", 4) == "abc…" and fit("日本", 3) == "日…" and fit("a", 3) == "a  "
    assert table([["a", 1], ["日本", 22]]) == "a     1\n日本  22"


# ---------------------------------------------------------------------------------------------- answers


def test_answer_is_the_token_that_would_follow(copycat, capsys):
    one = copycat.tokenizer.one
    assert answer_token(copycat, "Paris", "France ->") == answer_token(copycat, " Paris", "France ->") == one(" Paris")
    assert answer_token(copycat, "Paris", copycat.tokenize("France ->")) == one(" Paris")
    assert answer_token(copycat, "#7", "France ->") == 7
    assert capsys.readouterr().err == ""


def test_answer_of_several_tokens_is_told_once(copycat, capsys):
    for _ in range(2):
        first = answer_token(copycat, "Paris Rome", "France ->")
    assert first == copycat.tokenizer.one(" Paris")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "' Paris' (#" in err and "' Paris Rome'" in err
    for text in ("", "  "):
        with pytest.raises(tinymia.Error, match="no text"):
            answer_token(copycat, text, "France ->")


def test_answer_on_other_vocabularies(stories):
    model = tinymia.load(stories, threads=1)
    prompt = "Once upon a"
    assert model.piece(answer_token(model, "time", prompt)) == model.piece(
        model.tokenize(prompt + " time")[len(model.tokenize(prompt))])


def test_an_answer_that_is_one_token_only_without_a_blank_is_taken_so(copycat, capsys):
    comma = copycat.tokenizer.one(",")
    for prompt in ("Egypt -> Cairo", copycat.tokenize("Egypt -> Cairo")):
        assert answer_token(copycat, ",", prompt) == comma
    assert f"without a space before it, as ',' (#{comma})" in capsys.readouterr().err
    found = lens.lens(copycat, "Egypt -> Cairo", "l_out-5", target=",")
    assert found.target_piece == "," and found.target_probability[0, -1] > 0.9


@pytest.mark.parametrize("text,words", [("reverse", r"did you mean ' reverse' \(with a space\)"),
                                        (" ,", r"did you mean ',' \(without a space\)"),
                                        ("qqq", "not one token but 3")])
def test_a_token_that_is_not_there_names_the_one_with_or_without_a_blank(copycat, text, words):
    with pytest.raises(tinymia.Error, match=words):
        copycat.tokenizer.one(text)


def test_the_metrics_are_those_of_the_formulas():
    row, other = np.array([1.0, 3.0, 2.0, 3.0], np.float32), np.array([0.0, 1.0, 0.0, 0.0], np.float32)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (row.astype(float), other.astype(float)))
    assert logit_difference(row, 1, 0) == 2.0
    assert probability(row, 2) == pytest.approx(p[2])
    assert [rank(row, i) for i in range(4)] == [3, 0, 2, 1]
    assert kl(row, other) == pytest.approx((p * np.log(p / q)).sum()) and kl(row, row) == 0


# ---------------------------------------------------------------------------------------------- flags


def test_flags_of_every_command(tmp_path):
    args = parser("look", "Look.").parse_args(["-o", "a.png", "-o", str(tmp_path / "b.npz"), "-t", "2"])
    assert args.threads == 2 and args.numerics == "f32" and out_file(args) == tmp_path / "b.npz"
    with pytest.raises(tinymia.Error, match=r"the kinds of file are \.npz, \.json, \.png, \.html"):
        check_file("-o", "a.txt", args.kinds)
    with pytest.raises(tinymia.Error, match="no folder"):
        check_file("-o", str(tmp_path / "absent" / "a.npz"), args.kinds)
    with pytest.raises(tinymia.Error, match="tinymia look --help"):
        parser("look", "").parse_args(["--nonsense"])


def test_layers_and_heads_by_number():
    assert chosen(None, 3, "layer") == [0, 1, 2] and chosen("4,0-2", 5, "head") == chosen([4, 2, 1, 0], 5, "head")
    for text, words in (("5", "head 5 is out of range: there are 5 heads, 0 to 4"), ("a", "0,3-5"), ("-1", "0,3-5"),
                        ([-1], "head -1 is out of range"), ([], "no head"), ("3-1", "no head")):
        with pytest.raises(tinymia.Error, match=words):
            chosen(text, 5, "head")


def test_layers_and_heads_by_a_mask():
    assert chosen([True, False, True], 3, "layer") == chosen(np.array([2, 0]), 3, "layer") == [0, 2]
    for given, says in (([True, False], "a mask of 2 layers: there are 3"),
                        ([False] * 3, "a mask that is True nowhere chooses no layer")):
        with pytest.raises(tinymia.Error, match=says):
            chosen(given, 3, "layer")
    for given in ([1.0], 1.5, [[0]], [True, 1], ["0"], np.nan):
        with pytest.raises(tinymia.Error, match=r"^layers .*: they must be whole numbers, such as \[0, 3\], or a mask"):
            chosen(given, 3, "layer")


@pytest.mark.parametrize("bad", [1.5, True, [1.0], np.float64(1), np.array([0.5])], ids=str)
@pytest.mark.parametrize("function,name,called", [
    (lens.lens, "target", "the target is"), (lens.lens, "k", "k is"), (trace.trace, "layers", "layers"),
    (trace.trace, "position", "the position is"), (attend.attend, "layers", "layers"),
    (attend.attend, "heads", "heads"), (attribute.attribute, "position", "the position is"),
    (attribute.attribute, "neurons", "the layer of neurons is"), (attribute.attribute, "answer", "the token is"),
    (ablate.ablate, "at", "positions"), (ablate.ablate, "heads", "heads"), (ablate.ablate, "answer", "the token is"),
    (ablate.ablate, "against", "the token is"), (report.report, "n", "n is"), (report.report, "layers", "layers"),
], ids=lambda x: getattr(x, "__name__", x))
def test_places_and_tokens_are_whole_numbers_in_every_command(copycat, function, name, called, bad):
    with pytest.raises(tinymia.Error, match=rf"^{called} .*must be (a whole number|whole numbers)") as e:
        function(copycat, "France ->", **{name: bad})
    assert "\n" not in str(e.value)


def test_places_of_two_prompts_are_whole_numbers(copycat):
    whole = "they must be whole numbers"
    for how, says in (({"layers": 1.5}, f"^layers 1.5: {whole}"), ({"layers": [True, False]}, "^a mask of 2 layers"),
                      ({"answer": 1.5}, "^the token is 1.5; it must be a whole number"),
                      ({"against": True}, "^the token is True; it must be a whole number")):
        with pytest.raises(tinymia.Error, match=says):
            sweep.sweep(copycat, "France ->", "Norway ->", **how)
    for at, says in ((1.0, f"^positions .*: {whole}"), ([True], "^a mask of 1 positions: there are 3"),
                     ([[0]], f"^positions .*: {whole}")):
        with pytest.raises(tinymia.Error, match=says):
            head_ablation.positions(at, 3, "the prompt")
    for ids in ([1, 2.0], [[1, 5]], [True]):
        with pytest.raises(tinymia.Error, match=f"^token ids .*: {whole}"):
            steer.steer(copycat, positive=[ids], negative=["France ->"])


def test_a_mask_says_where_heads_are_ablated(copycat):
    one, two = (ablate.ablate(copycat, "Egypt -> Cairo, France ->", at=at, layers=[4]) for at in (
        [6, 5], [False] * 5 + [True, True]))
    assert np.array_equal(one.values, two.values, equal_nan=True) and two.about["settings"]["at"] == [5, 6]


def test_one_action_needs_no_list_in_any_command(copycat):
    action, text = tinymia.Scale("ffn_out-2", 0.0), "France ->"
    for call in (lambda a: lens.lens(copycat, text, actions=a).scores,
                 lambda a: trace.trace(copycat, text, actions=a).best,
                 lambda a: attend.attend(copycat, text, actions=a).patterns,
                 lambda a: attribute.attribute(copycat, text, actions=a).logit,
                 lambda a: report.report(copycat, text, n=2, actions=a).comes):
        one, listed, none = call(action), call([action]), call(())
        assert np.array_equal(np.array(one, object), np.array(listed, object))
        assert not np.array_equal(np.array(one, object), np.array(none, object))


# ---------------------------------------------------------------------------------------------- prompts in results


def prompts_of(value):
    """Every {"text", "tokens"} of the prompts of a result."""
    if isinstance(value, dict) and "tokens" in value:
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from prompts_of(part)


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_text_and_ids_of_a_stored_prompt_are_the_same_tokens(copycat, as_ids):
    clean, corrupt = "Egypt -> Cairo, France ->", "Egypt -> Cairo, Norway ->"
    a, b = map(copycat.tokenize, (clean, corrupt)) if as_ids else (clean, corrupt)
    task = "copycat-capital"
    results = [
        lens.lens(copycat, a), attend.attend(copycat, a), attribute.attribute(copycat, a), trace.trace(copycat, a),
        report.report(copycat, a, n=1), sweep.sweep(copycat, a, b, layers=[5]),
        ablate.ablate(copycat, a, mode="mean", prompts=[a, b], layers=[5]),
        ablate.ablate(copycat, a, mode="resample", other=b, layers=[5]), steer.steer(copycat, a, [a], [b], n=1),
        task_vector.task_vector(copycat, task, n_dev=1, n_test=1),
        function_vector.function_vector(copycat, task, n_mean=1, n_effect=1, n_test=1, shots=3),
    ]
    for found in results:
        stored = list(prompts_of(found.about["prompts"]))
        assert stored, found
        for one in stored:
            assert copycat.tokenize(one["text"]) == one["tokens"], (found.about["command"], one["text"])
    assert results[5].about["prompts"]["clean"]["text"] == clean


@pytest.mark.parametrize("text", ["France ->", " France", "  two", "a</s>b", "</s>", "", "one\ntwo", "→ 漢", "<s>",
                                  "x <s> y"])
def test_the_text_of_ids_gives_the_ids_again(copycat, llama_vocab_models, text):
    for model in (copycat, *llama_vocab_models):
        for bos in (None, False):
            for special in (True, False):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", tinymia.Note)
                    ids = model.tokenize(text, bos, special)
                    again = [model.tokenize(model.text(ids), b, s) for b in (bos, None) for s in (True, False)]
                assert ids in again, (text, bos, special, model.text(ids))
                assert not ids or special or model.text(ids) == text


@pytest.fixture(scope="module")
def llama_vocab_models(load):
    """Three vocabularies: without a blank before texts; with EOS after them; without BOS."""
    return [load(meta={f"tokenizer.ggml.{key}": value}) for key, value in (
        ("add_space_prefix", False), ("add_eos_token", True), ("add_bos_token", False))]


# ---------------------------------------------------------------------------------------------- notes


def test_notes_are_lines_on_stderr_each_once(copycat, tmp_path, capsys):
    path = str(tmp_path / "x.npz")
    assert tinymia.main(["-p", "Egypt -> Cairo, Norway ->", "-n", "0", "-t", "1", "--save", "l_out-3", path]) == 0
    capsys.readouterr()
    assert tinymia.main(["-p", "<s>France ->", "-n", "1", "-t", "1", "--patch", "l_out", path, "-1", "-1"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == ["the", path]
    assert notes[1].endswith("holds l_out-3; its rows go to l_out")
    assert tinymia.main(["lens", "-p", "<s>France ->", "-t", "1", "--patch", "l_out-2", path, "-1", "-1"]) == 0
    assert capsys.readouterr().err.count("note: ") == 2


def test_rows_are_chosen_before_the_mean_on_the_command_line(tmp_path, capsys):
    for i, text in enumerate(("Egypt -> Cairo, Norway ->", "Egypt -> Cairo, Norway -> Oslo, Estonia ->")):
        assert tinymia.main(["-p", text, "-n", "0", "-t", "1", "--save", "l_out-3", str(tmp_path / f"{i}")]) == 0
    patch = ["--patch-avg", "l_out-3", str(tmp_path / "0"), str(tmp_path / "1"), "-1", "-1"]
    capsys.readouterr()
    assert tinymia.main(["-p", "France ->", "-n", "1", "-t", "1", *patch]) == 0
    assert 'output: " Paris"' in capsys.readouterr().out
    assert tinymia.main(["trace", "-p", "France ->", "--layer", "3", "-t", "1", *patch]) == 0
    assert "changed by Patch('l_out-3', row -1 of (" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["all", "decode"])
def test_a_mean_while_decoding_is_refused_on_the_command_line(when, capsys):
    args = ["-p", "France ->", "-n", "3", "-t", "1", "--ablate", "2.0", "--ablate-mode", "mean", "--when", when]
    assert tinymia.main(args) == 2 and "one row" in capsys.readouterr().err


def test_emit_prints_and_writes_every_file(found, drawn, tmp_path, capsys):
    outs = [str(tmp_path / f"x.{s}") for s in ("npz", "json", "html", "png")]
    assert emit(argparse.Namespace(out=outs, json=False), found, "a text", grid()) == 0
    assert capsys.readouterr().out == "a text\n" and "Title &lt;1&gt;" in (tmp_path / "x.html").read_text()
    assert Found.load(outs[0]).names == Found.load(outs[1]).names == found.names
    assert [one.title for one in drawn(outs[3]).maps] == ["Title <1>\ncolour: logits"]
    emit(argparse.Namespace(out=[], json=True), found, "a text")
    assert json.loads(capsys.readouterr().out)["names"] == found.names
