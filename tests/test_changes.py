from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from errata import ErrataError, Patch, Site
from errata.changes import Change, Codebook, Dense, LowRank, attach_rows, joined, routing, share, total
from errata.changes.routing import Index
from tests import tiny


def low_rank(d_out: int = 6, d_in: int = 4, rank: int = 1, owner: int = 0, seed: int = 0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    left, right = torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g)
    return LowRank(torch.full((rank,), owner), left, right)


def dense(d_out: int = 6, d_in: int = 4, owner: int = 0, seed: int = 0) -> Dense:
    return Dense(torch.tensor([owner]), torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)))


def entry(key: float | list[float], label: int, owner: int = 0, radius: float = 1.0, d_out: int = 6) -> Codebook:
    key = [key, 0.0, 0.0, 0.0] if isinstance(key, float) else key
    one = torch.zeros(1, dtype=torch.long)
    value = torch.full((1, d_out), float(owner))
    return Codebook.of(one + owner, torch.tensor([key]), value, torch.tensor([radius]), one[None] + label, one)


def site(bias: bool = True, dtype: torch.dtype = torch.float32) -> Site:
    torch.manual_seed(0)
    return Site("it", nn.Linear(4, 6, bias=bias, dtype=dtype))


class Rounded(nn.Linear):
    """A weight of integers with one scale, as a quantised model has."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.scale = linear.weight.abs().max().item() / 127
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


# Weights


@pytest.mark.parametrize("change", [low_rank(), dense()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_change_is_added_once_rounded_and_taken_back_to_the_bit(change: Any, dtype: torch.dtype):
    s = site(dtype=dtype)
    before = s.weight.clone()
    undo = change.attach(s)
    assert s.weight.dtype == dtype
    assert torch.equal(s.weight, (before.float() + change.delta).to(dtype))
    undo()
    assert tiny.same_bits(s.weight, before)


def test_undo_gives_back_what_subtracting_would_lose():
    s = site()
    before = s.weight.clone()
    undo = low_rank().scaled(1e8).attach(s)
    undo()
    assert tiny.same_bits(s.weight, before)


def test_conv1d_is_seen_the_same_way_round_as_linear():
    lm = tiny.lm("gpt2")
    s = lm.mlp_out(1)
    assert s.shape == (64, 256)
    change = low_rank(*s.shape)
    x = torch.randn(3, 256)
    base = s.module(x)
    undo = change.attach(s)
    torch.testing.assert_close(s.module(x) - base, x @ change.right.T @ change.left.T)
    undo()


def test_a_quantised_weight_takes_a_low_rank_change_beside_it():
    s = site()
    quantised = Site("it", Rounded(s.module))
    weight = quantised.weight.clone()
    x = torch.randn(2, 5, 4)
    base, change = quantised.module(x), low_rank(rank=2)
    assert not quantised.writable
    undo = change.attach(quantised)
    torch.testing.assert_close(quantised.module(x), base + x @ change.delta.T)
    assert torch.equal(quantised.weight, weight)
    undo()
    assert tiny.same_bits(quantised.module(x), base)


def test_changes_of_one_weight_add_up_and_one_that_answers_beside_it_makes_that_unknown():
    changes = [low_rank(rank=2), dense(seed=1)]
    torch.testing.assert_close(total(changes), (changes[0].delta + changes[1].delta).double())
    assert total([*changes, entry(0.0, 0)]) is None
    assert total([]) is None


def test_how_far_a_weight_moves_is_a_share_of_its_norm_and_unknown_of_a_quantised_one():
    s, delta = site(), dense().delta.double()
    assert share(delta, s) == pytest.approx(float(delta.norm() / s.weight.double().norm()))
    assert share(delta, Site("it", Rounded(s.module))) is None  # its integers are in another unit


def test_a_quantised_weight_refuses_a_dense_change():
    with pytest.raises(ErrataError, match="keeps its weight in a form of its own; only low-rank"):
        dense().attach(Site("it", Rounded(site().module)))


def test_a_change_in_every_row_equals_the_change_of_the_weight():
    s, x = site(), torch.randn(3, 5, 4)
    changes = [low_rank(seed=1), None, low_rank(rank=3, seed=2)]
    wanted = []
    for row, change in zip(x, changes, strict=True):
        undo = change.attach(s) if change else lambda: None
        wanted.append(s.module(row))
        undo()
    undo = attach_rows(s, changes)
    torch.testing.assert_close(s.module(x), torch.stack(wanted))
    torch.testing.assert_close(
        s.module(x.flatten(0, 1)), torch.stack(wanted).flatten(0, 1), msg="flattened, as OPT does"
    )
    undo()


def test_joined_weight_changes_are_their_sum():
    for a, b in ((low_rank(seed=1), low_rank(rank=2, owner=1, seed=2)), (dense(seed=1), dense(owner=1, seed=2))):
        (both,) = a.join(b)
        torch.testing.assert_close(both.delta, a.delta + b.delta)
        assert both.owners.tolist() == [*a.owners.tolist(), *b.owners.tolist()]


def test_changes_of_different_kinds_stay_in_their_order():
    kinds = [c.kind for c in joined([low_rank(), low_rank(), dense(), low_rank(), entry(0.0, 0), entry(9.0, 0)])]
    assert kinds == ["low-rank", "dense", "low-rank", "codebook"]


def test_taking_one_edit_out_of_a_low_rank_change_leaves_the_others():
    a, b = low_rank(seed=1), low_rank(rank=2, owner=1, seed=2)
    (both,) = a.join(b)
    assert torch.equal(both.without(0).delta, b.delta)
    assert torch.equal(both.without(1).delta, a.delta)
    assert both.without(0).without(1) is None


def test_one_edit_cannot_be_taken_out_of_a_dense_change_of_two():
    (both,) = dense(owner=0).join(dense(owner=1))
    with pytest.raises(ErrataError, match="one can't be taken out"):
        both.without(0)
    assert dense(owner=1).without(1) is None


def test_a_change_is_not_finite_when_one_number_is_not():
    """Pitfall 16."""
    for bad in (math.nan, math.inf):
        change = low_rank()
        change.left[0, 0] = bad
        assert low_rank().finite()
        assert not change.finite()


# The codebook


class Grace:
    """GRACE's algorithm 1 by its text, with lists: what the codebook is checked against."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(self, key: list[float], label: int, owner: int, radius: float) -> None:
        new = dict(key=key, label=label, value=owner, radius=radius, owners=[owner])
        near = min(self.entries, key=lambda e: math.dist(e["key"], key), default=None)
        if near is None or (d := math.dist(near["key"], key)) > near["radius"] + radius:
            self.entries.append(new)
        elif near["label"] == label:
            near["radius"] = max(near["radius"], d)
            near["owners"].append(owner)
        else:
            near["radius"], new["radius"] = d / 2 - 1e-5, d / 2
            self.entries.append(new)

    def answer(self, query: list[float]) -> int | None:
        near = min(self.entries, key=lambda e: math.dist(e["key"], query))
        return near["value"] if math.dist(near["key"], query) <= near["radius"] else None


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 2)),
        min_size=1,
        max_size=12,
        unique_by=lambda t: t[:2],
    ),
    st.integers(0, 99),
)
def test_codebooks_join_by_graces_rule(sequence: list[tuple[int, int, int]], seed: int):
    draw = random.Random(seed)
    ours, theirs = Patch(), Grace()
    for owner, (x, y, label) in enumerate(sequence):
        key = [x / 2 + draw.uniform(-0.1, 0.1), y / 2 + draw.uniform(-0.1, 0.1), 0.0, 0.0]
        theirs.add(key, label, owner, 1.0)
        ours += Patch({"it": (entry(key, label, 0).renumbered(lambda o: o),)}, (tiny.EDITS[0],))
    (book,) = ours.changes["it"]
    live = book.live
    assert [e["label"] for e in theirs.entries] == book.labels[live, 0].tolist()
    torch.testing.assert_close(book.keys[live], torch.tensor([e["key"] for e in theirs.entries]))
    torch.testing.assert_close(book.radii[live], torch.tensor([e["radius"] for e in theirs.entries]))
    assert [book.owners[book.entries == i].tolist() for i in live] == [e["owners"] for e in theirs.entries]


def test_a_measured_radius_is_neither_widened_nor_shared():
    """Where the balls of two such entries meet, the nearer answers; the same key again is the later one's."""
    fixed = torch.ones(1, dtype=torch.long)
    first, alike, other, again = (
        Codebook(**{**entry(key, label, owner=owner, radius=2.0).tensors(), "fixed": fixed})
        for key, label, owner in ((0.0, 1, 1), (1.0, 1, 2), (3.0, 2, 3), (3.0, 4, 4))
    )
    (book,) = joined([first, alike, other])
    assert isinstance(book, Codebook)
    assert book.radii.tolist() == [2.0, 2.0, 2.0]
    assert book.entries.tolist() == [0, 1, 2]
    (later,) = book.join(again)
    assert later.entries.tolist() == [0, 1, 3, 3]
    back = later.without(4)
    assert back is not None
    assert all(tiny.same_bits(x, y) for x, y in zip(back.tensors().values(), book.tensors().values(), strict=True))


def test_a_codebook_of_an_older_patch_has_radii_that_are_not_fixed():
    old = {k: t for k, t in entry(0.0, 1).tensors().items() if k != "fixed"}
    assert Codebook(**old).fixed.tolist() == [0]


def test_a_codebook_answers_within_its_radius_and_nowhere_else():
    s = site()
    (book,) = entry(0.0, 1, owner=7).join(entry(5.0, 2, owner=8, radius=0.5))
    x = torch.zeros(2, 4, 4)
    x[..., 0] = torch.tensor([[0.0, 0.9, 1.1, 2.0], [4.6, 4.4, 5.5, -1.0]])
    base = s.module(x)
    undo = book.attach(s)
    found = s.module(x)
    answered = torch.tensor([[7, 7, 0, 0], [8, 0, 8, 7]])
    torch.testing.assert_close(found, torch.where(answered[..., None] > 0, answered[..., None].float(), base))
    undo()
    assert tiny.same_bits(s.module(x), base)


def test_the_same_question_corrected_again_gets_the_later_answer():
    (book,) = entry(0.0, 1, owner=7).join(entry(0.0, 2, owner=8))
    s = site()
    book.attach(s)
    assert s.module(torch.zeros(1, 1, 4)).unique().tolist() == [8.0]


def test_labels_of_different_lengths_are_compared_as_wholes():
    short, long = entry(0.0, 3), entry(0.5, 3, owner=1)
    long = Codebook(**{**long.tensors(), "labels": torch.tensor([[3, 4]])})
    (book,) = short.join(long)
    assert len(book.live) == 2


def crowded(n: int, seed: int) -> list[Codebook]:
    """Entries so near each other that all of GRACE's rules are needed."""
    draw = random.Random(seed)
    return [entry([draw.gauss(0, 1.5) for _ in range(4)], draw.randrange(3), owner=i) for i in range(n)]


def fold(books: list[Codebook]) -> Codebook:
    (book,) = joined(books)
    assert isinstance(book, Codebook)
    return book


def equal(a: Codebook, b: Codebook) -> bool:
    return all(tiny.same_bits(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_codebooks_joined_in_any_grouping_are_the_same(seed: int):
    books = crowded(40, seed)
    whole = fold(books)
    assert 5 < len(whole.live) < 40
    for cut in (1, 13, 39):
        assert equal(fold([fold(books[:cut]), fold(books[cut:])]), whole)


@pytest.mark.parametrize("seed", range(5))
def test_an_edit_taken_out_of_a_codebook_is_as_if_it_had_never_been(seed: int):
    books = crowded(30, seed)
    for gone in (0, 11, 29):
        assert equal(fold(books).without(gone), fold(books[:gone] + books[gone + 1 :]))
    assert entry(0.0, 1).without(0) is None


def test_a_correction_of_a_correction_taken_out_gives_the_first_one_back():
    (book,) = entry(0.0, 1, owner=7).join(entry(0.0, 2, owner=8))
    s = site()
    book.without(8).attach(s)
    assert s.module(torch.zeros(1, 1, 4)).unique().tolist() == [7.0]


def test_every_row_of_a_batch_may_have_a_codebook_of_its_own():
    books = [entry(0.0, 1, owner=7), None, fold([entry(0.0, 1, owner=3), entry(5.0, 2, owner=4)])]
    s, x = site(), torch.randn(3, 6, 4)
    x[:, 1:3, 0], x[:, 1:3, 1:] = torch.tensor([0.3, 4.8]), 0.0
    wanted = []
    for row, book in zip(x, books, strict=True):
        undo = book.attach(s) if book else lambda: None
        wanted.append(s.module(row[None])[0])
        undo()
    undo = Codebook.attach_rows(s, books)
    assert tiny.same_bits(s.module(x), torch.stack(wanted))
    undo()


def test_the_nearest_of_many_keys_is_found_however_they_are_asked():
    torch.manual_seed(0)
    keys, queries = torch.randn(3000, 16) + 50, torch.randn(4, 8, 16) + 50  # far out, where products cancel
    index = Index([keys])
    distance, found = index.nearest(queries)
    exact = torch.cdist(queries.flatten(0, 1).double(), keys.double()).min(1)
    assert torch.equal(found.flatten(), exact.indices)
    torch.testing.assert_close(distance.flatten().double(), exact.values, rtol=1e-5, atol=0)
    alone = torch.stack([index.nearest(q[None, None])[0][0] for q in queries.flatten(0, 1)])
    assert tiny.same_bits(alone.flatten(), distance.flatten())


def test_how_much_is_searched_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    books = crowded(40, 7)
    x = torch.stack([b.keys[0] for b in books[:6]]).view(3, 2, 4)
    found = []
    for together in (routing.TOGETHER, 1):
        monkeypatch.setattr(routing, "TOGETHER", together)
        book, s, said = fold(books).without(39), site(), []
        for rows in ([book], [fold(books[:3]), None, fold(books[3:9])]):
            undo = Codebook.attach_rows(s, rows)
            said.append(s.module(x))
            undo()
        found.append((book, torch.stack(said)))
    (book, said), (again, same) = found
    assert equal(book, again)
    assert tiny.same_bits(said, same)
    assert not torch.equal(said[0], said[1])


def test_a_value_for_the_whole_prompt_goes_to_all_tokens_up_to_the_one_that_is_near():
    one = entry(0.0, 1, owner=7)
    book = Codebook(**{**one.tensors(), "whole": torch.ones(1, dtype=torch.long)})
    s, x = site(), torch.full((2, 5, 4), 9.0)
    x[0, 3] = 0.0
    base = s.module(x)
    book.attach(s)
    found = s.module(x)
    assert found[0, :4].unique().tolist() == [7.0]
    assert torch.equal(found[0, 4:], base[0, 4:])
    assert torch.equal(found[1], base[1])


def test_the_log_tells_which_entry_answered_and_how_near(caplog: pytest.LogCaptureFixture):
    s, x = site(), torch.full((1, 3, 4), 9.0)
    x[0, 1, :] = torch.tensor([0.25, 0, 0, 0])
    entry(0.0, 1, owner=7).attach(s)
    s.module(x)
    assert not caplog.records
    with caplog.at_level("DEBUG", logger="errata"):
        s.module(x)
    assert caplog.messages == ["it: row 0, token 1 is answered by 7, at 0.25 where the limit is 1"]


def test_show_says_of_every_edit_whose_key_answers_for_it_and_within_what():
    book = fold([entry(0.0, 1, owner=7), entry(1.5, 1, owner=8), entry(5.0, 2, owner=9)])
    said = ["edit 7: within 1.5 of edit 7's key", "edit 8: within 1.5 of edit 7's key"]
    assert book.told == [*said, "edit 9: within 1 of edit 9's key"]


def test_a_codebook_cannot_be_scaled():
    with pytest.raises(ErrataError, match="only weight changes can be scaled"):
        entry(0.0, 1).scaled(2.0)


@pytest.mark.parametrize("change", [low_rank(), dense(), entry(0.0, 1)])
def test_a_change_is_its_tensors(change: Change):
    again = Change.kinds[change.kind](**change.tensors())
    assert all(tiny.same_bits(a, b) for a, b in zip(change.tensors().values(), again.tensors().values(), strict=True))
    assert change.fits(site())
    assert not change.fits(Site("other", nn.Linear(6, 4)))
