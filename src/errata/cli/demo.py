"""`errata demo`: real facts corrected in a model that knows them; what else moved; and everything put back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule

from ..edit import question
from ..errors import ErrataError
from ..escape import markup
from . import options, shell

if TYPE_CHECKING:
    from ..data import Case
    from ..lm import LM
    from ..method import Method

NEIGHBOURS = 4
"""Probes of a kind that are shown for the case that is looked at closely."""


def demo(
    model: options.Model = "almanac",
    n: Annotated[
        int | None,
        typer.Option("--n", "-n", min=1, help="How many facts; by default 20 of almanac, 5 of another model."),
    ] = None,
    method: Annotated[str, typer.Option("--method", help="How to edit; `errata methods` lists them.")] = "rome",
    as_json: options.Json = False,
) -> None:
    """Correct real facts in a model that knows them, show what else moved, and put everything back to the bit."""
    started = time.perf_counter()
    from .. import bench
    from ..method import method as by_name
    from .measure import progress
    from .proof import imprint

    kind = by_name(method)
    lm = shell.load(model, None, None)
    how = kind.preset(lm)
    was = imprint(lm)
    with shell.working(f"looking for facts that {lm.name} knows"):
        cases = known(lm, n or (20 if model == "almanac" else 5))
    with progress(f"correcting {len(cases)} facts with {method}", len(cases)) as tell:
        report = bench.run(how, lm, cases, progress=tell)
    kept = round_trip(how, lm, cases[0])
    is_now = imprint(lm)
    changed = sorted(k for k in was.keys() | is_now.keys() if was.get(k) != is_now.get(k))
    if changed:
        raise ErrataError(f"the model did not come back: {', '.join(changed[:3])} changed; please report this")

    found = report.to_dict() | {
        "patch": kept,
        "came_back": {"parameters": sum(k.startswith("parameter ") for k in was), "to_the_bit": True},
        "seconds": time.perf_counter() - started,
    }
    shell.give(found, lambda: [_corrections(found), _closer(found), _numbers(report), _proof(found)], as_json)


def known(lm: LM, n: int) -> list[Case]:
    """The first facts of counterfact-mini that a model gives the true answer to."""
    from ..ask import known_cases
    from ..data import load

    found = known_cases(lm, load("counterfact-mini"), n)
    if not found:
        raise ErrataError(f"{lm.name} knows none of the facts of counterfact-mini; give another --model")
    return found


def round_trip(how: Method, lm: LM, case: Case) -> dict[str, Any]:
    """One patch made, saved, loaded, applied and undone: what the model says at each step."""
    from ..patch import Patch
    from .correct import asked

    patch = how.edit(lm, [case.edit])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "correction.safetensors"
        patch.save(path)
        loaded, on_disk = Patch.load(path), path.stat().st_size
    states = asked(lm, [case.edit]), asked(lm, [case.edit], loaded), asked(lm, [case.edit])
    base, applied, undone = (replies[0].to_dict() for replies in states)
    if undone != base:
        raise ErrataError("the model answers otherwise after a patch was undone; please report this")
    return {"edit": case.edit.to_dict(), "bytes": on_disk, "base": base, "applied": applied, "undone": undone}


# What is shown


def _corrections(found: Mapping[str, Any]) -> RenderableType:
    """Every edit: what the model said and says, and how the questions around it fared."""
    about = found["about"]
    table = shell.table("asked", "before", "after", "rephrased", "others kept", right={"rephrased", "others kept"})
    for row in found["rows"]:
        edit, took = row["edit"], row["metrics"]["reliability"]["generated"]
        after = shell.styled(shell.short(row["after"] or row["error"] or "–"), "green" if took else "red")
        table.add_row(
            markup(question(edit)),
            shell.styled(shell.short(row["before"] or "–"), "dim"),
            after if took else f"{after} [dim]not {markup(edit['target'])}[/]",
            _share(row, "paraphrase"),
            _share(row, "neighbourhood"),
        )
    what = f"{about['n']} real facts of CounterFact that {about['model']['name']} knows"
    head = f"{what}, each corrected by {about['method']}"
    note = (
        "[dim]rephrased: other wordings of the question that get the new answer. others kept: questions about other "
        "subjects that are answered as before. Both as the model says them by itself (protocol: generated).[/]"
    )
    return Group("", Rule(markup(head), align="left", style="dim"), table, note)


def _share(row: Mapping[str, Any], kind: str) -> str:
    scores = [p["scores"]["generated"] for p in row["probes"] if p["kind"] == kind]
    known = [s for s in scores if s is not None]
    if not known:
        return "–"
    good = int(sum(known))
    style = "green" if good == len(known) else "yellow" if good else "red"
    return f"[{style}]{good}/{len(known)}[/]"


def _closer(found: Mapping[str, Any]) -> RenderableType:
    """The first edit with what was asked around it."""
    row = found["rows"][0]
    table = shell.table("asked", "before", "after", "")
    for kind in ("efficacy", "paraphrase", "neighbourhood"):
        for probe in [p for p in row["probes"] if p["kind"] == kind][:NEIGHBOURS]:
            table.add_row(*_probe(probe))
    head = f"One of them closer: {row['edit']['subject']} → {row['edit']['target']}"
    return Group("", Rule(markup(head), align="left", style="dim"), table)


def _probe(probe: Mapping[str, Any]) -> Sequence[str]:
    good = {"neighbourhood": "as before"}.get(probe["kind"], "new answer")
    bad = {"neighbourhood": "moved"}.get(probe["kind"], "not the new answer")
    fine = bool(probe["scores"]["generated"])
    before, after = ((probe[when] or {}).get("text") or "–" for when in ("before", "after"))
    return (
        markup(probe["prompt"]),
        shell.styled(shell.short(before), "dim"),
        shell.styled(shell.short(after), "green" if fine else "red"),
        f"[dim]{good if fine else bad}[/]",
    )


def _numbers(report: Any) -> RenderableType:
    return Padding(report.table(), (1, 0, 0, 0))


def _proof(found: Mapping[str, Any]) -> RenderableType:
    patch, edit = found["patch"], found["patch"]["edit"]
    target, p = edit["target"], {k: shell.probability(patch[k]["p_target"]) for k in ("base", "applied", "undone")}
    lines = [
        f"  saved   {edit['subject']} → {target}, a file of {shell.size(patch['bytes'])}; loaded again from it",
        f'  applied "{shell.short(patch["applied"]["says"])}", p({target}) {p["base"]} → {p["applied"]}',
        f'  undone  "{shell.short(patch["undone"]["says"])}", p({target}) {p["undone"]}',
    ]
    count = found["came_back"]["parameters"]
    back = shell.tick(True, f"the model came back: all {count} parameters equal to the bit, no hook left")
    head = Rule("A correction is a file", align="left", style="dim")
    return Group("", head, *map(markup, lines), "", back, f"[dim]  {found['seconds']:.0f} s in all[/]")
