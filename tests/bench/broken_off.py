"""A small grid that is killed again and again: run as a process of its own by test_journal.py.

PyTorch is imported once; each run is a fork, killed from outside after a random while.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from errata import Case, Edit, Probe, ask
from errata.bench import Plan, run_grid
from tests import tiny

KILLS = 20


def main(folder: Path, seed: int) -> None:

    running = sys.modules["errata.bench.run"]  # the package has a function of that name
    ask.NEW_TOKENS, running.TOGETHER, running.SLICE, running.KEEP_EVERY = 4, 2, 3, 0.0
    lm = tiny.lm("gpt2")  # untrained: nothing has run backwards before the forks
    draw = random.Random(seed)
    started = time.monotonic()
    whole = forked(folder / "whole", lm)
    os.waitpid(whole, 0)
    takes = time.monotonic() - started
    expected = read(folder / "whole")
    kills, rounds, torn = 0, 0, 0
    while kills < KILLS:
        rounds += 1
        here = folder / f"broken-{rounds}"
        for share in (0.0, *(draw.uniform(0, 0.4) for _ in range(KILLS))):
            if kills == KILLS:
                share = 100.0
            child = forked(here, lm)
            kills += killed(child, share * takes)
            torn += is_torn(here)
            if (here / "report.json").exists():
                break
        else:
            os.waitpid(forked(here, lm), 0)
        assert read(here) == expected, f"round {rounds} differs after {kills} kills"
    print(json.dumps({"kills": kills, "rounds": rounds, "rows": len(expected["rows"])}))


def forked(folder: Path, lm: Any) -> int:
    child = os.fork()
    if child:
        return child
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = run_grid(plan(), lm, cases(), folder)
        results.save(folder / "report.json")
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def killed(child: int, after: float) -> int:
    """1 if it was still at work; 0 if it had ended, and then it must have ended well."""
    until = time.monotonic() + after
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"a run that went on failed ({status})"
            return 0
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return int(os.WIFSIGNALED(status))


def is_torn(folder: Path) -> bool:
    path = folder / "journal.jsonl"
    return path.exists() and not path.read_bytes().endswith(b"\n")


def plan() -> Plan:
    method = {"ft-m": {"layers": [2], "steps": 2}, "grace": {"at": 2, "steps": 2}}
    return Plan(method=method, regime=("single", "batch", "sequential"), batch=2)


def cases() -> list[Case]:
    names = list(tiny.CAPITALS)[:5]
    near = Probe("neighbourhood", "The capital of Greece is", "Athens", "Lima")
    return [Case(i, Edit(tiny.PROMPT, n, "Lima", tiny.CAPITALS[n]), (near,), "P36") for i, n in enumerate(names)]


def read(folder: Path) -> Any:
    """A report without what it took."""
    found = json.loads((folder / "report.json").read_text())
    for one in found["about"]["runs"]:
        del one["efficiency"]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
