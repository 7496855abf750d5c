"""Corrections as history: a plain folder of patches with a manifest, which says what a model carries and in what order.

Nothing is ever deleted: a patch that is taken back stays in its file and is marked. Only one process at a time writes
to a folder; a lock file sees to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import store
from .ask import reply
from .changes import Codebook, Dense, LowRank
from .edit import Edit
from .errors import ErrataError, UsageError
from .patch import Patch, added

if TYPE_CHECKING:
    from .lm import LM

FORMAT = 1
MANIFEST, LOCK = "history.json", "history.lock"
OVERLAP = 0.65
"""Cosine from which two keys are taken for one. ROME on almanac: all of 20 pairs of one subject in two prompts are over
it, and of 1,770 pairs of different subjects one is, 0.87 (two glaciers, whose last token is the same)."""


@dataclass(frozen=True)
class Entry:
    """A patch of a history."""

    file: str
    digest: str
    """SHA-256 of the file, so that one that was changed by hand is noticed."""
    edits: int
    methods: tuple[str, ...]
    added: str
    """When, in UTC."""
    state: Literal["active", "reverted", "replaced"] = "active"
    """`replaced`: a later entry holds all of it (it was made on top of it, or has one of its edits taken out)."""
    by: str | None = None
    """For a replaced entry, the file that holds it."""


@dataclass(frozen=True)
class Conflict:
    """Two corrections that get in each other's way."""

    kind: Literal["target", "twice", "keys"]
    """`target`: the same question with another answer; `twice`: the same correction in two patches; `keys`: different
    questions that are kept at the same place of a weight, so that one moves the other."""
    first: Edit
    second: Edit
    files: tuple[str, str]
    cosine: float | None = None
    """For `keys`: the largest cosine between keys of the two (for a codebook, 1: their balls meet)."""

    def __str__(self) -> str:
        a, b = self.first, self.second
        where = " and ".join(dict.fromkeys(self.files))
        match self.kind:
            case "target":
                return f"{a.text!r} is to be both {a.target!r} and {b.target!r} ({where})"
            case "twice":
                return f"{a.text!r} -> {a.target!r} is corrected twice ({where})"
            case "keys":
                return f"{a.text!r} and {b.text!r} share a key, cosine {self.cosine:.2f} ({where})"


@dataclass
class History:
    """The patches in a folder, in the order in which they apply. Reading it makes nothing; `add` makes the folder."""

    folder: Path
    base: dict[str, str] | None = None
    """Fingerprint and name of the model that all of them are for."""
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)

    @classmethod
    def open(cls, folder: str | Path) -> History:
        """Read a folder's manifest.

        Raises:
            UsageError: the folder is no history (it has files, but no manifest).
            ErrataError: the manifest is damaged, or was written by a newer errata.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UsageError(f"{str(folder)!r} holds no {MANIFEST}; give a new folder, or one that errata made")
            return cls(folder)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] > FORMAT:
                raise ErrataError(f"{str(path)!r} was written by a newer errata (format {found['format']}); upgrade")
            entries = [Entry(**{**e, "methods": tuple(e["methods"])}) for e in found["entries"]]
            return cls(folder, found["base"], entries)
        except (KeyError, TypeError, ValueError) as error:
            raise ErrataError(f"{str(path)!r} is damaged ({error}); restore it from a copy") from error

    @property
    def active(self) -> list[Entry]:
        """The entries that the model carries."""
        return [e for e in self.entries if e.state == "active"]

    def load(self, entry: Entry) -> Patch:
        """The patch of an entry, after a look at whether its file is the one that was added."""
        path = self.folder / entry.file
        patch = Patch.load(path)
        if _digest(path) != entry.digest:
            raise ErrataError(f"{str(path)!r} is not the file that was added; put that back, or revert the entry")
        return patch

    def patch(self) -> Patch:
        """All that the model carries, as one patch."""
        return added([self.load(e) for e in self.active])

    def conflicts(self) -> list[Conflict]:
        """The conflicts among what the model carries."""
        return conflicts({e.file: self.load(e) for e in self.active})

    # Writing

    def add(self, patch: Patch, name: str, anyway: bool = False) -> list[Conflict]:
        """Take a patch in, after those that are there; the conflicts it has with them.

        A patch made on top of all that the model carries (`prior`) takes its place.

        Args:
            patch: made for the same model.
            name: of its file in the folder, without `.safetensors`.
            anyway: take it in although it corrects again what is corrected there. The later answer mostly wins, but
                both are in the weights; reverting the earlier first is cleaner.

        Raises:
            UsageError: there is such a file, or (unless `anyway`) it contradicts or repeats what is there.
            ErrataError: it is for another model.
        """
        if not patch.edits:
            raise UsageError("the patch corrects nothing; give one that `errata edit --save` wrote")
        if Path(name).name != name or name.startswith("."):
            raise UsageError(f"{name!r} is no name for a file in the folder; give a plain word")
        with self._writing():
            file = f"{name}.safetensors"
            base = patch.about["base"]
            if (self.folder / file).exists():
                raise UsageError(f"{str(self.folder / file)!r} is there already; give another name")
            if self.base is not None and self.base["fingerprint"] != base["fingerprint"]:
                raise ErrataError(f"the patch is for {_named(base)}, the history is of {_named(self.base)}")
            here = {e.file: self.load(e) for e in self.active}
            if on_top := _contains(patch, added(list(here.values()))):
                found = []
            else:
                found = [c for c in conflicts({**here, file: patch}) if c.files[1] == file != c.files[0]]
            hard = [c for c in found if c.kind != "keys"]
            if hard and not anyway:
                raise UsageError(f"{hard[0]}{_and_more(len(hard) - 1)}; revert the earlier one first, or add it anyway")
            self.base = self.base or dict(base)
            self._keep(patch, file, [e.file for e in self.active] if on_top else [])
        return found

    def revert(self, which: str, edit: Edit | None = None) -> Patch:
        """Take back a patch, or one edit of it; the patch that the model carries then.

        Args:
            which: the entry's file, with or without `.safetensors`.
            edit: one of its edits; the others stay as they are, where the method keeps them apart.

        Raises:
            UsageError: the model carries no such entry, or the entry has no such edit.
            ErrataError: the edit can't be told apart from others.
        """
        with self._writing():
            entry = self._entry(which)
            left = self.load(entry).without(edit) if edit is not None else Patch()
            if left.edits:
                self._keep(left, _next(entry.file, {e.file for e in self.entries}), [entry.file])
            else:
                self.entries = [replace(e, state="reverted") if e == entry else e for e in self.entries]
                self._save()
        return self.patch()

    def without(self, which: str, edit: Edit | None = None) -> Patch:
        """What the model would carry after `revert`; nothing is written."""
        entry, out = self._entry(which), []
        for e in self.active:
            patch = self.load(e)
            if e != entry:
                out.append(patch)
            elif edit is not None:
                out.append(patch.without(edit))
        return added(out)

    def _entry(self, which: str) -> Entry:
        file = which if which.endswith(".safetensors") else f"{which}.safetensors"
        found = [e for e in self.active if e.file == file]
        if not found:
            known = ", ".join(e.file for e in self.active) or "nothing"
            raise UsageError(f"the model carries no {file!r}; it carries {known}")
        return found[0]

    def _keep(self, patch: Patch, file: str, replaced: Sequence[str]) -> None:
        """Write a patch and its entry; the entries it replaces, at whose place it stands, are marked."""
        path = self.folder / file
        patch.save(path)
        methods = tuple(dict.fromkeys(s["method"] for s in patch.about.get("steps", ())))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = Entry(file, _digest(path), len(patch.edits), methods, now)
        marked = [replace(e, state="replaced", by=file) if e.file in replaced else e for e in self.entries]
        place = max((i + 1 for i, e in enumerate(marked) if e.file in replaced), default=len(marked))
        self.entries = [*marked[:place], entry, *marked[place:]]
        try:
            self._save()
        except ErrataError:
            path.unlink()  # a patch that no manifest names would stand in the way of the next try
            raise

    def _save(self) -> None:
        content = {"format": FORMAT, "base": self.base, "entries": [asdict(e) for e in self.entries]}
        store.write(self.folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """While inside, nobody else writes; what others wrote before is read again."""
        new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{str(self.folder)!r} can't be made: {error.strerror}; give another folder") from error
        lock = self.folder / LOCK
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            raise ErrataError(
                f"process {lock.read_text().strip() or '?'} is writing to {str(self.folder)!r}; wait for it, or, if "
                f"there is no such process any more, delete {str(lock)!r}"
            ) from None
        except OSError as error:
            raise UsageError(f"{str(self.folder)!r} can't be written: {error.strerror}; give another folder") from error
        try:
            with os.fdopen(handle, "w") as file:
                file.write(f"{os.getpid()}\n")
            if (self.folder / MANIFEST).is_file():
                now = History.open(self.folder)
                self.base, self.entries = now.base, now.entries
            yield
        finally:
            lock.unlink(missing_ok=True)
            if new and not any(self.folder.iterdir()):
                self.folder.rmdir()


# Comparing


def conflicts(patches: Mapping[str, Patch]) -> list[Conflict]:
    """Where corrections get in each other's way, within a patch and between patches.

    Args:
        patches: by the name of the file they are in, in the order in which they apply.
    """
    owned = [(file, i, e) for file, p in patches.items() for i, e in enumerate(p.edits)]
    out: list[Conflict] = []
    seen: dict[tuple[str, str], list[int]] = {}
    for number, (file, _, edit) in enumerate(owned):
        asked = _question(edit)
        for earlier in seen.get(asked, ()):
            other_file, _, other = owned[earlier]
            kind = "twice" if _same(other.target, edit.target) else "target"
            if kind == "target" or other_file != file:
                out.append(Conflict(kind, other, edit, (other_file, file)))
        seen.setdefault(asked, []).append(number)
    known = {(_question(c.first), _question(c.second)) for c in out}
    for a, b, cosine in _overlapping(patches, owned):
        (file_a, _, first), (file_b, _, second) = owned[a], owned[b]
        if (_question(first), _question(second)) not in known:
            out.append(Conflict("keys", first, second, (file_a, file_b), cosine))
    return out


def _question(edit: Edit) -> tuple[str, str]:
    return _plain(edit.subject), _plain(edit.text)


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def _same(a: str, b: str) -> bool:
    return _plain(a) == _plain(b)


def _overlapping(
    patches: Mapping[str, Patch], owned: Sequence[tuple[str, int, Edit]]
) -> Iterator[tuple[int, int, float]]:
    """Pairs of edits (numbers into `owned`) that share a key at some module, and the largest cosine."""
    number = {(file, i): n for n, (file, i, _) in enumerate(owned)}
    found: dict[tuple[int, int], float] = {}
    for module in dict.fromkeys(name for p in patches.values() for name in p.changes):
        for near, owners in _keys(module, patches, number):
            for i, j in near.triu(1).ge(OVERLAP).nonzero().tolist():
                pair = min(owners[i], owners[j]), max(owners[i], owners[j])
                if pair[0] != pair[1]:
                    found[pair] = max(found.get(pair, 0.0), float(near[i, j]))
    yield from ((a, b, cosine) for (a, b), cosine in sorted(found.items()))


def _keys(
    module: str, patches: Mapping[str, Patch], number: Mapping[tuple[str, int], int]
) -> Iterator[tuple[Tensor, list[int]]]:
    """How near the keys at a module are to each other, and whose they are: of low-rank changes by cosine, of codebooks
    1 where their balls meet."""
    rows, books, row_owners, book_owners = [], [], [], []
    for file, patch in patches.items():
        for change in patch.changes.get(module, ()):
            if isinstance(change, LowRank):
                rows.append(change.right)
                row_owners += [number[file, o] for o in change.owners.tolist()]
            elif isinstance(change, Codebook):
                books.append((change.keys[change.entries], change.radii[change.entries]))
                book_owners += [number[file, o] for o in change.owners.tolist()]
    if rows:
        K = torch.nn.functional.normalize(torch.cat(rows), dim=1)
        yield (K @ K.T).abs(), row_owners
    if books:
        keys, radii = (torch.cat(parts) for parts in zip(*books, strict=True))
        yield (torch.cdist(keys, keys) <= radii[:, None] + radii).float(), book_owners


def diff(a: Patch, b: Patch) -> dict[str, Any]:
    """What two patches have and have not in common.

    Returns:
        `only_a`, `only_b`, `both` (edits), `otherwise` (pairs of the same question with two answers), and `weights`:
        for each module the norms of both changes, that of their difference, and their cosine (None for memories).
    """
    of_a, of_b = ({_question(e): e for e in p.edits} for p in (a, b))
    shared = [q for q in of_a if q in of_b]
    return {
        "only_a": [e.to_dict() for q, e in of_a.items() if q not in of_b],
        "only_b": [e.to_dict() for q, e in of_b.items() if q not in of_a],
        "both": [of_a[q].to_dict() for q in shared if _same(of_a[q].target, of_b[q].target)],
        "otherwise": [
            [of_a[q].to_dict(), of_b[q].to_dict()] for q in shared if not _same(of_a[q].target, of_b[q].target)
        ],
        "weights": [_apart(name, a, b) for name in dict.fromkeys([*a.changes, *b.changes])],
    }


def _apart(module: str, a: Patch, b: Patch) -> dict[str, Any]:
    x, y = _delta(module, a), _delta(module, b)
    if x is None or y is None:
        return {"module": module, "norm_a": None, "norm_b": None, "norm_apart": None, "cosine": None}
    zero = torch.zeros_like(y if x.ndim == 0 else x)
    x, y = x + zero, y + zero
    both = float(x.norm() * y.norm())
    return {
        "module": module,
        "norm_a": float(x.norm()),
        "norm_b": float(y.norm()),
        "norm_apart": float((x - y).norm()),
        "cosine": float((x * y).sum()) / both if both else None,
    }


def _delta(module: str, patch: Patch) -> Tensor | None:
    """What a patch adds to a weight (0 if nothing); None where it answers beside it."""
    listed = patch.changes.get(module, ())
    weights = [c.delta.double() for c in listed if isinstance(c, LowRank | Dense)]
    if len(weights) < len(listed):
        return None
    return sum(weights, start=torch.zeros((), dtype=torch.float64))


def effect(lm: LM, before: Patch, after: Patch) -> list[dict[str, Any]]:
    """What going from one patch to another does to the corrections of either: each asked of the model under both.

    Returns:
        For each edit: its fields, whether it is in `after` (`stays`), and `before` and `after`: what the model `says`,
        whether that is the target (`says_target`), and the target's probability (`p_target`).
    """
    edits = list(dict.fromkeys([*before.edits, *after.edits]))
    states = [reply(lm, edits, patch) for patch in (before, after)]
    return [
        {**e.to_dict(), "stays": e in after.edits, "before": then.to_dict(), "after": now.to_dict()}
        for e, then, now in zip(edits, *states, strict=True)
    ]


# Files


def _contains(patch: Patch, earlier: Patch) -> bool:
    """Whether a patch was made on top of another: it begins with its edits, and with what they changed."""
    n = len(earlier.edits)
    if not n or patch.edits[:n] != earlier.edits or not earlier.changes.keys() <= patch.changes.keys():
        return False
    for name, changes in earlier.changes.items():
        for mine, its in zip(patch.changes[name], changes, strict=False):
            if isinstance(mine, LowRank) and isinstance(its, LowRank):
                rank = its.left.shape[1]
                if not (torch.equal(mine.left[:, :rank], its.left) and torch.equal(mine.right[:rank], its.right)):
                    return False
    return True


def _next(file: str, taken: set[str]) -> str:
    """A free name for a later form of a file: `a.safetensors`, `a-2.safetensors` ..."""
    stem = re.sub(r"-\d+$", "", file.removesuffix(".safetensors"))
    return next(name for n in range(2, 10**6) if (name := f"{stem}-{n}.safetensors") not in taken)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _named(base: Mapping[str, str]) -> str:
    return f"{base['name']} ({base['fingerprint'][:8]})"


def _and_more(n: int) -> str:
    return f", and {n} more such conflicts" if n else ""
