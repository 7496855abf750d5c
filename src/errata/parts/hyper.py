"""Networks that turn the taps of an edit into an update, and the normaliser that they and UltraEdit see through."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

First = Literal["scale", "relu"]
"""What comes first in a layer: MEND's authors scale before the relu, MALMEN's after it."""


class Normaliser(nn.Module):
    """Mean and deviation of every entry, over all rows ever shown to it (Welford)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.n: Tensor
        self.mean: Tensor
        self.squares: Tensor
        self.register_buffer("n", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("squares", torch.zeros(size))  # the sum of squared distances from the mean

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take rows (m, size) into account; exact for any m, one row too."""
        n = self.n + len(x)
        away = x.mean(0) - self.mean
        self.squares += (x - x.mean(0)).pow(2).sum(0) + away.pow(2) * self.n * len(x) / n
        self.mean += away * len(x) / n
        self.n.copy_(n)

    @property
    def std(self) -> Tensor:
        return (self.squares / (self.n - 1).clamp(min=1)).sqrt() + torch.finfo(self.mean.dtype).eps

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Layer(nn.Module):
    """A low-rank layer around the identity, shared by matrices of a shape, each with a scale and an offset of its own.

    With `first="scale"`: y + relu(scale (U V y + bias) + offset), MEND's; with `first="relu"`:
    y + scale relu(U V y + bias) + offset, MALMEN's. It begins as the identity.
    """

    def __init__(self, size: int, rank: int, matrices: int, first: First) -> None:
        super().__init__()
        self.first = first
        self.V = nn.Parameter(torch.randn(rank, size) / size**0.5)  # V y as large as y, and a step of Adam small
        self.U = nn.Parameter(torch.zeros(size, rank))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(matrices, size))
        self.offset = nn.Parameter(torch.zeros(matrices, size))

    def forward(self, y: Tensor, matrix: int) -> Tensor:
        x = y @ self.V.T @ self.U.T + self.bias
        if self.first == "scale":
            return y + (self.scale[matrix] * x + self.offset[matrix]).clamp(min=0)
        return y + self.scale[matrix] * x.clamp(min=0) + self.offset[matrix]


class TapNet(nn.Module):
    """What a token showed at a matrix, (k, g), turned into pseudo-(k, g): one network for all matrices of a shape."""

    def __init__(self, d_in: int, d_out: int, rank: int, depth: int, matrices: int, rate: float, first: First) -> None:
        super().__init__()
        self.sizes = d_in, d_out
        size = d_in + d_out
        self.normal = Normaliser(size)
        self.layers = nn.ModuleList(Layer(size, min(rank, size), matrices, first) for _ in range(depth))
        self.log_rate = nn.Parameter(torch.full((matrices,), rate).log())

    def forward(self, K: Tensor, G: Tensor, matrix: int) -> tuple[Tensor, Tensor]:
        """(m, d_in) and (m, d_out) in and out; `matrix` is its number among those of the shape."""
        y = self.normal(torch.cat([K, G], 1))
        for layer in self.layers:
            y = layer(y, matrix)
        k, g = y.split(self.sizes, 1)
        return k, g

    def fall(self, K: Tensor, G: Tensor) -> Tensor:
        """How fast an edit's loss falls (m,), by a token of its, along what comes of it if the layers change nothing
        (and the normaliser takes no mean away)."""
        k, g = self.scaled(K, G)
        return (K * k).sum(1) * (G * g).sum(1)

    def scaled(self, K: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """(m, d_in) and (m, d_out) by their deviations alone: no gradient stays none."""
        k, g = (torch.cat([K, G], 1) / self.normal.std).split(self.sizes, 1)
        return k, g


class RidgeNet(TapNet):
    """A `TapNet` with the weight of the ridge by which its answers are joined, for each matrix."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.log_ridge = nn.Parameter(torch.zeros(len(self.log_rate)))

    def values(self, K: Tensor, G: Tensor, matrix: int) -> Tensor:
        """How the output at each token shall move, (m, d_out): v = -rate (k . k~) g~ (MALMEN, eq. 3)."""
        k, g = self(K, G, matrix)
        return self._moved(K, k, g, matrix)

    def back(self, K: Tensor, G: Tensor, matrix: int) -> Tensor:
        """The same for tokens whose loss is a drift: down their gradient, which no layer sees."""
        k, g = self.scaled(K, G)
        return self._moved(K, k, g, matrix)

    def _moved(self, K: Tensor, k: Tensor, g: Tensor, matrix: int) -> Tensor:
        return -self.log_rate[matrix].exp() * (K * k).sum(1, keepdim=True) * g
