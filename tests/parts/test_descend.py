"""A search that nothing pulls at is an error, and no patch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import errata
from errata import Edit, ErrataError
from errata.method import method
from errata.parts.descend import pull
from tests import tiny


class Cut(nn.Linear):
    """As a packed 4-bit layer on a CPU: an operator without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def cut(lm: errata.LM, head: bool) -> errata.LM:
    """All linear maps of the blocks, and perhaps the head."""
    for name, old in list(lm.model.named_modules()):
        if isinstance(old, nn.Linear) and (head or ".layers." in name):
            home, _, last = name.rpartition(".")
            new = Cut(old.in_features, old.out_features, bias=False)
            new.weight = old.weight
            setattr(lm.model.get_submodule(home), last, new)
    return lm


SUBJECT = ("rome", "memit", "pmet", "alphaedit")


@pytest.mark.parametrize("name", [*SUBJECT, "ft", "ft-m", "ft-l", "grace", "melo", "wise", "ultraedit", "kn"])
def test_a_model_that_passes_no_gradient_on_is_refused(name: str, corpus_file: str):
    """Where it is the subject that is edited, only attention could carry the gradient there."""
    lm = cut(tiny.lm("llama"), head=name not in SUBJECT)
    how = tiny.small_settings(method(name), lm, corpus_file)
    with pytest.raises(ErrataError, match="passes no gradient on"):
        how.edit(lm, [Edit("The capital of {} is", "France", "Lima")])


def test_each_loss_is_to_pull_at_its_own_row():
    lm, x = tiny.lm("llama"), torch.ones(3, 2, requires_grad=True)
    pull(lm, (x * torch.tensor([[1.0], [2.0], [0.0]])).sum(1), [x])
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1], [2, 2], [0, 0]]
    x.grad = None
    with pytest.raises(ErrataError, match="passes no gradient on"):
        pull(lm, (x * torch.tensor([[1.0], [2.0], [0.0]])).sum(1) + 1, [x])


def test_a_loss_that_is_as_good_as_zero_may_rest():
    x = torch.ones(2, requires_grad=True)
    pull(tiny.lm("llama"), (0 * x).sum(), [x])
