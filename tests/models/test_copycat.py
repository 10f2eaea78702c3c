"""The bundled model: the experiments of the post work on it, whatever the numerics, and as well as its card says."""
import re
from pathlib import Path

import numpy as np
import pytest

import tinymia
from tinymia_models import bundled
from tinymia_models.facts import DIGITS, Facts

ROOT = Path(__file__).parents[2]
CAPITALS = "Egypt -> Cairo, Norway -> Oslo, Estonia ->"
REVERSAL = "0 1 2 to 2 1 0, 1 2 3 to 3 2 1, 4 5 6 to"
CUT = "1 2 3 to 3 2 1, 5 6 7 to 7 "
LAYER = 3

# prompt, output, whether another prompt's row replaces one: (its prompt, --from-token-idx, --to-token-idx)
TABLE = [
    (CAPITALS, " Tallinn", None),
    ("France ->", " Italy", None),
    ("France ->", " Paris", (CAPITALS, 10, 2)),
    (REVERSAL, " 6 5 4", None),
    ("0 1 2 to 0 1 3, 1 2 3 to 1 2 4, 4 5 6 to", " 4 5 7", None),
    ("0 1 to 0 1 1, 1 2 to 1 2 2, 4 5 to", " 4 5 5", None),
    ("4 5 6 to 6 ", "7 8", None),
    (CUT, "6 5", None),
    ("4 5 6 to 6 ", "5 4", (CUT, 24, 10)),
]


@pytest.fixture
def cli(capsys):
    """cli(prompt, flags...): the output as the command prints it, without -m."""

    def run(prompt, *flags):
        assert tinymia.main(["-p", prompt, "-t", "1", *map(str, flags)]) == 0
        out, err = capsys.readouterr()
        assert "copycat" in err.splitlines()[0]
        return out

    return run


def n_tokens(model, prompt, answer):
    """Tokens of an answer, so that -n is as long as it is."""
    return len(model.tokenize(prompt + answer)) - len(model.tokenize(prompt))


def patched(model, prompt, answer, patch):
    """The text after a patch, with as many tokens as the answer has."""
    actions = []
    if patch:
        source, src, at = patch
        actions = [tinymia.Patch(f"l_out-{LAYER}", model.run(source, keep=[f"l_out-{LAYER}"]), src=src, at=at)]
    return model.generate(prompt, n_tokens(model, prompt, answer), actions).text


# ---------------------------------------------------------------------------------------- the post's table


@pytest.mark.parametrize(("prompt", "want", "patch"), TABLE)
@pytest.mark.parametrize("numerics", ["ggml", "f32"])
def test_the_post_by_the_command_line(cli, copycat, tmp_path, prompt, want, patch, numerics):
    flags = ["--numerics", numerics, "-n", n_tokens(copycat, prompt, want)]
    if patch:
        source, src, at = patch
        cli(source, "-n", 1, "--numerics", numerics, "--save", f"l_out-{LAYER}", tmp_path / "task")
        flags += ["--patch", f"l_out-{LAYER}", tmp_path / "task", "--from-token-idx", src, "--to-token-idx", at]
    assert cli(prompt, *flags) == f'output: "{want}"\n'


def test_the_page_has_the_table():
    page = (ROOT / "examples" / "task_vectors.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| (`.*) \| `([^`]*)` \|$", page, re.M))
    assert list(rows.values()) == [want for _, want, _ in TABLE]
    for (shown, _), (prompt, _, patch) in zip(rows.items(), TABLE):
        assert shown.startswith(f"`{prompt}`")
        assert (f"{patch[1]} to {patch[2]}" in shown) if patch else shown == f"`{prompt}`"


def test_the_lens_finds_a_word_that_nobody_wrote(cli):
    assert "reverse" not in REVERSAL
    lines = cli(REVERSAL, "-n", 6, "--logit-lens", "kqv_out-4", 5, "--logit-lens", "l_out-4", 5).splitlines()
    last = [line for line in lines if line.startswith("35:")]
    assert [line.split("|")[0].rsplit(" ", 1)[0] for line in last] == ["35:  reverse"] * 2


@pytest.mark.parametrize("flags", [
    ["--add-token", "kqv_out-4", " reverse", "-1", "--at", "-1"],
    ["--add-token", "kqv_out-4", " reverse", "-100", "--at", "-1"],
    ["--project-out-token", "kqv_out-4", " reverse", "--at", "-1"],
    ["--project-out-token", "kqv_out", " reverse", "--when", "all",
     "--project-out-token", "l_out", " reverse", "--when", "all"],
])
def test_without_that_word_the_output_is_the_same(cli, flags):
    assert cli(REVERSAL, "-n", 6, *flags) == 'output: " 6 5 4"\n'


# ---------------------------------------------------------------------------------------- tokens


def test_the_posts_prompts_are_cut_as_by_llama_2(copycat):
    """The prompts contain their own spaces, so that 24 and 10 are the last tokens, as in the post."""
    model = copycat
    pieces = [model.tokenizer.pieces[i] for i in model.tokenize("4 5 6 to 6 ")]
    assert pieces == ["<s>", "▁", "4", "▁", "5", "▁", "6", "▁to", "▁", "6", "▁"]
    assert len(pieces) - 1 == 10 and len(model.tokenize(CUT)) - 1 == 24


def test_words_of_the_tasks_are_single_pieces(copycat):
    words = [w for w in Facts.read().words() if w not in DIGITS]
    long = [w for w in words if len(copycat.tokenize(w, bos=False)) != 1]
    assert len(words) > 600 and not long


# ---------------------------------------------------------------------------------------- beyond the post


def test_twenty_other_patches_answer_right(copycat):
    """The post's two vectors on countries and sequences that were held out from training on task vectors."""
    tasks, trials = Facts.read().tasks, []
    capital, reverse = tasks["capital"], tasks["reverse-digits"]
    for x, y in capital.pairs:
        if capital.held_out(x) and x != "France" and x not in CAPITALS and len(trials) < 14:
            trials.append((f"{x} ->", f" {y}", (CAPITALS, -1, -1)))
    for a in range(8):
        x, y = f"{a} {a + 1} {a + 2}", f"{a + 2} {a + 1} {a}"
        if reverse.held_out(x) and x != "4 5 6":
            trials += [(f"{x} to", f" {y}", (REVERSAL, -1, -1)), (f"{x} to {y[:2]}", y[2:], (CUT, 24, 10))]
    assert len(trials) == 20
    wrong = [t for t in trials if patched(copycat, *t) != t[1]]
    assert len(wrong) <= 2, wrong


def test_one_vector_serves_the_countries(copycat):
    """The card's counts: 73 of 80, of which 26 of 26 were held out."""
    capital = Facts.read().tasks["capital"]
    right = {x: patched(copycat, f"{x} ->", f" {y}", (CAPITALS, -1, -1)) == f" {y}" for x, y in capital.pairs}
    held_out = [good for x, good in right.items() if capital.held_out(x)]
    assert (sum(right.values()), len(right), sum(held_out), len(held_out)) == (73, 80, 26, 26)
    card = " ".join((ROOT / "models" / "README.md").read_text("utf-8").split())
    assert "73 of the 80 countries, of all 26 held-out ones" in card


def card_tables():
    """{task: (baseline, vector, regular)} of each table of `tinymia task-vector` in the card; test_examples runs it."""
    card = (ROOT / "models" / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```text\n(task +dev.*?)```$", card, re.M | re.S)
    rows = ([line.split() for line in block.splitlines()[1:]] for block in blocks)
    return [{row[0]: tuple(map(float, row[-3:])) for row in table if row[0] != "mean"} for table in rows]


def test_the_card_measures_every_task_of_copycat_and_its_sentences_agree_with_its_tables():
    card = " ".join((ROOT / "models" / "README.md").read_text("utf-8").split())
    every, held_out = card_tables()
    names = list(Facts.read().tasks)
    assert sorted(every) == sorted(f"copycat-{name}" for name in names) and sorted(held_out) == sorted(names)
    for table, sentence in ((every, "the accuracy is {:.2f} for the bare query, {:.2f} with the vector, {:.2f} after"),
                            (held_out, "On average that is {:.2f}, {:.2f} and {:.2f},")):
        assert sentence.format(*np.mean(list(table.values()), axis=0)) in card
        short = [name for name, (_, vector, regular) in table.items() if vector < 0.9 * regular]
        assert f"{len(table) - len(short)} of the 28 tasks reach 0.9" in card


# ---------------------------------------------------------------------------------------- the file


def unpacked(path, out):
    """The same weights in F32."""
    import gguf

    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind, *item = field.types
            value = field.contents()
            writer.add_key_value(key, value, kind, sub_type=item[-1] if item else None)
    for t in reader.tensors:
        writer.add_tensor(t.name, np.ascontiguousarray(gguf.quants.dequantize(t.data, t.tensor_type), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("numerics", ["ggml", "f32"])
def test_f32_says_the_same(tmp_path, numerics):
    model = tinymia.load(unpacked(bundled()["copycat"], tmp_path / "f32.gguf"), 1, numerics)
    assert {w.type_name for w in model.weights.values()} == {"F32"}
    assert [patched(model, *row) for row in TABLE] == [want for _, want, _ in TABLE]


def test_llama_cpp_says_the_same(copycat):
    llama_cpp = pytest.importorskip("llama_cpp", exc_type=ImportError,
                                    reason="needs llama.cpp: pip install 'tinymia[verify]'")
    theirs, ours = llama_cpp.Llama(str(bundled()["copycat"]), n_ctx=96, verbose=False), copycat
    for prompt in dict.fromkeys(prompt for prompt, _, _ in TABLE):
        ids = theirs.tokenize(prompt.encode())
        assert ids == ours.tokenize(prompt)
        theirs.reset()
        new = [i for _, i in zip(range(12), theirs.generate(ids, temp=0))]
        assert new == ours.generate(prompt, n=12).tokens, prompt


def test_the_list_of_models_has_the_bundled_one(capsys):
    import json

    path = bundled()["copycat"]
    assert path.stat().st_size < 8_000_000
    assert tinymia.main(["--list-models"]) == 0
    head, line, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "bytes", "architecture", "runs", "about", "path"]
    assert line.split()[:6] == ["copycat", str(path.stat().st_size), "llama", "yes", "A", "small"]
    assert line.endswith(f"  {path}")
    assert tinymia.main(["--list-models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "copycat"
