"""What the editors that ship with almanac promise, on real facts that they have not learned from."""

from __future__ import annotations

import pytest

import errata
from errata.bench.run import run
from errata.data import load


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "n", "batch", "reliable", "local"),
    [("mend", 200, 1, 0.9, 0.9), ("malmen", 500, 500, 0.85, 0.9)],
    ids=["mend single", "malmen 500 at once"],
)
def test_shipped_editors_make_their_edits_and_leave_neighbours_alone(name, n, batch, reliable, local):
    """The facts of part edit, one of each subject: counterfact-mini's first, then almanac-facts'."""
    lm, cases = errata.load("almanac"), {}
    for case in (*load("counterfact-mini"), *load("almanac-facts")):
        cases.setdefault(case.edit.subject, case)
    summary = run(errata.methods()[name].preset(lm), lm, list(cases.values())[:n], batch=batch).summary
    assert summary["reliability"]["forced"]["n"] == n
    assert summary["reliability"]["forced"]["mean"] >= reliable
    assert summary["locality"]["forced"]["mean"] >= local
