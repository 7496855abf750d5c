"""JSON and YAML from elsewhere: bounded in depth and size, every key once; and any value in a few words.

What is wrong with a document is a `ValueError` with one sentence, whatever the parser would have raised.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

LARGEST = 100_000
"""Values that a YAML document may come to when its aliases are written out."""

_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxstring, _short.maxother = 3, 6, 200, 200


def said(value: Any, most: int = 80) -> str:
    """A value for an error, in at most so many characters, however large or deep it is."""
    text = "none" if value is None else _short.repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def is_file(path: str | Path) -> bool:
    """Whether there is a file of that name; there is none of a name that no disk takes."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def parsed_json(text: str) -> Any:
    """What a JSON text holds. An object that has a key twice comes as the `ValueError` that says so, in its place.

    Raises:
        ValueError: it is no JSON, or nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    return found if len(found) == len(pairs) else ValueError(f"{_repeated(key for key, _ in pairs)!r} stands twice")


def _repeated(keys: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(key for key in keys if key in seen or seen.add(key))


def parsed_yaml(text: str, plain: bool = False) -> Any:
    """What a YAML document holds.

    Args:
        text: the document.
        plain: whether numbers, dates and words such as `no` stay the text they were written as.

    Raises:
        ValueError: it is no YAML, has a key twice, or is nested too deep or too large.
    """
    try:
        loader = (_Plain if plain else yaml.SafeLoader)(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (LookupError, AttributeError, TypeError):  # `!!bool maybe`
        raise ValueError("a tag in it does not fit its value") from None


class _Plain(yaml.SafeLoader):
    """Takes for more than a text only what is null, or `<<`."""


_Plain.yaml_implicit_resolvers = {
    first: [(tag, shape) for tag, shape in found if tag.endswith((":null", ":merge"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _measure(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node comes to, its aliases written out."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = LARGEST  # what holds itself has no end
    size = 1
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{_repeated(keys)!r} stands twice (line {node.start_mark.line + 1})")
        size += sum(_measure(key, known) + _measure(value, known) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_measure(one, known) for one in node.value)
    if size > LARGEST:
        raise ValueError(f"its aliases come to more than {LARGEST:,} values")
    known[id(node)] = size
    return size
