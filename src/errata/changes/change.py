"""What every kind of change promises: it can be undone, knows which edits it serves, and how a later one joins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor

from ..errors import ErrataError
from ..ledger import Effect, stand
from ..lm import LM, Site

Undo = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Change(ABC):
    """One reversible change at one module. A subclass's fields are all tensors."""

    kinds: ClassVar[dict[str, type[Change]]] = {}
    kind: ClassVar[str]
    by_row: ClassVar[bool] = False
    """Whether `effect_by_row` can put a change of its own beside each row of a batch."""

    form: ClassVar[Mapping[str, str]] = {}
    """Of every field but `owners`, its numbers and its sizes by name, as in `"float32 out n"`; sizes of one name are
    equal, and a number stands for itself. That of `owners` is n."""
    owners: Tensor
    """(n,) int64: numbers, within the patch, of the edits that this change serves, one per part it is made of."""

    def __init_subclass__(cls, kind: str | None = None) -> None:
        super().__init_subclass__()
        if kind is not None:
            cls.kind = kind
            Change.kinds[kind] = cls
        if "attach" in vars(cls):  # a kind that sees to its own undo is taken at its word
            cls.effect = lambda self, site: _Attached(partial(self.attach, site))

    @abstractmethod
    def effect(self, site: Site) -> Effect:
        """What the change puts in place. The model is not touched yet."""

    @classmethod
    def effect_by_row(cls, site: Site, rows: Sequence[Change | None]) -> Effect:
        """Likewise of changes of this kind, one for each row of the batch; the weight is not touched."""
        raise ErrataError(f"a {cls.kind} change can't be applied row by row")

    def effect_in(self, lm: LM, name: str) -> Effect:
        """Likewise in a model, at the module of that name."""
        return self.effect(Site(name, lm.module(name)))

    def attach(self, site: Site) -> Undo:
        """Put the change in place; what is returned takes it away again, to the bit, in whatever order several go."""
        return stand(self.effect(site))

    @classmethod
    def attach_rows(cls, site: Site, rows: Sequence[Change | None]) -> Undo:
        """Put changes of this kind beside a module, one for each row of the batch; the weight is not touched."""
        return stand(cls.effect_by_row(site, rows))

    @abstractmethod
    def fits(self, site: Site) -> bool:
        """Whether the shapes are those of the site."""

    def check(self, lm: LM, name: str) -> None:
        """Refuse a model that the change does not fit."""
        site = lm.site(name)
        if not self.fits(site):
            raise ErrataError(f"the patch does not fit {name}, which is {site.shape[0]} x {site.shape[1]} in {lm.name}")

    def join(self, later: Change) -> tuple[Change, ...]:
        """What this change followed by a later one at the same module comes to."""
        return self, later

    def scaled(self, by: float) -> Self:
        """The change at another strength."""
        raise ErrataError(f"a {self.kind} change answers or it doesn't; only weight changes can be scaled")

    @abstractmethod
    def without(self, edit: int) -> Self | None:
        """The change with one edit taken out; None if nothing is left."""

    @property
    def told(self) -> list[str]:
        """What `errata show` says of every edit of a memory: when it answers."""
        return []

    def renumbered(self, number: Callable[[Tensor], Tensor]) -> Self:
        """The change with its edits numbered anew."""
        return replace(self, owners=number(self.owners))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved; `type(change)(**tensors)` is the change again."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def refuse_unsound(self, edits: int) -> None:
        """Refuse parts that don't fit each other or a patch of so many edits, and numbers that are none.

        Raises:
            ValueError: says which part is wrong.
        """
        sizes: dict[str, int] = {}
        for name, form in {"owners": "int64 n", **self.form}.items():
            part: Tensor = getattr(self, name)
            dtype, *dims = form.split()
            wanted = [int(d) if d.isdecimal() else sizes.get(d, n) for d, n in zip(dims, part.shape, strict=False)]
            if str(part.dtype) != f"torch.{dtype}" or part.ndim != len(dims) or list(part.shape) != wanted:
                found = f"{' x '.join(map(str, part.shape)) or 'one'} of {str(part.dtype).removeprefix('torch.')}"
                raise ValueError(f"the {name} of a {self.kind} change are {found}, which do not fit its other parts")
            sizes.update(zip(dims, part.shape, strict=True))
            if not part.isfinite().all():
                raise ValueError(f"the {name} of a {self.kind} change are not all finite numbers")
        self.refuse_outside("owners", 0, edits)
        self.refuse_inconsistent()

    def refuse_outside(self, name: str, least: int, end: int) -> None:
        """Refuse a part whose numbers are not from `least` to before `end`."""
        part: Tensor = getattr(self, name)
        if bool(((part < least) | (part >= end)).any()):
            raise ValueError(f"the {name} of a {self.kind} change name what is not there")

    def refuse_inconsistent(self) -> None:
        """Refuse what a kind knows to be wrong beside shapes, dtypes and owners."""

    def finite(self) -> bool:
        """Whether every number is one."""
        return all(bool(t.isfinite().all()) for t in self.tensors().values())


class _Attached(Effect):
    """A change that is attached, and undone, as it does itself."""

    def __init__(self, attach: Callable[[], Undo]) -> None:
        self.attach = attach
        self.undo: Undo | None = None

    def settle(self) -> None:
        if self.live and self.undo is None:
            self.undo = self.attach()
        elif not self.live and self.undo is not None:
            self.undo()
            self.undo = None


def joined(changes: Iterable[Change]) -> tuple[Change, ...]:
    """Changes at one module in order, neighbours merged where their kind knows how."""
    out: tuple[Change, ...] = ()
    for change in changes:
        out = (*out[:-1], *out[-1].join(change)) if out else (change,)
    return out


def kind_of(name: str) -> Any:
    """The class of a kind of change; None if there is none of that name."""
    return Change.kinds.get(name)
