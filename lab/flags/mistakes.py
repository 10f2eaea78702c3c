"""Suggestions for what was mistyped: flags, commands, prompts that the shell has cut, names of models."""

from __future__ import annotations

import difflib
import os
import shlex
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from tinymia import Error
from tinymia_models import bundled
from tinymia_models.stores import find, near_names

CURLY = "“”„‟‘’‚‛«»"
ALIKE = {   # flags of other programs, and ours for the same
    "--max-tokens": "-n", "--max-new-tokens": "-n", "--n-tokens": "-n", "--tokens": "-n", "--output": "-o",
    "--input": "-f", "--text": "-p", "--ablation": "--ablate", "--temperature": "--temp", "--cgraph": "--print-cgraph",
    "--penalty": "--repeat-penalty",
}


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to three known words that are most like an unknown one; case, dashes and underscores are ignored."""
    plain = {k: k.lower().replace("_", "-").strip("-") for k in known}
    low = word.lower().replace("_", "-").strip("-")
    same = [k for k, p in plain.items() if p.replace("-", "") == low.replace("-", "")]
    ratios = {k: difflib.SequenceMatcher(None, p, low).ratio() for k, p in plain.items()}
    best = max(ratios.values(), default=0)
    return same or sorted((k for k, r in ratios.items() if r >= max(cutoff, best - 0.15)), key=lambda k: -ratios[k])[:3]


def did_you_mean(flag: str, flags: Sequence[str]) -> str:
    """The end of a message about an unknown flag: the flag that was probably meant, or nothing."""
    alike = ALIKE.get(flag.lower().replace("_", "-"))
    known = [f for f in flags if f.startswith("--") or len(flag) < 4]
    found = [alike] if alike in flags and alike else closest(flag, known)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def left_over(left: Sequence[str], argv: Sequence[str], flags: Sequence[str], commands: Sequence[str]) -> str:
    """The message about words of a command line that belong to no flag."""
    word = left[0]
    shell = shell_mistake(argv)
    flag = next((w for w in left if w.startswith("-") and w.strip("->")), None)
    if shell and (flag is None or any(not w.strip("-") for w in left)):
        return shell
    if commands and word == argv[0] and word.replace("-", "").replace("_", "").isalpha():
        found = closest(word, commands, 0.75)
        if found:
            return f"no command {word}; closest: {', '.join(found)}"
    if flag is not None:
        name = flag.partition("=")[0]
        return f"no flag {name}{did_you_mean(name, flags)}"
    if word in commands:
        return f"the command comes first: tinymia {word} ..."
    words = " ".join(left)
    if not _prompted(argv) and "-p" in flags:
        known = ""
        if commands and word == argv[0] and " " not in word:
            known = f" {word} is not a command; there are {', '.join(commands)}."
        return f"{words!r} belongs to no flag.{known} The prompt goes after -p: -p {quoted(words)}"
    if "-p" in flags:
        return (f"{words!r} is left over after the prompt; put the prompt in quotes: "
                f"-p {quoted(f'{_prompt(argv)} {words}')}")
    return f"{words!r} is left over: a text with spaces needs quotes"


def shell_mistake(argv: Sequence[str]) -> str | None:
    """The message about a prompt that had no quotes, or curly ones, in the shell; None if it seems to be right."""
    curly = next((w for w in argv if w and (w[0] in CURLY or w[-1] in CURLY)), None)
    cut = any(w == "-" or (w.endswith("-") and w.strip("-")) for w in argv)
    if curly is None and not cut:
        return None
    name = redirected_to()
    wrote = f"; it wrote the file {name!r} here" if name is not None else ""
    straight = _prompt(argv).strip(CURLY).rstrip("- ") or "France"
    flag = next((w for w in argv if w in ("-p", "--prompt", "--clean", "--corrupt")), "-p")
    if curly is not None:
        return (f"{curly!r} has a curly quote, which the shell takes for a letter; type straight quotes: "
                f'{flag} "{straight} -> ..."{wrote}')
    return (f'put the prompt in quotes: {flag} "{straight} -> ..." (without them the shell takes > as a '
            f"redirection into a file{wrote})")


def redirected_to() -> str | None:
    """The file in the current folder that stdout is redirected to, if it is."""
    try:
        out = os.fstat(1)
        if not stat.S_ISREG(out.st_mode):
            return None
        with os.scandir() as entries:
            return next((e.name for e in entries if e.is_file() and os.path.samestat(e.stat(), out)), None)
    except OSError:
        return None


def quoted(text: str) -> str:
    """A text quoted for the shell: in double quotes, as people write it, if these are enough."""
    return f'"{text}"' if not set('"$`\\!') & set(text) else shlex.quote(text)


def _prompted(argv: Sequence[str]) -> bool:
    return any(w in ("-p", "--prompt", "-f", "--file") or w.startswith(("-p=", "--prompt=", "--file=")) for w in argv)


def _prompt(argv: Sequence[str]) -> str:
    """The first word of the prompt."""
    at = next((i for i, w in enumerate(argv) if w in ("-p", "--prompt", "--clean")), len(argv))
    return argv[at + 1] if at + 1 < len(argv) else ""


def find_model(given: str | None) -> str | None:
    """The path of the model that -m names: a file, or a model by its name. Raises Error, which names similar files."""
    if given is None:
        return None
    path = find(given, strict=False)
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        raise Error(f"-m {given}: this is a folder; " + (f"in it: {', '.join(inside[:5])}" if inside else
                                                        "a model is a .gguf file, and none is in it"))
    if path.exists() or not _missing(path):
        return str(path)
    near = near_names(given) or [str(p) for p in _near(path)]
    if near:
        where = f"; closest: {', '.join(near)}"
    else:
        where = f"; the bundled model: -m {' or '.join(bundled())}, or no -m; models/README.md says where others are"
    raise Error(f"-m {given}: no such file{where}")


def _missing(path: Path) -> bool:
    """Return whether a path does not exist (and is not only hidden by missing permissions)."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _near(path: Path) -> list[Path]:
    """Up to three .gguf files whose names are like that of a path.

    They are in its folder or, if that does not exist, in folders of similar names. If three files or fewer are there,
    all of them.
    """
    folder = path.parent
    try:
        if folder.is_dir():
            folders = [folder]
        else:
            above = next(p for p in folder.parents if p.is_dir())
            names = closest(folder.name, [p.name for p in above.iterdir() if p.is_dir()])
            folders = [above / name for name in names]
        files = {p.name: p for f in folders for p in sorted(f.glob("*.gguf"))[:1000]}
    except (OSError, StopIteration):
        return []
    stem = {p.stem: p for p in files.values()}
    found = [stem[s] for s in closest(path.stem, stem)]
    return found or (list(files.values()) if len(files) <= 3 else [])
