"""The model: a Llama of 6 layers in PyTorch, and the two losses it is trained with.

It is the function that tinymia.py computes, in the same order: norm, attention, norm, SwiGLU. Only what training
needs is different. Weights are stacked over the layers, Q, K and V are one matrix, gate and up are another, and the
products are in bfloat16. RoPE rotates neighbouring pairs, as ggml's `llama` does, so that nothing is permuted on
export.

Of the 2,048 pieces of the tokenizer the corpus uses 710. Ids are compact in training: the model has one
embedding row for each piece in use, and one last row that stands for all the others. Without that shared row, the
logits of pieces that never occur would be arbitrary numbers, and now and then the largest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

N_LAYER = 6
N_EMBD = 128
N_HEAD = 4
D_HEAD = N_EMBD // N_HEAD
N_FF = 384
N_CTX = 96
RMS_EPS = 1e-5
ROPE_BASE = 10000.0
TV_LAYER = 3  # the task-vector loss patches l_out of this layer

Params = dict[str, Tensor]


def init_params(n_used: int, seed: int) -> Params:
    """Return random weights by name. The first axis of a block's weight is the layer."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=gen) * std

    s = N_EMBD**-0.5
    p = {
        "token_embd": normal(n_used, N_EMBD, std=0.05),  # also the output matrix
        "attn_norm": torch.ones(N_LAYER, N_EMBD),
        "attn_qkv": normal(N_LAYER, 3 * N_EMBD, N_EMBD, std=0.5 * s),
        "attn_output": normal(N_LAYER, N_EMBD, N_EMBD, std=0.1 * s),
        "ffn_norm": torch.ones(N_LAYER, N_EMBD),
        "ffn_gate_up": normal(N_LAYER, 2 * N_FF, N_EMBD, std=0.5 * s),
        "ffn_down": normal(N_LAYER, N_EMBD, N_FF, std=0.1 * N_FF**-0.5),
        "output_norm": torch.ones(N_EMBD),
    }
    return {name: w.requires_grad_() for name, w in p.items()}


def rope_table(n_tok: int) -> Tensor:
    """Return cos + i sin of every position and pair, complex64 [n_tok, 1, d_head/2]."""
    freq = ROPE_BASE ** (-torch.arange(0, D_HEAD, 2, dtype=torch.float32) / D_HEAD)
    angle = torch.arange(n_tok, dtype=torch.float32)[:, None] * freq
    return torch.polar(torch.ones_like(angle), angle)[:, None, :]


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply RoPE to x [n_row, n_tok, n_head, d_head]: multiply neighbouring pairs as complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """Return x @ w.T, computed in bfloat16."""
    return F.linear(x.bfloat16(), w.bfloat16())


def blocks(p: Params, x: Tensor, first: int, last: int) -> Tensor:
    """Take the residual stream x [n_row, n_tok, n_embd] through the layers first to last - 1."""
    n_row, n_tok, _ = x.shape
    rope = rope_table(n_tok)
    mask = torch.full((n_tok, n_tok), -math.inf, dtype=torch.bfloat16).triu(1)
    for il in range(first, last):
        h = F.rms_norm(x, (N_EMBD,), p["attn_norm"][il], RMS_EPS)  # [n_row, n_tok, n_embd]
        qkv = linear(h, p["attn_qkv"][il]).view(n_row, n_tok, 3, N_HEAD, D_HEAD)
        v = qkv[:, :, 2]  # [n_row, n_tok, n_head, d_head]
        q, k = (rotate(qkv[:, :, i], rope).to(v.dtype) for i in (0, 1))
        kq = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * D_HEAD**-0.5 + mask  # [n_row, n_head, n_tok, n_tok]
        kqv = kq.softmax(-1) @ v.transpose(1, 2)  # [n_row, n_head, n_tok, d_head]
        x = x + linear(kqv.transpose(1, 2).reshape(n_row, n_tok, N_EMBD), p["attn_output"][il]).float()
        h = F.rms_norm(x, (N_EMBD,), p["ffn_norm"][il], RMS_EPS)
        gate, up = linear(h, p["ffn_gate_up"][il]).chunk(2, dim=-1)  # [n_row, n_tok, n_ff] each
        x = x + linear(F.silu(gate) * up, p["ffn_down"][il]).float()
    return x


def embed(p: Params, ids: Tensor) -> Tensor:
    """Return the embedding rows of compact ids [n_row, n_tok] as the residual stream [n_row, n_tok, n_embd]."""
    return F.embedding(ids, p["token_embd"])


def logits_of(p: Params, x: Tensor, n_unseen: int) -> Tensor:
    """Return logits [.., n_used + 1] of the residual stream x [.., n_embd].

    The last row of token_embd stands for n_unseen pieces, which the exported model writes out as n_unseen equal rows.
    Their exponentials add up in the softmax; adding log(n_unseen) to the one logit here gives the same sum.
    """
    h = F.rms_norm(x, (N_EMBD,), p["output_norm"], RMS_EPS)
    out = linear(h, p["token_embd"]).float()
    offset = torch.zeros(out.shape[-1])
    offset[-1] = math.log(max(n_unseen, 1))
    return out + offset


def language_loss(p: Params, ids: Tensor, weight: Tensor, n_unseen: int) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the next-token cross entropies, and the sum of the weights.

    ids: int64 [n_row, n_tok]; weight: float32 [n_row, n_tok - 1], the weight of predicting ids[:, 1:].
    """
    x = blocks(p, embed(p, ids[:, :-1]), 0, N_LAYER)
    logits = logits_of(p, x, n_unseen)
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (each * weight.flatten()).sum(), weight.sum()


def task_vector_loss(p: Params, batch: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], n_unseen: int) -> Tensor:
    """Return the cross entropy of the answers to bare queries that got their task from elsewhere.

    The only thing that the bare query sees of the task is one row: l_out-TV_LAYER at the end of a few-shot prompt,
    which asks something else, replaces l_out-TV_LAYER at the end of the query. `batch` is from
    `Batches.task_vectors`.
    """
    src, src_at, tgt, tgt_at, weight = batch
    row = torch.arange(len(src))
    vector = blocks(p, embed(p, src), 0, TV_LAYER + 1)[row, src_at]  # [n_row, n_embd]
    x = blocks(p, embed(p, tgt[:, :-1]), 0, TV_LAYER + 1)  # [n_row, n_tok, n_embd]
    here = torch.zeros(x.shape[:2], dtype=torch.bool)
    here[row, tgt_at] = True
    x = torch.where(here[..., None], vector[:, None], x)
    logits = logits_of(p, blocks(p, x, TV_LAYER + 1, N_LAYER), n_unseen)
    each = F.cross_entropy(logits.flatten(0, 1), tgt[:, 1:].flatten(), reduction="none")
    return (each * weight.flatten()).sum() / weight.sum()
