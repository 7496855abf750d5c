"""Going down a gradient, and finding out where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ErrataError
from ..lm import LM

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
        raise ErrataError(
            f"{lm.name} passes no gradient on to where it is edited, so nothing can be searched there; "
            "some layers compute without one, as 4-bit ones on a CPU do: load it unquantised, or edit it elsewhere"
        )
