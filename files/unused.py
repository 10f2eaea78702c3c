"""The tensors and keys that `forward` does not use and that a model file may hold. All others are refused by name.

llama.cpp is the judge (tests/files/test_odd_files.py asks it): it refuses a file with a tensor that its graph of the
architecture does not create, and it does not look at metadata keys that its loader of the architecture does not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .disk import note
from .errors import GGUFError, printable
from .gguf import Tensor

# Tensors without which the numbers are the same, beside a matrix that the model has or in one of its layers.
HARMLESS_TENSORS = {
    r"(?P<matrix>.+)\.input_scale":
        "scales 4-bit activations on GPUs; llama.cpp's CPU code loads it and does not use it",
    r"blk\.(?P<layer>\d+)\.attn_rot_embd\.weight":
        "the frequencies that rope.freq_base gives, stored by converters of 2023; gguf-py's MODEL_TENSOR_SKIP",
}

# Metadata keys of the architecture, without its name, that read as if they changed the numbers, and do not.
HARMLESS_KEYS = {
    "says what the file is": "vocab_size tensor_data_layout rope.scaling.finetuned",
    "llama.cpp reads it for other architectures only, so its numbers are those without it":
        "attention.scale attention.clamp_kqv attention.max_alibi_bias attention.sliding_window "
        "attention.sliding_window_pattern attention.layer_norm_epsilon attention.group_norm_epsilon "
        "attention.group_norm_groups attention.temperature_scale attention.temperature_length "
        "attention.output_scale attention.value_scale attention.shared_kv_layers attention.key_length_mla "
        "attention.value_length_mla attention.q_lora_rank attention.kv_lora_rank "
        "logit_scale residual_scale embedding_scale final_logit_softcapping attn_logit_softcapping "
        "router_logit_softcapping use_parallel_residual swin_norm rescale_every_n_layers "
        "expert_feed_forward_length expert_shared_feed_forward_length expert_shared_count expert_weights_scale "
        "expert_weights_norm expert_gating_func leading_dense_block_count interleave_moe_layer_step "
        "moe_every_n_layers decoder_start_token_id decoder_block_count token_shift_count "
        "rope.scaling.yarn_ext_factor rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast "
        "rope.scaling.yarn_beta_slow rope.scaling.yarn_log_multiplier",
    "for layers with a window, of other architectures (those that have some: hparams.py), or for sections of positions":
        "attention.key_length_swa attention.value_length_swa rope.dimension_count_swa rope.freq_base_swa "
        "rope.dimension_sections rope.scaling.alpha",
    "for embeddings and classifiers, which are taken before or instead of the logits":
        "pooling_type classifier.output_labels embedding_length_out features_length dense_2_feat_in "
        "dense_2_feat_out dense_3_feat_in dense_3_feat_out",
    "how many experts of a group are used, where there are none": "expert_group_used_count",
}

# Keys that the forward pass uses, or refuses to run with (hparams.py).
KNOWN_KEYS = """
    context_length embedding_length block_count feed_forward_length attention.head_count attention.head_count_kv
    attention.key_length attention.value_length attention.layer_norm_rms_epsilon attention.causal
    rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.type rope.scaling.factor
    rope.scaling.attn_factor rope.scaling.original_context_length
    expert_count expert_used_count expert_group_count nextn_predict_layers
"""


def check_tensors(
    tensors: Mapping[str, Tensor], used: Collection[str], matrices: Collection[str], arch: str, n_layer: int, path: Path
) -> None:
    """Raise GGUFError that names a tensor which is neither used nor harmless; matrices: their names, no .weight."""
    left = [name for name in tensors if name not in used and not _harmless(tensors[name], matrices, n_layer)]
    if not left:
        return
    name = min(left, key=lambda n: (len(n), n)) or "without a name"
    more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer and not int(layer[1]) < n_layer:
        has = f"the metadata give the model {n_layer} layers, 0 to {n_layer - 1}"
        raise GGUFError(f"{path}: tensor {name}{more} is of layer {int(layer[1])}, but {has}")
    why = f"is not part of the architecture {arch} as tinymia computes it: the numbers would be wrong without it"
    own = re.sub(r"\.weight[._]scale(_2)?$", ".scale", name)
    hint = f" (the scale of this matrix would be called {own})" if own != name and own in used else ""
    if name.endswith(".scale") and name.removesuffix(".scale") in matrices:
        hint = " (llama.cpp reads this scale and does not multiply by it, so what the file means is not certain)"
    raise GGUFError(f"{path}: tensor {name}{more} {why}{hint}")


def _harmless(tensor: Tensor, matrices: Collection[str], n_layer: int) -> bool:
    for pattern in HARMLESS_TENSORS:
        found = re.fullmatch(pattern, tensor.name)
        if found and "matrix" in found.groupdict():
            return found["matrix"] in matrices and math.prod(tensor.shape) == 1
        if found:
            return int(found["layer"]) < n_layer
    return False


def note_keys(meta: dict[str, Any], arch: str, reads: str, path: Path) -> None:
    """Say on stderr which keys of the architecture are not known: they change nothing here, nor in llama.cpp.

    reads: the keys that this architecture uses beside those that all do.
    """
    known = {*KNOWN_KEYS.split(), *reads.split(), *(key for keys in HARMLESS_KEYS.values() for key in keys.split())}
    odd = [key for key in meta if key.startswith(f"{arch}.") and key.removeprefix(f"{arch}.") not in known]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        warn(path, f"metadata key {odd[0]}{more} is not known and changes nothing")


def warn(path: Path, what: str) -> None:
    """Write a note on stderr in one line, without control characters that the file may hold."""
    note(printable(f"tinymia: {path}: note: {what}")[:400])
