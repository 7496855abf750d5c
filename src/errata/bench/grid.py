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
from ..ask import known
from ..data import Case
from ..errors import ErrataError, UsageError
from ..lm import LM
from ..method import Method, method, versions
from ..presets import frozen
from . import metrics
from .ability import Ability
from .journal import Journal, opened
from .judge import Judge, judged
from .plan import Plan, digest
from .report import Report
from .results import FORMAT, Results
from .run import SLICE, Progress, run
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
    with _journal(folder, plan, chosen, made, again) as journal:
        plan = _grown(plan, journal)
        chosen |= {name: method(name)(**frozen(plan.method[name])) for name in plan.method if name not in chosen}
        if folder is not None:
            store.write(folder / "run.yaml", plan.to_yaml(made))
        cases = [in_chat(c) for c in cases] if plan.chat else cases
        looked_at = len(cases)
        if plan.known:
            cases, looked_at = _known(plan, lm, cases, journal, telling)
        asked = [with_openings(c) for c in cases] if plan.openings else cases
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
        "known": looked_at if plan.known else None,
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


def in_chat(case: Case) -> Case:
    """The case with its edits made in a chat, and all its questions asked in one."""
    edit, *also = (replace(e, chat=True) for e in case.edits)
    return replace(case, edit=edit, also=tuple(also))


def _known(
    plan: Plan, lm: LM, cases: Sequence[Case], journal: Journal, telling: Telling | None
) -> tuple[list[Case], int]:
    """The cases (at most `n`) whose truth the model says, and how many it was asked about to find them."""
    most, cell = plan.n or len(cases), journal.cell("known")
    found = [number for past in cell.past("known") for number in past["known"]]
    done = sum(past["asked"] for past in cell.past("known"))
    with telling(f"asking what {lm.name} knows", len(cases)) if telling else _silent() as progress:
        while done < len(cases) and len(found) < most:
            some = cases[done : done + min(SLICE, max(16, 2 * (most - len(found))))]
            says = iter(known(lm, [e for c in some for e in c.edits], plan.asking))
            right = [done + i for i, c in enumerate(some) if sum(next(says) for _ in c.edits) == len(c.edits)]
            cell.add("known", known=right, asked=len(some))
            found, done = found + right, done + len(some)
            if progress:
                progress(done, len(cases))
    if not found:
        raise UsageError(f"{lm.name} knows none of {done} cases (it says another answer than their `truth`, or none)")
    if len(found) >= most:
        done = found[most - 1] + 1
    return [cases[number] for number in found[:most]], done


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
        asking=plan.asking,
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
    if not plan.known:
        del decided["known"]  # as in journals of earlier versions
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
def _silent() -> Iterator[None]:
    yield None
