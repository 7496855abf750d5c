"""Changes of a weight: `LowRank`, which can also be put beside it, one for each row of a batch, and `Dense`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..effects import Hook, Overlay
from ..errors import ErrataError
from ..ledger import Effect, stand
from ..lm import Site
from .change import Change, Undo


@dataclass(frozen=True, eq=False)
class LowRank(Change, kind="low-rank"):
    """W <- W + left @ right. One column of `left` and one row of `right` for each of `owners`."""

    by_row = True
    form: ClassVar = {"left": "float32 out n", "right": "float32 n in"}

    left: Tensor
    """(d_out, rank)."""
    right: Tensor
    """(rank, d_in)."""

    @property
    def delta(self) -> Tensor:
        """(d_out, d_in)."""
        return self.left @ self.right

    def effect(self, site: Site) -> Effect:
        if site.writable:
            return _sum(site, lambda weight: self.left.to(weight.device) @ self.right.to(weight.device))
        return _beside(site, [self])

    @classmethod
    def effect_by_row(cls, site: Site, rows: Sequence[Change | None]) -> Effect:
        return _beside(site, [row if isinstance(row, LowRank) else None for row in rows])

    def fits(self, site: Site) -> bool:
        return (self.left.shape[0], self.right.shape[1]) == site.shape

    def join(self, later: Change) -> tuple[Change, ...]:
        if not isinstance(later, LowRank):
            return self, later
        return (
            LowRank(
                torch.cat([self.owners, later.owners]),
                torch.cat([self.left, later.left], 1),
                torch.cat([self.right, later.right]),
            ),
        )

    def scaled(self, by: float) -> LowRank:
        return replace(self, left=self.left * by)

    def without(self, edit: int) -> LowRank | None:
        keep = self.owners != edit
        return LowRank(self.owners[keep], self.left[:, keep], self.right[keep]) if keep.any() else None


@dataclass(frozen=True, eq=False)
class Dense(Change, kind="dense"):
    """W <- W + delta."""

    form: ClassVar = {"delta": "float32 out in"}

    delta: Tensor
    """(d_out, d_in)."""

    def effect(self, site: Site) -> Effect:
        if not site.writable:
            raise ErrataError(
                f"{site.name} keeps its weight in a form of its own; only low-rank changes can be put beside it"
            )
        return _sum(site, lambda weight: self.delta.to(weight.device))

    def fits(self, site: Site) -> bool:
        return tuple(self.delta.shape) == site.shape

    def join(self, later: Change) -> tuple[Change, ...]:
        if not isinstance(later, Dense):
            return self, later
        return (Dense(torch.cat([self.owners, later.owners]), self.delta + later.delta),)

    def scaled(self, by: float) -> Dense:
        return replace(self, delta=self.delta * by)

    def without(self, edit: int) -> Dense | None:
        if (self.owners == edit).all():
            return None
        if (self.owners != edit).all():
            return self
        raise ErrataError("a dense change is one matrix for all of its edits; one can't be taken out of it")


def attach_rows(site: Site, rows: Sequence[LowRank | None]) -> Undo:
    """Put low-rank changes beside a module, one for each row of the batch: output_i += left_i (right_i input_i).

    So n differently edited models answer in one pass. A single change is used for every row.
    """
    return stand(_beside(site, rows))


def _beside(site: Site, rows: Sequence[LowRank | None]) -> Effect:
    rank = max((len(c.owners) for c in rows if c), default=0)
    left, right = (torch.zeros(len(rows), *shape, device=site.device) for shape in _factors(site.shape, rank))
    for i, change in enumerate(rows):
        if change:
            left[i, :, : len(change.owners)] = change.left
            right[i, : len(change.owners)] = change.right

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = args[0].float().reshape(len(rows), -1, args[0].shape[-1])
        added = inputs @ right.mT @ left.mT
        return output + added.view(output.shape).to(output.dtype)

    return Hook(site.module, hook)


def _factors(shape: tuple[int, int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (shape[0], rank), (rank, shape[1])


def _sum(site: Site, delta: Callable[[Tensor], Tensor]) -> Effect:
    """The sum, rounded once, in the weight's place; in the end the weight itself is back.

    The weight is not written, so another module that it is tied to (a head's to the embeddings) keeps it as it is.
    """
    turned = isinstance(site.module, Conv1D)

    def added(kept: nn.Parameter) -> nn.Parameter:
        weight = kept.detach().T if turned else kept.detach()
        whole = (weight.float() + delta(weight)).to(kept.dtype)
        return nn.Parameter(whole.T.contiguous() if turned else whole, kept.requires_grad)

    return Overlay(site.module, "weight", added, "_parameters")


def total(changes: Sequence[Change]) -> Tensor | None:
    """What changes add to one weight together, (d_out, d_in) float64; None where one answers beside the weight."""
    deltas = [c.delta.double() for c in changes if isinstance(c, LowRank | Dense)]
    return torch.stack(deltas).sum(0) if deltas and len(deltas) == len(changes) else None


def share(delta: Tensor, site: Site) -> float | None:
    """The norm of what is added to a weight, over the weight's; None where the weight is kept in a form of its own."""
    if not site.writable:
        return None
    return float(delta.norm() / site.weight.detach().cpu().double().norm().clamp(min=1e-12))
