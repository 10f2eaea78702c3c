"""--pairs: a command over many pairs of prompts. The single-prompt commands judge it, and NumPy its statistics."""
import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from conftest import real_model
from pictures import colour

import tinymia
from tinymia_lab import PairsResult, ablate, attribute, lens, over_pairs, sweep
from tinymia_lab.commands import over_pairs as here
from tinymia_lab.flags.command import Command
from tinymia_lab.measure.pair_sets import KEYS, ROLES, Pair, by_role, cut_pairs, names, read_pairs

NAME = "copycat-capitals"
GOOD = {"clean": "Egypt -> Cairo, France ->", "corrupt": "Egypt -> Cairo, Norway ->", "answer": "Paris",
        "against": "Oslo"}
COMMANDS = ("sweep", "attribute", "ablate", "attend", "lens")


@pytest.fixture
def model(copycat_f32):
    return copycat_f32


@pytest.fixture
def three():
    return read_pairs(NAME)[:3]


def written(tmp_path, data):
    path = tmp_path / "p.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------- the shipped files


def test_ten_relations_and_more_ship_with_the_lab():
    real = [name for name in names() if not name.startswith("copycat-")]
    assert len(real) >= 10 and {"capitals", "past-tense", "indirect-object"} <= set(real)


@pytest.mark.parametrize("name", names())
def test_a_shipped_file_has_twelve_pairs_that_differ_and_align(name):
    pairs = read_pairs(name)
    assert len(pairs) >= 12 and all(set(pair) == set(KEYS) for pair in pairs)


@pytest.mark.parametrize("name", names())
def test_the_prompts_of_a_shipped_pair_have_the_same_number_of_tokens(name):
    """Under the bundled model for its own words, and under a real one, whose answers are single tokens."""
    own = name.startswith("copycat-")
    loaded, pairs = tinymia.load("copycat" if own else real_model(), numerics="f32"), read_pairs(name)
    for text, pair in zip(pairs, cut_pairs(loaded, pairs, [(p["clean"], p["corrupt"]) for p in pairs], True)):
        assert len(pair.clean) == len(pair.corrupt) and pair.clean != pair.corrupt
        assert own or len(loaded.tokenize(f" {text['answer']}", bos=False)) == 1, text


# ---------------------------------------------------------------------------------------- what lines positions up


def test_positions_are_lined_up_by_what_they_are_for_the_pair():
    one = Pair((1, 2, 3, 4, 5), (1, 2, 9, 4, 5), 0, 1)
    assert one.roles() == {"before": [0, 1], "last changed": [2], "after": [3], "last": [4]}
    three = Pair((1, 2, 3, 4, 5, 6), (1, 8, 3, 9, 7, 6), 0, 1)
    assert three.roles() == {"before": [0], "first changed": [1], "between": [2, 3], "last changed": [4], "last": [5]}
    end = Pair((1, 2), (1, 3), 0, 1)
    assert end.roles() == {"before": [0], "last": [1]}


def test_a_number_of_a_group_is_the_mean_over_its_positions():
    x = np.array([[1.0, 3.0, 5.0, 7.0, 9.0]])
    found = by_role(x, Pair((1, 2, 3, 4, 5), (1, 2, 9, 4, 5), 0, 1))
    np.testing.assert_array_equal(found[0], [2, np.nan, np.nan, 5, 7, 9])      # in the order of ROLES


# ---------------------------------------------------------------------------------------- against single prompts


def test_mean_and_standard_error_are_those_of_the_single_sweeps(model, three):
    found = over_pairs(model, "sweep", three, tensor="kqv")
    single = np.array([sweep(model, *p.values(), tensor="kqv").logit_difference for p in three])
    np.testing.assert_array_equal(found.values[:, 0], single)
    np.testing.assert_allclose(found.mean[0], single.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.error[0], single.std(0, ddof=1) / np.sqrt(3), rtol=1e-9, atol=1e-15)
    assert (found.n[0] == 3).all()


def test_a_sweep_by_position_has_the_cells_of_the_single_one_at_the_words_that_differ(model, three):
    found = over_pairs(model, "sweep", three)
    for i, p in enumerate(three):
        one = sweep(model, *p.values())
        np.testing.assert_array_equal(found.values[i, 0, :, ROLES.index("last")], one.logit_difference[:, -1])
        (differ,) = [j for j, column in enumerate(one.columns) if "/" in column]
        role = ROLES.index("last changed")
        np.testing.assert_array_equal(found.values[i, 0, :, role], one.logit_difference[:, differ])


def test_the_cells_of_an_attribution_add_up_to_the_logit_difference(model, three):
    found = over_pairs(model, "attribute", three)
    np.testing.assert_allclose(np.nansum(found.values, axis=(1, 2, 3)), found.clean, rtol=1e-6)
    one = attribute(model, three[1]["clean"], three[1]["answer"], three[1]["against"])
    np.testing.assert_array_equal(found.values[1, 0, 1:-1, : model.config.n_head], one.heads)


@pytest.mark.parametrize("how", [{}, {"layers": "2"}, {"mode": "resample"}])
def test_an_ablation_has_the_effects_of_the_single_ones(model, three, how):
    found = over_pairs(model, "ablate", three, **how)
    p = three[0]
    more = {"other": p["corrupt"]} if how.get("mode") == "resample" else {}
    one = ablate(model, p["clean"], p["answer"], p["against"], **how, **more)
    np.testing.assert_array_equal(found.values[0], one.effects)


def test_attention_to_the_word_that_differs_is_read_off_the_patterns(model, three):
    found = over_pairs(model, "attend", three)
    ids = [model.tokenize(three[0][key]) for key in ("clean", "corrupt")]
    (at,) = np.flatnonzero(np.array(ids[0]) != np.array(ids[1]))
    run = model.run(ids[0], keep=["kq_soft_max"])
    for il in range(model.config.n_layer):
        np.testing.assert_allclose(found.values[0, 0, il], run[f"kq_soft_max-{il}"][:, -1, at], rtol=1e-6)


def test_a_lens_has_the_probabilities_of_the_single_one(model, three):
    found = over_pairs(model, "lens", three)
    one = lens(model, three[0]["clean"], target=three[0]["answer"])
    last = ROLES.index("last")
    np.testing.assert_allclose(found.values[0, 0, :, last], one.target_probability[:, -1], rtol=1e-5)
    np.testing.assert_array_equal(found.values[0, 1, :, last], one.target_rank[:, -1])


def test_prompts_of_different_lengths_are_averaged_together(model, three):
    longer = {"clean": "Italy -> Rome, Egypt -> Cairo, Poland ->", "answer": "Warsaw", "against": "Athens",
              "corrupt": "Italy -> Rome, Egypt -> Cairo, Greece ->"}
    shorter = {**GOOD, "clean": "Egypt -> Cairo, Norway ->", "corrupt": "Egypt -> Cairo, France ->",
               "answer": "Oslo", "against": "Paris"}
    found = over_pairs(model, "sweep", [longer, shorter])
    assert found.n[0, 0].tolist() == [2, 0, 0, 2, 0, 2]
    assert found.mean[0, -1, ROLES.index("last")] == pytest.approx(1)


# ---------------------------------------------------------------------------------------- work


@pytest.mark.parametrize("command", COMMANDS)
def test_workers_find_what_one_does(model, three, command):
    with ThreadPoolExecutor(2) as pool:
        a, b = over_pairs(model, command, three, executor=pool), over_pairs(model, command, three)
    np.testing.assert_array_equal(a.values, b.values)


def test_workers_may_be_processes_and_their_errors_name_the_pair(model, three):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = over_pairs(model, "attribute", three[:2], executor=pool)
        np.testing.assert_array_equal(found.values, over_pairs(model, "attribute", three[:2]).values)
        with pytest.raises(tinymia.Error, match=r"^pair 1: position 99 "):
            over_pairs(model, "ablate", three, at=99, executor=pool)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_a_stopped_run_goes_on_where_it_was(model, three, tmp_path, monkeypatch, suffix):
    path, real, calls = tmp_path / f"x{suffix}", here.measure_pair, []

    def stopping(m, work):
        calls.append(work.number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(m, work)

    monkeypatch.setattr(here, "measure_pair", stopping)
    with pytest.raises(KeyboardInterrupt):
        over_pairs(model, "attribute", three, out=path)
    kept = PairsResult.load(path)
    assert np.isfinite(kept.clean).tolist() == [True, True, False] and "2 of 3 pairs done" in repr(kept)
    found = over_pairs(model, "attribute", three, out=path)
    assert calls == [1, 2, 3, 3]
    np.testing.assert_array_equal(found.values, over_pairs(model, "attribute", three).values)
    with pytest.raises(tinymia.Error, match="another run"):
        over_pairs(model, "attribute", three[:2], out=path)


def test_one_pair_has_a_mean_and_no_standard_error(model):
    found = over_pairs(model, "attribute", [GOOD])
    assert np.isfinite(found.mean[0, 1, 0]) and np.isnan(found.error).all()


# ---------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_takes_pairs_and_writes_all_kinds_of_file(command, drawn, tmp_path, capsys):
    path = written(tmp_path, read_pairs(NAME)[:2])
    files = [tmp_path / f"x{suffix}" for suffix in (".npz", ".html", ".png")]
    assert tinymia.main([command, "--pairs", str(path), "--json", *(w for f in files for w in ("-o", str(f)))]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["command"] == command and len(said["values"]) == 2
    found, (mean, error) = PairsResult.load(files[0]), drawn(files[2]).maps
    assert found.pairs[0]["answer"] == " Paris" and found.units[0] in files[1].read_text("utf-8")
    q = found.quantities.index(found.quantity)
    numbers, there = found.mean[q], found.n[q].any(0)      # a column that no pair has is left out
    for shown in (mean, error):
        assert shown.rows == [*found.rows][::-1] and shown.columns == [*np.array(found.columns)[there]]
    i, j = np.unravel_index(np.nanargmax(np.abs(numbers)), numbers.shape)
    signs, most = bool((numbers < 0).any()), np.abs(numbers[i, j])
    end = colour(np.sign(numbers[i, j]), -1, 1, diverging=True) if signs else colour(1, 0, 1)
    assert mean.colour(found.rows[i], found.columns[j]) == end
    assert abs(float(mean.text(found.rows[i], found.columns[j]))) == pytest.approx(most, rel=0.01)
    assert tinymia.main([command, "--pairs", NAME]) == 0
    assert capsys.readouterr().out.startswith("12 of 12 pairs done; after the clean prompt")


@pytest.mark.parametrize("command,more,said", [
    ("sweep", ["--clean", "x"], "--clean does not go with --pairs"),
    ("lens", ["-p", "x"], "-p does not go with --pairs"),
    ("ablate", ["--ffn"], "--ffn does not go with --pairs"),
    ("attribute", ["--answer", "x"], "--answer does not go with --pairs"),
    ("attend", ["--ablate", "1.0"], "a change of the run does not go with --pairs"),
])
def test_flags_of_one_prompt_do_not_go_with_pairs(command, more, said, capsys):
    assert tinymia.main([command, "--pairs", NAME, *more]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len([line for line in err if line.startswith("error:")]) == 1 and said in err[-1]


def test_without_pairs_a_sweep_still_needs_its_prompts(capsys):
    assert tinymia.main(["sweep"]) == 2
    assert "it needs --clean TEXT and --corrupt TEXT" in capsys.readouterr().err


@pytest.mark.parametrize("data,said", [
    ("not JSON", "not a file of pairs"), ("", "not a file of pairs"), ([], "an empty list"), ({}, "pairs are a list"),
    ([GOOD, 7], "pair 2 must be an object"), ([GOOD, {**GOOD, "x": "y"}], "pair 2: 'x' is not a key"),
    ([{k: v for k, v in GOOD.items() if k != "against"}], "pair 1: 'against' is missing"),
    ([{**GOOD, "answer": 3}], "pair 1: answer must be a text, not 3"), ([{**GOOD, "clean": " "}], "pair 1: clean must"),
    ([{**GOOD, "answer": None}], "pair 1: answer must be a text"), ([GOOD, GOOD], "pair 2 is pair 1 again"),
    ([{**GOOD, "corrupt": GOOD["clean"]}], "pair 1: its clean and its corrupt prompt are the same"),
    ([GOOD, {**GOOD, "clean": "Egypt -> Cairo, Poland -> Warsaw, France ->"}], "pair 2: the clean prompt"),
    ([{**GOOD, "answer": "#99999"}], "pair 1: "), ([{**GOOD, "answer": "Oslo"}], "pair 1: the answer 'Oslo'"),
])
def test_a_bad_file_is_told_in_one_line_with_the_number_of_the_pair(data, said, tmp_path, capsys):
    path = written(tmp_path, data)
    assert tinymia.main(["sweep", "--pairs", str(path)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and said in errors[0]


def test_a_byte_order_mark_is_dropped_and_a_missing_file_names_those_near(tmp_path, capsys):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert read_pairs(path) == [GOOD]
    assert tinymia.main(["sweep", "--pairs", "capitls"]) == 2
    assert "closest: capitals" in capsys.readouterr().err


def test_an_attribution_does_not_need_prompts_of_the_same_length(model):
    unequal = [{**GOOD, "corrupt": "Egypt -> Cairo, Poland -> Warsaw, Norway ->"}]
    assert np.isfinite(over_pairs(model, "attribute", unequal).clean).all()
    for command, how in (("sweep", {}), ("attend", {}), ("lens", {}), ("ablate", {"mode": "resample"})):
        with pytest.raises(tinymia.Error, match=r"pair 1: the clean prompt .* has 7 tokens"):
            over_pairs(model, command, unequal, **how)


def test_every_command_that_takes_pairs_offers_the_quantities_that_it_measures():
    from importlib import import_module

    for name, kind in here.KINDS.items():
        command = import_module(f"tinymia_lab.commands.{name}").command
        assert isinstance(command, Command) and set(command.with_pairs) == set(kind.options)
        choices = {a.dest: a.choices for a in command.parser()._actions}
        offered = choices.get("metric") or choices.get("quantity") or ("logits",)
        assert list(offered) == list(kind.quantities)
