"""Tasks: files that ship with the lab, own files, copycat's; templates and the prompts they make."""
import json
from pathlib import Path

import pytest
from conftest import command

import tinymia
from tinymia_lab.flags.task_flags import said
from tinymia_lab.measure import in_context, task_files
from tinymia_lab.measure.task_files import TEMPLATES, Task, Template, names, read_task, read_tasks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    def write(data, name="mine.json"):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")
        return path

    return write


@pytest.mark.parametrize(("name", "want"), [
    ("arrow", ("Egypt -> Cairo, Norway -> Oslo, Estonia ->", " Tallinn")),
    ("hendel", ("example:Egypt->Cairo\nexample:Norway->Oslo\nexample:Estonia->", "Tallinn")),
    ("todd", ("Q: Egypt\nA: Cairo\n\nQ: Norway\nA: Oslo\n\nQ: Estonia\nA:", " Tallinn")),
])
def test_templates_make_the_prompts_of_the_post_and_the_papers(name, want):
    template = TEMPLATES[name]
    assert (template.prompt([("Egypt", "Cairo"), ("Norway", "Oslo")], "Estonia"), template.answer("Tallinn")) == want


def test_a_template_takes_words_with_braces_as_they_are():
    template = Template.parse('"{x}" is "{y}"!', "; ")
    assert template.prompt([("{y}", "{x}")], "a{y}") == '"{y}" is "{x}"!; "a{y}" is "'


@pytest.mark.parametrize("text", ["{x}", "{y} -> {x}", "{x}{y}", "{x} {y}", "{x} -> {y} -> {y}", "{x} {x} -> {y}", ""])
def test_a_text_that_is_no_template_is_an_error(text):
    with pytest.raises(tinymia.Error, match="template"):
        Template.parse(text)


def test_every_task_that_ships_can_be_asked(copycat):
    shipped = [name for name in names() if not name.startswith("copycat-")]
    assert len(shipped) >= 15
    for name in shipped:
        task = read_task(name)
        assert 26 <= len(task.pairs) <= 60 and task.about.endswith("."), name
    assert dict(read_task("country-capital").pairs)["Estonia"] == "Tallinn"
    assert {y: x for x, y in read_task("en-fr").pairs} == dict(read_task("fr-en").pairs)
    assert all(x.split(",")[-1] == y for x, y in read_task("list-last").pairs)
    assert dict(read_task("next-letter").pairs)["z"] == "a"


def test_what_ships_is_in_the_package_data():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'tinymia_lab = ["py.typed", "tasks/*.json", "pairs/*.json"]' in text
    for folder in ("tasks", "pairs"):
        assert {path.suffix for path in (ROOT / "lab" / folder).iterdir()} == {".json"}


def test_copycats_tasks_come_from_its_own_table():
    facts = json.loads((ROOT / "models" / "copycat_tasks.json").read_text("utf-8"))
    assert read_task("copycat-capital").pairs == tuple((c[0], c[1]) for c in facts["countries"])
    digits = read_task("copycat-reverse-digits")
    assert digits.score == "whole" and digits.shots == 4
    assert all(x.split()[::-1] == y.split() for x, y in digits.pairs)
    assert dict(digits.pairs).keys() == dict(read_task("copycat-copy-digits").pairs).keys()


def test_own_files_are_a_list_or_an_object(write):
    pairs = [["a", "b"], ["c", "d"]]
    assert read_task(write(pairs)) == Task("mine", (("a", "b"), ("c", "d")))
    task = read_task(write({"pairs": pairs, "template": "{x} = {y}", "separator": "\n", "shots": 3, "score": "whole"}))
    assert (task.template.prompt(list(task.pairs), "e"), task.shots, task.score) == ("a = b\nc = d\ne =", 3, "whole")
    other = read_task(write(pairs), template="todd", separator="; ", score="whole")
    assert (other.template.prompt([("a", "b")], "c"), other.score) == ("Q: a\nA: b; Q: c\nA:", "whole")


@pytest.mark.parametrize(("data", "says"), [
    ("[", "not a task file"),
    ("[]", "no pairs"),
    ("{}", "no pairs"),
    ("3", "pairs must be a list"),
    ([["a", "b"], ["c"]], "pair 1 must be two texts"),
    ([["a", "b"], ["c", 4]], "pair 1 must be two texts"),
    ([["a", " "]], "pair 0 must be two texts"),
    ([["a", "b"], ["a", "c"]], "pair 1 asks 'a' again, after pair 0"),
    ({"pairs": [["a", "b"]], "template": "{x}"}, "template"),
    ({"pairs": [["a", "b"]], "templates": "{x}"}, "'templates' is not a key"),
    ({"pairs": [["a", "b"]], "shots": 0}, "shots"),
    ({"pairs": [["a", "b"]], "shots": True}, "shots must be a whole number"),
    ({"pairs": [["a", "b"]], "score": "last"}, "score"),
])
def test_a_broken_file_is_one_line_that_names_it(write, data, says):
    path = write(data)
    with pytest.raises(tinymia.Error) as e:
        read_task(path)
    assert str(path) in str(e.value) and says in str(e.value) and "\n" not in str(e.value)


def test_a_name_that_is_no_task_and_no_file():
    with pytest.raises(tinymia.Error, match="closest: antonyms"):
        read_task("antonym")
    with pytest.raises(tinymia.Error, match="each once"):
        read_tasks(["antonyms", "antonyms"], None, None, None)
    with pytest.raises(tinymia.Error, match="one or more"):
        read_tasks([], None, None, None)


def test_not_utf8_and_a_folder(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b'[["\xff", "b"]]')
    for path in (tmp_path / "bytes.json", tmp_path):
        with pytest.raises(tinymia.Error, match=str(path)):
            read_task(path)


def test_answers_are_the_tokens_after_the_prompt(copycat):
    digits = read_task("copycat-reverse-digits")
    whole = in_context.make_prompt(copycat, digits, [("1 2", "2 1")], "4 5 6", "6 5 4")
    assert said(copycat, whole.answer) == " 6 5 4"
    assert whole.ids + whole.answer == copycat.tokenize("1 2 to 2 1, 4 5 6 to 6 5 4")
    assert whole.tail == (whole.ids + whole.answer)[len(whole.ids) - 1 : -1]
    first = in_context.make_prompt(copycat, read_task(digits, score="first"), [], "4 5 6", "6 5 4")
    assert [copycat.piece(i) for i in first.answer] == [copycat.piece(i) for i in whole.answer[:2]]
    assert copycat.detokenize(first.answer).strip() == "6"


def test_a_prompt_that_is_too_long_says_so(copycat):
    task = read_task("copycat-reverse-digits")
    with pytest.raises(tinymia.Error, match="the context has room for 96: take fewer shots"):
        in_context.make_prompt(copycat, task, list(task.pairs[:12]), "4 5 6", "6 5 4")


def test_the_list_has_all_tasks():
    status, out, _ = command("task-vector", "--list")
    assert status == 0 and "country-capital" in out and "copycat-capital" in out
    status, out, _ = command("function-vector", "--list", "--json")
    assert status == 0 and {row["name"] for row in json.loads(out)} == set(task_files.names())
