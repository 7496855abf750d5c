"""What is written into the site when it is built: the list of methods, and on each method's page its facts.

`<!-- facts -->`, `<!-- settings -->` and `<!-- measured -->` in a page of docs/methods are replaced by tables that are
read from the registry, the docstrings under the method's fields, the presets and `measured/`.
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
    """What it did to each model."""
    parts = [_measured(model, one) for model in MODELS if (one := _figures(model)["methods"].get(method.name))]
    return "\n\n".join(parts) or f"Not measured yet: `errata bench --method {method.name}` does it."


def _measured(model: str, found: dict[str, Any]) -> str:
    found = {regime: found[regime] for regime in REGIMES if regime in found}
    rows = [
        (regime if i == 0 else "", f"`{protocol}`", *(_mean(one["summary"][m][protocol]) for m in METRICS))
        for regime, one in found.items()
        for i, protocol in enumerate(PROTOCOLS)
    ]
    costs = [(regime, *(said for _, said in words.costs(one))) for regime, one in found.items()]
    return (
        f"### On {MODELS[model]}\n\n{_how(model)} Means with their 95% intervals:\n\n"
        + _table(("regime", "protocol", *METRICS), rows)
        + "\n\nWhat it cost, over all records (seconds are of the machine it ran on):\n\n"
        + _table(("regime", *words.COSTS.values()), costs)
    )


def _how(model: str) -> str:
    """How the figures were obtained."""
    about = _figures(model)["about"]
    n, tuned = about["data"]["n"], about["tuned"]
    which = (
        f"Records {tuned} to {n - 1} of counterfact-mini, on which no preset was tuned, of a run over the first {n}"
        if tuned
        else f"{n} facts of CounterFact's edit part that the model knows, with default presets"
    )
    return (
        f"{which}: each by itself (single), all {n} at once (batch), and all {n} one after another, asked when all "
        "were made (sequential)."
    )


def overview() -> str:
    """All methods, each with its first docstring line."""
    rows = [
        (f"[{name}](methods/{name}.md)", (m.__doc__ or "").split("\n")[0].split(", eq.")[0], m.paper)
        for name, m in errata.methods().items()
    ]
    return _table(("method", "what it does", "paper"), rows)


def compared() -> str:
    """Methods side by side on each model, as a user would see their answers."""
    there = [model for model in MODELS if _figures(model)["methods"]]
    return "\n\n".join(f"### {MODELS[model]}\n\n{_how(model)}\n\n{overall(model, 'methods/')}" for model in there)


def overall(model: str, folder: str = "docs/methods/") -> str:
    """A line for each method: what its edits do to a model in each regime, and what one costs."""
    if not _figures(model)["methods"]:
        return f"Not measured on this {model} yet."
    rows = []
    for name in errata.methods():
        found = _figures(model)["methods"].get(name, {})
        if "single" in found:
            cost = dict(zip(words.COSTS, words.costs(found["single"]), strict=True))
            of_all = [_means(found.get(regime)) for regime in REGIMES]
            rows.append(
                (f"[{name}]({folder}{name}.md)", *of_all, cost["processor_per_edit"][1], cost["bytes_per_edit"][1])
            )
    n = _figures(model)["about"]["data"]["n"]
    return _table(("method", "single", f"{n} at once", f"{n} in sequence", "processor time", "size"), rows)


def in_readme(text: str, model: str) -> str:
    """The README with a model's table between its marks."""
    begin, end = f"<!-- figures of {model} -->", f"<!-- end of {model} -->"
    before, _, rest = text.partition(f"{begin}\n")
    _, _, after = rest.partition(f"\n{end}")
    return f"{before}{begin}\n{overall(model)}\n{end}{after}"


MODELS = {"smollm2-135m": "SmolLM2-135M-Instruct", "gemma-3-270m": "Gemma 3 270M", "almanac": "almanac"}
"""The models that were measured, in the order in which they are shown."""
MEASURED = HERE / "measured"
METRICS = ("reliability", "generalization", "locality")
PROTOCOLS = ("forced", "compare", "generated")
REGIMES = ("single", "batch", "sequential")


def _mean(found: dict[str, Any]) -> str:
    return "–" if found["mean"] is None else f"{found['mean']:.3f} ({words.spread(found)})"


def _means(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    means = [found["summary"][metric]["generated"]["mean"] for metric in METRICS]
    return " / ".join("–" if mean is None else f"{mean:.2f}" for mean in means)


@cache
def _figures(model: str) -> dict[str, Any]:
    """What was measured on a model; nothing of another almanac than the one that ships now."""
    file, nothing = MEASURED / f"{model}.json", {"methods": {}}
    if not file.is_file():
        return nothing
    found = json.loads(file.read_text(encoding="utf-8"))
    old = model == "almanac" and found["about"]["model"]["fingerprint"] != errata.load(model).fingerprint
    return nothing if old else found


def _value(value: Any) -> str:
    return "" if value is None else f"`{value}`"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [[" ".join(str(c).split()).replace("|", "\\|") for c in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
