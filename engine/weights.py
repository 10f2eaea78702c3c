"""The weights of a model as `forward` uses them: every tensor that it needs, with its shape checked, by attribute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinymia_files import ARCHITECTURES, Config, GGUFError, Tensor, UnknownName, check_tensors, decode_now

from . import given


class Linear(NamedTuple):
    """A matrix and, in some models, a bias."""

    weight: Tensor              # [n_out, n_in]
    bias: np.ndarray | None     # float32 [n_out]


@dataclass(frozen=True)
class Block:
    """The weights of one layer, by their GGUF names; None where the model has no such norm."""

    attn_q: Linear              # n_embd -> n_head * d_head
    attn_k: Linear              # n_embd -> n_head_kv * d_head
    attn_v: Linear              # n_embd -> n_head_kv * d_head_v
    attn_output: Linear         # n_head * d_head_v -> n_embd
    ffn_gate: Linear            # n_embd -> n_ff
    ffn_up: Linear              # n_embd -> n_ff
    ffn_down: Linear            # n_ff -> n_embd
    attn_norm: np.ndarray | None = None             # [n_embd]
    attn_q_norm: np.ndarray | None = None           # [d_head] of each head, or [n_head, d_head] of all together
    attn_k_norm: np.ndarray | None = None           # the same of keys
    post_attention_norm: np.ndarray | None = None   # [n_embd]
    ffn_norm: np.ndarray | None = None              # [n_embd]
    post_ffw_norm: np.ndarray | None = None         # [n_embd]


# Matrices that a file may hold as one, their rows below one another.
FUSED = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}


class Weights(Mapping[str, Tensor]):
    """All weights: by GGUF name as a mapping, and as attributes for the forward pass.

    Every shape is checked against the config `c` here, so that no kernel ever sees one that was not. Matrices that the
    file holds as one (FUSED) are used as parts of it, where they lie. With `decode`, weights of types without a kernel
    are decoded at once, and a line on stderr says what that costs.
    """

    def __init__(self, tensors: dict[str, Tensor], c: Config, path: Path, decode: bool = True):
        self._tensors, self._path, self._arch = dict(tensors), path, ARCHITECTURES[c.arch]
        q, k, v = c.n_head * c.d_head, c.n_head_kv * c.d_head, c.n_head_kv * c.d_head_v
        wide = self._arch.wide_norms
        shapes: dict[str, tuple[int, ...]] = {
            "attn_q": (q, c.n_embd), "attn_k": (k, c.n_embd), "attn_v": (v, c.n_embd),
            "attn_output": (c.n_embd, c.n_head * c.d_head_v),
            "ffn_gate": (c.n_ff, c.n_embd), "ffn_up": (c.n_ff, c.n_embd), "ffn_down": (c.n_embd, c.n_ff),
            **{name: (c.n_embd,) for name in c.norms},
        }
        qk_norms = {"attn_q_norm": c.n_head, "attn_k_norm": c.n_head_kv}
        shapes |= {name: (n * c.d_head if wide else c.d_head,) for name, n in qk_norms.items() if name in c.norms}
        self._parts: dict[str, tuple[str, int, int]] = {}       # of a fused matrix: its name, first row and end
        for il in range(c.n_layer):
            self._find_fused(f"blk.{il}.", shapes)
        self._check_names([f"blk.{il}.{name}" for il in range(c.n_layer) for name in shapes], c)
        self.token_embd = self._tensor("token_embd.weight", (c.n_vocab, c.n_embd))
        self.blk = []
        for il in range(c.n_layer):
            block = {name: self._part(f"blk.{il}.{name}", shape) for name, shape in shapes.items()}
            if wide:
                block |= {name: block[name].reshape(n, c.d_head) for name, n in qk_norms.items()}
            self.blk.append(Block(**block))
        self.output_norm = self._part("output_norm", (c.n_embd,))                   # [n_embd]
        self.output = Linear(self.token_embd, None)                                 # n_embd -> n_vocab
        if self._arch.output == "own" or "output.weight" in tensors:
            self.output = self._part("output", (c.n_vocab, c.n_embd))
        factors = {f"{name}.weight" for name in self._arch.factors if c.ropes} & self._tensors.keys()
        rope_factors = {name: self._tensor(name, (c.ropes[0].n_rot // 2,)) for name in sorted(factors)}
        self.rope_freqs = None if c.freqs is None else rope_factors[c.freqs].numpy()
        if decode:
            matrices = [w.weight for b in self.blk for w in vars(b).values() if isinstance(w, Linear)]
            decode_now(path, [self.token_embd, self.output.weight, *matrices])

    def _find_fused(self, block: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find the matrices of a layer that the file holds as one."""
        for whole in self._arch.fused:
            parts = FUSED[whole]
            apart = f"{block}{whole}.weight" not in self._tensors or f"{block}{parts[0]}.weight" in self._tensors
            if apart and whole not in parts:
                continue
            end = 0
            for name in parts:
                start, end = end, end + shapes[name][0]
                self._parts[block + name] = (block + whole, start, end)
            self._tensor(f"{block}{whole}.weight", (end, shapes[parts[0]][1]))

    def _check_names(self, block: list[str], c: Config) -> None:
        """Refuse tensors that neither the weights below use nor files/unused.py knows to be harmless."""
        arch, output = self._arch, self._tensors.get("output.weight")
        used = {"token_embd.weight", "output_norm.weight", *(f"{name}.weight" for name in arch.factors)}
        whole = {self._parts[name][0] if name in self._parts else name for name in block}
        matrices = [name for name in whole if not name.endswith("_norm")]
        used |= {f"{name}.weight" for name in whole}
        biases = {name for name in block if name.rpartition(".")[2] in arch.biases.split()}
        used |= {f"{name}.bias" for name in biases} | {f"{self._parts[n][0]}.bias" for n in biases & self._parts.keys()}
        if output is not None and arch.output != "tied":
            used |= {"output.weight", *["output.bias"] * arch.output_bias}
            matrices += ["output"] * (output.type_name == "NVFP4")  # llama.cpp looks for no scale of another output
        used |= {f"{name}.scale" for name in matrices if arch.ffn_scales or ".ffn_" not in name}
        check_tensors(self._tensors, used, matrices, c.arch, c.n_layer, self._path)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise GGUFError(f"{self._path}: tensor {name} {list(shape)} is missing")
        if tensor.shape[-len(shape):] != shape or math.prod(tensor.shape) != math.prod(shape):
            raise GGUFError(f"{self._path}: tensor {name} is {list(tensor.shape)}; the metadata ask for {list(shape)}")
        if tensor.shape != shape:  # dimensions of 1 before the others, which GGUF lists last and ggml takes for none
            self._tensors[name] = tensor.but(shape=shape)
        return self._tensors[name]

    def _part(self, name: str, shape: tuple[int, ...]) -> Any:
        """A vector as float32, or a matrix as it lies in the file, with its scale and bias if it has them."""
        if name in self._parts:
            return self._rows_of(*self._parts[name], name)
        return self._whole(name, shape)

    def _whole(self, name: str, shape: tuple[int, ...]) -> Any:
        """A vector or a matrix, in the same form, that is not joined to others in the file.

        A scale multiplies the product: in the attention block before the bias is added, in the feed-forward block
        after it. Source: llama-graph.cpp, build_lora_mm, build_qkv and build_ffn.
        """
        weight = self._tensor(f"{name}.weight", shape)
        if len(shape) == 1:
            return weight.numpy()
        bias = self._tensor(f"{name}.bias", shape[:1]).numpy() if f"{name}.bias" in self._tensors else None
        if f"{name}.scale" in self._tensors:
            scale = self._tensor(f"{name}.scale", (1,)).numpy()[0]
            weight = self._tensors[weight.name] = weight.but(scale=scale)
            if bias is not None and ".ffn_" in name:
                if weight.type_name == "NVFP4":
                    raise GGUFError(f"{self._path}: tensor {name}.scale of NVFP4 goes with no {name}.bias: which of "
                                    "the two comes first is not known (llama.cpp refuses the file too)")
                bias = bias * scale
        return Linear(weight, bias)

    def _rows_of(self, whole: str, start: int, end: int, name: str) -> Linear:
        """Some rows of a fused matrix, as a matrix of their own."""
        found = self._whole(whole, self._tensors[f"{whole}.weight"].shape)
        weight, bias = found.weight, None if found.bias is None else found.bias[start:end]
        if f"{name}.bias" in self._tensors:
            raise GGUFError(f"{self._path}: tensor {name}.bias: the matrix is a part of {whole}.weight here, and "
                            f"the bias of that is {whole}.bias (llama.cpp reads the other and does not add it)")
        raw = weight.raw.reshape(weight.shape[0], -1)[start:end].reshape(-1)
        name = f"{whole}.weight[{start}:{end}]"
        return Linear(weight.but(name=name, shape=(end - start, weight.shape[1]), raw=raw), bias)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        raise UnknownName(f"no weight is called {name!r}{given.closest(name, self._tensors)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
