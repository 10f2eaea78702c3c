"""The names of the tensors that `forward` computes: the table of all, those that a model has, and patterns of names.

The table is in the order of computation. Most names are those of llama.cpp. It leaves some tensors without a name, and
gives others the same one: docs/names.md says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from tinymia_files import Config, UnknownName, short

from . import given


class Op(NamedTuple):
    """A line of the table below, as it applies to one layer of a model."""

    base: str                   # name without its layer
    op: str                     # ggml's name of the operation
    dims: tuple[str, ...]       # shape in NumPy's order
    inputs: tuple[str, ...]     # x is the residual stream; A|B is A, or B in a model that has no A
    weight: str | None          # GGUF name without blk.L. and .weight
    part: str                   # the part that a model must have for this line (Config.has); -: all models have it


def _ops(table: str) -> list[Op]:
    rows = [line.split() for line in table.strip().splitlines()]
    return [Op(base, op, tuple(dims.split(",")), tuple(inputs.split(",")), None if weight == "-" else weight, part)
            for base, op, dims, inputs, weight, part in rows]


BEFORE = _ops("""
    inp_embd    get_rows  n_tok,n_embd  tokens    token_embd  -
    inp_scaled  scale     n_tok,n_embd  inp_embd  -           embedding_scale
""")
LAYER = _ops("""
    norm         rms_norm  n_tok,n_embd            x                          -           attn_norm
    attn_norm    mul       n_tok,n_embd            norm                       attn_norm   attn_norm
    Qcur_pre     mul_mat   n_tok,n_head,d_head     attn_norm|x                attn_q      -
    Kcur_pre     mul_mat   n_tok,n_head_kv,d_head  attn_norm|x                attn_k      -
    Vcur         mul_mat   n_tok,n_head_kv,d_head_v  attn_norm|x              attn_v      -
    norm_q       rms_norm  n_tok,n_head,d_head     Qcur_pre                   -           attn_q_norm
    Qcur_normed  mul       n_tok,n_head,d_head     norm_q                     attn_q_norm  attn_q_norm
    norm_k       rms_norm  n_tok,n_head_kv,d_head  Kcur_pre                   -           attn_k_norm
    Kcur_normed  mul       n_tok,n_head_kv,d_head  norm_k                     attn_k_norm  attn_k_norm
    Qcur         rope      n_tok,n_head,d_head     Qcur_normed|Qcur_pre       -           rope
    Kcur         rope      n_tok,n_head_kv,d_head  Kcur_normed|Kcur_pre       -           rope
    Qcur_attn_temp_scaled  mul  n_tok,n_head,d_head  Qcur|Qcur_normed|Qcur_pre  -         temperature
    Qcur_scaled  scale     n_tok,n_head,d_head     Qcur|Qcur_normed|Qcur_pre  -           scale_queries
    kq           mul_mat   n_head,n_tok,n_kv       QUERY,KEY                  -           -
    kq_scaled_2  soft_cap  n_head,n_tok,n_kv       kq                         -           attn_soft_cap
    kq_soft_max  soft_max  n_head,n_tok,n_kv       kq_scaled_2|kq             -           -
    kqv          mul_mat   n_head,n_tok,d_head_v   kq_soft_max,Vcur           -           -
    kqv_merged   cont      n_tok,n_head*d_head_v   kqv                        -           -
    kqv_out      mul_mat   n_tok,n_embd            kqv_merged                 attn_output  -
    kqv_out_scaled  scale  n_tok,n_embd            kqv_out                    -           residual_scale
    norm_attn_post  rms_norm  n_tok,n_embd         kqv_out_scaled|kqv_out     -           post_attention_norm
    attn_post_norm  mul    n_tok,n_embd            norm_attn_post             post_attention_norm  post_attention_norm
    ffn_inp      add       n_tok,n_embd            ATTENTION,x                -           -
    norm_ffn     rms_norm  n_tok,n_embd            ffn_inp                    -           ffn_norm
    ffn_norm     mul       n_tok,n_embd            norm_ffn                   ffn_norm    ffn_norm
    ffn_gate     mul_mat   n_tok,n_ff              ffn_norm|ffn_inp           ffn_gate    -
    ffn_up       mul_mat   n_tok,n_ff              ffn_norm|ffn_inp           ffn_up      -
    ffn_silu     silu      n_tok,n_ff              ffn_gate                   -           silu
    ffn_gelu     gelu      n_tok,n_ff              ffn_gate                   -           gelu
    ffn_gate_par mul       n_tok,n_ff              ffn_silu|ffn_gelu,ffn_up   -           -
    ffn_out      mul_mat   n_tok,n_embd            ffn_gate_par               ffn_down    -
    ffn_out_scaled  scale  n_tok,n_embd            ffn_out                    -           residual_scale
    norm_ffn_post  rms_norm  n_tok,n_embd          ffn_out_scaled|ffn_out     -           post_ffw_norm
    ffn_post_norm  mul     n_tok,n_embd            norm_ffn_post              post_ffw_norm  post_ffw_norm
    l_out        add       n_tok,n_embd            FFN,ffn_inp                -           -
""".replace("QUERY", "Qcur_attn_temp_scaled|Qcur_scaled|Qcur|Qcur_normed|Qcur_pre").replace(
    "KEY", "Kcur|Kcur_normed|Kcur_pre").replace("ATTENTION", "attn_post_norm|kqv_out_scaled|kqv_out").replace(
    "FFN", "ffn_post_norm|ffn_out_scaled|ffn_out"))
AFTER = _ops("""
    norm           rms_norm  n_tok,n_embd   x                  -            -
    result_norm    mul       n_tok,n_embd   norm               output_norm  -
    result_output  mul_mat   n_tok,n_vocab  result_norm        output       result_output
    result_output_pre  mul_mat  n_tok,n_vocab  result_norm     output       result_output_pre
    result_output  scale     n_tok,n_vocab  result_output_pre  -            logit_scale
    result_output  soft_cap  n_tok,n_vocab  result_output_pre  -            logit_soft_cap
""")
LLAMA = {"-", "attn_norm", "rope", "ffn_norm", "silu", "result_output"}     # parts that every Llama has
ALIASES = {"kq_soft_max_ext": "kq_soft_max", "kqv_merged_cont": "kqv_merged"}  # mia's names of December 2023


def name_table(c: Config | int) -> dict[str, tuple[Op, int | None]]:
    """Every exact name of a model, in the order of computation, with its op and layer; of a Llama, where only the
    number of layers is given."""
    n_layer = c if isinstance(c, int) else c.n_layer

    def there(table: list[Op], il: int | None) -> Iterator[Op]:
        found = ["tokens", "x"]
        for op in table:
            if op.part in LLAMA if isinstance(c, int) else c.has(op.part, il):
                inputs = [next(name for name in one.split("|") if name in found) for one in op.inputs]
                found.append(op.base)
                yield op._replace(inputs=tuple(inputs))

    names: dict[str, tuple[Op, int | None]] = {op.base: (op, None) for op in there(BEFORE, None)}
    names.update({f"{op.base}-{il}": (op, il) for il in range(n_layer) for op in there(LAYER, il)})
    return names | {op.base: (op, None) for op in there(AFTER, None)}


def stream(c: Config, il: int) -> str:
    """The name of the residual stream that layer il reads; for il = n_layer, that of the last layer's output."""
    return f"l_out-{il - 1}" if il else "inp_embd" if c.embedding_scale is None else "inp_scaled"


def exact(pattern: str, names: Mapping[str, Any]) -> str:
    """The one exact name that a pattern means. Raises UnknownName, also for a pattern that means several."""
    meant = match(pattern, names)
    if len(meant) > 1:
        raise UnknownName(f"{pattern!r} is {len(meant)} tensors, {meant[0]} to {meant[-1]}: read one at a time")
    return meant[0]


def match(pattern: str, names: Mapping[str, Any]) -> list[str]:
    """Exact names for an exact name, a base name (every layer), a glob or `all`; never a substring.

    `norm` is an exact name, that of the final norm; `norm-*` are those of the layers. Raises UnknownName, which gives
    the closest names.
    """
    if not isinstance(pattern, str):
        raise UnknownName(f"a tensor is chosen by its name, such as l_out-3, and not by {short(pattern)}")
    base, dash, layer = pattern.partition("-")
    pattern = ALIASES.get(base, base) + dash + layer
    if pattern in names:
        return [pattern]
    hits = [n for n in names if pattern == "all" or fnmatchcase(n, pattern) or n.startswith(f"{pattern}-")]
    if not hits:
        bases = dict.fromkeys(n.rpartition("-")[0] or n for n in names)
        layers = [n for n in names if n.startswith(f"{pattern.partition('-')[0]}-")]
        hint = given.closest(pattern, [*bases, *names])
        if layers and layer.isdecimal() and layer == str(int(layer)):
            last = max(int(n.rpartition("-")[2]) for n in names if "-" in n)
            hint = (f": this model has layers 0 to {last}, {layers[0]} to {layers[-1]}" if int(layer) > last else
                    f": layer {layer} of this model does without it; the first that has it is {layers[0]}")
        raise UnknownName(f"no tensor is called {pattern!r}{hint}")
    return hits
