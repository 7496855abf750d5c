"""A method turns edits into a patch. It is its own config: a frozen dataclass, found by name.

To add one, subclass `Method`, give it a name, say what it is and write `patch`; from another package, point an entry
point of the group `errata.methods` at the class. The shell, the benchmark and the contract test then know it.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from importlib import import_module, metadata
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
import transformers

from . import __version__, presets
from .edit import Edit, agree
from .effects import Numbers, Parts
from .errors import ErrataError, UsageError, unknown
from .lm import LM
from .methods import FILES
from .patch import Patch
from .typed import checked

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way of editing, with its settings."""

    registry: ClassVar[dict[str, type[Method]]] = {}

    name: ClassVar[str]
    """In the shell, lower-case kebab."""
    paper: ClassVar[str]
    """Authors and year."""
    source: ClassVar[str]
    """Where the paper is."""
    batched: ClassVar[bool] = True
    """Whether it makes several edits at once; if not, they are made one after another."""
    trained: ClassVar[bool] = False
    """Whether it needs a trained editor before its first edit."""

    seed: int = 0
    """Of all that the method draws."""

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            other = Method.registry.get(name)
            if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise UsageError(
                    f"there is a method {name!r} already, {other.__module__}.{other.__qualname__}; "
                    f"give {cls.__qualname__} another name"
                )
            cls.name = name
            Method.registry[name] = cls

    @classmethod
    def preset(cls, lm: LM | str, **overrides: Any) -> Self:
        """The method with the published (or for almanac: tuned) settings for a model, and what is overridden.

        A method without settings of its own gets those of the method it is derived from.

        Args:
            lm: the model, or what `errata.load` takes.
            overrides: fields of the method.

        Raises:
            UsageError: there is no such field, one is of another type, or one has no value anywhere.
        """
        known, overrides = {f.name: f for f in fields(cls)}, cls.checked(overrides)
        found = {**presets.settings(cls.lineage(), lm, overrides), **overrides}
        values = {name: value for name, value in found.items() if name in known}
        lacking = [n for n, f in known.items() if n not in values and f.default is f.default_factory is MISSING]
        if lacking:
            model = lm if isinstance(lm, str) else lm.name
            raise UsageError(
                f"{cls.name} has no preset of {' or '.join(lacking)} for {model}; give it: "
                f"`preset(lm, {lacking[0]}=...)`, in the shell `--set {lacking[0]}=...`"
            )
        return cls(**values)

    @classmethod
    def lineage(cls) -> tuple[str, ...]:
        """The method's name, then those of the methods it is derived from."""
        return tuple(c.name for c in cls.__mro__ if issubclass(c, Method) and "name" in vars(c))

    @classmethod
    def checked(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as the types of their fields say them.

        Raises:
            UsageError: there is no such setting, or it takes something else.
        """
        return checked(cls, settings, cls.name)

    def edit(self, lm: LM, edits: Sequence[Edit], prior: Patch | None = None, *, anyway: bool = False) -> Patch:
        """Add edits to what `prior` already changed. The model is left exactly as it was.

        Args:
            lm: the unedited model.
            edits: for a method that is not `batched`, one.
            prior: the patch that the edits come after.
            anyway: whether to make edits that contradict each other, too.

        Returns:
            `prior` and the new edits in one patch.

        Raises:
            UsageError: edits contradict each other, or are several where the method makes one.
        """
        edits, prior = _listed(edits), prior or Patch()
        if not edits:
            return prior
        if not anyway:
            agree(edits)
        if len(edits) > 1 and not self.batched:
            raise UsageError(
                f"{self.name} makes one edit at a time, not {len(edits)}; "
                "fold them with errata.sequential, or take a batched method"
            )
        with torch.inference_mode(False), lm.at_work():
            self._ready(lm)
            with self.beneath(lm, prior).applied(lm):
                (new,) = self._checked(lm, lambda: [self.patch(lm, edits, prior)])
        return prior + self._signed(new, lm, edits)

    def each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        """Every edit by itself from the unedited model: `[self.edit(lm, [e]) for e in edits]`, in shared passes."""
        edits = _listed(edits)
        with torch.inference_mode(False), lm.at_work():
            self._ready(lm)
            made = self._checked(lm, lambda: self.patches(lm, edits))
            return [self._signed(p, lm, (e,)) for p, e in zip(made, edits, strict=True)]

    @abstractmethod
    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        """What these edits add to a model that has `prior` applied: changes and carry."""

    def patches(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        """What each of these edits adds to the unedited model, by itself. Override it where they can share passes."""
        found = []
        for edit in edits:
            torch.manual_seed(self.seed)
            found.append(self.patch(lm, [edit], Patch()))
        return found

    def beneath(self, lm: LM, prior: Patch) -> Patch:
        """What of `prior` the model has while it is edited: all, but for what the method is better off without."""
        return prior

    def prepare(self, lm: LM) -> None:
        """Have in `lm.memo` what the method needs of the unedited model; called before `prior` is applied."""

    def _ready(self, lm: LM) -> None:
        self.prepare(lm)
        torch.manual_seed(self.seed)

    def _checked(self, lm: LM, make: Callable[[], list[Patch]]) -> list[Patch]:
        """What `make` gives, after a look at whether it is patches."""
        made = make() if self._is_ours() else self._watched(lm, make)
        for one in made:
            if not isinstance(one, Patch):
                raise ErrataError(f"{self.name}'s `patch` gave a {type(one).__name__}; it should give a Patch")
        return made

    def _is_ours(self) -> bool:
        return type(self).__module__.partition(".")[0] == __package__

    def _watched(self, lm: LM, make: Callable[[], list[Patch]]) -> list[Patch]:
        """What `make` gives, after a look at whether the model was left alone: it is read twice for that."""
        parts, numbers = Parts(lm.model), Numbers(lm.model)
        with lm.hold(parts):
            made = make()
        changed, lost = [*parts.changed, *numbers.put_back()], numbers.changed()
        if changed or lost:
            raise ErrataError(
                f"{self.name} changed {', '.join((lost or changed)[:3])} of the model itself, which "
                f"{'can not be put back: load the model again' if lost else 'was put back'}; "
                "a method's `patch` gives changes and leaves the model alone"
            )
        return made

    def _signed(self, new: Patch, lm: LM, edits: tuple[Edit, ...]) -> Patch:
        for name, changes in new.changes.items():
            if not all(c.finite() for c in changes):
                raise ErrataError(
                    f"{self.name} found no finite change of {name} for {edits[0].text!r}; nothing was changed"
                )
        about = {
            "base": {"fingerprint": lm.fingerprint, "name": lm.name},
            "steps": [{"method": self.name, "settings": json.loads(json.dumps(asdict(self))), "edits": len(edits)}],
            "versions": versions(),
        }
        return replace(new, edits=edits, about=about)


def _listed(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    if isinstance(edits, Edit):
        raise UsageError("edits are given as a list, also a single one: [edit]")
    return tuple(edits)


def sequential(
    method: Method, lm: LM, batches: Iterable[Sequence[Edit]], prior: Patch | None = None
) -> Iterator[Patch]:
    """Edit batch after batch; yields the whole patch after each (eq. 3 of the EasyEdit paper)."""
    yield from accumulate(batches, lambda patch, batch: method.edit(lm, batch, patch), initial=prior or Patch())


def versions() -> dict[str, str]:
    """Versions of what made a patch."""
    return {"errata": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def methods() -> dict[str, type[Method]]:
    """Every method by name: errata's own and those of installed packages."""
    for name in FILES:
        method(name)
    _discover()
    return dict(sorted(Method.registry.items()))


def method(name: str) -> type[Method]:
    """A method by its name; only its own file is imported."""
    if name in FILES:
        import_module(f".methods.{FILES[name].partition(':')[0]}", __package__)
    elif name not in Method.registry:
        _discover()
    if name not in Method.registry:
        raise unknown("method", name, {*FILES, *Method.registry})
    return Method.registry[name]


@cache
def _discover() -> None:
    """Import the methods of other packages."""
    for entry in metadata.entry_points(group="errata.methods"):
        try:
            entry.load()
        except Exception as error:  # another package's, which must not take the others with it
            log.warning("the method %s (%s) can't be loaded: %s", entry.name, entry.value, error)
