"""A small byte-level BPE vocabulary, learnt on the tests' own text by the tokenizers library, as GGUF metadata."""
import functools
import json
from itertools import pairwise

from tiny import TEXT

PLAIN = {*range(33, 127), *range(161, 173), *range(174, 256)}
LETTERS = {b: chr(b) for b in PLAIN} | {b: chr(256 + n) for n, b in enumerate(sorted({*range(256)} - PLAIN))}
MORE = """ It's we're THEY'LL don't 12 345 6789 1234567 ... !!! (ok) café naïve Ünïcödé 日本語 日本 한국 привет नमस्ते 🦙
\n\n\n\t\tindented   text    with  spaces\r\nlines def f(x): return x**2 + 1  # comment\n"""
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|python_tag|>", "<user>"]


def spell(data):
    """Bytes in GPT-2's letters."""
    return "".join(LETTERS[b] for b in data)


@functools.cache
def _learn(n_vocab):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                                                   use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=n_vocab - len(SPECIAL), initial_alphabet=list(LETTERS.values()),
                                  min_frequency=1, show_progress=False)
    library.train_from_iterator([(TEXT + MORE) * 2], trainer)
    model = json.loads(library.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    assert len(tokens) == n_vocab - len(SPECIAL), f"{len(tokens)} pieces learnt"
    return tokens, merges


def metadata(pre="llama-bpe", n_vocab=384, **more):
    """The `meta` of tiny.write_gguf; `more` are keys below tokenizer.ggml., None for none."""
    tokens, merges = _learn(n_vocab)
    first = len(tokens)
    meta = {"model": "gpt2", "pre": pre, "tokens": tokens + SPECIAL, "merges": merges, "scores": None,
            "token_type": [1] * first + [3, 3, 3, 3, 4], "bos_token_id": first, "eos_token_id": first + 1,
            "unknown_token_id": None, **more}
    return {f"tokenizer.ggml.{k}": v for k, v in meta.items()}


def naive_ids(words, tokens, merges, whole_words=False):
    """BPE as the paper has it: in each word the earliest merge of the list, again and again."""
    rank, ids = {tuple(m.split(" ")): i for i, m in enumerate(merges)}, []
    for word in words:
        parts = list(spell(word.encode()))
        if whole_words and "".join(parts) in tokens:
            parts = ["".join(parts)]
        while True:
            found = [(rank[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in rank]
            if not found:
                break
            i = min(found)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [tokens.index(p) for p in parts]
    return ids
