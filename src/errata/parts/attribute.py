"""Which neurons of the MLPs express an answer: integrated gradients over what goes into their write matrices.

Dai et al. 2022 (Knowledge Neurons), https://arxiv.org/abs/2104.08696, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from ..effects import Hook, hooked
from ..lm import LM, Site
from ..replay import passes
from ..tokens import Tokens
from ..trace import hidden, put, read
from .descend import slopes


def attribute(lm: LM, sites: Sequence[Site], batch: Tokens, answer: int, steps: int) -> list[Tensor]:
    """What every neuron contributes to p(answer) at the last token of each row, eq. 2 and 3.

    The contributions of one site add up to p less p with the site's input at 0, but for the error of the sum over
    steps, each of which is taken at its middle. (Where a norm follows the MLP, as in gemma2, they add up to 0: there
    the length of an MLP's output means nothing.)

    Args:
        lm: the model.
        sites: MLP write matrices; a neuron is one of their inputs, and is looked at by itself in each.
        batch: prompts.
        answer: a token.
        steps: into how many the way from 0 to the actual input is divided.

    Returns:
        For each site (batch, d_in) in float32.
    """
    rows = torch.arange(len(batch), device=lm.device)
    actual = read(lm, [s.name for s in sites], batch, rows, batch.last)
    return [_integrated(lm, site, batch, answer, actual[site.name][0].float(), steps) for site in sites]


def _integrated(lm: LM, site: Site, batch: Tokens, answer: int, actual: Tensor, steps: int) -> Tensor:
    """Each step is a pass through the blocks from the site's on, on the last token.

    As rows of one batch, each step would read the tokens before the last again: six times the work.
    """
    rows, last = torch.arange(len(batch), device=lm.device), batch.last
    run = passes(lm, batch, [site.name], last)
    total = torch.zeros_like(actual)
    for step in range(steps):
        scaled = ((step + 0.5) / steps * actual).requires_grad_()
        with _fed(site.module, scaled, run.start):
            said = softmax(run.logits(rows, last), -1)[:, answer]
        total += slopes(lm, said, [scaled])[0]
    return actual * total / steps


def _fed(module: nn.Module, given: Tensor, cols: Tensor) -> AbstractContextManager[None]:
    """While inside, a module's input in column `cols` of each row is `given` (batch, d_in)."""
    rows = torch.arange(len(given), device=given.device)

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        into = hidden(args[0], len(given)).clone()
        into[rows, cols] = given.to(into.dtype)
        return (put(args[0], into), *args[1:])

    return hooked(Hook(module, hook, before=True))


def refine(scores: Sequence[Tensor], threshold: float, share: float, fewest: int, most: int | None) -> list[list[int]]:
    """The neurons that express a fact in most of its prompts (section 3.3).

    A prompt's coarse neurons score at least `threshold` times its highest score. Kept are those that at least `share`
    of the prompts have in common. Where that gives fewer than `fewest` or more than `most`, the paper moves `share` by
    steps until it doesn't; here as many as that are taken, in the order of sharing, then of the mean score.

    Args:
        scores: for each site (prompts, d_in).
        threshold: a share of the highest score of each prompt.
        share: of the prompts.
        fewest: neurons to keep at least, as far as there are coarse ones.
        most: neurons to keep at most; None for no bound.

    Returns:
        The neurons of each site.
    """
    every = torch.cat(list(scores), 1)
    coarse = (every > 0) & (every >= threshold * every.max(1, keepdim=True).values)
    sharing = coarse.double().mean(0)
    count = max(int((sharing >= share).sum()), min(fewest, int((sharing > 0).sum())))
    order = every.mean(0).argsort(descending=True)
    order = order[sharing[order].argsort(descending=True, stable=True)]
    kept = torch.zeros_like(sharing, dtype=torch.bool)
    kept[order[: count if most is None else min(count, most)]] = True
    return [part.nonzero()[:, 0].tolist() for part in kept.split([s.shape[1] for s in scores])]
