"""The settings of a method, which is its own config: what `--set` may say, read by the type of the field."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

from ..errors import UsageError, unknown
from ..method import Method
from ..typed import NONE_SUCH, fitted, hints, spelled

WORDS = {"true": True, "false": False, "none": None, "null": None}


def read(method: type[Method], assignments: Iterable[str]) -> dict[str, Any]:
    """`["steps=10", "layers=4,5"]` as `{"steps": 10, "layers": (4, 5)}`.

    Raises:
        UsageError: an assignment is none, the method has no such field, or the value is of another type.
    """
    known, found = hints(method), {}
    for assignment in assignments:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise UsageError(f"--set {assignment!r} assigns nothing; write --set FIELD=VALUE, e.g. --set steps=10")
        if name not in known:
            raise unknown(f"setting of {method.name}", name, known)
        found[name] = _value(method, name, text, known[name])
    return found


def describe(method: type[Method]) -> list[dict[str, Any]]:
    """Every setting: its name, type, default (None where a model's preset decides) and docstring line."""
    known, docs = hints(method), _docs(method)
    return [
        {"name": f.name, "type": spelled(known[f.name]), "default": _default(f), "about": docs.get(f.name, "")}
        for f in fields(method)
    ]


def _default(field: Field[Any]) -> Any:
    return None if field.default is MISSING else field.default


def _value(method: type[Method], name: str, text: str, hint: Any) -> Any:
    candidates = [_literal(text), text]
    if typing.get_origin(hint) is tuple:
        candidates.insert(1, (_literal(text),))  # one value where several are taken
    for value in candidates:
        if (found := fitted(value, hint)) is not NONE_SUCH:
            return found
    raise UsageError(
        f"--set {name}={text}: {name} of {method.name} takes {spelled(hint)}; `errata methods {method.name}` says more"
    )


def _literal(text: str) -> Any:
    """A number, a word such as true, a tuple such as 4,5; otherwise the text itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


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
