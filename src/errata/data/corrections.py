"""A list of corrections, as people keep them: a row is what is asked, about whom, and the right answer.

The file may be whatever `table` reads, and a row in errata's own words, in synonyms of them, or of a published data
set that names its subjects. Bad rows are told at once, and nothing of a list with one is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..documents import is_file, said
from ..edit import Edit
from ..errors import ErrataError, UsageError
from . import own, table
from .case import Case
from .read import FORMATS, NO_SUBJECT, OWN, format_of
from .row import BadRow, Row

log = logging.getLogger(__name__)

TOLD = 20
"""Bad rows that are told, of however many there are."""


@dataclass(frozen=True)
class Correction:
    """One row of a list."""

    edit: Edit
    row: int
    """Which row of its file it is, from 1; in JSON lines, which line."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Its further columns, such as `source`, `author` or `id`."""
    case: Case | None = None
    """The questions that the row brings with it."""
    format: str = OWN
    """What the row was read as."""


def corrections(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Correction]:
    """The corrections of a file, in their order.

    Args:
        path: JSON, JSON lines, YAML, CSV, TSV, or .xlsx where openpyxl is installed.
        columns: errata's name for a field, by what the file calls it: `{"Frage": "prompt"}`.

    Raises:
        UsageError: there is no such file, it has no rows, or some can't be read; the first of these are named.
    """
    path = Path(path)
    if not is_file(path):
        raise UsageError(f"there is no file {str(path)!r}; give a list of rows with prompt, subject and target")
    found: list[Correction] = []
    bad: list[str] = []
    formats: dict[str, None] = {}
    rows = list(table.rows(path, table.PART))
    for number, fields in rows:
        row = Row(fields, path.name, number)
        try:
            read = _read(row, columns or {})
        except ErrataError as error:
            bad.append(f"row {number}: {error}")
            continue
        found += read
        formats |= dict.fromkeys(one.format for one in read)
    if bad:
        some = "1 row" if len(bad) == 1 else f"{len(bad)} rows"
        more = f"; and {len(bad) - TOLD} more" if len(bad) > TOLD else ""
        raise UsageError(
            f"{path.name}: {some} of {len(rows)} can't be read, so none is taken: {'; '.join(bad[:TOLD])}{more}"
        )
    if not found:
        raise UsageError(f"{str(path)!r} holds no list of edits; give rows with prompt, subject and target")
    log.info("%s: %d rows, read as %s", path.name, len(found), " and ".join(formats))
    return found


def _read(row: Row, columns: Mapping[str, str]) -> list[Correction]:
    """What a row corrects."""
    if columns and isinstance(row.fields, dict):
        row = _with_columns(row, columns)
    name = _format_of(row)
    if name == OWN:
        row = own.renamed(row)
        case = own.own(row)
        if meant := own.misspelt(row):
            raise BadRow(
                f"there is no field {meant[0]!r} in an edit; write {meant[1]!r}, or give the column another name"
            )
        ids = {key: row.fields[key] for key in ("case_id", "id") if row.fields.get(key) not in (None, "")}
        return [Correction(case.edit, row.number, {**ids, **row.rest}, case)]
    marks, to_case = FORMATS[name]
    if NO_SUBJECT in marks or not (own.names_subject(row) or marks[0].startswith("requested_rewrite")):
        raise BadRow(f"nothing says what it is about; give a subject beside {' and '.join(sorted(row.fields))}")
    case = to_case(row)
    return [Correction(edit, row.number, {}, case, name) for edit in case.edits]


def _format_of(row: Row) -> str:
    """The format of a row; of one that is in no format, what it lacks to be a correction.

    Raises:
        BadRow: it is of none.
    """
    try:
        return format_of(row)
    except BadRow:
        named = isinstance(row.fields, dict) and all(isinstance(name, str) for name in row.fields)
        lacks = own.lacking(row) if named else []
        if not lacks or len(lacks) == len(own.WANTED):
            raise
        raise BadRow(f"it has no {' and no '.join(lacks)}; its fields are {said(list(row.fields), 200)}") from None


def _with_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its own names of columns replaced by errata's."""
    ours = {table.column(theirs): name for theirs, name in columns.items()}
    fields = {ours.get(table.column(str(name)), name): value for name, value in row.fields.items()}
    if missing := [theirs for theirs, name in columns.items() if name not in fields]:
        raise BadRow(f"it has no column {missing[0]!r}; its columns are {', '.join(map(str, row.fields))}")
    return Row(fields, row.file, row.number)
