"""Values as the type of a field says them: what comes from a file or a command line, for a dataclass."""

from __future__ import annotations

import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from .documents import said
from .errors import UsageError, unknown

NONE_SUCH = object()
"""What `fitted` gives for a value of another type."""


@cache
def hints(cls: type) -> dict[str, Any]:
    """The type of every field of a dataclass."""
    found = typing.get_type_hints(cls)
    return {f.name: found[f.name] for f in fields(cls)}


def fitted(value: Any, hint: Any) -> Any:
    """The value as the type says it, `NONE_SUCH` if it is of another. A type that is unknown here takes anything.

    A list is taken for a tuple, and a number for one of another class that is equal; true and false are no numbers, and
    neither are nan and infinity.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((v for a in args if (v := fitted(value, a)) is not NONE_SUCH), NONE_SUCH)
    if origin is typing.Literal:
        return value if any(value == a and type(value) is type(a) for a in args) else NONE_SUCH
    if origin is tuple:
        return _fitted_tuple(value, args)
    if origin is not None and issubclass(origin, Mapping):
        return _fitted_mapping(value, *args)
    if hint in (int, float):
        return _fitted_number(value, hint)
    if hint in (str, bool, type(None)):
        return value if type(value) is hint else NONE_SUCH
    return value


def checked(cls: type, values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Values of fields of a dataclass, as their types say them.

    Args:
        cls: the dataclass.
        values: by the name of the field.
        what: what the fields are settings of, in an error.

    Raises:
        UsageError: there is no such field, or it takes something else.
    """
    known, found = hints(cls), {}
    for name, value in values.items():
        if name not in known:
            raise unknown(f"setting of {what}", str(name), known)
        found[name] = fitted(value, known[name])
        if found[name] is NONE_SUCH:
            raise UsageError(f"{name} of {what} takes {spelled(known[name])}, not {said(value)}")
    return found


def _fitted_number(value: Any, kind: type[int] | type[float]) -> Any:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return NONE_SUCH
    number: Any = value
    try:
        found = kind(number)
    except (OverflowError, ValueError):  # infinity or nan as a whole number, or one too large for a float
        return NONE_SUCH
    return found if found == value and abs(found) != math.inf else NONE_SUCH


def _fitted_tuple(value: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, tuple | list):
        return NONE_SUCH
    wanted = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    parts = [fitted(v, a) for v, a in zip(value, wanted, strict=False)]
    return tuple(parts) if len(wanted) == len(value) and not any(p is NONE_SUCH for p in parts) else NONE_SUCH


def _fitted_mapping(value: Any, key: Any, inner: Any) -> Any:
    if not isinstance(value, Mapping):
        return NONE_SUCH
    found = {fitted(k, key): fitted(v, inner) for k, v in value.items()}
    return NONE_SUCH if NONE_SUCH in found or any(v is NONE_SUCH for v in found.values()) else found


def spelled(hint: Any) -> str:
    """A type in words: `a whole number`, `one of 'end', 'subject'`, `several of a whole number`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(spelled, args))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"several, each {spelled(args[0])}" if args[-1] is Ellipsis else f"({', '.join(map(spelled, args))})"
    if origin is not None and issubclass(origin, Mapping):
        return "values by name"
    words = {type(None): "none", str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(hint) or getattr(hint, "__name__", str(hint))
