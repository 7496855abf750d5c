"""GRACE's memory: keys, and the values that a module puts out where its input is near one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import ErrataError
from ..lm import Site
from .change import Change, Undo

SAME = 1e-3
"""Keys nearer than this share of a radius are one key."""


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
