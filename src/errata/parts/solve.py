"""Closed forms for an update of W. The letters are the papers': K (n, d_in) are keys, R (n, d_out) what W k lacks, and
C (d_in, d_in) is the second moment of keys on ordinary text.

C is factored once; a batch of n edits then costs O(d^2 n), through Woodbury. Everything is solved in float64 and comes
out as factors in float32, one of rank one for each edit. A singular C (dead ReLU units, a short corpus) is regularised,
and the log says so.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..changes import LowRank
from ..errors import ErrataError

log = logging.getLogger(__name__)


def factor(C: Tensor) -> Tensor:
    """The Cholesky factor L of C + eps * mean(diag C) * I, (d, d) float64, with the least eps that keeps it steady.

    Of C, which is symmetric, it reads the diagonal and what is above it.
    """
    mean = C.diagonal().double().mean()
    failed = torch.empty((), dtype=torch.int32, device=C.device)
    for eps in (0.0, 1e-10, 1e-8, 1e-6, 1e-4):
        L = C.to(torch.float64, copy=True).mT  # laid out by columns it is factored in place: no other is held
        L.diagonal().add_(eps * mean)
        torch.linalg.cholesky_ex(L, out=(L, failed))
        steady = L.diagonal().min() > 1e-6 * L.diagonal().max()  # else solving loses half of float64's digits
        if not failed and steady:
            if eps:
                log.info("the second moment is singular; %.0e of its mean diagonal was added", eps)
            return L
    raise ErrataError("the second moment is not one: it has a negative direction; compute it again")


def whiten(L: Tensor, K: Tensor) -> Tensor:
    """C^-1 k for every key: (n, d) in, (n, d) float64 out."""
    half = torch.linalg.solve_triangular(L, K.to(L).T, upper=False)  # `cholesky_solve` would copy L
    return torch.linalg.solve_triangular(L.mT, half, upper=True).T


def ridge(K: Tensor, R: Tensor, L: Tensor, weight: float = 0.0) -> LowRank:
    """Least |dW K^T - R^T|^2 + weight tr(dW C dW^T): dW = R^T K (weight C + K^T K)^-1 (MEMIT, eq. 14).

    By Woodbury that is R^T (K C^-1 K^T + weight I)^-1 K C^-1, an n x n system, and one that has a limit: with weight 0
    every key gets its value exactly, and C is disturbed least (EMMET, eq. 11; for n = 1 it is ROME, eq. 2). EMMET's
    softened constraints and MEMIT's ridge are the same formula.

    Args:
        K: (n, d_in).
        R: (n, d_out).
        L: the factor of C.
        weight: how much C counts; 0 only for fewer keys than they have entries.
    """
    if weight and len(K) > K.shape[1]:  # more keys than entries: the d_in x d_in system is the smaller one
        keys = K.to(L)
        return factors(R, torch.linalg.solve(weight * L @ L.T + keys.T @ keys, keys.T).T)
    KC = whiten(L, K)
    D = KC @ K.to(KC).T
    return factors(R, torch.linalg.solve(D + weight * torch.eye(len(K)).to(D), KC))


def null_space(K: Tensor, R: Tensor, P: Tensor, past: Tensor, weight: float) -> LowRank:
    """Ridge inside a null space: dW = R^T K P (P (K^T K + past^T past) + weight I)^-1 (AlphaEdit, eq. 14).

    It is solved in the dual while there are fewer keys than they have entries.

    Args:
        K: (n, d_in).
        R: (n, d_out).
        P: the projector, (d_in, d_in).
        past: keys of earlier edits, (m, d_in).
        weight: of the size of the update.
    """
    P, K = P.double(), K.to(P.device, torch.float64)
    keys = torch.cat([K, past.to(K)])
    if len(keys) > keys.shape[1]:
        A = P @ (keys.T @ keys) + weight * torch.eye(len(P)).to(P)
        return factors(R, torch.linalg.solve(A, P @ K.T).T)
    projected = keys @ P
    G = projected @ keys.T
    inverse = torch.linalg.inv(G + weight * torch.eye(len(G)).to(G))
    return factors(R, inverse[: len(K)] @ projected)


def projector(C: Tensor, below: float, share: bool = False) -> Tensor:
    """Onto eigenvectors of C, (d, d) float64: the directions that ordinary text does not use, or hardly.

    Args:
        C: (d, d).
        below: bounds their eigenvalues; or if `share`, how many of all they are, those of the smallest eigenvalues.
        share: which of the two.
    """
    values, vectors = torch.linalg.eigh(C.double())
    free = vectors[:, : round(below * len(values))] if share else vectors[:, values < below]  # the smallest first
    return free @ free.T


def factors(R: Tensor, right: Tensor) -> LowRank:
    """DW = R^T right, the i-th column and row belonging to edit i."""
    return LowRank(torch.arange(len(R)), R.T.float().contiguous().cpu(), right.float().contiguous().cpu())
