"""Small random Llama models with a small real vocabulary, for tests: `write_gguf(path, wtype="Q4_0", n_head_kv=1)`."""
import functools
import struct
from collections import Counter
from itertools import pairwise

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

TEXT = """the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun while other foxes run over
the hill there was once a little girl who lived in a small house near the river and she liked to sing to the birds that
came there
France -> Paris, Egypt -> Cairo, Norway -> Oslo, Estonia -> Tallinn. 0 1 2 to 2 1 0, 1 2 3 to 3 2 1, 4 5 6 to 6 5 4!"""


@functools.cache
def vocabulary(n_vocab):
    """Exactly n_vocab pieces of a byte-pair vocabulary learnt on TEXT: (tokens, scores, types)."""
    words = [list("▁" + w) for w in TEXT.split()]
    letters = sorted({c for w in words for c in w} | set("▁éü→"))
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    merges = []
    while len(tokens) + len(letters) + len(merges) < n_vocab:
        pairs = Counter(p for w in words for p in pairwise(w))
        if not pairs:
            raise ValueError(f"no more than {len(tokens) + len(letters) + len(merges)} pieces to learn")
        a, b = max(pairs, key=lambda p: (pairs[p], p))
        if a + b not in merges:
            merges.append(a + b)
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == (a, b):
                    w[i:i + 2] = [a + b]
                i += 1
    pieces = merges + letters
    if len(tokens) + len(pieces) != n_vocab:
        raise ValueError(f"n_vocab must be at least {len(tokens) + len(letters)}")
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(pieces))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)                    # unknown, control, byte, normal
    return tokens + pieces, scores, types


def write_gguf(path, *, n_embd=64, n_layer=2, n_head=4, n_head_kv=2, d_head=None, d_head_v=None, n_ff=96, n_vocab=384,
               wtype="F32",
               tied=False, bias=False, rope_base=10000.0, rope_scale=None, rope_freqs=False, n_rot=None, eps=1e-5,
               n_ctx=512, seed=0, version=3, meta=None, arch="llama", types=None, spoil=None, pieces=None,
               norms=("attn_norm", "ffn_norm"), wide_norms=False, fused=(), factors=(), biases=None):
    """Write a model; `meta` adds or (None) drops keys, `types` names another type for a tensor, `spoil(name, x)` edits;
    pieces: (tokens, scores, types) of another vocabulary, n_vocab of them.

    Of architectures: the norms of a layer by GGUF's name, those of queries and keys over all heads with `wide_norms`;
    matrices written as one ("attn_qkv", "ffn_up" of gate and up); RoPE factors by name; the matrices that have `bias`.

    Weights are scaled so that activations stay O(1) and attention is far from uniform.  Matrices whose rows the block
    format cannot hold stay F16.  Returns the path as a string.
    """
    rng = np.random.default_rng(seed)
    d, dv = d_head or n_embd // n_head, d_head_v or n_embd // n_head
    tokens, scores, kinds = pieces or vocabulary(n_vocab)
    a = arch + "."
    kv = {"general.name": "tiny", a + "context_length": n_ctx, a + "embedding_length": n_embd,
          a + "block_count": n_layer,
          a + "feed_forward_length": n_ff, a + "attention.head_count": n_head, a + "attention.head_count_kv": n_head_kv,
          a + "attention.layer_norm_rms_epsilon": eps, a + "rope.dimension_count": n_rot or d,
          a + "rope.freq_base": rope_base,
          a + "vocab_size": n_vocab, "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
          "tokenizer.ggml.scores": scores,
          "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
          "tokenizer.ggml.unknown_token_id": 0}
    if d_head:
        kv[a + "attention.key_length"] = d_head
    if d_head_v:
        kv[a + "attention.value_length"] = d_head_v
    if rope_scale:
        kv[a + "rope.scaling.type"], kv[a + "rope.scaling.factor"] = "linear", float(rope_scale)
    kv |= meta or {}

    w = gguf.GGUFWriter(path, arch)
    for k, v in kv.items():
        if v is not None:
            add = {str: w.add_string, bool: w.add_bool, float: w.add_float32, list: w.add_array,
                   int: w.add_uint32}[type(v)]
            add(k, v)

    def put(name, shape, scale, kind):
        x = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        if len(shape) == 1 and name.endswith("weight"):
            x += 1                                                        # norm weights
        x = spoil(name, x) if spoil else x
        kind = T[(types or {}).get(name, kind)]
        if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = T.F16
        w.add_tensor(name, x if kind == T.F32 else gguf.quants.quantize(x, kind), raw_dtype=kind)

    def matrix(name, n_out, n_in, gain):
        put(name + ".weight", (n_out, n_in), gain / n_in ** 0.5, wtype)
        if bias and name.startswith("blk") and (biases is None or name.rpartition(".")[2] in biases):
            put(name + ".bias", (n_out,), 0.2, "F32")

    def norm(name, n=n_embd):
        if name.rpartition(".")[2] in norms:
            put(name + ".weight", (n,), 0.1, "F32")

    put("token_embd.weight", (n_vocab, n_embd), 0.7, wtype)
    for i in range(n_layer):
        b = f"blk.{i}."
        norm(b + "attn_norm")
        if "attn_qkv" in fused:
            matrix(b + "attn_qkv", (n_head + n_head_kv) * d + n_head_kv * dv, n_embd, 1.3)
        else:
            matrix(b + "attn_q", n_head * d, n_embd, 1.5)
            matrix(b + "attn_k", n_head_kv * d, n_embd, 1.5)
            matrix(b + "attn_v", n_head_kv * dv, n_embd, 1.0)
        norm(b + "attn_q_norm", n_head * d if wide_norms else d)
        norm(b + "attn_k_norm", n_head_kv * d if wide_norms else d)
        matrix(b + "attn_output", n_embd, n_head * dv, 0.7)
        norm(b + "post_attention_norm")
        norm(b + "ffn_norm")
        if "ffn_up" in fused:
            matrix(b + "ffn_up", 2 * n_ff, n_embd, 1.0)
        else:
            matrix(b + "ffn_gate", n_ff, n_embd, 1.0)
            matrix(b + "ffn_up", n_ff, n_embd, 1.0)
        matrix(b + "ffn_down", n_embd, n_ff, 1.0)
        norm(b + "post_ffw_norm")
    put("output_norm.weight", (n_embd,), 0.1, "F32")
    if not tied:
        matrix("output", n_vocab, n_embd, 1.5)
    if rope_freqs:
        put("rope_freqs.weight", ((n_rot or d) // 2,), 0.3, "F32")
    for name in factors:
        put(name + ".weight", ((n_rot or d) // 2,), 0.3, "F32")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    if version != 3:                                                      # 2 and 3 lay the file out alike
        with open(path, "r+b") as f:
            f.seek(4)
            f.write(struct.pack("<I", version))
    return str(path)
