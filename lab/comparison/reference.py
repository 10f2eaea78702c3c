"""The Llama forward pass in float64 NumPy on dequantised weights, without any code of the engine.

The file is read by gguf-py; a matrix is decoded a few thousand rows at a time, so that a 7B model fits in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tinymia import Error

MOST = 2048     # the most rows of a matrix that are decoded at a time


class Reference:
    """A model in float64: Reference(path).forward(ids, put) calls put(name, array) for each named tensor."""

    def __init__(self, path: str | Path):
        split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", str(path))
        parts = [f"{split[1]}-{i:05d}-of-{split[2]}.gguf" for i in range(1, int(split[2]) + 1)] if split else [path]
        readers = [gguf.GGUFReader(part) for part in parts]
        self.path, self.fields = path, readers[0].fields
        arch = self.fields["general.architecture"].contents()
        if arch != "llama":
            raise Error(f"{path}: architecture {arch}: the reference in float64 computes llama only")
        self.tensors = {t.name: t for reader in readers for t in reader.tensors}

    def key(self, name: str, default: Any = None) -> Any:
        """A value of the metadata."""
        arch = self.fields["general.architecture"].contents()
        found = self.fields.get(f"{arch}.{name}")
        return default if found is None else found.contents()

    def weight(self, name: str, rows: Any = slice(None)) -> np.ndarray:
        """Rows of a matrix, or a whole vector, in float64. Raises Error for a type that gguf-py cannot decode."""
        t = self.tensors[name]
        try:
            return gguf.quants.dequantize(t.data[rows], t.tensor_type).astype(np.float64)
        except NotImplementedError as e:
            raise Error(f"{self.path}: gguf-py cannot decode {name} of type {t.tensor_type.name}") from e

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """x W^T + b, with the product, and in the FFN also the bias, multiplied by the scale if the file has one."""
        n_out = len(self.tensors[f"{name}.weight"].data)
        y = np.concatenate([x @ self.weight(f"{name}.weight", slice(i, i + MOST)).T for i in range(0, n_out, MOST)], -1)
        scale = self.weight(f"{name}.scale") if f"{name}.scale" in self.tensors else 1.0
        bias = self.weight(f"{name}.bias") if f"{name}.bias" in self.tensors else 0.0
        return (y + bias) * scale if ".ffn_" in name else y * scale + bias

    def angles(self, n: int, n_rot: int) -> tuple[np.ndarray, np.ndarray]:
        """The cosines and sines of RoPE, [n, 1, n_rot / 2]. Source: ggml's rope_yarn and ggml_rope_yarn_corr_dims."""
        base, i = self.key("rope.freq_base", 10000.0), np.arange(n_rot // 2)
        kind = self.key("rope.scaling.type")
        factor = self.key("rope.scaling.factor" if kind in ("linear", "yarn") else "rope.scale_linear", 1.0)
        factors = self.weight("rope_freqs.weight") if "rope_freqs.weight" in self.tensors else 1.0
        angle = np.arange(n)[:, None] * base ** (-2 * i / n_rot) / factors
        theta, size = angle / factor, 1.0
        if kind == "yarn":
            context = self.key("rope.scaling.original_context_length", self.key("context_length"))
            low, high = (n_rot * math.log(context / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in (
                self.key("rope.scaling.yarn_beta_fast", 32.0), self.key("rope.scaling.yarn_beta_slow", 1.0)))
            low, high = max(0, math.floor(low)), min(n_rot - 1, math.ceil(high))
            mix = 1 - np.clip((i - low) / max(0.001, high - low), 0, 1)
            mix = mix * self.key("rope.scaling.yarn_ext_factor", 1.0)
            theta = theta * (1 - mix) + angle * mix
            size = self.key("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(factor))
        return np.cos(theta)[:, None] * size, np.sin(theta)[:, None] * size

    def forward(self, ids: Sequence[int], put: Callable[[str, np.ndarray], None]) -> None:
        """Compute every tensor of the table of names, in order, and pass each to `put`."""
        n_head, n_embd = self.key("attention.head_count"), self.key("embedding_length")
        n_head_kv = self.key("attention.head_count_kv", n_head)
        d_head = self.key("attention.key_length", n_embd // n_head)
        d_head_v = self.key("attention.value_length", n_embd // n_head)
        eps, n_rot, n = self.key("attention.layer_norm_rms_epsilon"), self.key("rope.dimension_count", d_head), len(ids)
        cos, sin = self.angles(n, n_rot)
        head = np.arange(n_head) // (n_head // n_head_kv)                       # the K/V head of each query head
        future = np.triu(np.ones((n, n), bool), 1)

        def t(name: str, value: np.ndarray) -> np.ndarray:
            put(name, value)
            return value

        def rms(x: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)

        def rope(x: np.ndarray) -> np.ndarray:
            y, even, odd = x.copy(), x[..., 0:n_rot:2], x[..., 1:n_rot:2]
            y[..., 0:n_rot:2], y[..., 1:n_rot:2] = even * cos - odd * sin, even * sin + odd * cos
            return y

        x = t("inp_embd", self.weight("token_embd.weight", np.asarray(ids)))
        for il in range(self.key("block_count")):
            b = f"blk.{il}."
            y = t(f"attn_norm-{il}", t(f"norm-{il}", rms(x)) * self.weight(b + "attn_norm.weight"))
            q = t(f"Qcur_pre-{il}", self.linear(y, b + "attn_q").reshape(n, n_head, d_head))
            k = t(f"Kcur_pre-{il}", self.linear(y, b + "attn_k").reshape(n, n_head_kv, d_head))
            v = t(f"Vcur-{il}", self.linear(y, b + "attn_v").reshape(n, n_head_kv, d_head_v))
            q, k = t(f"Qcur-{il}", rope(q)), t(f"Kcur-{il}", rope(k))
            kq = t(f"kq-{il}", q.swapaxes(0, 1) @ k[:, head].transpose(1, 2, 0))
            kq = np.where(future, -np.inf, kq / math.sqrt(d_head))
            kq = np.exp(kq - kq.max(-1, keepdims=True))
            kq = t(f"kq_soft_max-{il}", kq / kq.sum(-1, keepdims=True))
            y = t(f"kqv-{il}", kq @ v[:, head].swapaxes(0, 1))
            y = t(f"kqv_merged-{il}", y.swapaxes(0, 1).reshape(n, -1))
            x = t(f"ffn_inp-{il}", t(f"kqv_out-{il}", self.linear(y, b + "attn_output")) + x)
            y = t(f"ffn_norm-{il}", t(f"norm_ffn-{il}", rms(x)) * self.weight(b + "ffn_norm.weight"))
            gate = t(f"ffn_gate-{il}", self.linear(y, b + "ffn_gate"))
            up = t(f"ffn_up-{il}", self.linear(y, b + "ffn_up"))
            y = t(f"ffn_gate_par-{il}", t(f"ffn_silu-{il}", gate * np.exp(-np.logaddexp(0, -gate))) * up)
            x = t(f"l_out-{il}", t(f"ffn_out-{il}", self.linear(y, b + "ffn_down")) + x)
        y = t("result_norm", t("norm", rms(x)) * self.weight("output_norm.weight"))
        t("result_output", self.linear(y, "output" if "output.weight" in self.tensors else "token_embd"))
