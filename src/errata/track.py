"""Losses of a training in the user's own tracker: TensorBoard, Weights & Biases, Trackio, whatever accelerate knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from warnings import catch_warnings

from .errors import UsageError, unknown
from .train import Losses, Progress


class Tracker:
    """A tracker that is installed.

    Args:
        name: as accelerate has it.
        folder: where one that writes files puts them.

    Raises:
        UsageError: accelerate doesn't know it, or it, or accelerate, is not installed.
    """

    def __init__(self, name: str, folder: str | Path = "runs") -> None:
        try:
            from accelerate import Accelerator
            from accelerate.utils import LoggerType
        except ImportError as error:
            raise UsageError(f"trackers are reached through accelerate; pip install accelerate {name}") from error
        try:
            with catch_warnings(action="ignore"):  # what is not there is told below
                self.accelerator = Accelerator(log_with=name, project_dir=str(folder))
        except ValueError as error:
            known = {str(one) for one in LoggerType} - {"all"}
            raise unknown("tracker", name, known) from error
        if not self.accelerator.log_with:
            raise UsageError(f"the tracker {name} is not installed; pip install {name}, or leave it out")

    @contextmanager
    def following(self, run: str, settings: Mapping[str, Any]) -> Iterator[Progress]:
        """A run of the tracker: what is yielded goes to `train` as `progress`.

        Args:
            run: what the tracker calls it.
            settings: what it was made with.
        """
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        self.accelerator.init_trackers(run, config=plain)
        try:
            yield self._log
        finally:
            self.accelerator.end_training()

    def _log(self, step: int, losses: Losses, held: bool) -> None:
        part = "held" if held else "train"
        self.accelerator.log({f"{part}/{name}": loss for name, loss in losses.items()}, step=step)
