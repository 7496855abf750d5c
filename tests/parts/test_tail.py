"""What comes behind an MLP is seen by running the block, whatever the model calls it."""

from __future__ import annotations

import pytest
import torch

from errata.parts.tail import Tail, tail, writes_plainly
from errata.tokens import passage
from errata.trace import read, rewrite
from tests import tiny

LAYER = 1


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES | tiny.BEHIND_THE_MLP)
def test_what_stands_behind_the_mlp_is_noticed(architecture: str):
    lm = tiny.lm(architecture)
    plain = writes_plainly(lm, LAYER, lambda: lm.encode([passage(e) for e in tiny.EDITS]))
    assert plain == (architecture not in tiny.BEHIND_THE_MLP)


@pytest.mark.parametrize("architecture", ["gptj", "gemma3", "olmo2", "granite"])
def test_the_change_of_a_blocks_output_is_that_of_a_whole_pass(architecture: str):
    """Also of prompts of several lengths, in a block that returns a tuple (GPT-J)."""
    lm = tiny.lm(architecture)
    batch = lm.encode([passage(e) for e in tiny.EDITS])
    batch = batch.until(batch.subject)
    at = torch.arange(len(batch)), batch.subject
    site, block = lm.mlp_out(LAYER).name, lm.blocks[LAYER]
    more = torch.randn(len(batch), lm.d_model, generator=torch.Generator().manual_seed(0))

    def write(output: torch.Tensor) -> torch.Tensor:
        output[at] += more
        return output

    with torch.no_grad(), rewrite(lm, site, len(batch), write):
        wanted = read(lm, [block], batch, *at)[block][1]
    before = read(lm, [block], batch, *at)[block][1]
    with torch.no_grad():
        got = Tail(lm, LAYER, batch)(more)
    assert torch.allclose(got, wanted - before, atol=1e-5)  # float32, values of about 1


def test_a_change_is_shortened_by_what_the_block_makes_of_it():
    lm = tiny.trained("gemma3")
    after = tail(lm, lm.mlp_out(LAYER).name, lambda: lm.encode([passage(e) for e in tiny.EDITS]))
    assert after is not None
    more = 50 * torch.randn(len(tiny.EDITS), lm.d_model, generator=torch.Generator().manual_seed(0))
    felt = after(more).detach().norm(dim=1)
    most = torch.stack([0.5 * felt[0], 0.1 * felt[1], 2 * felt[2]])
    short = after.within(more, most)
    assert torch.allclose(after(short).norm(dim=1)[:2], most[:2], rtol=2e-3)  # `within` ends at 0.999 of a step
    assert torch.equal(short[2], more[2])
    assert (torch.cosine_similarity(short, more) > 0.9999).all()


def test_only_a_write_matrix_with_something_behind_it_has_a_tail():
    lm, plain = tiny.lm("gemma3"), tiny.lm("llama")

    def prompts(of):
        return lambda: of.encode([passage(e) for e in tiny.EDITS])

    assert tail(lm, lm.mlp_out(LAYER).name, prompts(lm)) is not None
    assert tail(lm, lm.blocks[LAYER], prompts(lm)) is None
    assert tail(plain, plain.mlp_out(LAYER).name, prompts(plain)) is None
