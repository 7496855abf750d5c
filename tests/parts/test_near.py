"""What has the answer of an edit is found without data; what edits have in common is their mean, in any passes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from errata.edit import Edit
from errata.parts import taps
from errata.parts.near import Likes, namesakes
from errata.parts.outer import weights
from errata.parts.taps import Again, places, spoken, tap
from tests import tiny

EDITS = [Edit(tiny.PROMPT, name, "Lima") for name in ("New Zealand", "Sri Lanka", "New Kenya", "Zealand Kenya", "Cuba")]
AT = ["model.layers.1.mlp.down_proj", "model.layers.3.self_attn.o_proj"]


@pytest.fixture(scope="module")
def lm():
    lm = tiny.trained("llama")
    with lm.frozen():
        yield lm


def begun(lm, edits) -> list[int]:
    """Asked one by one, with nothing behind the prompt."""
    found = []
    for edit in edits:
        tokens = lm.encode([taps.passage(edit)])
        found.append(int(lm.logits(torch.tensor([0]), tokens.last, **tokens.inputs).argmax()))
    return found


def test_namesakes_are_made_up_and_have_their_edits_answer(lm):
    before = begun(lm, EDITS)
    assert len(set(before)) > 1
    found = namesakes(lm, EDITS, before, random.Random(0), 2)
    words = {word for e in EDITS for word in e.subject.split()}
    assert 3 < len(found) <= 2 * len(EDITS)
    assert len(set(found)) == len(found)
    for edit in found:
        assert edit.subject not in {e.subject for e in EDITS}
        assert set(edit.subject.split()) <= words
    assert set(begun(lm, found)) <= set(before)
    assert namesakes(lm, EDITS, before, random.Random(0), 2) == found


def test_a_subject_that_nothing_is_like_has_no_namesake(lm):
    assert namesakes(lm, EDITS[:1], [-1], random.Random(0), 1) == []


def test_nothing_has_drifted_at_first(lm):
    before = spoken(lm, EDITS)
    assert before.argmax(-1).tolist() == begun(lm, EDITS)
    for shown in Again(lm, places(lm, AT), EDITS, begun=True).drift("target", before):
        assert not shown.loss.any()


@pytest.mark.parametrize("rows", [16_384, 1])
def test_the_gradients_of_drift_are_those_of_the_divergence(lm, rows, monkeypatch):
    """By a nudge of the weights: g k^T, summed over tokens, is the gradient of the divergence, edit by edit."""
    monkeypatch.setattr(taps, "TOKENS", rows)
    sites, before = places(lm, AT), spoken(lm, EDITS)
    again = Again(lm, sites, EDITS, begun=True)
    draw = torch.Generator().manual_seed(0)
    moved = {s.name: 0.05 * torch.randn(s.shape, generator=draw) for s in sites}
    nudge = {s.name: torch.randn(s.shape, generator=draw) for s in sites}

    def divergences(by: float) -> torch.Tensor:
        with weights(sites, {n: moved[n] + by * nudge[n] for n in moved}):
            return (before.exp() * (before - spoken(lm, EDITS))).sum(-1)

    with weights(sites, moved):
        shown = list(again.drift("all", before))
    owner, loss = torch.cat([t.owner for t in shown]), torch.cat([t.loss for t in shown])
    torch.testing.assert_close(loss, divergences(0.0)[owner], atol=1e-5, rtol=1e-3)
    told = torch.zeros(len(EDITS))
    for name, way in nudge.items():
        G, K = (torch.cat([getattr(t, side)[name] for t in shown]) for side in "GK")
        told.index_add_(0, owner, ((G @ way) * K).sum(1))
    torch.testing.assert_close(told, (divergences(1e-3) - divergences(-1e-3)) / 2e-3, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("rows", [16_384, 1])
def test_what_edits_have_in_common_is_the_mean_of_those_of_one_answer(lm, rows, monkeypatch):
    monkeypatch.setattr(taps, "TOKENS", rows)
    edits = [replace(e, target="Wellington") for e in EDITS]  # of several tokens: the first counts
    likes, sites = Likes([7, 5, 7, 7, 9]), places(lm, AT)
    shown = list(likes.watched(Again(lm, sites, edits).taps("target")))
    assert sum(len(t.owner) for t in shown) > len(edits)
    for site in sites:
        first = torch.stack([tap(lm, sites, [e], "target").K[site.name][0] for e in edits]).double()
        mean = first[[0, 2, 3]].mean(0)
        torch.testing.assert_close(likes.moment(site.name), 3 * torch.outer(mean, mean), atol=1e-5, rtol=1e-4)


def test_edits_of_answers_of_their_own_have_nothing_in_common(lm):
    likes, sites = Likes([1, 2, 3, 4, 5]), places(lm, AT)
    list(likes.watched(Again(lm, sites, EDITS).taps("target")))
    assert not likes.moment(AT[0]).any()
