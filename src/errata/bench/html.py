"""Results as one page of HTML that needs nothing else: no network, no other file. Its style and script lie beside it.

The charts and tables are in the page as it stands; the script only finds and shows the texts of the edits.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from . import words
from .charts import Line, curves, dots, mark, scatter
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
        f"<ul class=keys>{keys}</ul><ul class=keys>{asks}</ul>{_trade(results)}"
        f"<div class=wide>{dots(runs, shares)}</div></section>"
    )


def _trade(results: Results) -> str:
    """For each regime, what carries over against what stays as it was; worth a look from three methods on."""
    regimes: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for report in results.reports:
        x, y = (report.summary.get(m, {}).get("generated", {}).get("mean") for m in ("locality", "generalization"))
        if x is not None and y is not None:
            regimes[report.about["regime"]].append((report.about["method"], x, y))
    charts = [scatter(regime, "locality", "generalization", some) for regime, some in regimes.items() if len(some) > 2]
    if not charts:
        return ""
    return (
        "<p>Every editor trades what carries over to paraphrases against what stays as it was; the best are at the top "
        f"right (<b class=generated>generated</b>).</p><div class=charts>{''.join(charts)}</div>"
    )


def _numbers(results: Results) -> str:
    from .results import metrics_of, protocols_of

    columns = {
        protocol: [m for m in metrics_of(results, aspects=True) if any(_asked(r, m, protocol) for r in results.reports)]
        for protocol in protocols_of(results)
    }
    groups = "".join(
        f'<th scope=colgroup colspan={len(names)} class="{protocol}">{protocol}</th>'
        for protocol, names in columns.items()
        if names
    )
    head = "".join(f"<th scope=col>{escape(name)}</th>" for names in columns.values() for name in names)
    notes = "".join(f"<li>{escape(note)}</li>" for note in words.notes(results))
    return (
        "<section><h2>The numbers</h2><div class='wide tall'><table class=numbers><caption>Mean over cases ± half its "
        "95% bootstrap interval, under each protocol; – was not asked. A name after / is the data set's own kind of "
        "question.</caption><thead><tr><th scope=col rowspan=2>method</th><th scope=col rowspan=2>regime</th>"
        f"{groups}</tr><tr>{head}</tr></thead>{_by_method(results, lambda r: _number_cells(r, columns))}</table></div>"
        f"<ul class=notes>{notes}</ul></section>"
    )


def _asked(report: Report, metric: str, protocol: str) -> bool:
    return report.summary.get(metric, {}).get(protocol, {}).get("mean") is not None


def _by_method(results: Results, cells: Callable[[Report], str]) -> str:
    """A body of a table for each method, with a row for each regime."""
    methods: dict[str, list[Report]] = defaultdict(list)
    for report in results.reports:
        methods[report.about["method"]].append(report)
    bodies = []
    for method, reports in methods.items():
        name = f"<th scope=rowgroup rowspan={len(reports)}>{escape(method)}</th>"
        rows = [f"<th scope=row class=regime>{escape(r.about['regime'])}</th>{cells(r)}" for r in reports]
        bodies.append("<tbody>" + "".join(f"<tr>{'' if i else name}{row}</tr>" for i, row in enumerate(rows)))
    return "</tbody>".join([*bodies, ""])


def _number_cells(report: Report, columns: Mapping[str, Sequence[str]]) -> str:
    return "".join(
        _number(report.summary.get(name, {}).get(protocol), f"{name}, {protocol}", first=i == 0)
        for protocol, names in columns.items()
        for i, name in enumerate(names)
    )


def _number(found: Mapping[str, Any] | None, what: str, first: bool) -> str:
    kind = "number first" if first else "number"
    if found is None or found["mean"] is None:
        return f'<td class="{kind}">–</td>'
    said = f"{what}: {words.spread(found)}, {found['n']} cases"
    return f'<td class="{kind}" title="{escape(said)}">{found["mean"]:.3f} <small>{words.half(found)}</small></td>'


def _retention(results: Results) -> str:
    kept = [r for r in results.reports if len(r.about.get("retention", ())) > 1]
    if not kept:
        return ""
    forced, generated = ("".join(_kept(r, protocol) for r in kept) for protocol in ("forced", "generated"))
    return (
        "<section><h2>What a sequence retains</h2><p>Edits are made one after another on the same model. Each point "
        "asks about <em>all</em> edits made so far; the band is the 95% interval. Here <b class=generated>generated</b>"
        f":</p><div class=charts>{generated}</div><details><summary>The same, <b class=forced>forced</b></summary>"
        f"<div class=charts>{forced}</div></details></section>"
    )


def _kept(report: Report, protocol: str) -> str:
    """One method's curves."""
    names = ("reliability", "generalization", "locality")
    found = [(name, _points(report.about["retention"], name, protocol)) for name in names]
    lines = [Line(name, points) for name, points in found if points]
    return curves(report.about["method"], protocol, lines) if lines else ""


def _points(
    retention: Iterable[Mapping[str, Any]], metric: str, protocol: str
) -> list[tuple[float, float, float, float]]:
    found = [(one["after"], one["summary"].get(metric, {}).get(protocol)) for one in retention]
    known = [(after, f) for after, f in found if f and f["mean"] is not None]
    ends = [(f["mean"], f["mean"]) if f["low"] is None else (f["low"], f["high"]) for _, f in known]
    return [(after, f["mean"], low, high) for (after, f), (low, high) in zip(known, ends, strict=True)]


def _cost(results: Results) -> str:
    found = [words.costs(r.about) for r in results.reports]
    most = [max((v for v, _ in column if v), default=1.0) for column in zip(*found, strict=True)]

    def cells(report: Report) -> str:
        return "".join(
            f'<td class="number bar" style="--share:{(value or 0) / top:.4f}">{escape(said)}</td>'
            for (value, said), top in zip(words.costs(report.about), most, strict=True)
        )

    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in words.COSTS.values())
    return (
        "<section><h2>Cost</h2><div class='wide tall'><table class=costs><caption>Seconds are of the machine this ran "
        "on, those of the processor without what else it did; operations are the same everywhere (counted on the first "
        "edits of a run). The bytes of single edits are of a patch each, of others the patch of all, shared out."
        "</caption><thead><tr><th scope=col>method</th><th scope=col>regime</th>"
        f"{head}</tr></thead>{_by_method(results, cells)}</table></div></section>"
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
    prompts: dict[str, list[str]] = defaultdict(list)
    for row in results.reports[0].rows:
        if row["relation"]:
            prompts[row["relation"]].append(row["edit"]["prompt"])
    if not prompts:
        return ""
    shown = sorted(prompts, key=lambda name: (-len(prompts[name]), name))[:RELATIONS]
    head = "".join(f"<th scope=col>{escape(name)}<small>{len(prompts[name])}</small></th>" for name in shown)
    keys = "".join(f"<li><b>{escape(n)}</b> {escape(max(prompts[n], key=prompts[n].count))}</li>" for n in shown)
    rest = len(prompts) - len(shown)
    more = f" The {rest} rarest relations are left out." if rest else ""
    return (
        "<section><h2>By relation</h2><p>Reliability, <b class=generated>generated</b>: of a hundred cases of each "
        "relation (a Wikidata property; the small number says how many cases there are), in how many the edited model "
        f"says the new answer by itself.{more}</p><div class='wide tall'><table class=heat><thead><tr>"
        f"<th scope=col>method</th><th scope=col>regime</th>{head}</tr></thead>"
        f"{_by_method(results, lambda r: ''.join(_share(_of_relation(r, n)) for n in shown))}</table></div>"
        f"<details><summary>What the relations are</summary><ul class=keys>{keys}</ul></details></section>"
    )


def _of_relation(report: Report, relation: str) -> float | None:
    return mean(r["metrics"]["reliability"]["generated"] for r in report.rows if r["relation"] == relation)


def _share(value: float | None) -> str:
    if value is None:
        return "<td class=number>–</td>"
    dark = " dark" if value > 0.6 else ""
    return f'<td class="number share{dark}" style="--share:{value:.3f}">{100 * value:.0f}</td>'


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
    found = {r.about["method"]: r.about for r in results.reports}
    settings = "".join(
        f"<tr><th scope=row>{escape(method)}</th><td><code>{escape(json.dumps(about['settings'], ensure_ascii=False))}"
        f"</code></td><td>{escape(about.get('source') or 'given')}</td></tr>"
        for method, about in found.items()
    )
    versions = ", ".join(f"{k} {v}" for k, v in results.reports[0].about["versions"].items())
    return (
        "<section><h2>How it was made</h2><div class=wide><table><caption>Settings, and where they are from</caption>"
        "<thead><tr><th scope=col>method</th><th scope=col>settings</th><th scope=col>from</th></tr></thead>"
        f"<tbody>{settings}</tbody></table></div><p class=versions>{escape(versions)}</p></section>"
    )
