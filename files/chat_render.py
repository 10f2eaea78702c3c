"""The program that renders a chat template, in a separate process, because a template is code from a downloaded file.

stdin: JSON {"template", "conversations": [[{"role", "content"}, ...], ...], "bos", "eos", "seconds", "bytes"}.
stdout: JSON {"texts": [...]} or {"error": what is wrong}. Templates run in jinja2's sandbox, without a loader of files,
with the filters and functions that Hugging Face's transformers gives them. Where the operating system allows it, the
process has a limit of time and memory. It does not import tinymia, so that it starts fast.

Source: transformers, utils/chat_template_utils.py (_compile_jinja_template).
"""

import sys

sys.path = [folder for folder in sys.path if folder]    # do not import modules from the current folder

import json  # noqa: E402
from datetime import datetime  # noqa: E402
from typing import Any  # noqa: E402

from jinja2 import TemplateError, TemplateSyntaxError  # noqa: E402
from jinja2.exceptions import SecurityError  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402


class Refused(Exception):
    """The exception that a template raises by raise_exception."""


def refuse(message: Any = "") -> None:
    """Raise Refused: the template's raise_exception."""
    raise Refused(str(message))


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON of a value: the template's filter `tojson`, which by default keeps letters outside ASCII."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(asked: dict[str, Any]) -> dict[str, Any]:
    """Render the conversations, and return what `main` writes: {"texts": [...]} or {"error": text}."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        template = environment.from_string(asked["template"])
        return {"texts": [template.render(
            messages=messages, add_generation_prompt=True, tools=None, documents=None, bos_token=asked["bos"],
            eos_token=asked["eos"]) for messages in asked["conversations"]]}
    except Refused as e:
        return {"error": f"refuses these messages: {e}"}
    except TemplateSyntaxError as e:
        return {"error": f"is not jinja2: {e.message} (line {e.lineno})"}
    except SecurityError as e:
        return {"error": f"reaches for what a template may not have: {e}"}
    except MemoryError:
        return {"error": "needs more memory than a template may have"}
    except (TemplateError, RecursionError) as e:
        return {"error": f"fails: {e}"}
    except Exception as e:  # whatever Python raises inside a template
        return {"error": f"fails: {type(e).__name__}: {e}"}


def main() -> None:
    """Read a request from stdin, limit time and memory, render, and write the answer to stdout."""
    asked = json.load(sys.stdin)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"] + 1))
        resource.setrlimit(resource.RLIMIT_AS, (asked["bytes"], asked["bytes"]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))   # it can write no file
    except (ImportError, ValueError, OSError):
        pass    # Windows; a system whose limits are lower already
    json.dump(render(asked), sys.stdout)


if __name__ == "__main__":
    main()
