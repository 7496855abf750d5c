"""Filters on an update: a patch in, a gentler patch out. They compose with every method that writes weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .changes import Change, Dense, LowRank
from .errors import ErrataError, UsageError
from .lm import LM
from .patch import Patch


def keep_largest(patch: Patch, lm: LM, share: float = 0.2) -> Patch:
    """The entries of each update that change their weight most, relative to its size; the rest is dropped.

    RECT, Gu et al. 2024, https://arxiv.org/abs/2401.04700. The changes become dense.

    Args:
        patch: of weight changes.
        lm: the model it was made for.
        share: of the entries that stay, over 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise UsageError(f"a share of {share} of the entries can't be kept; give one over 0 and at most 1")

    def kept(change: Change, weight: Tensor) -> Change:
        delta = _delta(change)
        relative = (delta / weight.float().cpu()).abs().nan_to_num(0.0)
        least = relative.flatten().kthvalue(max(1, round((1 - share) * relative.numel()))).values
        return Dense(change.owners, torch.where(relative > least, delta, 0.0) if share < 1 else delta)

    return _each(patch, lm, kept)


def bound_norm(patch: Patch, lm: LM, most: float = 0.1) -> Patch:
    """Each update scaled down until its Frobenius norm is at most `most` times that of the weight it changes."""

    def bounded(change: Change, weight: Tensor) -> Change:
        size = float(_delta(change).norm() / weight.float().norm())
        return change.scaled(min(1.0, most / size)) if size else change

    return _each(patch, lm, bounded)


@torch.no_grad()
def restrain(patch: Patch, lm: LM, prior: Patch, base: float = 1.2) -> Patch:
    """What `patch` adds to `prior`, with the singular values of both together restrained to those of the weight.

    PRUNE, Ma et al. 2024, https://arxiv.org/abs/2405.16821: a singular value s of the whole update that is larger than
    the weight's largest, m, becomes m + log_base(s) - log_base(m). Where none is, nothing changes.

    Args:
        patch: of weight changes.
        lm: the unedited model.
        prior: the patch of the edits before, as it was returned.
        base: of the logarithm, over 1; the larger, the less is left of what is too large.
    """
    if not base > 1:
        raise UsageError(f"a logarithm can't have the base {base}; give more than 1")

    def restrained(name: str, changes: tuple[Change, ...]) -> tuple[Change, ...]:
        written = [c.delta for c in prior.changes.get(name, ()) if isinstance(c, LowRank | Dense)]
        before = sum(written, torch.zeros(lm.site(name).shape))
        U, S, V = torch.linalg.svd(before + sum(_delta(c) for c in changes), full_matrices=False)
        most = torch.linalg.matrix_norm(lm.site(name).weight.float().cpu(), 2)
        if S[0] <= most:
            return changes
        less = torch.where(most < S, most + (S / most).log() / math.log(base), S)
        owners = torch.cat([c.owners for c in changes])
        return (Dense(owners, (U * less) @ V - before),)

    return replace(patch, changes={name: restrained(name, changes) for name, changes in patch.changes.items()})


@torch.no_grad()
def _each(patch: Patch, lm: LM, fn: Callable[[Change, Tensor], Change]) -> Patch:
    changes = {name: tuple(fn(c, lm.site(name).weight) for c in cs) for name, cs in patch.changes.items()}
    return replace(patch, changes=changes)


def _delta(change: Change) -> Tensor:
    if isinstance(change, LowRank | Dense):
        return change.delta
    raise ErrataError(f"a {change.kind} change adds nothing to a weight, so there is nothing to filter")
