"""Knowledge Neurons: which value slots are written, and with what."""

from __future__ import annotations

import pytest
import torch

from errata import KN, Edit
from errata.changes import LowRank
from tests import tiny

EDIT = tiny.EDITS[1]
FEW = ((3, 2),)


def written(patch) -> dict[str, LowRank]:
    return {name: change for name, (change,) in patch.changes.items()}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("edit", tiny.EDITS, ids=lambda e: e.subject)
def test_the_new_answer_becomes_likelier(architecture: str, edit: Edit):
    """Also with gated MLPs, whose neurons are as often negative as positive."""
    lm = tiny.trained(architecture)
    before = tiny.probability(lm, edit)
    with KN(lengths=FEW).edit(lm, [edit]).applied(lm):
        assert tiny.probability(lm, edit) > before


def test_only_a_few_value_slots_are_written():
    lm = tiny.trained("gpt2")
    changes = written(KN(lengths=FEW).edit(lm, [EDIT]))
    rows = torch.cat([c.right for c in changes.values()])
    assert 2 <= len(rows) <= 5
    assert torch.equal(rows.sum(1), torch.ones(len(rows)))
    assert torch.equal(rows.max(1).values, torch.ones(len(rows)))


def test_the_update_is_the_formula():
    """v <- v - t + 8 t', in lengths of v as in the authors' code, or of the embeddings as in the paper."""
    lm = tiny.trained("gpt2")
    head = lm.model.get_output_embeddings().weight.detach()
    t, new = (head[lm.tokenizer(f" {word}")["input_ids"][0]] for word in ("Wellington", "Oslo"))
    for name, change in written(KN(lengths=FEW).edit(lm, [EDIT])).items():
        long = (lm.site(name).weight.detach() @ change.right.T).norm(dim=0)
        want = (8 * new / new.norm() - t / t.norm())[:, None] * long
        signs = (change.left * want).sum(0, keepdim=True).sign()
        torch.testing.assert_close(change.left, want * signs, rtol=1e-4, atol=1e-6)
    plain = KN(lengths=FEW, unit="embedding", signed=False, erase=2.0, write=2.0)
    for change in written(plain.edit(lm, [EDIT])).values():
        torch.testing.assert_close(change.left, (2 * new - 2 * t)[:, None].expand_as(change.left), rtol=1e-4, atol=1e-6)


def test_a_neuron_below_zero_is_written_the_other_way():
    lm = tiny.trained("llama")
    one, other = (written(KN(lengths=FEW, signed=signed).edit(lm, [EDIT])) for signed in (True, False))
    turned = [torch.allclose(one[n].left, -other[n].left) for n in one if len(one[n].owners) == 1]
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[n].left, other[n].left) for n in one)
    assert all(torch.equal(one[n].left.abs(), other[n].left.abs()) for n in one), turned


def test_the_old_answer_is_the_models_own_unless_it_is_named():
    lm = tiny.trained("gpt2")
    silent = KN(lengths=FEW).edit(lm, [EDIT])
    named = KN(lengths=FEW).edit(lm, [Edit(EDIT.prompt, EDIT.subject, EDIT.target, "Wellington")])
    other = KN(lengths=FEW).edit(lm, [Edit(EDIT.prompt, EDIT.subject, EDIT.target, "Paris")])
    assert all(torch.equal(c.left, written(named)[n].left) for n, c in written(silent).items())
    assert any(
        n not in written(other) or not torch.equal(c.left, written(other)[n].left) for n, c in written(silent).items()
    )


def test_settings_are_the_papers_for_every_model():
    """No warning about a model without a preset: neurons are looked for in every layer."""
    assert KN.preset(tiny.lm("llama")) == KN()
