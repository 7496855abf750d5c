"""What a model has read stays in its cache of keys and values, so that passes can go on from there, again and again.

That saves most of the work, and not every model allows it: the first time, what it gives is held against plain passes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .lm import LM

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference of a logit, relative to their spread, at which two ways of running a model count as one."""

T = TypeVar("T")


class Past:
    """A cache that passes may add to, and that is afterwards as it was. (They put new tensors in place of the old.)"""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self._remember()

    def keep(self, rows: Tensor) -> None:
        """From now on the batch is these rows of it."""
        self.kept = []  # or all rows would be held until the last layer has let them go
        self.cache.batch_select_indices(rows)
        self._remember()

    def hollow(self, layers: int) -> None:
        """Of the first layers, which won't read it, keep only the shape."""
        for layer in self.cache.layers[:layers]:
            for name, past in vars(layer).items():
                if isinstance(past, Tensor) and past.ndim == 4:
                    setattr(layer, name, past.new_zeros(1).expand(past.shape))
        self._remember()

    @contextmanager
    def as_it_was(self) -> Iterator[Any]:
        """The cache, for passes to add to."""
        try:
            yield self.cache
        finally:
            for layer, kept in zip(self.cache.layers, self.kept, strict=False):
                vars(layer).clear()
                vars(layer).update(kept)
            del self.cache.layers[len(self.kept) :]

    def _remember(self) -> None:
        self.kept = [dict(vars(layer)) for layer in self.cache.layers]


class _Roomy(DynamicLayer):
    """Keys and values that a first pass leaves, with room behind them that every later pass writes over with its own.

    Else each later pass joins the two in new tensors, and what is kept for the way back holds the past once more.
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.whole = columns, ()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._hold(pad(t, (0, 0, 0, self.columns)) for t in (key_states, value_states))
            return key_states, value_states
        keys, values = (t.detach() for t in self.whole)  # gradients flow to this pass, not to one before
        keys[:, :, -self.columns :], values[:, :, -self.columns :] = key_states, value_states
        self.keys, self.values = keys, values
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._hold(t[indices] for t in self.whole)

    def _hold(self, whole: Iterable[Tensor]) -> None:
        self.whole = tuple(whole)
        self.keys, self.values = (t[:, :, : -self.columns] for t in self.whole)


def empty(lm: LM) -> Any:
    """The cache of a model that has read nothing."""
    return DynamicCache(config=lm.model.config)


def roomy(lm: LM, columns: int, layers: slice) -> Any:
    """The same, where these layers leave room for so many tokens behind those that are read first."""
    cache = empty(lm)
    cache.layers[layers] = [_Roomy(columns) if type(x) is DynamicLayer else x for x in cache.layers[layers]]
    return cache


def takes_positions(lm: LM) -> bool:
    """Whether a model is told where its tokens stand; others see it by the mask."""
    return "position_ids" in inspect.signature(lm.model.forward).parameters


def proven(
    lm: LM, key: Hashable, what: str, make: Callable[[], T], both: Callable[[T], tuple[Tensor, Tensor]]
) -> T | None:
    """What `make` gives; None where it fails on this model or gives other logits than plain passes. The log says so.

    Args:
        lm: the model.
        key: under which `lm.memo` keeps what was found out.
        what: is tried, for the log.
        make: the cheap way.
        both: logits by the cheap way and by plain passes; asked once for a model.
    """
    if key in lm.memo:
        return make() if lm.memo[key] else None
    try:
        made = make()
        lm.memo[key] = _alike(lm, *both(made))
        why = "it gives other numbers"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError, NotImplementedError) as error:
        log.debug("%s failed", what, exc_info=True)
        made, lm.memo[key], why = None, False, str(error)
    if not lm.memo[key]:
        log.warning("%s can't be %s (%s); every pass runs the whole model", lm.name, what, why)
        return None
    return made


def _alike(lm: LM, got: Tensor, want: Tensor) -> bool:
    limit = TOLERANCE if want.dtype == torch.float32 and lm.dtype == torch.float32 else 0.1
    return bool((got - want).abs().max() <= limit * want.std())
