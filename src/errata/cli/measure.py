"""`errata bench`: what methods do to a model, in numbers that carry their protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import UsageError
from . import options, shell

if TYPE_CHECKING:
    from ..bench import Plan, Results
    from ..bench.recipe import Recipe


def bench(
    run: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN.yaml | recipe NAME]", help="A run file, or a named recipe.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="One method, or several separated by commas.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=options.MODEL)] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="counterfact-mini (built in), a data set's name on the hub, or a file."),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="Only the first so many cases.")] = None,
    regime: Annotated[
        str | None,
        typer.Option(
            "--regime",
            help="single: each edit from the unedited model; batch: N at once; sequential: on top of each other. "
            "Several separated by commas.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", "-b", min=1, help="Edits at once; by default all (batch), 1 (sequential).")
    ] = None,
    assignments: options.Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="A folder for journal and reports (the same command goes on there), or a .json file."
        ),
    ] = None,
    force: options.Force = False,
    again: Annotated[
        str | None,
        typer.Option("--again", help="Methods to measure anew, separated by commas, whatever --out has of them."),
    ] = None,
    bad: Annotated[str | None, typer.Option("--bad", help="A malformed row: skip (and count) it, or fail.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the intervals.")] = None,
    openings: Annotated[
        bool | None, typer.Option("--openings", help="Also let the model write at length: fluency and consistency.")
    ] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Held-out text, for perplexity and KL.")] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Tasks of lm-evaluation-harness, on the edited model.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat", help="Edit and ask in a chat: questions are a user's turns, by the model's template."),
    ] = None,
    known: Annotated[
        bool | None,
        typer.Option("--known", help="Only cases that the model knows: it is asked first, until --n are found."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge", metavar="MODEL@URL", help="Let a model at an OpenAI-compatible endpoint judge answers."
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Compare two reports (files or folders) instead of running."),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Edit the cases of a data set and ask: did it take, does it carry over, what else moved?"""
    if compare is not None:
        _compare(compare, as_json)
        return
    anew = _names(again)
    method = method or (None if run else again)
    given = dict(model=model, data=data, method=method, regime=regime, n=n, batch=batch, bad=bad, seed=seed)
    given |= dict(dtype=dtype, device=device, openings=openings, tasks=tasks, chat=chat, known=known)
    given |= dict(text=None if text is None else str(text), judge=_judge(judge))
    given = {name: value for name, value in given.items() if value is not None}
    recipe = _recipe(run)
    plan, made_with = _plan(None if recipe else run, given, assignments)
    if recipe is not None:
        plan = _with_settings(recipe.plan(**given), assignments)
    folder = None if out is None or out.suffix == ".json" else out
    _check(plan, anew, folder)
    if folder is None:
        shell.check_replaceable(out, "report", _is_report, force)
    elif folder.is_file():
        raise UsageError(f"{str(folder)!r} is a file; give a folder, or the name of a .json file")
    with shell.resumable(folder, "the same command without --again" if anew else "the same command"):
        results = _measured(plan, made_with, out, folder, anew)
    if recipe is None:
        shell.give(results.to_dict(), lambda: [results.table()], as_json)
    else:
        found = {**results.to_dict(), "recipe": {"name": recipe.name, "rows": recipe.rows(results)}}
        shell.give(found, lambda: [recipe.table(results)], as_json)


def _recipe(words: list[str] | None) -> Recipe | None:
    """The recipe that the words name, if they name one."""
    if not words or words[0] != "recipe":
        return None
    from ..bench.recipe import recipe, recipes

    if len(words) != 2:
        raise UsageError(f"errata bench recipe takes one name; known: {', '.join(recipes())}")
    return recipe(words[1])


def _judge(named: str | None) -> dict[str, str] | None:
    if named is None:
        return None
    model, at, url = named.partition("@")
    if not (model and at and url):
        raise UsageError(f"--judge is {named!r}; give MODEL@URL, as in gpt-4o-mini@https://api.openai.com/v1")
    return {"url": url, "model": model}


def _compare(paths: tuple[Path, Path], as_json: bool) -> None:
    from dataclasses import asdict

    from ..bench import Results
    from ..bench.compare import compare, table

    found = compare(Results.load(paths[0]), Results.load(paths[1]))
    shell.give([asdict(d) for d in found], lambda: [table(found)], as_json)


def _plan(words: list[str] | None, given: dict[str, Any], assignments: list[str] | None) -> tuple[Plan, dict[str, Any]]:
    """The run that a file and the options describe; an option goes before the file."""
    from ..bench import Plan

    if words and len(words) > 1:
        raise UsageError(f"expected one run file, found {' '.join(words)!r}; see errata bench --help")
    plan, made_with = Plan.load(words[0]) if words else (Plan(), {})
    if not _names(given.get("method", "all")):
        raise UsageError("--method names none; give one, or several separated by commas")
    asked = Plan.of(given, "the options")
    plan = replace(plan, **{name: getattr(asked, name) for name in given})
    return _with_settings(plan, assignments), made_with


def _with_settings(plan: Plan, assignments: list[str] | None) -> Plan:
    if not assignments:
        return plan
    return replace(plan, method={name: {**kept, **_chosen(name, assignments)} for name, kept in plan.method.items()})


def _chosen(name: str, assignments: list[str]) -> dict[str, Any]:
    from ..method import method
    from . import settings

    return settings.read(method(name), assignments)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _check(plan: Plan, again: list[str], folder: Path | None) -> None:
    """Find out before anything is loaded whether the methods exist, have such settings, and can be run anew."""
    from ..errors import unknown
    from ..method import method

    for name, settings in plan.method.items():
        method(name).checked(settings)
    for name in again:
        if name not in plan.method:
            raise unknown("method in this run", name, plan.method)
    if again and folder is None:
        raise UsageError("--again measures a method of a folder anew; give the folder with --out")


def _is_report(path: Path) -> bool:
    from ..bench import Results
    from ..errors import ErrataError

    try:
        return bool(Results.load(path).reports)
    except ErrataError:
        return False


def _measured(
    plan: Plan, made_with: dict[str, Any], out: Path | None, folder: Path | None, again: list[str]
) -> Results:
    """Run it, and write what was found."""
    from .. import bench as measure
    from .. import data as sets
    from ..bench.grid import check_made_with
    from ..bench.grid import made_with as what_it_is

    most = None if plan.known else plan.n  # of known cases, `n` are looked for among all
    read = sets.loaded(plan.data, most, part=plan.part, strict=plan.bad == "fail")
    cases = read.cases
    lm = shell.load(plan.model, plan.dtype, plan.device)
    found = what_it_is(lm, cases)
    check_made_with(made_with, found, "the run")
    results = measure.run_grid(plan, lm, cases, folder, progress, again)
    results = results.with_data(read=str(read))
    if folder is not None:
        results.write(folder)
        shell.wrote(folder)
    elif out is not None:
        results.save(out)
        shell.wrote(out)
    return results


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
