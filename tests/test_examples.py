"""The examples run, as scripts, and do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "correct_one_fact.py": ([], "The mother tongue of Danielle Darrieux is English"),
    "batch_of_facts.py": (["12"], "memit on almanac, batch=12"),
    "year_of_corrections.py": (["3"], "3 corrections carried, 3 files in corrections"),
    "train_mend.py": (["2"], "the best of 2 looks at the validation part is in mend.safetensors"),
    "serve_the_result.py": ([], "The mother tongue of Danielle Darrieux is English"),
}
"""What each is started with here, and a line it prints."""


def test_every_example_is_run_here():
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str, tmp_path: Path):
    args, wanted = SAYS[name]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    src = str(EXAMPLES.parent / "src")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        cwd=tmp_path,
        env=env | {"PYTHONPATH": src},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout
