"""Results as Markdown: the summary, and how every number was obtained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..escape import code, markdown, markdown_table
from . import words

if TYPE_CHECKING:
    from .report import Report
    from .results import Results


def text(results: Results) -> str:
    """The whole document."""
    from .results import metrics_of, short

    first = results.reports[0].about
    names = metrics_of(results)
    lines = [
        f"# {markdown(words.title(results))}",
        "",
        *(f"- {markdown(line)}" for line in words.provenance(results)),
        "",
        *_table(
            ["method", "regime", "protocol", *names],
            [
                [
                    r.about["method"],
                    r.about["regime"],
                    protocol,
                    *(short(r.summary.get(m, {}).get(protocol)) for m in names),
                ]
                for r in results.reports
                for protocol in dict.fromkeys(p for found in r.summary.values() for p in found)
            ],
        ),
        "",
        "Mean over cases ± half its 95% interval (from 10 cases on); – where it was not asked.",
        "",
        *(f"- **{name}**: {meaning}" for name, meaning in {**words.PROTOCOLS, **words.MORE}.items()),
        "",
    ]
    if aspects := [m for m in metrics_of(results, aspects=True) if "/" in m]:
        rows = [
            [r.about["method"], r.about["regime"], *(short(r.summary.get(m, {}).get("forced")) for m in aspects)]
            for r in results.reports
        ]
        lines += ["## By published sub-kind (forced)", "", *_table(["method", "regime", *aspects], rows), ""]
    if able := words.abilities(results):
        lines += ["## What else it can still do", "", *(f"- {markdown(line)}" for line in able), ""]
    lines += [
        "## Cost",
        "",
        *_table(["method", "regime", *words.COSTS.values()], list(map(_cost, results.reports))),
        "",
    ]
    lines += ["Seconds are of the machine this ran on; processor seconds leave out what else it did.", ""]
    lines += [f"- {markdown(note)}" for note in words.notes(results)]
    settings = {r.about["method"]: (r.about["settings"], r.about.get("source") or "given") for r in results.reports}
    lines += ["", "## Settings", ""]
    lines += [
        f"- {markdown(m)}: {code(json.dumps(found, ensure_ascii=False))} ({markdown(source)})"
        for m, (found, source) in settings.items()
    ]
    lines += ["", f"Versions: {markdown(', '.join(f'{k} {v}' for k, v in first['versions'].items()))}", ""]
    return "\n".join(lines)


def _cost(report: Report) -> list[str]:
    return [report.about["method"], report.about["regime"], *(said for _, said in words.costs(report.about))]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return markdown_table([*map(markdown, head)], [[*map(markdown, row)] for row in rows])
