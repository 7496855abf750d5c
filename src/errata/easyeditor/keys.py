"""What a key of EasyEdit's files means to errata: a field of the method, several, one of few values, or nothing.

keys = {
    "v_lr": "rate",                               # the value of that field
    "layers": one("layer"),                       # a function of the value and the file, giving fields
    "fact_token": only("subject_last"),           # a value that errata can't honour is refused
    "stats_dir": Unused("kept in errata's store"),  # changes nothing, and why
}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..documents import said
from ..errors import UsageError
from ..presets import frozen

Values = Mapping[str, Any]
"""A whole file; the entries of a nested key are under `outer.inner`."""
Fields = dict[str, Any]
Reader = Callable[[Any, Values], Fields]


@dataclass(frozen=True)
class Unused:
    """A key that changes nothing."""

    why: str


@dataclass(frozen=True)
class Choice:
    """A key with few values, and the fields that each of them sets."""

    known: Mapping[Any, Fields]


Meaning = str | Reader | Choice | Unused
Keys = Mapping[str, Meaning]
"""By the key; `outer.*` stands for those of a nested one that are not named themselves."""


def only(*values: Any) -> Choice:
    """A key whose values all mean what errata does anyway."""
    return Choice({value: {} for value in values})


def meaning(keys: Keys, key: str) -> Meaning | None:
    """What a key means, if it is known."""
    return keys.get(key, keys.get(f"{key.partition('.')[0]}.*"))


def fields(keys: Keys, values: Values) -> Fields:
    """The fields that the keys of a file set.

    Raises:
        UsageError: a value asks for what errata doesn't do.
    """
    found: Fields = {}
    for key, value in values.items():
        match meaning(keys, key):
            case str() as field:
                found[field] = frozen(value)
            case Choice(known):
                if value not in list(known):  # a list can't be looked up
                    raise UsageError(f"{key} is {said(value)}; errata has {' or '.join(map(repr, known))}")
                found |= known[value]
            case Unused() | None:
                pass
            case read:
                found |= _read(read, key, value, values)
    return found


def _read(read: Reader, key: str, value: Any, values: Values) -> Fields:
    try:
        return read(value, values)
    except UsageError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"{key} is {said(value)}, which is none that errata can read") from error


def flat(keys: Keys, values: Values, under: str = "") -> Fields:
    """The values, those of groups with keys of their own (`grace.num_iter`) beside the others; numbers as numbers."""
    found: Fields = {}
    for key, value in values.items():
        name = f"{under}{key}"
        group = isinstance(value, Mapping) and any(known.startswith(f"{name}.") for known in keys)
        found |= flat(keys, value, f"{name}.") if group else {name: number(value)}
    return found


def number(value: Any) -> Any:
    """YAML reads `5e-1` as a text; EasyEdit's files mean a number."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


# Readers


def one(field: str) -> Reader:
    """A list of which errata takes a single entry."""

    def read(value: Any, values: Values) -> Fields:
        if isinstance(value, list) and len(value) != 1:
            raise UsageError(f"{values['alg_name']} edits one place, and the file lists {said(value)}; give one")
        return {field: value[0] if isinstance(value, list) else value}

    return read


def module(field: str) -> Reader:
    """One module, by the name of its weight: `transformer.h[35].mlp.c_fc.weight`."""
    return lambda value, values: {field: _name(one(field)(value, values)[field])}


def modules(field: str) -> Reader:
    """Several modules."""
    return lambda value, _: {field: tuple(map(_name, value))}


def _name(weight: str) -> str:
    return re.sub(r"\[(\d+)\]", r".\1", weight).removesuffix(".weight")


def maybe(field: str) -> Reader:
    """A number, or none: EasyEdit writes false."""
    return lambda value, _: {field: None if value in (False, None, "none", "None") else float(value)}


def given(field: str) -> Reader:
    """A value that is left to errata where the file says null."""
    return lambda value, _: {} if value is None else {field: value}


def beside(_: Any, __: Values) -> Fields:
    """A key that the reader of another one looks up."""
    return {}
