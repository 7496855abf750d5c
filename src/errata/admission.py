"""Which models errata takes: what it could not edit rightly is refused, in a sentence that says the way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import ErrataError, UsageError
from .rounding import alike


def admit(model: Any, name: str) -> None:
    """Refuse what answers no prompt token by token.

    Raises:
        UsageError: it is no model of transformers.
        ErrataError: it has no language-modelling head, or reads by an encoder.
    """
    if not hasattr(model, "get_output_embeddings"):
        inside = "; give the model inside it" if hasattr(model, "module") else ""
        raise UsageError(f"errata.LM takes a model of transformers, not a {type(model).__name__}{inside}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ErrataError(f"{name} reads by an encoder and answers by a decoder; errata edits models of decoders alone")
    if model.get_output_embeddings() is None:
        raise ErrataError(f"{name} has no language-modelling head; load it by AutoModelForCausalLM")


@torch.no_grad()
def causal(model: Any, name: str, ids: Tensor) -> None:
    """Refuse a model that says other things of a text when more follows it, or when it is padded.

    Args:
        model: in eval mode.
        name: what it is called.
        ids: tokens of some text, (length,).

    Raises:
        ErrataError: it does, as an encoder does that is loaded with a head; or what it puts out is no number.
    """
    half = len(ids) // 2
    other = torch.cat([ids[:half], ids[half:].flip(0)])
    rows, there = torch.stack([ids, other, ids]), torch.ones(3, len(ids), dtype=torch.long, device=ids.device)
    there[2, half:] = 0
    want = _logits(model, ids[None, :half], there[:1, :half])[0]
    if want.isnan().any():
        raise ErrataError(
            f"{name} puts out nan for a plain text: a weight is no number, or {model.dtype} overflows; "
            "get the weights anew, or load the model in bfloat16 or float32"
        )
    for row in _logits(model, rows, there)[:, :half]:
        if not alike(model.dtype, row, want):
            raise ErrataError(
                f"{name} does not answer token by token: what it says of a text changes with what follows or pads it; "
                "errata edits causal models (the class of an encoder may be one with is_decoder=True in its config)"
            )


def whole(model: nn.Module, name: str) -> None:
    """Refuse a model whose weights errata can't look into.

    Raises:
        ErrataError: they are not all here, or kept in pieces or by a library of their own.
    """
    for place, p in model.named_parameters():
        if p.device.type == "meta":
            raise ErrataError(
                f"{name} has {place} not in memory but offloaded, where errata can't edit it; "
                "load it whole: in a smaller dtype, or with a device_map over devices that hold it"
            )
        if not p.numel():
            raise ErrataError(f"{name} has {place} empty here, as it is kept in pieces elsewhere; load it whole")
        if not _is_plain(p):
            raise ErrataError(
                f"{name} has {place} as a {type(p.data).__name__} of {_library(p)}, which errata can't look "
                "into; load it without tp_plan or FSDP, unquantised or quantised by bitsandbytes"
            )


def eager(model: nn.Module, name: str) -> None:
    """Refuse a model that torch.compile has: what it once compiled runs on without the hooks that errata puts in.

    Raises:
        ErrataError: it, or a part of it, is compiled.
    """
    for place, module in model.named_modules():
        wrapped = hasattr(module, "_orig_mod")
        if wrapped or vars(module).get("_compiled_call_impl") is not None or _is_compiled(vars(module).get("forward")):
            what = f"its part {place}" if place else "it"
            raise ErrataError(
                f"{name} can't be edited while {what} is compiled, as patches would not be seen; give "
                "errata.LM the model before that, and compile what `errata.export.merge` writes"
            )


def _is_compiled(forward: Any) -> bool:
    """Whether a module's own `forward` is one that torch.compile made."""
    return hasattr(forward, "_torchdynamo_orig_callable")


def _library(p: Tensor) -> str:
    return type(p.data).__module__.partition(".")[0]


def _is_plain(p: Tensor) -> bool:
    """Whether a parameter is one tensor, and not a front for others (DTensor, torchao's)."""
    return getattr(type(p.data), "__torch_dispatch__", None) is torch._C._disabled_torch_dispatch_impl


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
