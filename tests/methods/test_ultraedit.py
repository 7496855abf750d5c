"""UltraEdit is the closed form of its paper, and its normaliser remembers every edit of a fold."""

from __future__ import annotations

import pytest
import torch

from errata import Edit, UltraEdit, sequential
from errata.parts.taps import among, tap
from tests import tiny

A, B, _ = tiny.EDITS
C = Edit(tiny.PROMPT, "Japan", "Paris")


@pytest.mark.parametrize("which", ["all", "target"])
@pytest.mark.parametrize("edits", [[A, B], [C]], ids=["two", "alone, by a target of one token"])
def test_the_update_is_the_papers_closed_form(which, edits):
    """Of the tokens that are written to, with the statistics of all."""
    lm = tiny.trained("gpt2")
    site = lm.mlp_out(1)
    patch = UltraEdit(at=(site.name,), rate=1e-2, tokens=which).edit(lm, edits)
    with lm.frozen():
        seen, chosen = tap(lm, [site], edits), among(lm, edits, which)
    K, G = seen.K[site.name].double(), seen.G[site.name].double()
    k, g = ((x - x.mean(0)) / (x.std(0) + torch.finfo(torch.float32).eps) for x in (K, G))
    K, k, g = K[chosen], k[chosen], g[chosen]
    assert k.abs().max() > 0.1
    V = -1e-2 * (k * k).sum(1, keepdim=True) * g
    wanted = torch.linalg.solve(K.T @ K + torch.eye(K.shape[1], dtype=K.dtype), K.T @ V).T
    (found,) = patch.changes[site.name]
    torch.testing.assert_close(found.delta.double(), wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-3)


def test_a_fold_has_the_statistics_of_all_its_edits():
    """Pitfall 11: a lifelong normaliser is not rebuilt at each edit."""
    lm = tiny.trained("gpt2")
    method = UltraEdit(at=(1,), rate=1e-4)
    *_, fold = sequential(method, lm, [[A], [B]])
    alone = method.edit(lm, [B])
    assert len(fold.carry) == len(alone.carry) == 6  # n, mean and squares of two shapes
    with lm.frozen():
        rows = [len(tap(lm, [lm.mlp_out(1)], [e]).owner) for e in (A, B)]
    assert [int(t) for k, t in fold.carry.items() if k.endswith("/n")] == [sum(rows)] * 2
    assert [int(t) for k, t in alone.carry.items() if k.endswith("/n")] == [rows[1]] * 2
