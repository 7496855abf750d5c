"""What a model gets that nobody tuned for: the same edit, whatever units its numbers are in.

Two rescalings leave everything a model says as it was: the MLP's inner units by c, its write matrix by 1/c; and all
that the residual stream is made of by c, where a norm stands before everything that reads it. By powers of two they are
exact.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import errata
from errata import LM, Method
from tests import tiny

DEFAULTS = ("ft-m", "ft-l", "lora", "ultraedit", "grace", "melo", "wise")
EDIT = tiny.EDITS[1]


def default(name: str, lm: LM, corpus: str) -> Method:
    own = {"corpus": corpus} if name in ("grace", "melo", "wise") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is published for it
        return errata.methods()[name].preset(lm, **own)


@torch.no_grad()
def inner(lm: LM) -> None:
    """The MLPs' inner units are 8 times as large."""
    for layer in range(len(lm.blocks)):
        mlp = lm.module(f"{lm.blocks[layer]}.mlp")
        mlp.up_proj.weight *= 8
        mlp.down_proj.weight /= 8


@torch.no_grad()
def stream(lm: LM) -> None:
    """The residual stream is 8 times as large."""
    lm.model.get_input_embeddings().weight *= 8
    for layer in range(len(lm.blocks)):
        block = lm.module(lm.blocks[layer])
        block.mlp.down_proj.weight *= 8
        block.self_attn.o_proj.weight *= 8


def unnormed(lm: LM) -> LM:
    """With next to nothing of the little number that norms add to a square, which has units."""
    for module in lm.model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-30
    return lm


def test_a_step_along_the_gradient_is_as_long_as_adams_first():
    lm = tiny.lm("llama")
    sizes = []
    for descent in ("adam", "gradient"):
        (change,) = errata.FTM(layers=(1,), steps=1, rate=1e-3, descent=descent).edit(lm, [EDIT]).changes.values()
        sizes.append(float(change[0].delta.norm()))
    wanted = 1e-3 * lm.site(1).module.weight.numel() ** 0.5
    assert sizes[0] == pytest.approx(wanted, rel=1e-2)  # Adam adds 1e-8 to every entry's size
    assert sizes[1] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("rescale", [inner, stream])
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_makes_the_same_edit_in_any_units(name: str, rescale, corpus_file: str):
    if name == "lora":
        pytest.importorskip("peft")
    plain, scaled = unnormed(tiny.trained("llama")), unnormed(tiny.trained("llama"))
    rescale(scaled)
    texts = [EDIT.text, "New Zealand has its capital at", tiny.EDITS[0].text, "People in Peru govern from"]
    said = []
    for lm in (plain, scaled):
        before = tiny.logits(lm, *texts)
        with default(name, lm, corpus_file).edit(lm, [EDIT]).applied(lm):
            after = tiny.logits(lm, *texts)
        assert (after[0] - before[0]).abs().max() > 0.1
        said.append(after.softmax(-1))
    # Adam adds 1e-8 to the root of a square that has the gradient's units
    torch.testing.assert_close(*said, atol=1e-3, rtol=0)
