"""Published tables, and the run that gives ours beside them: `errata bench recipe easyedit-zsre --model PATH`.

A recipe (`recipes.toml`) fixes data, regime, protocol and columns; the methods take their presets for the model.
Methods that the table has and errata lacks are shown without a number of ours.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from rich.table import Table

from ..errors import unknown
from ..escape import markup, markup_lines
from ..method import methods
from .plan import Plan
from .results import Results


@dataclass(frozen=True)
class Recipe:
    """One published table."""

    name: str
    title: str
    source: str
    model: str
    """On the hub; what the table was made with."""
    data: str
    data_note: str
    regime: str
    protocol: str
    columns: tuple[str, ...]
    published: Mapping[str, Sequence[float]]
    """By method, in the order of the columns, as percentages."""
    n: int | None = None
    batch: int | None = None

    def plan(self, **given: Any) -> Plan:
        """The run. What is given goes before what the recipe says: another model, other data, fewer cases."""
        chosen = {m: {} for m in self.published if m in methods()}
        values = {"model": self.model, "data": self.data, "n": self.n, "batch": self.batch, "method": chosen}
        return Plan.of({**values, "regime": self.regime, **given}, f"the recipe {self.name}")

    def rows(self, results: Results) -> list[dict[str, Any]]:
        """A row for each method and column: `published`, and `ours` with its interval, both in percent."""
        ours = {r.about["method"]: r.summary for r in results.reports}
        return [
            {
                "method": method,
                "metric": metric,
                "protocol": self.protocol,
                "published": value,
                "ours": _percent(ours.get(method, {}).get(metric, {}).get(self.protocol)),
            }
            for method, values in self.published.items()
            for metric, value in zip(self.columns, values, strict=True)
        ]

    def table(self, results: Results) -> Table:
        """Published and ours beside each other, for the terminal."""
        about = results.reports[0].about
        same = about["model"]["name"] == self.model
        made = Table(
            title=markup(f"{self.title}: published beside ours ({self.protocol}, {about['regime']})"),
            caption=markup_lines(_caption(self, results, same)),
            caption_justify="left",
        )
        for column in ("method", "metric"):
            made.add_column(column)
        for column in ("published", "ours"):
            made.add_column(column, justify="right")
        for i, row in enumerate(self.rows(results), 1):
            metric = (i - 1) % len(self.columns)
            cells = (row["metric"], f"{row['published']:.2f}", _said(row["ours"]))
            made.add_row("" if metric else row["method"], *cells, end_section=i % len(self.columns) == 0)
        return made


@cache
def recipes() -> dict[str, Recipe]:
    """Every recipe by its name."""
    found = tomllib.loads(resources.files("errata.bench").joinpath("recipes.toml").read_text(encoding="utf-8"))
    return {name: Recipe(name, **{**one, "columns": tuple(one["columns"])}) for name, one in found.items()}


def recipe(name: str) -> Recipe:
    """A recipe by its name."""
    if name not in recipes():
        raise unknown("recipe", name, recipes())
    return recipes()[name]


def _percent(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None or found["mean"] is None:
        return None
    shares = {k: None if found[k] is None else 100 * found[k] for k in ("mean", "low", "high")}
    return {**shares, "n": found["n"]}


def _said(ours: Mapping[str, Any] | None) -> str:
    if ours is None or ours["low"] is None:
        return "–" if ours is None else f"{ours['mean']:.2f}"
    return f"{ours['mean']:.2f} ±{(ours['high'] - ours['low']) / 2:.1f}"


def _caption(recipe: Recipe, results: Results, same: bool) -> list[str]:
    data = results.about["data"]
    lines = [
        f"published: {recipe.source}, on {recipe.model}",
        f"data: {recipe.data_note}",
        f"ours: {results.reports[0].about['model']['name']}, {data['n']} cases of {data['name']}, 95% intervals",
    ]
    if not same:
        lines.append("ours is another model: this shows that the protocol runs, not that the number is reproduced")
    lines += [f"no number for {one['method']}: {one['error']}" for one in results.about["left_out"]]
    tried = {r.about["method"] for r in results.reports} | {one["method"] for one in results.about["left_out"]}
    missing = [m for m in recipe.published if m not in tried]
    if missing:
        lines.append(f"not run: {', '.join(missing)}")
    return lines
