"""The normaliser is exact however its rows come; a new network changes nothing."""

from __future__ import annotations

import pytest
import torch

from errata.parts.hyper import Layer, Normaliser


@pytest.mark.parametrize("sizes", [(7, 1, 1, 4), (1, 12), (13,)])
def test_statistics_do_not_depend_on_how_the_rows_come(sizes):
    """One row at a time too, where a variance taken by the batch would be nan."""
    x = torch.randn(13, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    one = Normaliser(5)
    for part in x.split(list(sizes)):
        one.update(part)
    torch.testing.assert_close(one(x), (x - x.mean(0)) / x.std(0), atol=1e-5, rtol=1e-5)


def test_one_row_says_nothing_and_gives_no_nan():
    one, x = Normaliser(3), torch.randn(1, 3)
    one.update(x)
    assert torch.equal(one(x), torch.zeros(1, 3))


@pytest.mark.parametrize("first", ["scale", "relu"])
def test_a_new_layer_is_the_identity(first):
    y = torch.randn(4, 6)
    assert torch.equal(Layer(6, 3, 2, first)(y, 1), y)
