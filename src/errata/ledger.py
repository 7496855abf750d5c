"""What errata has in place on a model for a while, and the turns of those who have it there.

Nothing is undone step by step. A place is *settled*: what belongs there is worked out anew from
what it holds without errata and from the entries that are open, in their order. So blocks may end
in any order and in any thread, Ctrl-C may come at any line, and to settle twice is to settle once.

Threads take turns: while one has something in place, the others wait. A thread never waits for
itself.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from itertools import count
from queue import Empty, SimpleQueue
from time import monotonic
from types import CodeType
from typing import Any, Literal, TypeVar

from torch import nn

from .errors import UsageError

log = logging.getLogger(__name__)

KEY = "_errata"
"""Name in a module's `__dict__` of what errata keeps with it."""
PATIENCE = 10.0
"""Seconds that a thread waits for its turn before the log says for whom."""

Kind = Literal["patch", "bare", "pass", "mode"]
"""`patch`: changes what the model says, but not while a later `bare` is open. `pass`: the model is
running, and what is closed meanwhile goes when the pass is over, so that no pass sees two models.
`mode`: all else."""

T = TypeVar("T")
_numbers = count(1)
_local = threading.local()


class _Thread:
    """A thread that holds or waits for a turn. It goes with the thread, whatever `is_alive` says:
    of a thread that Ctrl-C interrupted there that says no for ever after."""

    def __init__(self) -> None:
        self.name = threading.current_thread().name


def _here() -> _Thread:
    if not hasattr(_local, "thread"):
        _local.thread = _Thread()
    return _local.thread


class _Kept(dict[Any, Any]):
    """What errata keeps with a module. A copy of the module, or its pickle, goes without."""

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self) -> Any:
        return dict, ()


def kept(module: nn.Module) -> dict[Any, Any]:
    """What errata keeps with a module while it has something in place there."""
    found = vars(module).setdefault(KEY, _Kept())
    if not isinstance(found, _Kept):  # read from a pickle
        found = vars(module)[KEY] = _Kept()
    return found


class Ledger:
    """The entries of a model that are open, in the order in which they came."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    @classmethod
    def of(cls, model: nn.Module) -> Ledger:
        """The one ledger of a model, whichever `LM` asks."""
        return kept(model).setdefault("ledger", cls())

    def live(self, kind: Kind) -> list[Entry]:
        """The entries of a kind that count now."""
        return [e for e in list(self.entries) if e.kind == kind and e.live]

    def settle(self, closing: Entry | None = None) -> None:
        """Take away what is closed, but for what a pass that is still running began with.

        Args:
            closing: by whom; without having the turn, it takes away itself and what else is of its thread.
        """
        running = False
        for entry in reversed(list(self.entries)):
            if entry.open:
                running |= entry.kind == "pass" and entry.granted
            elif not running and (closing in (None, entry) or entry.owner is _here()):
                entry.clear()

    def take_turn(self, entry: Entry) -> None:
        """Wait until no other thread has anything in place that came before."""
        told = monotonic() + PATIENCE
        while (other := self._ahead(entry)) is not None:
            try:
                other.over.get(timeout=1.0)
                other.over.put(None)  # for the next one who waits for it
            except Empty:
                pass
            if monotonic() > told:
                told = float("inf")
                log.warning(
                    "waiting for the thread %s, which is at work on the model or has a patch "
                    "applied; `patch.apply(lm)` puts one on for all threads",
                    other.owner.name if other.owner else "",
                )
        entry.granted = True

    def _ahead(self, entry: Entry) -> Entry | None:
        """The entry to wait for: an earlier one, unless this thread has the turn already."""
        entries = list(self.entries)
        before = entries[: entries.index(entry)] if entry in entries else []
        own = [e for e in before if e.is_own()]
        others = [e for e in before if e.owner is not None and e not in own]
        has_turn = [e for e in own if e.granted and e.open]
        return others[0] if others and not has_turn else None


class Effect(ABC):
    """One thing in place on a model while its entry counts."""

    entry: Entry

    @property
    def live(self) -> bool:
        """Whether it belongs in place now."""
        return self.entry.live

    @abstractmethod
    def settle(self) -> None:
        """Bring the model in line with `live`, however far an earlier call came."""


class Entry:
    """Effects that are in place together, from `begin` to `close`."""

    def __init__(
        self,
        ledger: Ledger,
        effects: Callable[[], Iterable[Effect]],
        kind: Kind = "mode",
        patch: Any = None,
    ) -> None:
        self.ledger, self.make, self.kind, self.patch = ledger, effects, kind, patch
        self.effects: list[Effect] = []
        self.open = True
        self.granted = False
        """Whether it had its turn."""
        self.number = 0
        """Place among all entries, in the order in which they began."""
        self._owner = weakref.ref(_here())
        self.left = False
        """Whether it stays without a block, for all threads."""
        self.frame: tuple[int, CodeType] | None = None
        """The frame that its block is in."""
        self.over: SimpleQueue[None] = SimpleQueue()
        """Not empty as soon as the entry is over."""
        self.door: dict[str, Any] = {}

    @property
    def live(self) -> bool:
        """Whether it counts."""
        if not (self.open and self.granted):
            return False
        bare = [e.number for e in list(self.ledger.entries) if e.kind == "bare" and e.open]
        return self.kind != "patch" or self.number > max(bare, default=0)

    def begin(self) -> None:
        """Wait for the turn, then put the effects in place."""
        self.number = next(_numbers)
        self.ledger.entries.append(self)
        self.ledger.take_turn(self)
        self.ledger.settle()
        for effect in self.make():
            effect.entry = self
            self.effects.append(effect)
        for effect in self.effects:
            effect.settle()

    def close(self) -> None:
        """End it. Again is nothing."""
        try:
            self._close()
        finally:
            self._close()  # once more, where Ctrl-C came meanwhile
        self.door["close"] = bool  # nothing is left to do, and C code has no line for Ctrl-C
        self.door = {}

    def _close(self) -> None:
        self.open = False
        self.ledger.settle(self)

    def clear(self) -> None:
        """Take the effects away, and the entry out of its ledger."""
        for effect in reversed(self.effects):
            effect.settle()
        with suppress(ValueError):  # gone already
            self.ledger.entries.remove(self)
        self.over.put(None)
        self.effects = []  # each knows its entry: a circle would hold tensors until a collection

    @property
    def owner(self) -> _Thread | None:
        """The thread whose turn it takes; None: it takes none, or that thread is over."""
        return None if self.left else self._owner()

    def is_own(self) -> bool:
        """Whether it is this thread's. A server may take each step of a generator in another
        thread: there its block is, so there it belongs."""
        if self.owner is not _here() and self._runs_here():
            self._owner = weakref.ref(_here())
        return self.owner is _here()

    def _runs_here(self) -> bool:
        frame = sys._getframe()
        while frame is not None and (id(frame), frame.f_code) != self.frame:
            frame = frame.f_back
        return frame is not None


class _Block(io.IOBase):
    """The `with` block of an entry.

    Ctrl-C may come at the first instruction of a function, so an `__exit__` in Python may be over
    before it began. That of `IOBase` is C and calls `close`. Where Ctrl-C comes at the first
    instruction of that, the block lets this object go, and then `IOBase` calls `close` again.
    """

    def __init__(self, entry: Entry, value: Any) -> None:
        super().__init__()
        self.entry, self.value = entry, value
        entry.door = vars(self)
        self.close = entry.close  # bound to the entry: an interrupted call must not hold the block

    def __enter__(self) -> Any:
        entry, value, caller = self.entry, self.value, sys._getframe(1)
        if not entry.open:
            raise RuntimeError("this block was entered before; make another one")
        del self  # an interrupted return must not hold the block either
        if not entry.open:
            raise UsageError(
                "nobody holds this block, so it would end where it begins; write `with`, or `patch.apply(lm)` to leave "
                "a patch on"
            )
        entry.frame = id(caller), caller.f_code
        try:
            entry.begin()
            return value
        except BaseException:
            entry.close()
            raise


def hold(
    ledger: Ledger,
    effects: Callable[[], Iterable[Effect]],
    value: T = None,
    kind: Kind = "mode",
    patch: Any = None,
) -> AbstractContextManager[T]:
    """While inside, it is this thread's turn and effects are in place; then all is as it was."""
    block: Any = _Block(Entry(ledger, effects, kind, patch), value)
    return block


def stand(*effects: Effect) -> Callable[[], None]:
    """Put effects in place; what is returned takes them away again, to the bit."""
    entry = Entry(Ledger(), lambda: effects)
    try:
        entry.begin()
        return entry.close
    except BaseException:
        entry.close()
        raise
