from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from errata.tokens import Passage, passage
from errata.trace import beside, read, rewrite
from tests import tiny

TEXTS = ("The capital of Peru is Lima", "Yes", "Today we learn. People in New Zealand govern from Wellington")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_is_read_in_a_padded_batch_is_what_is_read_alone(architecture: str):
    """Pitfalls 2 and 3: in a padded batch of 7, every row reads its own token."""
    lm = tiny.lm(architecture)
    edits = [
        *tiny.EDITS,
        *(tiny.Edit(t + " {} is", s, "Lima") for t in ("Yes.", "It is known.") for s in ("Peru", "Sri Lanka")),
    ]
    names = [lm.blocks[1], lm.mlp_out(1).name, lm.mlp_out(2).name]
    together = lm.encode([passage(e) for e in edits])
    found = read(lm, names, together, torch.arange(7), together.subject)
    for i, edit in enumerate(edits):
        alone = lm.encode([passage(edit)])
        for name, parts in read(lm, names, alone, torch.tensor([0]), alone.subject).items():
            for x, y in zip(parts, found[name], strict=True):
                assert x.shape == (1, y.shape[1])
                torch.testing.assert_close(x[0], y[i], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_input_read_gives_the_output_read(architecture: str):
    lm = tiny.lm(architecture)
    batch = lm.encode([Passage(t) for t in TEXTS])
    site = lm.mlp_out(2)
    rows, cols = batch.mask.nonzero(as_tuple=True)
    k, v = read(lm, [site.name], batch, rows, cols)[site.name]
    torch.testing.assert_close(v, k @ site.weight.T + (site.module.bias if site.module.bias is not None else 0))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_rewrite_is_seen_by_what_comes_after(architecture: str):
    """Blocks that return a tuple, MLPs that see batch and sequence flattened: always (batch, seq, d)."""
    lm = tiny.lm(architecture)
    batch = lm.encode([Passage(t) for t in TEXTS])
    shape = (*batch.ids.shape, 64)
    for name in (lm.blocks[1], lm.mlp_out(1).name):
        seen = []

        def negate(output: torch.Tensor, seen: list = seen) -> torch.Tensor:
            seen.append(output.shape)
            return -output

        rows, cols = torch.arange(3), batch.last
        before = read(lm, [name], batch, rows, cols)[name][1]
        base = lm.logits(rows, cols, **batch.inputs)
        with rewrite(lm, name, 3, negate):
            _, after = read(lm, [name], batch, rows, cols)[name]
            assert not torch.allclose(lm.logits(rows, cols, **batch.inputs), base)
        torch.testing.assert_close(after, -before)
        assert set(seen) == {shape}
        assert torch.equal(lm.logits(rows, cols, **batch.inputs), base)


def test_reading_stops_after_the_last_module_asked_for():
    """Pitfall 12: no full pass where the needed layer is in the middle, and one pass for several layers."""
    lm = tiny.lm("llama")
    batch = lm.encode([Passage(t) for t in TEXTS])

    def flops(*layers: int) -> int:
        with FlopCounterMode(display=False) as counter:
            read(lm, [lm.mlp_out(i).name for i in layers], batch, torch.arange(3), batch.last)
        return counter.get_total_flops()

    assert flops(0) * 4 == flops(3) == flops(3, 0, 1, 2)


def test_hooks_are_gone_after_an_exception():
    lm = tiny.lm("gpt2")
    before = tiny.state(lm.model)
    batch = lm.encode([Passage("Yes")])

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    for inside in (rewrite(lm, lm.blocks[1], 1, fail), beside(lm.mlp_out(1).module, fail)):
        with pytest.raises(ZeroDivisionError), inside:
            read(lm, [lm.blocks[2]], batch, torch.tensor([0]), batch.last)
    assert tiny.differences(before, tiny.state(lm.model)) == []
