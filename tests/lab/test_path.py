"""Path patching against two whole passes, made of nothing but Model.run and Patch: no cache, no batch, no arithmetic.

First pass: the clean run with the sender's output of the corrupt run, and with every other block that writes after the
sender kept at its clean output; what the receiver computes in it is kept. Second pass: the clean run with that.
"""
import architectures
import numpy as np
import pytest
from conftest import command, prompt
from test_sweep import by_hand

import tinymia
import tinymia_lab
from tinymia import Patch
from tinymia_lab.commands.path import PathPatching, path, picture
from tinymia_lab.measure import paths

CLEAN, CORRUPT = "Egypt -> Cairo, France ->", "Egypt -> Cairo, Norway ->"
READ = {"q": "Qcur_pre", "k": "Kcur_pre", "v": "Vcur"}


def naive(model, clean, corrupt, sender, receivers, at=None):
    """Logits at the last position, float32 [n_vocab]."""
    c = model.config
    first = "inp_scaled" if c.embedding_scale is not None else "inp_embd"
    own, source = (model.run(ids, keep=[first, "kqv", "kqv_out", "ffn_out"]) for ids in (clean, corrupt))
    where = {} if at is None else {"src": at, "at": at}
    layer = c.n_layer
    frozen = []
    if sender == "embedding":
        change, after = Patch(first, source, **where), range(c.n_layer)
    elif sender.startswith("ffn-"):
        il = int(sender[4:])
        change, after = Patch(sender.replace("ffn", "ffn_out"), source, **where), range(il + 1, c.n_layer)
    else:
        il, head = map(int, sender.split("."))
        change, after = Patch(f"kqv-{il}", source, heads=head, **where), range(il + 1, c.n_layer)
        frozen.append(f"ffn_out-{il}")
    frozen += [f"{name}-{layer}" for layer in after for name in ("kqv_out", "ffn_out")]
    if receivers == ["logits"]:
        return model.run(clean, actions=[change, *(Patch(name, own) for name in frozen)]).logits[-1]
    kept, patches = [], []
    for receiver in receivers:
        if receiver.startswith("ffn-"):
            kept.append((receiver.replace("ffn", "ffn_out"), {}))
        else:
            place, read = receiver.split(":")
            layer, head = map(int, place.split("."))
            head = head if read == "q" else head * c.n_head_kv // c.n_head
            kept.append((f"{READ[read]}-{layer}", {"heads": head}))
    for name, heads in kept:        # a receiver is free itself, and all others are frozen: a first pass for each
        run = model.run(clean, keep=[name], actions=[change, *(Patch(n, own) for n in frozen if n != name)])
        patches.append(Patch(name, run, **heads))
    return model.run(clean, actions=patches).logits[-1]


def check(model, clean, corrupt, receivers, senders=None, at=None, atol=1e-4, **how):
    """The four metrics of each sender, against the definition."""
    one, zero = (model.run(ids).logits[-1] for ids in (clean, corrupt))
    answer = int(one.argmax())
    against = int(next(i for i in zero.argsort()[::-1] if i != answer))
    found = path(model, clean, corrupt, receivers, senders, answer, against, at=at, **how)
    rows = np.array([naive(model, clean, corrupt, sender, found.receivers, at) for sender in found.senders])
    ld, probability, kl, _ = by_hand(rows, one, answer, against)
    high, low = (by_hand(row, one, answer, against)[0] for row in (one, zero))
    np.testing.assert_allclose(high - found.logit_difference * (high - low), ld, rtol=0, atol=atol)
    np.testing.assert_allclose(found.probability, probability, rtol=0, atol=atol)
    np.testing.assert_allclose(found.kl, kl, rtol=0, atol=atol)
    assert np.ptp(ld) > 20 * atol or senders is not None        # that something was patched at all
    assert found.values is found.logit_difference
    return found


# ---------------------------------------------------------------------------------------- equal to two passes


@pytest.mark.parametrize("receivers", ["logits", "5.0:v", "4.1:q", "3.2:k", "ffn-5", "ffn-2",
                                       "4.1:q,4.1:k,5.0:v,ffn-5"])
def test_all_senders_of_a_receiver_on_copycat(copycat_f32, receivers):
    found = check(copycat_f32, *map(copycat_f32.tokenize, (CLEAN, CORRUPT)), receivers, atol=2e-5)
    last = max(5 if part.startswith("ffn") else 6 if part == "logits" else int(part[0]) for part in found.receivers)
    ends = {6: "ffn-5", 5: "5.3" if "ffn-5" in found.receivers else "ffn-4", 4: "ffn-3", 3: "ffn-2"}
    assert found.senders[0] == "embedding"
    assert found.senders[-1] == ("2.3" if receivers == "ffn-2" else ends[last])


@pytest.mark.parametrize("receiver", ["logits", "5.2:q", "ffn-5", "4.0:v"])
@pytest.mark.parametrize("at", [-1, 5, [5, 6]])
def test_a_sender_changes_at_some_positions_only(copycat_f32, at, receiver):
    """At -1 the change of a value reaches the last position alone, and the prompts differ at 5."""
    senders = ["2.1", "ffn-3", "embedding"]
    found = check(copycat_f32, *map(copycat_f32.tokenize, (CLEAN, CORRUPT)), receiver, senders, at)
    assert found.about["settings"]["at"] == ([at % 7] if isinstance(at, int) else at)


WIDTHS = dict(n_head=4, n_head_kv=2, d_head=24, d_head_v=16)
SHAPES = {"qwen3": ("grouped heads", WIDTHS), "gemma2": ("caps and windows", WIDTHS),
          "granite": ("four multipliers", WIDTHS), "olmo2": ("windows by a list", dict(n_head_kv=2, d_head_v=32)),
          "smollm3": ("every fourth layer without RoPE", WIDTHS), "phi3": ("all in one", WIDTHS)}


@pytest.mark.parametrize("numerics", ["f32", "plain"])
@pytest.mark.parametrize("arch", SHAPES)
def test_grouped_heads_odd_widths_norms_behind_blocks_and_scales(tmp_path, arch, numerics):
    """Keys 24 wide, values 16, two heads per key; gemma and olmo norm what a block has made before it is added."""
    name, more = SHAPES[arch]
    model = tinymia.load(architectures.write(tmp_path / "x.gguf", arch, name, **more), threads=1, numerics=numerics)
    clean = prompt(12)
    last = model.config.n_layer - 1
    for receiver in (f"{last}.3:v", f"{last}.1:k", f"{last}.2:q", f"ffn-{last}", "logits"):
        check(model, clean, [*clean[:4], clean[4] + 1, *clean[5:]], receiver, ["embedding", "0.1", "0.2", "ffn-0"])


@pytest.mark.parametrize("how", [{"wtype": "Q4_0", "n_head_kv": 1}, {"wtype": "Q8_0", "bias": True}], ids=str)
@pytest.mark.parametrize("receiver", ["1.1:v", "1.1:q", "ffn-1", "logits"])
def test_rounded_activations(load, how, receiver):
    """With ggml's rounding a stream that differs in its last bit may be rounded to another step."""
    clean = prompt(11)
    check(load(**how), clean, [*clean[:6], 9, *clean[7:]], receiver, atol=2e-3)


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_batches_of_any_size(copycat_f32, monkeypatch, rows):
    whole = path(copycat_f32, CLEAN, CORRUPT, "4.1:v")
    monkeypatch.setattr(paths, "ROWS", rows)
    np.testing.assert_allclose(path(copycat_f32, CLEAN, CORRUPT, "4.1:v").values, whole.values, atol=1e-6)


# ---------------------------------------------------------------------------------------- what it means


def test_a_run_into_itself_changes_nothing(copycat_f32):
    found = path(copycat_f32, CLEAN, CLEAN, "5.0:v", answer="Paris", against="Oslo", metric="kl")
    assert (found.values == 0).all() and len(found.senders) == 1 + 5 * 5


def test_a_head_of_a_group_reads_the_key_of_the_group(load):
    """And both heads of the group are told in the title."""
    model, clean = load(n_head=4, n_head_kv=2), prompt(9)
    corrupt = [*clean[:3], 17, *clean[4:]]
    one, two, three = (path(model, clean, corrupt, f"1.{head}:k", metric="kl") for head in (0, 1, 2))
    np.testing.assert_array_equal(one.kl, two.kl)
    assert not np.array_equal(one.kl, three.kl)
    assert "1.1:k (that of heads 1.0 to 1.1)" in picture(two).title


def test_a_pass_begins_at_the_receivers_layer_and_the_first_row_that_changes(copycat_f32, monkeypatch):
    seen, run = [], tinymia.Model.run

    def watch(self, ids, *args, **how):
        seen.append((len(ids), how.get("start", (None,))[0]))
        return run(self, ids, *args, **how)

    monkeypatch.setattr(tinymia.Model, "run", watch)
    clean, corrupt = map(copycat_f32.tokenize, (CLEAN, CORRUPT))
    own, source = (copycat_f32.run(ids, keep=["inp_embd", "kqv_merged", "ffn_out"]) for ids in (clean, corrupt))
    for receiver, layer, last in (("4.0:v", 4, False), ("5.0:q", 5, True), ("logits", 6, True)):
        differ = [(own["inp_embd"] != source["inp_embd"]).any(1)]
        for il in range(layer):
            heads = (own[f"kqv_merged-{il}"] != source[f"kqv_merged-{il}"]).reshape(7, 4, -1).any(-1).T
            differ += [*heads, (own[f"ffn_out-{il}"] != source[f"ffn_out-{il}"]).any(1)]
        assert len(path(copycat_f32, clean, corrupt, receiver).senders) == len(differ)
        rows = sum(bool(rows[-1]) if last else 7 - int(rows.argmax()) if rows.any() else 0 for rows in differ)
        seen.clear()
        path(copycat_f32, clean, corrupt, receiver)
        assert [one for one in seen if one[1] is not None] == [(rows, layer)] and rows > len(differ) / 2


def test_what_is_kept_is_not_made_again(copycat_f32, tmp_path, monkeypatch):
    """A file of a stopped run is completed; that of another run is refused."""
    file = tmp_path / "path.npz"
    whole = path(copycat_f32, CLEAN, CORRUPT, "5.0:v", out=file)
    half = PathPatching.load(file)
    half.kl[:9] = np.nan
    half.save(file)
    work = []
    monkeypatch.setattr("tinymia_lab.commands.path.run_batch",
                        lambda model, batch: work.extend(batch.senders) or paths.run_batch(model, batch))
    again = path(copycat_f32, CLEAN, CORRUPT, "5.0:v", out=file)
    assert {str(part) for part in work} <= set(whole.senders[:9]) and np.isfinite(again.kl).all()
    np.testing.assert_allclose(again.kl, whole.kl, atol=1e-6)
    with pytest.raises(tinymia.Error, match="holds another run"):
        path(copycat_f32, CLEAN, CORRUPT, "5.1:v", out=file)


def test_the_threads_of_an_executor_give_the_same(copycat_f32, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(paths, "ROWS", 10)
    with ThreadPoolExecutor(2) as pool:
        found = path(copycat_f32, CLEAN, CORRUPT, "4.1:v", executor=pool)
    np.testing.assert_allclose(found.values, path(copycat_f32, CLEAN, CORRUPT, "4.1:v").values, atol=1e-6)


# ---------------------------------------------------------------------------------------- mistakes and the command


@pytest.mark.parametrize("how, says", [
    (dict(receiver="5.1"), "receiver '5.1': it must be a head with what it reads, such as 5.1:q"),
    (dict(receiver="9.1:v"), "receiver 9.1:v: layer 9 is out of range: there are 6 layers, 0 to 5"),
    (dict(receiver="5.4:v"), "receiver 5.4:v: head 4 is out of range: there are 4 heads, 0 to 3"),
    (dict(receiver="ffn-6"), "layer 6 is out of range"),
    (dict(receiver="logits,5.1:v"), "receiver logits: it goes alone"),
    (dict(receiver=[]), "no receiver: name one or more"),
    (dict(receiver=[5]), "receiver 5: it must be a head"),
    (dict(receiver="5.1:v", sender="3"),
     "sender '3': it must be a head such as 3.2, an FFN such as ffn-4, or embedding"),
    (dict(receiver="5.1:v", sender="5.0"), "sender 5.0: it writes after 5.1:v has read"),
    (dict(receiver="ffn-3", sender="ffn-3"), "sender ffn-3: it writes after ffn-3 has read"),
    (dict(receiver="5.1:v", metric="ld"), "metric 'ld': it must be one of"),
    (dict(receiver="5.1:v", at=9), "position 9 is out of range"),
    (dict(receiver="5.1:v", corrupt="France ->"), "the prompts do not align"),
    (dict(receiver="5.1:v", corrupt=CLEAN, answer="Paris", against="Oslo"), "the prompts are the same"),
])
def test_what_there_is_no_path_for(copycat_f32, how, says):
    with pytest.raises(tinymia.Error, match=says):
        path(copycat_f32, **{"clean": CLEAN, "corrupt": CORRUPT, **how})


def test_the_command(tmp_path):
    two = ["path", "--clean", CLEAN, "--corrupt", CORRUPT]
    files = ["-o", tmp_path / "x.html", "-o", tmp_path / "x.json"]
    status, out, _ = command(*two, "--receiver", "5.0:v", "-k", "3", *files)
    assert status == 0 and "from each sender, directly to 5.0:v" in out and out.count("\n") < 24
    assert "share of the logit difference" in (tmp_path / "x.html").read_text()
    kept = PathPatching.load(tmp_path / "x.json")
    assert str(kept).splitlines()[:10] == out.splitlines()[:10]
    status, out, _ = command(*two, "--receiver", "5.0:v", "--sender", "3.2,ffn-0", "--at", "-1", "--metric", "rank",
                             "--json")
    assert status == 0 and '"senders": ["3.2", "ffn-0"]' in out.replace("\n", "").replace("  ", "")
    status, _, err = command(*two, "--receiver", "5.0")
    assert status == 2 and "it must be a head with what it reads" in err and err.count("error") == 1, err
    assert tinymia_lab.PathPatching is PathPatching
