"""Take the figures of the site and of the README from runs: python docs/measure.py runs/almanac runs/gemma

A run is of one model: `errata bench --model MODEL --data counterfact-mini --known --n 40 --method ...
--regime single,batch,sequential --out runs/MODEL`. Almanac's is without `--known`, with `--n 200`: its first `TUNED`
records served to tune its presets, so what is told is what the others say. For the other models nothing was tuned on
this data.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tables

from errata import store
from errata.bench import Report, Results, metrics
from errata.bench.report import plain

TUNED = 100
README = Path(__file__).parent.parent / "README.md"
ABOUT = ("model", "versions", "seed", "metrics", "new_tokens")


def main(*folders: str) -> None:
    for folder in folders:
        take(Results.load(folder))
    text = README.read_text(encoding="utf-8")
    for model in tables.MODELS:
        text = tables.in_readme(text, model)
    store.write(README, text)


def take(results: Results) -> None:
    """Keep the figures of a run."""
    first = results.reports[0].about
    name = first["model"]["name"]
    tuned = TUNED if name == "almanac" else 0
    methods: dict[str, dict[str, Any]] = {}
    for report in results.reports:
        regime = report.about["regime"].split("=")[0]
        methods.setdefault(report.about["method"], {})[regime] = figures(report, tuned)
    about = {name: first[name] for name in ABOUT}
    about |= {"data": results.about["data"], "known": results.about["known"], "tuned": tuned}
    text = json.dumps(rounded(plain({"about": about, "methods": methods})), indent=1, sort_keys=True)
    store.write(tables.MEASURED / f"{name}.json", text + "\n")


def figures(report: Report, tuned: int) -> dict[str, Any]:
    """One method in one regime, over the records that no preset was tuned on; and what an edit of all cost."""
    held_out = [row["metrics"] for row in report.rows[tuned:]]
    about = {name: report.about[name] for name in ("regime", "batch", "evaluated", "n", "failed", "efficiency")}
    return {**about, "summary": metrics.summarise(held_out, report.about["seed"])}


def rounded(value: Any) -> Any:
    """Four digits behind the point are more than an interval of a hundred cases tells."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    main(*sys.argv[1:])
