"""Settings in the model's own measure: what no two models have the same plain number for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import unknown


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Settings of which some may be shares of what the model itself shows; every one says of what."""

    scalable: ClassVar[tuple[str, ...]] = ()
    """What may be `scaled`."""

    scaled: tuple[str, ...] = ()
    """Settings in the model's own measure, of those that have one; others are plain numbers."""

    def __post_init__(self) -> None:
        for setting in self.scaled:
            if setting not in self.scalable:
                raise unknown("scaled setting", setting, self.scalable)
