"""A value from a file is of its field's type, or is refused by name: nothing is bent to fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, nan
from typing import Any, Literal

import pytest

from errata import UsageError
from errata.typed import NONE_SUCH, checked, fitted, spelled


@pytest.mark.parametrize(
    ("value", "hint", "found"),
    [
        (3.0, int, 3),
        (3, float, 3.0),
        ([1, 2.0], tuple[int, ...], (1, 2)),
        ([[1, 2], [3, 4]], tuple[tuple[int, int], ...], ((1, 2), (3, 4))),
        (None, int | None, None),
        ("end", Literal["end", "subject"], "end"),
        ({"a": [1]}, Mapping[str, tuple[int, ...]], {"a": (1,)}),
        (object, Any, object),
    ],
)
def test_a_value_that_means_the_same_is_taken(value: Any, hint: Any, found: Any):
    made = fitted(value, hint)
    assert made == found
    assert type(made) is type(found)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3.5, int),
        ("3", int),
        (True, int),
        (False, float),
        (nan, float),
        (inf, float),
        (inf, int),
        (10**400, float),
        (2**53 + 1, float),  # no float is equal to it
        (1, bool),
        (1, str),
        (None, str),
        ("ab", tuple[str, ...]),
        ([1], tuple[int, int]),
        ([1, "x"], tuple[int, ...]),
        (True, Literal[1, 2]),
        ({1: 2}, Mapping[str, int]),
        ({"a": nan}, Mapping[str, float]),
        ([("a", 1)], Mapping[str, int]),
    ],
)
def test_a_value_of_another_type_is_not(value: Any, hint: Any):
    assert fitted(value, hint) is NONE_SUCH


@dataclass
class Made:
    steps: int = 1
    at: tuple[int, ...] = ()
    place: Literal["end", "subject"] = "end"
    clamp: float | None = None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": "few"}, "steps of it takes a whole number, not 'few'"),
        ({"steps": True}, "steps of it takes a whole number, not True"),
        ({"at": 3}, "at of it takes several, each a whole number, not 3"),
        ({"place": "start"}, "place of it takes one of end, subject, not 'start'"),
        ({"clamp": "nan"}, "clamp of it takes a number or none, not 'nan'"),
        ({"stepps": 3}, "no setting of it 'stepps'; did you mean 'steps'"),
    ],
)
def test_a_field_that_does_not_fit_is_named_with_what_it_takes(given: dict[str, Any], said: str):
    with pytest.raises(UsageError) as found:
        checked(Made, given, "it")
    assert said in str(found.value)


def test_fields_that_fit_come_as_their_types_say():
    assert checked(Made, {"steps": 2.0, "at": [1, 2]}, "it") == {"steps": 2, "at": (1, 2)}
    assert spelled(tuple[tuple[int, int], ...]) == "several, each (a whole number, a whole number)"
