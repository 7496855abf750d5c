"""The losses of a training reach a tracker through accelerate; TensorBoard's own files where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from errata import MEND, UsageError
from errata.cli import main
from errata.track import Tracker
from errata.train import Course
from tests import tiny

tracking = pytest.importorskip("accelerate.tracking")
TRAIN = ["train", "mend", "--data", "counterfact-mini", "--n", "8", "--steps", "2", "--batch", "2"]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What accelerate calls of a tracker that stands in for trackio."""
    found: list[Any] = []

    class Noting(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "trackio", False, None

        def __init__(self, run: str, **_: Any) -> None:
            super().__init__()
            found.append(("run", run))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            found.append(("settings", values))

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            found.append((step, values))

        def finish(self) -> None:
            found.append("end")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Noting)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType("trackio")])
    return found


def test_a_tracker_hears_what_the_log_says(noted: list[Any], tmp_path: Path):
    log = tmp_path / "log.jsonl"
    with Tracker("trackio", tmp_path).following("mine", {"rank": 8, "at": (1,)}) as told:
        MEND(at=(1,), rank=8).train(
            tiny.trained("gpt2"), tiny.cases(), Course(steps=2, batch=4, every=1, held=2), log=log, progress=told
        )
    begun, settings, *losses, end = noted
    assert (begun, settings, end) == (("run", "mine"), ("settings", {"rank": 8, "at": "(1,)"}), "end")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 5
    for (step, told), line in zip(losses, lines, strict=True):
        part = "held" if line.pop("held") else "train"
        assert step == line.pop("step")
        assert told == {f"{part}/{name}": loss for name, loss in line.items()}


def test_the_shell_tells_the_tracker_and_ends_it(noted: list[Any], tmp_path: Path):
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *TRAIN,
                "--set",
                "rank=2",
                "--set",
                "at=3",
                "--out",
                str(tmp_path / "e.safetensors"),
                "--tracker",
                "trackio",
            ]
        )
    assert ended.value.code == 0
    assert noted[0] == ("run", "errata-mend")
    assert (noted[1][1]["rank"], noted[1][1]["steps"], noted[1][1]["model"]) == (2, 2, "almanac")
    assert [step for step, _ in noted[2:-1]] == [0, 1, 2, 2]
    assert noted[-1] == "end"


def test_a_training_that_fails_ends_the_run(noted: list[Any], tmp_path: Path):
    with pytest.raises(ZeroDivisionError), Tracker("trackio").following("mine", {}):
        raise ZeroDivisionError
    assert noted[-1] == "end"


@pytest.mark.parametrize(
    ("name", "said"),
    [("trakio", "did you mean 'trackio'"), ("tensorboard", "tensorboard is not installed; pip install")],
)
def test_a_tracker_that_is_not_there_is_named_before_anything_is_loaded(
    name: str, said: str, noted: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(UsageError, match=said):
        Tracker(name, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*TRAIN, "--model", "nowhere", "--out", str(tmp_path / "e.safetensors"), "--tracker", name])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert noted == []


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_gets_a_file(tmp_path: Path):
    with Tracker("tensorboard", tmp_path).following("mine", {"rank": 8}) as told:
        told(1, {"total": 0.5}, False)
    assert list(tmp_path.rglob("events.out.tfevents*"))
