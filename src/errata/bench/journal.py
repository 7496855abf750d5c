"""What a run has found so far: an append-only file of JSON lines, each on disk before the run goes on.

After `kill -9` at any moment the file holds every whole line; a torn last one is cut off, and what it would have said
is done again. Nothing is lost or doubled: a run asks the journal before it works. What counts no more stays in the
file, and a later line says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .. import store
from ..documents import parsed_json
from ..errors import ErrataError, UsageError

Record = dict[str, Any]
FILE = "journal.jsonl"
GROWING = ("method", "regime")
"""What may be added to the plan of a run."""


@dataclass(eq=False)
class Journal:
    """The records of a run that count, in the order they were made. Without a file it only remembers."""

    folder: Path | None = None
    """Where the file is, and whatever else a run must find again."""
    records: list[Record] = field(default_factory=list)
    file: IO[bytes] | None = None

    def add(self, record: Record) -> None:
        """Keep a record; when this returns it is on disk."""
        if self.file is not None:
            self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        self.count(record)

    def count(self, record: Record) -> None:
        """Remember a record, or what one of kind `dropped` says."""
        if record["kind"] == "dropped":
            self.records = [r for r in self.records if r.get("cell") not in record["cells"]]
        else:
            self.records.append(record)

    def drop(self, cells: Collection[str]) -> None:
        """Let the records of cells count no more: they are run anew."""
        self.add({"kind": "dropped", "cells": sorted(cells)})
        for name in cells:
            for path in self.folder.glob(f"state/{_file(name, '*')}") if self.folder else ():
                path.unlink()

    @property
    def cells(self) -> set[str]:
        """Those that have a record."""
        return {r["cell"] for r in self.records if "cell" in r}

    def of(self, kind: str) -> list[Record]:
        """The records of a kind."""
        return [r for r in self.records if r["kind"] == kind]

    def cell(self, name: str) -> Cell:
        """What concerns one method in one regime."""
        return Cell(self, name)


@dataclass(eq=False)
class Cell:
    """A journal's records of one method in one regime."""

    journal: Journal = field(default_factory=Journal)
    name: str = ""

    def add(self, kind: str, **found: Any) -> None:
        """Keep a record of this cell."""
        self.journal.add({"kind": kind, "cell": self.name, **found})

    def drop(self) -> None:
        """Let the records of this cell count no more."""
        self.journal.drop([self.name])

    def past(self, *kinds: str) -> list[Record]:
        """The records of these kinds that count: those since the cell last began anew."""
        own = [r for r in self.journal.records if r.get("cell") == self.name]
        begun = max((i for i, r in enumerate(own) if r["kind"] == "anew"), default=0)
        return [r for r in own[begun:] if r["kind"] in kinds]

    def state(self, done: int) -> Path | None:
        """Where to keep a patch of so many edits; None where nothing is kept."""
        if self.journal.folder is None:
            return None
        return self.journal.folder / "state" / _file(self.name, f"{done:07d}")


@contextmanager
def opened(folder: Path, plan: Record, again: Collection[str] = ()) -> Iterator[Journal]:
    """The journal of a run in this folder, which is begun if there is none.

    Args:
        folder: made if it isn't there.
        plan: what decides the numbers. Methods and regimes that the folder doesn't have yet are added to it (its last
            record of kind `run` says what it has then); a journal of another plan is not gone on with. A method of
            which it has no number yet may come with other settings.
        again: methods whose records count no more.

    Raises:
        UsageError: the folder holds another run, or another process is at it.
        ErrataError: the journal can't be written or is damaged before its end.
    """
    path = folder / FILE
    try:
        (folder / "state").mkdir(parents=True, exist_ok=True)
        file = path.open("ab+")
    except OSError as error:
        raise UsageError(f"{str(path)!r} can't be written: {error.strerror}; give another folder") from error
    with file:
        _lock(file, folder)
        journal = Journal(folder, file=file)
        for record in _whole(file, path):
            journal.count(record)
        _add(journal, json.loads(json.dumps(plan)), folder, again)
        yield journal


def _lock(file: IO[bytes], folder: Path) -> None:
    try:
        store.hold(file.fileno())
    except BlockingIOError:
        raise UsageError(f"another process writes in {str(folder)!r}; wait for it, or give another folder") from None


def _whole(file: IO[bytes], path: Path) -> list[Record]:
    """The whole lines; a torn last one is cut off."""
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        file.truncate(end)
    out: list[Record] = []
    for number, line in enumerate(content[:end].splitlines(), 1):
        try:
            record = parsed_json(line.decode())
            if not isinstance(record["kind"], str):
                raise TypeError
        except (LookupError, TypeError, ValueError) as error:
            raise ErrataError(f"{str(path)!r} is damaged in line {number}; begin anew in another folder") from error
        out.append(record)
    return out


def _add(journal: Journal, plan: Record, folder: Path, again: Collection[str]) -> None:
    """Begin a run, or add to the one that is there."""
    dropped = {cell for cell in journal.cells if _method(cell) in again}
    bound = {_method(cell) for cell in journal.cells - dropped}
    runs = journal.of("run")
    kept = runs[-1]["plan"] if runs else plan
    grown = {**plan, **{name: _joined(kept[name], plan[name]) for name in GROWING if name in kept and name in plan}}
    for name in plan:
        if name not in GROWING:
            _same(name, kept.get(name), plan.get(name), folder)
    for name, settings in kept.get("method", {}).items():
        if name in bound:
            _same(f"method {name}", settings, grown["method"][name], folder, f"--again {name} to measure it anew, ")
    if dropped:
        journal.drop(dropped)
    if not runs or grown != kept:
        journal.add({"kind": "run", "plan": grown})


def _file(cell: str, done: str) -> str:
    return f"{cell.replace(' ', '-')}-{done}.safetensors"


def _method(cell: str) -> str:
    """Of a cell that is named by method and regime."""
    return cell.partition(" ")[0]


def _joined(kept: Any, added: Any) -> Any:
    """Methods with their settings, or names of regimes: those that were there come first."""
    return {**kept, **added} if isinstance(kept, dict) else list(dict.fromkeys([*kept, *added]))


def _same(what: str, kept: Any, wanted: Any, folder: Path, otherwise: str = "") -> None:
    if kept != wanted:
        raise UsageError(
            f"{str(folder)!r} holds another run: its {what} is {_said(kept)}, not {_said(wanted)}; "
            f"give {otherwise}another --out, or the same options to go on with it"
        )


def _said(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
