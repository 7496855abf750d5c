"""What a block makes of what its MLP writes: added to the residual stream as it is, or through a norm or a factor.

Gemma 2 and 3, OLMo 2 and GLM-4 have a norm there, Granite a factor. Nothing here goes by a model's name: the block is
run with more at its MLP's write matrix, and what comes out is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..effects import Hook, hooked
from ..lm import LM
from ..replay import block_of
from ..tokens import Tokens
from ..trace import hidden, read, rewrite

TRIES = 20
"""Scalings by which a change is brought to a size."""


class Tail:
    """A block from its MLP's write matrix on, at the last tokens of some subjects."""

    def __init__(self, lm: LM, layer: int, batch: Tokens) -> None:
        """`batch` holds prompts that are read up to their subjects."""
        self.lm, self.site, self.block = lm, lm.mlp_out(layer).name, lm.blocks[layer]
        self.at = torch.arange(len(batch), device=lm.device), batch.subject
        called: list[tuple[Any, Any]] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.append((_copied(args), _copied(kwargs)))

        with hooked(Hook(lm.module(self.block), keep, before=True, kwargs=True)):
            seen = read(lm, [self.site, self.block], batch.until(batch.subject), *self.at)
        ((self.args, self.kwargs),) = called
        self.value = seen[self.site][1].float()
        """What the matrix puts out, (n, d)."""
        self.output = seen[self.block][1].float()
        """What the block puts out, (n, d)."""

    def __call__(self, more: Tensor) -> Tensor:
        """How the block's output changes where the matrix puts out `more`, both (n, d); gradients flow."""

        def write(output: Tensor) -> Tensor:
            output = output.clone()
            output[self.at] = (output[self.at] + more).to(output.dtype)
            return output

        with rewrite(self.lm, self.site, len(more), write):
            found = self.lm.module(self.block)(*_copied(self.args), **_copied(self.kwargs))
        return hidden(found, len(more))[self.at].float() - self.output

    @torch.no_grad()
    def plain(self) -> bool:
        """Whether what the matrix puts out is added as it is, as far as the model's dtype can tell."""
        size = self.output.norm(dim=1)
        more = self.value * (size / self.value.norm(dim=1).clamp(min=1e-30))[:, None]
        missed = (self(more) - more).norm(dim=1)
        return bool((missed <= (0.01 + 8 * torch.finfo(self.lm.dtype).eps) * size).all())

    @torch.no_grad()
    def within(self, more: Tensor, most: Tensor) -> Tensor:
        """`more` (n, d), shortened where it changes the block's output by more than `most` (n,)."""
        for _ in range(TRIES):
            by = (most / self(more).norm(dim=1).clamp(min=1e-30)).clamp(max=1)
            more = more * by[:, None]
            if (by > 0.999).all():
                break
        return more


def writes_plainly(lm: LM, layer: int, prompts: Callable[[], Tokens]) -> bool:
    """Whether a block adds what its MLP writes to the residual stream as it is, seen at some subjects."""
    if ("plain", layer) not in lm.memo:
        lm.memo["plain", layer] = Tail(lm, layer, prompts()).plain()
    return lm.memo["plain", layer]


def tail(lm: LM, place: str, prompts: Callable[[], Tokens]) -> Tail | None:
    """What comes after a place at the subjects of some prompts.

    None where its output is added to the residual stream as it is, and if it is no MLP's write matrix.
    """
    layer = block_of(lm, place)
    if layer is None or place in lm.blocks or place != lm.mlp_out(layer).name or writes_plainly(lm, layer, prompts):
        return None
    return Tail(lm, layer, prompts())


def _copied(given: Any) -> Any:
    """What a block was called with, for itself: some models write into it."""
    if isinstance(given, Tensor):
        return given.clone()
    if isinstance(given, tuple):
        return tuple(map(_copied, given))
    return {k: _copied(v) for k, v in given.items()} if isinstance(given, dict) else given
