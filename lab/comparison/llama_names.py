"""The names that llama.cpp gives its tensors, and ours: a table, and rules for those that only their order tells."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tinymia import Model

# llama.cpp's name and, if several tensors share it, ggml's operation: our names for them, in order of computation.
# Two of its names have another meaning here: its kqv_out is the input of Wo (our kqv_merged), its attn_out the output.
# Source: llama-graph.cpp (build_norm, build_qkv, build_attn_mha, build_ffn) and models/*.cpp, 2026.
NAMES: dict[tuple[str, str], tuple[str, ...]] = {
    ("embd", "SCALE"): ("inp_scaled",),
    ("embd", ""): ("inp_embd",),
    ("inp_scaled", ""): ("inp_scaled",),
    ("norm", "RMS_NORM"): ("norm", "norm_q", "norm_k", "norm_attn_post", "norm_ffn", "norm_ffn_post"),
    ("attn_norm", ""): ("attn_norm",),
    ("Qcur_normed", ""): ("Qcur_normed",),
    ("Kcur_normed", ""): ("Kcur_normed",),
    ("Qcur", "ROPE"): ("Qcur",),
    ("Kcur", "ROPE"): ("Kcur",),
    ("Qcur", "SCALE"): ("Qcur_scaled",),
    ("Qcur_attn_temp_scaled", ""): ("Qcur_attn_temp_scaled",),
    ("kq", ""): ("kq",),
    ("kq_scaled_2", ""): ("kq_scaled_2",),
    ("kq_soft_max", ""): ("kq_soft_max",),
    ("kqv", ""): ("kqv",),
    ("kqv_out", ""): ("kqv_merged",),
    ("attn_out", ""): ("kqv_out",),
    ("attn_post_norm", ""): ("attn_post_norm",),
    ("ffn_inp", ""): ("ffn_inp",),
    ("sa_out", ""): ("ffn_inp",),
    ("ffn_norm", ""): ("ffn_norm",),
    ("ffn_gate", ""): ("ffn_gate",),
    ("ffn_gate_b", ""): ("ffn_gate",),
    ("ffn_gate_s", ""): ("ffn_gate",),
    ("ffn_up", ""): ("ffn_up",),
    ("ffn_up_b", ""): ("ffn_up",),
    ("ffn_up_s", ""): ("ffn_up",),
    ("ffn_swiglu", ""): ("ffn_gate_par",),
    ("ffn_geglu", ""): ("ffn_gate_par",),
    ("ffn_out", ""): ("ffn_out",),
    ("ffn_post_norm", ""): ("ffn_post_norm",),
    ("l_out", ""): ("l_out",),
    ("result_norm", ""): ("result_norm",),
    ("result_output", ""): ("result_output",),
}
CUT = {"Qcur": "Qcur_pre", "Kcur": "Kcur_pre", "Vcur": "Vcur"}     # names of projections when they are cut into heads
# Tensors that have no name there, by their operation and the tensor of ours that came last.
UNNAMED = {
    ("GET_ROWS", ""): "inp_embd", ("MUL_MAT", "result_norm"): "result_output_pre", ("ADD", "kqv_out"): "ffn_inp",
    **{("SCALE", base): f"{base}_scaled" for base in ("kqv_out", "ffn_out")},
    **{("SCALE", base): "Qcur_scaled" for base in ("Qcur", "Qcur_normed", "Qcur_pre")},
}
ALL_LAYERS = {"norm": "norm_ffn_post", "ffn_post_norm": "ffn_post_norm"}     # named without a layer, one after another
FUSED = {"ffn_silu": "inside ffn_swiglu there", "ffn_gelu": "inside ffn_geglu there"}
FLASH = {name: "inside FLASH_ATTN_EXT there" for name in ("kq", "kq_scaled_2", "kq_soft_max", "kqv")}
STEPS = {  # pattern of "name OPERATION": other tensors of llama.cpp, which have no counterpart here
    r"cache_[kv]_l\d+ .*": "the KV cache",
    r"([QKV]cur|wqkv|wqkv_b)-\d+ (MUL_MAT|MUL|ADD)": "projections before they are cut into heads",
    r"[QKV]cur-\d+( \(cont\))? (RESHAPE|VIEW|CONT)": "projections as they are cut into heads",
    r"(kq_scaled_1|kq_tanh)-\d+ (SCALE|TANH)|node_\d+ (SCALE|TANH)": "steps of a soft cap",
    r".+ \(\w+\) (VIEW|PERMUTE|TRANSPOSE|RESHAPE)": "views",
    r"ffn_(gate|up|down)(_b)?-\d+ (MUL_MAT|ADD)": "products before their bias or scale",
    r"node_\d+ (MUL_MAT|GET_ROWS|FLASH_ATTN_EXT)": "unnamed",
}


class Names:
    """A translation of llama.cpp's names into ours; it must be asked in the order in which llama.cpp's tensors come."""

    def __init__(self, model: Model):
        self.table, self.seen, self.last = model.table, set[str](), ""
        self.n_layer, norm = model.config.n_layer, model.weights.blk[0].attn_q_norm
        self.cut = ("MUL_MAT", "ADD", "CONT") if norm is not None and norm.ndim > 1 else ("RESHAPE", "VIEW")
        self.before = set[str]()  # names of what a bias or a scale makes into the tensor that is ours
        self.last_of_wo = dict[str, str]()      # by layer: the operation that gives kqv_out: product, scale or bias
        self.both = set[str]()    # layers where gate and up are one matrix
        for il, block in enumerate(model.weights.blk):
            for base, w in (("ffn_gate", block.ffn_gate), ("ffn_up", block.ffn_up)):
                steps = [base, *[f"{base}_b"] * (w.bias is not None), *[f"{base}_s"] * (w.weight.scale is not None)]
                self.before |= {f"{step}-{il}" for step in steps[:-1]}
            weight, bias = block.attn_output
            self.last_of_wo[str(il)] = "ADD" if bias is not None else "MUL_MAT" if weight.scale is None else "MUL"
            self.both |= {str(il)} if block.ffn_gate.weight.name.startswith(f"blk.{il}.ffn_up") else set()

    def ours(self, name: str, op: str) -> list[str]:
        """Our exact names for a tensor of llama.cpp: two if it holds two side by side, none if it has no name here."""
        base, dash, layer = name.rpartition("-")
        base = base or layer
        if name in self.before:
            return []
        if base in ("ffn_up", "ffn_up_s") and layer in self.both:
            return self.first([f"ffn_gate-{layer}"]) + self.first([f"ffn_up-{layer}"])
        if base.startswith("node_"):
            last, dash, layer = self.last.rpartition("-")
            if last == "kqv_merged":
                our = "kqv_out" if op == self.last_of_wo[layer] else None
            else:
                our = UNNAMED.get((op, last or layer))
            return self.first([our + dash + layer * bool(dash)]) if our else []
        found = [exact + dash + layer if dash else exact for exact in NAMES.get((base, op), NAMES.get((base, ""), ()))]
        if base in CUT and op in self.cut:
            found.append(f"{CUT[base]}-{layer}")
        if not dash and base in ALL_LAYERS:
            found = [*(f"{ALL_LAYERS[base]}-{il}" for il in range(self.n_layer)), *found]
        return self.first(found)

    def first(self, names: Sequence[str]) -> list[str]:
        """A list of the first of these names that the model has and that has not come yet; empty if there is none."""
        for exact in names:
            if exact in self.table and exact not in self.seen:
                self.seen.add(exact)
                self.last = exact
                return [exact]
        return []


def step(name: str, op: str) -> str | None:
    """The kind of a tensor that has no name of ours; None if that is not known."""
    for pattern, what in STEPS.items():
        if re.fullmatch(pattern, f"{name} {op}"):
            return f"{what} ({op})" if what == "unnamed" else what
    return None
