"""Patches as commands are given them: a file, or a folder of history; and one edit by number, subject or prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..edit import Edit
from ..errors import UsageError
from . import options

if TYPE_CHECKING:
    from ..history import History
    from ..patch import Patch

Place = Annotated[Path, typer.Argument(metavar="PATCH", help="A patch, or a folder of patches.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help=f"{options.MODEL} By default the one that the patch names.")
]


def carried(place: Path) -> Patch:
    """The patch of a file, or all that a folder of patches comes to."""
    from ..patch import Patch

    return history_in(place).patch() if place.is_dir() else Patch.load(place)


def history_in(folder: Path, new: bool = False) -> History:
    """The history in a folder, which may be a new one."""
    from ..history import History

    history = History.open(folder)
    if not new and not history.entries:
        raise UsageError(f"{str(folder)!r} holds no history; `errata merge {folder} PATCH` begins one")
    return history


def model_of(patch: Patch, model: str | None) -> str:
    """The model that is asked for, or else the one that a patch names."""
    return model or patch.about.get("base", {}).get("name", "almanac")


def edit_named(edits: Sequence[Edit], named: str, where: str) -> Edit:
    """The one edit of that number (from 1), subject or prompt.

    Raises:
        UsageError: there is none, or there are several.
    """
    if named.isdecimal() and 1 <= int(named) <= len(edits):
        return edits[int(named) - 1]
    found = [e for e in edits if named in (e.subject, e.text, e.prompt)]
    if len(found) == 1:
        return found[0]
    listed = [f"{i} ({e.text} -> {e.target})" for i, e in enumerate(edits, 1) if e in found or not found]
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    what = "several corrections" if found else "no correction"
    raise UsageError(f"{where} has {what} named {named!r}; give a number: {', '.join(listed[:10])}{more}")
