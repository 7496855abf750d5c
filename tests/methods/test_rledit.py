"""RLEdit is MALMEN trained along a sequence: its losses, and how they reach the network."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from errata import LM, MALMEN, RLEdit
from errata.methods.malmen import solved
from errata.parts.outer import apart, losses, questions, weights
from errata.parts.taps import places, tap
from errata.train import Course
from tests import tiny
from tests.methods.test_mend import stirred

AT = (0, "model.layers.2.mlp.down_proj")
HOW = RLEdit(at=AT, step=1e-2, rank=4, depth=2, together=2, shrink=0.3, decay=0.5)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.trained("llama")


def gradients(how, lm, network, cases) -> dict[str, torch.Tensor]:
    network.zero_grad()
    how.learn(lm, network, cases, random.Random(0))
    return {n: p.grad.clone() for n, p in network.named_parameters()}


def agree(found, wanted) -> None:
    for name, grad in wanted.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(found[name], grad, atol=1e-4 * scale + 1e-8, rtol=1e-2, msg=name)


def test_a_sequence_of_one_step_is_malmens_batch(lm):
    alike = dict(at=AT, step=1e-2, rank=4, depth=2, tokens="target", weight=1.7)
    with lm.frozen(), torch.enable_grad():
        one, malmen = RLEdit(**alike, together=4, shrink=0.0), MALMEN(**alike)
        network, cases = stirred(one, lm), tiny.cases()[:4]
        assert one.judge(lm, network, cases, random.Random(0)) == malmen.judge(lm, network, cases, random.Random(0))
        agree(gradients(one, lm, network, cases), gradients(malmen, lm, network, cases))


@pytest.mark.parametrize("how", [HOW, dataclasses.replace(HOW, back=1), dataclasses.replace(HOW, whiten=True)])
def test_gradients_are_those_of_the_whole_objective(lm, how):
    """Three steps of two edits, written out: each on the model as the earlier steps left it, which is given."""
    cases = apart(tiny.cases()[:6])
    with lm.frozen(), torch.enable_grad():
        network, sites, draw = stirred(how, lm), places(lm, AT), random.Random(0)
        basis, total = network["basis"], torch.zeros(())
        moved = {s.name: torch.zeros(s.shape) for s in sites}
        for t in range(3):
            with weights(sites, moved):
                seen = basis.seen(tap(lm, sites, [c.edit for c in cases[2 * t : 2 * t + 2]], how.tokens))
                found = solved(how.normal(network, sites, [seen]))
                made = {n: basis.out(n, update.float()) for n, (_, update) in found.items()}
                for k in range(min(how.back, t + 1)):
                    asked = questions(lm, cases[2 * (t - k) : 2 * (t - k) + 2], draw, shared=True)
                    with weights(sites, made):
                        edit, stay = losses(lm, asked)
                    total = total + 0.5**k * (how.weight * edit + stay)
            total = total + how.shrink * sum(d.pow(2).sum() for d in made.values())
            moved = {n: moved[n] + d.detach() for n, d in made.items()}
        total.backward()
        wanted = {n: p.grad.clone() for n, p in network.named_parameters()}
        agree(gradients(how, lm, network, cases), wanted)
        parts = how.judge(lm, network, cases, random.Random(0))
    assert parts["total"] == pytest.approx(total.item() / 3, rel=1e-4)


def test_it_learns_along_sequences(lm):
    how = RLEdit(at=(0, 1), step=1e-2, rank=16, depth=2, tokens="all", together=2)
    course = Course(steps=20, batch=6, rate=3e-3, every=10, held=4)
    looks = how.train(lm, tiny.cases(), course, held=tiny.cases()[:4]).about["training"]["losses"]
    assert min(look["total"] for look in looks) < 0.9 * looks[0]["total"]
