"""A user's own data: JSON, JSON lines, or CSV.

`prompt`, `subject`, `target` are wanted; `truth`, `relation`, `case_id` may be there. Questions: `paraphrases` (texts);
`neighbours` and `portability` (each `prompt` and `answer`, and perhaps `aliases` and `aspect`); `openings` and
`references` (texts). In a CSV file, where a field is one text: `paraphrase`, `neighbour` with `neighbour_answer`,
`follows` with `follows_answer`; several of a kind are numbered, `paraphrase_1`, `paraphrase_2`.
"""

from __future__ import annotations

from collections.abc import Iterator

from .case import Case, Kind, Probe
from .row import BadRow, Row


def own(row: Row) -> Case:
    """A row in errata's own words."""
    edit = row.edit("prompt", "subject", "target", row.maybe("truth"))
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


def _numbered(row: Row, name: str) -> Iterator[str]:
    """The fields `name`, `name_1`, `name_2` ... that hold something."""
    for field in (name, *(f"{name}_{i}" for i in range(1, 100))):
        if row.get(field) not in (None, ""):
            yield field


def _listed(row: Row, name: str, kind: Kind, other: str | None) -> Iterator[Probe]:
    found = row.get(name) or []
    if not isinstance(found, list):
        raise BadRow(f"field {name!r}: expected a list of prompts with answers, found {found!r}")
    for i, one in enumerate(found):
        part = row.inside(f"{name}.{i}", one)
        ways = tuple(part.texts("aliases"))
        yield Probe(kind, part.text("prompt"), part.text("answer"), other, ways, part.maybe("aspect") or "")
