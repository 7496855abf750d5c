"""What errata could not edit rightly is refused at once, in a sentence, and nothing is left changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import errata
from errata import LM, Edit, ErrataError, Patch, Probe, UsageError
from errata.ask import ask
from errata.changes import LowRank
from errata.method import method
from errata.tokens import follow
from tests import tiny
from tests.architectures import build

EDIT = Edit("The capital of {} is", "France", "Lima")


class Front(Tensor):
    """A tensor that stands for others, as DTensor or torchao's do."""

    @staticmethod
    def __new__(cls, t: Tensor) -> Front:
        return Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(str(func))


def part(model: Any) -> nn.Module:
    return model.model.layers[1].mlp.down_proj


def offload(model: Any) -> None:
    part(model).weight = nn.Parameter(part(model).weight.to("meta"))


def take_apart(model: Any) -> None:
    part(model).weight = nn.Parameter(torch.empty(0))


def front(model: Any) -> None:
    part(model).weight = nn.Parameter(Front(part(model).weight), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (offload, "layers.1.mlp.down_proj.weight not in memory but offloaded"),
        (take_apart, "layers.1.mlp.down_proj.weight empty here"),
        (front, "layers.1.mlp.down_proj.weight as a Front of tests"),
    ],
)
def test_weights_that_are_not_here_as_numbers_are_refused_by_name(change: Callable[[Any], None], told: str):
    lm = tiny.lm("llama")
    change(lm.model)
    with pytest.raises(ErrataError, match=told):
        errata.GRACE(at=1, steps=1).edit(lm, [EDIT])
    with pytest.raises(ErrataError, match=told), patch(lm).applied(lm):
        pass


def test_what_is_no_causal_model_is_refused():
    lm = tiny.lm("llama")
    with pytest.raises(UsageError, match=r"not a DataParallel; give the model inside it"):
        LM(nn.DataParallel(lm.model), lm.tokenizer)
    with pytest.raises(ErrataError, match="has no language-modelling head"):
        LM(lm.model.model, lm.tokenizer)
    t5 = T.T5ForConditionalGeneration(T.T5Config(vocab_size=600, d_model=32, d_ff=64, num_layers=1, num_heads=2))
    with pytest.raises(ErrataError, match="reads by an encoder and answers by a decoder"):
        LM(t5, lm.tokenizer)


LOOKED_AT: dict[str, Callable[[LM], Any]] = {
    "edit": lambda lm: errata.GRACE(at=1, steps=1).edit(lm, [EDIT]),
    "ask": lambda lm: ask(lm, [Probe("efficacy", EDIT.text, EDIT.target)]),
    "generate": lambda lm: lm.generate("The capital of France is", 3),
}


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "prophetnet"])
@pytest.mark.parametrize("work", LOOKED_AT)
def test_a_model_that_looks_ahead_is_refused(kind: str, work: str):
    lm = build(kind)
    before = tiny.state(lm.model)
    with pytest.raises(ErrataError, match="does not answer token by token: what it says of a text changes"):
        LOOKED_AT[work](lm)
    assert tiny.differences(before, tiny.state(lm.model)) == []


def test_an_encoder_that_reads_as_a_decoder_is_taken():
    lm = build("bert", is_decoder=True)
    patch = errata.GRACE(at=1, steps=20).edit(lm, [EDIT])
    before = tiny.probability(lm, EDIT)
    with patch.applied(lm):
        assert tiny.probability(lm, EDIT) > before


COMPILED: dict[str, Callable[[Any], Any]] = {
    "a wrapper": lambda model: torch.compile(model, backend="eager"),
    "whole": lambda model: model.compile(backend="eager"),
    "a block": lambda model: model.model.layers[2].compile(backend="eager"),
    "its forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
    "a part in its place": lambda model: setattr(
        model.model.layers[2], "mlp", torch.compile(model.model.layers[2].mlp, backend="eager")
    ),
}


def patch(lm: LM) -> Patch:
    change = LowRank(torch.zeros(1).long(), torch.ones(64, 1), torch.ones(1, 160))
    return Patch({lm.mlp_out(1).name: (change,)}, (EDIT,))


WORK: dict[str, Callable[[LM], Any]] = {
    "edit": lambda lm: errata.GRACE(at=1, steps=1).edit(lm, [EDIT]),
    "apply": lambda lm: patch(lm).apply(lm),
    "ask": lambda lm: lm.said(lm.encode([follow("The capital of France is", "Lima")])),
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_says_what_it_says_and_is_not_worked_on(how: str, work: str):
    """torch.compile does not see hooks that come later: a memory would be applied, and do nothing."""
    lm = tiny.lm("llama")
    wanted = lm.generate("The capital of France is", 3)
    made = COMPILED[how](lm.model)
    lm = LM(lm.model if made is None else made, lm.tokenizer)
    before = tiny.state(lm.model)
    assert lm.generate("The capital of France is", 3) == wanted
    with pytest.raises(ErrataError, match="while (it|its part .*) is compiled"):
        WORK[work](lm)
    assert tiny.differences(before, tiny.state(lm.model)) == []


def test_a_module_that_is_never_called_is_noticed():
    """A fused kernel takes the weight and leaves the module out."""
    lm = tiny.lm("llama")
    mlp = lm.model.model.layers[1].mlp
    mlp.forward = lambda x: nn.functional.silu(mlp.gate_proj(x)).mul(mlp.up_proj(x)) @ mlp.down_proj.weight.T
    with pytest.raises(ErrataError, match=r"runs without calling model.layers.1.mlp.down_proj"):
        errata.GRACE(at=1, steps=1).edit(lm, [EDIT])


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("grace", {"at": "lm_head"}),
        ("melo", {"at": ("lm_head",)}),
        ("wise", {"at": "lm_head"}),
        ("ultraedit", {"at": ("lm_head",)}),
        ("rome", {"layer": "lm_head"}),
        ("memit", {"layers": ("lm_head",)}),
        ("alphaedit", {"layers": ("lm_head",)}),
        ("lora", {"modules": ("lm_head",)}),
    ],
)
def test_the_head_is_no_place_where_tokens_must_be_told_apart(name: str, places: dict[str, Any], corpus_file: str):
    """It is run only where logits are read."""
    lm = tiny.lm("llama")
    how = replace(tiny.small_settings(method(name), lm, corpus_file), **places)
    with pytest.raises(UsageError, match=r"choose a place inside a block|has layers 0 to 3|no linear module"):
        how.edit(lm, [EDIT])


def test_the_head_can_be_tuned(corpus_file: str):
    lm = tiny.lm("llama")
    how = replace(tiny.small_settings(method("ft-m"), lm, corpus_file), layers=("lm_head",))
    before = tiny.probability(lm, EDIT)
    with how.edit(lm, [EDIT]).applied(lm):
        assert tiny.probability(lm, EDIT) > 2 * before
