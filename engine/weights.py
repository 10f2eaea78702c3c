"""The weights of a model as `forward` uses them: every tensor that it needs, with its shape checked, by attribute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinymia_files import GGUFError, Tensor, UnknownName, check_tensors, decode_now

from . import given


class Linear(NamedTuple):
    """A matrix and, in some models, a bias."""

    weight: Tensor              # [n_out, n_in]
    bias: np.ndarray | None     # float32 [n_out]


@dataclass(frozen=True)
class Block:
    """The weights of one layer, by their GGUF names."""

    attn_norm: np.ndarray       # [n_embd]
    attn_q: Linear              # n_embd -> n_head * d_head
    attn_k: Linear              # n_embd -> n_head_kv * d_head
    attn_v: Linear              # n_embd -> n_head_kv * d_head_v
    attn_output: Linear         # n_head * d_head_v -> n_embd
    ffn_norm: np.ndarray        # [n_embd]
    ffn_gate: Linear            # n_embd -> n_ff
    ffn_up: Linear              # n_embd -> n_ff
    ffn_down: Linear            # n_ff -> n_embd


class Weights(Mapping[str, Tensor]):
    """All weights: by GGUF name as a mapping, and as attributes for the forward pass.

    Every shape is checked against the config `c` here, so that no kernel ever sees one that was not. With `decode`,
    weights of types without a kernel are decoded at once, and a line on stderr says what that costs.
    """

    def __init__(self, tensors: dict[str, Tensor], c: Any, path: Path, decode: bool = True):
        self._tensors, self._path = dict(tensors), path
        q, k, v = c.n_head * c.d_head, c.n_head_kv * c.d_head, c.n_head_kv * c.d_head_v
        block = {
            "attn_norm": (c.n_embd,), "attn_q": (q, c.n_embd), "attn_k": (k, c.n_embd), "attn_v": (v, c.n_embd),
            "attn_output": (c.n_embd, c.n_head * c.d_head_v),
            "ffn_norm": (c.n_embd,), "ffn_gate": (c.n_ff, c.n_embd), "ffn_up": (c.n_ff, c.n_embd),
            "ffn_down": (c.n_embd, c.n_ff),
        }
        self._check_names([f"blk.{il}.{name}" for il in range(c.n_layer) for name in block], c)
        self.token_embd = self._tensor("token_embd.weight", (c.n_vocab, c.n_embd))
        self.blk = [Block(**{name: self._part(f"blk.{il}.{name}", shape) for name, shape in block.items()})
                    for il in range(c.n_layer)]
        self.output_norm = self._part("output_norm", (c.n_embd,))                   # [n_embd]
        self.output = Linear(self.token_embd, None)                                 # n_embd -> n_vocab
        if "output.weight" in tensors:
            self.output = self._part("output", (c.n_vocab, c.n_embd))
        self.rope_freqs = None                                                      # [n_rot / 2]
        if "rope_freqs.weight" in tensors:
            self.rope_freqs = self._part("rope_freqs", (c.n_rot // 2,))
        if decode:
            matrices = [w.weight for b in self.blk for w in vars(b).values() if isinstance(w, Linear)]
            decode_now(path, [self.token_embd, self.output.weight, *matrices])

    def _check_names(self, block: list[str], c: Any) -> None:
        """Refuse tensors that neither the weights below use nor files/unused.py knows to be harmless."""
        matrices, output = [name for name in block if not name.endswith("_norm")], self._tensors.get("output.weight")
        used = {"token_embd.weight", "output_norm.weight", "rope_freqs.weight"} | {f"{name}.weight" for name in block}
        used |= {f"{name}.bias" for name in matrices}
        if output is not None:
            used |= {"output.weight", "output.bias"}
            matrices += ["output"] * (output.type_name == "NVFP4")  # llama.cpp looks for no scale of another output
        check_tensors(self._tensors, used | {f"{name}.scale" for name in matrices}, matrices, c.n_layer, self._path)

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
        """A vector as float32, a matrix where it lies with the scale and the bias that may go with it.

        A scale multiplies the product: before a bias is added in the attention block, after it in the feed-forward
        block. Source: llama-graph.cpp, build_lora_mm, build_qkv and build_ffn.
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

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        raise UnknownName(f"no weight is called {name!r}{given.closest(name, self._tensors)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
