"""Two reports beside each other: what changed, with an interval on the difference.

Cases that both reports have are compared with themselves (a paired bootstrap), which is far sharper than to look
whether two intervals overlap. Numbers of different protocols or metrics are never compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..errors import UsageError
from ..escape import markup
from . import metrics
from .report import Report
from .results import Results


@dataclass(frozen=True)
class Difference:
    """Of one metric under one protocol: the second report's mean minus the first's."""

    run: str
    metric: str
    protocol: str
    first: float
    second: float
    low: float | None
    high: float | None
    """The 95% interval of the difference over the cases; None where they are too few."""
    n: int
    """Cases that have the score in both."""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def compare(first: Results, second: Results, seed: int = 0) -> list[Difference]:
    """The differences of the runs that both have; or of the one run that each has, whatever it is.

    Raises:
        UsageError: they have no run or no case in common, or their metrics are of different versions.
    """
    versions = [r.reports[0].about["metrics"] for r in (first, second)]
    if versions[0] != versions[1]:
        raise UsageError(
            f"the reports have metrics of versions {versions[0]} and {versions[1]}; run the older one anew"
        )
    found = [d for name, one, two in _pairs(first, second) for d in _differences(name, one, two, seed)]
    if not found:
        raise UsageError("the reports have no case in common; compare runs over the same data")
    return found


def _pairs(first: Results, second: Results) -> list[tuple[str, Report, Report]]:
    one, two = ({_name(r): r for r in results.reports} for results in (first, second))
    if len(one) == len(two) == 1:
        (a, report), (b, other) = *one.items(), *two.items()
        return [(a if a == b else f"{a} → {b}", report, other)]
    both = [name for name in one if name in two]
    if not both:
        raise UsageError(f"the reports have no run in common: {'; '.join(one)} against {'; '.join(two)}")
    return [(name, one[name], two[name]) for name in both]


def _name(report: Report) -> str:
    return f"{report.about['method']}, {report.about['regime']}"


def _differences(name: str, first: Report, second: Report, seed: int) -> list[Difference]:
    other = {(str(row["case_id"]), row["edit"]["target"]): row for row in second.rows}
    pairs = [(row, other[key]) for row in first.rows if (key := (str(row["case_id"]), row["edit"]["target"])) in other]
    out = []
    for metric, protocols in first.summary.items():
        for protocol in protocols:
            scores = [(_score(a, metric, protocol), _score(b, metric, protocol)) for a, b in pairs]
            known = [(a, b) for a, b in scores if a is not None and b is not None]
            if known:
                out.append(_difference(name, metric, protocol, known, seed))
    return out


def _score(row: Mapping[str, Any], metric: str, protocol: str) -> float | None:
    return row["metrics"].get(metric, {}).get(protocol)


def _difference(name: str, metric: str, protocol: str, known: Sequence[tuple[float, float]], seed: int) -> Difference:
    found = metrics.interval([b - a for a, b in known], seed, bounds=(-1.0, 1.0))
    one, two = (sum(side) / len(known) for side in zip(*known, strict=True))
    return Difference(name, metric, protocol, one, two, found["low"], found["high"], len(known))


def table(differences: Sequence[Difference]) -> Table:
    """For the terminal; clear differences stand out."""
    made = Table(
        title="second minus first",
        caption="95% interval of the difference, paired bootstrap over the cases both have; * leaves out 0",
        caption_justify="left",
    )
    for column in ("run", "metric", "protocol"):
        made.add_column(column, overflow="fold")
    for column in ("first", "second", "difference", "95% interval", "cases"):
        made.add_column(column, justify="right")
    for d in differences:
        style = "bold" if d.clear else ""
        cells = (f"{d.first:.3f}", f"{d.second:.3f}", f"{d.second - d.first:+.3f}{'*' if d.clear else ''}")
        apart = "too few" if d.low is None or d.high is None else f"{d.low:+.3f} to {d.high:+.3f}"
        named = (markup(part) for part in (d.run, d.metric, d.protocol))
        made.add_row(*named, *cells, apart, str(d.n), style=style)
    return made
