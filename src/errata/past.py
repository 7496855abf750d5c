"""What a model has read stays in its cache of keys and values, so that passes can go on from there, again and again.

That saves most of the work, and not every model allows it in every use: padded, with several rows, a second time, with
gradients. So a shortcut is held against plain passes in each kind of use, the first time that kind occurs.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from . import memory
from .errors import ErrataError
from .lm import LM

log = logging.getLogger(__name__)

T = TypeVar("T")


class Past:
    """A cache that passes may add to, and that is afterwards as it was."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.grows = grows(cache)
        self._remember()

    def __copy__(self) -> Past:
        """Another one, whose rows can leave without leaving this one."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return Past(cache)

    def keep(self, rows: Tensor) -> None:
        """From now on the batch is these rows of it."""
        self.kept = []  # or all rows would be held until the last layer has let them go
        self.cache.reorder_cache(rows)
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
        """The cache, for passes to add to; a copy of it where they would write over what is there."""
        if not self.grows:
            yield copy.deepcopy(self.cache)
            return
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self._hold(t[beam_idx] for t in self.whole)

    def _hold(self, whole: Iterable[Tensor]) -> None:
        self.whole = tuple(whole)
        self.keys, self.values = (t[:, :, : -self.columns] for t in self.whole)


_GROWING = {DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer, _Roomy}
"""Layers of a cache that put new tensors in place of the old. Those with a state of linear attention, of a convolution
or of an SSM are written over."""


def grows(cache: Any) -> bool:
    """Whether passes leave the tensors of a cache as they are, so that references to them are enough to go back."""
    return type(cache) is DynamicCache and all(type(layer) in _GROWING for layer in cache.layers)


def empty(lm: LM) -> Any:
    """The cache of a model that has read nothing."""
    return DynamicCache(config=lm.model.config)


def roomy(lm: LM, columns: int, layers: slice) -> Any:
    """The same, where these layers leave room for so many tokens behind those that are read first."""
    cache = empty(lm)
    cache.layers[layers] = [_Roomy(columns) if type(x) is DynamicLayer else x for x in cache.layers[layers]]
    return cache


def takes(lm: LM, name: str) -> bool:
    """Whether the model's forward knows an argument: a cache, or where tokens stand (others see that by the mask)."""
    wrapped = getattr(lm.model, "get_base_model", None)  # PEFT's, which hands on what it does not know
    return name in inspect.signature((wrapped() if wrapped else lm.model).forward).parameters


Use = tuple[Hashable, tuple[int, ...]]
"""What may make a difference to a shortcut: of what kind a use is, and how many tokens it has to do with."""


def proven(
    lm: LM,
    shortcut: tuple[Hashable, ...],
    what: str,
    make: Callable[[], T],
    use: Callable[[T], Use],
    agrees: Callable[[T], bool],
) -> T | None:
    """What a shortcut makes; None where plain passes have to do the work.

    It is held against plain passes in the first use of a kind, and again where a use has more tokens than all before.
    Where it fails or gives other numbers, it is not taken again, and the log says so once.

    Args:
        lm: the model.
        shortcut: which one, for `lm.memo`.
        what: can't be done where it fails, for the log.
        make: takes it.
        use: of what was made.
        agrees: holds what was made against plain passes.
    """
    key = ("proven", *shortcut)
    known: dict[Hashable, tuple[int, ...]] | None = lm.memo.setdefault(key, {})
    if known is None:
        return None
    try:
        made = make()
        kind, sizes = use(made)
        kind = kind, lm.dtype, lm.device, getattr(lm.config, "_attn_implementation", None)
        longest = known.get(kind, (0,) * len(sizes))
        if all(size <= most for size, most in zip(sizes, longest, strict=True)):
            return made
        if agrees(made):
            known[kind] = tuple(map(max, sizes, longest))
            return made
        why = "it gives other numbers"
    except Exception as error:  # of any kind: it comes from the model's own code
        if memory.exhausted(error) or isinstance(error, ErrataError):
            raise
        log.debug("%s failed", what, exc_info=True)
        why = str(error)
    lm.memo[key] = None
    first = lm.memo.setdefault(("distrusted", shortcut[0]), shortcut) == shortcut
    log.log(
        logging.WARNING if first else logging.INFO,
        "%s can't be %s (%s); every pass runs the whole model",
        lm.name,
        what,
        why,
    )
    return None


def hooked(lm: LM) -> Hashable:
    """What is hooked into the model or stands for a module's own forward: with it, a shortcut is another one."""
    found = set()
    for module in lm.model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        found |= {getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks}
        if "forward" in vars(module):
            found.add("forward")
    return frozenset(found)
