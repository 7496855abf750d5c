"""The reports of a grid of methods and regimes as one: for the terminal, as JSON, Markdown and a page of HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from rich import box
from rich.table import Table

from .. import store
from ..documents import is_file, parsed_json
from ..errors import ErrataError, UsageError
from ..escape import markup, markup_lines
from . import words
from .report import Report, plain

FORMAT = 2
SHARED = ("seed", "model", "new_tokens", "metrics", "versions")
"""What all runs of a grid have in common."""


@dataclass(frozen=True, eq=False)
class Results:
    """Several reports on the same cases of one model. As JSON, an object of four parts:

    about:
        `format`; `model` (`name`, `fingerprint`, `dtype`), `data` (`name`, `part`, `n`, `digest` of the cases,
        how its rows were `read`), `seed`,
        `new_tokens`, `chat`, `known` (how many cases were asked to find those that the model knew, or null), `metrics`
        (their version), `versions`; `left_out` (cells of the grid without numbers:
        `method`, `regime`, `error`); and `runs`, what else `errata.bench.Report` says of each cell (`method`,
        `settings`, `regime`, `batch`, `evaluated`, `n`, `failed`, `unasked`, `efficiency`, ...).
    summary:
        {method: {regime: {metric: {protocol: {`mean`, `low`, `high`, `n`}}}}}.
    rows:
        One for each case and cell, as in `Report`: `case_id`, `method`, `regime`, `metrics` ({metric: {protocol:
        value}}), `edit`, `before`, `after`, `probes` ...
    retention:
        {method: [{`after`, `summary`}]}: of sequential runs, the numbers over the first so many cases after so many.
    """

    about: Mapping[str, Any]
    reports: tuple[Report, ...]

    def with_data(self, **more: Any) -> Results:
        """The same with more said of the data, such as how its rows were `read`."""
        return replace(self, about={**self.about, "data": {**self.about["data"], **more}})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        first = self.reports[0].about
        runs = [{k: v for k, v in r.about.items() if k not in (*SHARED, "format", "retention")} for r in self.reports]
        summary: dict[str, dict[str, Any]] = {}
        for report in self.reports:
            summary.setdefault(report.about["method"], {})[report.about["regime"]] = report.summary
        return plain(
            {
                "about": {**self.about, **{k: first[k] for k in SHARED}, "runs": runs},
                "summary": summary,
                "rows": [row for r in self.reports for row in r.rows],
                "retention": {r.about["method"]: r.about["retention"] for r in self.reports if "retention" in r.about},
            }
        )

    def save(self, path: str | Path) -> None:
        """Write the results as JSON, whole or not at all; a line for each row, of which there may be many."""
        found = self.to_dict()
        head = _json({name: value for name, value in found.items() if name != "rows"}, indent=1)
        rows = ",\n".join(_json(row) for row in found["rows"])
        store.write(path, head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n')

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read results, or a single report.

        Args:
            path: the file, or the folder of a run.

        Raises:
            UsageError: there is no such file.
            ErrataError: it is damaged, or holds no results.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        if not is_file(path):
            raise UsageError(f"there is no file {str(path)!r}; give a report that `errata bench` wrote, or its folder")
        try:
            found = parsed_json(path.read_text(encoding="utf-8"))
            version = found["about"]["format"]
            if version > FORMAT:
                raise ErrataError(f"{str(path)!r} was written by a newer errata (format {version}); upgrade")
            return cls._one(Report.load(path)) if version == 1 else cls._of(found)
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            raise ErrataError(f"{str(path)!r} is damaged or no report; get a whole copy") from error

    @classmethod
    def _one(cls, report: Report) -> Self:
        data = {"name": "", "part": "edit", "n": report.about["n"], "digest": ""}
        return cls({"format": FORMAT, "data": data, "chat": False, "left_out": []}, (report,))

    @classmethod
    def _of(cls, found: Mapping[str, Any]) -> Self:
        about = {k: v for k, v in found["about"].items() if k not in (*SHARED, "runs")}
        shared = {k: found["about"][k] for k in SHARED}
        reports = []
        for one in found["about"]["runs"]:
            method, regime = one["method"], one["regime"]
            rows = [r for r in found["rows"] if (r["method"], r["regime"]) == (method, regime)]
            kept = {"retention": found["retention"][method]} if regime == "sequential" and found["retention"] else {}
            reports.append(Report({"format": 1, **shared, **one, **kept}, rows, found["summary"][method][regime]))
        return cls(about, tuple(reports))

    def write(self, folder: Path) -> None:
        """Write `report.json`, `report.md` and `report.html` into a folder."""
        from . import html, markdown

        self.save(folder / "report.json")
        store.write(folder / "report.md", markdown.text(self))
        store.write(folder / "report.html", html.page(self))

    def table(self) -> Table:
        """Methods and regimes by metric; a number stands among those of its own protocol, which every line names."""
        table = Table(
            title=markup(words.heading(self)),
            caption=markup_lines(_caption(self)),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=0,
        )
        names = metrics_of(self)
        for name in ("protocol", "method", "regime"):
            table.add_column(name, no_wrap=True)
        for name in (*names, "s/edit"):
            table.add_column(markup(name), justify="right")
        for protocol in protocols_of(self):
            some = [r for r in self.reports if any(protocol in found for found in r.summary.values())]
            for i, report in enumerate(some):
                about = report.about
                method = "" if i and some[i - 1].about["method"] == about["method"] else about["method"]
                cells = [short(report.summary.get(m, {}).get(protocol)) for m in names]
                seconds = f"{about['efficiency']['editing_per_edit']:.2f}"
                last = i == len(some) - 1
                names_it = (markup(part) for part in (protocol, method, about["regime"]))
                table.add_row(*names_it, *cells, seconds, end_section=last)
        return table


def _json(found: Any, indent: int | None = None) -> str:
    return json.dumps(found, ensure_ascii=False, allow_nan=False, indent=indent)


def metrics_of(results: Results, aspects: bool = False) -> list[str]:
    """The metrics that any of the reports has, in their order."""
    found = dict.fromkeys(m for r in results.reports for m in r.summary)
    return [m for m in found if aspects or "/" not in m]


def protocols_of(results: Results) -> list[str]:
    """The protocols that any of the reports has."""
    return list(dict.fromkeys(p for r in results.reports for found in r.summary.values() for p in found))


def short(found: Mapping[str, Any] | None) -> str:
    """A mean and half the width of its interval, or that nothing was asked."""
    if found is None or found["mean"] is None:
        return "–"
    return f"{found['mean']:.3f} {words.half(found)}".rstrip()


def _caption(results: Results) -> list[str]:
    how = "mean over cases ± half the 95% interval (from 10 cases on)"
    when = "single: asked after each edit, sequential: after all"
    read = [results.about["data"]["read"]] if results.about["data"].get("read") else []
    return [f"{how}; {when}", *read, *words.abilities(results), *words.notes(results)]
