"""The ends of a path: the sender, which writes into the residual stream, and the receiver, which reads it later.

    3.2, ffn-4, embedding           senders: head 2 of layer 3, the FFN of layer 4, the embeddings of the tokens
    5.1:q, 5.1:k, 5.1:v             receivers: the query, the key, the value of head 1 of layer 5
    ffn-5, logits                   receivers: the FFN of layer 5, and the last norm with the output matrix

Where a group of heads shares a key and a value, 5.1:k and 5.1:v are those of the whole group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from tinymia import Error, Model
from tinymia_engine import out_of_range

SENDER = re.compile(r"(?P<layer>\d+)\.(?P<head>\d+)|ffn-(?P<ffn>\d+)|embedding")
RECEIVER = re.compile(r"(?P<layer>\d+)\.(?P<head>\d+):(?P<read>[qkv])|ffn-(?P<ffn>\d+)|logits")


class Part(NamedTuple):
    """A sender or a receiver."""

    kind: str       # embedding, head, ffn or logits
    layer: int
    head: int
    read: str       # of a head that receives: q, k or v

    @property
    def reads(self) -> int:
        """The place where it reads the stream, counted in writes: 0 before the first head, 1 after it and so on."""
        return 2 * self.layer + (self.kind == "ffn")

    @property
    def writes(self) -> int:
        """The place of what it writes: a part that reads there, or later, reads it."""
        return 0 if self.kind == "embedding" else 2 * self.layer + 1 + (self.kind == "ffn")

    def __str__(self) -> str:
        if self.kind == "head":
            return f"{self.layer}.{self.head}" + (f":{self.read}" if self.read else "")
        return f"ffn-{self.layer}" if self.kind == "ffn" else self.kind


def read_parts(model: Model, texts: str | Sequence[str], what: str) -> list[Part]:
    """Read senders or receivers, as a list or separated by commas. Raises Error for what is none, and for a layer or
    a head that the model does not have."""
    c, pattern, parts = model.config, SENDER if what == "sender" else RECEIVER, list[Part]()
    given = texts.split(",") if isinstance(texts, str) else list(texts)
    for text in given:
        found = pattern.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            right = ("a head such as 3.2, an FFN such as ffn-4, or embedding" if what == "sender" else
                     "a head with what it reads, such as 5.1:q, 5.1:k or 5.1:v, an FFN such as ffn-5, or logits")
            raise Error(f"{what} {text!r}: it must be {right}")
        layer, head = found["layer"] or found["ffn"], int(found["head"] or 0)
        if layer is not None and int(layer) >= c.n_layer:
            raise Error(f"{what} {text}: {out_of_range('layer', layer, c.n_layer, 'layers')}")
        if head >= c.n_head:
            raise Error(f"{what} {text}: {out_of_range('head', head, c.n_head, 'heads')}")
        if layer is None:
            parts.append(Part(text.strip(), c.n_layer if what == "receiver" else 0, 0, ""))
        else:
            read = (found["read"] or "") if what == "receiver" else ""
            parts.append(Part("head" if found["ffn"] is None else "ffn", int(layer), head, read))
    if not parts:
        raise Error(f"no {what}: name one or more")
    if len(parts) > 1 and any(part.kind == "logits" for part in parts):
        raise Error("receiver logits: it goes alone, because every other receiver reaches the logits, too")
    return list(dict.fromkeys(parts))


def every_sender(model: Model, receivers: Sequence[Part]) -> list[Part]:
    """All parts that write before the last of the receivers reads: the embedding, heads and FFNs."""
    c, last = model.config, max(part.reads for part in receivers)
    parts = [Part("embedding", 0, 0, "")]
    for il in range(c.n_layer):
        parts += [*(Part("head", il, head, "") for head in range(c.n_head)), Part("ffn", il, 0, "")]
    return [part for part in parts if part.writes <= last]


def check_order(senders: Sequence[Part], receivers: Sequence[Part]) -> None:
    """Raise Error for a sender that writes after all receivers have read."""
    for part in senders:
        if not reached(part, receivers):
            raise Error(f"sender {part}: it writes after {', '.join(map(str, receivers))} has read, so no path goes "
                        "from it to there")


def reached(sender: Part, receivers: Sequence[Part]) -> tuple[Part, ...]:
    """The receivers that read what a sender wrote."""
    return tuple(part for part in receivers if sender.writes <= part.reads)


def shared_by(model: Model, part: Part) -> int:
    """The index of what a head reads: its query, or the key or value that its group of heads shares."""
    return part.head if part.read == "q" else part.head // (model.config.n_head // model.config.n_head_kv)


def group(model: Model, part: Part) -> str:
    """A receiver with the heads that share its key or value, if there are several: 5.1:v (that of heads 5.0 to 5.1)."""
    c = model.config
    size = c.n_head // c.n_head_kv
    if part.kind != "head" or part.read == "q" or size == 1:
        return str(part)
    first = part.head // size * size
    return f"{part} (that of heads {part.layer}.{first} to {part.layer}.{first + size - 1})"
