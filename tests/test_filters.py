"""Filters make an update gentler and nothing else."""

import pytest
import torch

from errata import ErrataError, Patch, UsageError
from errata.changes import Codebook, Dense, LowRank
from errata.filters import bound_norm, keep_largest, restrain
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


def test_singular_values_of_all_updates_together_are_restrained_to_the_weights(lm, patch):
    most = torch.linalg.matrix_norm(lm.site(1).weight.detach(), 2)
    prior, later = patch.scaled(0.7), patch.scaled(0.3)
    before, whole = torch.linalg.svdvals(delta(patch)), delta(prior) + delta(restrain(later, lm, prior, 1.5))
    assert before[0] > 2 * most > 0  # there is something to restrain
    log = before / most
    wanted = torch.where(before > most, most + log.log() / torch.tensor(1.5).log(), before)
    torch.testing.assert_close(torch.linalg.svdvals(whole), wanted, atol=1e-4, rtol=1e-4)  # float32 SVD


def test_what_is_within_the_weights_singular_values_stays_to_the_bit(lm, patch):
    small = patch.scaled(1e-3)
    assert restrain(small, lm, small).changes == small.changes


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
    with pytest.raises(UsageError, match="base 1"):
        restrain(patch, lm, patch, 1)
    d_out, d_in = lm.site(1).shape
    one = torch.zeros(1, dtype=torch.long)
    book = Codebook.of(one, torch.zeros(1, d_in), torch.zeros(1, d_out), torch.ones(1), one[None], one)
    with pytest.raises(ErrataError, match="nothing to filter"):
        keep_largest(Patch({lm.site(1).name: (book,)}), lm)
