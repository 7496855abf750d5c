"""Methods x regimes over the same cases of one model. The unedited model is asked once, for all of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import store
from ..data import Case
from ..errors import ErrataError
from ..lm import LM
from ..method import Method, method, versions
from ..presets import frozen
from . import answer, metrics
from .ability import Ability
from .journal import Journal, opened
from .judge import Judge, judged
from .plan import Plan, digest
from .report import Report
from .results import FORMAT, Results
from .run import Progress, run
from .writing import with_openings

log = logging.getLogger(__name__)

Telling = Callable[[str, int], Any]
"""Called with the name and size of each cell; a context in which its progress is told."""


def run_grid(
    plan: Plan,
    lm: LM,
    cases: Sequence[Case],
    folder: Path | None = None,
    telling: Telling | None = None,
    again: Collection[str] = (),
) -> Results:
    """Run every method in every regime.

    Args:
        plan: the run.
        lm: its model, unedited.
        cases: its data.
        folder: where the journal is kept; a run that was broken off there goes on, and one with other methods or
            regimes is added to.
        telling: told of each cell.
        again: methods to run anew, whatever the folder has of them.

    Raises:
        UsageError: the folder holds another run.
        ErrataError: not one cell could be run.
    """
    chosen = {name: method(name).preset(lm, **frozen(settings)) for name, settings in plan.method.items()}
    made = made_with(lm, cases)
    ability = Ability.of(plan.text, plan.tasks)
    judge = Judge.of(plan.judge) if plan.judge else None
    asked = [with_openings(c) for c in cases] if plan.openings else cases
    with _asking(plan), _journal(folder, plan, chosen, made, again) as journal:
        plan = _grown(plan, journal)
        chosen |= {name: method(name)(**frozen(plan.method[name])) for name in plan.method if name not in chosen}
        if folder is not None:
            store.write(folder / "run.yaml", plan.to_yaml(made))
        reports, left = [], []
        for name, regime in cells(plan, chosen, left):
            with telling(f"{name}, {regime}", len(cases)) if telling else _silent() as progress:
                try:
                    report = _cell(plan, chosen[name], regime, lm, asked, journal, progress, ability)
                    reports.append(_judged(report, judge, journal, plan.seed) if judge else report)
                except ErrataError as error:
                    left.append({"method": name, "regime": regime, "error": str(error)})
    if not reports:
        raise ErrataError("; ".join(f"{one['method']}, {one['regime']}: {one['error']}" for one in left))
    about = {
        "format": FORMAT,
        "data": {"name": plan.data, "part": plan.part, "n": len(cases), "digest": made["data"]},
        "chat": plan.chat,
        "left_out": left,
    }
    return Results(about, tuple(reports))


def cells(plan: Plan, chosen: Mapping[str, Method], left: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """The cells of the grid; what is left out is added to `left` with the reason."""
    for name in plan.method:
        for regime in plan.regime:
            if regime == "batch" and not chosen[name].batched and "sequential" in plan.regime:
                left.append({"method": name, "regime": regime, "error": "it makes one edit at a time; see sequential"})
            else:
                yield name, regime


def made_with(lm: LM, cases: Sequence[Case]) -> dict[str, Any]:
    """What decides the numbers next to the plan: the model itself, the cases themselves, the libraries."""
    return {"fingerprint": lm.fingerprint, "data": digest(cases), "metrics": metrics.VERSION, "versions": versions()}


def check_made_with(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Warn where a run file was made with something else."""
    for name, value in wanted.items():
        if found.get(name) != value:
            log.warning("%s was made with %s %s, this is %s; numbers may differ", where, name, value, found.get(name))


def _cell(
    plan: Plan,
    chosen: Method,
    regime: str,
    lm: LM,
    cases: Sequence[Case],
    journal: Journal,
    progress: Progress | None,
    ability: Ability | None,
) -> Report:
    keep = regime == "sequential"
    return run(
        chosen,
        lm,
        cases,
        batch=plan.size(regime, len(cases)),
        keep=keep,
        seed=plan.seed,
        progress=progress,
        checkpoints=plan.checkpoints if keep else (),
        journal=journal.cell(f"{chosen.name} {regime}"),
        ability=ability,
    )


def _judged(report: Report, judge: Judge, journal: Journal, seed: int) -> Report:
    judged(judge, report.rows, journal)
    return replace(report, summary=metrics.summarise([r["metrics"] for r in report.rows], seed))


@contextmanager
def _journal(
    folder: Path | None, plan: Plan, chosen: Mapping[str, Method], made: Mapping[str, Any], again: Collection[str]
) -> Iterator[Journal]:
    settings = {name: asdict(one) for name, one in chosen.items()}
    decided = {**asdict(replace(plan, device=None)), "method": settings, **made}
    del decided["metrics"]  # a journal holds answers; they are scored anew
    decided = json.loads(json.dumps(decided))
    if folder is None:
        yield Journal(records=[{"kind": "run", "plan": decided}])
        return
    with opened(folder, decided, again) as journal:
        yield journal


def _grown(plan: Plan, journal: Journal) -> Plan:
    """The plan with the methods and regimes that its folder had before."""
    whole = journal.of("run")[-1]["plan"]
    return replace(plan, method={**whole["method"], **plan.method}, regime=tuple(whole["regime"]))


@contextmanager
def _asking(plan: Plan) -> Iterator[None]:
    usual = answer.NEW_TOKENS, answer.CHAT
    answer.NEW_TOKENS, answer.CHAT = plan.new_tokens or answer.NEW_TOKENS, plan.chat
    try:
        yield
    finally:
        answer.NEW_TOKENS, answer.CHAT = usual


@contextmanager
def _silent() -> Iterator[None]:
    yield None
