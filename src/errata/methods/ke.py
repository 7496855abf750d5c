"""KE: a recurrent network reads the edit and says how much of each row and column of the gradient is to be taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from ..edit import Edit
from ..lm import LM, Site
from ..parts.taps import Taps, places
from ..tokens import Tokens, passage
from .mend import Factors, TapEditor


@dataclass(frozen=True, kw_only=True)
class KE(TapEditor, name="ke"):
    """dW = -step sigmoid(s) (grad . a + b), with a and b of rank one and s a number, from an LSTM over the edit, eq. 4.

    A mask of rank one leaves the rank of a gradient as it is, so the update is low-rank. The constrained optimisation
    of the paper (a margin on the KL) is a weighted sum here, as in MEND's comparison.
    """

    paper = "De Cao et al. 2021, Editing Factual Knowledge in Language Models"
    source = "https://arxiv.org/abs/2104.08164"

    step: float = 1.0
    """The update is at most so many gradients long (the authors' max_scale)."""
    hidden: int = 128
    """Width of the LSTM and of the layers that follow it."""

    def nets(self, lm: LM) -> dict[str, nn.Module]:
        return {"reader": _Reader(lm, places(lm, self.at), self.hidden)}

    def factors(self, lm: LM, network: Any, sites: Sequence[Site], seen: Taps, edits: Sequence[Edit]) -> Factors:
        tokens = lm.encode([passage(e, answer=e.target) for e in edits])
        masks = network["reader"](lm.model.get_input_embeddings()(tokens.ids).float().detach(), tokens)
        every = torch.arange(len(edits), device=seen.owner.device)
        found: Factors = {}
        for site, (row_a, column_a, row_b, column_b, s) in zip(sites, masks, strict=True):
            size = -self.step * s.sigmoid()
            masked = (size * row_a.softmax(1))[seen.owner] * seen.G[site.name]
            left = torch.cat([masked, size * row_b.softmax(1)])
            right = torch.cat([column_a[seen.owner] * seen.K[site.name], column_b])
            found[site.name] = torch.cat([seen.owner, every]), left, right
        return found


class _Reader(nn.Module):
    """From the tokens of an edit to the masks of every matrix."""

    def __init__(self, lm: LM, sites: Sequence[Site], hidden: int) -> None:
        super().__init__()
        width = lm.model.get_input_embeddings().embedding_dim
        self.sizes = [(d_out, d_in, d_out, d_in, 1) for d_out, d_in in (s.shape for s in sites)]
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.condition = nn.Linear(2 * hidden, hidden)
        self.masks = nn.ModuleList(
            nn.Sequential(weight_norm(nn.Linear(hidden, hidden)), nn.Tanh(), weight_norm(nn.Linear(hidden, sum(sizes))))
            for sizes in self.sizes
        )

    def forward(self, embedded: Tensor, tokens: Tokens) -> list[tuple[Tensor, ...]]:
        packed = pack_padded_sequence(embedded, tokens.mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        read = self.condition(torch.cat([last[0], last[1]], 1)).tanh()
        return [mask(read).split(sizes, 1) for mask, sizes in zip(self.masks, self.sizes, strict=True)]
