"""Whitened inputs are white; an update means the same seen from either side; made-up subjects are nobody's."""

from __future__ import annotations

import random

import pytest
import torch

from errata.parts.basis import Basis, strangers
from errata.parts.taps import places, tap
from tests import tiny


@pytest.fixture(scope="module")
def found():
    lm = tiny.trained("llama")
    with lm.frozen():
        sites = places(lm, ["model.layers.1.mlp.down_proj"])
        taps = tap(lm, sites, [c.edit for c in tiny.cases()])
    basis = Basis(sites)
    basis.fit(taps.K)
    return basis, taps, sites[0].name


def test_inputs_are_seen_with_a_moment_of_one(found):
    """Up to the ridge, where the moment is large: there are few directions that many tokens share."""
    basis, taps, name = found
    x = basis.seen(taps).K[name]
    raw = torch.linalg.eigvalsh(taps.K[name].T @ taps.K[name] / len(x))
    seen = torch.linalg.eigvalsh(x.T @ x / len(x))
    assert seen.max() < 1.01
    assert seen.max() / seen.mean() < 0.5 * raw.max() / raw.mean()


def test_an_update_does_the_same_to_seen_inputs_as_its_other_form_to_the_inputs(found):
    basis, taps, name = found
    update = torch.randn(5, taps.K[name].shape[1], generator=torch.Generator().manual_seed(0))
    there = basis.seen(taps).K[name] @ update.T
    torch.testing.assert_close(taps.K[name] @ basis.out(name, update).T, there, atol=1e-3, rtol=1e-3)


def test_an_unfitted_basis_and_none_change_nothing(found):
    _, taps, name = found
    lm = tiny.trained("llama")
    for basis in (Basis(()), Basis(places(lm, [name]))):
        assert torch.equal(basis.seen(taps).K[name], taps.K[name])
        assert torch.equal(basis.out(name, taps.K[name]), taps.K[name])


def test_strangers_have_the_words_of_the_cases_and_their_prompts():
    cases = tiny.cases()
    words = {word for c in cases for word in c.edit.subject.split()}
    for edit in strangers(cases, random.Random(0), n=20):
        assert set(edit.subject.split()) <= words
        assert edit.prompt in {c.edit.prompt for c in cases}
