"""Tuning: a method's place and strength for one model, by successive halving on facts that the model knows.

A candidate moves the places of the default preset by a share of the model's depth and multiplies its strengths
(`[tune]` in presets.toml). All are tried on a few facts, the better half on twice as many, and so on (Jamieson and
Talwalkar 2016, https://arxiv.org/abs/1502.07943). The best is then held against the default on facts that no round has
seen, and `preset` uses it from then on, by the model's fingerprint, if it is better there.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from . import presets
from .bench import metrics
from .bench.plan import digest
from .bench.run import run
from .data import Case
from .errors import ErrataError, UsageError
from .lm import LM
from .method import Method, versions
from .store import Store

log = logging.getLogger(__name__)

PROTOCOL = "generated"
MEASURED = ("reliability", "generalization", "locality")
OBJECTIVE = f"mean of {', '.join(MEASURED)} by `{PROTOCOL}`, single edits"
FIRST = 3
"""Facts of the first round; each later round has twice as many as the one before."""
LEAST = 8
"""Facts that tuning needs: half of them are held out."""

Settings = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tuned:
    """What tuning a method for a model found."""

    method: str
    settings: Settings
    """The fields that differ from the default preset; empty where the default is best."""
    evidence: dict[str, Any]
    """Objective, facts, every candidate's score, and default and best on the held-out facts."""


@dataclass
class _Search:
    """Scores of candidates, each on the facts it has been tried on so far."""

    lm: LM
    base: Method
    facts: Sequence[Case]
    deadline: float
    journal: Path
    progress: Progress | None
    planned: int
    scores: dict[str, list[float]] = field(default_factory=dict)
    done: int = 0

    def advance(self, candidate: Settings, n: int) -> bool:
        """Try a candidate on the first n facts; False once the budget is spent."""
        scores = self.scores.setdefault(_key(candidate), [])
        if len(scores) < n:
            if self.done and time.monotonic() > self.deadline:  # the default is measured in any case
                return False
            scores += self.measure(candidate, self.facts[len(scores) : n])
        return True

    def measure(self, candidate: Settings, cases: Sequence[Case]) -> list[float]:
        """The objective of each case, read from the journal where it has been measured before."""
        key = {"settings": candidate, "base": _key(asdict(self.base)), "cases": digest(cases), "made by": _made_by()}
        found = next((line["scores"] for line in _lines(self.journal) if line["key"] == key), None)
        if found is None:
            found = _objective(replace(self.base, **presets.frozen(candidate)), self.lm, cases)
            with self.journal.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"key": key, "scores": found}))  # a torn line ends here
        self.done += len(cases)
        if self.progress:
            self.progress(self.done, self.planned)
        return found

    def best(self, candidates: Sequence[Settings]) -> list[Settings]:
        """Candidates that have been tried, best first; those with more facts behind them come before."""
        tried = [c for c in candidates if self.scores.get(_key(c))]
        return sorted(tried, key=lambda c: (-len(self.scores[_key(c)]), -fmean(self.scores[_key(c)])))


def tune(
    method: type[Method],
    lm: LM,
    facts: Sequence[Case],
    budget: float = 600.0,
    progress: Progress | None = None,
) -> Tuned:
    """Tune a method for a model and keep what was found for `preset`.

    A search that was interrupted goes on where it was: what has been measured is kept beside the presets.

    Args:
        method: one whose candidates `presets.toml` lists.
        lm: the unedited model.
        facts: cases that the model knows; the second half is held out.
        budget: seconds after which no further candidate is tried; the held-out facts are asked in any case.
        progress: called with (edits measured, all at most).

    Raises:
        UsageError: the method can't be tuned, or there are fewer than `LEAST` facts.
    """
    if len(facts) < LEAST:
        raise UsageError(
            f"{lm.name} knows {len(facts)} of the facts, tuning takes {LEAST} at least; give a file of facts it knows"
        )
    default = presets.settings(method.lineage(), lm, tuned=False)
    base = method(**{f.name: default[f.name] for f in fields(method) if f.name in default})
    candidates = list(_candidates(base, lm))
    tuning, held = facts[: len(facts) // 2], facts[len(facts) // 2 :]
    rounds = list(_rounds(len(candidates), len(tuning)))
    folder = Store().folder / "tuning"
    folder.mkdir(parents=True, exist_ok=True)
    search = _Search(
        lm,
        base,
        tuning,
        time.monotonic() + budget,
        folder / f"{lm.fingerprint}-{method.name}.jsonl",
        progress,
        planned=_planned(rounds) + 2 * len(held),
    )
    best = _halved(search, candidates, rounds)
    scores = {name: fmean(search.measure(c, held)) for name, c in (("default", {}), ("tuned", best))}
    found = best if scores["tuned"] > scores["default"] else {}
    evidence = {
        "objective": OBJECTIVE,
        "tuned on": [c.id for c in tuning],
        "held out": [c.id for c in held],
        "score on the held-out facts": scores,
        "candidates": [
            {"settings": c, "facts": len(search.scores[_key(c)]), "score": fmean(search.scores[_key(c)])}
            for c in search.best(candidates)
        ],
        "base": json.loads(_key(asdict(base))),
        **_made_by(),
    }
    presets.keep(method.name, lm, found, evidence)
    return Tuned(method.name, found, evidence)


def _halved(search: _Search, candidates: Sequence[Settings], rounds: Sequence[tuple[int, int]]) -> Settings:
    """The best candidate after all rounds, or after those the budget allowed."""
    left = list(candidates)
    for keep, n in rounds:
        left = left[:keep]
        if not all(search.advance(c, n) for c in left):
            log.warning("the budget ended in the round of %d facts; the best so far is taken", n)
            break
        left = search.best(left)
    return search.best(candidates)[0]


def _rounds(candidates: int, facts: int) -> Iterator[tuple[int, int]]:
    """(candidates, facts of each) round by round."""
    n = min(FIRST, facts)
    while True:
        yield candidates, n
        if n == facts or candidates == 1:
            return
        candidates, n = max(2, candidates // 2), min(2 * n, facts)


def _planned(rounds: Sequence[tuple[int, int]]) -> int:
    """Edits of all rounds: a candidate that stays is only tried on what is new."""
    before = [0, *(n for _, n in rounds)]
    return sum(candidates * (n - past) for (candidates, n), past in zip(rounds, before, strict=False))


def _objective(method: Method, lm: LM, cases: Sequence[Case]) -> list[float]:
    try:
        rows = run(method, lm, cases).rows
    except ErrataError as error:
        log.info("%s can't edit: %s", method.name, error)
        return [0.0] * len(cases)
    scored = ([row["metrics"].get(m, {}).get(PROTOCOL) for m in MEASURED] for row in rows)
    return [fmean(s for s in one if s is not None) for one in scored]


def _candidates(base: Method, lm: LM) -> Iterator[Settings]:
    """Fields that differ from the default, the default itself first."""
    grid = presets.tunable(base.lineage())
    depth = len(lm.blocks)
    moves = [{f: _moved(getattr(base, f), by, lm) for f in grid["places"]} for by in grid["move"]]
    inside = [m for m in moves if all(_within(v, depth) for v in m.values())]
    names = [name for name in grid["times"] if getattr(base, name) is not None]
    strengths = [
        {name: getattr(base, name) * by for name, by in zip(names, factors, strict=True)}
        for factors in itertools.product(*(grid["times"][name] for name in names))
    ]
    seen: set[str] = set()
    for change in [{}, *({**place, **strength} for place in inside for strength in strengths)]:
        new = {k: v for k, v in change.items() if v != getattr(base, k)}
        if _key(new) not in seen:
            seen.add(_key(new))
            yield new


def _moved(place: Any, by: float, lm: LM) -> Any:
    """A layer, a module's name, or several of them, moved by a share of the model's depth; None outside the model."""
    if isinstance(place, tuple):
        return tuple(_moved(one, by, lm) for one in place)
    depth = len(lm.blocks)
    if isinstance(place, int):
        new = place + round(by * depth)
        return new if 0 <= new < depth else None
    block = next(i for i, b in enumerate(lm.blocks) if place.startswith(f"{b}."))
    new = _moved(block, by, lm)
    return None if new is None else lm.blocks[new] + place.removeprefix(lm.blocks[block])


def _within(place: Any, depth: int) -> bool:
    return all(_within(one, depth) for one in place) if isinstance(place, tuple) else place is not None


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


def _made_by() -> dict[str, Any]:
    return {"metrics": metrics.VERSION, "versions": versions()}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """What a journal holds; a torn last line, of a process that was killed, is left out."""
    if not path.exists():
        return
    for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
        try:
            yield json.loads(line)
        except ValueError:
            log.debug("%s has a torn line", path)
