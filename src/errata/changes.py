"""The kinds of change a patch is made of. Each can be undone, knows which edits it serves, and how a later one joins.

`LowRank` and `Dense` add to a weight; `Codebook` (GRACE) answers beside it. All tensors of a change are stored in
float32, whatever the model computes in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .errors import ErrataError
from .lm import Site

Undo = Callable[[], None]

SAME = 1e-3
"""Keys nearer than this share of a radius are one key."""


@dataclass(frozen=True, eq=False)
class Change(ABC):
    """One reversible change at one module. A subclass's fields are all tensors."""

    kinds: ClassVar[dict[str, type[Change]]] = {}
    kind: ClassVar[str]

    owners: Tensor
    """(n,) int64: numbers, within the patch, of the edits that this change serves, one per part it is made of."""

    def __init_subclass__(cls, kind: str) -> None:
        super().__init_subclass__()
        cls.kind = kind
        Change.kinds[kind] = cls

    @abstractmethod
    def attach(self, site: Site) -> Undo:
        """Put the change in place; what is returned takes it away again, to the bit."""

    @abstractmethod
    def fits(self, site: Site) -> bool:
        """Whether the shapes are those of the site."""

    def join(self, later: Change) -> tuple[Change, ...]:
        """What this change followed by a later one at the same module comes to."""
        return self, later

    def scaled(self, by: float) -> Self:
        """The change at another strength."""
        raise ErrataError(f"a {self.kind} change answers or it doesn't; only weight changes can be scaled")

    @abstractmethod
    def without(self, edit: int) -> Self | None:
        """The change with one edit taken out; None if nothing is left."""

    def renumbered(self, number: Callable[[Tensor], Tensor]) -> Self:
        """The change with its edits numbered anew."""
        return replace(self, owners=number(self.owners))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved; `type(change)(**tensors)` is the change again."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def finite(self) -> bool:
        """Whether every number is one."""
        return all(bool(t.isfinite().all()) for t in self.tensors().values())


@dataclass(frozen=True, eq=False)
class LowRank(Change, kind="low-rank"):
    """W <- W + left @ right. One column of `left` and one row of `right` for each of `owners`."""

    left: Tensor
    """(d_out, rank)."""
    right: Tensor
    """(rank, d_in)."""

    @property
    def delta(self) -> Tensor:
        """(d_out, d_in)."""
        return self.left @ self.right

    def attach(self, site: Site) -> Undo:
        if site.writable:
            return _add(site, lambda weight: self.left.to(weight.device) @ self.right.to(weight.device))
        return attach_rows(site, [self])

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

    delta: Tensor
    """(d_out, d_in)."""

    def attach(self, site: Site) -> Undo:
        if not site.writable:
            raise ErrataError(f"{site.name} is quantised; only low-rank changes can be put beside it")
        return _add(site, lambda weight: self.delta.to(weight.device))

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


@dataclass(frozen=True, eq=False)
class Codebook(Change, kind="codebook"):
    """Where a token's input is within `radii` of a key, the module's output becomes that key's value.

    GRACE, Hartvigsen et al. 2023, https://arxiv.org/abs/2211.11031. Every position is looked up by itself, so the
    answer does not depend on padding, on the batch, or on whether generation keeps a cache.
    """

    keys: Tensor
    """(entries, d_in)."""
    values: Tensor
    """(entries, d_out)."""
    radii: Tensor
    """(entries,) Euclidean distance within which an entry answers."""
    labels: Tensor
    """(entries, most) int64: the target's tokens, -1 behind the last."""
    entries: Tensor
    """(n,) int64: which entry each of `owners` is answered by."""

    def attach(self, site: Site) -> Undo:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            queries, keys = args[0].float(), self.keys.to(output.device)
            flat = queries.reshape(-1, queries.shape[-1])
            distance, nearest = distances(flat, keys).min(1)
            hit = (distance <= self.radii.to(output.device)[nearest]).view(output.shape[:-1])
            values = self.values.to(output)[nearest].view(output.shape)
            return torch.where(hit[..., None], values, output)

        return site.module.register_forward_hook(hook).remove

    def fits(self, site: Site) -> bool:
        return (self.values.shape[1], self.keys.shape[1]) == site.shape

    def join(self, later: Change) -> tuple[Change, ...]:
        if not isinstance(later, Codebook):
            return self, later
        book = self
        for entry in range(len(later.keys)):
            book = book._insert(later, entry)
        return (book,)

    def _insert(self, later: Codebook, i: int) -> Codebook:
        """GRACE, algorithm 1: a far key is added; a near one with the same label widens the entry that is there; a near
        one with another label is added, and the two share the distance between them. Where there is none (the same
        question, corrected again) that would leave both without an answer: the later one takes the entry over."""
        owners = later.owners[later.entries == i]
        key, value, radius, label = later.keys[i], later.values[i], later.radii[i], later.labels[i]
        most = max(self.labels.shape[1], len(label))
        labels, label = (pad(t, (0, most - t.shape[-1]), value=-1) for t in (self.labels, label))
        labels = labels.clone()
        distance, near = distances(key[None], self.keys)[0].min(0)
        values, radii = self.values.clone(), self.radii.clone()
        entry = len(self.keys)
        if distance <= radii[near] + radius:
            if torch.equal(labels[near], label):
                radii[near] = torch.maximum(radii[near], distance)
                entry = int(near)
            elif distance <= SAME * radius:
                values[near], labels[near] = value, label
                entry = int(near)
            else:
                radii[near], radius = distance / 2 - 1e-5, distance / 2
        new = entry == len(self.keys)
        return Codebook(
            torch.cat([self.owners, owners]),
            torch.cat([self.keys, key[None]]) if new else self.keys,
            torch.cat([values, value[None]]) if new else values,
            torch.cat([radii, radius[None]]) if new else radii,
            torch.cat([labels, label[None]]) if new else labels,
            torch.cat([self.entries, torch.full_like(owners, entry)]),
        )

    def without(self, edit: int) -> Codebook | None:
        gone = set(self.entries[self.owners == edit].tolist())
        if gone & set(self.entries[self.owners != edit].tolist()):
            raise ErrataError("the edit shares an entry of the codebook with another; take both out")
        keep = torch.tensor([i not in gone for i in range(len(self.keys))])
        if not keep.any():
            return None
        stay = self.owners != edit
        place = keep.long().cumsum(0) - 1
        keys, values, radii, labels = (t[keep] for t in (self.keys, self.values, self.radii, self.labels))
        return Codebook(self.owners[stay], keys, values, radii, labels, place[self.entries[stay]])


def distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Euclidean distances (queries, keys), without the cancellation of the usual product form."""
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")


def attach_rows(site: Site, rows: Sequence[LowRank | None]) -> Undo:
    """Put low-rank changes beside a module, one for each row of the batch: output_i += left_i (right_i input_i).

    So n differently edited models answer in one pass. A single change is used for every row.
    """
    weight = site.module.get_parameter("weight")
    rank = max((len(c.owners) for c in rows if c), default=0)
    left, right = (torch.zeros(len(rows), *shape, device=weight.device) for shape in _factors(site.shape, rank))
    for i, change in enumerate(rows):
        if change:
            left[i, :, : len(change.owners)] = change.left
            right[i, : len(change.owners)] = change.right

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = args[0].float().reshape(len(rows), -1, args[0].shape[-1])
        added = inputs @ right.mT @ left.mT
        return output + added.view(output.shape).to(output.dtype)

    return site.module.register_forward_hook(hook).remove


def _factors(shape: tuple[int, int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (shape[0], rank), (rank, shape[1])


@torch.no_grad()
def _add(site: Site, delta: Callable[[Tensor], Tensor]) -> Undo:
    """Add to a weight, rounding once; undo copies the kept weight back, because subtracting would lose bits."""
    kept = site.weight.detach().clone()

    def undo() -> None:
        with torch.no_grad():
            site.weight.copy_(kept)

    site.weight.copy_(site.weight.float() + delta(site.weight))
    return undo


def joined(changes: Iterable[Change]) -> tuple[Change, ...]:
    """Changes at one module in order, neighbours merged where their kind knows how."""
    out: tuple[Change, ...] = ()
    for change in changes:
        out = (*out[:-1], *out[-1].join(change)) if out else (change,)
    return out


def kind_of(name: str) -> Any:
    """The class of a kind of change; None if there is none of that name."""
    return Change.kinds.get(name)
