"""The metadata of a model's architecture, each key checked when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .architectures import ARCHITECTURES
from .errors import GGUFError, short

LAYERS = (  # one value, or one for each layer
    "feed_forward_length", "attention.head_count", "attention.head_count_kv", "expert_used_count")
KINDS = {int: "a whole number", float: "a number"}     # in words


class Reader:
    """The metadata of a model's architecture, each checked when it is read."""

    def __init__(self, meta: dict[str, Any], path: Path):
        arch = meta.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            found = "is missing" if arch is None else f"{short(arch)} is not supported"
            raise GGUFError(f"{path}: general.architecture {found}; supported: {', '.join(ARCHITECTURES)}")
        self.meta, self.path, self.name, self.arch = meta, path, arch, ARCHITECTURES[arch]
        self.n_layer = 0
        self.n_layer = self.get("block_count", None, 1)

    def raw(self, key: str) -> Any:
        """A value as it is in the file; None where the key is missing."""
        return self.meta.get(f"{self.name}.{key}")

    def refuse(self, key: str, why: str) -> GGUFError:
        """The error that names a key, its value, and why a model with it cannot be run."""
        return GGUFError(f"{self.path}: {self.name}.{key} is {short(self.plain(key))}{why}")

    def plain(self, key: str) -> Any:
        """A value as Python has it: an array as a list."""
        value = self.raw(key)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def get(self, key: str, default: Any, least: float, kind: Any = int) -> Any:
        """A number of at least `least`; the default where the key is missing, or an error where there is none."""
        value = self.raw(key)
        value = default if value is None else value
        if value is None:
            raise GGUFError(f"{self.path}: metadata key {self.name}.{key} is missing")
        if isinstance(value, np.ndarray) and key in LAYERS:
            if len(value) != self.n_layer:
                raise GGUFError(f"{self.path}: {self.name}.{key} has {len(value)} values for {self.n_layer} layers: "
                                "one for each is needed")
            if (value != value[0]).any():
                raise self.refuse(key, "; layers that differ are not supported")
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not least <= value < 2**31:
            most = " and below 2147483648" if isinstance(value, (int, float)) and value >= 2**31 else ""
            raise GGUFError(f"{self.path}: {self.name}.{key} is {short(value)}; it must be {KINDS[kind]} of at least "
                            f"{least:g}{most}")
        return kind(value)

    def counts(self, key: str) -> bool:
        """Return whether this architecture reads a key that others do not."""
        return key in self.arch.reads.split()

    def factor(self, key: str) -> float | None:
        """A factor that is there only where the architecture reads the key; 0 means none."""
        return (self.get(key, 0.0, 0, float) or None) if self.counts(key) else None
