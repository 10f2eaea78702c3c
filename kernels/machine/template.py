"""Kernels made from templates: a class declares the parts that its kernels are put together from.

Products with Q4_K and with Q6_K are the same loops around a few functions that know where the bits lie. The loops are
written once, as methods of a class that inherits from Template. All that differs they get through one name:

    fmt: Superblocks = STAMPED                  # the parts of the format that a kernel is made for

    class Superblocks(Template):
        SIZE: int                               # a number that each format sets

        @abstract
        def quants(block):                      # a part that each format defines
            "Four u8x64: ..."

        @part
        def dot(row, n_blocks, record):         # a part that is the same for all formats; a format may redefine it
            ... fmt.quants(row + fmt.SIZE * j) ...

        @entry
        def matmul(...):                        # a kernel: Python calls it, it is kept on disk
            ... fmt.dot(...) ...

    class Q4_K(Superblocks):
        SIZE = 144

        @part
        def quants(block):
            return quants_of_4_bits(block + 16)

`Q4_K.stamp()` compiles nothing yet. It makes a module object with all the parts of Q4_K, and copies each function so
that its global name `fmt` is that module. Numba looks up attributes of modules when it compiles, so `fmt.SIZE` becomes
a constant and `fmt.quants(...)` a direct call. These classes have no instances, and parts take no `self`.

Stamping checks that everything fits. A TypeError names the class and the part where a part is missing, where no class
declares it, where its parameters differ from the declared ones, and where a template uses a part that does not exist.
"""

import dis
import inspect
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

from .jit import inline, specialise

P = ParamSpec("P")
R = TypeVar("R")
STAMPED: Any = None  # the value of `fmt` in a template that is not stamped yet


class part(Generic[P, R]):
    """A decorator: the function is compiled into the kernels that use it, anew for each class where it uses `fmt`."""

    def __init__(self, function: Callable[P, R]):
        self.function: Any = function
        self.__doc__ = function.__doc__
        self.uses = names_after_fmt(function)
        self._shared = None  # compiled once for all classes, where the function does not use fmt

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.place = name, f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type) -> Callable[P, R]:
        """The compiled part if the class is stamped, else the part itself."""
        stamped = vars(owner).get("parts")
        return self if stamped is None else getattr(stamped, self.name)  # type: ignore[return-value]

    def compiled(self, cls: type, fmt: types.ModuleType):
        """The part for a class whose parts are in the module `fmt`; numba compiles it when it is first called."""
        if self.uses:
            return specialise(self.function, f"{self.name}_{cls.__name__}", part=True, fmt=fmt)
        if self._shared is None:
            self._shared = inline(self.function)
        return self._shared


class entry(part[P, R]):
    """A decorator: the function is a kernel that Python calls, kept on disk for each class."""

    def compiled(self, cls: type, fmt: types.ModuleType):
        """The kernel for a class whose parts are in the module `fmt`; numba compiles it when it is first called."""
        return specialise(self.function, f"{self.name}_{cls.__name__}", fmt=fmt)


class abstract(part[P, R]):
    """A decorator: a part without code, which each stamped class must define; its docstring says what it returns."""


def names_after_fmt(function: Any) -> tuple[str, ...]:
    """The names that a function takes from `fmt`: each `x` of `fmt.x` in its code, once, in order."""
    steps = [step for step in dis.get_instructions(function) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    found = (after.argval for step, after in pairwise(steps) if step.opname == "LOAD_GLOBAL" and step.argval == "fmt")
    return tuple(dict.fromkeys(found))


class Template:
    """A family of kernels and of the parts that they are put together from, see the top of this file."""

    parts: ClassVar[types.ModuleType | None] = None  # once the class is stamped: `fmt` in its kernels

    @classmethod
    def declared(cls) -> dict[str, Any]:
        """The parts and numbers that the base classes declare, by name."""
        found: dict[str, Any] = {}
        for base in reversed(cls.__mro__[1:-1]):
            if base is not Template:
                numbers = dict.fromkeys(inspect.get_annotations(base))
                found |= {name: value for name, value in {**numbers, **vars(base)}.items() if is_public(name, value)}
        return found

    @classmethod
    def stamp(cls) -> None:
        """Make the kernels of this class. TypeError, with the names of class and part, if something does not fit."""
        declared = cls.declared()
        for name, value in vars(cls).items():
            if is_public(name, value) and name not in declared:
                raise TypeError(f"{cls.__name__} has a part {name}, which nothing in {_names(cls)} asks for")
            _check_parameters(cls, name, value, declared.get(name))
        fmt = types.ModuleType(cls.__name__, cls.__doc__)
        for name in declared:
            value = next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)
            if value is None or isinstance(value, abstract):
                raise TypeError(f"{cls.__name__} lacks {_described(cls, name)}")
            setattr(fmt, name, value.compiled(cls, fmt) if isinstance(value, part) else value)
        for template in cls.templates().values():
            for name in (name for name in template.uses if name not in vars(fmt)):
                raise TypeError(f"{template.place} asks for fmt.{name}, which {cls.__name__} does not have")
        cls.parts = fmt

    @classmethod
    def templates(cls) -> dict[str, part]:
        """The parts and kernels of this class as they are written, by name."""
        found = {name: value for c in reversed(cls.__mro__) for name, value in vars(c).items()}
        return {name: value for name, value in found.items() if isinstance(value, part)}


def is_public(name: str, value: Any) -> bool:
    """Return whether an attribute of a class is one of its parts or numbers."""
    return not name.startswith("_") and name not in ("parts", "format") and not isinstance(value, classmethod)


def _check_parameters(cls: type, name: str, value: Any, declared: Any) -> None:
    if isinstance(value, part) and isinstance(declared, part):
        here, there = (p.function.__code__.co_varnames[: p.function.__code__.co_argcount] for p in (value, declared))
        if len(here) != len(there):
            mine, theirs = ", ".join(here), ", ".join(there)
            raise TypeError(f"{cls.__name__}.{name}({mine}) is declared as {declared.place}({theirs})")


def _described(cls: type, name: str) -> str:
    """A missing part or number in words, with the class that needs it."""
    for base in cls.__mro__:
        if isinstance(vars(base).get(name), abstract):
            text = (vars(base)[name].__doc__ or "").strip().splitlines()
            return f"the part {name}, which {base.__name__} asks for: {text[0] if text else 'no description'}"
        if name in inspect.get_annotations(base):
            return f"the number {name}, which {base.__name__} asks for"
    raise KeyError(name)


def _names(cls: type) -> str:
    return ", ".join(base.__name__ for base in cls.__mro__[1:-1] if base is not Template)
