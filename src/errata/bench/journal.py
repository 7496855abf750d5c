"""What a run has found so far: an append-only file of JSON lines, each on disk before the run goes on.

After `kill -9` at any moment the file holds every whole line; a torn last one is cut off, and what it would have said
is done again. Nothing is lost or doubled: a run asks the journal before it works.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import ErrataError, UsageError

Record = dict[str, Any]
FILE = "journal.jsonl"
GROWING = ("method", "regime")
"""What may be added to the plan of a run."""


@dataclass(eq=False)
class Journal:
    """The records of a run, in the order they were made. Without a file it only remembers."""

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
        self.records.append(record)

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

    def past(self, *kinds: str) -> list[Record]:
        """The records of these kinds that count: those since the cell last began anew."""
        own = [r for r in self.journal.records if r.get("cell") == self.name]
        anew = max((i for i, r in enumerate(own) if r["kind"] == "anew"), default=-1)
        return [r for r in own[anew:] if r["kind"] in kinds] if anew >= 0 else [r for r in own if r["kind"] in kinds]

    def state(self, done: int) -> Path | None:
        """Where to keep a patch of so many edits; None where nothing is kept."""
        if self.journal.folder is None:
            return None
        return self.journal.folder / "state" / f"{self.name.replace(' ', '-')}-{done:07d}.safetensors"


@contextmanager
def opened(folder: Path, plan: Record) -> Iterator[Journal]:
    """The journal of a run in this folder, which is begun if there is none.

    Args:
        folder: made if it isn't there.
        plan: what decides the numbers. Methods and regimes that the folder doesn't have yet are added to it (its last
            record of kind `run` says what it has then); a journal of another plan is not gone on with.

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
        journal = Journal(folder, _whole(file, path), file)
        _add(journal, json.loads(json.dumps(plan)), folder)
        yield journal


def _lock(file: IO[bytes], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: whoever starts two runs in one folder is not stopped
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
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
            out.append(json.loads(line))
        except ValueError as error:
            raise ErrataError(f"{str(path)!r} is damaged in line {number}; begin anew in another folder") from error
    return out


def _add(journal: Journal, plan: Record, folder: Path) -> None:
    """Begin a run, or add to the one that is there."""
    runs = journal.of("run")
    kept = runs[-1]["plan"] if runs else plan
    grown = {**plan, **{name: _joined(kept[name], plan[name]) for name in GROWING if name in kept and name in plan}}
    for name in plan:
        if name not in GROWING:
            _same(name, kept.get(name), plan.get(name), folder)
    for name, settings in kept.get("method", {}).items():
        _same(f"method {name}", settings, grown["method"][name], folder)
    if not runs or grown != kept:
        journal.add({"kind": "run", "plan": grown})


def _joined(kept: Any, added: Any) -> Any:
    """Methods with their settings, or names of regimes: those that were there come first."""
    return {**kept, **added} if isinstance(kept, dict) else list(dict.fromkeys([*kept, *added]))


def _same(what: str, kept: Any, wanted: Any, folder: Path) -> None:
    if kept != wanted:
        raise UsageError(
            f"{str(folder)!r} holds another run: its {what} is {_said(kept)}, not {_said(wanted)}; "
            "give another --out, or the same options to go on with it"
        )


def _said(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
