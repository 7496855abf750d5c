from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from errata import ErrataError, Site
from errata.changes import Blocks, Change, SideMemories, joined, ties
from tests import tiny


def site() -> Site:
    torch.manual_seed(0)
    return Site("it", nn.Linear(4, 6))


def block(key: float | list[float], label: int, owner: int = 0, radius: float = 1.0, rank: int = 1) -> Blocks:
    """One point, whose block adds `owner` to every output for an input of ones."""
    one, key = torch.tensor([owner]), [key, 0.0, 0.0, 0.0] if isinstance(key, float) else key
    left, right = torch.full((1, 6, rank), float(owner)), torch.full((1, rank, 4), 0.25 / rank)
    return Blocks.of(one, torch.tensor([key]), torch.tensor([radius]), one[None] * 0 + label, one * 0, left, right)


def fold(parts: list[Blocks]) -> Blocks:
    (made,) = joined(parts)
    assert isinstance(made, Blocks)
    return made


def crowded(n: int, seed: int) -> list[Blocks]:
    draw = random.Random(seed)
    return [block([draw.gauss(0, 1.0) for _ in range(4)], draw.randrange(3), owner=i) for i in range(n)]


def equal(a: Blocks | None, b: Blocks) -> bool:
    return a is not None and all(
        tiny.same_bits(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True)
    )


def answers(memory: Change | None, *keys: float) -> list[float]:
    """What is added for each key, a multiple of the owner's number by the key's size."""
    s, x = site(), torch.zeros(1, len(keys), 4)
    x[0, :, 0] = torch.tensor(keys)
    base = s.module(x)
    if memory is not None:
        memory.attach(s)
    return [round(float(y[0].detach() / (k or 1) * 4), 3) for y, k in zip((s.module(x) - base)[0], keys, strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_blocks_joined_in_any_grouping_are_the_same(seed: int):
    parts = crowded(40, seed)
    whole = fold(parts)
    assert 5 < len(whole.live) < 40
    for cut in (1, 13, 39):
        assert equal(fold([fold(parts[:cut]), fold(parts[cut:])]), whole)


@pytest.mark.parametrize("seed", range(4))
def test_an_edit_taken_out_is_as_if_it_had_never_been(seed: int):
    parts = crowded(30, seed)
    for gone in (0, 11, 29):
        assert equal(fold(parts).without(gone), fold(parts[:gone] + parts[gone + 1 :]))
    assert block(1.0, 1).without(0) is None


def test_a_measured_radius_is_neither_widened_nor_shared():
    """Where two such clusters reach, the nearer answers; the same key again is the later one's."""
    fixed = torch.ones(1, dtype=torch.long)
    parts = [
        Blocks(**{**block(key, label, owner=owner, radius=2.0).tensors(), "fixed": fixed})
        for key, label, owner in ((1.0, 1, 1), (2.0, 1, 2), (4.0, 2, 3), (4.0, 5, 4))
    ]
    memory = fold(parts[:3])
    assert memory.radii.tolist() == [2.0, 2.0, 2.0]
    assert answers(memory, 1.0, 2.0, 4.0) == [1.0, 2.0, 3.0]
    later = fold(parts)
    assert answers(later, 1.0, 2.0, 4.0) == [1.0, 2.0, 4.0]
    assert equal(later.without(4), memory)


def test_a_block_works_within_its_clusters_radius_and_nowhere_else():
    memory = fold([block(2.0, 1, owner=7), block(8.0, 2, owner=8, radius=0.5)])
    assert answers(memory, 2.0, 2.9, 3.1, 7.6, 7.4, 8.5) == [7, 7, 0, 8, 0, 8]


def test_a_near_key_with_the_same_label_moves_the_centre_and_keeps_its_own_block():
    memory = fold([block(2.0, 1, owner=7), block(3.0, 1, owner=8)])
    assert len(memory.live) == 1
    assert memory.centres[0, 0] == 2.5
    assert answers(memory, 1.6, 2.4, 2.6, 3.4, 3.6) == [7, 7, 8, 8, 0]


def test_a_near_key_with_another_label_shares_the_distance():
    memory = fold([block(2.0, 1, owner=7), block(3.0, 2, owner=8)])
    assert len(memory.live) == 2
    assert answers(memory, 1.4, 1.6, 2.4, 2.6, 3.4, 3.6) == [0, 7, 7, 8, 8, 0]


def test_the_same_question_corrected_again_gets_the_later_answer_and_gives_it_back():
    memory = fold([block(2.0, 1, owner=7), block(2.0, 2, owner=8)])
    assert answers(memory, 2.0, 2.5) == [8, 8]
    assert answers(memory.without(8), 2.0, 2.5) == [7, 7]


def test_a_cluster_that_shrinks_forgets_the_members_it_no_longer_reaches():
    memory = fold([block(2.0, 1, owner=7), block(3.0, 1, owner=8), block(2.6, 2, owner=9)])
    assert memory.clusters.tolist() == [-1, -1, 2]
    assert answers(memory, 2.0, 2.6, 3.0) == [0, 9, 0]
    assert answers(memory.without(9), 2.0, 2.6, 3.0) == [7, 8, 8]


def test_blocks_of_different_ranks_live_together():
    memory = fold([block(2.0, 1, owner=7, rank=1), block(8.0, 2, owner=8, rank=3)])
    assert answers(memory, 2.0, 8.0) == [7, 8]


def test_every_row_of_a_batch_may_have_blocks_of_its_own():
    rows = [block(1.0, 1, owner=7), None, fold([block(1.0, 1, owner=3), block(5.0, 2, owner=4, rank=2)])]
    s, x = site(), torch.randn(3, 6, 4)
    x[:, 1:3, 0], x[:, 1:3, 1:] = torch.tensor([1.3, 4.8]), 0.0
    wanted = []
    for row, memory in zip(x, rows, strict=True):
        undo = memory.attach(s) if memory else lambda: None
        wanted.append(s.module(row[None])[0])
        undo()
    undo = Blocks.attach_rows(s, rows)
    torch.testing.assert_close(s.module(x), torch.stack(wanted))
    torch.testing.assert_close(s.module(x.flatten(0, 1)), torch.stack(wanted).flatten(0, 1), msg="flattened")
    undo()
    assert not s.module._forward_hooks


def test_the_log_tells_whose_block_answered_and_how_near(caplog: pytest.LogCaptureFixture):
    memory = fold([block(2.0, 1, owner=7), block(8.0, 2, owner=8)])
    with caplog.at_level("DEBUG", logger="errata"):
        answers(memory, 5.0, 8.25)
    assert caplog.messages == ["it: row 0, token 1 is answered by 8, at 0.25 where the limit is 1"]


def test_show_says_of_every_edit_which_block_answers_and_within_what():
    memory = fold([block(2.0, 1, owner=7), block(3.0, 1, owner=8), block(2.6, 2, owner=9)])
    lost = "out of reach since a later edit shrank its cluster"
    assert memory.told == [f"edit 7: {lost}", f"edit 8: {lost}", "edit 9: block 2, within 0.05001 of edit 9's cluster"]
    assert memory.without(9).told[1] == "edit 8: block 1, within 1 of edit 7's cluster"


# Side memories


def side(scale: float, owner: int = 0, threshold: float = 1.0, replaces: int = 0) -> SideMemories:
    """A memory that adds `scale` times the input's first entry to every output."""
    delta = torch.zeros(1, 6, 4)
    delta[..., 0] = scale
    one = torch.tensor([1])
    return SideMemories(one * owner, one * 0, delta, torch.tensor([threshold]), one, one * replaces)


def both(a: SideMemories, b: SideMemories) -> SideMemories:
    (made,) = a.join(b)
    assert isinstance(made, SideMemories)
    return made


def test_a_token_gets_the_memory_that_moves_it_most_among_those_it_is_moved_by_enough():
    memory = both(side(1.0, 0, threshold=1.0), side(-2.0, 1, threshold=20.0))
    assert answers(memory, 0.3, 1.0, 3.0, 5.0) == [0, 4, 4, -8]  # moved by 0.7, 2.4, 7.3 and 12.2, or twice that


def test_a_memory_that_was_written_on_takes_the_place_of_what_it_was():
    first = side(1.0, owner=0)
    written = both(first, side(3.0, owner=1, replaces=1))
    assert written.deltas[:, 0, 0].tolist() == [3.0]
    assert written.memory.tolist() == [0, 0]
    apart = both(written, side(5.0, owner=2, replaces=9))  # written on something else
    assert apart.deltas[:, 0, 0].tolist() == [3.0, 5.0]
    assert apart.memory.tolist() == [0, 0, 1]


def test_only_an_edit_that_has_a_side_memory_to_itself_can_be_taken_out():
    memory = both(both(side(1.0, 0), side(3.0, 1, replaces=1)), side(5.0, 2))
    with pytest.raises(ErrataError, match="shares a side memory"):
        memory.without(0)
    left = memory.without(2)
    assert left is not None
    assert left.deltas[:, 0, 0].tolist() == [3.0]
    assert side(1.0, 0).without(0) is None


def test_every_row_of_a_batch_may_have_side_memories_of_its_own():
    rows = [side(1.0, 0), None, both(side(2.0, 0), side(-3.0, 1))]
    s, x = site(), torch.randn(3, 6, 4)
    wanted = []
    for row, memory in zip(x, rows, strict=True):
        undo = memory.attach(s) if memory else lambda: None
        wanted.append(s.module(row[None])[0])
        undo()
    undo = SideMemories.attach_rows(s, rows)
    torch.testing.assert_close(s.module(x), torch.stack(wanted))
    undo()


def test_show_says_of_every_edit_in_which_memory_it_is_and_from_what_gap_that_answers():
    assert both(side(1.0, 0), side(5.0, 2, threshold=2.5)).told == [
        "edit 0: memory 0, which answers what it moves by more than 1",
        "edit 2: memory 1, which answers what it moves by more than 2.5",
    ]


def test_ties_trims_elects_a_sign_and_averages_those_that_agree():
    deltas = torch.tensor([[[4.0, -3.0, 0.1, 2.0]], [[2.0, 5.0, 3.0, -0.1]]])
    weights = torch.tensor([0.5, 0.5])
    assert ties(deltas, weights, density=0.75).tolist() == [[3.0, 5.0, 3.0, 2.0]]
    assert ties(deltas, weights, density=1.0).tolist()[0][2] == pytest.approx(1.55)
    assert ties(deltas[:1], weights[:1], density=1.0).tolist() == deltas[0].tolist()
