"""`errata train`: a learned editor for a model, once; afterwards its edits cost one forward and one backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from ..errors import UsageError
from ..escape import markup
from . import options, shell

if TYPE_CHECKING:
    from ..train import Course, Losses, Progress, Trained


def train(
    method: Annotated[str, typer.Argument(help="A method that needs a trained editor, e.g. mend.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The editor's file; what is unfinished goes on from it.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help="almanac-facts (the default), counterfact-mini, or a file; may be repeated."),
    ] = None,
    model: options.Model = "almanac",
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="Only the first so many cases of each.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Batches at most.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", "-b", min=1, help="Cases in a batch.")] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", min=1, help="Batches a step, where all its cases don't fit in memory.")
    ] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Adam's learning rate.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the split, the network and the draws.")] = None,
    start: Annotated[
        str | None, typer.Option("--start", help="An editor to go on from, in place of a new one.")
    ] = None,
    log: Annotated[Path | None, typer.Option("--log", help="A JSON-lines file of every step's losses.")] = None,
    tracker: Annotated[
        str | None,
        typer.Option(
            "--tracker",
            help="The losses also go to tensorboard (in runs/ beside --out), wandb, trackio or another installed "
            "tracker that accelerate knows.",
        ),
    ] = None,
    assignments: options.Settings = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Train the editor of a learned method on cases that it is not judged by: of a file in parts, on its part `train`.

    A training that is stopped goes on from its last checkpoint, to the same numbers.
    """
    if rate is not None and not 0 < rate < math.inf:
        raise UsageError(f"--rate is {rate}; give a number above 0, such as 1e-4")
    kind = _kind(method)
    from ..track import Tracker
    from . import settings

    chosen = settings.read(kind, assignments or ())
    shell.check_writable(out)
    shell.check_writable(log)
    track = Tracker(tracker, out.parent / "runs") if tracker else None
    cases = [case for name in data or ["almanac-facts"] for case in _cases(name, n)]
    lm = shell.load(model, dtype, device)
    how = kind.preset(lm, **chosen)
    given = {"steps": steps, "batch": batch, "accumulate": accumulate, "rate": rate, "seed": seed, "start": start}
    course = _course(how, lm, given)
    run = f"errata-{how.name}", {"model": lm.name, **asdict(how), **asdict(course)}
    with (
        shell.resumable(out),
        _progress(course.steps) as bar,
        track.following(*run) if track else nullcontext() as told,
    ):
        found = how.train(lm, cases, course, out=out, log=log, progress=_all(bar, told))
    shell.wrote(out)
    result = {"editor": str(out), "bytes": out.stat().st_size, **found.about}
    shell.give(result, lambda: _shown(result), as_json)


def _kind(name: str) -> type[Trained]:
    from ..method import method, methods
    from ..train import Trained

    kind = method(name)
    if not issubclass(kind, Trained):
        known = ", ".join(n for n, k in methods().items() if issubclass(k, Trained))
        raise UsageError(f"{name} needs no trained editor; those that do: {known}")
    return kind


def _cases(name: str, n: int | None) -> list[Any]:
    """The cases to learn from: the part `train` of a data set in parts, all of one that is a list."""
    from .. import data as sets

    try:
        return sets.load(name, n, part="train")
    except UsageError as error:
        if "no part of" not in str(error):
            raise
        return sets.load(name, n)


def _course(how: Trained, lm: Any, given: dict[str, Any]) -> Course:
    from .. import presets
    from ..train import Course

    course = Course(**presets.course(how.name, lm))
    assert given.keys() <= {f.name for f in fields(course)}
    return replace(course, **{k: v for k, v in given.items() if v is not None})


@contextmanager
def _progress(steps: int) -> Iterator[Progress | None]:
    """A bar with the losses on a terminal, nothing elsewhere."""
    if not shell.err.is_terminal:
        yield None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=shell.err, transient=True) as bar:
        task = bar.add_task("", total=steps)
        seen = {False: "", True: ""}

        def tell(step: int, losses: Losses, held: bool) -> None:
            seen[held] = ("held out " if held else "") + " ".join(f"{k} {v:.3f}" for k, v in losses.items())
            bar.update(task, completed=step, description="; ".join(filter(None, seen.values())))

        yield tell


def _all(*told: Progress | None) -> Progress:
    """Tell each of those that there are."""

    def tell(step: int, losses: Losses, held: bool) -> None:
        for one in filter(None, told):
            one(step, losses, held)

    return tell


def _shown(result: dict[str, Any]) -> list[RenderableType]:
    looks = result["training"]["losses"]
    parts = [k for k in looks[0] if k != "step"]
    table = shell.table("step", *parts, right={"step", *parts})
    best = min(looks, key=lambda look: look["total"])
    for look in looks:
        mark = "bold" if look is best else ""
        table.add_row(*(shell.styled(t, mark) for t in (str(look["step"]), *(f"{look[k]:.3f}" for k in parts))))
    note = "[dim]losses of the validation part; the editor is the one with the least total.[/]"
    use = f"{markup(result['editor'])} ({shell.size(result['bytes'])}): use it with --set editor={result['editor']}"
    return [table, note, markup(use)]
