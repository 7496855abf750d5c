"""Taps give the gradient, batch or not; the update in fewer numbers is the same update."""

from __future__ import annotations

import pytest
import torch

from errata.parts import taps
from errata.parts.outer import weights
from errata.parts.taps import Again, among, change, inputs, places, tap
from errata.tokens import passage
from tests import tiny


@pytest.fixture(params=["gpt2", "llama", "opt"])
def lm(request: pytest.FixtureRequest):
    return tiny.lm(request.param)


def test_taps_sum_to_the_gradient_of_the_weight(lm):
    site, edit = lm.mlp_out(1), tiny.EDITS[0]
    with lm.frozen():
        found = tap(lm, [site], [edit])
    tokens = lm.encode([passage(edit, answer=edit.target)])
    taps.nll(lm.logits(*tokens.reads, **tokens.inputs), tokens).sum().backward()
    stored = site.module.weight.grad
    wanted = stored.T if stored.shape != site.shape else stored
    torch.testing.assert_close(found.G[site.name].T @ found.K[site.name], wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("which", ["all", "target"])
def test_an_edit_shows_the_same_alone_and_in_a_batch_of_any_passes(lm, which, monkeypatch):
    """Pitfall 2; and the gradient of an edit is its own, whatever stands beside it."""
    sites = places(lm, [0, lm.mlp_out(2).name])
    with lm.frozen():
        alone = [tap(lm, sites, [e], which) for e in tiny.EDITS]
        for most in (taps.TOKENS, 1):
            monkeypatch.setattr(taps, "TOKENS", most)
            together = tap(lm, sites, tiny.EDITS, which)
            assert together.owner.unique().tolist() == [0, 1, 2]
            for i, one in enumerate(alone):
                own = together.owner == i
                assert torch.equal(together.place[own], one.place)
                torch.testing.assert_close(together.loss[own], one.loss, atol=1e-5, rtol=1e-4)
                for side in ("K", "G"):
                    for name, t in getattr(one, side).items():
                        torch.testing.assert_close(getattr(together, side)[name][own], t, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("rows", [16_384, 1])
def test_texts_tapped_again_show_what_plain_passes_do(architecture, rows, monkeypatch):
    """Also after the matrices changed, and where what comes before them is not run again."""
    monkeypatch.setattr(taps, "TOKENS", rows)
    lm = tiny.lm(architecture)
    sites = [lm.mlp_out(3), lm.attention_out(2)]
    draw = torch.Generator().manual_seed(0)
    with lm.frozen():
        again = Again(lm, sites, tiny.EDITS)
        for size in (0.0, 0.1):
            with weights(sites, {s.name: size * torch.randn(s.shape, generator=draw) for s in sites}):
                shown, wanted = list(again.taps("all")), tap(lm, sites, tiny.EDITS)
            for part in ("owner", "place", "loss"):
                torch.testing.assert_close(torch.cat([getattr(t, part) for t in shown]), getattr(wanted, part))
            for side in ("K", "G"):
                for name, t in getattr(wanted, side).items():
                    found = torch.cat([getattr(s, side)[name] for s in shown])
                    torch.testing.assert_close(found, t, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("which", ["all", "target", "subject"])
def test_what_is_of_interest_among_all_taps_is_what_is_tapped_of_it(lm, which):
    sites = places(lm, [0])
    with lm.frozen():
        found, wanted = tap(lm, sites, tiny.EDITS), tap(lm, sites, tiny.EDITS, which)
        chosen = among(lm, tiny.EDITS, which)
    assert torch.equal(found.owner[chosen], wanted.owner)
    assert torch.equal(found.place[chosen], wanted.place)


@pytest.mark.parametrize("which", ["all", "target", "subject"])
def test_inputs_are_those_of_the_taps(lm, which):
    sites = places(lm, [0, lm.mlp_out(2).name])
    with lm.frozen():
        found, wanted = inputs(lm, sites, tiny.EDITS, which), tap(lm, sites, tiny.EDITS, which).K
    assert found.keys() == wanted.keys()
    for name, K in wanted.items():
        torch.testing.assert_close(found[name], K)


def test_where_the_target_is_read_there_is_a_row_for_each_of_its_tokens(lm):
    tokens = lm.encode([passage(e, answer=e.target) for e in tiny.EDITS])
    found = tap(lm, [lm.mlp_out(0)], tiny.EDITS, "target")
    assert found.owner.bincount().tolist() == tokens.target.sum(1).tolist()


def test_a_layer_stands_for_all_matrices_of_its_mlp():
    assert [s.name for s in places(tiny.lm("llama"), [1])] == [
        f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert [s.shape for s in places(tiny.lm("gpt2"), [1])] == [(256, 64), (64, 256)]


def test_the_smaller_form_is_taken_and_is_the_same_update():
    few, many = (torch.randn(m, 12) for m in (2, 9))
    for left in (few, many):
        right, owners = torch.randn(len(left), 6), torch.arange(len(left))
        found = change(owners, left, right)
        torch.testing.assert_close(found.delta, left.T @ right)
        assert found.kind == ("low-rank" if left is few else "dense")
        assert set(found.owners.tolist()) == set(owners.tolist())
