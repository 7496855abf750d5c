"""Finding the rows of a data set, by name or path, and telling their format by the fields they have.

A row that has no case in it is named by file, row and field in the log, counted, and left out, or is an error where
`strict` says so.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import is_file, said
from ..errors import ErrataError, UsageError, unknown
from . import counterfact, hub, knowedit, known, long, mquake, own, qaedit, ripple, zsre
from .case import Case
from .row import BadRow, Row
from .table import PART, SUFFIXES, rows

log = logging.getLogger(__name__)

KNOWN = "almanac-facts"
BUILT_IN = {"counterfact-mini": known.HERE / "counterfact-mini.json", KNOWN: known.HERE / "facts.jsonl"}
"""Data sets that ship with errata."""

OWN = "your own"
NO_SUBJECT = "no subject"
"""Stands among the marks of a format in which nothing says what a row is about."""
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], Case]]] = {
    "AKEW": (("requested_rewrite.fact_new_uns",), long.akew),
    "MQuAKE": (("requested_rewrite", "new_answer"), mquake.mquake),
    "CounterFact (ROME)": (("requested_rewrite",), counterfact.rome),
    "RippleEdits": (("edit.prompt",), ripple.ripple),
    "ZsRE (MEND)": (("src", "alt"), zsre.mend),
    "KnowEdit": (("prompt", "target_new", "locality"), knowedit.task),
    "KnowEdit without locality": (("prompt", "target_new", "portability"), knowedit.task),
    "CounterFact (EasyEdit)": (("prompt", "target_new"), counterfact.flat),
    "KnowEdit, WikiBio": (("text", "labels", "concept"), knowedit.wikibio),
    "KnowEdit, ConvSent": (("ent", "pos", "neg"), knowedit.convsent),
    "KnowEdit, Sanitation": (("question", "target_new", NO_SUBJECT), knowedit.sanitation),
    "UnKE": (("question", "answer", NO_SUBJECT), long.unke),
    "QAEdit": (("prompt", "target", "rephrase", "locality"), qaedit.qaedit),
    OWN: (own.WANTED, own.own),
}
"""What each format is recognised by, in the order they are tried: a row that has all of these fields (in your own,
under whatever name)."""


@dataclass(frozen=True)
class Loaded:
    """What was found in a data set."""

    cases: tuple[Case, ...]
    formats: dict[str, int]
    """How many rows were read as which format."""
    bad: tuple[str, ...]
    """Every row that has no case in it, with the reason."""
    unread: tuple[str, ...]
    """Fields of your own rows that no question is made of."""

    def __str__(self) -> str:
        """How the rows were read, in words."""
        read = " and ".join(f"{count} as {_about(name)}" for name, count in self.formats.items())
        unread = f"; not used: {', '.join(self.unread)}" if self.unread else ""
        return f"read {read}{unread}"


def _about(name: str) -> str:
    whole = NO_SUBJECT in FORMATS[name][0]
    return f"{name}, where the whole question stands for the subject" if whole else name


def load(name_or_path: str | Path, n: int | None = None, part: str = PART, strict: bool = False) -> list[Case]:
    """The cases of a data set.

    Args:
        name_or_path: `counterfact-mini` or `almanac-facts`; a JSON, JSON-lines or CSV file in a format that errata
            knows; or a data set on the hub: a name that errata knows (`counterfact`), `owner/name`, or
            `owner/name:file`.
        n: only the first so many.
        part: which part of a file that has several. By default the one to edit, never the one (`train`) that learned
            editors are trained on. A file that is one list has only the part `edit`.
        strict: whether a malformed row is an error. Otherwise it is reported in the log and the rest loads.

    Raises:
        UsageError: there is no such data set, file or part, or nothing in it can be read.
        ErrataError: a row is malformed, and `strict`.
    """
    return list(loaded(name_or_path, n, part, strict).cases)


def loaded(name_or_path: str | Path, n: int | None = None, part: str = PART, strict: bool = False) -> Loaded:
    """The cases of a data set, and how its rows were read. As `load`."""
    if n is not None and n < 1:
        raise UsageError(f"n is {n}; ask for at least one case")
    path, found = _source(name_or_path, part)
    cases: list[Case] = []
    formats: Counter[str] = Counter()
    bad: list[str] = []
    unread: dict[str, None] = {}
    for number, fields in found:
        row = Row(fields, path.name, number)
        try:
            name = format_of(row)
            cases.append(FORMATS[name][1](row))
        except ErrataError as error:
            bad.append(f"{row.place}: {error}")
            if strict:
                raise ErrataError(bad[-1]) from error
            log.warning("%s; left out", bad[-1])
            continue
        formats[name] += 1
        if name == OWN:
            unread |= dict.fromkeys(own.renamed(row).rest)
        if len(cases) == n:
            break
    if not cases:
        why = f" ({bad[0]})" if bad else ""
        raise UsageError(f"{path.name} has no case that can be read{why}")
    out = Loaded(tuple(cases), dict(formats), tuple(bad), tuple(unread))
    log.info("%s: %s", path.name, out)
    if bad:
        log.warning("%s: %d rows left out, %d loaded", path.name, len(bad), len(cases))
    if n is not None and len(cases) < n:
        log.warning("%s: %d cases asked for, it has %d", path.name, n, len(cases))
    return out


def _source(name_or_path: str | Path, part: str) -> tuple[Path, Iterator[tuple[int, Any]]]:
    """What to call the data, and its rows with their numbers."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name == KNOWN:
        if part not in known.PARTS:
            raise unknown(f"part of {KNOWN}", part, known.PARTS)
        return BUILT_IN[KNOWN], enumerate(known.rows(part), 1)
    if name in BUILT_IN:
        path = BUILT_IN[name]
    elif not is_file(path) and path.suffix not in SUFFIXES and (where := hub.place(name)):
        if ":" not in where:
            return Path(where), iter(enumerate(hub.rows(where, "train" if part == PART else part), 1))
        path = hub.file(where)
    elif not is_file(path) and ":" in name and (where := hub.place(name)):
        path = hub.file(where)
    elif not (isinstance(name_or_path, Path) or path.suffix in SUFFIXES or len(path.parts) > 1):
        raise unknown("data set", name, (*BUILT_IN, *hub.NAMES))
    if not is_file(path):
        raise UsageError(
            f"there is no file {str(path)!r}; give JSON, JSON lines, YAML, CSV, TSV or .xlsx, or {', '.join(BUILT_IN)}"
        )
    return path, rows(path, part)


def format_of(row: Row) -> str:
    """The format of a row, by the fields it has.

    Raises:
        BadRow: it is of none.
    """
    fields: Any = row.fields
    if isinstance(fields, ValueError):
        raise BadRow(f"it can't be read ({fields})")
    if not isinstance(fields, dict):
        raise BadRow(f"expected fields by name, found {type(fields).__name__}")
    if odd := [name for name in fields if not isinstance(name, str)]:
        raise BadRow(f"expected texts as names of fields, found {said(odd[0])}")
    for name, (marks, _) in FORMATS.items():
        if own.is_own(row) if name == OWN else all(_has(row, mark) for mark in marks):
            return name
    known = "; ".join(f"{name}: {', '.join(marks)}" for name, (marks, _) in FORMATS.items())
    raise BadRow(f"fields {said(sorted(fields), 200)} are of no format that errata knows ({known})")


def _has(row: Row, mark: str) -> bool:
    return not own.names_subject(row) if mark == NO_SUBJECT else row.has(mark)
