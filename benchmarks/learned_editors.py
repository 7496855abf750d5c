"""What learned editors cost beside ROME and FT: an edit, and the training before it, on the same model in the same run.

    python benchmarks/learned_editors.py [--n 20] [--steps 5] [--batch 16] [--method rome,ft,...] [--out FILE.json]

On almanac by its presets, facts of counterfact-mini. Editors are trained here, for a few steps on almanac-facts: such
an editor is no good, but it edits as fast as a good one, and a step takes what a step takes. Seconds are the
processor's, which other work on the machine does not lengthen; `x ROME` is how many ROME edits, made one at a time in
the same run, take as long. What is needed once for a model (contexts, moments, the editor's file) is there before the
clock starts. Memory is the process' own beyond what it held before. Training and editing are a process each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from edit_speed import _about, _timed

import errata
from errata.train import Course, Trained

METHODS = "rome,ft,ultraedit,ke,mend,malmen,rledit"
UNIT = "rome"
COLUMNS = ("one at a time", "x ROME", "at once", "x ROME", "MB", "a step", "1,000 cases", "x ROME", "MB")


def edits(name: str, n: int, editor: str | None) -> dict[str, dict[str, float]]:
    """Seconds an edit and peaks, of n made one at a time and, by a method that can, at once."""
    lm = errata.load("almanac")
    facts = [c.edit for c in errata.data.load("counterfact-mini", n + 1)]
    method = errata.methods()[name].preset(lm, **({"editor": editor} if editor else {}))
    method.edit(lm, facts[n:])
    ways = {"one at a time": lambda: [method.edit(lm, [fact]) for fact in facts[:n]]}
    if method.batched:
        ways["at once"] = lambda: method.edit(lm, facts[:n])
    found = {way: _timed(do) for way, do in ways.items()}
    return {way: {"seconds": one["processor_seconds"] / n, "peak_mb": one["peak_mb"]} for way, one in found.items()}


def training(name: str, steps: int, batch: int, out: str) -> dict[str, float]:
    """Seconds of a step and of 1,000 cases, after what is done once, and the peak; `out` becomes the editor."""
    lm, marks = errata.load("almanac"), []
    cases = errata.data.load("almanac-facts", steps * batch + 40, part="train")
    method = errata.methods()[name].preset(lm, editor="")
    assert isinstance(method, Trained)
    course = Course(steps=steps, batch=batch, every=steps, held=8)

    def mark(_step: int, _losses: Any, held: bool) -> None:
        if not held:
            marks.append(time.process_time())

    found = _timed(lambda: method.train(lm, cases, course, out=out, progress=mark))
    step = (marks[-1] - marks[0]) / (steps - 1)  # the first has what is loaded once, and so much is done before it
    each = 1000 * step / batch
    return {"seconds_of_a_step": step, "seconds_of_1000_cases": each, "peak_mb": found["peak_mb"]}


def measured(name: str, given: argparse.Namespace, folder: str) -> dict[str, Any]:
    """All of one method."""
    kind, found, editor = errata.methods()[name], {}, None
    if kind.trained:
        editor = f"{folder}/{name}.safetensors"
        found["training"] = _one("training", name=name, steps=given.steps, batch=given.batch, out=editor)
    return {**found, **_one("edits", name=name, n=given.n, editor=editor)}


def row(found: dict[str, Any], unit: float) -> list[str]:
    """The cells of a method, in the order of `COLUMNS`."""

    def cells(part: str, *names: str) -> list[str]:
        one = found.get(part)
        if one is None:
            return ["-"] * (len(names) + 1)
        return [*(_short(one[name]) for name in names), _short(one[names[-1]] / unit)]

    training = cells("training", "seconds_of_a_step", "seconds_of_1000_cases")
    peaks = [found.get(part, {}).get("peak_mb") for part in ("one at a time", "training")]
    edit, learn = ("-" if peak is None else f"{peak:.0f}" for peak in peaks)
    both = cells("one at a time", "seconds") + cells("at once", "seconds")
    return [*both, edit, *training, learn]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--n", type=int, default=20, help="edits")
    options.add_argument("--steps", type=int, default=5, help="of each training, two or more")
    options.add_argument("--batch", type=int, default=16, help="cases of a step")
    options.add_argument("--method", default=METHODS)
    options.add_argument("--out", type=Path, default=Path("learned_editors.json"))
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if given.one:
        name, settings = json.loads(given.one)
        print(json.dumps(globals()[name](**settings)))
        return
    names = list(dict.fromkeys([UNIT, *given.method.split(",")]))
    out: dict[str, Any] = {"about": {**_about(1), "n": given.n, "batch": given.batch}, "methods": {}}
    print(f"{'':10s}" + "".join(f"{column:>15s}" for column in COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            out["methods"][name] = found = measured(name, given, folder)
            unit = out["methods"][UNIT]["one at a time"]["seconds"]
            print(f"{name:10s}" + "".join(f"{cell:>15s}" for cell in row(found, unit)), flush=True)
            given.out.write_text(json.dumps(out, indent=1) + "\n")
    print(f"written to {given.out}")


def _one(what: str, **settings: Any) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([what, settings])]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    main()
