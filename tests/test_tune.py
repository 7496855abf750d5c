"""Tuning: the best candidate is found on some facts, must beat the default on others, and is what presets then use."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import errata
from errata import LM, Case, Edit, Method, UsageError, presets
from errata.cli import main
from errata.errors import ErrataError
from errata.store import Store
from errata.tune import LEAST, tune
from tests import tiny

FACTS = [Case(i, Edit(tiny.PROMPT, subject, "Lima")) for i, subject in enumerate(tiny.CAPITALS)]
Objective = Callable[[Method, Case], float]


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_STORE", str(tmp_path))


@pytest.fixture
def asked() -> list[tuple[Method, list[int | str]]]:
    """Which method was measured on which facts, in order."""
    return []


def by(monkeypatch: pytest.MonkeyPatch, asked: list[tuple[Method, list[int | str]]], objective: Objective) -> None:
    def measured(method: Method, lm: LM, cases: Sequence[Case]) -> list[float]:
        asked.append((method, [c.id for c in cases]))
        return [objective(method, c) for c in cases]

    monkeypatch.setattr("errata.tune._objective", measured)


def llama(seed: int = 0) -> LM:
    torch.manual_seed(seed)
    return tiny.lm("llama")


def preset(method: type[Method], lm: LM) -> Method:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.preset(lm)


def test_the_best_strength_is_found_and_every_later_preset_of_this_model_has_it(monkeypatch, asked):
    lm = llama()
    default = preset(errata.ROME, lm)
    by(monkeypatch, asked, lambda m, c: float(m.clamp == 2 * default.clamp) + 0.1 * (m.layer == default.layer))

    found = tune(errata.ROME, lm, FACTS)

    assert found.settings == {"clamp": 2 * default.clamp}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a model that was tuned is no longer warned of
        assert errata.ROME.preset(lm).clamp == 2 * default.clamp
        assert errata.ROME.preset(lm, clamp=7.0).clamp == 7.0
    assert preset(errata.RROME, lm).clamp == default.clamp  # another method's is its own
    assert preset(errata.ROME, tiny.lm("gpt2")).clamp == default.clamp


def test_the_default_stays_where_nothing_beats_it_on_held_out_facts(monkeypatch, asked):
    lm = llama()
    default = preset(errata.ROME, lm)
    half = len(FACTS) // 2

    def objective(method: Method, case: Case) -> float:
        return float((method.clamp == default.clamp) == (int(case.id) >= half))

    by(monkeypatch, asked, objective)

    assert tune(errata.ROME, lm, FACTS).settings == {}
    assert preset(errata.ROME, lm) == default


def test_no_round_sees_a_held_out_fact(monkeypatch, asked):
    by(monkeypatch, asked, lambda m, c: float(m.layer))
    tune(errata.ROME, llama(), FACTS)
    held = {c.id for c in FACTS[len(FACTS) // 2 :]}
    rounds, last = asked[:-2], asked[-2:]
    assert rounds
    assert all(held.isdisjoint(ids) for _, ids in rounds)
    assert all(set(ids) == held for _, ids in last)


def test_later_rounds_try_fewer_candidates_on_more_facts(monkeypatch, asked):
    by(monkeypatch, asked, lambda m, c: float(m.layer))
    found = tune(errata.ROME, llama(), FACTS)
    facts = [c["facts"] for c in found.evidence["candidates"]]
    assert facts == sorted(facts, reverse=True)
    assert 1 < facts.count(max(facts)) <= len(facts) // 2


def test_a_search_that_was_interrupted_measures_nothing_twice(monkeypatch, asked):
    lm = llama()

    def interrupted(method: Method, case: Case) -> float:
        if len(asked) > 4:
            raise KeyboardInterrupt
        return float(method.layer)

    by(monkeypatch, asked, interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(errata.ROME, lm, FACTS)
    before = [json.dumps([str(m), ids]) for m, ids in asked[:4]]
    (journal,) = (Store().folder / "tuning").iterdir()
    with journal.open("a") as file:
        file.write('\n{"key": {"settin')  # the process was killed while it wrote
    asked.clear()
    by(monkeypatch, asked, lambda m, c: float(m.layer))
    found = tune(errata.ROME, lm, FACTS)
    after = [json.dumps([str(m), ids]) for m, ids in asked]
    assert set(before).isdisjoint(after)

    monkeypatch.setenv("ERRATA_STORE", str(Store().folder / "another"))
    assert tune(errata.ROME, lm, FACTS).evidence["candidates"] == found.evidence["candidates"]


def test_a_spent_budget_ends_the_search_but_not_the_comparison(monkeypatch, asked):
    clock = iter(range(1000))
    monkeypatch.setattr("errata.tune.time.monotonic", lambda: float(next(clock)))
    by(monkeypatch, asked, lambda m, c: float(m.layer))
    found = tune(errata.ROME, llama(), FACTS, budget=4.0)
    assert [c["facts"] for c in found.evidence["candidates"]] == [3, 3, 3, 3, 3]
    assert set(found.evidence["score on the held-out facts"]) == {"default", "tuned"}


def test_without_a_budget_the_default_stays(monkeypatch, asked):
    by(monkeypatch, asked, lambda m, c: float(m.layer))
    assert tune(errata.ROME, llama(), FACTS, budget=0.0).settings == {}


def test_the_shell_tunes_on_facts_the_model_knows_and_says_what_came_of_it(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["tune", "almanac", "--method", "ultraedit", "--n", "8", "--budget", "0.05", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    (one,) = found["methods"]
    assert found["facts"] == 8
    scores = one["evidence"]["score on the held-out facts"]
    assert scores["tuned"] >= 0.5  # almanac was tuned: its default edits
    assert presets.tuning("ultraedit", errata.load("almanac"))["settings"] == one["settings"]


def test_too_few_facts_are_refused(monkeypatch, asked):
    by(monkeypatch, asked, lambda m, c: 1.0)
    with pytest.raises(UsageError, match=f"knows {LEAST - 1} of the facts"):
        tune(errata.ROME, llama(), FACTS[: LEAST - 1])
    assert not asked


def test_a_method_without_a_grid_is_refused():
    with pytest.raises(UsageError, match="ike has nothing to tune"):
        tune(errata.IKE, llama(), FACTS)


def test_a_damaged_file_of_settings_is_named(monkeypatch, asked):
    lm = llama()
    by(monkeypatch, asked, lambda m, c: 1.0)
    tune(errata.ROME, lm, FACTS)
    (path,) = (Store().folder / "presets").iterdir()
    path.write_text("{")
    with pytest.raises(ErrataError, match=r"damaged .* delete it"):
        errata.ROME.preset(lm)


@pytest.mark.parametrize("method", sorted(presets._tables()["tune"]))
def test_every_candidate_of_every_method_is_one_the_method_takes(method, monkeypatch, asked):
    lm = llama()
    by(monkeypatch, asked, lambda m, c: 1.0)
    found = tune(errata.methods()[method], lm, FACTS)
    tried = [c["settings"] for c in found.evidence["candidates"]]
    assert len(tried) > 2
    assert {} in tried
    assert len({json.dumps(s, sort_keys=True) for s in tried}) == len(tried)
