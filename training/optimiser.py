"""The optimiser: Muon for the matrices of the blocks, AdamW for embeddings and norms.

Muon takes the gradient of a matrix, averaged over the last steps, and replaces it by the nearest orthogonal matrix: all
directions that the gradient names are then learnt at the same speed, not only the strongest.

Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024),
https://kellerjordan.github.io/posts/muon
"""

from __future__ import annotations

import torch
from torch import Tensor

from .model import N_LAYER, Params

MATRICES = {"attn_qkv": 3, "attn_output": 1, "ffn_gate_up": 2, "ffn_down": 1}  # matrices held per layer in one tensor


def orthogonalise(g: Tensor) -> Tensor:
    """Return the nearest (semi-)orthogonal matrices to g [n, rows, cols], nearly, by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315  # chosen by the source: each step brings all singular values closer to 1
    flip = g.shape[-2] > g.shape[-1]
    x = (g.transpose(-2, -1) if flip else g).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        xx = x @ x.transpose(-2, -1)
        x = a * x + (b * xx + c * xx @ xx) @ x
    return (x.transpose(-2, -1) if flip else x).float()


class Optimiser:
    """Muon and AdamW over one dictionary of weights."""

    def __init__(self, p: Params, muon_lr: float = 0.02, adam_lr: float = 3e-3) -> None:
        self.p, self.muon_lr, self.adam_lr = p, muon_lr, adam_lr
        self.momentum = {n: torch.zeros_like(p[n]) for n in MATRICES}
        self.adam = torch.optim.AdamW([p[n] for n in p if n not in MATRICES], lr=adam_lr, betas=(0.9, 0.95),
                                      weight_decay=0.0)

    def step(self, scale: float) -> None:
        """Make one update, with both learning rates times `scale`, and clear the gradients."""
        with torch.no_grad():
            for name, parts in MATRICES.items():
                w, m = self.p[name], self.momentum[name]
                m.mul_(0.95).add_(w.grad)
                g = (w.grad + 0.95 * m).reshape(N_LAYER * parts, -1, w.shape[-1])
                shape = max(1.0, g.shape[-2] / g.shape[-1]) ** 0.5
                w.sub_(orthogonalise(g).view_as(w), alpha=self.muon_lr * scale * shape)
                w.grad = None
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
