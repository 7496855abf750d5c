"""What the methods that leave the weights alone give over many real facts, after all edits.

    python benchmarks/memories.py [--n 200] [--method grace,melo] [--regime single,sequential] [--out memories.json]

On almanac, counterfact-mini, part edit. Prints a row for each method and regime as it comes: reliability,
generalization and locality with their protocol, seconds and bytes an edit. JSON has the intervals too.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch

import errata
from errata.bench import run

METHODS = "grace,melo,wise,serac,retrieval,ike,ice"


def measured(name: str, regime: str, n: int) -> dict[str, object]:
    """One method in one regime."""
    lm, cases = errata.load("almanac"), errata.data.load("counterfact-mini", n)
    method = errata.methods()[name].preset(lm)
    report = run(method, lm, cases, keep=regime == "sequential").to_dict()
    patch = method.edit(lm, [cases[0].edit])
    return {
        "method": name,
        "regime": regime,
        "n": len(cases),
        "summary": report["summary"],
        "seconds_per_edit": report["about"]["efficiency"]["editing_per_edit"],
        "bytes_of_one_edit": patch.bytes,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--n", type=int, default=200)
    options.add_argument("--method", default=METHODS)
    options.add_argument("--regime", default="single,sequential")
    options.add_argument("--out", type=Path, default=Path("memories.json"))
    given = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in given.method.split(","):
        for regime in given.regime.split(","):
            row = measured(name, regime, given.n)
            rows.append(row)
            means = {m: {p: v["mean"] for p, v in ps.items()} for m, ps in row["summary"].items()}
            print(json.dumps({**row, "summary": means}), flush=True)
            given.out.write_text(json.dumps({"versions": errata.method.versions(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
