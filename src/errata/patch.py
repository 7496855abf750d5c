"""A patch is what editing gives: changes by module, the edits they serve, and what the next edit must remember.

It is applied and undone to the bit, added to a later one, taken apart by edit, and kept as one safetensors file with a
JSON header. Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from . import admission, store
from .changes import Change, LowRank, joined, kind_of
from .documents import said
from .edit import Edit
from .errors import ErrataError, UsageError
from .ledger import Effect, Entry, hold
from .lm import LM, Site

FORMAT = 1
MARK = "errata"


@dataclass(frozen=True, eq=False)
class Patch:
    """Changes to a model. `Patch()` changes nothing."""

    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    """By module, in the order they were made. Neighbours of a kind are joined, by the rule of the kind."""
    edits: tuple[Edit, ...] = ()
    """What was asked for; the `owners` of a change count into it."""
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    """What a method must remember of its earlier edits."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """`base` (fingerprint and name of the model), `steps` (method, settings and number of edits), `versions`, and
    perhaps `check` (what `errata.check` found when it was made) and `notes` (what came with each edit, by name)."""

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __repr__(self) -> str:
        by = ", ".join(dict.fromkeys(step["method"] for step in self.about.get("steps", ())))
        where = [f"{name or 'the model'}: {' + '.join(c.kind for c in cs)}" for name, cs in self.changes.items()]
        edits = f"{len(self.edits)} edit{'s' if len(self.edits) != 1 else ''}"
        return f"<Patch: {edits}{f' by {by}' if by else ''}, {self.bytes:,} bytes; {', '.join(where) or 'no change'}>"

    # Algebra

    def __add__(self, later: Patch) -> Patch:
        """This patch, then a later one."""
        if not self.about or not later.about:
            about = dict(self.about or later.about)
        else:
            if self.about["base"]["fingerprint"] != later.about["base"]["fingerprint"]:
                raise ErrataError(f"patches of two models can't be added: {_base(self)} and {_base(later)}")
            steps = _steps(self.about["steps"], later.about["steps"])
            about = {**_unchecked(self.about), **_unchecked(later.about), "steps": steps}
        about = _with_notes(about, [*self.notes, *later.notes])
        shifted = later._renumbered(lambda owners: owners + len(self.edits))
        names = dict.fromkeys([*self.changes, *shifted])
        changes = {n: joined([*self.changes.get(n, ()), *shifted.get(n, ())]) for n in names}
        return Patch(changes, self.edits + later.edits, {**self.carry, **later.carry}, about)

    def scaled(self, by: float) -> Patch:
        """The patch at another strength: 0 is the base, 1 the patch, -1 its opposite."""
        changes = {n: tuple(c.scaled(by) for c in cs) for n, cs in self.changes.items()}
        return replace(self, changes=changes, about=_unchecked(self.about))

    def without(self, edit: Edit) -> Patch:
        """The patch with one edit taken out, as far as its changes keep edits apart.

        What the other edits wrote stays as it is; it is not solved again.

        Raises:
            UsageError: the edit is not in the patch.
            ErrataError: it can't be told apart from the others.
        """
        found = [i for i, e in enumerate(self.edits) if e == edit]
        if not found:
            raise UsageError(f"the patch has no edit {edit.text!r} -> {edit.target!r}; `errata show` lists its edits")
        if self.carry:
            raise ErrataError("the method remembers its edits in the patch's carry, which can't forget one; edit anew")
        changes = self.changes
        for number in found:
            kept = {n: [c.without(number) for c in cs] for n, cs in changes.items()}
            changes = {n: tuple(c for c in cs if c is not None) for n, cs in kept.items()}
        stay = [i for i in range(len(self.edits)) if i not in found]
        place = torch.full((len(self.edits),), -1)
        place[stay] = torch.arange(len(stay))
        left = replace(
            self,
            changes={n: cs for n, cs in changes.items() if cs},
            edits=tuple(self.edits[i] for i in stay),
            about=_with_notes(_unchecked(self.about), [self.notes[i] for i in stay]),
        )
        return replace(left, changes=left._renumbered(lambda owners: place[owners]))

    @property
    def notes(self) -> list[Mapping[str, Any]]:
        """What came with each edit, such as its source and its author."""
        return list(self.about.get("notes") or [{} for _ in self.edits])

    def noted(self, notes: Sequence[Mapping[str, Any]]) -> Patch:
        """The patch with notes on its last edits, one for each."""
        kept = self.notes[: len(self.edits) - len(notes)]
        return replace(self, about=_with_notes(self.about, [*kept, *notes]))

    def _renumbered(self, number: Any) -> dict[str, tuple[Change, ...]]:
        return {n: tuple(c.renumbered(number) for c in cs) for n, cs in self.changes.items()}

    # In a model

    def applied(self, lm: LM, check: bool = True) -> AbstractContextManager[LM]:
        """While inside, the model is the edited one; then it is what it was, to the bit, also after an exception.

        Blocks may lie in each other, also those of one patch, which then counts twice, and may end in any order: what
        is left is the model with the patches that are still applied, in the order in which they came. Another thread
        that edits the model, asks it or applies a patch to it waits until the block is left.

        Args:
            lm: the model.
            check: refuse a model other than the one the patch was made for.
        """
        return hold(lm.ledger, lambda: self._effects(lm, check), lm, "patch", self)

    def apply(self, lm: LM, check: bool = True) -> None:
        """Apply the patch and leave it on, for every thread, until `undo`. After an error it is not on.

        Raises:
            UsageError: it is on already (`scaled(2)` is twice as strong).
            ErrataError: it is not for this model.
        """
        entry = Entry(lm.ledger, lambda: self._effects(lm, check), "patch", self)
        try:
            with lm.hold():
                if self._left_on(lm):
                    raise UsageError(f"the patch is applied to {lm.name} already; take it off by `undo`, or scale it")
                entry.begin()
                entry.left = True
        except BaseException:
            entry.close()
            raise

    def undo(self, lm: LM) -> None:
        """Take off a patch that `apply` put on, also one read again from its file. The others stay on, in their order.

        Raises:
            UsageError: it is not on.
        """
        with lm.hold():
            found = self._left_on(lm)
            if found is None:
                raise UsageError(f"the patch is not applied to {lm.name}; `apply` puts it on")
            found.close()

    def _left_on(self, lm: LM) -> Entry | None:
        """What `apply` left on a model of this patch, or of one that is the same."""
        there = [entry for entry in lm.ledger.live("patch") if entry.left]
        return next((e for e in there if e.patch is self), None) or next((e for e in there if self._is(e.patch)), None)

    def _is(self, other: Patch) -> bool:
        mine, theirs = self._tensors(), other._tensors()
        same = self.edits == other.edits and list(self.changes) == list(other.changes) and mine.keys() == theirs.keys()
        return same and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def _effects(self, lm: LM, check: bool) -> list[Effect]:
        return [c.effect_in(lm, name) for name, changes in self._fitting(lm, check) for c in changes]

    def _fitting(self, lm: LM, check: bool) -> Sequence[tuple[str, tuple[Change, ...]]]:
        """The changes, after a look at whether they are for this model."""
        admission.eager(lm.model, lm.name)
        admission.whole(lm.model, lm.name)
        if check and self.about and self.about["base"]["fingerprint"] != lm.fingerprint:
            raise ErrataError(
                f"the patch was made for {_base(self)}, this model is {lm.name} ({lm.fingerprint[:8]}); "
                "load the model it was made for"
            )
        for name, changes in self.changes.items():
            for change in changes:
                change.check(lm, name)
        return list(self.changes.items())

    @property
    def low_rank(self) -> bool:
        """Whether every module has one low-rank change: an exact LoRA."""
        return all(len(cs) == 1 and isinstance(cs[0], LowRank) for cs in self.changes.values())

    @property
    def by_row(self) -> bool:
        """Whether every module has one change, of a kind that a batch can have a different one of in each row."""
        return all(len(cs) == 1 and cs[0].by_row for cs in self.changes.values())

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    # On disk

    def save(self, path: str | Path) -> None:
        """Write the patch to one safetensors file, whole or not at all."""
        store.write(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the patch's file: the same for the same patch."""
        header = {
            "format": FORMAT,
            "layout": [[name, c.kind] for name, cs in self.changes.items() for c in cs],
            "edits": [e.to_dict() for e in self.edits],
            "about": self.about,
        }
        return store.sealed(MARK, self._tensors(), header)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a patch.

        Raises:
            UsageError: there is no such file.
            ErrataError: it is damaged, or no patch.
        """
        wanted = "a patch that `errata edit --save` wrote"
        foreign = "holds tensors but is no patch of errata; give a file that errata wrote"
        return store.unseal(path, MARK, FORMAT, wanted, foreign, cls._from)

    @classmethod
    def _from(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        edits = tuple(map(Edit.read, header["edits"]))
        left = dict(tensors)
        changes: dict[str, tuple[Change, ...]] = {}
        for number, (name, kind) in enumerate(header["layout"]):
            if not isinstance(name, str) or kind_of(kind) is None:
                raise ValueError(f"it has a change of an unknown kind {said(kind)} at {said(name)}")
            change = kind_of(kind)(**_taken(left, f"change/{number}/"))
            change.refuse_unsound(len(edits))
            changes[name] = (*changes.get(name, ()), change)
        carry = _taken(left, "carry/")
        if left:
            raise ValueError(f"it has tensors that belong to no change, {said(min(left))} among them")
        if not all(bool(t.isfinite().all()) for t in carry.values()):
            raise ValueError("what it carries for the next edit are not all finite numbers")
        _refuse_unsound(header["about"], len(edits))
        return cls(changes, edits, carry, header["about"])

    def _tensors(self) -> dict[str, Tensor]:
        listed = [c for cs in self.changes.values() for c in cs]
        parts = {f"change/{i}/{k}": t for i, c in enumerate(listed) for k, t in c.tensors().items()}
        return parts | {f"carry/{k}": t for k, t in self.carry.items()}


def is_patch(path: str | Path) -> bool:
    """Whether a file is a patch, by its mark; it may be damaged behind it."""
    return store.is_sealed(path, MARK)


def _with_notes(about: Mapping[str, Any], notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rest = {name: value for name, value in about.items() if name != "notes"}
    return {**rest, "notes": list(map(dict, notes))} if any(notes) else rest


def _taken(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning; they are gone from `tensors`."""
    return {name.removeprefix(start): tensors.pop(name) for name in list(tensors) if name.startswith(start)}


def _refuse_unsound(about: Any, edits: int) -> None:
    """Refuse what a patch says of itself in another form than errata writes."""
    if not isinstance(about, Mapping):
        raise ValueError(f"what it says of itself is {said(about)}")
    if not about:
        return
    notes = about.get("notes", [{}] * edits)
    if not isinstance(notes, list) or len(notes) != edits or not all(isinstance(note, Mapping) for note in notes):
        raise ValueError(f"the notes on its edits are {said(notes)}")
    base, steps, versions = (about.get(name) for name in ("base", "steps", "versions"))
    if not isinstance(base, Mapping) or not all(isinstance(base.get(k), str) for k in ("fingerprint", "name")):
        raise ValueError(f"the model that it is for is {said(base)}")
    if not isinstance(steps, list) or not all(map(_is_step, steps)):
        raise ValueError(f"the steps that made it are {said(steps)}")
    if not isinstance(versions, Mapping) or not all(isinstance(v, str) for v in versions.values()):
        raise ValueError(f"the versions that made it are {said(versions)}")


def _is_step(step: Any) -> bool:
    kinds = {"method": str, "settings": Mapping, "edits": int}
    return isinstance(step, Mapping) and all(isinstance(step.get(name), kind) for name, kind in kinds.items())


def applied_by_row(lm: LM, patches: Sequence[Patch]) -> AbstractContextManager[LM]:
    """While inside, row i of every batch is answered by the model with `patches[i]`; the weights are not touched.

    Args:
        lm: the model.
        patches: as many as the batches have rows; at each module all of one kind, which must be one that can
            (`Patch.by_row`).
    """
    return hold(lm.ledger, lambda: _effects_by_row(lm, patches), lm, "patch")


def _effects_by_row(lm: LM, patches: Sequence[Patch]) -> list[Effect]:
    for patch in patches:
        patch._fitting(lm, check=True)
        if not patch.by_row:
            raise ErrataError("a patch has a change that can't be applied row by row; apply it by itself")
    names = dict.fromkeys(name for patch in patches for name in patch.changes)
    effects = []
    for name in names:
        rows = [p.changes[name][0] if name in p.changes else None for p in patches]
        kind, *others = {type(row) for row in rows if row is not None}
        if others:
            raise ErrataError(f"the rows have changes of several kinds at {name}; apply the patches by themselves")
        effects.append(kind.effect_by_row(Site(name, lm.module(name)), rows))
    return effects


def added(patches: Sequence[Patch]) -> Patch:
    """Patches one after another."""
    return reduce(Patch.__add__, patches, Patch())


def _unchecked(about: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was found when the patch was made, which holds for that patch alone."""
    return {name: value for name, value in about.items() if name != "check"}


def _steps(earlier: Sequence[dict[str, Any]], later: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps one after another; equal neighbours become one."""
    steps = list(earlier)
    for step in later:
        if steps and {**steps[-1], "edits": step["edits"]} == step:
            step = {**step, "edits": steps.pop()["edits"] + step["edits"]}
        steps.append(step)
    return steps


def _base(patch: Patch) -> str:
    base = patch.about.get("base", {})
    return f"{base.get('name', 'an unnamed model')} ({base.get('fingerprint', '')[:8]})"
