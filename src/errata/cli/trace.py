"""`errata trace`: where in a model a fact is looked up, and so where to edit it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import RenderableType

from ..errors import UsageError
from . import options, shell

if TYPE_CHECKING:
    from ..causal import Map, Proposal
    from ..edit import Edit

T = TypeVar("T")


def trace(
    prompt: Annotated[
        str | None, typer.Argument(help="What is asked, with {} for the subject or with the subject itself.")
    ] = None,
    subject: Annotated[str | None, typer.Option("--subject", "-s", help="What the fact is about.")] = None,
    answer: Annotated[
        str | None,
        typer.Option("--answer", "-a", help="Whose probability is followed; by default what the model says."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Many facts, to propose layers by the MLPs at the subject's last token: counterfact-mini (built in), "
            "or a JSON or JSON-lines file.",
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="Only the first so many facts.")] = None,
    whole: Annotated[
        bool, typer.Option("--map", help="With --data: show the average map of all states, which takes longer.")
    ] = False,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="MLPs or attentions restored at once; by default 10 of 48.")
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option("--draws", min=1, help="How many times noise is drawn; by default 10, for a proposal 4."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise.")] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", "-o", help="Where to draw the map: .png, .svg or .pdf.")
    ] = None,
    chat: options.Chat = False,
    model: options.Model = "almanac",
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Show which states carry a fact from subject to answer; over many facts, propose the layers to edit."""
    facts = [replace(fact, chat=fact.chat or chat) for fact in _facts(prompt, subject, answer, data, n, whole)]
    shell.check_writable(plot)
    from .. import causal

    if plot:
        causal.check_drawable(plot)
    lm = shell.load(model, dtype, device)
    settings: dict[str, Any] = {"window": window, "seed": seed} | ({"draws": draws} if draws else {})
    proposal = None
    if data:
        scan = _over(facts, lambda tell: causal.scan(lm, facts, tell, **settings))
        proposal = causal.propose(scan)
        found = _over(facts, lambda tell: causal.average(lm, facts, tell, **settings)) if whole else scan
    else:
        with shell.working(f"tracing {facts[0].text}"):
            found = causal.trace(lm, facts[0], answer, **settings)
    if plot:
        found.plot(plot)
    given = {"model": {"name": lm.name, "fingerprint": lm.fingerprint}, **found.to_dict()}
    given |= {"proposal": proposal.to_dict() if proposal else None, "plot": shell.wrote(plot) if plot else None}
    shell.give(given, lambda: _views(found, proposal, plot), as_json)


def _facts(
    prompt: str | None, subject: str | None, answer: str | None, data: str | None, n: int | None, whole: bool
) -> list[Edit]:
    """The facts. What they would be edited to plays no part."""
    from ..edit import Edit

    if data and (prompt or subject or answer):
        raise UsageError("--data has the facts; leave the prompt, --subject and --answer out")
    if whole and not data:
        raise UsageError("--map averages the facts of --data; of one fact the map is shown anyway")
    if n is not None and not data:
        raise UsageError("--n counts the facts of --data; leave it out, or name the facts")
    if data:
        from .. import data as sets

        return [case.edit for case in sets.load(data, n)]
    if answer is not None and not answer.strip():
        raise UsageError("--answer is empty; give what is to be said, or leave it out")
    if not prompt or not subject:
        raise UsageError('give a fact, "The mother tongue of {} is" --subject "Danielle Darrieux", or many with --data')
    return [Edit(prompt, subject, answer or "?")]


def _over(facts: Sequence[Edit], work: Callable[[Callable[[int, int], None] | None], T]) -> T:
    """What is found over many facts, with a bar."""
    from .measure import progress

    with progress("tracing facts", len(facts)) as tell:
        return work(tell)


def _views(found: Map, proposal: Proposal | None, plot: Path | None) -> list[RenderableType]:
    views: list[RenderableType] = [found.table()]
    if proposal:
        layers = ", ".join(map(str, proposal.layers))
        where = shell.grid(
            ("edit at", f"layer {proposal.peak} (one-layer methods), or layers {layers}"),
            ("because", f"MLPs there bring back {proposal.effect:.3f} of the {proposal.lost:.3f} that p(answer) lost"),
            ("sure", f"{proposal.sure:.0%} of resamples of the {proposal.facts} facts have their peak there"),
        )
        views += ["", where]
    return views + ([shell.tick(True, f"drawn to {plot}")] if plot else [])
