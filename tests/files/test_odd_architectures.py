"""Files of every architecture with more, less or other things in them than it has: computed as they mean, or refused.

The judge is llama.cpp, as in test_odd_files.py. Each change is made to the first shape of each architecture
(architectures.py) that is not named under it; what llama.cpp makes of it stands here and is asked of it again.
"""
import architectures
import numpy as np
import pytest
from naive import nmse
from rawgguf import Raw
from test_odd_files import OTHER, SAME, add, refused, theirs, without

import tinymia
from tinymia_files import ARCHITECTURES

IDS = [1, *range(260, 300)]                                             # longer than every window
ALL = list(architectures.SHAPES)


def ones(n):
    return np.linspace(0.5, 2, n, dtype=np.float32)


def plus(name, *dims, numbers=None):
    """Put a tensor in; where dims are widths of the model by their metadata keys, they are looked up."""
    def change(g, arch):
        sizes = dict((k.removeprefix(f"{arch}."), v) for k, _, v in g.kv)
        head = sizes.get("attention.key_length", sizes["embedding_length"] // sizes["attention.head_count"])
        sizes |= {"head": head, "queries": head * sizes["attention.head_count"],
                  "keys": head * sizes["attention.head_count_kv"]}
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in dims)
        return add(g, name, shape, ones(int(np.prod(shape))) if numbers is None else numbers)
    return change


def minus(name):
    return lambda g, arch: without(g, name)


def key(name, kind, value, window=None):
    def change(g, arch):
        g = g if window is None else g.set(f"{arch}.attention.sliding_window", 4, window)
        return g.set(f"{arch}.{name}", kind, value)
    return change


def layers(more):
    return lambda g, arch: g.set(f"{arch}.block_count", 4, n_layer(g, arch) + more)


def n_layer(g, arch):
    return next(v for k, _, v in g.kv if k == f"{arch}.block_count")


def called(other):
    def change(g, arch):
        g = g.copy()
        g.kv = [(k.replace(f"{arch}.", f"{other}."), kind, other if k == "general.architecture" else v)
                for k, kind, v in g.kv]
        return g
    return change


def by_layer(name, kind, value, more=0, window=None):
    return lambda g, arch: key(name, kind, None, window)(g, arch).set(
        f"{arch}.{name}", 9, (kind, [value] * (n_layer(g, arch) + more)))


def but(*archs):
    return [arch for arch in ALL if arch not in archs]


NORMED = ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm")
HAVE = {  # which architectures have a norm; the others are refused with it
    "attn_norm": but("olmo2"), "ffn_norm": but("olmo2"), "attn_q_norm": ["qwen3", "olmo2", "gemma3"],
    "attn_k_norm": ["qwen3", "olmo2", "gemma3"], "post_attention_norm": ["olmo2", "gemma2", "gemma3"],
    "post_ffw_norm": ["olmo2", "gemma2", "gemma3"],
}
WIDTH = {name: "head" if name in ("attn_q_norm", "attn_k_norm") else "embedding_length" for name in NORMED}
FFN_SCALED, FFN_FORGOTTEN = ["llama", "qwen3", "mistral3"], but("llama", "qwen3", "mistral3")
BIASED = ["llama", "mistral3", "granite"]                               # matrices other than those of q, k and v
WINDOWED = ["olmo2", "gemma2", "gemma3"]

# What is done: (the change, the verdict, the architectures).
CHANGES = {
    **{f"with {n}": (plus(f"blk.1.{n}.weight", WIDTH[n]), [f"blk.1.{n}.weight"], but(*HAVE[n])) for n in NORMED},
    **{f"without {n}": (minus(f"blk.1.{n}.weight"), [f"blk.1.{n}.weight", "missing"], HAVE[n]) for n in NORMED},
    **{f"bias of {n}": (plus(f"blk.1.{n}.bias", WIDTH[n]), [f"blk.1.{n}.bias"], ALL) for n in NORMED},
    **{f"scale of {n}": (plus(f"blk.1.{n}.scale", 1), [f"blk.1.{n}.scale"], ALL) for n in NORMED},
    "norm of attention's output": (plus("blk.1.attn_sub_norm.weight", "embedding_length"), ["attn_sub_norm"], ALL),
    "norm of the embedding": (plus("token_embd_norm.weight", "embedding_length"), ["token_embd_norm"], ALL),
    "bias of the last norm": (plus("output_norm.bias", "embedding_length"), ["output_norm.bias"], ALL),
    "no last norm": (minus("output_norm.weight"), ["output_norm.weight", "missing"], ALL),
    "q of all heads normed together": (
        lambda g, arch: plus("blk.1.attn_q_norm.weight", "queries")(without(g, "blk.1.attn_q_norm.weight"), arch),
        ["attn_q_norm"], ["qwen3", "gemma3"]),
    "q of each head normed by itself": (
        lambda g, arch: plus("blk.1.attn_q_norm.weight", "head")(without(g, "blk.1.attn_q_norm.weight"), arch),
        ["attn_q_norm"], ["olmo2"]),
    # scales
    "scale of attn_output": (plus("blk.1.attn_output.scale", 1, numbers=[3]), OTHER, ALL),
    "scale of attn_q": (plus("blk.1.attn_q.scale", 1, numbers=[3]), OTHER, but("phi3", "qwen3", "olmo2", "gemma3")),
    "scale of attn_qkv": (plus("blk.1.attn_qkv.scale", 1, numbers=[3]), OTHER, ["phi3"]),
    "scale of a part of attn_qkv": (plus("blk.1.attn_q.scale", 1, numbers=[3]), ["blk.1.attn_q.scale"], ["phi3"]),
    **{f"scale of {n}": (plus(f"blk.1.{n}.scale", 1, numbers=[3]), OTHER, FFN_SCALED)
       for n in ("ffn_gate", "ffn_up", "ffn_down")},
    "input_scale": (plus("blk.1.ffn_down.input_scale", 1, numbers=[3]), SAME, ALL),
    # biases
    "bias of attn_output": (plus("blk.1.attn_output.bias", "embedding_length"), OTHER, BIASED),
    "no bias of attn_output": (plus("blk.1.attn_output.bias", "embedding_length"), ["blk.1.attn_output.bias"],
                               but(*BIASED)),
    "bias of ffn_down": (plus("blk.1.ffn_down.bias", "embedding_length"), OTHER, BIASED),
    "no bias of ffn_down": (plus("blk.1.ffn_down.bias", "embedding_length"), ["blk.1.ffn_down.bias"], but(*BIASED)),
    "bias of attn_qkv": (plus("blk.1.attn_qkv.bias", 192), OTHER, ["phi3"]),
    "bias of the output": (plus("output.bias", 384), OTHER, ["qwen2"]),
    "no bias of the output": (plus("output.bias", 384), ["output.bias"], but("llama", "qwen2")),
    # matrices
    "an output of its own": (plus("output.weight", "embedding_length", 384), ["output.weight"], ["gemma2"]),
    "no output": (minus("output.weight"), ["output.weight", "missing"], ["olmo2"]),
    "the embedding is the output": (minus("output.weight"), OTHER, ["llama", "qwen2", "qwen3", "mistral3", "phi3"]),
    "attn_qkv beside its parts": (plus("blk.1.attn_qkv.weight", "embedding_length", 128), ["attn_qkv"],
                                  but("phi3")),
    "a gate beside the FFN in one": (plus("blk.1.ffn_gate.weight", "embedding_length", "feed_forward_length"),
                                     ["ffn_gate.weight"], ["phi3"]),
    "RoPE factors": (plus("rope_freqs.weight", 8), ["rope_freqs"], but("llama", "mistral3", "granite")),
    "factors for long contexts": (plus("rope_factors_long.weight", 8), ["rope_factors_long"], but("phi3")),
    "long factors of another width": (plus("rope_factors_long.weight", 16), ["rope_factors_long", "16", "8"], ["phi3"]),
    "attention sinks": (plus("blk.1.attn_sinks.weight", "attention.head_count"), ["attn_sinks"], ALL),
    "an expert's router": (plus("blk.1.ffn_gate_inp.weight", "embedding_length", 4), ["ffn_gate_inp"], ALL),
    "layers of several kinds of input": (plus("per_layer_model_proj.weight", 64, 2), ["per_layer_model_proj"], ALL),
    "an unknown tensor": (plus("xyz", 4), ["xyz"], ALL),
    # metadata
    "a layer fewer": (layers(-1), ["layer", "layers"], ALL),
    "a layer more": (layers(1), ["missing"], ALL),
    "experts": (key("expert_count", 4, 2), ["expert_count"], ALL),
    "head counts of a layer too few": (by_layer("attention.head_count_kv", 4, 2, -1), ["head_count_kv", "layers"],
                                       ALL),
    "head counts of a layer too many": (by_layer("attention.head_count_kv", 4, 2, 1), ["head_count_kv", "layers"], ALL),
    "no scale of the logits": (lambda g, arch: g.drop("granite.logit_scale"), ["logit_scale", "missing"], ["granite"]),
    "no multipliers": (lambda g, arch: g.drop("granite.attention.scale", "granite.residual_scale",
                                              "granite.embedding_scale"), OTHER, ["granite"]),
    "multipliers of another": (lambda g, arch: key("residual_scale", 6, 0.5)(key("embedding_scale", 6, 0.5)(
        key("attention.scale", 6, 0.5)(key("logit_scale", 6, 0.5)(g, arch), arch), arch), arch), SAME, but("granite")),
    "soft caps of another": (lambda g, arch: key("attn_logit_softcapping", 6, 5.0)(
        key("final_logit_softcapping", 6, 5.0)(g, arch), arch), SAME, but("gemma2", "gemma3")),
    "a cap of scores in gemma3": (key("attn_logit_softcapping", 6, 0.5), SAME, ["gemma3"]),
    "a cap of logits": (key("final_logit_softcapping", 6, 0.5), OTHER, ["gemma2", "gemma3"]),
    "images that go into layers": (key("deepstack_mapping", 9, (5, [-1, -1])), SAME, ["granite"]),
    # windows
    "a window where there is none": (key("attention.sliding_window", 4, 5), SAME, but(*WINDOWED)),
    "another window": (key("attention.sliding_window", 4, 5), OTHER, WINDOWED),
    "a window by its layers": (by_layer("attention.sliding_window_pattern", 7, True, window=5), OTHER, WINDOWED),
    "a pattern of numbers": (by_layer("attention.sliding_window_pattern", 6, 1.0, window=5), ["sliding_window_pattern"],
                             WINDOWED),
    "no window, though a pattern": (key("attention.sliding_window_pattern", 4, 2, window=0), SAME, ["olmo2"]),
    # the meaning of positions
    "yarn": (lambda g, arch: key("rope.scaling.factor", 6, 4.0)(key("rope.scaling.original_context_length", 4, 16)(
        key("rope.scaling.type", 8, "yarn")(g, arch), arch), arch), OTHER, but("mistral3", "phi3")),
    "an unknown scaling": (key("rope.scaling.type", 8, "su"), ["rope scaling 'su'"], but()),
    "not the name of its layout": (called("phi3"), ["ffn_up.weight"], but("phi3", "olmo2", "gemma2", "gemma3")),
}
# Read by llama.cpp's loader and forgotten by its graph: what the file means is not certain.
STRICTER = {
    **{f"forgotten scale of {n}": (plus(f"blk.1.{n}.scale", 1, numbers=[3]), [f"blk.1.{n}.scale", "llama.cpp"],
                                   [a for a in FFN_FORGOTTEN if (n, a) != ("ffn_gate", "phi3")])
       for n in ("ffn_gate", "ffn_up", "ffn_down")},
    "bias of a part of attn_qkv": (plus("blk.1.attn_q.bias", "queries"), ["blk.1.attn_q.bias", "attn_qkv"], ["phi3"]),
    "bias of the embedding as output": (lambda g, arch: add(without(g, "output.weight"), "output.bias", (384,),
                                                            ones(384)), ["output.bias"], ["qwen2"]),
    "not causal": (key("attention.causal", 7, False), ["attention.causal"], ALL),
    "YaRN begins at 0 turns": (key("rope.scaling.yarn_beta_fast", 6, 0.0), ["yarn_beta_fast is 0"], ["mistral3"]),
    "YaRN ends at 0 turns": (key("rope.scaling.yarn_beta_slow", 6, 0.0), ["yarn_beta_slow is 0"], ["mistral3"]),
    "a list of windows for more layers": (by_layer("attention.sliding_window_pattern", 7, True, 1, window=5),
                                          ["sliding_window_pattern"], WINDOWED),
    "a list of windows for fewer layers": (by_layer("attention.sliding_window_pattern", 7, True, -1, window=5),
                                           ["sliding_window_pattern"], WINDOWED),
    "images into layer 0": (key("deepstack_mapping", 9, (5, [-1, 0])), ["deepstack_mapping"], ["granite"]),
    "logits scaled by 0": (key("logit_scale", 6, 0.0), ["logit_scale"], ["granite"]),
}
# llama.cpp gives up on these, and they can mean one thing only.
LOOSER = {
    "a window in no layer": (by_layer("attention.sliding_window_pattern", 7, False, window=5), None, WINDOWED),
}
EACH = [(arch, name) for name, (_, _, archs) in (CHANGES | STRICTER).items() for arch in archs]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """raw(arch): the first shape of an architecture, and its logits."""
    folder, made = tmp_path_factory.mktemp("odd"), {}

    def first(arch):
        if arch not in made:
            path = architectures.write(folder / f"{arch}.gguf", arch, next(iter(architectures.SHAPES[arch])))
            made[arch] = Raw.read(path), tinymia.load(path, threads=1).run(IDS).logits
        return made[arch]

    return first


def test_every_architecture_is_tried():
    assert set(ALL) == set(ARCHITECTURES)


@pytest.mark.parametrize("arch, name", EACH, ids=" ".join)
def test_computed_as_it_means_or_refused_by_name(raw, tmp_path, arch, name):
    change, verdict, _ = (CHANGES | STRICTER)[name]
    g, plain = raw(arch)
    path = change(g, arch).write(tmp_path / "f.gguf")
    if isinstance(verdict, list):
        return refused(path, *verdict)
    assert np.array_equal(tinymia.load(path, threads=1).run(IDS).logits, plain) == (verdict == SAME)


@pytest.mark.parametrize("arch, name", EACH, ids=" ".join)
def test_llama_cpp_says_the_same(raw, tmp_path, monkeypatch, arch, name):
    monkeypatch.setenv("GGML_NO_BACKTRACE", "1")
    change, verdict, _ = (CHANGES | STRICTER)[name]
    path = change(raw(arch)[0], arch).write(tmp_path / "f.gguf")
    logits = theirs(path, IDS)
    if name in STRICTER:
        assert logits is not None
    elif isinstance(verdict, list):
        assert logits is None
    else:
        assert nmse(tinymia.load(path, threads=1).run(IDS).logits, logits) <= 1e-10


@pytest.mark.parametrize("arch, name", [(arch, name) for name, (_, _, archs) in LOOSER.items() for arch in archs])
def test_a_window_in_no_layer_is_none(raw, tmp_path, monkeypatch, arch, name):
    monkeypatch.setenv("GGML_NO_BACKTRACE", "1")
    path = LOOSER[name][0](raw(arch)[0], arch).write(tmp_path / "f.gguf")
    model = tinymia.load(path, threads=1)
    assert not any(layer.window for layer in model.config.layers) and model.run(IDS).logits.size
