"""Filters make an update gentler and nothing else."""

import pytest
import torch

from errata import ErrataError, Patch, UsageError
from errata.changes import Codebook, Dense, LowRank
from errata.filters import bound_norm, keep_largest
from tests import tiny


@pytest.fixture
def lm():
    return tiny.lm("gpt2")


@pytest.fixture
def patch(lm):
    d_out, d_in = lm.site(1).shape
    torch.manual_seed(0)
    change = LowRank(torch.tensor([0, 1]), torch.randn(d_out, 2), torch.randn(2, d_in))
    return Patch({lm.site(1).name: (change,)}, tiny.EDITS[:2])


def delta(patch):
    ((change,),) = patch.changes.values()
    return change.delta


def test_the_entries_kept_are_those_that_change_their_weight_most(lm, patch):
    kept, whole = delta(keep_largest(patch, lm, 0.25)), delta(patch)
    relative = (whole / lm.site(1).weight).abs()
    chosen = kept != 0
    assert chosen.float().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(kept[chosen], whole[chosen])
    assert relative[chosen].min() >= relative[~chosen].max()


def test_keeping_everything_changes_nothing(lm, patch):
    assert torch.equal(delta(keep_largest(patch, lm, 1.0)), delta(patch))


def test_a_bound_holds_and_keeps_the_direction_and_the_kind(lm, patch):
    bounded = bound_norm(patch, lm, 0.1)
    assert float(delta(bounded).norm()) == pytest.approx(0.1 * float(lm.site(1).weight.detach().norm()), rel=1e-4)
    cosine = torch.cosine_similarity(delta(bounded).flatten(), delta(patch).flatten(), 0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)
    assert bounded.low_rank


def test_an_update_within_the_bound_stays(lm, patch):
    small = patch.scaled(1e-4)
    assert torch.equal(delta(bound_norm(small, lm, 0.1)), delta(small))


def test_filters_compose_and_apply(lm, patch):
    both = bound_norm(keep_largest(patch, lm, 0.5), lm, 0.05)
    ((change,),) = both.changes.values()
    assert isinstance(change, Dense)
    before = lm.site(1).weight.detach().clone()
    with both.applied(lm):
        moved = float((lm.site(1).weight.detach() - before).norm())
        assert moved == pytest.approx(0.05 * float(before.norm()), rel=1e-3)
    assert torch.equal(lm.site(1).weight, before)


def test_what_can_not_be_filtered_is_refused(lm, patch):
    with pytest.raises(UsageError, match="share of 0"):
        keep_largest(patch, lm, 0)
    d_out, d_in = lm.site(1).shape
    one = torch.zeros(1, dtype=torch.long)
    book = Codebook.of(one, torch.zeros(1, d_in), torch.zeros(1, d_out), torch.ones(1), one[None], one)
    with pytest.raises(ErrataError, match="nothing to filter"):
        keep_largest(Patch({lm.site(1).name: (book,)}), lm)
