from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from errata import FTM, LM, Case, ErrataError, UsageError
from errata.bench import Report, metrics, run


@pytest.fixture(scope="module")
def report(gpt2: LM, cases: list[Case]) -> Report:
    return run(FTM(layers=(2,), steps=5, rate=4e-3), gpt2, cases[:5], batch=2, keep=True, seed=3)


def test_what_is_saved_is_what_is_loaded(report: Report, tmp_path: Path):
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again.to_dict() == report.to_dict()
    assert str(again) == str(report)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "report.json").read_bytes()


def test_a_report_says_how_its_numbers_were_obtained(report: Report, gpt2: LM):
    about = report.about
    assert about["method"] == "ft-m"
    assert about["settings"]["steps"] == 5
    assert (about["regime"], about["batch"], about["evaluated"]) == ("sequential", 2, "after all edits")
    assert (about["n"], about["seed"], about["metrics"]) == (5, 3, metrics.VERSION)
    assert about["model"] == {"name": "tiny-gpt2", "fingerprint": gpt2.fingerprint, "dtype": "float32"}
    assert {"errata", "torch", "transformers"} <= about["versions"].keys()
    assert about["efficiency"]["editing_per_edit"] == pytest.approx(about["efficiency"]["editing"] / 5)
    assert about["efficiency"]["evaluating"] > 0
    assert about["efficiency"]["processor"] > 0
    assert about["efficiency"]["bytes_per_edit"] == (4 * 128 * 128 + 8 * 5) / 5  # one delta, and whose it is


def test_every_row_has_its_case_method_regime_metrics_and_texts(report: Report, cases: list[Case]):
    for row, case in zip(report.rows, cases, strict=False):
        assert (row["case_id"], row["method"], row["regime"]) == (case.id, "ft-m", "sequential")
        assert row["edit"] == case.edit.to_dict()
        assert row["before"].startswith(case.edit.truth)
        assert row["after"] == row["probes"][0]["after"]["text"]
        assert set(row["metrics"]) == {"reliability", "generalization", "locality", "portability"}
        assert all(tuple(v) == metrics.PROTOCOLS for v in row["metrics"].values())


def test_the_summary_is_of_the_rows_and_a_saved_answer_can_be_scored_anew(report: Report):
    assert report.summary == metrics.summarise([r["metrics"] for r in report.rows], seed=3)
    for row in report.rows:
        for probe in row["probes"]:
            if probe["kind"] == "efficacy":
                ids, said = probe["after"]["answer"]["ids"], probe["after"]["answer"]["argmax"]
                share = sum(a == b for a, b in zip(ids, said, strict=True)) / len(ids)
                assert row["metrics"]["reliability"]["forced"] == probe["scores"]["forced"] == share


def test_the_table_names_metric_protocol_interval_and_regime(report: Report):
    text = str(report)
    for word in ("ft-m", "tiny-gpt2", "sequential", "batch=2", "after all edits", "95% interval", *metrics.PROTOCOLS):
        assert word in text
    found = report.summary["reliability"]["generated"]
    assert re.search(rf"{found['mean']:.3f} │ +too few cases │ +{found['n']} ", text)
    summary = {"reliability": {"generated": {**found, "low": 0.25, "high": 0.75}}}
    assert f"{found['mean']:.3f} │ 0.250 to 0.750" in str(replace(report, summary=summary))
    assert report.table().row_count == 4 * 3


def test_what_was_never_asked_is_shown_as_such(report: Report):
    assert report.summary["portability"]["compare"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert "–" in str(report)


def test_numbers_that_are_none_are_null(report: Report, tmp_path: Path):
    rows = [{"case_id": 0, "logprob": float("nan"), "low": float("-inf")}]
    replace(report, rows=rows).save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").rows == [{"case_id": 0, "logprob": None, "low": None}]
    assert "NaN" not in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"about": {}}', '{"about": {"format": "x"}}', "\x00"])
def test_a_damaged_file_is_refused(content: str, tmp_path: Path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ErrataError, match="damaged or no report"):
        Report.load(tmp_path / "report.json")


def test_a_missing_or_newer_file_is_refused(report: Report, tmp_path: Path):
    with pytest.raises(UsageError, match="no file"):
        Report.load(tmp_path / "nowhere.json")
    (tmp_path / "new.json").write_text(json.dumps({**report.to_dict(), "about": {**report.about, "format": 99}}))
    with pytest.raises(ErrataError, match="newer errata"):
        Report.load(tmp_path / "new.json")


def test_a_report_is_not_written_half(report: Report, tmp_path: Path):
    with pytest.raises(ErrataError, match="can't be written"):
        report.save(tmp_path / "no" / "folder.json")
    assert list(tmp_path.iterdir()) == []
