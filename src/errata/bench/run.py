"""A method over cases in one of the regimes of the literature (eq. 1-3 of the EasyEdit paper), and what came of it.

- single: every edit by itself from the unedited model. N patches that can go by row answer in shared passes.
- batch=N: N edits at once, then their evaluation, then the weights go back.
- sequential: batch after batch on top of each other; evaluated only when all are made.

An edit that can't be made costs no other edit: it is a row with an `error` that scores 0.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..data import Case, Probe
from ..edit import Edit
from ..errors import ErrataError, UsageError
from ..lm import LM
from ..method import Method, versions
from ..patch import Patch
from . import answer, metrics
from .answer import Answer, ask_cases, tolerant
from .report import FORMAT, Report

TOGETHER = 64
"""Single edits made and asked together, at most."""
ROOM = 2**28
"""Bytes of patches held at a time in the single regime."""

Progress = Callable[[int, int], None]
Outcome = list[Answer] | ErrataError
"""What an edited model answers to a case's probes, or why there is no such model."""


def run(
    method: Method,
    lm: LM,
    cases: Sequence[Case],
    batch: int = 1,
    keep: bool = False,
    *,
    prior: Patch | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Edit, ask before and after, score.

    Args:
        method: how to edit. One that is not `batched` makes the edits of a batch one after another.
        lm: the unedited model; it is left exactly as it was.
        cases: the edits and what judges them.
        batch: how many edits are made at once.
        keep: whether edits stay while the next are made (sequential), or go back first.
        prior: where to go on with a sequential run: the patch of the edits already made, which are not made again.
        seed: of the intervals. (What the method draws hangs on its own seed.)
        progress: called with (cases edited, all cases) as it goes.

    Raises:
        UsageError: no cases, a batch of none, or `prior` without `keep`.
        ErrataError: not one edit could be made.
    """
    if not cases:
        raise UsageError("there are no cases to run; give at least one")
    if batch < 1:
        raise UsageError(f"a batch of {batch} edits is none; give 1 or more")
    if prior is not None and not keep:
        raise UsageError("prior is where a sequential run goes on; give keep=True with it")
    if lm.patched:
        raise UsageError("the model has a patch applied; leave it, and give a sequential run the patch as `prior`")
    work = _Run(method, lm, list(cases), batch, progress)
    before = work.before()
    regime, after = work.sequential(prior) if keep else work.batches() if batch > 1 else work.single()
    rows = [_row(c, method, regime, b, a) for c, b, a in zip(cases, before, after, strict=True)]
    return Report(_about(work, regime, rows, seed), rows, metrics.summarise([r["metrics"] for r in rows], seed))


@dataclass
class _Run:
    method: Method
    lm: LM
    cases: list[Case]
    batch: int
    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=lambda: {"editing": 0.0, "evaluating": 0.0})
    done: int = 0

    def single(self) -> tuple[str, list[Outcome]]:
        out: list[Outcome] = []
        together = 1  # the first patch tells how many can be held
        while len(out) < len(self.cases):
            group = self.cases[len(out) : len(out) + together]
            patches = self._each([c.edit for c in group])
            out += self._single_answers(group, patches)
            self._tell(len(group))
            size = max((p.bytes for p in patches if isinstance(p, Patch)), default=1)
            together = max(1, min(TOGETHER, ROOM // max(size, 1)))
        return "single", _some(out)

    def batches(self) -> tuple[str, list[Outcome]]:
        out: list[Outcome] = []
        for group in self._groups():
            patch, failed = self._at_once([c.edit for c in group], Patch())
            out += self._patched_answers(group, patch, failed)
            self._tell(len(group))
        return f"batch={self.batch}", _some(out)

    def sequential(self, prior: Patch | None) -> tuple[str, list[Outcome]]:
        patch, failed = prior or Patch(), []
        made = Counter(patch.edits)
        for group in self._groups():
            todo = [c.edit for c in group if not _struck(made, c.edit)]
            patch, errors = self._at_once(todo, patch)
            found = dict(zip(todo, errors, strict=True))
            failed += [found.get(c.edit) for c in group]
            self._tell(len(group))
        return "sequential", _some(self._patched_answers(self.cases, patch, failed))

    # Editing

    def _groups(self) -> Iterator[list[Case]]:
        for start in range(0, len(self.cases), self.batch):
            yield self.cases[start : start + self.batch]

    def _each(self, edits: list[Edit]) -> list[Patch | ErrataError]:
        with self._timed("editing"):
            return tolerant(lambda some: self.method.each(self.lm, some), edits)

    def _at_once(self, edits: Sequence[Edit], prior: Patch) -> tuple[Patch, list[ErrataError | None]]:
        """The patch with as many of the edits as can be made, and why the others can't."""
        with self._timed("editing"):
            if not self.method.batched:
                return self._folded(edits, prior)
            found = tolerant(lambda some: [self.method.edit(self.lm, some, prior)] * len(some), list(edits))
            failed = [f if isinstance(f, ErrataError) else None for f in found]
            if all(f is found[0] for f in found) and not any(failed):
                return found[0] if found else prior, failed
            good = [e for e, error in zip(edits, failed, strict=True) if error is None]
            try:
                return self.method.edit(self.lm, good, prior), failed
            except ErrataError as error:
                return prior, [reason or error for reason in failed]

    def _folded(self, edits: Sequence[Edit], prior: Patch) -> tuple[Patch, list[ErrataError | None]]:
        failed: list[ErrataError | None] = []
        for edit in edits:
            try:
                prior = self.method.edit(self.lm, [edit], prior)
                failed.append(None)
            except ErrataError as error:
                failed.append(error)
        return prior, failed

    # Asking

    def before(self) -> list[list[Answer]]:
        """What the unedited model answers; the last set of cases is remembered, for the next method's run."""
        asked = tuple(c.probes for c in self.cases)
        known, answers = self.lm.memo.get("bench", (None, None))
        if answers is None or known != asked:
            answers = self.ask(self.cases)
            self.lm.memo["bench"] = asked, answers
        return answers

    def ask(self, cases: Sequence[Case], patches: Sequence[Patch] | None = None) -> list[list[Answer]]:
        with self._timed("evaluating"):
            return ask_cases(self.lm, [c.probes for c in cases], patches)

    def _single_answers(self, group: Sequence[Case], patches: Sequence[Patch | ErrataError]) -> list[Outcome]:
        made = [(c, p) for c, p in zip(group, patches, strict=True) if isinstance(p, Patch)]
        if all(p.by_row for _, p in made) and (_exact_by_row(self.lm) or not any(p.low_rank for _, p in made)):
            found = iter(self.ask([c for c, _ in made], [p for _, p in made]))
        else:
            found = (self._patched_answers([c], p, [None])[0] for c, p in made)
        return [next(found) if isinstance(p, Patch) else p for p in patches]

    def _patched_answers(
        self, cases: Sequence[Case], patch: Patch, failed: Sequence[ErrataError | None]
    ) -> list[Outcome]:
        with patch.applied(self.lm):
            found = iter(self.ask([c for c, error in zip(cases, failed, strict=True) if error is None]))
        return [next(found) if error is None else error for error in failed]

    # Telling

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    def _tell(self, n: int) -> None:
        self.done += n
        if self.progress is not None:
            self.progress(self.done, len(self.cases))


def _exact_by_row(lm: LM) -> bool:
    """Whether a change beside a weight equals one in it: in half precision the weight rounds it, and what is measured
    is the model that a user gets."""
    return lm.dtype in (torch.float32, torch.float64)


def _struck(made: Counter[Edit], edit: Edit) -> bool:
    """Whether an edit is among those made, each of which counts once."""
    found = made[edit] > 0
    made[edit] -= found
    return found


def _some(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes, if there is one: where every edit fails, the reason is not in the edits."""
    failed = [o for o in outcomes if isinstance(o, ErrataError)]
    if len(failed) == len(outcomes):
        raise failed[0]
    return outcomes


def _row(case: Case, method: Method, regime: str, before: list[Answer], after: Outcome) -> dict[str, Any]:
    failed = isinstance(after, ErrataError)
    answers = [None] * len(before) if failed else after
    asked = [_asked(*parts) for parts in zip(case.probes, before, answers, strict=True)]
    scores = [a["scores"] for a in asked]
    return {
        "case_id": case.id,
        "relation": case.relation,
        "method": method.name,
        "regime": regime,
        "edit": case.edit.to_dict(),
        "error": str(after) if failed else None,
        "metrics": metrics.score_failed(case.probes) if failed else metrics.score_case(case.probes, scores),
        "before": before[0].text,
        "after": None if failed else after[0].text,
        "probes": asked,
    }


def _asked(probe: Probe, before: Answer, after: Answer | None) -> dict[str, Any]:
    return {
        **asdict(probe),
        "scores": metrics.score(probe, before, after) if after is not None else dict.fromkeys(metrics.PROTOCOLS),
        "before": before.to_dict(),
        "after": after.to_dict() if after is not None else None,
    }


def _about(work: _Run, regime: str, rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    method, lm = work.method, work.lm
    evaluated = {"single": "after each edit", "sequential": "after all edits"}
    probes = [p for row in rows for p in row["probes"]]
    return {
        "format": FORMAT,
        "method": method.name,
        "settings": json.loads(json.dumps(asdict(method))),
        "batched": method.batched,
        "regime": regime,
        "batch": work.batch,
        "evaluated": evaluated.get(regime, "after each batch"),
        "n": len(rows),
        "failed": sum(row["error"] is not None for row in rows),
        "unasked": sum(any(a and a["unasked"] for a in (p["before"], p["after"])) for p in probes),
        "seed": seed,
        "model": {"name": lm.name, "fingerprint": lm.fingerprint, "dtype": str(lm.dtype).removeprefix("torch.")},
        "new_tokens": answer.NEW_TOKENS,
        "metrics": metrics.VERSION,
        "versions": versions(),
        "efficiency": {**work.seconds, "editing_per_edit": work.seconds["editing"] / len(rows)},
    }
