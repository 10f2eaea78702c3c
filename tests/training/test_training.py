"""The training: its corpus depends on a seed alone, a run can be interrupted, and the export is the trained model."""
import ast
import hashlib
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinymia
from tinymia_lab.measure import task_files
from tinymia_models import bundled
from tinymia_models.facts import Facts
from training import corpus, held_out

ROOT = Path(__file__).parents[2]


def test_nothing_that_is_installed_imports_torch_or_the_training():
    files = [ROOT / "tinymia.py", *(path for folder in ("engine", "files", "kernels", "lab", "models")
                                    for path in (ROOT / folder).rglob("*.py"))]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "training", "train_copycat"}, path
    assert "training" not in (ROOT / "pyproject.toml").read_text("utf-8").split("[tool.pytest")[0]


def test_the_facts_need_neither_torch_nor_the_engine():
    code = ("import sys; from tinymia_models.facts import Facts; print(len(Facts.read().tasks)); "
            "assert not {'torch', 'numba', 'tinymia', 'sentencepiece'} & set(sys.modules)")
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (p.returncode, p.stdout) == (0, "28\n"), p.stderr


# ---------------------------------------------------------------------------------------- the corpus


def test_the_corpus_is_a_function_of_its_seed(capsys):
    def sample(*flags):
        assert corpus.main(["-n", "40", *flags]) == 0
        return capsys.readouterr().out

    assert sample() == sample("--seed", "0") != sample("--seed", "1")
    assert len(sample().splitlines()) == 40


def test_the_corpus_is_the_one_that_copycat_learnt_from():
    """Its first documents of every stage, with the weights of the loss, as the program drew them that made copycat."""
    rng, facts, digest = random.Random(0), Facts.read(), hashlib.sha256()
    for i in range(6000):
        digest.update(repr(corpus.document(rng, facts, bool(i % 2), 1 + i % 3, 40)).encode())
    assert digest.hexdigest()[:16] == "962671b2615c4b86"


def test_texts_that_name_a_task_leave_out_held_out_pairs():
    rng, facts = random.Random(0), Facts.read()
    tasks = [task for task in facts.tasks.values() if not task.is_list]
    for make in (lambda: corpus.examples(rng, tasks, False, 2, 40, named=True),
                 lambda: corpus.arrows(rng, tasks, 2, 40, named=True),
                 lambda: corpus.relations(rng, [facts.tasks["capital"]], 2, 40, mixed=False)):
        for _ in range(200):
            text = corpus.text_of(make())
            assert "France -> Paris" not in text and "France capital" not in text and "Estonia capital" not in text
            if text.startswith("capital:"):
                assert "France" not in text and "Estonia" not in text
    unnamed = (corpus.examples(rng, [facts.tasks["capital"]], False, 1, 40, named=False) for _ in range(200))
    assert any("France" in corpus.text_of(words) for words in unnamed)


def test_held_out_pairs_become_task_files_that_the_lab_reads(tmp_path, capsys):
    assert held_out.main([str(tmp_path / "tasks")]) == 0
    tasks = Facts.read().tasks
    assert {path.stem for path in (tmp_path / "tasks").iterdir()} == set(tasks)
    for name, task in tasks.items():
        mine, theirs = (task_files.read_task(t) for t in (tmp_path / "tasks" / f"{name}.json", f"copycat-{name}"))
        assert (mine.template, mine.score, mine.shots or 5) == (theirs.template, theirs.score, theirs.shots)
        assert mine.pairs and all(task.held_out(x) for x, _ in mine.pairs)
        if not task.is_list:
            assert set(mine.pairs) == {(x, y) for x, y in theirs.pairs if task.held_out(x)}


# ---------------------------------------------------------------------------------------- training and export


@pytest.fixture(scope="module")
def programs():
    """The programs that need torch."""
    pytest.importorskip("torch", reason="needs torch: pip install 'tinymia[train]'", exc_type=ImportError)
    from training import export, train

    return train, export


@pytest.fixture(scope="module")
def folder(programs, tmp_path_factory):
    """A run of 5 steps: two in stage 1, two in stage 2, one in stage 3."""
    out = tmp_path_factory.mktemp("run")
    assert programs[0].main(["--out", str(out), "--steps", "2"]) == 0
    return out


def weights(folder):
    import torch

    return torch.load(folder / "checkpoint.pt", weights_only=True)["params"]


def test_the_tokenizer_is_that_of_the_bundled_model(folder):
    from training.tokenizer import Vocab

    vocab, theirs = Vocab.read(folder / "copycat.model", Facts.read()), tinymia.load(threads=1).tokenizer
    assert vocab.pieces == list(theirs.pieces)


def test_an_interrupted_run_ends_with_the_same_weights(programs, folder, tmp_path, monkeypatch, capsys):
    train, step = programs[0], programs[0].train_step

    def interrupted(p, optimiser, batches, number, *rest):
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(p, optimiser, batches, number, *rest)

    monkeypatch.setattr(train, "train_step", interrupted)
    argv = ["--out", str(tmp_path), "--steps", "2"]
    assert train.main(argv) == 130 and "interrupted after step 3" in capsys.readouterr().err
    monkeypatch.setattr(train, "train_step", step)
    assert train.main(argv) == 0 and "resuming" in capsys.readouterr().err
    whole, parts = weights(folder), weights(tmp_path)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_a_run_goes_on_from_another_ones_first_stage(programs, folder, tmp_path, capsys):
    argv = ["--out", str(tmp_path / "run"), "--steps", "2", "--tv-weight", "0", "--start-from"]
    assert programs[0].main([*argv, str(folder / "stage1.pt")]) == 0
    assert "at step 2" in capsys.readouterr().err
    assert any(not np.array_equal(w, weights(folder)[name]) for name, w in weights(tmp_path / "run").items())
    argv[1] = str(tmp_path / "other")
    assert programs[0].main([*argv, str(folder / "stage2.pt")]) == 2
    assert "not at the end of stage 1" in capsys.readouterr().err


def test_tinymia_computes_what_was_trained(programs, folder, tmp_path):
    """The exported model's logits beside those of the training's forward pass, which rounds products to bfloat16."""
    import torch

    from training import model
    from training.tokenizer import Vocab

    path = tmp_path / "model.gguf"
    assert programs[1].main([str(folder), str(path), "--type", "f32"]) == 0
    vocab = Vocab.read(folder / "copycat.model", Facts.read())
    ids = vocab.encode(["Egypt", "->", "Cairo", ",", "Norway", "->"])
    compact = torch.tensor([[vocab.used.index(i) for i in ids]])
    p = weights(folder)
    theirs = model.logits_of(p, model.blocks(p, model.embed(p, compact), 0, model.N_LAYER), 1)[0, :, :-1].numpy()
    ours = tinymia.load(path, 1, "f32").run(ids).logits
    assert np.abs(ours[:, vocab.used] - theirs).max() < 0.02 * np.abs(theirs).max()
    unused = sorted(set(range(len(vocab.pieces))) - set(vocab.used))
    assert np.ptp(ours[:, unused], axis=1).max() == 0  # one row stands for all of them


def test_an_export_describes_itself_as_the_bundled_model_does(programs, folder, tmp_path):
    import gguf

    path = tmp_path / "model.gguf"
    assert programs[1].main([str(folder), str(path)]) == 0
    mine, theirs = (gguf.GGUFReader(p).fields for p in (path, bundled()["copycat"]))
    differ = {key for key in {*mine, *theirs} if key not in mine or mine[key].contents() != theirs[key].contents()}
    assert differ == {"general.description", "copycat.steps", "copycat.train_seconds"}
    assert path.stat().st_size == pytest.approx(bundled()["copycat"].stat().st_size, abs=200)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("module", "argv", "words"), [
    (corpus, ["-n", "0"], "-n 0: it must be 1 to 10000"),
    (corpus, ["--seed", "x"], "--seed: invalid int value"),
    (held_out, [], "FOLDER"),
])
def test_an_error_is_one_line(capsys, module, argv, words):
    one_line(capsys, module, argv, words)


@pytest.mark.parametrize(("argv", "words"), [
    (["--steps", "0"], "--steps 0: it must be 1 to 1000000"),
    (["--tv-weight", "nan"], "--tv-weight nan: it must be 0 to 10"),
    (["--vocab-size", "10"], "--vocab-size 10: it must be 512 to 32000"),
    (["--threads", "0"], "--threads 0: it must be 1 to 256"),
    (["--seed", "-1"], "--seed -1: it must be 0 to 4294967295"),
])
def test_an_option_out_of_range_is_one_line_and_leaves_no_file(capsys, programs, tmp_path, argv, words):
    one_line(capsys, programs[0], ["--out", str(tmp_path / "run"), *argv], words)
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_options_and_a_broken_checkpoint_are_one_line(capsys, programs, folder, tmp_path):
    train, export = programs
    one_line(capsys, train, [], "--out")
    one_line(capsys, train, ["--out", str(folder), "--steps", "3"], "use another --out")
    one_line(capsys, export, [str(tmp_path), str(tmp_path / "x.gguf")], "copycat.model: no such file")
    (tmp_path / "copycat.model").write_bytes((folder / "copycat.model").read_bytes())
    one_line(capsys, export, [str(tmp_path), str(tmp_path / "x.gguf")], "checkpoint.pt: no such file")
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    one_line(capsys, export, [str(tmp_path), str(tmp_path / "x.gguf")], "not a checkpoint of a training")
    one_line(capsys, train, ["--out", str(tmp_path), "--steps", "2"], "not a checkpoint of a training")
    (tmp_path / "copycat.model").write_bytes(b"not a tokenizer")
    one_line(capsys, export, [str(tmp_path), str(tmp_path / "x.gguf")], "not a sentencepiece model")
    one_line(capsys, export, [str(folder), str(tmp_path / "absent" / "x.gguf")], "cannot write the model")
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"not a checkpoint" and not list(tmp_path.glob("*.gguf*"))


def one_line(capsys, module, argv, words):
    assert module.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


@pytest.mark.parametrize("module", ["train", "export"])
def test_without_torch_the_error_says_what_to_install(tmp_path, module):
    code = ("import runpy, sys; sys.modules['torch'] = None; "
            f"runpy.run_module('training.{module}', run_name='__main__')")
    argv = [sys.executable, "-c", code, "--out", str(tmp_path / "run")]
    p = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and "pip install 'tinymia[train]'" in p.stderr
    assert not list(tmp_path.iterdir())
