"""A user's own data, in any of the forms that `table` reads.

`prompt`, `subject`, `target` are wanted; `truth`, `chat`, `gap`, `relation`, `case_id` may be there. They may have
other names, as in `question`, `entity`, `answer`, `old` (`SYNONYMS`). Questions: `paraphrases` (texts); `neighbours`
and `portability` (each `prompt` and `answer`, and perhaps `aliases` and `aspect`); `openings` and `references` (texts).
In a table, where a field is one text: `paraphrase`, `neighbour` with `neighbour_answer`, `follows` with
`follows_answer`; several of a kind are numbered, `paraphrase_1`, `paraphrase_2`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from ..documents import said
from ..edit import Edit
from .case import Case, Kind, Probe
from .row import BadRow, Row
from .table import column

SYNONYMS = {
    "prompt": ("prompt", "question", "query"),
    "subject": ("subject", "entity"),
    "target": ("target", "answer", "new", "new_answer", "target_new", "correction"),
    "truth": ("truth", "old", "old_answer", "ground_truth"),
    "paraphrase": ("paraphrase", "rephrase", "rephrase_prompt"),
}
"""What a field may be called, by errata's own name for it."""
_OWN = {other: name for name, others in SYNONYMS.items() for other in others}
WANTED = ("prompt", "subject", "target")
OF_AN_EDIT = tuple(f.name for f in fields(Edit))
NEARLY = 0.8
"""Share of letters in common from which a name is taken for another, misspelt: `sbject`, `targets`."""


def is_own(row: Row) -> bool:
    """Whether a row has a prompt, a subject and a target, whatever they are called."""
    return not lacking(row)


def lacking(row: Row) -> list[str]:
    """Which of prompt, subject and target a row has under no name."""
    found = {_OWN.get(column(name)) for name in row.fields}
    return [name for name in WANTED if name not in found]


def misspelt(row: Row) -> tuple[str, str] | None:
    """A field that nobody asked for and that is nearly one of an edit, and that one."""
    for name in row.rest:
        if near := get_close_matches(column(str(name)), OF_AN_EDIT, 1, NEARLY):
            return name, near[0]
    return None


def names_subject(row: Row) -> bool:
    """Whether a row has a subject, whatever it is called."""
    return "subject" not in lacking(row)


def own(row: Row) -> Case:
    """A row in errata's own words, or in synonyms of them."""
    row = renamed(row)
    edit = replace(row.edit(*WANTED, row.maybe("truth")), chat=_is_chat(row), gap=row.get("gap"))
    same = [*row.texts("paraphrases"), *(row.text(name) for name in _numbered(row, "paraphrase"))]
    probes = [Probe("paraphrase", p, edit.target, edit.truth) for p in same]
    probes += _listed(row, "neighbours", "neighbourhood", edit.target)
    probes += _listed(row, "portability", "portability", None)
    numbered: list[tuple[str, Kind, str | None]] = [
        ("neighbour", "neighbourhood", edit.target),
        ("follows", "portability", None),
    ]
    for name, kind, other in numbered:
        for field in _numbered(row, name):
            probes.append(Probe(kind, row.text(field), row.text(field.replace(name, f"{name}_answer", 1)), other))
    openings, references = (tuple(row.texts(name)) for name in ("openings", "references"))
    return Case(row.id, edit, tuple(probes), row.maybe("relation"), openings=openings, references=references)


def _is_chat(row: Row) -> bool:
    """Whether a row says that it is asked in a chat."""
    found = row.get("chat")
    words = {None: False, "": False, "false": False, "no": False, "true": True, "yes": True}
    known = found.strip().casefold() if isinstance(found, str) else found
    if isinstance(known, bool):
        return known
    if not isinstance(known, str | None) or known not in words:
        raise BadRow(f"field 'chat': expected true or false, found {said(found)}")
    return words[known]


def renamed(row: Row) -> Row:
    """The row with its synonyms under errata's own names.

    Raises:
        BadRow: two of its fields say the same thing.
    """
    found: dict[str, Any] = {}
    named: dict[str, str] = {}
    for name, value in row.fields.items():
        if value in (None, ""):
            found.setdefault(_OWN.get(column(name), name), value)
            continue
        own_name = _OWN.get(column(name), name)
        if own_name in named:
            raise BadRow(f"fields {named[own_name]!r} and {name!r} both say what the {own_name} is; leave one out")
        found[own_name], named[own_name] = value, name
    return replace(row, fields=found)


def _numbered(row: Row, name: str) -> Iterator[str]:
    """The fields `name`, `name_1`, `name_2` ... that hold something."""
    found = [f for f in row.fields if re.fullmatch(rf"{name}(_\d+)?", f) and row.get(f) not in (None, "")]
    yield from sorted(found, key=lambda f: int(f.removeprefix(name).strip("_") or 0))


def _listed(row: Row, name: str, kind: Kind, other: str | None) -> Iterator[Probe]:
    for part in row.rows(name):
        ways = tuple(part.texts("aliases"))
        yield Probe(kind, part.text("prompt"), part.text("answer"), other, ways, part.maybe("aspect") or "")
