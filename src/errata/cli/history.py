"""`errata log`, `diff`, `merge` and `revert`: a folder of patches as the history of what a model was corrected on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from ..edit import question
from ..errors import UsageError
from ..escape import markup
from . import options, shell

if TYPE_CHECKING:
    from ..edit import Edit
    from ..history import Conflict, History
    from ..patch import Patch

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of patches that `errata merge` made.")]
Place = Annotated[Path, typer.Argument(help="A patch, or a folder of patches.")]


def log(folder: Folder, as_json: options.Json = False) -> None:
    """List the corrections that a model carries, in order, and which of them get in each other's way."""
    history = _opened(folder)
    entries = []
    for entry in history.entries:
        edits = [e.to_dict() for e in history.load(entry).edits]
        entries.append({**vars(entry), "methods": list(entry.methods), "corrections": edits})
    found = {"folder": str(folder), "base": history.base, "entries": entries, "conflicts": _plain(history.conflicts())}
    shell.give(found, lambda: _logged(found), as_json)


def diff(a: Place, b: Place, as_json: options.Json = False) -> None:
    """Say what two patches (or what two folders of them come to) have and have not in common."""
    from .. import history

    found = {"a": str(a), "b": str(b), **history.diff(_carried(a), _carried(b))}
    shell.give(found, lambda: _compared(found), as_json)


def merge(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of patches; made if it is new.")],
    patches: Annotated[
        list[Path] | None, typer.Argument(metavar="PATCH...", help="Patches to take in, after what is there.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Take a patch in although it corrects again what is corrected there.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all that the model carries then as one patch.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Take patches into a folder, naming conflicts and refusing contradictions, or write what it comes to as one."""
    from ..patch import Patch

    if not patches and out is None:
        raise UsageError("there is nothing to do; give patches to take in, or --out FILE")
    shell.check_writable(out)
    history = _opened(folder, new=bool(patches))
    loaded = [(path, Patch.load(path)) for path in patches or ()]
    taken, conflicts = [], []
    for path, patch in loaded:
        conflicts += history.add(patch, path.stem, anyway)
        taken.append(shell.wrote(folder / path.name))
    whole = history.patch()
    if out:
        whole.save(out)
    found = {
        "folder": str(folder),
        "taken": taken,
        "conflicts": _plain(conflicts),
        "carries": len(whole.edits),
        "saved": shell.wrote(out) if out else None,
    }
    shell.give(found, lambda: _merged(found), as_json)


def revert(
    folder: Folder,
    which: Annotated[str, typer.Argument(metavar="ENTRY", help="The file of a patch in it, as `errata log` has it.")],
    subject: Annotated[
        str | None, typer.Option("--edit", help="Only the correction about this subject; the patch's others stay.")
    ] = None,
    try_out: Annotated[bool, typer.Option("--dry-run", help="Measure what it would do, and change nothing.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help=f"{options.MODEL} By default the one that the history names; none: ask no one."
        ),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Take a correction back, and measure what that does to it and to the others."""
    from .. import history as histories

    history = _opened(folder)
    edit = _edit_of(history, which, subject)
    before, after = history.patch(), history.without(which, edit)
    asked: list[dict[str, Any]] | None = None
    if model != "none":
        lm = shell.load(model or (history.base or {}).get("name", "almanac"), dtype, device)
        with shell.working(f"asking {lm.name}"):
            asked = histories.effect(lm, before, after)
    if not try_out:
        history.revert(which, edit)
        shell.wrote(folder)
    found = {"folder": str(folder), "reverted": which, "edit": edit and edit.to_dict(), "dry_run": try_out}
    found |= {"carries": len(after.edits), "effect": asked}
    shell.give(found, lambda: _reverted(found), as_json)


# What is meant


def _opened(folder: Path, new: bool = False) -> History:
    from ..history import History

    history = History.open(folder)
    if not new and not history.entries:
        raise UsageError(f"{str(folder)!r} holds no history; `errata merge {folder} PATCH` begins one")
    return history


def _carried(place: Path) -> Patch:
    from ..patch import Patch

    return _opened(place).patch() if place.is_dir() else Patch.load(place)


def _edit_of(history: History, which: str, subject: str | None) -> Edit | None:
    if subject is None:
        return None
    edits = history.load(history.entry(which)).edits
    found = [e for e in edits if e.subject == subject]
    if len(found) != 1:
        known = ", ".join(dict.fromkeys(e.subject for e in edits))
        raise UsageError(f"{which} has {len(found)} corrections about {subject!r}; its subjects: {known[:200]}")
    return found[0]


def _plain(conflicts: Sequence[Conflict]) -> list[dict[str, Any]]:
    return [
        {
            "kind": c.kind,
            "first": c.first.to_dict(),
            "second": c.second.to_dict(),
            "files": list(c.files),
            "cosine": c.cosine,
            "said": str(c),
        }
        for c in conflicts
    ]


# What is shown


def _logged(found: dict[str, Any]) -> list[RenderableType]:
    table = shell.table("patch", "added", "by", "corrections", "")
    for entry in found["entries"]:
        style = "" if entry["state"] == "active" else "dim"
        state = {"active": "", "reverted": "reverted", "replaced": f"in {entry['by']}"}[entry["state"]]
        cells = (entry["file"], entry["added"][:16], ", ".join(entry["methods"]), _short(entry["corrections"]), state)
        table.add_row(*(shell.styled(cell, style) for cell in cells))
    carried = sum(e["edits"] for e in found["entries"] if e["state"] == "active")
    base = found["base"] or {}
    line = f"{carried} corrections carried by {base.get('name')} ({base.get('fingerprint', '')[:8]})"
    return [table, markup(line), *_clashes(found["conflicts"])]


def _short(corrections: Sequence[dict[str, Any]], most: int = 3) -> str:
    listed = "; ".join(f"{e['subject']} → {e['target']}" for e in corrections[:most])
    return listed + (f" and {len(corrections) - most} more" if len(corrections) > most else "")


def _clashes(conflicts: Sequence[dict[str, Any]]) -> list[str]:
    return [f"[yellow]![/] {markup(c['said'])}" for c in conflicts] or [shell.tick(True, "no conflicts")]


def _compared(found: dict[str, Any]) -> list[RenderableType]:
    edits = shell.table("", "asked", "answer")
    for mark, style, part in (("-", "red", "only_a"), ("+", "green", "only_b"), ("=", "dim", "both")):
        for e in found[part]:
            edits.add_row(f"[{style}]{mark}[/]", markup(question(e)), markup(e["target"]))
    for a, b in found["otherwise"]:
        text, targets = question(a), f"{a['target']} → {b['target']}"
        edits.add_row("[yellow]≠[/]", markup(text), markup(targets))
    weights = shell.table(
        "weight", "norm a", "norm b", "apart", "cosine", right={"norm a", "norm b", "apart", "cosine"}
    )
    for w in found["weights"]:
        numbers = (w[k] for k in ("norm_a", "norm_b", "norm_apart", "cosine"))
        weights.add_row(markup(w["module"]), *("–" if x is None else f"{x:.3f}" for x in numbers))
    return [edits, weights]


def _merged(found: dict[str, Any]) -> list[RenderableType]:
    lines = [shell.tick(True, f"{file} was taken in") for file in found["taken"]]
    if found["saved"]:
        lines.append(shell.tick(True, f"all of it was written to {found['saved']}"))
    return [*lines, f"  {found['carries']} corrections in all", *_clashes(found["conflicts"])]


def _reverted(found: dict[str, Any]) -> list[RenderableType]:
    done = "would be taken back" if found["dry_run"] else "was taken back"
    line = shell.tick(True, f"{found['reverted']} {done}; {found['carries']} corrections stay")
    if found["effect"] is None:
        return [line]
    table = shell.table("asked", "", "before", "p", "after", "p", right={"p"})
    for row in found["effect"]:
        fine = row["after"]["says_target"] == row["stays"]
        table.add_row(
            markup(question(row)),
            "stays" if row["stays"] else "goes",
            shell.styled(shell.short(row["before"]["says"] or "–"), "dim"),
            shell.probability(row["before"]["p_target"] or 0),
            shell.styled(shell.short(row["after"]["says"] or "–"), "green" if fine else "red"),
            shell.probability(row["after"]["p_target"] or 0),
        )
    stay = [row for row in found["effect"] if row["stays"]]
    kept = sum(row["after"]["says_target"] for row in stay)
    return [table, line, *([f"  {kept} of the {len(stay)} that stay are answered as corrected"] if stay else [])]
