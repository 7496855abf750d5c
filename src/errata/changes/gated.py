"""Memories beside a weight that answer only where a router lets them: MELO's blocks and WISE's side memories.

Every token is routed by itself, by what the module is given there. So what is answered does not depend on padding, on
the rest of the batch, or on whether generation keeps a cache.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..effects import Hook
from ..errors import ErrataError
from ..ledger import Effect
from ..lm import Site
from .change import Change
from .routing import SAME, TOGETHER, Index, settle, tell


class Routed(NamedTuple):
    """For every token of a pass (batch, seq) what the router decided."""

    answered: Tensor
    """bool."""
    part: Tensor
    """Which part of the memory."""
    distance: Tensor
    """What was compared,"""
    limit: Tensor
    """with what."""


class Gated(Change):
    """A memory that adds to a module's output at the tokens that its router sends to it."""

    by_row = True

    def effect(self, site: Site) -> Effect:
        return self.effect_by_row(site, [self])

    @classmethod
    def effect_by_row(cls, site: Site, rows: Sequence[Change | None]) -> Effect:
        route, add, names = cls.working(site, [row if isinstance(row, cls) else None for row in rows])

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs = args[0].float()
            inputs = inputs.view(len(rows), -1, inputs.shape[-1]) if len(rows) > 1 or inputs.ndim < 3 else inputs
            found = route(inputs)
            tell(site.name, found.answered, names[found.part], found.distance, found.limit)
            if not found.answered.any():
                return output
            new = output.clone().view(*inputs.shape[:2], -1)
            new[found.answered] += add(inputs[found.answered], found.part[found.answered]).to(output.dtype)
            return new.view(output.shape)

        return Hook(site.module, hook)

    @classmethod
    @abstractmethod
    def working(cls, site: Site, rows: Sequence[Change | None]) -> tuple[Route, Add, Tensor]:
        """Memories, one for all or one for each row of the batch, ready for passes: the router, what parts (m,) add
        (m, d_out) to inputs (m, d_in), and by which numbers the log calls the parts."""


Route = Callable[[Tensor], Routed]
Add = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Blocks(Gated, kind="blocks"):
    """Low-rank blocks, indexed by clusters of keys: within a cluster's radius a token gets the nearest key's block.

    MELO, Yu et al. 2023, https://arxiv.org/abs/2312.11795. Keys are points; several may share a block and a cluster.
    """

    form: ClassVar = {
        "keys": "float32 n in",
        "first": "float32 n",
        "labels": "int64 n most",
        "block": "int64 n",
        "left": "float32 blocks out rank",
        "right": "float32 blocks rank in",
        "centres": "float32 n in",
        "radii": "float32 n",
        "clusters": "int64 n",
        "founders": "int64 n",
        "fixed": "int64 n",
    }

    keys: Tensor
    """(n, d_in) points; `owners` are whose they are."""
    first: Tensor
    """(n,) the radius that each came with."""
    labels: Tensor
    """(n, most) int64: what is to be said there, -1 behind the last token."""
    block: Tensor
    """(n,) int64: the block of each point."""
    left: Tensor
    """(blocks, d_out, rank)."""
    right: Tensor
    """(blocks, rank, d_in)."""
    centres: Tensor
    """(n, d_in) of clusters, in the place of the point that founded each; elsewhere the point."""
    radii: Tensor
    """(n,) of clusters, likewise."""
    clusters: Tensor
    """(n,) int64: the founder of each point's cluster; -1 for a point that was forgotten when its cluster shrank."""
    founders: Tensor
    """(n,) int64: 1 where a point founded a cluster that still stands."""
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
        first: Tensor,
        labels: Tensor,
        block: Tensor,
        left: Tensor,
        right: Tensor,
        fixed: Tensor | None = None,
    ) -> Blocks:
        """The memory that points make in their order."""
        labels = labels[:, : int((labels >= 0).sum(1).max()) + 1].contiguous()
        derived = keys.clone(), first.clone(), torch.arange(len(keys)), torch.ones_like(owners)
        fixed = torch.zeros_like(owners) if fixed is None else fixed
        made = cls(owners, keys, first, labels, block, left, right, *derived, fixed)
        made._settle(0)
        return made

    def refuse_inconsistent(self) -> None:
        self.refuse_outside("block", 0, len(self.left))
        self.refuse_outside("clusters", -1, len(self.keys))
        self.refuse_outside("founders", 0, 2)
        self.refuse_outside("fixed", 0, 2)
        if not self.founders[self.clusters[self.clusters >= 0]].all():
            raise ValueError("the clusters of a blocks change name points that founded none")

    @property
    def live(self) -> Tensor:
        """(clusters,) int64: the founders of the clusters that are searched."""
        return self.founders.nonzero()[:, 0]

    @property
    def told(self) -> list[str]:
        owners, radii = self.owners.tolist(), self.radii.tolist()
        each = [
            f"edit {owners[i]}: block {block}, within {radii[founder]:.4g} of edit {owners[founder]}'s cluster"
            if founder >= 0
            else f"edit {owners[i]}: out of reach since a later edit shrank its cluster"
            for i, (block, founder) in enumerate(zip(self.block.tolist(), self.clusters.tolist(), strict=True))
        ]
        return list(dict.fromkeys(each))

    @classmethod
    def working(cls, site: Site, rows: Sequence[Change | None]) -> tuple[Route, Add, Tensor]:
        device = site.device
        none = torch.empty(0, site.shape[1])
        index = Index(
            [row.centres[row.live].to(device) if isinstance(row, Blocks) else none.to(device) for row in rows]
        )
        some = [row for row in rows if isinstance(row, Blocks)]
        radii = torch.cat([row.radii[row.live] for row in some]).to(device)
        left, right = (_stacked([getattr(row, name) for row in some]).to(device) for name in ("left", "right"))
        members, before = [], 0
        for row in some:
            members += [before + (row.clusters == founder).nonzero()[:, 0] for founder in row.live.tolist()]
            before += len(row.keys)
        table = pad_sequence(members, batch_first=True, padding_value=-1).to(device)
        keys, owners = (torch.cat([getattr(row, name) for row in some]).to(device) for name in ("keys", "owners"))
        starts = torch.tensor([0, *(len(row.left) for row in some)]).cumsum(0)
        block = torch.cat([row.block + start for row, start in zip(some, starts, strict=False)]).to(device)

        def route(inputs: Tensor) -> Routed:
            distance, cluster = index.nearest(inputs)
            answered = (distance <= radii[cluster]) & (table[cluster] >= 0).any(-1)
            part = torch.zeros_like(cluster)
            part[answered] = _nearest_of(keys, table[cluster[answered]], inputs[answered])
            return Routed(answered, part, distance, radii[cluster])

        def add(inputs: Tensor, part: Tensor) -> Tensor:
            chosen = block[part]
            return (left[chosen] @ (right[chosen] @ inputs[..., None]))[..., 0]

        return route, add, owners

    def fits(self, site: Site) -> bool:
        return (self.left.shape[1], self.right.shape[2]) == site.shape

    def join(self, later: Change) -> tuple[Change, ...]:
        """By MELO's rules, the later memory's points one after another."""
        if not isinstance(later, Blocks):
            return self, later
        n = len(self.keys)
        added = replace(
            later,
            block=later.block + len(self.left),
            centres=later.keys,
            radii=later.first,
            clusters=torch.arange(n, n + len(later.keys)),
            founders=torch.ones_like(later.founders),
        )
        mine, theirs = self.tensors(), added.tensors()
        both = Blocks(*(_stacked([mine[k], theirs[k]], -1 if k == "labels" else 0) for k in mine))
        both._settle(n)
        return (both,)

    def without(self, edit: int) -> Blocks | None:
        """The memory as the other edits' points alone make it; a block goes when no point needs it any more."""
        stay = self.owners != edit
        return self._only(stay) if stay.any() else None

    def alone(self, edit: int) -> Blocks:
        """One edit's own part, as if the others had never been."""
        return self._only(self.owners == edit).renumbered(torch.zeros_like)

    def _only(self, points: Tensor) -> Blocks:
        used, block = self.block[points].unique(return_inverse=True)
        parts = (self.owners, self.keys, self.first, self.labels)
        owners, keys, first, labels = (t[points] for t in parts)
        return Blocks.of(owners, keys, first, labels, block, self.left[used], self.right[used], self.fixed[points])

    def _settle(self, start: int) -> None:
        """MELO's rules for the points from `start` on, in place. A far point founds a cluster. A near one with the same
        label joins it: the centre moves to the mean, the radius reaches every member. A near one with another label
        founds a cluster too, the two share the distance, and the older forgets the members that it no longer reaches;
        where there is no distance (the same question again) it is the later one's from then on. A fixed radius stays:
        where two such clusters reach, the nearer answers."""

        def meet(point: int, near: int, distance: Tensor) -> None:
            members = self.clusters == near
            if self.fixed[near] or self.fixed[point]:
                if distance <= SAME * self.first[point]:
                    self.founders[near] = 0
                    self.clusters[members] = -1
            elif torch.equal(self.labels[near], self.labels[point]):
                self.founders[point], self.clusters[point] = 0, near
                members[point] = True
                self.centres[near] = self.keys[members].mean(0)
                reach = (self.keys[members] - self.centres[near]).norm(dim=1).max()
                self.radii[near] = torch.maximum(reach, self.first[near])
            elif distance <= SAME * self.first[point]:
                self.radii[point], self.founders[near] = self.radii[near], 0
                self.clusters[members] = -1
            else:
                self.radii[near], self.radii[point] = distance / 2 - 1e-5, distance / 2 + 1e-5
                lost = members & ((self.keys - self.centres[near]).norm(dim=1) > self.radii[near])
                self.clusters[lost] = -1

        settle(self.centres, self.radii, start, lambda until: self.founders[:until].nonzero()[:, 0], meet)


def _stacked(parts: Sequence[Tensor], fill: int = 0) -> Tensor:
    """Tensors one after another, in all other dimensions filled up to the largest."""
    shape = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    out = parts[0].new_full((sum(map(len, parts)), *shape), fill)
    for room, part in zip(out.split([len(p) for p in parts]), parts, strict=True):
        room[(slice(None), *map(slice, part.shape[1:]))] = part
    return out


def _nearest_of(keys: Tensor, table: Tensor, queries: Tensor) -> Tensor:
    """Of each query (m, d) the nearest of its own candidates, `table` (m, most) with -1 behind the last; (m,)."""
    most = max(1, TOGETHER // (table.shape[1] * keys.shape[1]))
    parts = [
        (some[:, None] - keys[own.clamp(min=0)]).norm(dim=-1).masked_fill(own < 0, torch.inf).argmin(1)
        for some, own in zip(queries.split(most), table.split(most), strict=True)
    ]
    return table.gather(1, torch.cat(parts)[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class SideMemories(Gated, kind="side-memories"):
    """Side memories of a weight. A token that one of them would move by more than its threshold gets the one that moves
    it most; all others get the weight as it is.

    WISE, Wang et al. 2024, https://arxiv.org/abs/2405.14768, its retrieving form; a single memory is its merging one.
    """

    form: ClassVar = {
        "memory": "int64 n",
        "deltas": "float32 memories out in",
        "thresholds": "float32 memories",
        "sharded": "int64 memories",
        "replaces": "int64 memories",
    }

    memory: Tensor
    """(n,) int64: in which memory each of `owners` was written."""
    deltas: Tensor
    """(memories, d_out, d_in): side memory less weight."""
    thresholds: Tensor
    """(memories,) of the norm of what is added to a token."""
    sharded: Tensor
    """(memories,) int64: how many shards were merged into each; 0 for one that is still written to."""
    replaces: Tensor
    """(memories,) int64: of how many edits, at the end of an earlier patch, this one has taken over the memories."""

    def refuse_inconsistent(self) -> None:
        self.refuse_outside("memory", 0, len(self.deltas))

    @property
    def told(self) -> list[str]:
        limits = self.thresholds.tolist()
        return [
            f"edit {owner}: memory {memory}, which answers what it moves by more than {limits[memory]:.4g}"
            for owner, memory in zip(self.owners.tolist(), self.memory.tolist(), strict=True)
        ]

    @classmethod
    def working(cls, site: Site, rows: Sequence[Change | None]) -> tuple[Route, Add, Tensor]:
        device = site.device
        some = [row for row in rows if isinstance(row, SideMemories)]
        deltas, thresholds = (
            torch.cat([getattr(row, name) for row in some]).to(device) for name in ("deltas", "thresholds")
        )
        sizes = [len(row.deltas) if isinstance(row, SideMemories) else 0 for row in rows]
        numbers = torch.arange(len(deltas), device=device).split(sizes)
        table = pad_sequence(list(numbers), batch_first=True, padding_value=-1)

        def route(inputs: Tensor) -> Routed:
            own = deltas[None] if len(rows) == 1 else deltas[table.clamp(min=0)]  # (rows, most, d_out, d_in)
            gaps = (inputs[:, None] @ own.mT).norm(dim=-1).movedim(1, -1)  # (batch, seq, most)
            limits = thresholds[table.clamp(min=0)][:, None].masked_fill(table[:, None] < 0, torch.inf)
            gap, place = gaps.masked_fill(gaps <= limits, -1.0).max(-1)
            part = table.expand(len(inputs), -1).gather(1, place).clamp(min=0)
            return Routed(gap >= 0, part, gap, thresholds[part])

        def add(inputs: Tensor, part: Tensor) -> Tensor:
            added = inputs.new_zeros(len(inputs), deltas.shape[1])
            for memory in part.unique().tolist():
                added[part == memory] = inputs[part == memory] @ deltas[memory].T
            return added

        return route, add, torch.arange(len(deltas), device=device)

    def fits(self, site: Site) -> bool:
        return tuple(self.deltas.shape[1:]) == site.shape

    def join(self, later: Change) -> tuple[Change, ...]:
        """Memories of two patches stand side by side, but one that was written on takes the place of what it was."""
        if not isinstance(later, SideMemories):
            return self, later
        stay = self._kept(int(later.replaces.sum()))
        lost = self.memory >= stay
        moved = torch.where(lost, stay, self.memory)
        deltas, thresholds, sharded = (
            torch.cat([getattr(self, name)[:stay], getattr(later, name)])
            for name in ("deltas", "thresholds", "sharded")
        )
        owners, memory = torch.cat([self.owners, later.owners]), torch.cat([moved, later.memory + stay])
        replaces = torch.cat([self.replaces[:stay], later.replaces * 0 + self.replaces[stay:].sum()])
        return (SideMemories(owners, memory, deltas, thresholds, sharded, replaces),)

    def _kept(self, edits: int) -> int:
        """How many memories stay when a later one takes over the last so many edits; all, if it can't be these."""
        sizes = self.memory.bincount(minlength=len(self.deltas))
        held = sizes.flip(0).cumsum(0).tolist()
        return len(self.deltas) - 1 - held.index(edits) if edits in held else len(self.deltas)

    def without(self, edit: int) -> SideMemories | None:
        mine, *others = self.memory[self.owners == edit].unique().tolist() or [None]
        if mine is None:
            return self
        if others or (self.memory == mine).sum() > 1:
            raise ErrataError("the edit shares a side memory with others, and can't be taken out of it")
        keep, stay = torch.arange(len(self.deltas)) != mine, self.owners != edit
        if not keep.any():
            return None
        memory = self.memory[stay]
        rest = (getattr(self, name)[keep] for name in ("deltas", "thresholds", "sharded", "replaces"))
        return SideMemories(self.owners[stay], memory - (memory > mine).long(), *rest)


def ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """Deltas (m, d_out, d_in) in one: of each only its largest entries, and of these the mean of those that have the
    sign of their sum. Yadav et al. 2023 (TIES), https://arxiv.org/abs/2306.01708."""
    least = max(1, deltas[0].numel() - int(density * deltas[0].numel()) + 1)
    limit = deltas.abs().flatten(1).kthvalue(min(least, deltas[0].numel())).values[:, None, None]
    weighted = weights[:, None, None] * deltas * (deltas.abs() >= limit)
    agree = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
    share = (weights[:, None, None] * agree).sum(0)
    return (weighted * agree).sum(0) / share.where(share != 0, 1.0)
