"""The result of `tinymia attribute`, its text and its pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..pictures.heatmap import Heatmap, number
from ..pictures.terminal import screen, signed, table, visible
from ..runs.result import Result


@dataclass
class Attribution(Result):
    """The parts of a logit; everything is in logits, except `activations`."""

    pieces: list[str]               # of the prompt's tokens, [n_tok]
    position: int                   # the position of the logits
    answer: int                     # token ids
    answer_piece: str
    against: int | None
    against_piece: str | None
    logit: float                    # of the answer, minus that of `against`: the sum of the parts
    embedding: float
    heads: np.ndarray               # float64 [n_layer, n_head]
    bias: np.ndarray                # float64 [n_layer], of attn_output, in models that have one
    rounding: np.ndarray            # float64 [n_layer]: the rest of kqv_out as it was computed
    ffn: np.ndarray                 # float64 [n_layer]
    stream: np.ndarray              # float64 [n_layer]: the rest of l_out
    output_bias: float
    output_rounding: float          # the rest of the logit as it was computed
    output_stream: float            # the rest of the logit
    neuron_layer: int | None        # the layer whose FFN is split by neuron
    neurons: np.ndarray             # float64 [n_ff]: ffn_gate_par times (column of ffn_down . direction); else [0]
    activations: np.ndarray         # float32 [n_ff], ffn_gate_par; else [0]

    def parts(self) -> list[tuple[str, float]]:
        """All parts as (name, logits), without those of kinds that the model does not have."""
        named = [("embedding", self.embedding)]
        for il in range(len(self.ffn)):
            named += [(f"head {il}.{head}", v) for head, v in enumerate(self.heads[il])]
            named += [(f"FFN {il}", self.ffn[il]), (f"rounding in attn_output {il}", self.rounding[il]),
                      (f"stream {il}", self.stream[il])]
            named += [(f"bias of attn_output {il}", self.bias[il])] * bool(self.bias.any())
        named += [("rounding in output", self.output_rounding), ("stream, output", self.output_stream)]
        named += [("bias of output", self.output_bias)] * bool(self.output_bias)
        return [(name, float(v)) for name, v in named]

    def __str__(self) -> str:
        return text(self)


def title(found: Attribution) -> str:
    """The name of the sum of the parts: logit of ▁Paris, or logit of ▁Paris minus that of ▁Italy."""
    minus = "" if found.against_piece is None else f" minus that of {visible(found.against_piece)}"
    return f"logit of {visible(found.answer_piece)}{minus}"


def pictures(found: Attribution) -> list[Heatmap]:
    """Two heatmaps: layer x head; and embedding, attention, FFN and the rest by layer, whose cells sum to the logit."""
    n_layer, n_head = found.heads.shape
    what = f"{title(found)}, {found.logit:.4g}, at position {found.position}"
    layers, columns = ([str(i) for i in range(n)] for n in (n_layer, n_head))
    heads = Heatmap(found.heads, layers, columns, f"{what}: by head", "head", "layer", "logits",
                    diverging=True, upward=True)
    grid = np.full((n_layer + 2, 4), np.nan)
    grid[0, 0], grid[-1, 3] = found.embedding, found.output_bias + found.output_rounding + found.output_stream
    grid[1:-1, 1] = found.heads.sum(1) + found.bias + found.rounding
    grid[1:-1, 2], grid[1:-1, 3] = found.ffn, found.stream
    names, so_far = ["tokens", *layers, "output"], np.cumsum(np.nansum(grid, 1))
    columns = ["embedding", "attention", "FFN", "rest"]
    hovers = [[f"{name if name in ('tokens', 'output') else f'layer {name}'}, {column}\nlogits {number(v)}\n"
               f"sum up to here {number(total)}" for column, v in zip(columns, row)]
              for name, row, total in zip(names, grid, so_far)]
    return [heads, Heatmap(grid, names, columns, f"{what}: by layer", "part", "layer", "logits", hovers=hovers,
                           diverging=True, upward=True)]


def largest(found: Attribution, top: int) -> str:
    """A table of the largest parts, and the sum of the others."""
    parts = sorted(found.parts(), key=lambda part: -abs(part[1]))
    rows = [[name, signed(v)] for name, v in parts[:top]]
    if parts[top:]:
        rows.append([f"{len(parts) - top} smaller parts", signed(sum(v for _, v in parts[top:]))])
    rows.append([title(found), signed(found.logit)])
    return f"parts by size, in logits\n{table(rows)}"


def kinds(found: Attribution) -> str:
    """The sum of each kind of part, in one line."""
    sums = {"embedding": found.embedding, "heads": found.heads.sum(), "FFNs": found.ffn.sum(),
            "biases": found.bias.sum() + found.output_bias, "rounding": found.rounding.sum() + found.output_rounding,
            "stream": found.stream.sum() + found.output_stream}
    return ", ".join(f"{name} {signed(v)}" for name, v in sums.items())


def top_neurons(found: Attribution, top: int) -> str:
    """A table of the neurons of one FFN with the largest parts."""
    il, order = found.neuron_layer or 0, np.argsort(-np.abs(found.neurons), kind="stable")
    rows = [["neuron", "ffn_gate_par", "logits per unit", "logits"]]
    for i in order[:top].tolist():
        value, part = float(found.activations[i]), found.neurons[i]
        rows.append([str(i), f"{value:+.4g}", signed(part / value if value else 0), signed(part)])
    others, rest = found.neurons[order[top:]].sum(), found.ffn[il] - found.neurons.sum()
    rows += [["others", "", "", signed(others)]] if len(order) > top else []
    rows += [["rest", "", "", signed(rest)], [f"FFN {il}", "", "", signed(found.ffn[il])]]
    return f"neurons of FFN {il} (rest: rounding, bias, actions on ffn_out)\n{table(rows)}"


def text(found: Attribution, top: int = 20) -> str:
    """The text that the terminal shows."""
    maps = [h.terminal(*screen()) for h in pictures(found)]
    split = [top_neurons(found, top)] if found.neuron_layer is not None else []
    return "\n\n".join([*maps, largest(found, top), *split, kinds(found)])
