"""The attention sink at position 0: what is put in front of prompts, and what is said about it."""
import numpy as np
import pytest
from conftest import command, real_model

import tinymia
from tinymia import Replace
from tinymia_files.vocab import CONTROL
from tinymia_lab.measure import sinks


class Sinking:
    """A model, no BOS of its own, in which a long constant row is added to l_out at position 0: a sink."""

    def __init__(self, model, add_bos=False):
        self.model, self.tokenizer = model, Plain(model.tokenizer, add_bos)
        rng = np.random.default_rng(0)
        self.row = 1000 * rng.standard_normal(model.config.n_embd).astype(np.float32)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def tokenize(self, text, bos=None, special=True):
        return self.tokenizer.encode(text, bool(bos), special)

    def run(self, ids, keep=(), actions=(), **how):
        sink = Replace("l_out", lambda x, ctx: x + (ctx.positions == 0).astype(np.float32)[:, None] * self.row)
        ids = self.tokenize(ids) if isinstance(ids, str) else ids
        return self.model.run(ids, keep, [sink, *actions], **how)


class Plain:
    def __init__(self, tokenizer, add_bos):
        self.of, self.add_bos = tokenizer, add_bos

    def __getattr__(self, name):
        return getattr(self.of, name)


def cosine_of_words(model, token):
    """Mean cosine of l_out between words at the start of a prompt, from a run of each."""
    words = dict.fromkeys(model.tokenize(word, bos=False)[0] for word in sinks.WORDS)
    runs = [model.run([token, w] if token is not None else [w], keep=["l_out"]) for w in words]
    found = []
    for il in range(model.config.n_layer):
        rows = np.array([run[f"l_out-{il}"][-1] for run in runs], float)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        found += [a @ b for i, a in enumerate(rows) for b in rows[:i]]
    return np.mean(found)


def test_a_model_with_a_bos_of_its_own_keeps_it(copycat):
    assert sinks.front(copycat) == (copycat.tokenizer.bos,)


def test_stories_keeps_its_own(stories):
    model = tinymia.load(stories, threads=1)
    assert sinks.front(model) == (model.tokenizer.bos,)


def test_the_token_in_front_is_the_one_after_which_words_are_the_least_alike(copycat):
    model = Sinking(copycat)
    measured = sinks.measured(model)
    for one in measured:
        assert one.likeness == pytest.approx(cosine_of_words(model, one.token), abs=1e-5)
    assert measured[-1].token is None and measured[-1].likeness > 0.9      # at position 0 all words are the same
    assert sinks.front(model) == (measured[0].token,) and measured[0].likeness < 0.5
    assert all(model.tokenizer.types[f.token] <= CONTROL for f in measured[:-1])


def test_nothing_is_put_where_nothing_is_gained(copycat):
    class NoSink(Sinking):
        run = staticmethod(copycat.run)

    model = NoSink(copycat)
    assert sinks.front(model) == ()


def test_bos_can_be_named(copycat):
    model = Sinking(copycat)
    assert sinks.front(model, "none") == sinks.front(model, None) == ()
    assert all(sinks.front(model, bos) == (2,) for bos in ("2", 2, "#2", "</s>"))
    with pytest.raises(tinymia.Error, match="bos 99999 is out of range"):
        sinks.front(model, 99999)
    with pytest.raises(tinymia.Error, match="not one token"):
        sinks.front(model, "no such token here")


def test_a_note_names_the_word_in_the_sink_its_norm_and_the_attention(copycat, capsys):
    model, ids = Sinking(copycat), copycat.tokenize("France -> Paris, Norway ->", bos=False)
    found = sinks.sink(model, ids)
    run = model.run(ids, keep=["l_out", "kq_soft_max"])
    norms = [np.linalg.norm(run[f"l_out-{il}"], axis=1) for il in range(copycat.config.n_layer)]
    ratios = [n[0] / np.median(n[1:]) for n in norms]
    assert found.layer == np.argmax(ratios) and found.norm == pytest.approx(norms[found.layer][0])
    shares = [run[f"kq_soft_max-{il}"][:, 1:, 0].mean() for il in range(copycat.config.n_layer)]
    assert found.attention == pytest.approx(np.mean(shares), abs=1e-6)
    sinks.tell_sink(model, ids)
    said = capsys.readouterr().err.splitlines()[-1]     # kernels may have been compiled before
    assert said.startswith("note: ' France' stands at position 0")
    assert f"{found.attention:.0%}" in said and f"{found.norm:.0f}" in said


def test_no_note_where_there_is_no_sink_where_a_control_token_stands_in_it_and_where_two_prompts_agree(copycat, capsys):
    sinks.tell_sink(copycat, copycat.tokenize("France ->", bos=False))          # no sink
    model = Sinking(copycat)
    sinks.tell_sink(model, [1, *copycat.tokenize("France ->", bos=False)])
    sinks.tell_sink(model, "France -> Paris, Norway ->", "France -> Paris, Egypt ->")
    assert not capsys.readouterr().err
    sinks.tell_sink(model, "France ->", "Egypt ->")
    assert "France" in capsys.readouterr().err


@pytest.fixture(scope="module")
def smol():
    return tinymia.load(real_model(), numerics="f32")


def test_on_smollm2_end_of_text_heals_the_sink_and_the_files_bos_does_not(smol):
    alike = {f.token: f.likeness for f in sinks.measured(smol)}
    assert sinks.front(smol) == (0,) and smol.tokenizer.pieces[0] == "<|endoftext|>"
    assert alike[None] > 0.95 and alike[smol.tokenizer.bos] > 0.85 and alike[0] < 0.75


@pytest.mark.parametrize("args", [
    ["lens", "-p", "France ->"], ["attend", "-p", "France ->"], ["attribute", "-p", "France ->"],
    ["sweep", "--clean", "France ->", "--corrupt", "Italy ->", "--layers", "3", "--answer", "Paris", "--against",
     "Rome"],
])
def test_the_commands_say_it(args):
    status, _, err = command(args[0], "-m", real_model(), *args[1:])
    assert status == 0 and err.count("'France' stands at position 0, which is an attention sink") == 1, err


def test_the_table_says_what_stands_in_front():
    one = ["task-vector", "present-past", "-m", real_model(), "--n-dev", "1", "--n-test", "1"]
    status, _, err = command(*one)
    assert status == 0 and "'<|endoftext|>' (#0) stands in front of every prompt" in err, err
    status, _, err = command(*one, "--bos", "none")
    assert status == 0 and "stands in front" not in err
