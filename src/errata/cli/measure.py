"""`errata bench`: what methods do to a model, in numbers that carry their protocol."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import UsageError
from . import options, shell

if TYPE_CHECKING:
    from ..bench import Report
    from ..method import Method


def bench(
    method: Annotated[str, typer.Option("--method", help="One method, or several separated by commas.")] = "rome",
    model: options.Model = "almanac",
    data: Annotated[
        str, typer.Option("--data", "-d", help="counterfact-mini (built in), or a JSON or JSON-lines file.")
    ] = "counterfact-mini",
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="Only the first so many cases.")] = None,
    regime: Annotated[
        Literal["single", "batch", "sequential"],
        typer.Option(
            "--regime",
            help="single: each edit from the unedited model; batch: N at once; sequential: on top of each other.",
        ),
    ] = "single",
    batch: Annotated[
        int | None, typer.Option("--batch", "-b", min=1, help="Edits at once; by default all (batch), 1 (sequential).")
    ] = None,
    assignments: options.Settings = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to keep the report and every answer.")] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Edit the cases of a data set and ask: did it take, does it carry over, what else moved?"""
    kinds = _kinds(method)
    chosen = {name: _chosen(kind, assignments) for name, kind in kinds.items()}
    shell.check_writable(out)
    from .. import bench as measure
    from .. import data as sets

    cases = sets.load(data, n)
    batched, keep = _regime(regime, batch, len(cases))
    lm = shell.load(model, dtype, device)
    ready = [kind.preset(lm, **chosen[name]) for name, kind in kinds.items()]
    reports = []
    for one in ready:
        with progress(one.name, len(cases)) as tell:
            reports.append(measure.run(one, lm, cases, batch=batched, keep=keep, progress=tell))
    if out:
        _save(reports, out)
    found = [report.to_dict() for report in reports]
    shell.give(found if len(found) > 1 else found[0], lambda: [report.table() for report in reports], as_json)


def _kinds(named: str) -> dict[str, type[Method]]:
    names = [name.strip() for name in named.split(",") if name.strip()]
    if not names:
        raise UsageError("--method names none; give one, or several separated by commas")
    from ..method import method

    return {name: method(name) for name in names}


def _chosen(kind: type[Method], assignments: list[str] | None) -> dict[str, Any]:
    from . import settings

    return settings.read(kind, assignments or ())


def _regime(regime: str, batch: int | None, n: int) -> tuple[int, bool]:
    """How many edits at once, and whether they stay."""
    if regime == "single" and batch not in (None, 1):
        raise UsageError("the single regime makes edits one by one; give --regime batch (or sequential) with --batch")
    if regime == "batch":
        return batch or n, False
    return batch or 1, regime == "sequential"


def _save(reports: list[Report], path: Path) -> None:
    """One report as it is; several as a list of them."""
    from .. import store

    if len(reports) == 1:
        reports[0].save(path)
    else:
        found = [report.to_dict() for report in reports]
        store.write(path, json.dumps(found, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    shell.wrote(path)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, nothing elsewhere; what is yielded is told how far the work is."""
    if not shell.err.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=shell.err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
