"""Results as one page of HTML that needs nothing else: no network, no other file. Its style and script lie beside it.

The charts and tables are in the page as it stands; the script only finds and shows the texts of the edits.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from . import words
from .charts import Line, bars, curves, dots, mark
from .metrics import mean

if TYPE_CHECKING:
    from .report import Report
    from .results import Results

RELATIONS = 24
"""Relations in the breakdown: those with the most cases."""


def page(results: Results) -> str:
    """The whole page."""
    parts = [_head(results), _chart(results), _numbers(results), _retention(results), _cost(results)]
    parts += [_ability(results), _relations(results), _edits(results), _made(results)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(words.title(results))} · errata</title>\n<style>\n{_beside('page.css')}</style>\n</head>\n"
        f'<body>\n<a class="skip" href="#main">Skip to the numbers</a>\n{body}\n</main>\n'
        f'<script type="application/json" id="edits">{_script_safe(_texts(results))}</script>\n'
        f"<script>\n{_beside('page.js')}</script>\n</body>\n</html>\n"
    )


def _beside(name: str) -> str:
    return resources.files("errata.bench").joinpath(name).read_text(encoding="utf-8")


def _script_safe(value: Any) -> str:
    """JSON that can't end the script it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _head(results: Results) -> str:
    chips = "".join(f"<li>{escape(line)}</li>" for line in words.provenance(results))
    data = results.about["data"]
    methods = len({r.about["method"] for r in results.reports})
    model = results.reports[0].about["model"]["name"]
    says = f"{methods} method{'s' * (methods != 1)}, {data['n']} cases of {data['name'] or 'the caller'}"
    return (
        f'<header><p class="mark-of-errata">errata bench</p><h1>What editing did to {escape(model)}</h1>'
        f"<p class=lead>{escape(says)}</p><ul class=chips>{chips}</ul></header>\n<main id=main>"
    )


def _chart(results: Results) -> str:
    from .results import metrics_of

    shares = [m for m in metrics_of(results) if m not in ("fluency", "consistency")]
    runs = [(r.about["method"], r.about["regime"], r.summary) for r in results.reports]
    keys = "".join(
        f'<li><svg width="18" height="16" aria-hidden="true" class="{name}">{mark(name, 9, 8)}</svg>'
        f"<span><b>{name}</b> {escape(meaning)}</span></li>"
        for name, meaning in words.PROTOCOLS.items()
    )
    asks = "".join(f"<li><b>{m}</b> {escape(words.METRICS[m])}</li>" for m in shares if m in words.METRICS)
    return (
        "<section><h2>At a glance</h2><p>Each mark is a mean over cases, the line its 95% interval. The three "
        "protocols answer different questions: compare a mark only with marks of its own shape.</p>"
        f"<ul class=keys>{keys}</ul><ul class=keys>{asks}</ul><div class=wide>{dots(runs, shares)}</div></section>"
    )


def _numbers(results: Results) -> str:
    from .results import metrics_of

    names = metrics_of(results, aspects=True)
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in names)
    body = "".join(_number_rows(report, names) for report in results.reports)
    left = "".join(
        f"<li>{escape(o['method'])}, {escape(o['regime'])}: {escape(o['error'])}</li>"
        for o in results.about["left_out"]
    )
    note = f"<p>Without numbers:</p><ul>{left}</ul>" if left else ""
    return (
        "<section><h2>The numbers</h2><div class=wide><table><caption>Mean over cases, 95% bootstrap interval below; "
        "– was not asked. A name after / is the data set's own kind of question.</caption><thead><tr>"
        f"<th scope=col>method</th><th scope=col>regime</th><th scope=col>protocol</th>{head}</tr></thead>"
        f"{body}</table></div>{note}</section>"
    )


def _number_rows(report: Report, names: Sequence[str]) -> str:
    protocols = list(dict.fromkeys(p for found in report.summary.values() for p in found))
    rows = []
    for i, protocol in enumerate(protocols):
        cells = "".join(_number(report.summary.get(name, {}).get(protocol)) for name in names)
        span = f"rowspan={len(protocols)}"
        about = report.about
        first = (
            f"<th scope=rowgroup {span}>{escape(about['method'])}</th><td {span}>{escape(about['regime'])}</td>"
            if i == 0
            else ""
        )
        rows.append(f'<tr>{first}<th scope=row class="{protocol}">{protocol}</th>{cells}</tr>')
    return f"<tbody>{''.join(rows)}</tbody>"


def _number(found: Mapping[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return "<td class=number>–</td>"
    interval = f"{found['low']:.3f} to {found['high']:.3f}"
    return f'<td class=number title="{found["n"]} cases">{found["mean"]:.3f}<small>{interval}</small></td>'


def _retention(results: Results) -> str:
    kept = [r for r in results.reports if len(r.about.get("retention", ())) > 1]
    if not kept:
        return ""
    charts = []
    for metric in ("reliability", "generalization", "locality"):
        for protocol in ("generated", "forced"):
            lines = [Line(r.about["method"], _points(r.about["retention"], metric, protocol)) for r in kept]
            lines = [line for line in lines if line.points]
            if lines:
                charts.append(curves(f"{metric}, {protocol}", lines))
    return (
        "<section><h2>What a sequence retains</h2><p>Edits are made one after another on the same model. Each point "
        "asks about <em>all</em> edits made so far; the band is the 95% interval.</p>"
        f"<div class=charts>{''.join(charts)}</div></section>"
    )


def _points(
    retention: Iterable[Mapping[str, Any]], metric: str, protocol: str
) -> list[tuple[float, float, float, float]]:
    found = [(one["after"], one["summary"].get(metric, {}).get(protocol)) for one in retention]
    return [(after, f["mean"], f["low"], f["high"]) for after, f in found if f and f["mean"] is not None]


def _cost(results: Results) -> str:
    found = [(f"{r.about['method']}, {r.about['regime']}", r.about["efficiency"]) for r in results.reports]
    time = [(name, e["editing_per_edit"], f"{e['editing_per_edit']:.3g} s") for name, e in found]
    memory = [(name, e.get("peak_memory"), words.amount(e.get("peak_memory"), "B")) for name, e in found]
    work = [(name, e.get("flops_per_edit"), words.amount(e.get("flops_per_edit"), "FLOP")) for name, e in found]
    return (
        "<section><h2>Cost</h2><p>Time and memory are of the machine this ran on; operations are the same everywhere "
        "(counted on the first edits of a run).</p><div class=charts>"
        f"{bars('seconds an edit', time)}{bars('peak memory', memory)}{bars('operations an edit', work)}"
        "</div></section>"
    )


def _ability(results: Results) -> str:
    found = [r for r in results.reports if r.about.get("ability")]
    if not found:
        return ""
    names = list(dict.fromkeys(name for r in found for name in r.about["ability"]))
    head = "".join(f"<th scope=col>{escape(name.replace('_', ' '))}</th>" for name in names)
    body = "".join(
        f"<tr><th scope=row>{escape(r.about['method'])}</th><td>{escape(r.about['regime'])}</td>"
        + "".join(f"<td class=number>{_said(r.about['ability'].get(name))}</td>" for name in names)
        + "</tr>"
        for r in found
    )
    return (
        "<section><h2>What else it can still do</h2><div class=wide><table><caption>On held-out text and tasks, before "
        "and after</caption><thead><tr><th scope=col>method</th><th scope=col>regime</th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape("–" if value is None else str(value))


def _relations(results: Results) -> str:
    """By the kind of fact: does the model say the new answer?"""
    counts: dict[str, set[Any]] = defaultdict(set)
    for row in results.reports[0].rows:
        if row["relation"]:
            counts[row["relation"]].add(row["case_id"])
    if not counts:
        return ""
    shown = sorted(counts, key=lambda name: (-len(counts[name]), name))[:RELATIONS]
    head = "".join(
        f"<th scope=col>{escape(r.about['method'])}<small>{escape(r.about['regime'])}</small></th>"
        for r in results.reports
    )
    body = []
    for name in shown:
        cells = "".join(_share(_of_relation(r, name)) for r in results.reports)
        body.append(f"<tr><th scope=row>{escape(name)}</th><td class=number>{len(counts[name])}</td>{cells}</tr>")
    rest = len(counts) - len(shown)
    more = f" The {rest} rarest relations are left out." if rest else ""
    return (
        "<section><h2>By relation</h2><p>Reliability, <b class=generated>generated</b>: the share of cases of each "
        f"relation (a Wikidata property) where the edited model says the new answer by itself.{more}</p>"
        "<div class=wide>"
        f"<table class=heat><thead><tr><th scope=col>relation</th><th scope=col>cases</th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _of_relation(report: Report, relation: str) -> float | None:
    return mean(r["metrics"]["reliability"]["generated"] for r in report.rows if r["relation"] == relation)


def _share(value: float | None) -> str:
    if value is None:
        return "<td class=number>–</td>"
    dark = " dark" if value > 0.6 else ""
    return f'<td class="number share{dark}" style="--share:{value:.3f}">{value:.2f}</td>'


def _edits(results: Results) -> str:
    methods = dict.fromkeys(r.about["method"] for r in results.reports)
    regimes = dict.fromkeys(r.about["regime"] for r in results.reports)
    return (
        '<section aria-labelledby="every"><h2 id="every">Every edit, before and after</h2>'
        "<noscript><p>Searching needs JavaScript; all of it is also in report.json.</p></noscript>"
        '<form class=filters role="search" onsubmit="return false"><label>Find <input id=find type=search '
        'placeholder="subject, answer, text …" autocomplete=off></label>'
        f"<label>Method <select id=method>{_options(methods)}</select></label>"
        f"<label>Regime <select id=regime>{_options(regimes)}</select></label>"
        "<label>Show <select id=which><option value=''>all</option><option value=miss>where it does not say the new "
        "answer</option><option value=hit>where it does</option><option value=moved>where a neighbour changed</option>"
        "</select></label></form>"
        '<p id=count role="status" aria-live="polite"></p>'
        "<div class=wide><table id=texts><caption>Generated answers to the edit's own prompt; open a row for all "
        "of its questions</caption><thead><tr><th scope=col>case</th><th scope=col>method, regime</th>"
        "<th scope=col>prompt and new answer</th><th scope=col>before</th><th scope=col>after</th>"
        "<th scope=col>forced</th><th scope=col>compare</th><th scope=col>generated</th></tr></thead>"
        "<tbody></tbody></table></div><button id=more type=button hidden>Show more</button></section>"
    )


def _options(names: Iterable[str]) -> str:
    return "<option value=''>all</option>" + "".join(f"<option>{escape(name)}</option>" for name in names)


def _texts(results: Results) -> dict[str, Any]:
    """The rows for the script; every text stands once and is named by its place in `texts`."""
    places: dict[str, int] = {}

    def place(text: str | None) -> int | None:
        return None if text is None else places.setdefault(text, len(places))

    rows = [
        [
            str(row["case_id"]),
            place(row["method"]),
            place(row["regime"]),
            place(row["edit"]["prompt"]),
            place(row["edit"]["subject"]),
            place(row["edit"]["target"]),
            place(row["before"]),
            place(row["after"]),
            place(row["error"]),
            [_probe(probe, place) for probe in row["probes"]],
        ]
        for report in results.reports
        for row in report.rows
    ]
    return {"texts": list(places), "rows": rows}


def _probe(probe: Mapping[str, Any], place: Any) -> list[Any]:
    before, after = probe["before"], probe["after"] or {}
    scores = [None if s is None else round(s, 3) for s in (probe["scores"][p] for p in words.PROTOCOLS)]
    kind = f"{probe['kind']}/{probe['aspect']}" if probe["aspect"] else probe["kind"]
    return [
        place(kind),
        place(probe["prompt"]),
        place(probe["answer"]),
        place(before["text"]),
        place(after.get("text")),
        *scores,
    ]


def _made(results: Results) -> str:
    settings = "".join(
        f"<tr><th scope=row>{escape(r.about['method'])}, {escape(r.about['regime'])}</th>"
        f"<td><code>{escape(json.dumps(r.about['settings'], ensure_ascii=False))}</code></td>"
        f"<td class=number>{r.about['n']}</td><td class=number>{r.about['failed']}</td>"
        f"<td class=number>{r.about['unasked']}</td></tr>"
        for r in results.reports
    )
    versions = ", ".join(f"{k} {v}" for k, v in results.reports[0].about["versions"].items())
    return (
        "<section><h2>How it was made</h2><div class=wide><table><caption>Settings of every run; an edit that could "
        "not be made counts as 0 and has no locality</caption><thead><tr><th scope=col>run</th>"
        "<th scope=col>settings</th>"
        "<th scope=col>cases</th><th scope=col>failed</th><th scope=col>not asked in full</th></tr></thead>"
        f"<tbody>{settings}</tbody></table></div><p class=versions>{escape(versions)}</p></section>"
    )
