"""Notes on stderr about prompts that are probably not what was meant, one line each."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tinymia import Model
from tinymia_files import note
from tinymia_models import bundled, known_words

from .mistakes import CURLY, redirected_to

WORD = re.compile(r"\w+(?:['’]\w+)*")
SHOWN = 8   # the most unknown words that are named


def tell_of_prompt(text: str) -> None:
    """Write notes on a prompt as it was typed: escapes, curly quotes, a > that the shell has taken."""
    if re.search(r"\\[nt]", text):
        letter = "a line end" if "\\n" in text else "a tab"
        note(f"note: the prompt has a backslash and a letter, which stay two letters; for {letter} add -e")
    if len(text) > 1 and text[0] in CURLY and text[-1] in CURLY:
        note(f"note: the curly quotes are part of the prompt: {text}; type straight quotes around it")
    if text.endswith("-"):
        name = redirected_to()
        if name is not None:
            note(f"note: the prompt ends with - and the output goes into the file {name!r}: if the prompt was to have "
                 '->, put it in quotes: -p "France -> ..."')


def tell_unknown(model: Model, texts: Iterable[str]) -> None:
    """Write a note on words of prompts that the bundled model does not know; nothing for other models."""
    name = next((name for name, path in bundled().items() if path.exists() and path.samefile(model.path)), None)
    if name is None:
        return
    known = known_words(model.tokenizer.ids)
    special = model.tokenizer.special
    unknown = dict[str, None]()
    for text in texts:
        for piece in special:
            text = text.replace(piece, " ")
        unknown |= dict.fromkeys(w for w in WORD.findall(text) if w not in known)
    if unknown:
        words = [*unknown][:SHOWN]
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        note(f"note: {name} knows some 650 words; not among them: {', '.join(words)}{more}. A real model: -m FILE.gguf "
             "(models/README.md says where to get one)")
