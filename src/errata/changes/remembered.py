"""Edits remembered as texts, which work between a prompt and the model; what `Context` and `Deferral` share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ErrataError
from ..ledger import Effect
from ..lm import LM, Reader, Reads, Site
from .change import Change

WHOLE = ""
"""The name under which a patch keeps changes that are of no module: that of the model itself."""


@dataclass(frozen=True, eq=False)
class Remembered(Change):
    """Edits kept as texts, one for each of `owners`. No module is touched: what the texts do, they do in `LM.readers`,
    so it is seen by what goes through the `LM`, not by a call of its `model`."""

    written: Tensor
    """uint8: all texts one after another, in UTF-8."""
    lengths: Tensor
    """(n, texts of an edit) int64: bytes of every text."""

    form: ClassVar = {"written": "uint8 bytes", "lengths": "int64 n 3"}

    each: ClassVar[tuple[str, ...]] = ()
    """The fields, besides `owners` and `lengths`, that have a row for every edit; the others are of all together."""

    def refuse_inconsistent(self) -> None:
        if (self.lengths < 0).any() or int(self.lengths.sum()) != len(self.written):
            raise ValueError(f"the texts of a {self.kind} change are not as long as it says")
        len(self.texts)  # what is not UTF-8 raises

    @abstractmethod
    def reader(self, lm: LM) -> Reader:
        """What stands between a prompt and the model."""

    @cached_property
    def texts(self) -> list[tuple[str, ...]]:
        """The texts of every edit."""
        data, place, out = self.written.numpy().tobytes(), 0, []
        for sizes in self.lengths.tolist():
            parts = []
            for size in sizes:
                parts.append(data[place : place + size].decode())
                place += size
            out.append(tuple(parts))
        return out

    def effect_in(self, lm: LM, name: str) -> Effect:
        return Reads(lm, self.reader(lm))

    def effect(self, site: Site) -> Effect:
        raise ErrataError(f"a {self.kind} change is of no module; it is put in place in a whole LM")

    def fits(self, site: Site) -> bool:
        return False

    def check(self, lm: LM, name: str) -> None:
        if name != WHOLE:
            raise ErrataError(f"a {self.kind} change is of no module, but the patch has it at {name!r}")

    def and_later(self, later: Remembered) -> Self:
        """These edits and later ones."""
        rows = {f: torch.cat([getattr(self, f), getattr(later, f)]) for f in ("owners", "lengths", *self.each)}
        return replace(self, written=torch.cat([self.written, later.written]), **rows)

    def without(self, edit: int) -> Self | None:
        keep = self.owners != edit
        if not keep.any():
            return None
        written, _ = write([t for t, stays in zip(self.texts, keep.tolist(), strict=True) if stays])
        rows = {f: getattr(self, f)[keep] for f in ("owners", "lengths", *self.each)}
        return replace(self, written=written, **rows)


def write(texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Texts, the same number for every edit, as the tensors `written` and `lengths`."""
    parts = [[text.encode() for text in row] for row in texts]
    written = bytearray(b"".join(part for row in parts for part in row))
    flat = torch.frombuffer(written, dtype=torch.uint8).clone() if written else torch.empty(0, dtype=torch.uint8)
    return flat, torch.tensor([[len(part) for part in row] for row in parts])
