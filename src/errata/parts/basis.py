"""The coordinates that editor networks see the inputs of matrices in: as they are, or whitened.

With C = L L^T the second moment of a matrix' inputs, W k = (W L)(L^-1 k): an update D of W L, seen from inputs
L^-1 k, is the update D L^-1 of W. What all tokens share is then one direction among many, not most of every input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Case
from ..edit import Edit
from ..lm import Site
from .taps import Taps

STRANGERS, DIRECTIONS = 3000, 256
"""So many made-up subjects a moment is taken on, for so many directions of an input."""
RIDGE = 1e-3
"""Of the moment's mean diagonal, added to it."""


class Basis(nn.Module):
    """The factor L of every matrix, in numbers of half precision, packed in files; the identity until `fit`."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.numbers = {site.name: i for i, site in enumerate(sites)}
        for i, site in enumerate(sites):
            self.register_buffer(str(i), torch.eye(site.shape[1]))

    @torch.no_grad()
    def fit(self, inputs: Mapping[str, Tensor]) -> None:
        """Take the moments of the inputs, (m, d_in) by matrix, of other subjects than the editor will learn from.

        Those that it learns from would not do: seen through their own moment they are nearly orthogonal to each other,
        those of other subjects are not, and what is trained to leave the former alone doesn't leave the latter.
        """
        for name, K in inputs.items():
            C = K.double().T @ K.double() / len(K)
            C.diagonal().add_(RIDGE * C.diagonal().mean())
            self.get_buffer(str(self.numbers[name])).copy_(torch.linalg.cholesky(C).half())

    def seen(self, taps: Taps) -> Taps:
        """Taps with inputs L^-1 k."""
        return replace(taps, K={name: self._solved(name, K, transposed=False) for name, K in taps.K.items()})

    def out(self, name: str, update: Tensor) -> Tensor:
        """Rows (n, d_in) of an update in these coordinates as rows of one of the weights: D L^-1."""
        return self._solved(name, update, transposed=True)

    def _solved(self, name: str, rows: Tensor, transposed: bool) -> Tensor:
        if name not in self.numbers:
            return rows
        L = self.get_buffer(str(self.numbers[name]))
        return torch.linalg.solve_triangular(L.T if transposed else L, rows.T, upper=transposed).T

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, L in self.named_buffers():
            destination[prefix + name] = L[tuple(torch.tril_indices(*L.shape))].half()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **named: Any) -> None:
        whole = dict(state_dict)
        for name, L in self.named_buffers():
            if (packed := whole.get(prefix + name)) is not None:
                whole[prefix + name] = torch.zeros_like(L)
                whole[prefix + name][tuple(torch.tril_indices(*L.shape))] = packed.to(L)
        super()._load_from_state_dict(whole, prefix, *args, **named)


def strangers(cases: Sequence[Case], draw: Random, n: int) -> Iterator[Edit]:
    """Edits like those of the cases, about made-up subjects whose words are theirs."""
    names = [c.edit.subject for c in cases]
    for _ in range(n):
        own = draw.choice(cases).edit
        yield replace(own, subject=made_up(own.subject, names, draw), truth=None)


def made_up(name: str, names: Sequence[str], draw: Random) -> str:
    """A name like another, most of whose words are those of other names."""
    words = [draw.choice(draw.choice(names).split()) if draw.random() < 0.7 else word for word in name.split()]
    return " ".join(words)
