"""The trainer: nothing is lost by a kill, the model comes back, the best network is kept, files are refused rightly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from errata import LM, MALMEN, MEND, ErrataError, UsageError
from errata.cli import main
from errata.editor import Editor
from errata.train import Course
from tests import tiny

COURSE = Course(steps=8, batch=4, rate=1e-2, every=3, held=2)
HOW = MEND(at=(1,), rank=8, step=1e-3)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.trained("gpt2")


@pytest.fixture(scope="module")
def editor(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("editor") / "e.safetensors"
    before = tiny.state(lm.model)
    HOW.train(lm, tiny.cases(), COURSE, out=out, log=out.with_suffix(".jsonl"))
    assert tiny.differences(before, tiny.state(lm.model)) == []
    return out


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [2, 5])
def test_a_killed_training_goes_on_to_the_same_numbers(lm: LM, editor: Path, tmp_path: Path, at: int):
    out, log = tmp_path / "e.safetensors", tmp_path / "e.jsonl"

    def kill(step: int, losses: dict[str, float], held: bool) -> None:
        if step == at and not held:
            raise Killed

    with pytest.raises(Killed):
        HOW.train(lm, tiny.cases(), COURSE, out=out, log=log, progress=kill)
    with pytest.raises(ErrataError, match="not finished"):
        MEND(editor=str(out)).edit(lm, [tiny.EDITS[0]])
    torch.manual_seed(99)
    HOW.train(lm, tiny.cases(), COURSE, out=out, log=log)
    assert out.read_bytes() == editor.read_bytes()
    assert log.read_text() == editor.with_suffix(".jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]


def test_an_unfinished_training_on_other_terms_is_not_gone_on_with(lm: LM, tmp_path: Path):
    out = tmp_path / "e.safetensors"

    def kill(*_: object) -> None:
        raise Killed

    kept = Course(steps=1, batch=4, held=2)
    HOW.train(lm, tiny.cases(), kept, out=out)
    about = Editor.load(out)
    Editor(about.tensors, {**about.about, "progress": {"step": 0}}).save(out)
    with pytest.raises(UsageError, match="on other terms"):
        HOW.train(lm, tiny.cases(), COURSE, out=out)
    with pytest.raises(UsageError, match="another settings"):
        dataclasses.replace(HOW, rank=4).train(lm, tiny.cases(), kept, out=out)


def test_training_makes_the_loss_smaller_and_keeps_the_best(lm: LM):
    how = dataclasses.replace(HOW, weight=1.0, step=3e-2)  # too far at first: much moves that should stay
    found = how.train(lm, tiny.cases(), dataclasses.replace(COURSE, steps=25, every=5, rate=3e-3))
    totals = [look["total"] for look in found.about["training"]["losses"]]
    assert min(totals) < 0.9 * totals[0]


def test_training_goes_on_from_another_editor_also_of_another_method(lm: LM, editor: Path):
    before = Editor.load(editor).tensors
    none = dataclasses.replace(COURSE, steps=0, start=str(editor))
    joined = MALMEN(at=(1,), rank=8, first="scale").train(lm, tiny.cases(), none).tensors
    assert joined.keys() > before.keys()
    assert all(torch.equal(joined[name], t) for name, t in before.items())
    with pytest.raises(UsageError, match="not in this shape; give the settings"):
        dataclasses.replace(HOW, rank=4).train(lm, tiny.cases(), none)


def test_the_rate_falls_to_zero_in_the_last_steps():
    course = dataclasses.replace(COURSE, steps=10, rate=0.1, fall=0.4)
    assert [course.rate_at(step) for step in (0, 5, 6)] == [0.1] * 3
    assert course.rate_at(8) == pytest.approx(0.05)
    assert course.rate_at(9) == pytest.approx(0.025)


def test_accumulated_batches_are_one_batch_where_cases_do_not_share_an_update(lm: LM):
    """Of what doesn't hang on the batch: questions are drawn batch by batch."""

    class Plain(MEND):
        def learn(self, lm, network, cases, draw):
            p = next(p for n, p in network.named_parameters() if n.endswith("log_rate"))
            loss = (p * sum(c.id for c in cases) / len(cases)).sum()
            loss.backward()
            return {"total": loss.item()}

    def trained(batch: int, accumulate: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        losses: list[float] = []
        course = dataclasses.replace(COURSE, batch=batch, accumulate=accumulate, steps=3, every=3)
        found = Plain(at=(1,), rank=8).train(
            lm, tiny.cases(), course, progress=lambda _, x, held: losses.append(x["total"]) if not held else None
        )
        return dict(found.tensors), losses

    (one, once), (several, often) = trained(8, 1), trained(2, 4)
    assert once == pytest.approx(often, rel=1e-5)
    assert all(torch.allclose(t, several[name], rtol=1e-5) for name, t in one.items())
    assert len(set(once)) == 3


def test_precision_is_of_the_training_alone(lm: LM, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    HOW.train(lm, tiny.cases(), dataclasses.replace(COURSE, steps=1, precision="medium"))
    assert asked == ["medium", torch.get_float32_matmul_precision()]


def test_it_stops_where_it_gets_no_better(lm: LM):
    worse = dataclasses.replace(COURSE, steps=40, every=1, patience=3, rate=0.5)
    looks = dataclasses.replace(HOW, weight=1.0, step=1e-2).train(lm, tiny.cases(), worse).about["training"]["losses"]
    totals = [look["total"] for look in looks]
    assert len(totals) - 1 - totals.index(min(totals)) == 3
    assert looks[-1]["step"] < 40


def test_the_validation_part_is_not_learned_from(lm: LM):
    seen = []

    class Watching(MEND):
        def learn(self, lm, network, cases, draw):
            seen.extend(c.id for c in cases)
            return super().learn(lm, network, cases, draw)

        def judge(self, lm, network, cases, draw):
            held.update(c.id for c in cases)
            return super().judge(lm, network, cases, draw)

    held: set[object] = set()
    Watching(at=(1,), rank=8).train(lm, tiny.cases(), COURSE)
    assert held
    assert seen
    assert not held & set(seen)


def test_an_editor_is_refused_on_another_model_and_by_another_method(lm: LM, editor: Path):
    with pytest.raises(ErrataError, match="trained on tiny-gpt2"):
        MEND(editor=str(editor)).edit(tiny.lm("gpt2", seed=3), [tiny.EDITS[0]])
    with pytest.raises(ErrataError, match="trained for mend, not for ke"):
        Editor.load(editor).check("ke", lm)


def test_a_method_without_an_editor_says_how_to_get_one(lm: LM):
    with pytest.raises(UsageError, match="errata train mend"):
        MEND(at=(1,)).edit(lm, [tiny.EDITS[0]])
    with pytest.raises(UsageError, match="no file 'nowhere.safetensors'"):
        MEND(editor="nowhere.safetensors").edit(lm, [tiny.EDITS[0]])


def test_a_damaged_or_foreign_file_is_refused(editor: Path, tmp_path: Path):
    bad = tmp_path / "bad.safetensors"
    content = bytearray(editor.read_bytes())
    content[-1] ^= 1
    bad.write_bytes(content)
    with pytest.raises(ErrataError, match="not what was saved"):
        Editor.load(bad)
    bad.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(ErrataError, match="damaged"):
        Editor.load(bad)


def test_too_few_cases_are_refused(lm: LM):
    with pytest.raises(UsageError, match="at least 5"):
        HOW.train(lm, tiny.cases()[:4], COURSE)


def test_the_shell_trains_and_edits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "mend.safetensors"
    args = ["train", "mend", "--data", "counterfact-mini", "--n", "8", "--steps", "1", "--batch", "2", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*args, "--set", "rank=2", "--set", "at=3", "--out", str(out)])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training"]["losses"][-1]["step"] == 1
    assert Editor.load(out).about["base"]["name"] == "almanac"
    with pytest.raises(SystemExit) as ended:
        main(["train", "rome", "--data", "counterfact-mini", "--out", str(out)])
    assert ended.value.code == 2
    assert "needs no trained editor" in capsys.readouterr().err


def test_whoever_interrupts_a_training_is_told_whether_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "mend.safetensors"

    def stopped() -> str:
        with pytest.raises(SystemExit) as ended:
            main(["train", "mend", "--data", "counterfact-mini", "--n", "8", "--out", str(out)])
        assert ended.value.code == 1
        return capsys.readouterr().err.splitlines()[-1]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MEND, "train", interrupted)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the shell turns Ctrl-C off as it ends
    assert stopped() == "interrupted; nothing was written"
    out.touch()  # the state of a training that has looked at its validation part
    assert stopped() == f"interrupted; the same command goes on from {out}"
