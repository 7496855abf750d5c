"""Rows with their numbers, out of files: JSON, JSON lines, CSV, TSV, YAML, and Excel where openpyxl is installed.

A row that can't be read comes as the `ValueError` that says why, so that the others are.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..documents import parsed_json, parsed_yaml
from ..errors import UsageError, unknown

log = logging.getLogger(__name__)

PART = "edit"
"""The part of a file that is one list; of a file in parts, the one that is taken unless another is asked for."""
CELL = 10**6
"""Letters that a cell may have. More is a quote that was opened and never closed."""


def rows(path: Path, part: str) -> Iterator[tuple[int, Any]]:
    """The rows of a file, from 1; in JSON lines, the numbers of the lines.

    Raises:
        UsageError: it can't be read, or has no such part.
    """
    if path.suffix == ".xlsx":
        _only_part(path, part)
        return _table(path, _sheet(path))
    text = _text(path)
    if path.suffix == ".jsonl":
        _only_part(path, part)
        lines = ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        return ((i, _parsed(line)) for i, line in lines)
    if path.suffix in (".csv", ".tsv"):
        _only_part(path, part)
        return _table(path, _records(path, text))
    parse, what = (_yaml, "YAML") if path.suffix in (".yaml", ".yml") else (parsed_json, "JSON")
    return iter(enumerate(_listed(path, text, part, parse, what), 1))


SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".xlsx"}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{str(path)!r} can't be read ({error}); give JSON, JSON lines, YAML, CSV or TSV in UTF-8, or .xlsx"
        ) from error


def _yaml(text: str) -> Any:
    return parsed_yaml(text, plain=True)


def _parsed(line: str) -> Any:
    try:
        return parsed_json(line)
    except ValueError as error:
        return error


def _listed(path: Path, text: str, part: str, parse: Callable[[str], Any], what: str) -> list[Any]:
    try:
        found = parse(text)
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is no {what} ({error}); JSON lines go in a file named .jsonl") from error
    if isinstance(found, dict):
        parts = {name: rows for name, rows in found.items() if isinstance(rows, list)}
        if part == PART and {"success", "locality"} <= parts.keys():
            return _with_neighbours(parts["success"], parts["locality"])
        if part not in parts:
            raise unknown(f"part of {path.name}", part, map(str, parts))
        return parts[part]
    if not isinstance(found, list):
        why = f" ({found})" if isinstance(found, ValueError) else ""
        raise UsageError(
            f"{str(path)!r} holds a {type(found).__name__}{why}; expected a list of rows, or lists by part"
        )
    _only_part(path, part)
    return found


def _with_neighbours(rows: list[Any], near: list[Any]) -> list[Any]:
    """KnowEdit's Sanitation: its neighbours are a list of their own, shared out among the rows."""
    return [
        {**row, "near": near[i % len(near)]} if near and isinstance(row, dict) else row for i, row in enumerate(rows)
    ]


def _only_part(path: Path, part: str) -> None:
    if part != PART:
        raise unknown(f"part of {path.name}", part, [PART])


# Tables


def _records(path: Path, text: str) -> Iterator[Any]:
    """The lines of a CSV or TSV file as lists of cells."""
    head = text.lstrip("\r\n").partition("\n")[0]
    separator = "\t" if path.suffix == ".tsv" else max(",;\t", key=head.count)
    limit = csv.field_size_limit(CELL)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        while True:
            try:
                yield next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                yield ValueError(str(error))
    finally:
        csv.field_size_limit(limit)


def _sheet(path: Path) -> Iterator[Sequence[Any]]:
    """The rows of a workbook's first sheet."""
    try:
        import openpyxl  # pyright: ignore[reportMissingModuleSource] - optional
    except ImportError:
        raise UsageError(f"{str(path)!r} needs openpyxl (pip install openpyxl), or save it as .csv") from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        if len(book.sheetnames) > 1:
            log.warning("%s has %d sheets; only %r is read", path.name, len(book.sheetnames), book.sheetnames[0])
        found = [[_cell(cell) for cell in row] for row in book.worksheets[0].iter_rows()]
        book.close()
    except Exception as error:  # a damaged workbook fails in many ways
        raise UsageError(f"{str(path)!r} is no workbook that can be read ({error}); save it as .csv") from error
    yield from found


def _cell(cell: Any) -> Any:
    """What a cell shows: its text, or the number as it is written where no format changes that."""
    plain = type(cell.value) in (int, float) and cell.number_format in ("General", "0", "@")
    return str(cell.value) if plain else cell.value


def _table(path: Path, records: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    """Cells by the names in the first line."""
    head = next((record for record in records if isinstance(record, ValueError) or any(map(_filled, record))), [])
    if isinstance(head, ValueError):
        raise UsageError(f"the first line of {str(path)!r} can't be read ({head}); it names the columns")
    names = [column(str(name)) if _filled(name) else "" for name in head]
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise UsageError(f"{str(path)!r} has several columns named {min(twice)!r}; give each a name of its own")
    filled = (r for r in records if isinstance(r, ValueError) or any(map(_filled, r)))
    return ((i, r if isinstance(r, ValueError) else _fields(names, r)) for i, r in enumerate(filled, 1))


def column(name: str) -> str:
    """A column's name as errata writes it: `Neighbour answer 1` is `neighbour_answer_1`."""
    return "_".join(name.casefold().replace("-", " ").split())


def _fields(names: Sequence[str], cells: Sequence[Any]) -> Any:
    """A line of a table; an empty cell is a missing field."""
    if len(cells) != len(names):
        return ValueError(f"it has more or fewer cells, {len(cells)}, than the first line has names, {len(names)}")
    found = {name: cell for name, cell in zip(names, cells, strict=True) if _filled(cell)}
    return ValueError("it has a cell in a column without a name") if "" in found else found


def _filled(cell: Any) -> bool:
    return cell is not None and (not isinstance(cell, str) or bool(cell.strip()))
