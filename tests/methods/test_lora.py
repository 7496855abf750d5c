from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from errata import ErrataError, LoRA, Patch, UsageError
from tests import tiny

pytest.importorskip("peft")
A = tiny.EDITS[0]


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_the_patch_is_what_the_adapter_was(kind: Any, monkeypatch: pytest.MonkeyPatch):
    """Asked while PEFT's own layers still stand in the model."""
    lm, seen, train = tiny.lm("gpt2"), [], LoRA._train
    monkeypatch.setattr(LoRA, "_train", lambda *a: (train(*a), seen.append(tiny.logits(lm, A.text)))[0])
    method = LoRA(kind=kind, layers=(1, 2), rank=4, steps=12, rate=2e-2)
    patch = method.edit(lm, [A])
    with patch.applied(lm):
        torch.testing.assert_close(tiny.logits(lm, A.text), seen[0], atol=1e-4, rtol=1e-4)
    assert patch.low_rank
    ranks = [changes[0].left.shape[1] for changes in patch.changes.values()]  # pyright: ignore
    assert sum(ranks) == 8 if kind == "lora" else sum(ranks) <= 8


def test_the_model_comes_back_when_training_fails(monkeypatch: pytest.MonkeyPatch):
    lm = tiny.lm("llama")
    before, modules = tiny.state(lm.model), dict(lm.model.named_modules())
    monkeypatch.setattr(LoRA, "_train", lambda *_: 1 / 0)
    for kind in ("lora", "adalora"):
        with pytest.raises(ZeroDivisionError):
            LoRA(kind=kind, modules=("q_proj", "v_proj")).edit(lm, [A])
        assert tiny.differences(before, tiny.state(lm.model)) == []
        assert all(a is b for a, b in zip(modules.values(), lm.model.modules(), strict=True))
        assert not hasattr(lm.model, "peft_config")


def test_one_edit_can_be_taken_out():
    lm = tiny.lm("llama")
    method = LoRA(layers=(1,), rank=2, steps=2)
    first = method.edit(lm, [A])
    both = method.edit(lm, [tiny.EDITS[1]], first)
    left = both.without(tiny.EDITS[1])
    (name,) = left.changes
    assert left.edits == (A,)
    assert all(
        tiny.same_bits(x, y)
        for x, y in zip(
            left.changes[name][0].tensors().values(), first.changes[name][0].tensors().values(), strict=True
        )
    )


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    found = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ErrataError, match=r"needs PEFT, which is not installed; pip install"):
        LoRA().edit(tiny.lm(), [A])


def test_what_can_not_be_adapted_is_said():
    lm = tiny.lm("llama")
    with pytest.raises(UsageError, match=r"no linear module named c_attn; it has .*q_proj"):
        LoRA(modules=("c_attn",)).edit(lm, [A])
    with pytest.raises(UsageError, match="has layers 0 to 3, not 9"):
        LoRA(layers=(9,)).edit(lm, [A])
    with pytest.raises(UsageError, match="of 4 steps none are left"):
        LoRA(kind="adalora", steps=4, warm=2, final=2).edit(lm, [A])
    assert isinstance(LoRA(layers=(1,), rank=1, steps=1).edit(lm, [A]), Patch)
