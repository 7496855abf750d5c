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
    found = _figures().get(method.name)
    if found is None:
        return f"Not measured yet: `errata bench --method {method.name}` does it."
    about = found["about"]
    rows = [
        (metric if i == 0 else "", f"`{protocol}`", f"{v['mean']:.3f}", f"{v['low']:.3f} to {v['high']:.3f}", v["n"])
        for metric, protocols in found["summary"].items()
        for i, (protocol, v) in enumerate((p, v) for p, v in protocols.items() if v["mean"] is not None)
    ]
    return (
        f"The first {about['n']} cases of counterfact-mini, {about['regime']} regime, evaluated {about['evaluated']} "
        f"(`python docs/measure.py {method.name}`; errata {about['versions']['errata']}, torch "
        f"{about['versions']['torch']}). almanac is a small model that was made to be edited: the figures compare "
        "methods, they don't promise anything about yours.\n\n"
        + _table(("metric", "protocol", "mean", "95% interval", "cases"), rows)
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
    rows = []
    for name, found in _figures().items():
        if name in errata.methods():
            means = [found["summary"].get(m, {}).get("generated", {}).get("mean") for m in METRICS]
            rows.append((f"[{name}](methods/{name}.md)", *map(_mean, means), found["about"]["n"]))
    return _table(("method", *METRICS, "cases"), rows)


METRICS = ("reliability", "generalization", "locality")


def _mean(mean: float | None) -> str:
    return "–" if mean is None else f"{mean:.3f}"


@cache
def _figures() -> dict[str, Any]:
    """Of the almanac that ships now; figures of an earlier one are left out."""
    path = HERE / "measured.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    now = errata.load("almanac").fingerprint
    return {name: report for name, report in found.items() if report["about"]["model"]["fingerprint"] == now}


def _value(value: Any) -> str:
    return "" if value is None else f"`{value}`"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [[" ".join(str(c).split()).replace("|", "\\|") for c in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
