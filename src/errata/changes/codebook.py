"""GRACE's memory: keys, and the values that a module puts out where its input is near one.

Every edit keeps what it came with, also where another one's entry answers for it. So a codebook is a function of its
edits in their order: joined in any grouping it is the same, and one edit taken out leaves what the others alone give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..effects import Hook
from ..errors import ErrataError
from ..ledger import Effect
from ..lm import Site
from .change import Change
from .routing import SAME, Index, settle, tell


@dataclass(frozen=True, eq=False)
class Codebook(Change, kind="codebook"):
    """Where a token's input is within `radii` of a key, the module's output becomes that key's value.

    GRACE, Hartvigsen et al. 2023, https://arxiv.org/abs/2211.11031. Every position is looked up by itself, so the
    answer does not depend on padding, on the batch, or on whether generation keeps a cache.
    """

    by_row = True
    form: ClassVar = {
        "keys": "float32 n in",
        "values": "float32 n out",
        "first": "float32 n",
        "labels": "int64 n most",
        "whole": "int64 n",
        "radii": "float32 n",
        "entries": "int64 n",
        "fixed": "int64 n",
    }

    keys: Tensor
    """(n, d_in) of every edit."""
    values: Tensor
    """(n, d_out)."""
    first: Tensor
    """(n,) the radius that each edit came with."""
    labels: Tensor
    """(n, most) int64: the target's tokens, -1 behind the last."""
    whole: Tensor
    """(n,) int64: 1 where the value goes to all tokens up to the one that is near the key, 0 where to that one."""
    radii: Tensor
    """(n,) Euclidean distance within which an entry answers now."""
    entries: Tensor
    """(n,) int64: whose key and value answer for each edit; its own where it is an entry."""
    fixed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """(n,) int64: 1 where the radius was measured, so that no neighbour widens or shrinks it; 0 in older patches."""

    def __post_init__(self) -> None:
        if not len(self.fixed):
            object.__setattr__(self, "fixed", torch.zeros_like(self.owners))

    @classmethod
    def of(
        cls,
        owners: Tensor,
        keys: Tensor,
        values: Tensor,
        first: Tensor,
        labels: Tensor,
        whole: Tensor,
        fixed: Tensor | None = None,
    ) -> Codebook:
        """The codebook of edits in their order; an edit may have several keys."""
        radii, entries = first.clone(), torch.arange(len(owners))
        labels = labels[:, : int((labels >= 0).sum(1).max()) + 1]
        fixed = torch.zeros_like(owners) if fixed is None else fixed
        _settle(keys, labels, radii, entries, fixed, 0)
        return cls(owners, keys, values, first, labels, whole, radii, entries, fixed)

    def refuse_inconsistent(self) -> None:
        self.refuse_outside("whole", 0, 2)
        self.refuse_outside("fixed", 0, 2)
        self.refuse_outside("entries", 0, len(self.entries))
        if not torch.equal(self.entries[self.entries], self.entries):
            raise ValueError("the entries of a codebook change name edits that are no entries")

    @property
    def live(self) -> Tensor:
        """(entries,) int64: the edits that are entries; only their keys are searched."""
        return (self.entries == torch.arange(len(self.entries))).nonzero()[:, 0]

    @property
    def told(self) -> list[str]:
        owners, radii = self.owners.tolist(), self.radii.tolist()
        each = [
            f"edit {owners[i]}: within {radii[entry]:.4g} of edit {owners[entry]}'s key"
            for i, entry in enumerate(self.entries.tolist())
        ]
        return list(dict.fromkeys(each))

    def effect(self, site: Site) -> Effect:
        return self.effect_by_row(site, [self])

    @classmethod
    def effect_by_row(cls, site: Site, rows: Sequence[Change | None]) -> Effect:
        device = site.device
        books = [row if isinstance(row, Codebook) else None for row in rows]
        found = [b.live if b else torch.empty(0, dtype=torch.long) for b in books]
        keys = [b.keys[i] if b else torch.empty(0, site.shape[1]) for b, i in zip(books, found, strict=True)]
        index = Index([k.to(device) for k in keys])
        some = [(b, i) for b, i in zip(books, found, strict=True) if b]
        values, radii, whole, owners = (
            torch.cat([getattr(b, name)[i] for b, i in some]).to(device)
            for name in ("values", "radii", "whole", "owners")
        )

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            queries = args[0].float()
            distance, entry = index.nearest(queries if queries.ndim > 2 else queries[None])
            answered = distance <= radii[entry]
            tell(site.name, answered, owners[entry], distance, radii[entry])
            if whole.any():
                answered, entry = _reaching_back(site, queries, answered, entry, whole[entry] > 0)
            chosen = values.to(output.dtype)[entry].view(output.shape)
            return torch.where(answered.view(output.shape[:-1])[..., None], chosen, output)

        return Hook(site.module, hook)

    def alone(self, edit: int) -> Codebook:
        """One edit's own part, as if the others had never been."""
        mine = self.owners == edit
        return self._only(mine).renumbered(torch.zeros_like)

    def fits(self, site: Site) -> bool:
        return (self.values.shape[1], self.keys.shape[1]) == site.shape

    def join(self, later: Change) -> tuple[Change, ...]:
        """By GRACE's algorithm 1, the later book's edits one after another."""
        if not isinstance(later, Codebook):
            return self, later
        most = max(self.labels.shape[1], later.labels.shape[1])
        labels = torch.cat([pad(b.labels, (0, most - b.labels.shape[1]), value=-1) for b in (self, later)])
        owners, keys, values, first, whole, fixed = (
            torch.cat([getattr(self, name), getattr(later, name)])
            for name in ("owners", "keys", "values", "first", "whole", "fixed")
        )
        radii = torch.cat([self.radii, later.first])
        entries = torch.cat([self.entries, torch.arange(len(self.keys), len(keys))])
        _settle(keys, labels, radii, entries, fixed, len(self.keys))
        return (Codebook(owners, keys, values, first, labels, whole, radii, entries, fixed),)

    def without(self, edit: int) -> Codebook | None:
        """The codebook as the other edits alone make it: its entry goes, and radii that it changed are as they were."""
        stay = self.owners != edit
        return self._only(stay) if stay.any() else None

    def _only(self, some: Tensor) -> Codebook:
        parts = (self.owners, self.keys, self.values, self.first, self.labels, self.whole, self.fixed)
        return Codebook.of(*(t[some] for t in parts))


def _settle(keys: Tensor, labels: Tensor, radii: Tensor, entries: Tensor, fixed: Tensor, start: int) -> None:
    """GRACE's algorithm 1 for the edits from `start` on, in place.

    A far key is an entry of its own. A near one with the same label widens the entry that is there. A near one with
    another label is added, and the two share the distance between them; where there is none (the same question,
    corrected again) that would leave both without an answer, so the later one takes the entry over. A fixed radius
    stays: where two such entries reach, the nearer answers.
    """

    def meet(edit: int, near: int, distance: Tensor) -> None:
        if fixed[near] or fixed[edit]:
            if distance <= SAME * radii[edit]:
                entries[entries == near] = edit
        elif torch.equal(labels[near], labels[edit]):
            radii[near] = torch.maximum(radii[near], distance)
            entries[edit] = near
        elif distance <= SAME * radii[edit]:
            radii[edit] = radii[near]
            entries[entries == near] = edit
        else:
            radii[near], radii[edit] = distance / 2 - 1e-5, distance / 2

    settle(keys, radii, start, lambda until: (entries[:until] == torch.arange(until)).nonzero()[:, 0], meet)


def _reaching_back(
    site: Site, queries: Tensor, answered: Tensor, entry: Tensor, whole: Tensor
) -> tuple[Tensor, Tensor]:
    """What answers where an entry's value goes to all tokens up to the next one that is near its key."""
    if queries.ndim < 3:
        raise ErrataError(f"{site.name} is given its tokens without their rows; put the value at the last token only")
    seq = answered.shape[1]
    places = torch.arange(seq, device=answered.device).where(answered & whole, seq)
    following = places.flip(1).cummin(1).values.flip(1)
    ahead = following < seq
    return answered | ahead, entry.gather(1, following.clamp(max=seq - 1)).where(ahead, entry)
