"""Results as Markdown: the summary, and how every number was obtained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import words

if TYPE_CHECKING:
    from .results import Results


def text(results: Results) -> str:
    """The whole document."""
    from .results import metrics_of, short

    about, first = results.about, results.reports[0].about
    names = metrics_of(results)
    lines = [
        f"# {words.title(results)}",
        "",
        *(f"- {line}" for line in words.provenance(results)),
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
        "Mean over cases ± half its bootstrap 95% interval; – where it was not asked.",
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
    lines += ["## Cost", "", *_table(["method", "regime", *words.COSTS], [_cost(r.about) for r in results.reports]), ""]
    if about["left_out"]:
        lines += [
            "## Without numbers",
            "",
            *(f"- {o['method']}, {o['regime']}: {o['error']}" for o in about["left_out"]),
        ]
        lines += [""]
    lines += [
        "## Settings",
        "",
        *(f"- {r.about['method']}, {r.about['regime']}: `{r.about['settings']}`" for r in results.reports),
    ]
    lines += ["", f"Versions: {', '.join(f'{k} {v}' for k, v in first['versions'].items())}", ""]
    return "\n".join(lines)


def _cost(about: dict[str, Any]) -> list[str]:
    return [about["method"], about["regime"], *words.costs(about)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
