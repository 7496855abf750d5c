"""What can be in place on a model for a while: hooks, other values, modes, settings of torch's.

Each settles by looking at what is there, not by remembering what it did: `ledger.py` says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .ledger import KEY, Effect, Ledger, hold, kept

log = logging.getLogger(__name__)

Table = Literal["_parameters", "_modules", "__dict__"]
"""The part of a module's state that a name is looked up in."""
_ABSENT: Any = object()


class Hook(Effect):
    """A forward hook, or a forward pre-hook (`before`); known again by its function."""

    def __init__(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        before: bool = False,
        kwargs: bool = False,
    ) -> None:
        self.module, self.call, self.before, self.kwargs = module, call, before, kwargs

    def settle(self) -> None:
        kind = "_forward_pre_hooks" if self.before else "_forward_hooks"
        table = vars(self.module)[kind]
        there = [number for number, call in list(table.items()) if call is self.call]
        if self.live and not there:
            self._register(self.call, with_kwargs=self.kwargs)
        elif there and not self.live:
            for name in (f"{kind}_with_kwargs", f"{kind}_always_called", kind):
                for number in there:
                    vars(self.module).get(name, {}).pop(number, None)

    @property
    def _register(self) -> Callable[..., Any]:
        module = self.module
        return module.register_forward_pre_hook if self.before else module.register_forward_hook


def hooked(*hooks: Hook) -> AbstractContextManager[None]:
    """While inside, hooks are in place on their modules."""
    return hold(Ledger(), lambda: hooks)


class Overlay(Effect):
    """Another value of a module's name, made of the one that is there without it.

    Several overlays of one name are made one of the other, in their order.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        make: Callable[[Any], Any],
        table: Table = "__dict__",
    ) -> None:
        self.module, self.place, self.make = module, (table, name), make
        self.stack: _Stack | None = None

    def settle(self) -> None:
        table, name = self.place
        values = vars(self.module) if table == "__dict__" else vars(self.module)[table]
        stacks = kept(self.module)
        stack = self.stack or stacks.setdefault(self.place, _Stack(values, name))
        self.stack = stack
        stack.settle(self)
        if stack.overlays:
            stacks[self.place] = stack
        else:
            stacks.pop(self.place, None)
        if not stacks:
            vars(self.module).pop(KEY, None)


class _Stack:
    """A name, what it holds without errata, and what overlays make of it one after another."""

    def __init__(self, values: dict[str, Any], name: str) -> None:
        self.values, self.name = values, name
        self.base = values.get(name, _ABSENT)
        self.overlays: list[Overlay] = []
        self.made: dict[Overlay, tuple[Any, Any]] = {}
        """What is beneath each, and what it made of that; it stays while what is beneath does."""

    def settle(self, overlay: Overlay) -> None:
        if not self.overlays:
            self.base = self.values.get(self.name, _ABSENT)
        if overlay.live and overlay not in self.overlays:
            self.overlays.append(overlay)
        self._follow()
        while self._put(self._top()) is not self._top():
            pass  # another overlay was closed meanwhile, by a collection of garbage
        for closed in [o for o in list(self.overlays) if not o.entry.open]:
            _, made = self.made.pop(closed, (None, None))
            if isinstance(made, Tensor) and made._version:
                log.warning("a patched %s was written to; that goes with the patch", self.name)
            with suppress(ValueError):  # gone already
                self.overlays.remove(closed)
        if not self.overlays:
            self.base = _ABSENT  # it is back in its place, and nothing else need hold it

    def _top(self) -> Any:
        """What belongs there now."""
        value = self.base
        for overlay in [o for o in list(self.overlays) if o.live]:
            made = self.made.get(overlay)
            if made is None or made[0] is not value:
                made = self.made[overlay] = value, overlay.make(value)
            value = made[1]
        return value

    def _put(self, value: Any) -> Any:
        if value is _ABSENT:
            self.values.pop(self.name, None)
        else:
            self.values[self.name] = value
        return value

    def _follow(self) -> None:
        """Where the model was moved or converted meanwhile, so is what is kept of it."""
        now = self.values.get(self.name)
        known = [self.base, *(made for _, made in self.made.values())]
        if not isinstance(now, Tensor) or id(now) not in map(id, known):
            return
        if {(value.device, value.dtype) for value in known} != {(now.device, now.dtype)}:
            self.base.data = self.base.data.to(now.device, now.dtype)
            self.made = {}


class Frozen(Effect):
    """Eval mode, and no parameter that takes gradients, until the last who asked for it is done."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def settle(self) -> None:
        modules, parameters = kept(self.model).setdefault("thawed", ([], []))
        if self.live:
            for module in self.model.modules():
                if module.training:
                    modules.append(module)
                    module.training = False
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameters.append(parameter)
                    parameter.requires_grad_(False)
        elif not self._is_wanted():
            for module in modules:
                module.training = True
            for parameter in parameters:
                parameter.requires_grad_(True)
            kept(self.model).pop("thawed", None)

    def _is_wanted(self) -> bool:
        effects = [e for entry in list(self.entry.ledger.entries) for e in entry.effects]
        return any(isinstance(e, Frozen) and e.live for e in effects)


class Setting(Effect):
    """A setting of torch's, in the end what it was; meanwhile another one, if `value` is given."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any], value: Any = _ABSENT) -> None:
        self.read, self.write, self.value = read, write, value
        self.before = _ABSENT

    def settle(self) -> None:
        if self.live:
            self.before = self.read() if self.before is _ABSENT else self.before
            if self.value is not _ABSENT:
                self.write(self.value)
        elif self.before is not _ABSENT and self.entry.is_own():
            self.write(self.before)
            self.before = _ABSENT


def gradients(on: bool) -> Setting:
    """Gradients on or off."""
    return Setting(torch.is_grad_enabled, torch.set_grad_enabled, on)


def random_state(devices: Iterable[torch.device]) -> Setting:
    """The random state of the processor and of these devices, in the end what it was."""
    gpus = [device for device in devices if device.type == "cuda"]

    def read() -> tuple[Tensor, list[Tensor]]:
        return torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in gpus]

    def write(states: tuple[Tensor, list[Tensor]]) -> None:
        torch.set_rng_state(states[0])
        for gpu, state in zip(gpus, states[1], strict=True):
            torch.cuda.set_rng_state(state, gpu)

    return Setting(read, write)


class Parts(Effect):
    """Modules, parameters and hooks of a model, in the end what they were, whoever changed them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: list[tuple[str, dict[Any, Any], dict[Any, Any]]] = []
        self.changed: list[str] = []
        """Full names of what was put back."""

    def settle(self) -> None:
        if self.live:
            self.before = self.before or [
                (name, table, dict(table)) for name, module in self.model.named_modules() for table in _tables(module)
            ]
            return
        for name, table, was in self.before:
            for key in _unlike(table, was):
                hook = not isinstance(key, str)
                self.changed.append(f"a hook of {name}" if hook else f"{name}.{key}")
        for _, table, was in self.before:
            if _unlike(table, was):
                table.clear()
                table.update(was)
        self.before = []


def _tables(module: nn.Module) -> list[dict[Any, Any]]:
    """Where a module has its parameters, its modules and its hooks."""
    named = vars(module).items()
    wanted = [value for name, value in named if name in ("_parameters", "_modules") or "_hooks" in name]
    return [table for table in wanted if isinstance(table, dict)]


def _unlike(table: dict[Any, Any], was: dict[Any, Any]) -> list[Any]:
    keys = table.keys() | was.keys()
    return [key for key in keys if table.get(key, _ABSENT) is not was.get(key, _ABSENT)]


class Numbers:
    """The numbers of a model's parameters, told from others by their sums: read, not copied."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if not p.is_meta]
        plain = [(name, p) for name, p in named if type(p.data) is Tensor]
        self.before = [(name, p, p.data, _sum(p.data)) for name, p in plain]

    def put_back(self) -> list[str]:
        """Give back their tensors to parameters that have another one now; the names of those."""
        found = [one for one in self.before if one[1].data_ptr() != one[2].data_ptr()]
        for _, p, data, _ in found:
            p.data = data
        return [name for name, *_ in found]

    def changed(self) -> list[str]:
        """Names of the parameters whose numbers are others now."""
        return [name for name, _, data, total in self.before if _sum(data) != total]


def _sum(data: Tensor) -> int:
    raw = data.contiguous().reshape(-1).view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    eights = len(raw) // 8 * 8
    return int(raw[:eights].view(torch.int64).sum()) + int(raw[eights:].sum())


class Bare(Effect):
    """The patches that came before are not in place."""

    def settle(self) -> None:
        for entry in list(self.entry.ledger.entries):
            if entry.kind == "patch":
                for effect in entry.effects:
                    effect.settle()
