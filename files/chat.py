"""Chats in the form on which a model was trained: the template in its file turns messages into one prompt.

The template, tokenizer.chat_template, is a jinja2 program, and runs in a separate process (chat_render.py). Only what
the template itself writes can become a special token. A message that spells one, such as <|im_end|>, stays text: a
mark, a character that occurs nowhere else, is put after the first character of each such spelling, and is found again
in the rendered text.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import Error, short
from .vocab import CONTROL, UNKNOWN, Tokenizer

SECONDS, BYTES = 10, 1 << 30    # the most time and memory that a template may take
Messages = str | Sequence[Mapping[str, str]]


class Chat(NamedTuple):
    """A prompt in the form of a chat."""

    ids: list[int]
    text: str
    default_system: str     # the system message that the template added of its own, or ""


def format_chat(template: object, tokenizer: Tokenizer, messages: Messages, system: str | None = None) -> Chat:
    """The prompt for the assistant's next message. Raises Error for what is not a message, and if the template fails.

    messages: the user's text, or a list of {"role": "user" or "assistant" or "system", "content": text}; system: the
    system message, which replaces the template's default.
    """
    said = read_messages(messages, system)
    if not isinstance(template, str) or not template.strip():
        raise Error(f"{tokenizer.path}: the file has no chat template (tokenizer.chat_template): the model may not be "
                    "trained for chats; give it the text as it is")
    pieces = [p for p in tokenizer.special if tokenizer.types[tokenizer.ids[p]] in (CONTROL, UNKNOWN)]
    used = "".join([template, *(m["content"] for m in said)])
    mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in used)    # private use: no meaning
    marked = [{**m, "content": _mark(m["content"], pieces, mark)} for m in said]
    asked = [marked]
    if said[0]["role"] != "system":     # render once more with a system message, to find the default one
        asked.append([{"role": "system", "content": mark * 2}, *marked])
    rendered, *with_system = _render(template, tokenizer, asked)
    text, plain = "", list[tuple[int, int]]()
    for part in rendered.split(mark):
        plain += [(len(text) - 1, len(text))] if text else []
        text += part
    before = bool(tokenizer.bos is not None and tokenizer.pieces[tokenizer.bos]
                  and text.startswith(tokenizer.pieces[tokenizer.bos]))
    ids = tokenizer.encode(text, False if before else None, plain=plain)
    if tokenizer.add_eos and tokenizer.eos is not None:
        ids = ids[:-1]      # no EOS: the assistant's answer follows
    return Chat(ids, text, _between(rendered, with_system[0].split(mark * 2)).replace(mark, "") if with_system else "")


def read_messages(messages: Messages, system: str | None = None) -> list[dict[str, str]]:
    """Messages as a list of dictionaries. Raises Error."""
    if not isinstance(messages, (str, Sequence)):
        raise Error(f"a chat is a text or a list of messages, not {short(messages)}")
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    if system is not None:
        said = [{"role": "system", "content": system}, *said]
    for i, m in enumerate(said):
        if not isinstance(m, Mapping) or not all(isinstance(m.get(key), str) for key in ("role", "content")):
            raise Error(f'message {i + 1} must be {{"role": "user", "content": text}}, not {short(m)}')
    if not said:
        raise Error("a chat has one message or more")
    if system is not None and said[1:] and said[1]["role"] == "system":
        raise Error("there are two system messages: `system`, and the first of the messages")
    return [dict(m) for m in said]


def _mark(text: str, pieces: Sequence[str], mark: str) -> str:
    """Insert the mark after the first character of each special token that the text spells."""
    starts = set()
    for piece in pieces:
        at = text.find(piece)
        while at >= 0:
            starts.add(at)
            at = text.find(piece, at + 1)
    return "".join(c + mark if i in starts else c for i, c in enumerate(text))


def _between(text: str, around: Sequence[str]) -> str:
    """The part of a text between around[0] and around[1]; "" if it does not begin and end with these."""
    if len(around) != 2 or not text.startswith(around[0]) or not text[len(around[0]) :].endswith(around[1]):
        return ""
    return text[len(around[0]) : len(text) - len(around[1])]


def _render(template: str, tokenizer: Tokenizer, conversations: Sequence[Any]) -> list[str]:
    """The texts that a template makes from the first conversation, and from the others if it accepts them."""
    if importlib.util.find_spec("jinja2") is None:
        raise Error("chat templates need jinja2: pip install 'tinymia[chat]'")
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos}
    names = {key: "" if i is None else tokenizer.pieces[i] for key, i in ids.items()}
    texts = list[str]()
    for i, one in enumerate(conversations):
        asked = {"template": template, "conversations": [one], **names, "seconds": SECONDS, "bytes": BYTES}
        found = _ask(json.dumps(asked))
        if "texts" in found:
            texts += found["texts"]
        elif i == 0:
            raise Error(f"{tokenizer.path}: the chat template {' '.join(found['error'].split())[:200]}")
    return texts


def _ask(asked: str) -> dict[str, Any]:
    program = Path(__file__).with_name("chat_render.py").read_text("utf-8")
    took = {"error": f"takes more than {SECONDS} seconds, or more memory than {BYTES >> 20} MiB"}
    try:
        done = subprocess.run([sys.executable, "-c", program], input=asked.encode(), capture_output=True,
                              timeout=SECONDS + 5, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else took if done.returncode < 0 else {
            "error": f"fails: {done.stderr.decode('utf-8', 'replace').strip()[-200:]}"}
    except subprocess.TimeoutExpired:
        return took
    except (OSError, ValueError) as e:
        return {"error": f"cannot be run: {e}"}
