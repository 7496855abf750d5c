"""Take the figures of the site and of the README from one run: python docs/measure.py runs/all

The run is `errata bench --model almanac --data counterfact-mini --method ... --regime single,batch,sequential --n 200
--out runs/all`. Its first `TUNED` records served to tune almanac's presets, so what is told is what the others say.
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


def main(folder: str) -> None:
    results = Results.load(folder)
    first = results.reports[0].about
    methods: dict[str, dict[str, Any]] = {}
    for report in results.reports:
        methods.setdefault(report.about["method"], {})[report.about["regime"].split("=")[0]] = figures(report)
    about = {name: first[name] for name in ABOUT} | {"data": results.about["data"], "tuned": TUNED}
    text = json.dumps(rounded(plain({"about": about, "methods": methods})), indent=1, sort_keys=True)
    store.write(tables.MEASURED, text + "\n")
    store.write(README, tables.in_readme(README.read_text(encoding="utf-8"), tables.overall()))


def figures(report: Report) -> dict[str, Any]:
    """Of one method in one regime, over the records that no preset was tuned on; and what an edit of all cost."""
    held_out = [row["metrics"] for row in report.rows[TUNED:]]
    about = {name: report.about[name] for name in ("regime", "batch", "evaluated", "n", "failed", "efficiency")}
    return {**about, "summary": metrics.summarise(held_out, report.about["seed"])}


def rounded(value: Any) -> Any:
    """Four digits behind the point are more than an interval of a hundred cases tells."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
