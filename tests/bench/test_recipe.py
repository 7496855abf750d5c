from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errata import LM, Case, UsageError
from errata.bench import run_grid
from errata.bench.recipe import recipe, recipes

pytestmark = pytest.mark.filterwarnings("ignore:.*has no published settings")


def test_easyedits_table_is_as_published():
    found = recipe("easyedit-zsre")
    assert found.columns == ("reliability", "generalization", "locality", "portability")
    assert found.published["rome"] == [92.45, 87.04, 99.63, 57.47]
    assert found.published["memit"] == [92.94, 85.97, 99.49, 60.64]
    assert found.published["kn"] == [28.95, 28.43, 65.43, 37.18]
    assert list(found.published) == ["rome", "memit", "mend", "ike", "serac", "ft-l", "kn"]


def test_memits_and_alphaedits_tables_are_as_published():
    assert recipe("memit-10000").published["memit"] == [98.9, 88.6, 73.7]
    assert recipe("alphaedit-2000").published["memit"] == [65.65, 64.65, 51.56]
    wanted = {"": [98.90, 94.22, 67.88], "-gpt-j": [99.75, 96.38, 75.48], "-gpt2-xl": [99.50, 93.95, 66.39]}
    assert {end: recipe(f"alphaedit-2000{end}").published["alphaedit"] for end in wanted} == wanted


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_run_and_names_its_source(name: str):
    found = recipe(name)
    plan = found.plan()
    assert plan.regime == (found.regime,)
    assert set(plan.method) <= set(found.published)
    assert found.source.count("https://arxiv.org/abs/") == 1
    assert found.protocol in ("forced", "compare", "generated")
    assert all(len(row) == len(found.columns) for row in found.published.values())
    assert all(0 <= value <= 100 for row in found.published.values() for value in row)


def test_what_is_given_goes_before_the_recipe():
    plan = recipe("alphaedit-2000").plan(n=5, model="almanac")
    assert (plan.n, plan.model, plan.batch, plan.regime) == (5, "almanac", 100, ("sequential",))


def test_published_and_ours_stand_beside_each_other(gpt2: LM, cases: list[Case]):
    found = replace(
        recipe("easyedit-zsre"), published={"ft-m": [10.0, 20.0, 30.0, 40.0], "serac": [1.0, 2.0, 3.0, 4.0]}
    )
    plan = found.plan(method={"ft-m": {"layers": [2], "steps": 4, "rate": 5e-3}})
    results = run_grid(plan, gpt2, cases[:3])
    rows = found.rows(results)
    assert [(r["method"], r["metric"], r["published"]) for r in rows[:2]] == [
        ("ft-m", "reliability", 10.0),
        ("ft-m", "generalization", 20.0),
    ]
    assert rows[0]["ours"]["mean"] == 100 * results.reports[0].summary["reliability"]["forced"]["mean"]
    assert [r["ours"] for r in rows[4:]] == [None] * 4
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.table(results))
    text = console.export_text()
    for word in ("published", "10.00", "forced", "another model", "not run: serac"):
        assert word in text


def test_a_recipe_that_is_not_known_is_said():
    with pytest.raises(UsageError, match="did you mean 'easyedit-zsre'"):
        recipe("easyedit-zrse")


def test_the_shell_runs_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    from errata.cli import app, shell

    def sh(*args: Any) -> tuple[int, str, str]:
        code = shell.run(app, [str(a) for a in args])
        return code, *capsys.readouterr()

    given = ["--model", "almanac", "--data", "counterfact-mini", "-n", "1", "--method", "ft-l", "--set", "steps=2"]
    code, out, err = sh("bench", "recipe", "easyedit-zsre", *given, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {"about", "summary", "rows", "recipe"} <= set(found)
    assert found["recipe"]["rows"][20]["method"] == "ft-l"
    assert found["recipe"]["rows"][20]["ours"]["n"] == 1
    assert sh("bench", "recipe")[0] == 2
    assert "easyedit-zsre" in sh("bench", "recipe")[2]
