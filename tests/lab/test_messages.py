"""Mistakes that people make on the command line, and the sentence that each one gets."""
import json
import shutil

import numpy as np
import pytest
from test_cli import fails

import tinymia
from tinymia_lab.flags.mistakes import closest, find_model
from tinymia_lab.flags.parser import Parser
from tinymia_lab.runs.printer import two_digits
from tinymia_models import bundled, known_words


@pytest.fixture
def told(capsys, monkeypatch, tmp_path):
    """told(args...): (status, stdout, stderr) of main on the bundled model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        status = tinymia.main(list(map(str, argv)))
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


P, ONE = ["-p", "France ->"], ["-p", "France ->", "-n", "1"]
MISTAKES = [
    # prompts that the shell has cut
    (["-p", "France", "-", "1"], 'put the prompt in quotes: -p "France -> ..." (without them the shell takes > as a '
                                 "redirection into a file"),
    (["-p", "Egypt", "-", "Norway", "-", "Estonia", "-", "1"], 'put the prompt in quotes: -p "Egypt -> ..."'),
    (["sweep", "--clean", "France", "-", "--corrupt", "Italy", "-"],
     'put the prompt in quotes: --clean "France -> ..."'),
    (["sweep", "--clean", "France", "-"], 'put the prompt in quotes: --clean "France -> ..."'),
    (["-p", "“France", "-", "1"], "'“France' has a curly quote, which the shell takes for a letter; type straight "
                                  'quotes: -p "France -> ..."'),
    (["lens", "-p", "„France", "-"], "curly quote"),
    (["-p", "Egypt", "Cairo"], "'Cairo' is left over after the prompt; put the prompt in quotes: -p \"Egypt Cairo\""),
    (["France ->"], "The prompt goes after -p: -p \"France ->\""),
    (["lens", "France ->"], "The prompt goes after -p: -p \"France ->\""),
    # commands and flags misspelt
    (["lense"], "no command lense; closest: lens"), (["lense", *P], "no command lense; closest: lens"),
    (["swep", "--clean", "x"], "closest: sweep"), (["task_vector", "capital"], "closest: task-vector"),
    (["Attend", *P], "closest: attend"), (["x"], "x is not a command; there are lens, attend"),
    ([*P, "lens"], "the command comes first: tinymia lens"),
    ([*P, "--savee", "l_out-3", "f"], "no flag --savee; did you mean --save?"),
    ([*P, "--logitlens", "l_out", "3"], "no flag --logitlens; did you mean --logit-lens?"),
    ([*P, "-logit-lens", "l_out", "3"], "did you mean --logit-lens?"), ([*P, "--Json"], "did you mean --json?"),
    ([*P, "--max-tokens", "3"], "did you mean -n?"), ([*P, "--max_tokens", "3"], "did you mean -n?"),
    (["-p", "France", "->"], 'put the prompt in quotes: -p "France ->"'),
    ([*P, "--add-token", "l_out-3", "#99999", "1"], "2048 tokens have an id, #0 to #2047"),
    ([*P, "--temperature", "1"], "did you mean --temp?"),
    (["lens", *P, "--layr", "3"], "no flag --layr"), (["attend", *P, "--layer", "3"], "did you mean --layers?"),
    ([*P, "--qqq"], "no flag --qqq (tinymia --help shows the flags)"),
    # values
    (["-p", "-n", "3"], "-p needs a value: --prompt TEXT; a value that begins with - is written -p=-n"),
    ([*P, "--stop"], "--stop needs a value: --stop TEXT"),
    ([*P, "--add-token", "l_out-3", "-x", "1"], "'-x' looks like a flag: a file is written ./-x, a token by its id"),
    ([*P, "--ll", "l_out"], "--ll needs 2 values: --logit-lens NAME K"),
    ([*P, "--patch", "l_out-3"], "--patch takes 2 or 4 values, --patch NAME FILE or --patch NAME FILE FROM TO, not 1"),
    ([*P, "-n", "x"], "-n x: it must be a whole number, 0 or more"),
    ([*P, "-n", "-3"], "-n -3: it must be a whole number, 0 or more"),
    ([*P, "--temp", "hot"], "--temp hot: it must be a number"), ([*P, "-t", "0"], "-t 0: it must be a whole number, 1"),
    ([*P, "--numerics", "fp16"], "--numerics fp16: it must be ggml or f32"),
    ([*P, "--scale", "l_out-3", "2", "--at", "x"],
     "--at x: it must be a position or a list of them: write 3, -1 or 3,5"),
    ([*P, "--json=1"], "--json takes no value"), (["lens", *P, "--score", "logits"], "did you mean logit?"),
    (["lens", *P, "-k", "0"], "-k 0: it must be a whole number, 1 or more"),
    (["steer", *P, "--vector", "v.npz", "-n", "0"], "-n 0: it must be a whole number, 1 or more"),
    (["task-vector", "capital", "--n-dev", "0"], "--n-dev 0: it must be a whole number, 1 or more"),
    (["sweep", "--clean", "x"], "it needs --corrupt TEXT"), (["sweep"], "it needs --clean TEXT and --corrupt TEXT"),
    # flags that go together
    ([*P, "--from-token-idx", "1"], "--from-token-idx says more of the action before it, and there is none: put it "
                                    "behind --patch"),
    ([*P, "--at", "1", "--scale", "l_out", "2"], "put it behind --scale, --add or --ablate"),
    ([*P, "--lens-position", "-1"], "--lens-position goes with --logit-lens"),
    ([*P, "--ll", "l_out", "1", "--lens-position", "3"], "--lens-position 3: the prompt has 3 tokens, 0 to 2"),
    (["steer", *P], "give --positive FILE and --negative FILE, of which a vector is made, or --vector FILE"),
    (["steer", *P, "--positive", "x"], "give --positive FILE and --negative FILE"),
    (["steer", *P, "--positive", "x", "--negative", "y", "--vector", "z"], "or --vector FILE"),
    (["ablate", *P, "--mode", "mean"], "--mode mean needs --prompts FILE"),
    (["ablate", *P, "--mode", "resample"], "--mode resample needs --other TEXT"),
    (["ablate", *P, "--prompts", "x"], "--prompts goes with --mode mean"),
    (["ablate", *P, "--other", "x"], "--other goes with --mode resample"),
    (["sweep", "--clean", "France ->", "--corrupt", "Italy ->", "--at", "last"], "--at last goes with --tensor kqv or"),
    (["sweep", "--clean", "France ->", "--corrupt", "France ->", "--answer", "Paris", "--against", "Rome"],
     "the prompts are the same"),
    ([*P, "--ablate", "9.0"], "no head 9.0: the model has 6 layers of 4 heads: layers 0 to 5, heads 0 to 3"),
    # models
    (["-m", "copycot", *P], "-m copycot: no such file; closest: copycat"),
    (["-m", "Copycat.gguf", *P], "closest: copycat"), (["-m", "SmolLM", *P], "no such file; closest: smollm2"),
    (["-m", "zzz", *P], "-m zzz: no such file; the bundled model: -m copycat, or no -m"),
    (["lens", "-m", "copycot", *P], "-m copycot: no such file"), (["verify", "-m", "copycot", *P], "-m copycot"),
]


@pytest.mark.parametrize("argv,sentence", MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_mistake_is_told_with_what_would_be_right(told, argv, sentence):
    assert sentence in fails(told(*argv))


def test_the_file_that_the_shell_wrote_is_named(tmp_path):
    """`tinymia -p France -> -n 1`: the shell takes > for a redirection into a file called -n."""
    from conftest import command

    with open(tmp_path / "-n", "wb") as out:
        code, _, err = command("-p", "France", "-", "1", stdout=out, capture_output=False, cwd=tmp_path, stderr=-1)
    assert code == 2 and "it wrote the file '-n' here" in err
    with open(tmp_path / "Italy", "wb") as out:     # -p France->Italy: nothing is left over
        code, _, err = command("-n", "1", "-p", "France-", stdout=out, capture_output=False, cwd=tmp_path, stderr=-1)
    assert code == 0 and "the output goes into the file 'Italy'" in err


@pytest.mark.parametrize("flags,same", [
    (["-p", "->"], ["-p=->"]), ([*P, "--stop", "->"], [*P, "--stop=->"]), (["-p", "-"], ["-p=-"]),
    ([*P, "--scale", "l_out-3", "-1e-3"], [*P, "--scale", "l_out-3", "-0.001"]),
    ([*P, "--scale", "l_out-3", "-1."], [*P, "--scale", "l_out-3", "-1.0"]),
    ([*P, "--scale", "l_out-3", "-.5", "--at", "-1,-2"], [*P, "--scale", "l_out-3", "-0.5", "--at", "1,2"]),
    ([*P, "--add-token", "l_out-3", "->", "-1e1", "--at", "-1"],
     [*P, "--add-token", "l_out-3", "#262", "-10", "--at", "2"]),
    ([*P, "--project-out-token", "l_out-3", "->"], [*P, "--project-out-token", "l_out-3", "#262"]),
], ids=str)
def test_values_may_begin_with_a_dash(told, flags, same):
    got, want = told(*flags, "-n", "2"), told(*same, "-n", "2")
    assert got[0] == 0 and got[1] == want[1]


def test_what_is_a_value_and_what_a_flag():
    p = Parser("x", allow_abbrev=False)
    p.add_argument("-p")
    p.add_argument("--coef", type=float, nargs="+")
    p.add_argument("--three", nargs=3)
    p.add_argument("--answer")
    p.add_argument("--on", action="store_true")
    found = p.parse_args(["--coef", "-1", "-inf", "-1e-3", "-.5", "--on", "--three", "->", "-1.", "--", "-p", "-→",
                          "--answer", "-"])
    assert found.coef == [-1, -np.inf, -1e-3, -0.5] and found.on and found.three == ["->", "-1.", "--"]
    assert found.p == "-→" and found.answer == "-"
    assert p.parse_args(["-p=--on"]).p == "--on"
    for argv in (["-p", "--on"], ["-p", "-x"], ["-p"], ["--three", "->", "--on", "x"], ["--answer", "--p"]):
        with pytest.raises(tinymia.Error, match="needs"):
            p.parse_args(argv)


def test_lens_sweep_and_attribute_take_an_answer_that_begins_with_a_dash(told):
    status, out, _ = told("attribute", *P, "--answer", "->", "--json")
    assert status == 0 and json.loads(out)["answer_piece"] == " ->"


def test_saved_tensors_that_do_not_fit_name_the_file_and_what_would_fit(told, tiny, tmp_path):
    """The rows of a patch, its width and its model, and files that hold no tensor at all."""
    long = ["-p", "Egypt -> Cairo, Norway -> Oslo, Estonia ->", "-n", "1"]
    assert told(*long, "--save", "l_out-3", "e.bin", "--save", "l_out-3", "e.npz", "--save", "ffn_gate-3", "g.npz",
                "--save", "l_out-2", "before.npz")[0] == 0
    (tmp_path / "junk").write_bytes(b"junk")
    other = ["-m", tiny(n_embd=96)]
    for argv, sentence in (
        ([*ONE, "--patch", "l_out-3", "e.bin", "-20", "-1"], "no row [-20] in the source, which has 11 rows, 0 to 10"),
        ([*ONE, "--patch", "l_out-3", "e.bin", "-1", "10"], "position 10 is out of range: the prompt has 3 tokens"),
        ([*ONE, "--patch", "l_out-3", "e.bin"], "11 rows for 3 positions: say which row goes where: FROM TO"),
        ([*ONE, "--patch", "l_out-3", "junk", "-1", "-1"], "junk: 1 numbers are not rows of 128, the width of l_out-3"),
        ([*ONE, "--patch", "l_out-3", "g.npz", "-1", "-1"], "g.npz holds ffn_gate-3, 384 wide; l_out-3 is 128 wide"),
        ([*ONE, *other, "--patch", "l_out-1", "e.bin", "-1", "-1"], "e.bin: 1408 numbers are not rows of 96"),
        ([*ONE, *other, "--patch", "l_out-1", "e.npz", "-1", "-1"],
         "e.npz: saved from another model (name 'copycat', n_embd 128, n_layer 6, n_head 4, n_vocab 2048); this one is "
         "name 'tiny', n_embd 96"),
        ([*ONE, "--add", "l_out-3", "e.npz"], "the source has 11 rows, 0 to 10: choose one"),
        ([*ONE, "--add", "l_out-3", "e.npz", "--from-token-idx", "11"], "0 to 10: there is no row 11"),
        ([*ONE, "--save", "l_out", "e.raw"], "e.raw: a file of this kind holds one tensor, an .npz file 6"),
        ([*ONE, "--save", "l_out-3", "no/f"], "no/f: cannot be written: there is no folder no; mkdir -p no makes it"),
        ([*ONE, "--save", "l_out-3", tmp_path], "it is a folder"),
        (["lens", *P, "-o", "x.pdf"], "-o x.pdf: the kinds of file are .npz, .json, .png, .html"),
    ):
        assert sentence in fails(told(*argv))
    status, _, err = told(*ONE, "--patch", "l_out-3", "before.npz", "-1", "-1")
    assert status == 0 and "note: before.npz holds l_out-2; its rows go to l_out-3" in err
    assert told("lens", *P, "-o", "r.npz")[0] == 0
    assert "holds another run: its prompt text is 'France ->', not 'Italy ->'; remove the file" in fails(
        told("lens", "-p", "Italy ->", "-o", "r.npz"))


def test_a_model_by_its_name_or_near_its_name(told, tmp_path):
    assert told(*ONE, "-m", "copycat")[1] == 'output: " Italy"\n' and "copycat" in told("--list-models")[1]
    (tmp_path / "models").mkdir()
    for name in ("copycat", "stories260K-f32", "other-1", "other-2"):
        shutil.copy(bundled()["copycat"], tmp_path / "models" / f"{name}.gguf")
    for given, near in (("modles/copycat.gguf", "models/copycat.gguf"), ("models/copycut.gguf", "models/copycat.gguf"),
                        ("models/stories260k.gguf", "models/stories260K-f32.gguf")):
        assert f"no such file; closest: {near}" in fails(told(*P, "-m", given))
    assert "this is a folder; in it: copycat.gguf, other-1.gguf" in fails(told(*P, "-m", "models"))
    assert "none is in it" in fails(told(*P, "-m", tmp_path / "models" / ".."))
    shutil.copy(bundled()["copycat"], tmp_path / "copycat")     # a file of that name comes first
    assert find_model("copycat") == "copycat" and find_model(None) is None


def test_the_closest_word_is_suggested():
    assert closest("save", ["--save", "--scale"]) == ["--save"] and closest("zzz", ["--save"]) == []
    assert closest("LOGIT_LENS", ["--logit-lens", "--log"]) == ["--logit-lens"]


# ------------------------------------------------------------------------------------------------ notes on prompts


def test_copycat_knows_its_words(copycat):
    words = known_words(copycat.tokenizer.ids)
    assert 640 <= sum(len(w) > 1 for w in words) <= 670
    assert {"France", "Italy", "Italian", "dog", "dogs", "DOG", "reverse", "capital", "to", "7", "b"} <= words
    assert not {"The", "of", "is", "Trip", "Eston", "france", "13"} & words


def test_unknown_words_are_named_in_one_note(told, tmp_path):
    status, _, err = told("-p", "The capital of France is", "-n", "1")
    assert status == 0 and err.count("note:") == 1
    assert "copycat knows some 650 words; not among them: The, of, is. A real model: -m FILE.gguf" in err
    assert "note:" not in told("-p", "Egypt -> Cairo, 7 b to reverse ->", "-n", "1")[2]
    many = " ".join(f"word{i}" for i in range(20))
    assert "word7 and 12 more." in told("-p", many, "-n", "1")[2]
    (tmp_path / "p.txt").write_text("My ->\nFrance ->\n")
    (tmp_path / "n.txt").write_text("Yours ->\n")
    pairs = [[a, f"x{a}"] for a in "abcdefghijkl"]
    (tmp_path / "t.json").write_text(json.dumps(pairs))
    for argv, words in (
        (["lens", "-p", "My France ->"], "My"), (["attend", "-p", "My France ->"], "My"),
        (["trace", "-p", "My France ->"], "My"), (["attribute", "-p", "My ->"], "My"),
        (["report", "-p", "My ->", "-n", "1"], "My"), (["verify", "--self", "-p", "My ->", "--only", "norm"], "My"),
        (["sweep", "--clean", "a My ->", "--corrupt", "b My ->", "--layers", "0"], "My"),
        (["ablate", "-p", "France ->", "--mode", "mean", "--prompts", "p.txt", "--layers", "0"], "My"),
        (["ablate", "-p", "His ->", "--mode", "resample", "--other", "My ->", "--at", "-1"], "His, My"),
        (["steer", "--positive", "p.txt", "--negative", "n.txt"], "My, Yours"),
        (["task-vector", "t.json", "--shots", "1", "--n-dev", "1", "--n-test", "1"], "xa, xb"),
    ):
        err = told(*argv)[2]
        assert err.count("note: copycat") == 1 and f"not among them: {words}" in err, (argv, err)


def test_another_model_gets_no_such_note(told, tiny):
    assert "note:" not in told("-m", tiny(), "-p", "The fox", "-n", "1")[2]


def test_a_backslash_n_that_was_typed(told, tmp_path):
    assert "for a line end add -e" in told("-p", "France\\n->", "-n", "1")[2]
    (tmp_path / "p").write_text("France\\n->")     # a file may say what it likes
    assert "line end" not in told("-f", "p", "-n", "1")[2]


# ------------------------------------------------------------------------------------------------ numbers and rows


def test_scores_are_printed_without_exponents():
    scores = {187.3: "190", 12.34: "12", 0.456: "0.46", -3: "-3", 1234: "1200", 1.5e7: "1.5e+07"}
    assert {score: two_digits(score) for score in scores} == scores


def test_lens_position_chooses_rows(told):
    every = told(*ONE, "--ll", "l_out-3", 2)[1].splitlines()
    assert told(*ONE, "--ll", "l_out-3", 2, "--lens-position", "-1")[1].splitlines() == [every[0], *every[3:]]
    assert told(*ONE, "--ll", "l_out-3", 2, "--lens-position", "0,2")[1].splitlines() == [*every[:2], *every[3:]]
    rows = json.loads(told(*ONE, "--ll", "l_out-3", 2, "--lens-position", "-1", "--json")[1])["lens"][0]["rows"]
    assert [row["position"] for row in rows] == [2]


@pytest.mark.parametrize("name", ["capitals.txt", "countries.txt", "prompts.txt"])
def test_files_that_help_texts_name_are_there(told, name, capsys):
    from pathlib import Path

    texts = []
    for command in ("steer", "ablate"):
        with pytest.raises(SystemExit) as e:
            tinymia.main([command, "--help"])
        assert not e.value.code
        texts.append(capsys.readouterr().out)
    assert f"examples/{name}" in "".join(texts) and (Path(__file__).parents[2] / "examples" / name).read_text().strip()
