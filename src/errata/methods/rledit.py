"""RLEdit: MALMEN's update from a network that was trained along whole sequences of edits.

MALMEN's learns on the unedited model, and in a sequence meets one that its own edits have changed. Here a batch of the
trainer is a sequence: each edit is made on the model as those before it left it, and its loss is the reward it gets.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import Case
from ..lm import LM
from ..parts.outer import apart, weights
from ..parts.taps import Which, places
from ..train import Losses
from .malmen import MALMEN


@dataclass(frozen=True, kw_only=True)
class RLEdit(MALMEN, name="rledit"):
    """dW as MALMEN's; its network makes sum_t [sum_k decay^k L_{t-k}(W + dW_1 + ... + dW_t) + shrink |dW_t|^2] small.

    L_i are the losses of the i-th edits of a sequence. (The authors train on the very sequence that is then edited;
    here, as for every learned editor, on other cases.)
    """

    paper = "Li et al. 2025, Reinforced Lifelong Editing for Language Models"
    source = "https://arxiv.org/abs/2502.05759"

    tokens: Which = "target"
    """What of a text is looked at: every token, where the target is read off (the authors), or the subject's end."""
    rank: int = 1024
    """Of the network's layers."""
    depth: int = 4
    """How many they are."""
    weight: float = 1.7
    """How much the edit counts against what shall stay."""
    together: int = 8
    """Cases of a sequence that are edited at once while it is trained."""
    decay: float = 0.95
    """What the loss of earlier edits counts, for each step that they lie back."""
    back: int = 10
    """The latest steps of a sequence whose losses are looked at."""
    shrink: float = 1e-4
    """What the squared norm of an update counts."""

    def learn(self, lm: LM, network: Any, cases: Sequence[Case], draw: random.Random) -> Losses:
        return self._along(lm, network, cases, draw, learning=True)

    def judge(self, lm: LM, network: Any, cases: Sequence[Case], draw: random.Random) -> Losses:
        return self._along(lm, network, cases, draw, learning=False)

    def _along(self, lm: LM, network: Any, cases: Sequence[Case], draw: random.Random, learning: bool) -> Losses:
        """The losses along a sequence, a step's mean."""
        sites, basis, cases = places(lm, self.at), network["basis"], apart(cases)
        steps = [cases[i : i + self.together] for i in range(0, len(cases), self.together) for _ in range(self.rounds)]
        near = []
        moved = {site.name: torch.zeros(site.shape, device=lm.device) for site in sites}
        found: Losses = {"total": 0.0, "edit": 0.0, "stay": 0.0}
        for t in range(len(steps)):
            with weights(sites, moved):
                edits = [c.edit for c in steps[t]]
                with torch.no_grad():
                    if t % self.rounds == 0:
                        near.append(self.near(lm, sites, edits))
                    sums, seen = self.round(network, sites, near[-1], keep=learning)
                deltas = {name: update.float().requires_grad_() for name, (_, update) in sums.items()}
                for k in range(min(self.back, t + 1)):
                    for name, value in self._asked(lm, basis, sites, deltas, steps[t - k], draw, self.decay**k).items():
                        found[name] += value
            made = {name: basis.out(name, delta) for name, delta in deltas.items()}
            size = self.shrink * torch.stack([one.pow(2).sum() for one in made.values()]).sum()
            found["total"] += size.item()
            if learning:
                size.backward()
                self.teach(network, sites, seen, sums, deltas)
            moved = {name: moved[name] + one.detach() for name, one in made.items()}
        return {name: value / len(steps) for name, value in found.items()}
