"""The regimes: what is edited from where, when it is asked, and what becomes of what can't be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata import FTM, GRACE, LM, RROME, Case, Edit, ErrataError, Method, Patch, Probe, UsageError
from errata import ask as answers
from errata.ask import Answer, Spoken, ask
from errata.bench import Report, metrics, run
from errata.changes import LowRank
from tests import tiny

running = sys.modules["errata.bench.run"]  # the module; the package has the function by that name
UNWRITABLE = "Ω"
"""Not a letter of the tiny llama's vocabulary."""


def rome(**settings: Any) -> RROME:
    return RROME(layer=1, steps=12, lengths=((3, 2),), whiten=False, **settings)


@dataclass(frozen=True, kw_only=True)
class Says(Method):
    """Adds to one matrix what each edit hashes to, at once; a target `bad` can't be made."""

    paper = "none"
    source = "none"
    batched = True
    most: int = 99
    """More edits than this at once fail."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        if any(e.target == "bad" for e in edits) or len(edits) > self.most:
            raise ErrataError(f"{len(edits)} edits with {edits[0].target}")
        site = lm.mlp_out(1)
        draws = [torch.Generator().manual_seed(sum(e.text.encode())) for e in edits]
        left, right = ([torch.randn(d, generator=g) / d**0.5 for g in draws] for d in site.shape)
        return Patch({site.name: (LowRank(torch.arange(len(edits)), torch.stack(left, 1), torch.stack(right)),)})


class SaysOne(Says):
    name = "says-one"
    batched = False


Says.name = "says"


def said(report: Report) -> list[Any]:
    """What a report's rows say, but for log-probabilities, whose last bits hang on the batch."""
    return _without("logprob", report.to_dict()["rows"])


def _without(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(name, v) for k, v in value.items() if k != name}
    return [_without(name, v) for v in value] if isinstance(value, list) else value


def logprobs(report: Report) -> list[float]:
    asked = [p["after"][k] for r in report.rows for p in r["probes"] for k in ("answer", "other")]
    return [a["logprob"] for a in asked if a]


def answered(lm: LM, case: Case, patch: Patch) -> list[dict[str, Any]]:
    with patch.applied(lm):
        return [a.to_dict() for a in ask(lm, case.probes)]


def same_answers(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    return _without("logprob", found) == _without("logprob", wanted)


def after(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [p["after"] for p in row["probes"]]


# Single


def test_many_edited_models_in_one_pass_answer_as_each_does_alone(lm: LM, cases: list[Case]):
    method = rome()
    report = run(method, lm, cases)
    for case, row in zip(cases, report.rows, strict=True):
        assert same_answers(after(row), answered(lm, case, method.edit(lm, [case.edit])))
    assert len({row["after"] for row in report.rows}) > 3  # the models do differ


def test_row_by_row_and_one_by_one_give_the_same_report(lm: LM, cases: list[Case], monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(answers, "applied_by_row", _spying(answers.applied_by_row, calls))
    together = run(rome(), lm, cases)
    assert calls, "the rows were not shared"
    monkeypatch.setattr(running, "_exact_by_row", lambda _lm: False)
    calls.clear()
    alone = run(rome(), lm, cases)
    assert not calls
    assert said(together) == said(alone)
    assert together.summary == alone.summary
    assert logprobs(together) == pytest.approx(logprobs(alone), abs=1e-3)


def _spying(fn: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    return lambda *args: [calls.append(args), fn(*args)][1]


def test_half_precision_weights_round_a_patch_so_it_is_not_put_beside_them(
    cases: list[Case], monkeypatch: pytest.MonkeyPatch
):
    lm = tiny.trained("llama")
    lm.model.to(torch.bfloat16)
    calls = []
    monkeypatch.setattr(answers, "applied_by_row", _spying(answers.applied_by_row, calls))
    assert run(Says(), lm, cases[:3]).about["model"]["dtype"] == "bfloat16"
    assert not calls


def test_every_single_edit_is_made_from_the_unedited_model(gpt2: LM, cases: list[Case]):
    method = Says()
    report = run(method, gpt2, cases)
    for case, row in zip(cases, report.rows, strict=True):
        assert same_answers(after(row), answered(gpt2, case, method.edit(gpt2, [case.edit])))
    assert said(run(method, gpt2, cases[::-1])) == said(report)[::-1]


@pytest.mark.parametrize("method", [FTM(layers=(2,), steps=8, rate=5e-3), GRACE(at=2, steps=8)])
def test_patches_that_are_no_rows_are_applied_each(method: Method, gpt2: LM, cases: list[Case]):
    report = run(method, gpt2, cases[:4])
    for case, row in zip(cases, report.rows, strict=False):
        assert same_answers(after(row), answered(gpt2, case, method.edit(gpt2, [case.edit])))


def test_how_many_are_held_at_a_time_changes_nothing(gpt2: LM, cases: list[Case], monkeypatch: pytest.MonkeyPatch):
    report = run(Says(), gpt2, cases)
    monkeypatch.setattr(running, "TOGETHER", 3)
    monkeypatch.setattr(answers, "TOKENS", 64)
    assert said(run(Says(), gpt2, cases)) == said(report)


# Batch


def test_a_batch_is_made_at_once_and_goes_back_before_the_next(gpt2: LM, cases: list[Case]):
    method = Says()
    report = run(method, gpt2, cases, batch=3)
    groups = [cases[:3], cases[3:6], cases[6:]]
    patches = [method.edit(gpt2, [c.edit for c in g]) for g in groups for _ in g]
    for case, row, patch in zip(cases, report.rows, patches, strict=True):
        assert same_answers(after(row), answered(gpt2, case, patch))
    assert [report.about[k] for k in ("regime", "batch", "evaluated")] == ["batch=3", 3, "after each batch"]


def test_a_method_that_makes_one_edit_at_a_time_folds_a_batch(gpt2: LM, cases: list[Case]):
    method = SaysOne()
    report = run(method, gpt2, cases[:4], batch=2)
    *_, patch = errata.sequential(method, gpt2, [[c.edit] for c in cases[2:4]])
    assert same_answers(after(report.rows[2]), answered(gpt2, cases[2], patch))
    assert report.about["batched"] is False


# Sequential


def test_a_sequence_is_asked_after_all_edits(gpt2: LM, cases: list[Case]):
    method = Says()
    report = run(method, gpt2, cases, batch=3, keep=True)
    *_, patch = errata.sequential(method, gpt2, [[c.edit for c in g] for g in (cases[:3], cases[3:6], cases[6:])])
    for case, row in zip(cases, report.rows, strict=True):
        assert same_answers(after(row), answered(gpt2, case, patch))
    assert [report.about[k] for k in ("regime", "batch", "evaluated")] == ["sequential", 3, "after all edits"]
    assert {row["regime"] for row in report.rows} == {"sequential"}


def test_a_later_edit_of_the_same_fact_shows_in_a_sequence_and_only_there(gpt2: LM):
    first, later = (
        Case(
            i, Edit(tiny.PROMPT, "Peru", target, "Lima"), (Probe("neighbourhood", "The capital of Cuba is", "Havana"),)
        )
        for i, target in enumerate(("Oslo", "Rome"))
    )
    method = FTM(layers=(2,), steps=40, rate=5e-3)
    alone, kept = run(method, gpt2, [first, later]), run(method, gpt2, [first, later], keep=True)
    assert [r["metrics"]["reliability"]["forced"] for r in alone.rows] == [1.0, 1.0]
    assert [r["metrics"]["reliability"]["forced"] for r in kept.rows] == [0.0, 1.0]


FT, BOOK = FTM(layers=(2,), steps=6, rate=5e-3), GRACE(at=2, steps=6)


@pytest.mark.parametrize(
    ("method", "batch", "stopped_after"),
    [(rome(), 1, 4), (rome(), 3, 4), (FT, 1, 4), (FT, 3, 3), (BOOK, 1, 4), (BOOK, 3, 3)],
)
def test_a_sequence_that_stopped_goes_on_from_disk_to_the_same_report(
    method: Method, batch: int, stopped_after: int, gpt2: LM, cases: list[Case], tmp_path: Path
):
    cases = cases[:7]
    edits = [c.edit for c in cases]
    size = batch if method.batched else 1
    *_, half = errata.sequential(method, gpt2, [edits[i : i + size] for i in range(0, stopped_after, size)])
    half.save(tmp_path / "half.safetensors")
    whole = run(method, gpt2, cases, batch=batch, keep=True)
    resumed = run(method, gpt2, cases, batch=batch, keep=True, prior=Patch.load(tmp_path / "half.safetensors"))
    assert resumed.to_dict()["rows"] == whole.to_dict()["rows"]  # same bits: log-probabilities are compared with ==


def test_edits_already_made_are_not_made_again(gpt2: LM, cases: list[Case], monkeypatch: pytest.MonkeyPatch):
    method, made = Says(), []
    patch = method.edit(gpt2, [c.edit for c in cases])
    monkeypatch.setattr(Says, "patch", lambda *args: made.append(args))
    report = run(method, gpt2, cases, keep=True, prior=patch)
    assert made == []
    assert same_answers(after(report.rows[0]), answered(gpt2, cases[0], patch))


# What can't be done


REGIMES = [{}, {"batch": 3}, {"batch": 99}, {"keep": True}, {"keep": True, "batch": 3}]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("method", [Says(), SaysOne()])
def test_an_edit_that_fails_is_a_row_and_changes_no_other(method: Method, regime: Any, gpt2: LM, cases: list[Case]):
    some = cases[:5]
    bad = Case("bad", replace(some[0].edit, target="bad"), some[0].probes)
    if regime.get("batch", 1) == 3:  # with and without it, the others must meet the same companions
        report, without = run(method, gpt2, [*some[:2], bad, *some[2:]], **regime), None
    else:
        report, without = run(method, gpt2, [*some[:2], bad, *some[2:]], **regime), run(method, gpt2, some, **regime)
    row = report.rows.pop(2)
    assert row["case_id"] == "bad"
    assert "edits with" in row["error"]
    assert row["metrics"]["reliability"] == row["metrics"]["generalization"] == dict.fromkeys(metrics.PROTOCOLS, 0.0)
    assert row["metrics"]["locality"] == dict.fromkeys(metrics.PROTOCOLS)
    assert row["before"] == report.rows[0]["before"]
    assert row["after"] is None
    assert (report.about["n"], report.about["failed"]) == (6, 1)
    assert report.summary["reliability"]["forced"]["n"] == 6
    assert report.summary["locality"]["forced"]["n"] == 5
    assert "1 edits could not be made" in str(report)
    assert [r["error"] for r in report.rows] == [None] * 5
    if without is not None:
        assert said(report) == said(without)


def test_a_target_that_the_model_can_not_write_is_such_an_edit(cases: list[Case]):
    lm = tiny.trained("llama")
    odd = Case("odd", Edit(tiny.PROMPT, "France", UNWRITABLE, "Paris"), cases[0].probes)
    report = run(rome(), lm, [cases[1], odd, cases[2]])
    assert [r["error"] is None for r in report.rows] == [True, False, True]
    assert UNWRITABLE in report.rows[1]["error"]


def test_edits_that_only_fail_together_are_rows_too(gpt2: LM, cases: list[Case]):
    report = run(Says(most=1), gpt2, cases[:3], batch=2)
    assert [r["error"] for r in report.rows[:2]] == [f"2 edits with {cases[0].edit.target}"] * 2
    assert report.rows[2]["error"] is None


@pytest.mark.parametrize("regime", REGIMES)
def test_where_every_edit_fails_the_reason_is_the_answer(regime: Any, gpt2: LM, cases: list[Case]):
    bad = [replace(c, edit=replace(c.edit, target="bad")) for c in cases[:3]]
    with pytest.raises(ErrataError, match="edits with bad"):
        run(Says(), gpt2, bad, **regime)


def test_a_probe_that_can_not_be_asked_is_left_out_and_counted(gpt2: LM, cases: list[Case]):
    long = Probe("paraphrase", "It is known. " * 60, "Rome", "Paris")
    case = Case(0, cases[0].edit, (*cases[0].probes, long))
    report, without = run(Says(), gpt2, [case]), run(Says(), gpt2, cases[:1])
    assert report.rows[0]["metrics"] == without.rows[0]["metrics"]
    assert report.about["unasked"] == 1
    assert "tokens" in report.rows[0]["probes"][-1]["after"]["unasked"]["answer"]
    assert "1 probes could not be asked" in str(report)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cases": []}, "no cases"),
        ({"batch": 0}, "a batch of 0"),
        ({"prior": Patch()}, "keep=True"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Any, said: str, gpt2: LM, cases: list[Case]):
    with pytest.raises(UsageError, match=said):
        run(Says(), gpt2, **{"cases": cases, **wrong})


def test_a_patched_model_is_refused(gpt2: LM, cases: list[Case]):
    patch = Says().edit(gpt2, [cases[0].edit])
    with patch.applied(gpt2), pytest.raises(UsageError, match="has a patch applied"):
        run(Says(), gpt2, cases)


# What is left behind


@pytest.mark.parametrize("regime", [{}, {"batch": 2}, {"keep": True}])
@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_comes_back_to_the_bit(regime: Any, interrupted: bool, gpt2: LM, cases: list[Case]):
    def stop(done: int, _total: int) -> None:
        if interrupted and done >= 2:
            raise KeyboardInterrupt

    before = tiny.state(gpt2.model)
    try:
        run(rome(), gpt2, cases[:4], progress=stop, **regime)
    except KeyboardInterrupt:
        assert interrupted
    assert tiny.differences(before, tiny.state(gpt2.model)) == []


def test_progress_counts_to_the_end(gpt2: LM, cases: list[Case]):
    told: list[tuple[int, int]] = []
    run(Says(), gpt2, cases[:7], batch=3, progress=lambda *done: told.append(done))
    assert told == [(3, 7), (6, 7), (7, 7)]


def test_the_unedited_model_is_asked_once_for_several_methods(cases: list[Case], monkeypatch: pytest.MonkeyPatch):
    lm, asked = tiny.trained("gpt2"), []

    def spy(lm: LM, groups: Any, patches: Any = None, asking: Any = None) -> Any:
        asked.append(bool(patches) or bool(lm.patched))
        return answers.ask_cases(lm, groups, patches, asking)

    monkeypatch.setattr(running, "ask_cases", spy)
    one = run(Says(), lm, cases)
    two = run(SaysOne(), lm, cases)
    assert asked.count(False) == 1
    assert [r["before"] for r in one.rows] == [r["before"] for r in two.rows]
    run(Says(), lm, cases[:2])
    assert asked.count(False) == 2  # other cases are asked anew


# The numbers themselves, end to end


def test_scores_are_those_of_a_second_implementation(lm: LM, cases: list[Case]):
    """Plain passes over one text at a time, on the patched model, without errata's answers and metrics."""
    method = FTM(layers=(1, 2), steps=4, rate=3e-3)
    report = run(method, lm, cases)
    for case, row in zip(cases, report.rows, strict=False):
        old = {p: _argmax(lm, p.prompt, p.answer) for p in case.probes}
        with method.edit(lm, [case.edit]).applied(lm):
            by_hand = _by_hand(lm, case, old)
        for metric, protocols in by_hand.items():
            for protocol, value in protocols.items():
                assert row["metrics"][metric][protocol] == pytest.approx(value), (metric, protocol)
    seen = {v for r in report.rows for p in r["probes"] for v in p["scores"].values()}
    assert {0.0, 0.5, 1.0} <= seen  # or the wrong numbers could agree


def _by_hand(lm: LM, case: Case, old: dict[Probe, list[int]]) -> dict[str, dict[str, float]]:
    parts = {"reliability": case.probes[:1], "generalization": case.probes[1:3], "locality": case.probes[3:5]}
    out = {}
    for metric, probes in parts.items():
        forced, compare = [], []
        for p in probes:
            said = _argmax(lm, p.prompt, p.answer)
            wanted = old[p] if metric == "locality" else _ids(lm, p.prompt, p.answer)[1]
            forced.append(sum(a == b for a, b in zip(said, wanted, strict=True)) / len(said))
            compare.append(_logprob(lm, p.prompt, p.answer) > _logprob(lm, p.prompt, p.other))
        out[metric] = {"forced": sum(forced) / len(forced), "compare": sum(compare) / len(compare)}
    return out


def _ids(lm: LM, prompt: str, answer: str | None) -> tuple[list[int], list[int]]:
    whole = lm.tokenizer(f"{prompt} {answer}")["input_ids"]
    return whole, whole[len(lm.tokenizer(prompt)["input_ids"]) :]


def _argmax(lm: LM, prompt: str, answer: str) -> list[int]:
    whole, wanted = _ids(lm, prompt, answer)
    with torch.no_grad():
        return lm.model(torch.tensor([whole])).logits[0, -len(wanted) - 1 : -1].argmax(-1).tolist()


def _logprob(lm: LM, prompt: str, answer: str | None) -> float:
    whole, wanted = _ids(lm, prompt, answer)
    with torch.no_grad():
        said = lm.model(torch.tensor([whole])).logits[0, -len(wanted) - 1 : -1].log_softmax(-1)
    return said.gather(1, torch.tensor(wanted)[:, None]).mean().item()


def test_a_planted_change_after_the_edit_shows_in_the_rows(
    gpt2: LM, cases: list[Case], monkeypatch: pytest.MonkeyPatch
):
    """One neighbour of one case answers otherwise after the edit: that row's locality falls by half, no other's."""
    kept, count = Answer(Spoken((1,), (1,), -1.0), Spoken((2,), (1,), -2.0), "as before"), 0

    def planted(
        _lm: LM, groups: Sequence[Sequence[Probe]], patches: Any = None, asking: Any = None
    ) -> list[list[Answer]]:
        nonlocal count
        out = [[kept for _ in g] for g in groups]
        count += len(groups) if patches else 0
        if patches and count == 1:
            near = next(i for i, p in enumerate(groups[0]) if p.kind == "neighbourhood")
            out[0][near] = Answer(Spoken((1,), (7,), -3.0), Spoken((2,), (7,), -2.0), "otherwise")
        return out

    monkeypatch.setattr(running, "ask_cases", planted)
    report = run(Says(), replace(gpt2, memo={}), cases[:3])
    assert [list(r["metrics"]["locality"].values()) for r in report.rows] == [[0.5] * 3, [1.0] * 3, [1.0] * 3]
    assert report.summary["locality"]["generated"]["mean"] == pytest.approx(2.5 / 3)
