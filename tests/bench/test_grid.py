from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import FTM, LM, Case, ErrataError, Method, UsageError
from errata import ask as asking
from errata.bench import Plan, Report, Results, compare, metrics, run, run_grid
from errata.bench.grid import check_made_with, made_with
from tests import tiny

running = sys.modules["errata.bench.run"]  # the package has a function of that name
pytestmark = pytest.mark.filterwarnings("ignore:.*has no published settings")
FT = {"layers": (2,), "steps": 4, "rate": 5e-3}
GRACE = {"at": 2, "steps": 4}


@pytest.fixture(scope="module")
def results(gpt2: LM, cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two methods in three regimes, five cases, with a folder."""
    folder = tmp_path_factory.mktemp("run")
    plan = Plan(method={"ft-m": FT, "grace": GRACE}, regime=("single", "batch", "sequential"), batch=3)
    found = run_grid(plan, gpt2, cases[:5], folder)
    found.write(folder)
    return found


def numbers(report: Report) -> Any:
    return [report.rows, report.summary]


def test_every_cell_is_what_a_run_by_itself_gives(results: Results, gpt2: LM, cases: list[Case]):
    method = FTM.preset(gpt2, **FT)
    regimes = {"single": {}, "batch=3": {"batch": 3}, "sequential": {"batch": 3, "keep": True}}
    for report in results.reports[:3]:
        alone = run(method, gpt2, cases[:5], **regimes[report.about["regime"]])
        assert numbers(report) == numbers(alone)
    cells = [(r.about["method"], r.about["regime"]) for r in results.reports]
    assert cells == [(m, r) for m in ("ft-m", "grace") for r in regimes]


def test_the_unedited_model_is_asked_once_for_all_cells(cases: list[Case], monkeypatch: pytest.MonkeyPatch):
    lm, asked = tiny.trained("gpt2"), []
    ask = running.ask_cases

    def spy(lm: LM, groups: Any, patches: Any = None, asking: Any = None) -> Any:
        asked.append(bool(patches) or bool(lm.patched))
        return ask(lm, groups, patches, asking)

    monkeypatch.setattr(running, "ask_cases", spy)
    run_grid(Plan(method={"ft-m": FT, "grace": GRACE}, regime=("batch", "sequential")), lm, cases[:2])
    assert asked.count(False) == 1
    assert asked.count(True) >= 4


def test_the_retention_is_what_shorter_sequences_give(gpt2: LM, cases: list[Case]):
    method = FTM(**FT)
    whole = run(method, gpt2, cases[:5], keep=True, checkpoints=(1, 3, 10))
    assert [one["after"] for one in whole.about["retention"]] == [1, 3, 5]
    for one in whole.about["retention"]:
        short = run(method, gpt2, cases[: one["after"]], keep=True)
        for metric, protocols in short.summary.items():
            for protocol, found in protocols.items():
                assert one["summary"][metric][protocol]["mean"] == pytest.approx(found["mean"])


class Greedy(FTM, name="greedy-for-memory"):
    """Runs out of memory at more than two edits."""

    def patch(self, lm: LM, edits: Sequence[Any], prior: Any) -> Any:
        if len(edits) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().patch(lm, edits, prior)


Method.registry.pop("greedy-for-memory")  # other tests go over all methods


@pytest.fixture(autouse=True)
def _registered():
    Method.registry["greedy-for-memory"] = Greedy
    yield
    Method.registry.pop("greedy-for-memory", None)


@pytest.mark.parametrize("keep", [False, True])
def test_a_batch_is_halved_until_it_fits_and_all_of_it_is_of_one_size(
    keep: bool, gpt2: LM, cases: list[Case], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        found = run(Greedy(**FT), gpt2, cases[:5], batch=5, keep=keep)
    fitting = run(FTM(**FT), gpt2, cases[:5], batch=2, keep=keep)
    assert found.about["batch"] == 2
    assert found.summary == fitting.summary
    assert "memory ran out" in caplog.text


def test_running_out_of_memory_with_one_edit_is_an_error(gpt2: LM, cases: list[Case], monkeypatch: pytest.MonkeyPatch):
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Greedy, "patch", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        run(Greedy(**FT), gpt2, cases[:2], batch=2)


def test_a_question_is_asked_in_halves_where_memory_runs_out(
    gpt2: LM, cases: list[Case], monkeypatch: pytest.MonkeyPatch
):
    plain, read, sizes = asking.ask(gpt2, cases[0].probes), asking.read, []

    def small(lm: LM, prompts: Any, edited: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(lm, prompts, edited)

    monkeypatch.setattr(asking, "read", small)
    again = asking.ask(gpt2, cases[0].probes)
    assert max(sizes) > 2
    assert [a.text for a in again] == [a.text for a in plain]
    assert [a.answer.argmax for a in again if a.answer] == [a.answer.argmax for a in plain if a.answer]


def test_a_method_that_makes_one_edit_at_a_time_has_no_batch_beside_its_sequence(gpt2: LM, cases: list[Case]):
    class One(FTM, name="one-at-a-time"):
        batched = False

    try:
        plan = Plan(method={"one-at-a-time": FT}, regime=("batch", "sequential"))
        found = run_grid(plan, gpt2, cases[:2])
        assert [r.about["regime"] for r in found.reports] == ["sequential"]
        assert "one edit at a time" in found.about["left_out"][0]["error"]
        folded = run_grid(replace(plan, regime=("batch",)), gpt2, cases[:2])
        assert [r.about["regime"] for r in folded.reports] == ["batch=2"]
    finally:
        Method.registry.pop("one-at-a-time", None)


def test_a_cell_that_fails_costs_no_other(gpt2: LM, cases: list[Case], monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> None:
        raise ErrataError("it can't be done")

    monkeypatch.setattr(Greedy, "patch", fails)
    found = run_grid(Plan(method={"greedy-for-memory": FT, "ft-m": FT}), gpt2, cases[:2])
    assert [r.about["method"] for r in found.reports] == ["ft-m"]
    assert found.about["left_out"] == [{"method": "greedy-for-memory", "regime": "single", "error": "it can't be done"}]
    with pytest.raises(ErrataError, match="greedy-for-memory, single: it can't be done"):
        run_grid(Plan(method={"greedy-for-memory": FT}), gpt2, cases[:2])


def test_a_cell_that_failed_is_tried_again_also_with_other_settings(
    gpt2: LM, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any) -> None:
        raise ErrataError("it can't be done")

    plan, rest = Plan(method={"greedy-for-memory": FT, "ft-m": FT}), {"ft-m": FT}
    with monkeypatch.context() as broken:
        broken.setattr(Greedy, "patch", fails)
        assert len(run_grid(plan, gpt2, cases[:2], tmp_path).reports) == 1
    changed = replace(plan, method={"greedy-for-memory": {**FT, "steps": 5}, **rest})
    monkeypatch.setattr(FTM, "patch", lambda *_: pytest.fail("edited again"))
    monkeypatch.setattr(Greedy, "patch", lambda self, *args: FT_PATCH(self, *args))
    found = run_grid(changed, gpt2, cases[:2], tmp_path)
    assert {r.about["method"]: r.about["settings"]["steps"] for r in found.reports} == {
        "greedy-for-memory": 5,
        "ft-m": 4,
    }
    assert found.about["left_out"] == []


FT_PATCH = FTM.patch


@pytest.mark.parametrize("regime", ["single", "batch", "sequential"])
def test_a_method_without_its_editor_says_so_once(regime: str, gpt2: LM, cases: list[Case], tmp_path: Path):
    plan = Plan(method={"mend": {"at": [1]}, "ft-m": FT}, regime=(regime,), batch=2 if regime != "single" else None)
    found = run_grid(plan, gpt2, cases[:4], tmp_path)
    (one,) = found.about["left_out"]
    assert "mend needs an editor" in one["error"]
    assert "needs an editor" not in (tmp_path / "journal.jsonl").read_text()


def test_a_method_is_run_again_and_the_others_stay(
    gpt2: LM, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = Plan(method={"ft-m": FT, "grace": GRACE}, regime=("single", "sequential"))
    run_grid(plan, gpt2, cases[:2], tmp_path)
    changed = Plan(method={"ft-m": {**FT, "steps": 5}}, regime=("single",))
    wanted = run_grid(replace(plan, method={**plan.method, **changed.method}), gpt2, cases[:2])
    monkeypatch.setattr("errata.methods.GRACE.patch", lambda *_: pytest.fail("edited again"))
    found = run_grid(changed, gpt2, cases[:2], tmp_path, again=["ft-m"])
    assert [numbers(r) for r in found.reports] == [numbers(r) for r in wanted.reports]


# As files


def test_the_json_has_the_promised_shape(results: Results):
    found = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert set(found) == {"about", "summary", "rows", "retention"}
    assert len(found["rows"]) == 2 * 3 * 5
    for row in found["rows"]:
        assert {"case_id", "method", "regime", "metrics"} <= set(row)
        assert all(set(v) == {"forced", "compare", "generated"} for v in row["metrics"].values())
        assert row["regime"] in found["summary"][row["method"]]
    assert {"fingerprint", "name", "dtype"} <= set(found["about"]["model"])
    assert {"errata", "torch", "transformers"} <= set(found["about"]["versions"])
    assert [one["after"] for one in found["retention"]["ft-m"]] == [3, 5]


def test_results_come_back_from_their_file(results: Results, tmp_path: Path):
    results.save(tmp_path / "report.json")
    again = Results.load(tmp_path)
    assert again.to_dict() == results.to_dict()


def test_a_single_report_reads_as_results(gpt2: LM, cases: list[Case], tmp_path: Path):
    report = run(FTM(**FT), gpt2, cases[:2])
    report.save(tmp_path / "one.json")
    assert Results.load(tmp_path / "one.json").to_dict()["rows"] == report.to_dict()["rows"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"about": {"format": 2}}', '{"about": {"format": 99}}'])
def test_what_is_no_report_is_refused(content: str, tmp_path: Path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ErrataError, match="damaged|newer"):
        Results.load(tmp_path)


def test_a_run_goes_on_only_with_the_same_cases(gpt2: LM, cases: list[Case], tmp_path: Path):
    plan = Plan(method={"ft-m": FT})
    run_grid(plan, gpt2, cases[:2], tmp_path)
    with pytest.raises(UsageError, match="its data"):
        run_grid(plan, gpt2, cases[1:3], tmp_path)
    with pytest.raises(UsageError, match="its method ft-m is"):
        run_grid(replace(plan, method={"ft-m": {**FT, "steps": 5}}), gpt2, cases[:2], tmp_path)


def test_a_run_grows_by_methods_and_regimes(
    gpt2: LM, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted = run_grid(Plan(method={"ft-m": FT, "grace": GRACE}, regime=("single", "sequential")), gpt2, cases[:2])
    run_grid(Plan(method={"ft-m": FT}), gpt2, cases[:2], tmp_path)
    run_grid(Plan(method={"grace": GRACE}), gpt2, cases[:2], tmp_path)
    found = run_grid(Plan(method={"grace": GRACE}, regime=("sequential",)), gpt2, cases[:2], tmp_path)
    assert [numbers(r) for r in found.reports] == [numbers(r) for r in wanted.reports]
    monkeypatch.setattr(FTM, "patch", lambda *_: pytest.fail("edited again"))
    again, _ = Plan.load(tmp_path / "run.yaml")
    assert run_grid(again, gpt2, cases[:2], tmp_path).to_dict() == found.to_dict()


def test_what_is_done_is_not_done_again(gpt2: LM, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = Plan(method={"ft-m": FT}, regime=("single", "sequential"))
    first = run_grid(plan, gpt2, cases[:3], tmp_path)
    monkeypatch.setattr(FTM, "patch", lambda *_: pytest.fail("edited again"))
    gpt2.memo.pop("bench", None)
    monkeypatch.setattr(running, "ask_cases", lambda *_, **__: pytest.fail("asked again"))
    assert run_grid(plan, gpt2, cases[:3], tmp_path).to_dict() == first.to_dict()
    assert list((tmp_path / "state").iterdir()) == []


# The run file


def test_a_run_file_gives_the_run_again(gpt2: LM, cases: list[Case], tmp_path: Path):
    plan = Plan(method={"ft-m": FT, "grace": {}}, regime=("single", "sequential"), n=7, batch=2, seed=3)
    made = made_with(gpt2, cases)
    (tmp_path / "run.yaml").write_text(plan.to_yaml(made))
    again, said = Plan.load(tmp_path / "run.yaml")
    assert json.dumps(again.__dict__) == json.dumps(plan.__dict__)  # tuples are lists in YAML
    assert said == json.loads(json.dumps(made))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: [rome\n", "can't be read as a run"),
        ("- rome\n", "holds no run"),
        ("methods: [rome]\n", "did you mean 'method'"),
        ("regime: sequentiel\n", "did you mean 'sequential'"),
        ("n: 0\n", "n is 0"),
        ("bad: ignore\n", "known: fail, skip"),
        ("method: []\n", "names no method"),
    ],
)
def test_a_run_file_that_makes_no_sense_is_refused(text: str, said: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError, match=said):
        Plan.load(tmp_path / "run.yaml")


def test_a_difference_from_what_a_run_file_was_made_with_is_warned_of(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        check_made_with({"fingerprint": "a", "metrics": 1}, {"fingerprint": "b", "metrics": 1}, "run.yaml")
    assert "made with fingerprint a, this is b" in caplog.text
    assert "metrics" not in caplog.text


# Comparing


def test_a_report_does_not_differ_from_itself(results: Results):
    found = compare.compare(results, results)
    assert {d.run for d in found} == {f"{r.about['method']}, {r.about['regime']}" for r in results.reports}
    assert all(d.first == d.second and d.low is d.high is None and not d.clear for d in found)  # too few cases
    many = _planted(results, lambda i, score: score)
    same = [d for d in compare.compare(many, many) if d.metric == "locality"]
    assert same
    assert all(d.low == pytest.approx(-d.high) and not d.clear for d in same)


def test_the_interval_of_a_difference_is_of_paired_cases(results: Results):
    """Every case better by the same amount: the difference is clear, however much the cases differ."""
    better = _planted(results, lambda i, score: score)
    worse = _planted(results, lambda i, score: score - 0.25)
    found = [d for d in compare.compare(worse, better) if d.metric == "locality"]
    assert found
    others = 1 - 0.025 ** (1 / found[0].n)  # at most this share of all cases is not better by 0.25
    assert all(d.clear and d.low == pytest.approx(0.25 - 1.25 * others) for d in found)
    mixed = _planted(results, lambda i, score: score + (0.5 if i % 2 else -0.5))
    (first, *_) = [d for d in compare.compare(results_of(mixed), results_of(better)) if d.metric == "locality"]
    assert first.low < 0 < first.high


def results_of(results: Results) -> Results:
    return Results(results.about, results.reports)


def _planted(results: Results, change: Any) -> Results:
    def planted(i: int, row: dict[str, Any]) -> dict[str, Any]:
        near = {p: change(i, i / 10) for p in row["metrics"]["locality"]}
        return {**row, "metrics": {**row["metrics"], "locality": near}}

    reports = []
    for r in results.reports:
        rows = [{**row, "case_id": f"{row['case_id']}, {k}"} for k in range(10) for row in r.rows]
        reports.append(replace(r, rows=[planted(i, row) for i, row in enumerate(rows)]))
    return Results(results.about, tuple(reports))


def test_what_can_not_be_compared_is_refused(results: Results):
    one, two = (Results(results.about, results.reports[i : i + 2]) for i in (0, 3))
    with pytest.raises(UsageError, match="no run in common"):
        compare.compare(one, two)
    newer = replace(results.reports[0], about={**results.reports[0].about, "metrics": 99})
    with pytest.raises(UsageError, match=f"versions {metrics.VERSION} and 99"):
        compare.compare(results, Results(results.about, (newer,)))


# For people


def test_the_table_and_the_markdown_name_every_number(results: Results):
    from rich.console import Console

    from errata.bench import markdown

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results.table())
    for text in (console.export_text(), markdown.text(results)):
        for word in ("ft-m", "grace", "batch=3", "sequential", "forced", "compare", "generated", "reliability"):
            assert word in text
        found = results.reports[0].summary["locality"]["generated"]
        assert f"{found['mean']:.3f}" in text
