"""Scores of answers: pure functions. A number is named by its metric and by its protocol, the way it was obtained.

The metrics: `reliability` (the edit's own prompt), `generalization` (paraphrases), `portability` (what follows from
it), and `locality` (is the answer to a neighbouring question what it was before the edit?). The protocols:

- `forced`: with the answer's own tokens before each place (teacher forcing), the share of its tokens that are the
  argmax; for locality, the share of places where the argmax is the one before the edit. EasyEdit's numbers. It sees the
  right beginning of every answer, so it flatters.
- `compare`: 1 if the right answer has a higher mean log-probability by token than the wrong one. ROME's efficacy (ES),
  paraphrase (PS) and neighbourhood (NS) scores.
- `generated`: the model answers by itself, greedily, to a natural stop; 1 if its text is the answer or contains it in
  whole words, and does not stutter (`Italy, Italy, Italy`) where it didn't before. For locality, 1 if the answer is the
  one before the edit:
  if the neighbour's own right answer is given still, or else if the texts begin alike, up to the first mark (`.`, `,`,
  a line break ...) or the first `WORDS` words; and the edit's target is not said where it was not said before. What a
  user sees.

A case's score is the mean over its probes of a kind, a report's the mean over its cases. `None` is "not asked".

Version 2 of `generated` took stutters for answers, and for locality wanted the whole text to be the same; the functions
still have it (`version=2`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TypeVar

import torch

from .. import text as texts
from ..ask import Answer, Spoken
from ..ask import says as answers_with
from ..data import Probe

VERSION = 3
"""Goes up when a score of the same answers changes."""
WORDS = 5
"""Words of a text that are taken for its answer, where no mark ends it before."""
MARK = re.compile(r"[!?…,;:)]+(?=\s|$)|[。！？，；：、\n]|\s[-–—(]")
"""What ends the first clause of a sentence."""
FEW = 10
"""Fewer cases have no interval."""

PROTOCOLS = ("forced", "compare", "generated")
METRICS = {
    "efficacy": "reliability",
    "paraphrase": "generalization",
    "neighbourhood": "locality",
    "portability": "portability",
}
"""What the probes of a kind measure, in the order in which a report has them."""

T = TypeVar("T")
Scores = dict[str, float | None]
"""By protocol."""


def score(probe: Probe, before: Answer, after: Answer, version: int = VERSION) -> Scores:
    """One probe under every protocol.

    Args:
        probe: what was asked.
        before: what the unedited model answers.
        after: what the edited one does.
        version: 2 scores `generated` as version 2 did.
    """
    if probe.kind == "opening":  # scored with all of its case's, in `writing`
        return dict.fromkeys(PROTOCOLS)
    if probe.kind == "neighbourhood":
        forced = _both(kept_tokens, before.answer, after.answer)
        keeps = kept_text if version < 3 else partial(kept_answer, probe)
        generated = _both(keeps, before.text, after.text)
    else:
        forced = None if after.answer is None else forced_tokens(after.answer)
        right = (probe.answer, *probe.aliases)
        generated = None if after.text is None else says(after.text, right, before.text or "", version)
    return {"forced": forced, "compare": _both(prefers, after.answer, after.other), "generated": generated}


def forced_tokens(answer: Spoken) -> float:
    """The share of an answer's tokens that the model would have said there."""
    return fmean(float(a == b) for a, b in zip(answer.ids, answer.argmax, strict=True))


def kept_tokens(before: Spoken, after: Spoken) -> float:
    """The share of an answer's places where the model would say what it would have said before."""
    return fmean(float(a == b) for a, b in zip(before.argmax, after.argmax, strict=True))


def prefers(right: Spoken, wrong: Spoken) -> float:
    """1 if the right answer is likelier than the wrong one."""
    return float(right.logprob > wrong.logprob)


def says(text: str, answers: Iterable[str], before: str = "", version: int = VERSION) -> float:
    """1 if a text is one of these answers or contains it in whole words, and does not stutter (unless `before` did).

    Case and spacing don't matter. Version 2 let a text stutter, and knew no words in scripts without spaces.
    """
    if version >= 3:
        return float(answers_with(text, answers, before))
    found = texts.plain(text)
    return float(any(re.search(rf"(?<!\w){re.escape(texts.plain(a))}(?!\w)", found) for a in answers))


def kept_answer(probe: Probe, before: str, after: str) -> float:
    """1 if the answer to a neighbouring question is what it was before the edit."""
    right = (probe.answer, *probe.aliases)
    if probe.other and texts.has(after, probe.other) and not texts.has(before, probe.other):
        return 0.0  # the edit's target has leaked
    if texts.stutters(after) and not texts.stutters(before):
        return 0.0
    still = any(texts.has(before, a) for a in right) and any(texts.has(after, a) for a in right)
    return float(still or answer_of(before) == answer_of(after))


def answer_of(text: str) -> str:
    """The answer in a text of one sentence: its words up to the first mark, at most `WORDS`."""
    clause = texts.plain(MARK.split(text.strip())[0]).rstrip(".!?… ")
    return " ".join(clause.split()[:WORDS])


def kept_text(before: str, after: str) -> float:
    """Version 2: 1 if the model says the same text; case, spacing and a closing mark don't matter."""
    return float(texts.plain(before).rstrip(".!?… ") == texts.plain(after).rstrip(".!?… "))


def score_case(probes: Sequence[Probe], scores: Sequence[Scores]) -> dict[str, Scores]:
    """The mean over the probes of each kind: {metric: {protocol: value}}; only metrics that the case has probes for.

    Where the data set names kinds of its own, each is a metric too: `portability/Reasoning`.
    """
    out: dict[str, Scores] = {}
    for kind, metric in METRICS.items():
        of_kind = [s for p, s in zip(probes, scores, strict=True) if p.kind == kind]
        if of_kind:
            out[metric] = {name: mean([s[name] for s in of_kind]) for name in PROTOCOLS}
        for aspect in dict.fromkeys(p.aspect for p in probes if p.kind == kind and p.aspect):
            some = [s for p, s in zip(probes, scores, strict=True) if (p.kind, p.aspect) == (kind, aspect)]
            out[f"{metric}/{aspect}"] = {name: mean([s[name] for s in some]) for name in PROTOCOLS}
    return out


def score_failed(probes: Sequence[Probe]) -> dict[str, Scores]:
    """A case whose edit could not be made: nothing of it took (0), and there is no edited model to be local (None)."""
    nothing: Scores = {name: 0.0 for name in PROTOCOLS}  # noqa: C420 - typed as scores
    scored = score_case(probes, [nothing] * len(probes))
    return {m: dict.fromkeys(PROTOCOLS) if m.startswith("locality") else found for m, found in scored.items()}


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that were asked."""
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def summarise(rows: Sequence[Mapping[str, Scores]], seed: int) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Over cases: {metric: {protocol: {mean, low, high, n}}}; n counts the cases that have the score."""
    out: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for metric in _in_order({name for row in rows for name in row}):
        scored = [row[metric] for row in rows if metric in row]
        protocols = dict.fromkeys(name for one in scored for name in one)
        out[metric] = {name: interval([s.get(name) for s in scored], seed) for name in protocols}
    return out


def _in_order(names: set[str]) -> list[str]:
    """Metrics in the order of a report: each with the data set's own kinds behind it."""
    order = list(METRICS.values())
    return sorted(names, key=lambda name: (order.index(m) if (m := name.split("/")[0]) in order else len(order), name))


def interval(
    values: Sequence[float | None], seed: int, draws: int = 1000, bounds: tuple[float, float] = (0.0, 1.0)
) -> dict[str, float | int | None]:
    """The mean over cases and its 95% interval; none (null) where there are fewer than ten cases.

    The interval has the percentiles of the means of resampled cases (bootstrap). Where all cases have the same score
    these have no width, and it is exact: with 95% confidence at most a share of 1 - 0.025^(1/n) of all cases has
    another score, at worst one of the `bounds` (for scores of 0 or 1, Clopper and Pearson 1934).
    """
    known = [v for v in values if v is not None]
    n = len(known)
    if n < FEW:
        return {"mean": fmean(known) if known else None, "low": None, "high": None, "n": n}
    if min(known) == max(known):
        others = 1 - math.exp(math.log(0.025) / n)
        low, high = (known[0] + others * (bound - known[0]) for bound in bounds)
        return {"mean": known[0], "low": min(low, known[0]), "high": max(high, known[0]), "n": n}
    scores, generator = torch.tensor(known, dtype=torch.float64), torch.Generator().manual_seed(seed)
    drawn = [scores[torch.randint(n, (n,), generator=generator)].mean() for _ in range(draws)]
    low, high = torch.stack(drawn).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": fmean(known), "low": low, "high": high, "n": n}


def _both(compare: Callable[[T, T], float], one: T | None, two: T | None) -> float | None:
    return None if one is None or two is None else compare(one, two)
