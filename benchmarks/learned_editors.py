"""What an edit by a learned editor costs beside ROME and FT, and what the training before it costs.

    python benchmarks/learned_editors.py [--n 20] [--method mend,rome,ft] [--out learned_editors.json]

On almanac. Floating-point operations are counted (`FlopCounterMode`) and are the same on every machine; seconds are the
processor's, on one thread. A training is counted and timed over a few of its steps, times their number in the model's
preset; the pass over made-up subjects before the first step comes on top. `edits to pay` says after how many edits a
training is worth it beside ROME, in operations.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import errata
from errata import LM, Method, presets
from errata.train import Course, Trained, writable

METHODS = "mend,malmen,ke,ultraedit,rome,ft"
STEPS = 3
"""Of a training, counted and timed."""


def cost(do: Callable[[], object]) -> dict[str, float]:
    """Operations, and processor seconds in a run of its own, as counting takes time."""
    with FlopCounterMode(display=False) as counter:
        do()
    begun = time.process_time()
    do()
    return {"flops": float(counter.get_total_flops()), "seconds": time.process_time() - begun}


def of_an_edit(lm: LM, method: Method, n: int) -> dict[str, float]:
    """Single edits, in the passes that they share."""
    edits = [c.edit for c in errata.data.load("counterfact-mini", n)]
    method.each(lm, edits[:1])  # what is made once for a model
    return {k: v / n for k, v in cost(lambda: method.each(lm, edits)).items()}


def of_its_training(lm: LM, method: Trained) -> dict[str, float]:
    """All steps of the preset's course."""
    course = Course(**presets.course(method.name, lm))
    cases = writable(lm, errata.data.load("almanac-facts", 4 * course.batch, part="train"))
    with lm.frozen(), torch.enable_grad():
        network = method.network(lm)
        method.fit(lm, network, cases)

        def learn() -> None:
            for step in range(STEPS):
                draw = random.Random(step)
                method.learn(lm, network, draw.sample(cases, course.batch), draw)

        found = {k: v / STEPS * course.steps for k, v in cost(learn).items()}
    return {**found, "steps": course.steps, "batch": course.batch}


def measured(name: str, n: int) -> dict[str, Any]:
    """A method's row."""
    lm = errata.load("almanac")
    method = errata.methods()[name].preset(lm)
    if not isinstance(method, Trained):
        return {"method": name, "an edit": of_an_edit(lm, method, n)}
    row: dict[str, Any] = {"method": name, "its training": of_its_training(lm, method)}
    return {**row, "an edit": of_an_edit(lm, method, n)} if method.editor else row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--n", type=int, default=20)
    options.add_argument("--method", default=METHODS)
    options.add_argument("--out", type=Path, default=Path("learned_editors.json"))
    given = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [measured(name, given.n) for name in given.method.split(",")]
    rome = next((row["an edit"]["flops"] for row in rows if row["method"] == "rome"), None)
    for row in rows:
        if rome and "its training" in row and "an edit" in row:
            row["edits to pay"] = row["its training"]["flops"] / (rome - row["an edit"]["flops"])
        print(json.dumps(row), flush=True)
    given.out.write_text(json.dumps({"versions": errata.method.versions(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
