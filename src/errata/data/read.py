"""Finding the rows of a data set, by name or path, and telling their format by the fields they have.

A row that has no case in it is named by file, row and field in the log, counted, and left out, or is an error where
`strict` says so.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ErrataError, UsageError, unknown
from . import counterfact, hub, knowedit, known, long, mquake, own, qaedit, ripple, zsre
from .case import Case
from .row import BadRow, Row

log = logging.getLogger(__name__)

KNOWN = "almanac-facts"
BUILT_IN = {"counterfact-mini": known.HERE / "counterfact-mini.json", KNOWN: known.HERE / "facts.jsonl"}
"""Data sets that ship with errata."""

PART = "edit"

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
    "KnowEdit, Sanitation": (("question", "target_new"), knowedit.sanitation),
    "UnKE": (("question", "answer"), long.unke),
    "QAEdit": (("prompt", "target", "rephrase"), qaedit.qaedit),
    "your own": (("prompt", "subject", "target"), own.own),
}
"""What each format is recognised by, in the order they are tried: a row that has all of these fields."""


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
    if n is not None and n < 1:
        raise UsageError(f"n is {n}; ask for at least one case")
    path, found = _source(name_or_path, part)
    cases: list[Case] = []
    bad: list[str] = []
    for number, fields in found:
        row = Row(fields, path.name, number)
        try:
            cases.append(_case(row))
        except ErrataError as error:
            bad.append(f"{row.place}: {error}")
            if strict:
                raise ErrataError(bad[-1]) from error
            log.warning("%s; left out", bad[-1])
        if len(cases) == n:
            break
    if not cases:
        raise UsageError(f"{str(path)!r} holds no case that can be read" + (f" ({bad[0]})" if bad else ""))
    if bad:
        log.warning("%s: %d rows left out, %d loaded", path.name, len(bad), len(cases))
    if n is not None and len(cases) < n:
        log.warning("%s: %d cases asked for, it has %d", path.name, n, len(cases))
    return cases


def _source(name_or_path: str | Path, part: str) -> tuple[Path, Iterator[tuple[int, Any]]]:
    """What to call the data, and its rows with their numbers."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name == KNOWN:
        if part not in known.PARTS:
            raise unknown(f"part of {KNOWN}", part, known.PARTS)
        return BUILT_IN[KNOWN], enumerate(known.rows(part), 1)
    if name in BUILT_IN:
        path = BUILT_IN[name]
    elif not path.is_file() and path.suffix not in SUFFIXES and (where := hub.place(name)):
        if ":" not in where:
            return Path(where), iter(enumerate(hub.rows(where, "train" if part == PART else part), 1))
        path = hub.file(where)
    elif not path.is_file() and ":" in name and (where := hub.place(name)):
        path = hub.file(where)
    elif not (isinstance(name_or_path, Path) or path.suffix in SUFFIXES or len(path.parts) > 1):
        raise unknown("data set", name, (*BUILT_IN, *hub.NAMES))
    if not path.is_file():
        raise UsageError(
            f"there is no file {str(path)!r}; give a JSON, JSON-lines or CSV file, or {', '.join(BUILT_IN)}"
        )
    return path, _rows(path, part)


SUFFIXES = {".json", ".jsonl", ".csv"}


def _rows(path: Path, part: str) -> Iterator[tuple[int, Any]]:
    """The rows and their numbers, from 1. A damaged line of a JSON-lines file comes as the error it gives."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{str(path)!r} can't be read ({error}); give a JSON, JSON-lines or CSV file in UTF-8"
        ) from error
    if path.suffix == ".jsonl":
        _only_part(path, part)
        lines = ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        yield from ((i, _parsed(line)) for i, line in lines)
    elif path.suffix == ".csv":
        _only_part(path, part)
        yield from ((i, _cells(fields)) for i, fields in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1))
    else:
        yield from enumerate(_listed(path, text, part), 1)


def _listed(path: Path, text: str, part: str) -> list[Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is no JSON ({error}); JSON lines go in a file named .jsonl") from error
    if isinstance(found, dict):
        parts = {name: rows for name, rows in found.items() if isinstance(rows, list)}
        if part == PART and {"success", "locality"} <= parts.keys():
            return _with_neighbours(parts["success"], parts["locality"])
        if part not in parts:
            raise unknown(f"part of {path.name}", part, parts)
        return parts[part]
    if not isinstance(found, list):
        raise UsageError(f"{str(path)!r} holds a {type(found).__name__}; expected a list of rows, or lists by part")
    _only_part(path, part)
    return found


def _with_neighbours(rows: list[Any], near: list[Any]) -> list[Any]:
    """KnowEdit's Sanitation: its neighbours are a list of their own, shared out among the rows."""
    return [
        {**row, "near": near[i % len(near)]} if near and isinstance(row, dict) else row for i, row in enumerate(rows)
    ]


def _cells(fields: dict[Any, Any]) -> Any:
    """A line of a CSV file; an empty cell is a missing field."""
    if None in fields or None in fields.values():
        return ValueError("it has more or fewer cells than the first line has names")
    return {name.strip(): text for name, text in fields.items() if text.strip()}


def _only_part(path: Path, part: str) -> None:
    if part != PART:
        raise unknown(f"part of {path.name}", part, [PART])


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return error


def _case(row: Row) -> Case:
    fields: Any = row.fields
    if isinstance(fields, ValueError):
        raise BadRow(f"it can't be read ({fields})")
    if not isinstance(fields, dict):
        raise BadRow(f"expected fields by name, found {type(fields).__name__}")
    for marks, to_case in FORMATS.values():
        if all(row.has(mark) for mark in marks):
            return to_case(row)
    known = "; ".join(f"{name}: {', '.join(marks)}" for name, (marks, _) in FORMATS.items())
    raise BadRow(f"fields {sorted(map(str, fields))} are of no format that errata knows ({known})")
