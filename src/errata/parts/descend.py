"""Going down a gradient: where there is none, by how much a target leads, and what a step is measured by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ErrataError
from ..lm import LM, Site

SMALL = 1e-3
"""A loss below this may have no gradient that float32 can hold."""


def pull(lm: LM, losses: Tensor, on: Sequence[Tensor]) -> None:
    """Leave the gradients of losses in what is searched.

    Args:
        lm: the model.
        losses: one, or (n,), of which loss i hangs on row i of each tensor alone.
        on: what is searched; its gradients are those of the sum.

    Raises:
        ErrataError: a loss that is not small moves nothing, so that its search would end where it began.
    """
    if losses.requires_grad:
        losses.sum().backward()
    felt = torch.zeros_like(losses, dtype=torch.bool)
    for t in on:
        if t.grad is not None:
            felt |= t.grad.flatten(1).any(1) if losses.ndim else t.grad.any()
    if bool(((losses.detach() > SMALL) & ~felt).any()):
        raise _blocked(lm)


def unfinished(losses: Tensor, stop: float) -> Tensor:
    """Which of some losses are not down to `stop` yet; one that is no number never is."""
    return ~(losses.detach() <= stop)


def slopes(lm: LM, losses: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the sum of losses by some tensors.

    Raises:
        ErrataError: the losses don't hang on one of them.
    """
    found = torch.autograd.grad(losses.sum(), of, allow_unused=True) if losses.requires_grad else [None]
    there = [g for g in found if g is not None]
    if len(there) < len(of):
        raise _blocked(lm)
    return there


def leads(logits: Tensor, wanted: Tensor) -> Tensor:
    """By how many nats each wanted token (m,) is likelier than any other, (m,); negative where another one is."""
    own = logits.gather(1, wanted[:, None])
    return (own - logits.scatter(1, wanted[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]


@torch.no_grad()
def entry(site: Site) -> float:
    """The root mean square of a matrix' entries; of a quantised one, as far as random inputs show it."""
    if site.writable:
        return site.weight.float().square().mean().sqrt().item()
    weight = site.module.get_parameter("weight")
    draw = torch.randn(64, site.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    dtype = next((p.dtype for p in site.module.parameters() if p.is_floating_point()), torch.float16)
    put_out = site.module(draw.to(dtype)).float() - site.module(torch.zeros_like(draw[:1]).to(dtype)).float()
    return (put_out.square().mean() / site.shape[1]).sqrt().item()


def _blocked(lm: LM) -> ErrataError:
    return ErrataError(
        f"{lm.name} passes no gradient on to where it is edited, so nothing can be searched there; "
        "some layers compute without one, as 4-bit ones on a CPU do: load it unquantised, or edit it elsewhere"
    )
