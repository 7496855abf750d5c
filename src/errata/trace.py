"""Reading and rewriting activations during a forward pass, always as (batch, seq, d).

Blocks of some models return a tuple (GPT-J), MLPs of others see batch and sequence flattened (OPT): that is settled
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from . import admission
from .effects import Hook, hooked
from .errors import ErrataError
from .lm import LM
from .tokens import Tokens


def hidden(output: Any, batch: int, length: int | None = None, name: str = "this module") -> Tensor:
    """The hidden states in a module's input or output, as (batch, seq, d).

    Args:
        output: of the module, or its input.
        batch: rows.
        length: columns, where they are known.
        name: of the module, for the error.

    Raises:
        ErrataError: they are not those of so many rows: an expert's, say, which gets the tokens sent to it.
    """
    first = output[0] if isinstance(output, tuple | list) else output
    if first.ndim == 2:
        fits = len(first) == batch * length if length else len(first) % batch == 0
    else:
        fits = first.ndim == 3 and len(first) == batch and (length is None or first.shape[1] == length)
    if not fits:
        raise ErrataError(
            f"{name} has values of shape {tuple(first.shape)} for {batch} rows of {length or 'some'} tokens, so nobody "
            "knows which token is which; choose a place that sees every token of every row"
        )
    return first.unflatten(0, (batch, -1)) if first.ndim == 2 else first


def put(output: Any, new: Tensor) -> Any:
    """`output` with its hidden states replaced by `new`, in the form the module gave them."""
    if isinstance(output, tuple | list):
        return type(output)((new.reshape(output[0].shape), *output[1:]))
    return new.reshape(output.shape)


def rewrite(lm: LM, name: str, batch: int, fn: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """While inside, the output (batch, seq, d) of a module is replaced by `fn(output)`."""
    return hooked(rewriting(lm, name, batch, fn))


def rewriting(lm: LM, name: str, batch: int, fn: Callable[[Tensor], Tensor]) -> Hook:
    """The hook of `rewrite`, for several to be in place together (`effects.hooked`)."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return put(output, fn(hidden(output, batch, name=name)))

    return Hook(lm.module(name), hook)


def beside(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """While inside, `fn` of a module's input, in float32, is added to its output."""
    return hooked(adding(module, fn))


def adding(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Hook:
    """The hook of `beside`, likewise."""

    def hook(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + fn(args[0].float()).view(output.shape).to(output.dtype)

    return Hook(module, hook)


class _Enough(Exception):
    """Everything asked for has been seen; the rest of the pass is not needed."""


def watch(
    lm: LM,
    names: Sequence[str],
    inputs: dict[str, Any],
    see: Callable[[str, Any, Any], None],
    before: Sequence[str] = (),
) -> None:
    """Run the model until each of the modules has run once, or one of `before` is about to; `see(name, input, output)`
    is called after each."""
    admission.eager(lm.model, lm.name)
    waiting = set(names)

    def enough(*_: Any) -> None:
        raise _Enough

    def hook(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            see(name, args[0] if args else kwargs.get("hidden_states"), output)
            waiting.discard(name)
            if not waiting:
                enough()

        return after

    hooks = [Hook(lm.module(lm.inside(name)), hook(name), kwargs=True) for name in waiting]
    hooks += [Hook(lm.module(name), enough, before=True) for name in before]
    with lm.hold(*hooks, kind="pass"), suppress(_Enough):
        lm.model(**{"use_cache": False, **inputs})


@torch.no_grad()
def read(lm: LM, names: Sequence[str], batch: Tokens, rows: Tensor, cols: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into and comes out of modules at positions (rows, cols): {name: ((m, d_in), (m, d_out))}.

    The pass stops after the last of the modules.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, given: Any, output: Any) -> None:
        into, out = (hidden(t, len(batch), batch.ids.shape[1], name) for t in (given, output))
        seen[name] = into[rows, cols].clone(), out[rows, cols].clone()

    watch(lm, names, batch.inputs, see)
    if left := [name for name in names if name not in seen]:
        raise ErrataError(
            f"{lm.name} runs without calling {left[0]}: a fused kernel, or something else, computes "
            "in its stead, where errata can't see it; load the model without that"
        )
    return seen


@torch.no_grad()
def outputs_of(lm: LM, names: Sequence[str], inputs: dict[str, Any], before: Sequence[str] = ()) -> dict[str, Any]:
    """What modules put out, in the form they gave it, as far as they are done before one of `before` begins."""
    seen: dict[str, Any] = {}
    watch(lm, names, inputs, lambda name, _, output: seen.__setitem__(name, output), before)
    return seen
