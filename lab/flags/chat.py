"""--chat and --system, wherever a command takes a prompt: the text becomes the user's message in the model's format."""

from __future__ import annotations

import argparse

from tinymia import Error, Model
from tinymia_files import note
from tinymia_files.chat import Chat, format_chat


def chat_flags(g: argparse._ActionsContainer) -> None:
    """Add --chat and --system."""
    g.add_argument("--chat", action="store_true",
                   help="the prompt is the user's message: put it, as plain text, into the chat format of the model's "
                        "file (needs jinja2: pip install 'tinymia[chat]')")
    g.add_argument("--system", metavar="TEXT", help="the system message, with --chat (default: the template's own)")


def check_chat(args: argparse.Namespace) -> None:
    """Raise Error for flags that do not go together."""
    chat = getattr(args, "chat", False)
    if getattr(args, "system", None) is not None and not chat:
        raise Error("--system goes with --chat")
    if chat and (getattr(args, "no_bos", False) or getattr(args, "no_special", False)):
        raise Error("--chat decides on BOS and special tokens itself: leave --no-bos and --no-special out")


def in_chat(args: argparse.Namespace, model: Model, text: str) -> str | list[int]:
    """The text of a prompt, or with --chat the ids of a chat in which it is the user's message. Raises Error."""
    check_chat(args)
    return chat_of(args, model, text).ids if args.chat else text


def chat_of(args: argparse.Namespace, model: Model, text: str) -> Chat:
    """The chat in which the text is the user's message. Raises Error.

    If the template adds a system message, a line on stderr says so, once.
    """
    chat = format_chat(model.template, model.tokenizer, text, args.system)
    if chat.default_system and not getattr(args, "told_system", False):
        args.told_system = True
        note(f"note: the chat template adds a system message of its own: {chat.default_system!r} (--system TEXT takes "
             "its place)")
    return chat
