"""A method over cases in one of the regimes of the literature (eq. 1-3 of the EasyEdit paper), and what came of it.

- single: every edit by itself from the unedited model. N patches that can go by row answer in shared passes.
- batch=N: N edits at once, then their evaluation, then the weights go back.
- sequential: batch after batch on top of each other; evaluated only when all are made.

An edit that can't be made costs no other edit: it is a row with an `error` that scores 0. What was found is kept in a
journal as it is found, and a run that has one goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import memory, presets
from ..ask import Answer, Asking, ask_cases, tolerant
from ..data import Case, Probe
from ..edit import Edit
from ..errors import ErrataError, UsageError
from ..lm import LM
from ..method import Method, versions
from ..patch import Patch
from . import metrics, writing
from .ability import Ability
from .journal import Cell, Record
from .report import FORMAT, Report

log = logging.getLogger(__name__)

TOGETHER = 64
"""Single edits made and asked together, at most."""
ROOM = 2**28
"""Bytes of patches held at a time in the single regime."""
SLICE = 256
"""Cases asked between two records of the journal."""
KEEP_EVERY = 60.0
"""Seconds of editing after which a sequential run keeps its patch."""
CHECKPOINTS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000)
"""After so many cases a sequential run is asked about them, to see what it retains."""

TAKEN = ("preparing", "editing", "processor", "evaluating", "bytes")
"""What a run takes. Seconds: for what a method needs once of the unedited model, for the edits (and of the processor
for them, which other work on the machine does not lengthen), for the questions to edited models. And bytes of patches.
"""

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
    checkpoints: Sequence[int] = (),
    journal: Cell | None = None,
    ability: Ability | None = None,
    asking: Asking | None = None,
) -> Report:
    """Edit, ask before and after, score.

    Args:
        method: how to edit. One that is not `batched` makes the edits of a batch one after another.
        lm: the unedited model; it is left exactly as it was.
        cases: the edits and what judges them.
        batch: how many cases are edited at once.
        keep: whether edits stay while the next are made (sequential), or go back first.
        prior: where to go on with a sequential run: the patch of the edits already made, which are not made again.
        seed: of the intervals. (What the method draws hangs on its own seed.)
        progress: called with (cases edited, all cases) as it goes.
        checkpoints: after how many cases a sequential run is asked about those so far (`about.retention`).
        ability: what else is asked of the edited model (`about.ability`): of the last one of a sequence, otherwise of
            the first.
        asking: how questions are put.
        journal: what is found is kept there, and what it holds is not done again.

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
    asking = asking or Asking()
    work = _Run(method, lm, list(cases), batch, progress, journal or Cell(), asking, tuple(checkpoints), ability)
    before = work.before()
    regime, after = work.sequential(prior) if keep else work.batches() if batch > 1 else work.single()
    rows = [_row(c, method, regime, b, a) for c, b, a in zip(cases, before, after, strict=True)]
    _add_writing(cases, rows)
    about = _about(work, regime, rows, seed)
    if keep and checkpoints:
        about["retention"] = _retention(work, rows, before, seed)
    if ability is not None:
        about["ability"] = next(iter(work.journal.past("ability")), {}).get("found")
    return Report(about, rows, metrics.summarise([r["metrics"] for r in rows], seed))


@dataclass
class _Run:
    method: Method
    lm: LM
    cases: list[Case]
    batch: int
    progress: Progress | None
    journal: Cell
    asking: Asking
    checkpoints: tuple[int, ...] = ()
    ability: Ability | None = None
    taken: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TAKEN, 0.0))
    """Since the last record."""
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TAKEN, 0.0))
    """In all records."""
    ready: bool = False
    """Whether the method has what it needs once of the unedited model."""
    peak: int | None = None
    flops: float | None = None
    """Of one edit."""
    counted: tuple[int, int] | None = None
    """Floating-point operations and edits of the first group, until they are in a record."""

    def single(self) -> tuple[str, list[Outcome]]:
        out: list[Outcome] = []
        together = 1  # the first patch tells how many can be held
        for past in self._past("group"):
            out += _outcomes(past)
            together = past["together"]
        while len(out) < len(self.cases):
            group = self.cases[len(out) : len(out) + together]
            try:
                patches = self._each(group)
                self._able(next((p for p in patches if isinstance(p, Patch)), None))
                found = self._single_answers(group, patches)
            except (RuntimeError, MemoryError) as error:
                if together == 1 or not memory.exhausted(error):
                    raise
                together //= 2
                log.warning("memory ran out; %s goes on with %d edits at a time", self.method.name, together)
                continue
            sizes = [p.bytes for p in patches if isinstance(p, Patch)]
            self.taken["bytes"] += sum(sizes)
            together = max(1, min(TOGETHER, ROOM // max([1, *sizes])))
            out += found
            self._keep("group", outcomes=_plain(found), together=together)
            self._tell(len(out))
        return "single", self._some(out)

    def batches(self) -> tuple[str, list[Outcome]]:
        return self._halving(self._batches)

    def _batches(self) -> tuple[str, list[Outcome]]:
        out: list[Outcome] = [o for past in self._past("group") for o in _outcomes(past)]
        while len(out) < len(self.cases):
            group = self.cases[len(out) : len(out) + self.batch]
            patch, failed = self._at_once(group, Patch())
            self.taken["bytes"] += patch.bytes
            self._able(patch)
            found = self._patched_answers(group, patch, failed)
            out += found
            self._keep("group", outcomes=_plain(found))
            self._tell(len(out))
        return f"batch={self.batch}", self._some(out)

    def sequential(self, prior: Patch | None) -> tuple[str, list[Outcome]]:
        return self._halving(lambda: self._sequence(prior))

    def _sequence(self, prior: Patch | None) -> tuple[str, list[Outcome]]:
        patch, failed = prior or Patch(), []
        for past in self._past("made", "checkpoint"):
            if past["kind"] == "made":
                failed = [ErrataError(why) if why else None for why in past["failed"]]
                self._tell(len(failed))
        made = Counter(patch.edits)
        for case in self.cases[: len(failed)]:
            _struck(made, case)
        if failed:
            patch = self._kept(len(failed)) if len(failed) < len(self.cases) or not self._asked() else patch
        kept = time.perf_counter()
        self._look_back(patch, failed)
        while len(failed) < len(self.cases):
            group = self.cases[len(failed) : len(failed) + self.batch]
            todo = [not _struck(made, c) for c in group]
            patch, errors = self._at_once([c for c, new in zip(group, todo, strict=True) if new], patch)
            found = iter(errors)
            failed += [next(found) if new else None for new in todo]
            self._tell(len(failed))
            if self._due(failed) or len(failed) == len(self.cases) or time.perf_counter() - kept > KEEP_EVERY:
                self._keep_patch(patch, failed)
                kept = time.perf_counter()
            self._look_back(patch, failed)
        return "sequential", self._some(self._last_answers(patch, failed))

    def _last_answers(self, patch: Patch, failed: list[ErrataError | None]) -> list[Outcome]:
        """What is answered when all edits are made, slice by slice."""
        out: list[Outcome] = [o for past in self._past("answers") for o in _outcomes(past)]
        self._able(patch if len(out) < len(self.cases) else None)
        while len(out) < len(self.cases):
            some = slice(len(out), len(out) + SLICE)
            found = self._patched_answers(self.cases[some], patch, failed[some])
            out += found
            self._keep("answers", outcomes=_plain(found))
        self._forget(self.journal.past("made"))
        return out

    def _asked(self) -> bool:
        return sum(len(past["outcomes"]) for past in self.journal.past("answers")) == len(self.cases)

    def _due(self, failed: list[ErrataError | None]) -> bool:
        """Whether the run is at a checkpoint that is not yet in the journal."""
        past = [r["after"] for r in self.journal.past("checkpoint")]
        passed = [k for k in self.checkpoints if k <= len(failed) < len(self.cases)]
        return bool(passed) and (not past or past[-1] < passed[-1])

    def _look_back(self, patch: Patch, failed: list[ErrataError | None]) -> None:
        """At a checkpoint: ask about the edits made so far."""
        if self._due(failed):
            found = self._patched_answers(self.cases[: len(failed)], patch, failed)
            self._keep("checkpoint", after=len(failed), outcomes=_plain(found))

    def _halving(self, do: Callable[[], tuple[str, list[Outcome]]]) -> tuple[str, list[Outcome]]:
        """`do()`, and where memory runs out anew with half the batch: a number is of one size of batch."""
        for past in self.journal.past("anew"):
            self.batch = past["batch"]
        while True:
            try:
                return do()
            except (RuntimeError, MemoryError) as error:
                if self.batch == 1 or not memory.exhausted(error):
                    raise
            self.batch = (self.batch + 1) // 2
            log.warning("memory ran out; %s begins anew with %d edits at once", self.method.name, self.batch)
            self.journal.add("anew", batch=self.batch)
            self.taken = dict.fromkeys(self.taken, 0.0)
            self.spent = dict.fromkeys(self.spent, 0.0)

    # Editing

    def _each(self, cases: list[Case]) -> list[Patch | ErrataError]:
        """A patch for each case by itself."""
        with self._counting(sum(len(c.edits) for c in cases)), self._timed("editing"):
            if all(not c.also for c in cases):
                return tolerant(lambda some: self.method.each(self.lm, some), [c.edit for c in cases])
            made = [self._made([c], Patch()) for c in cases]
        return [failed[0] or patch for patch, failed in made]

    def _at_once(self, cases: Sequence[Case], prior: Patch) -> tuple[Patch, list[ErrataError | None]]:
        with self._counting(sum(len(c.edits) for c in cases)), self._timed("editing"):
            return self._made(cases, prior)

    def _made(self, cases: Sequence[Case], prior: Patch) -> tuple[Patch, list[ErrataError | None]]:
        """The patch with as many of the cases as can be made, and why the others can't."""
        if not self.method.batched:
            return self._folded(cases, prior)
        found = tolerant(lambda some: [self._together(some, prior)] * len(some), list(cases))
        failed = [f if isinstance(f, ErrataError) else None for f in found]
        if all(f is found[0] for f in found) and not any(failed):
            return found[0] if found else prior, failed
        good = [c for c, error in zip(cases, failed, strict=True) if error is None]
        try:
            return self._together(good, prior), failed
        except ErrataError as error:
            return prior, [reason or error for reason in failed]

    def _together(self, cases: Sequence[Case], prior: Patch) -> Patch:
        edits = [e for c in cases for e in c.edits]  # a data set may contradict itself (MQuAKE does)
        return self.method.edit(self.lm, edits, prior, anyway=True)

    def _folded(self, cases: Sequence[Case], prior: Patch) -> tuple[Patch, list[ErrataError | None]]:
        failed: list[ErrataError | None] = []
        for case in cases:
            patch = prior
            try:
                for edit in case.edits:
                    patch = self.method.edit(self.lm, [edit], patch)
                prior = patch
                failed.append(None)
            except ErrataError as error:
                failed.append(error)
        return prior, failed

    # Asking

    def before(self) -> list[list[Answer]]:
        """What the unedited model answers; the last set of cases is remembered, for the next method's run."""
        asked = self.asking, tuple(c.probes for c in self.cases)
        known, answers = self.lm.memo.get("bench", (None, None))
        if answers is None or known != asked:
            answers = self._asked_before()
            self.lm.memo["bench"] = asked, answers
        return answers

    def _asked_before(self) -> list[list[Answer]]:
        shared = self.journal.journal.cell("before")
        found = [[Answer.from_dict(a) for a in one] for past in shared.past("before") for one in past["answers"]]
        while len(found) < len(self.cases):
            probes = [c.probes for c in self.cases[len(found) : len(found) + SLICE]]
            some = ask_cases(self.lm, probes, asking=self.asking)
            found += some
            shared.add("before", answers=[[a.to_dict() for a in one] for one in some])
        return found

    def ask(self, cases: Sequence[Case], patches: Sequence[Patch] | None = None) -> list[list[Answer]]:
        with self._timed("evaluating"):
            return ask_cases(self.lm, [c.probes for c in cases], patches, self.asking)

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

    def _able(self, patch: Patch | None) -> None:
        """Ask what else the edited model can do, once."""
        if self.ability is not None and patch and not self.journal.past("ability"):
            self.journal.add("ability", found=self.ability.measure(self.lm, patch))

    # Remembering

    def _past(self, *kinds: str) -> list[Record]:
        """Records of earlier work, and what it took; what comes from here on is measured anew."""
        memory.reset_peak(self.lm.device)
        past = self.journal.past(*kinds)
        for record in past:
            for what in self.spent:
                self.spent[what] += record["took"][what]
            self.peak = max(filter(None, (self.peak, record["took"]["peak"])), default=None)
            self.flops = record["took"]["flops"] or self.flops
        if past and kinds == ("group",):
            self._tell(sum(len(r["outcomes"]) for r in past))
        return past

    def _keep(self, kind: str, **found: Any) -> None:
        """Put what was found in the journal, with what it took since the last record."""
        peak = memory.peak(self.lm.device)
        operations = self.counted[0] / self.counted[1] if self.counted and self.flops is None else None
        self.journal.add(kind, **found, took={**self.taken, "peak": peak, "flops": operations})
        for what, amount in self.taken.items():
            self.spent[what] += amount
        self.taken = dict.fromkeys(self.taken, 0.0)
        self.peak = max(filter(None, (self.peak, peak)), default=None)
        self.flops = self.flops or operations

    def _keep_patch(self, patch: Patch, failed: list[ErrataError | None]) -> None:
        if len(failed) == len(self.cases):
            self.taken["bytes"] += patch.bytes
        path = self.journal.state(len(failed))
        if path is not None:
            patch.save(path)
        self._keep("made", failed=[str(error) if error else None for error in failed])
        self._forget(self.journal.past("made")[:-1])

    def _forget(self, made: Sequence[Record]) -> None:
        """Remove patches that nothing will go on from."""
        for past in made:
            path = self.journal.state(len(past["failed"]))
            if path is not None:
                path.unlink(missing_ok=True)

    def _some(self, outcomes: list[Outcome]) -> list[Outcome]:
        """The outcomes, if there is one: where every edit fails, the reason is not in the edits, and may be cured."""
        failed = [o for o in outcomes if isinstance(o, ErrataError)]
        if len(failed) == len(outcomes):
            self.journal.drop()
            raise failed[0]
        return outcomes

    def _kept(self, done: int) -> Patch:
        path = self.journal.state(done)
        return Patch.load(path) if path is not None else Patch()

    # Telling

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start, worked = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.taken[what] += time.perf_counter() - start
            if what == "editing":
                self.taken["processor"] += time.process_time() - worked

    @contextmanager
    def _counting(self, edits: int) -> Iterator[None]:
        """Count floating-point operations, of the first edits only: counting takes time. The preparing comes before."""
        if not self.ready:
            with self._timed("preparing"), self.lm.at_work():
                self.method.prepare(self.lm)
                self.ready = True
        counter = FlopCounterMode(display=False)
        first = self.counted is None and self.flops is None and edits > 0
        context: AbstractContextManager[Any] = counter if first else nullcontext()
        with context:
            yield
        if first:
            self.counted = counter.get_total_flops(), edits

    def _tell(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, len(self.cases))


def _exact_by_row(lm: LM) -> bool:
    """Whether a change beside a weight equals one in it: in half precision the weight rounds it, and what is measured
    is the model that a user gets."""
    return lm.dtype in (torch.float32, torch.float64)


def _struck(made: Counter[Edit], case: Case) -> bool:
    """Whether a case's edits are among those made, each of which counts once."""
    wanted = Counter(case.edits)
    found = wanted <= made
    if found:
        made.subtract(wanted)
    return found


def _plain(outcomes: Sequence[Outcome]) -> list[Any]:
    """Outcomes as a record holds them: answers, or the reason."""
    return [str(o) if isinstance(o, ErrataError) else [a.to_dict() for a in o] for o in outcomes]


def _outcomes(record: Record) -> list[Outcome]:
    """The outcomes that a record holds."""
    return [ErrataError(o) if isinstance(o, str) else [Answer.from_dict(a) for a in o] for o in record["outcomes"]]


def _retention(
    work: _Run, rows: Sequence[dict[str, Any]], before: Sequence[list[Answer]], seed: int
) -> list[dict[str, Any]]:
    """What a sequential run still knew of the edits made so far, at each checkpoint and at the end."""
    out = []
    for past in work.journal.past("checkpoint"):
        found = _outcomes(past)
        parts = zip(work.cases, before, found, strict=False)
        scored = [_row(c, work.method, "sequential", b, a)["metrics"] for c, b, a in parts]
        out.append({"after": past["after"], "summary": metrics.summarise(scored, seed)})
    return [*out, {"after": len(rows), "summary": metrics.summarise([r["metrics"] for r in rows], seed)}]


def _add_writing(cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> None:
    """The scores of what was written at length. How rare a word is, all cases' references say together."""
    rarity = writing.rarities([text for c in cases for text in c.references])
    for case, row in zip(cases, rows, strict=True):
        openings = [p["after"]["text"] for p in row["probes"] if p["kind"] == "opening" and p["after"]]
        row["metrics"] |= writing.scores(case, [text for text in openings if text is not None], rarity)


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
        **({"also": [e.to_dict() for e in case.also]} if case.also else {}),
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


def _source(method: Method, lm: LM) -> str | None:
    """Where the settings are from, if they are the model's preset."""
    found = presets.source(method.lineage(), lm)
    return found if found and method == type(method).preset(lm) else None


def _about(work: _Run, regime: str, rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    method, lm = work.method, work.lm
    evaluated = {"single": "after each edit", "sequential": "after all edits"}
    probes = [p for row in rows for p in row["probes"]]
    edits = sum(len(c.edits) for c in work.cases)
    return {
        "format": FORMAT,
        "method": method.name,
        "settings": json.loads(json.dumps(asdict(method))),
        "source": _source(method, lm),
        "batched": method.batched,
        "regime": regime,
        "batch": work.batch,
        "evaluated": evaluated.get(regime, "after each batch"),
        "n": len(rows),
        "failed": sum(row["error"] is not None for row in rows),
        "unasked": sum(any(a and a["unasked"] for a in (p["before"], p["after"])) for p in probes),
        "seed": seed,
        "model": {"name": lm.name, "fingerprint": lm.fingerprint, "dtype": str(lm.dtype).removeprefix("torch.")},
        "new_tokens": work.asking.new_tokens,
        "chat": all(p.chat for c in work.cases for p in c.probes),
        "metrics": metrics.VERSION,
        "versions": versions(),
        "efficiency": {
            **work.spent,
            **{f"{what}_per_edit": work.spent[what] / edits for what in ("editing", "processor", "bytes")},
            "flops_per_edit": work.flops,
            "peak_memory": work.peak,
        },
    }
