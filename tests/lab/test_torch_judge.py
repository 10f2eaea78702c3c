"""SmolLM2 once more, in torch, out of gguf-py's decoded weights and float64: it judges what tinymia says of this model.

Nothing of tinymia takes part in the judge but the ids of the prompts. It knows the shapes from the file's metadata, and
four ways to change a run: begin at a layer, put in a row, take away a head, look at a part of the stream.
"""
import gguf
import numpy as np
import pytest
from conftest import real_model

import tinymia
from tinymia_lab import ablate, attribute, sweep

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")

PROMPTS = [     # clean, corrupt; in the second pair a token stands in front of the words, in the first none
    ("The capital of France is", "The capital of Italy is"),
    ("<|endoftext|>go -> went, walk ->", "<|endoftext|>go -> went, see ->"),
]
LIMIT = 1e-4    # of the largest value of what is compared


class Judge:
    """A Llama in torch: weights by their GGUF names, float64."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.weights = {
            t.name.removesuffix(".weight"): torch.from_numpy(
                np.asarray(gguf.quants.dequantize(t.data, t.tensor_type), np.float64).reshape(*t.shape.tolist()[::-1]))
            for t in reader.tensors
        }

        def field(name):
            return reader.fields[f"llama.{name}"].contents()

        self.n_layer, self.n_head, self.n_head_kv = (
            field(name) for name in ("block_count", "attention.head_count", "attention.head_count_kv"))
        self.base, self.eps = field("rope.freq_base"), field("attention.layer_norm_rms_epsilon")
        self.d_head = self.weights["blk.0.attn_q"].shape[0] // self.n_head

    def embed(self, ids):
        """[n_tok, n_embd]."""
        return self.weights["token_embd"][torch.tensor(ids)]

    def norm(self, x, name):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weights[name]

    def turned(self, x):
        """RoPE on [batch, n_tok, head, d_head]: neighbours are the parts of a complex number, which is turned."""
        i = torch.arange(self.d_head // 2, dtype=torch.float64)
        angle = torch.arange(x.shape[1])[:, None] * self.base ** (-2 * i / self.d_head)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(z * turn).reshape(x.shape)

    def heads(self, x, il):
        """The outputs of the heads, [batch, n_tok, n_head, d_head], for a stream [batch, n_tok, n_embd]."""
        cur = self.norm(x, f"blk.{il}.attn_norm")
        q, k, v = ((cur @ self.weights[f"blk.{il}.attn_{p}"].T).unflatten(-1, (-1, self.d_head)) for p in "qkv")
        share = self.n_head // self.n_head_kv
        q, k, v = self.turned(q), self.turned(k).repeat_interleave(share, 2), v.repeat_interleave(share, 2)
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.d_head**0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return torch.einsum("bhqk,bkhd->bqhd", score.masked_fill(future, -torch.inf).softmax(-1), v)

    def layer(self, x, il, heads=None):
        """(stream after a layer, what its attention wrote, what its FFN wrote); `heads` in place of its own."""
        heads = self.heads(x, il) if heads is None else heads
        attention = heads.flatten(2) @ self.weights[f"blk.{il}.attn_output"].T
        x = x + attention
        cur = self.norm(x, f"blk.{il}.ffn_norm")
        gate, up = (cur @ self.weights[f"blk.{il}.ffn_{p}"].T for p in ("gate", "up"))
        ffn = (torch.nn.functional.silu(gate) * up) @ self.weights[f"blk.{il}.ffn_down"].T
        return x + ffn, attention, ffn

    def rest(self, x, first):
        """Logits at the last position, [batch, n_vocab], of streams that come before layer `first`."""
        for il in range(first, self.n_layer):
            x = self.layer(x, il)[0]
        return self.logits(x[:, -1])

    def logits(self, x):
        return self.norm(x, "output_norm") @ self.weights["token_embd"].T

    def streams(self, ids):
        """The stream before each layer and after the last: a list of [n_tok, n_embd]."""
        found = [self.embed(ids)]
        for il in range(self.n_layer):
            found.append(self.layer(found[-1][None], il)[0][0])
        return found


@pytest.fixture(scope="module")
def model():
    return tinymia.load(real_model(), numerics="f32")


@pytest.fixture(scope="module")
def judge(model):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)    # these products are small: threads would wait for each other most of the time
    with torch.inference_mode():
        yield Judge(model.path)
    torch.set_num_threads(threads)


def near(got, want):
    """Assert that no value is further off than LIMIT of the largest one."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    assert np.abs(got - want).max() <= LIMIT * np.abs(want).max()


@pytest.mark.parametrize("prompt", [p for pair in PROMPTS for p in pair])
def test_every_stream_and_all_logits_are_the_judges(model, judge, prompt):
    ids = model.tokenize(prompt)
    run, streams = model.run(ids, keep=["inp_embd", "l_out"]), judge.streams(ids)
    near(run["inp_embd"], streams[0])
    for il in range(judge.n_layer):
        near(run[f"l_out-{il}"], streams[il + 1])
    near(run.logits, judge.logits(streams[-1]))


@pytest.mark.parametrize("prompt", [pair[0] for pair in PROMPTS])
def test_an_attribution_is_the_judges(model, judge, prompt):
    """A part is what it writes at the last token, times the direction of the answer."""
    ids = model.tokenize(prompt)
    streams, table = judge.streams(ids), judge.weights["token_embd"]
    last = streams[-1][-1]
    best, second = judge.logits(last).topk(2).indices.tolist()
    scale = (last.square().mean() + judge.eps).rsqrt()
    direction = (table[best] - table[second]) * judge.weights["output_norm"] * scale
    heads, ffn = torch.zeros(judge.n_layer, judge.n_head), torch.zeros(judge.n_layer)
    for il in range(judge.n_layer):
        x, writes = streams[il][None], judge.weights[f"blk.{il}.attn_output"]
        for head, out in enumerate(judge.heads(x, il)[0, -1]):
            at = slice(head * judge.d_head, (head + 1) * judge.d_head)
            heads[il, head] = (writes[:, at] @ out) @ direction
        ffn[il] = judge.layer(x, il)[2][0, -1] @ direction
    found = attribute(model, ids, best, second)
    near([*found.heads.ravel(), *found.ffn, found.embedding], [*heads.ravel(), *ffn, streams[0][-1] @ direction])
    near(found.logit, last @ direction)


@pytest.mark.parametrize(("clean", "corrupt"), PROMPTS)
@pytest.mark.parametrize("noising", [False, True])
def test_a_sweep_is_the_judges(model, judge, clean, corrupt, noising):
    """A row of the one run's stream in place of the other's, at every layer and position."""
    ids = {"clean": model.tokenize(clean), "corrupt": model.tokenize(corrupt)}
    streams = {name: judge.streams(tokens) for name, tokens in ids.items()}
    ends = {name: judge.logits(rows[-1][-1]) for name, rows in streams.items()}
    a, b = (int(ends[name].argmax()) for name in ("clean", "corrupt"))
    source, base = ("corrupt", "clean") if noising else ("clean", "corrupt")
    n_tok, logits = len(ids["clean"]), []
    for il in range(judge.n_layer):
        x = streams[base][il + 1].repeat(n_tok, 1, 1)
        for i in range(n_tok):
            x[i, i] = streams[source][il + 1][i]
        logits.append(judge.rest(x, il + 1))
    logits = torch.stack(logits)                                                        # [n_layer, n_tok, n_vocab]
    high, low = (ends[name][a] - ends[name][b] for name in ("clean", "corrupt"))
    found = sweep(model, ids["clean"], ids["corrupt"], a, b, noising=noising)
    near(found.logit_difference, (logits[..., a] - logits[..., b] - low) / (high - low))
    near(found.probability, logits.softmax(-1)[..., a])


@pytest.mark.parametrize("prompt", [pair[0] for pair in PROMPTS])
def test_an_ablation_is_the_judges(model, judge, prompt):
    """Each head silenced alone, at every position."""
    ids = model.tokenize(prompt)
    streams = judge.streams(ids)
    plain = judge.logits(streams[-1][-1])
    best, second = plain.topk(2).indices.tolist()
    logits = []
    for il in range(judge.n_layer):
        x = streams[il].repeat(judge.n_head, 1, 1)
        heads = judge.heads(x, il)
        heads[range(judge.n_head), :, range(judge.n_head)] = 0
        logits.append(judge.rest(judge.layer(x, il, heads)[0], il + 1))
    logits = torch.stack(logits)                                                        # [n_layer, n_head, n_vocab]
    found = ablate(model, ids, best, second)
    near(found.plain[:3], [plain[best] - plain[second], plain[best], plain.softmax(-1)[best]])
    near(found.values[0], logits[..., best] - logits[..., second])
    near(found.values[2], logits.softmax(-1)[..., best])
    assert np.array_equal(found.best, logits.argmax(-1))
