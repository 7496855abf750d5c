"""The settings of a method, which is its own config: what `--set` may say, read by the type of the field."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

from ..errors import UsageError, unknown
from ..method import Method

WORDS = {"true": True, "false": False, "none": None, "null": None}


def read(method: type[Method], assignments: Iterable[str]) -> dict[str, Any]:
    """`["steps=10", "layers=4,5"]` as `{"steps": 10, "layers": (4, 5)}`.

    Raises:
        UsageError: an assignment is none, the method has no such field, or the value is of another type.
    """
    hints = _hints(method)
    found = {}
    for assignment in assignments:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise UsageError(f"--set {assignment!r} assigns nothing; write --set FIELD=VALUE, e.g. --set steps=10")
        if name not in hints:
            raise unknown(f"setting of {method.name}", name, hints)
        found[name] = _value(method, name, text, hints[name])
    return found


def describe(method: type[Method]) -> list[dict[str, Any]]:
    """Every setting: its name, type, default (None where a model's preset decides) and docstring line."""
    hints, docs = _hints(method), _docs(method)
    return [
        {"name": f.name, "type": _spelled(hints[f.name]), "default": _default(f), "about": docs.get(f.name, "")}
        for f in fields(method)
    ]


def _default(field: Field[Any]) -> Any:
    return None if field.default is MISSING else field.default


def _hints(method: type[Method]) -> dict[str, Any]:
    hints = typing.get_type_hints(method)
    return {f.name: hints[f.name] for f in fields(method)}


def _value(method: type[Method], name: str, text: str, hint: Any) -> Any:
    candidates = [_literal(text), text]
    if typing.get_origin(hint) is tuple:
        candidates.insert(1, (_literal(text),))  # one value where several are taken
    for value in candidates:
        fitted = _fitted(value, hint)
        if fitted is not _NO:
            return fitted
    raise UsageError(
        f"--set {name}={text}: {name} of {method.name} takes {_spelled(hint)}; `errata methods {method.name}` says more"
    )


def _literal(text: str) -> Any:
    """A number, a word such as true, a tuple such as 4,5; otherwise the text itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


_NO = object()


def _fitted(value: Any, hint: Any) -> Any:
    """The value as the type says it, `_NO` if it is of another."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((v for a in args if (v := _fitted(value, a)) is not _NO), _NO)
    if origin is typing.Literal:
        return value if value in args else _NO
    if origin is tuple:
        return _fitted_tuple(value, args)
    if hint is type(None):
        return None if value is None else _NO
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else _NO


def _fitted_tuple(value: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, tuple | list):
        return _NO
    wanted = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    parts = [_fitted(v, a) for v, a in zip(value, wanted, strict=False)]
    return tuple(parts) if len(wanted) == len(value) and not any(p is _NO for p in parts) else _NO


def _spelled(hint: Any) -> str:
    """A type in words: `int`, `one of 'end', 'subject'`, `several of int`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_spelled, args))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"several of {_spelled(args[0])}" if args[-1] is Ellipsis else f"({', '.join(map(_spelled, args))})"
    words = {type(None): "none", str: "text", bool: "true or false"}
    return words.get(hint) or hint.__name__


def _docs(method: type[Method]) -> dict[str, str]:
    """The docstring line under each field, read from the source."""
    found: dict[str, str] = {}
    for cls in reversed(method.__mro__[:-1]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except (OSError, TypeError, SyntaxError):  # no source at hand
            continue
        found |= _under_fields(tree)
    return found


def _under_fields(tree: ast.AST) -> dict[str, str]:
    body = getattr(tree, "body", [])
    return {
        field.target.id: " ".join(line.value.value.split())
        for field, line in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
    }
