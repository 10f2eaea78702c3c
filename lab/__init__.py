"""Experiments and pictures on top of the engine: one function per command, and the result that it gives.

    from tinymia_lab import sweep

    cli.py         the command `tinymia`: it runs a prompt, or calls one of the commands
    commands/      a file per command: its Result, its function, its pictures, its text and its flags
    measure/       what the commands measure
    pictures/      tables, pictures and pages
    flags/         flags that commands share
    runs/          results in files, progress, executors, streams
    comparison/    the command verify: tinymia beside llama.cpp
    tasks/         tasks as JSON files
    pairs/         pairs of prompts as JSON files

The engine imports this package only for a command that needs it.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands.ablate import Ablation, ablate
    from .commands.attend import Attention, attend
    from .commands.attribute import Attribution, attribute
    from .commands.function_vector import FunctionVector, function_vector
    from .commands.lens import Lens, lens
    from .commands.over_pairs import PairsResult, over_pairs
    from .commands.path import PathPatching, path
    from .commands.report import Report, report
    from .commands.steer import Steering, steer
    from .commands.story import Story, story
    from .commands.sweep import Sweep, sweep
    from .commands.task_vector import TaskVector, task_vector
    from .commands.trace import Trace, trace
    from .comparison.verify import SelfVerification, Verification, verify, verify_self

WHERE = {
    "commands.ablate": ("Ablation", "ablate"), "commands.attend": ("Attention", "attend"),
    "commands.attribute": ("Attribution", "attribute"), "commands.lens": ("Lens", "lens"),
    "commands.function_vector": ("FunctionVector", "function_vector"), "commands.report": ("Report", "report"),
    "commands.over_pairs": ("PairsResult", "over_pairs"), "commands.path": ("PathPatching", "path"),
    "commands.steer": ("Steering", "steer"), "commands.story": ("Story", "story"),
    "commands.sweep": ("Sweep", "sweep"),
    "commands.task_vector": ("TaskVector", "task_vector"), "commands.trace": ("Trace", "trace"),
    "comparison.verify": ("SelfVerification", "Verification", "verify", "verify_self"),
}
MODULES = {name: module for module, names in WHERE.items() for name in names}

__all__ = [
    "Ablation", "Attention", "Attribution", "FunctionVector", "Lens", "PairsResult", "PathPatching", "Report",
    "SelfVerification", "Steering", "Story", "Sweep", "TaskVector", "Trace", "Verification",
    "ablate", "attend", "attribute", "function_vector", "lens", "over_pairs", "path", "report", "steer", "story",
    "sweep", "task_vector", "trace", "verify", "verify_self",
]


def __getattr__(name: str) -> Any:
    """Import a function or a result when its name is first used, so that a command loads only what it needs."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
    if not isinstance(found, type):
        found = globals()[name] = _checked(found, MODULES[name].startswith("commands."))
    return found


def _checked(function: Callable[..., Any], loaded: bool) -> Callable[..., Any]:
    """Wrap a function so that a wrong name of an argument and, where a loaded model is needed, a path are told."""
    from tinymia_engine import ArgumentError, known_arguments
    from tinymia_files import short

    @functools.wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        model = args[0] if args else named.get("model")
        if loaded and isinstance(model, (str, os.PathLike)):
            given = short(str(model))
            raise ArgumentError(f"{function.__name__} takes a model and not its name: tinymia.load({given}) gives one")
        return function(*args, **named)

    return known_arguments(checked)


def __dir__() -> list[str]:
    return sorted(MODULES)
