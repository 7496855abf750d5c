"""What is written into the site when it is built: the list of methods, and on each method's page its facts.

`<!-- facts -->`, `<!-- settings -->` and `<!-- measured -->` in a page of docs/methods are replaced by tables that are
read from the registry, the docstrings under the method's fields, the presets and `measured.json`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import errata
from errata import presets
from errata.bench import words
from errata.cli import settings
from errata.method import Method

HERE = Path(__file__).parent


def on_config(config: Any) -> Any:
    """Put the pages of registered methods where the navigation says `Methods`."""
    listed = [f"methods/{name}.md" for name in errata.methods() if (HERE / "methods" / f"{name}.md").is_file()]
    for entry in config.nav:
        if isinstance(entry, dict) and "Methods" in entry:
            entry["Methods"] = listed
    config.nav += [page for page in ("papers.md",) if (HERE / page).is_file()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Leave out pages of methods that are not registered, and what is not linked from anywhere."""
    for file in list(files.documentation_pages()):
        path = Path(file.src_uri)
        if path.parts[0] == "methods" and path.stem not in errata.methods():
            files.remove(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the tables."""
    path = Path(page.file.src_uri)
    if path.parts[0] == "methods":
        method = errata.methods()[path.stem]
        for mark, made in (("facts", facts), ("settings", options), ("measured", measured)):
            markdown = markdown.replace(f"<!-- {mark} -->", made(method))
    return markdown.replace("<!-- methods -->", overview()).replace("<!-- compared -->", compared())


def facts(method: type[Method]) -> str:
    """Paper, and how it edits."""
    rows = [
        ("name", f"`{method.name}`; in Python `{method.__name__}`"),
        ("paper", f"[{method.paper}]({method.source})" if method.source.startswith("http") else method.paper),
        ("several edits at once", "yes" if method.batched else "no: one after another"),
        ("trained before its first edit", "yes" if method.trained else "no"),
    ]
    return _table(("", ""), rows)


def options(method: type[Method]) -> str:
    """Every setting, from the docstring line under its field."""
    tuned = presets._tables()["models"]["almanac"].get(method.name, {})
    rows = []
    for field in settings.describe(method):
        name, default = field["name"], field["default"]
        rows.append(
            (f"`{name}`", field["type"], _value(default), _value(tuned[name]) if name in tuned else "", field["about"])
        )
    source = f"\n\nalmanac's: {tuned['source']}." if "source" in tuned else ""
    return _table(("setting", "type", "default", "for almanac", "what it is"), rows) + source


def measured(method: type[Method]) -> str:
    """What it did to almanac."""
    found = _figures().get("methods", {}).get(method.name)
    if found is None:
        return f"Not measured yet: `errata bench --method {method.name}` does it."
    found = {regime: found[regime] for regime in REGIMES if regime in found}
    rows = [
        (regime if i == 0 else "", f"`{protocol}`", *(_mean(one["summary"][m][protocol]) for m in METRICS))
        for regime, one in found.items()
        for i, protocol in enumerate(PROTOCOLS)
    ]
    costs = [(regime, *(said for _, said in words.costs(one))) for regime, one in found.items()]
    return (
        f"{_how()} Means with their 95% intervals:\n\n"
        + _table(("regime", "protocol", *METRICS), rows)
        + "\n\nWhat it cost, over all records (seconds are of the machine it ran on):\n\n"
        + _table(("regime", *words.COSTS.values()), costs)
    )


def _how() -> str:
    """How the figures were obtained."""
    about = _figures()["about"]
    n, tuned = about["data"]["n"], about["tuned"]
    return (
        f"Records {tuned} to {n - 1} of counterfact-mini, on which no preset was tuned, of a run over the first {n}: "
        f"each by itself (single), all {n} at once (batch), and all {n} one after another, asked when all were made "
        "(sequential). almanac is a small model that was made to be edited: the figures compare methods, they don't "
        "promise anything about yours."
    )


def overview() -> str:
    """All methods, each with its first docstring line."""
    rows = [
        (f"[{name}](methods/{name}.md)", (m.__doc__ or "").split("\n")[0].split(", eq.")[0], m.paper)
        for name, m in errata.methods().items()
    ]
    return _table(("method", "what it does", "paper"), rows)


def compared() -> str:
    """Methods side by side, as a user would see their answers."""
    return f"{_how()}\n\n{overall('methods/')}" if _figures() else overall()


def overall(folder: str = "docs/methods/") -> str:
    """A line for each method: what its edits do in each regime, and what one costs."""
    if not _figures():
        return "Not measured on this almanac yet."
    rows = []
    for name in errata.methods():
        found = _figures()["methods"].get(name, {})
        if "single" in found:
            cost = dict(zip(words.COSTS, words.costs(found["single"]), strict=True))
            of_all = [_means(found.get(regime)) for regime in REGIMES]
            rows.append(
                (f"[{name}]({folder}{name}.md)", *of_all, cost["processor_per_edit"][1], cost["bytes_per_edit"][1])
            )
    n = _figures()["about"]["data"]["n"]
    return _table(("method", "single", f"{n} at once", f"{n} in sequence", "processor time", "size"), rows)


def in_readme(text: str, table: str) -> str:
    """The README with this table between its marks."""
    before, _, rest = text.partition(f"{BEGIN}\n")
    _, _, after = rest.partition(f"\n{END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


MEASURED = HERE / "measured.json"
METRICS = ("reliability", "generalization", "locality")
PROTOCOLS = ("forced", "compare", "generated")
REGIMES = ("single", "batch", "sequential")
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def _mean(found: dict[str, Any]) -> str:
    return "–" if found["mean"] is None else f"{found['mean']:.3f} ({words.spread(found)})"


def _means(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    means = [found["summary"][metric]["generated"]["mean"] for metric in METRICS]
    return " / ".join("–" if mean is None else f"{mean:.2f}" for mean in means)


@cache
def _figures() -> dict[str, Any]:
    """Of the almanac that ships now; figures of an earlier one are left out."""
    found = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    now = errata.load("almanac").fingerprint
    return found if found.get("about", {}).get("model", {}).get("fingerprint") == now else {}


def _value(value: Any) -> str:
    return "" if value is None else f"`{value}`"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [[" ".join(str(c).split()).replace("|", "\\|") for c in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
