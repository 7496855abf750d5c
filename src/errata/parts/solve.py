"""The linear algebra of an update: keys whitened by a second moment.

Solved in float64 on a processor; a singular moment (dead ReLU units, a short corpus) is regularised, and said so.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def factor(C: Tensor) -> Tensor:
    """The Cholesky factor L of C + eps * mean(diag C) * I, (d, d) float64, with the least eps that makes it definite."""
    C = C.double()
    scale = C.diagonal().mean()
    for eps in (0.0, 1e-10, 1e-8, 1e-6, 1e-4):
        L, failed = torch.linalg.cholesky_ex(C + eps * scale * torch.eye(len(C), dtype=C.dtype, device=C.device))
        if not failed and _steady(L):
            if eps:
                log.info("the second moment is singular; solved with %.0e of its mean diagonal added", eps)
            return L
    raise ValueError("the second moment is not positive semi-definite")


def _steady(L: Tensor) -> bool:
    """Whether solving with L keeps at least half of float64's digits."""
    diagonal = L.diagonal()
    return bool(diagonal.min() / diagonal.max() > 1e-6)


def whiten(L: Tensor, K: Tensor) -> Tensor:
    """C^-1 k for every key: (n, d) in, (n, d) out, in float64."""
    return torch.cholesky_solve(K.to(L).T, L).T
