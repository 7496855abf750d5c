"""Measure methods on almanac for their pages: python docs/measure.py [METHOD ...] writes docs/measured.json.

Each gets the first N cases of counterfact-mini (part edit) in the single regime, with almanac's preset.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import errata
from errata import presets, store

N = 24
PLACE = Path(__file__).parent / "measured.json"


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    lm, cases = errata.load("almanac"), errata.data.load("counterfact-mini", n=N)
    tuned = presets._tables()["models"]["almanac"]
    for name in names or [n for n in errata.methods() if n in tuned]:
        report = errata.bench.run(errata.methods()[name].preset(lm), lm, cases)
        found = json.loads(PLACE.read_text()) if PLACE.exists() else {}
        about = {k: v for k, v in report.about.items() if k != "settings"}
        found[name] = report.to_dict() | {"about": about, "rows": None}
        store.write(PLACE, json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(name, report, sep="\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
