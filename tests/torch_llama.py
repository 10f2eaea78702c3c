"""A Llama in torch, on what gguf-py decodes, with each value by its name: the judge of gradients.

Nothing of tinymia is in it. bench/gradients.py times it.
"""
import gguf
import numpy as np
import torch


class Llama:
    """Weights by their GGUF names, in float64 unless another dtype is given."""

    def __init__(self, path, dtype=torch.float64):
        self.reader, self.dtype = gguf.GGUFReader(path), dtype
        self.w = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(
            *t.shape.tolist()[::-1])).to(dtype) for t in self.reader.tensors}

    def field(self, key, default=None):
        found = self.reader.fields.get(f"llama.{key}")
        return default if found is None else found.contents()

    def forward(self, ids, t):
        """Logits [n_tok, n_vocab]; t(name, value) gives the value to go on with."""
        w, n_head, n = self.w, self.field("attention.head_count"), len(ids)
        d, eps = self.field("embedding_length") // n_head, self.field("attention.layer_norm_rms_epsilon")
        group, base = n_head // self.field("attention.head_count_kv", n_head), self.field("rope.freq_base", 10000.0)
        angle = torch.arange(n)[:, None] * base ** (-torch.arange(0, d, 2).double() / d)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        turn = turn if self.dtype == torch.float64 else turn.to(torch.complex64)

        def norm(base, name, x, weight):
            return t(name, t(base, x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()) * w[weight])

        def heads(x, name):
            return (x @ w[name].T).unflatten(-1, (-1, d))

        def turned(x):
            z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
            return torch.view_as_real(z * turn).reshape(x.shape)

        x = t("inp_embd", w["token_embd.weight"][torch.tensor(ids)].requires_grad_())
        for i in range(self.field("block_count")):
            b = f"blk.{i}."
            cur = norm(f"norm-{i}", f"attn_norm-{i}", x, b + "attn_norm.weight")
            q, k = (t(f"{p.upper()}cur_pre-{i}", heads(cur, f"{b}attn_{p}.weight")) for p in "qk")
            v = t(f"Vcur-{i}", heads(cur, b + "attn_v.weight"))
            q, k = t(f"Qcur-{i}", turned(q)), t(f"Kcur-{i}", turned(k))
            kq = t(f"kq-{i}", torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)))
            future = torch.ones(n, n, dtype=torch.bool).triu(1)
            pattern = t(f"kq_soft_max-{i}", (kq / d**0.5).masked_fill(future, -torch.inf).softmax(-1))
            cur = t(f"kqv-{i}", torch.einsum("hij,jhd->hid", pattern, v.repeat_interleave(group, 1)))
            cur = t(f"kqv_merged-{i}", cur.transpose(0, 1).flatten(1))
            x = t(f"ffn_inp-{i}", t(f"kqv_out-{i}", cur @ w[b + "attn_output.weight"].T) + x)
            cur = norm(f"norm_ffn-{i}", f"ffn_norm-{i}", x, b + "ffn_norm.weight")
            gate, up = (t(f"ffn_{p}-{i}", cur @ w[f"{b}ffn_{p}.weight"].T) for p in ("gate", "up"))
            cur = t(f"ffn_gate_par-{i}", t(f"ffn_silu-{i}", torch.nn.functional.silu(gate)) * up)
            x = t(f"l_out-{i}", t(f"ffn_out-{i}", cur @ w[b + "ffn_down.weight"].T) + x)
        cur = norm("norm", "result_norm", x, "output_norm.weight")
        return t("result_output", cur @ w["output.weight" if "output.weight" in w else "token_embd.weight"].T)

    def gradients(self, ids, metrics):
        """(value, gradient by name) for each metric, a function of the logits."""
        found = {}

        def t(name, x):
            found[name] = x
            x.retain_grad()
            return x

        logits = self.forward(ids, t)
        for value in (metric(logits) for metric in metrics):
            for x in found.values():
                x.grad = None
            value.backward(retain_graph=True)
            yield value.item(), {name: x.grad.numpy() for name, x in found.items()}
