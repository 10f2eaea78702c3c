"""The engine around `forward` in tinymia.py: actions on named values, weights by attribute, choosing a token.

    action.py     what an action is, and what it learns about a tensor
    actions.py    Lens, Log, Save, Replace, Patch, Ablate, Add, ProjectOut, Scale
    sources.py    where actions take rows from: saved files, arrays, runs
    given.py      checks of what a caller gives: positions, heads, layers, ids, arguments
    names.py      the names of all that is computed, and which of them a pattern means
    weights.py    the tensors of a file, checked, as the forward pass uses them
    gradients.py  what a gradient is of, and the gradients by name
    sampling.py   the best of many scores, and a token from logits
"""

from . import given, sources
from .action import NOT_HERE, Action, Context, Edit, Positions, Record, Source, files_read, listed
from .actions import Ablate, Add, Lens, Log, Patch, ProjectOut, Replace, Save, Scale
from .given import ArgumentError, indices, is_mask, known_arguments, out_of_range, whole
from .gradients import Gradients, Logit, LogitDifference, LogProb, Loss, Metric, finite, metrics
from .names import Op, exact, match, name_table, stream
from .sampling import Sampler, best, softmax
from .sources import read_sources
from .weights import Block, Linear, Weights

__all__ = [
    "NOT_HERE", "Ablate", "Action", "Add", "ArgumentError", "Block", "Context", "Edit", "Gradients", "Lens",
    "Linear", "Log", "LogProb", "Logit", "LogitDifference", "Loss", "Metric", "Op", "Patch", "Positions",
    "ProjectOut", "Record", "Replace", "Sampler", "Save", "Scale", "Source", "Weights", "best", "exact", "files_read",
    "finite", "given", "indices", "is_mask", "known_arguments", "listed", "match", "metrics", "name_table",
    "out_of_range", "read_sources", "softmax", "sources", "stream", "whole",
]
