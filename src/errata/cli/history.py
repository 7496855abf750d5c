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
from .patches import carried, edit_named, history_in

if TYPE_CHECKING:
    from ..history import Conflict
    from ..patch import Patch

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of patches that `errata merge` made.")]
Side = Annotated[Path, typer.Argument(help="A patch, or a folder of patches.")]


def log(folder: Folder, as_json: options.Json = False) -> None:
    """List the corrections that a model carries, in order, and which of them get in each other's way."""
    history = history_in(folder)
    entries = []
    for entry in history.entries:
        edits = [e.to_dict() for e in history.load(entry).edits]
        entries.append({**vars(entry), "methods": list(entry.methods), "corrections": edits})
    found = {"folder": str(folder), "base": history.base, "entries": entries, "conflicts": _plain(history.conflicts())}
    shell.give(found, lambda: _logged(found), as_json)


def diff(a: Side, b: Side, as_json: options.Json = False) -> None:
    """Say what two patches (or what two folders of them come to) have and have not in common."""
    from .. import history

    found = {"a": str(a), "b": str(b), **history.diff(carried(a), carried(b))}
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
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Take patches into a folder, all or none, naming conflicts and refusing contradictions; or write it as one."""
    if not patches and out is None:
        raise UsageError("there is nothing to do; give patches to take in, or --out FILE")
    shell.check_patch_file(out, force)
    history = history_in(folder, new=bool(patches))
    loaded = _by_name(patches or ())
    before = {e.file for e in history.active}
    history.add_all(loaded, anyway)
    files = [f"{name}.safetensors" for name in loaded]
    whole = history.patch()
    if out:
        whole.save(out)
    found = {
        "folder": str(folder),
        "taken": [shell.wrote(folder / file) for file in files if file not in before],
        "there": [str(folder / file) for file in files if file in before],
        "conflicts": _plain(history.conflicts()),
        "carries": len(whole.edits),
        "saved": shell.wrote(out) if out else None,
    }
    shell.give(found, lambda: _merged(found), as_json)


def revert(
    folder: Folder,
    which: Annotated[str, typer.Argument(metavar="ENTRY", help="The file of a patch in it, as `errata log` has it.")],
    one: Annotated[
        str | None,
        typer.Option("--edit", help="Only this correction, by its number, subject or prompt; the patch's others stay."),
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

    history = history_in(folder)
    edits = history.load(history.entry(which)).edits
    edit = edit_named(edits, one, which) if one is not None else None
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
    found |= {"carries": len(after.edits), "of": len(edits), "effect": asked}
    shell.give(found, lambda: _reverted(found), as_json)


def _by_name(paths: Sequence[Path]) -> dict[str, Patch]:
    """Patches by the names that their files get in a folder."""
    from ..patch import Patch

    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found and found[path.stem] != path:
            raise UsageError(f"{str(found[path.stem])!r} and {str(path)!r} would be one file; rename one")
        found[path.stem] = path
    return {name: Patch.load(path) for name, path in found.items()}


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
        cells = (
            entry["file"],
            f"{entry['added'][:16]} UTC",
            ", ".join(entry["methods"]),
            _short(entry["corrections"]),
            state,
        )
        table.add_row(*(shell.styled(cell, style) for cell in cells))
    carried = sum(e["edits"] for e in found["entries"] if e["state"] == "active")
    base = found["base"] or {}
    line = f"{_count(carried)} carried by {base.get('name')} ({base.get('fingerprint', '')[:8]})"
    return [table, markup(line), *_clashes(found["conflicts"])]


def _short(corrections: Sequence[dict[str, Any]], most: int = 3) -> str:
    listed = "; ".join(f"{e['subject']} → {e['target']}" for e in corrections[:most])
    return listed + (f" and {len(corrections) - most} more" if len(corrections) > most else "")


WAYS_OUT = {
    "target": "two answers to one question: take one back (errata revert), the later one mostly wins",
    "twice": "asked for twice, so both are in the weights: take one back (errata revert)",
    "keys": "kept at one place of a weight, so one may move the other: ask both (errata apply)",
}
"""What a kind of conflict means, and what to do about it."""


def _clashes(conflicts: Sequence[dict[str, Any]]) -> list[str]:
    if not conflicts:
        return [shell.tick(True, "no conflicts: no question has two answers, and no two keys meet")]
    kinds = dict.fromkeys(c["kind"] for c in conflicts)
    listed = [f"[yellow]![/] {markup(c['said'])}" for c in conflicts]
    return [*listed, *(f"  [dim]{WAYS_OUT[kind]}[/]" for kind in kinds)]


def _count(corrections: int) -> str:
    return f"{corrections} correction{'s' * (corrections != 1)}"


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
    legend = "- only in the first, + only in the second, = in both, ≠ in both with other answers; apart: norm of a - b"
    return [edits, weights, f"[dim]{legend}[/]"]


def _merged(found: dict[str, Any]) -> list[RenderableType]:
    lines = [shell.tick(True, f"{file} was taken in") for file in found["taken"]]
    lines += [shell.tick(True, f"{file} was there already, the same to the bit") for file in found["there"]]
    if found["saved"]:
        lines.append(shell.tick(True, f"all of it was written to {found['saved']}"))
    return [*lines, f"  {_count(found['carries'])} in all", *_clashes(found["conflicts"])]


def _reverted(found: dict[str, Any]) -> list[RenderableType]:
    done = "would be taken back" if found["dry_run"] else "was taken back"
    what = found["reverted"] if found["edit"] is None else f"1 of the {_count(found['of'])} of {found['reverted']}"
    stays = "stays" if found["carries"] == 1 else "stay"
    line = shell.tick(True, f"{what} {done}; {_count(found['carries'])} {stays}")
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
