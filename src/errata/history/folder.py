"""A plain folder of patches with a manifest, which says what a model carries and in what order.

Nothing is ever deleted: a patch that is taken back stays in its file and is marked. Only one process at a time writes
to a folder. The manifest is written last, and whole: what a killed process had begun is no part of the history.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from .. import store
from ..changes import LowRank
from ..documents import is_file, parsed_json, said
from ..edit import Edit
from ..errors import ErrataError, UsageError
from ..patch import Patch, added
from .conflicts import Conflict, conflicts

FORMAT = 1
MANIFEST, LOCK = "history.json", "history.lock"
STATES = ("active", "reverted", "replaced")


@dataclass(frozen=True)
class Entry:
    """A patch of a history.

    Raises:
        ValueError: a part is not of its type.
    """

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

    def __post_init__(self) -> None:
        types = {"file": str, "digest": str, "edits": int, "added": str, "by": str | None}
        wrong = [
            f.name for f in fields(self) if f.name in types and not isinstance(getattr(self, f.name), types[f.name])
        ]
        if wrong or self.state not in STATES or not all(isinstance(m, str) for m in self.methods):
            raise ValueError(f"{(wrong or ['state or methods'])[0]} of an entry is of another type")
        if not _is_plain(self.file):
            raise ValueError(f"an entry's file is {said(self.file)}")


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
        if not is_file(path):
            _refuse_foreign(folder)
            return cls(folder)
        try:
            found = parsed_json(path.read_text(encoding="utf-8"))
            if found["format"] > FORMAT:
                raise ErrataError(f"{str(path)!r} was written by a newer errata (format {found['format']}); upgrade")
            entries = [Entry(**{**e, "methods": tuple(e["methods"])}) for e in found["entries"]]
            return cls(folder, _sound_base(found["base"]), entries)
        except OSError as error:
            raise ErrataError(f"{str(path)!r} can't be read: {error.strerror or error}") from error
        except (LookupError, TypeError, ValueError) as error:
            raise ErrataError(f"{str(path)!r} is damaged ({error}); restore it from a copy") from error

    @property
    def active(self) -> list[Entry]:
        """The entries that the model carries."""
        return [e for e in self.entries if e.state == "active"]

    def load(self, entry: Entry) -> Patch:
        """The patch of an entry, after a look at whether its file is the one that was added."""
        path = self.folder / entry.file
        patch = Patch.load(path)
        if _digest(path.read_bytes()) != entry.digest:
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
        """Take a patch in, after those that are there; the conflicts it has with them. As `add_all` of one."""
        return self.add_all({name: patch}, anyway)

    def add_all(self, patches: Mapping[str, Patch], anyway: bool = False) -> list[Conflict]:
        """Take patches in, one after another, after those that are there: all of them, or none.

        A patch made on top of all that the model carries (`prior`) takes its place. One that is carried already, under
        the same name and to the bit, is left as it is.

        Args:
            patches: made for the same model, each by the name of its file in the folder, without `.safetensors`.
            anyway: take them in although they correct again what is corrected there. The later answer mostly wins, but
                both are in the weights; reverting the earlier first is cleaner.

        Returns:
            The conflicts that they have with what is there, and with each other.

        Raises:
            UsageError: there is such a file, or (unless `anyway`) one contradicts or repeats what is there.
            ErrataError: one is for another model.
        """
        with self._writing():
            coming = _Coming(self, anyway)
            for name, patch in patches.items():
                coming.take(name, patch)
            self._commit(coming.files, coming.entries, coming.base)
        return coming.found

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
            entry = self.entry(which)
            left = self.load(entry).without(edit) if edit is not None else Patch()
            if left.edits:
                file = _next(entry.file, {e.file for e in self.entries})
                content = left.to_bytes()
                entries = _replacing(self.entries, _entry(left, file, content), [entry.file])
                self._commit({file: content}, entries, self.base)
            else:
                entries = [replace(e, state="reverted") if e == entry else e for e in self.entries]
                self._commit({}, entries, self.base)
        return self.patch()

    def without(self, which: str, edit: Edit | None = None) -> Patch:
        """What the model would carry after `revert`; nothing is written."""
        entry, out = self.entry(which), []
        for e in self.active:
            patch = self.load(e)
            if e != entry:
                out.append(patch)
            elif edit is not None:
                out.append(patch.without(edit))
        return added(out)

    def entry(self, which: str) -> Entry:
        """The carried entry of a file, with or without `.safetensors`.

        Raises:
            UsageError: the model carries no such entry; says what became of it.
        """
        file = which if which.endswith(".safetensors") else f"{which}.safetensors"
        named = [e for e in self.entries if e.file == file]
        carried = [e for e in named if e.state == "active"]
        if carried:
            return carried[0]
        known = ", ".join(e.file for e in self.active) or "nothing"
        became = f", and {file} was {_became(named[-1])}" if named else ""
        raise UsageError(f"the model carries no {file!r}; it carries {known}{became}")

    def _commit(self, files: Mapping[str, bytes], entries: list[Entry], base: dict[str, str] | None) -> None:
        """Write files, then the manifest that names them; where that fails, all is as it was."""
        new = [path for file in files if not (path := self.folder / file).exists()]
        before = self.entries, self.base
        try:
            for file, data in files.items():
                store.write(self.folder / file, data)
            self.entries, self.base = entries, base
            self._save()
        except BaseException:
            self.entries, self.base = before
            for path in new:  # a file that no entry names would stand in the way of another patch
                path.unlink(missing_ok=True)
            raise

    def _save(self) -> None:
        content = {"format": FORMAT, "base": self.base, "entries": [asdict(e) for e in self.entries]}
        store.write(self.folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """While inside, nobody else writes; what others wrote before is read again."""
        new = not self.folder.exists()
        with ExitStack() as inside:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                inside.callback(self._leave, new)
                inside.enter_context(store.locked(self.folder / LOCK, f"writing to {str(self.folder)!r}"))
            except OSError as error:
                why = error.strerror or error
                raise UsageError(f"{str(self.folder)!r} can't be written: {why}; give another folder") from error
            if (self.folder / MANIFEST).is_file():
                now = History.open(self.folder)
                self.base, self.entries = now.base, now.entries
            yield

    def _leave(self, new: bool) -> None:
        if new and not any(self.folder.iterdir()):
            self.folder.rmdir()


class _Coming:
    """What a history comes to as patches are taken in; nothing is written."""

    def __init__(self, history: History, anyway: bool) -> None:
        self.history, self.anyway = history, anyway
        self.base, self.entries = history.base, list(history.entries)
        self.carried = {e.file: history.load(e) for e in history.active}
        self.files: dict[str, bytes] = {}
        self.found: list[Conflict] = []

    def take(self, name: str, patch: Patch) -> None:
        """Take one in, as `History.add_all` says."""
        if not patch.edits or not patch.about:
            raise UsageError("the patch corrects nothing; give one that `errata edit --save` wrote")
        if not _is_plain(name):
            raise UsageError(f"{name!r} is no name for a file in the folder; give a plain word")
        file, content = f"{name}.safetensors", patch.to_bytes()
        entry = _entry(patch, file, content)
        if any((e.file, e.digest, e.state) == (file, entry.digest, "active") for e in self.entries):
            return
        self._refuse(file, content, patch.about["base"])
        on_top = _contains(patch, added(list(self.carried.values())))
        if not on_top:
            self._refuse_contradiction(file, patch)
        self.base = self.base or dict(patch.about["base"])
        self.entries = _replacing(self.entries, entry, list(self.carried) if on_top else [])
        self.carried = {file: patch} if on_top else {**self.carried, file: patch}
        self.files[file] = content

    def _refuse(self, file: str, content: bytes, base: Mapping[str, str]) -> None:
        path = self.history.folder / file
        known = any(e.file == file for e in self.entries)
        if known or (path.exists() and path.read_bytes() != content):  # the same, without an entry: of a killed process
            what = "" if known else ", and no entry names it"
            raise UsageError(f"{str(path)!r} is there already{what}; give another name")
        if self.base is not None and self.base["fingerprint"] != base["fingerprint"]:
            raise ErrataError(f"the patch is for {_named(base)}, the history is of {_named(self.base)}")

    def _refuse_contradiction(self, file: str, patch: Patch) -> None:
        new = [c for c in conflicts({**self.carried, file: patch}) if c.files[1] == file != c.files[0]]
        hard = [c for c in new if c.kind != "keys"]
        if hard and not self.anyway:
            more = f", and {len(hard) - 1} more such conflicts" if len(hard) > 1 else ""
            raise UsageError(
                f"{hard[0]}{more}; take the earlier one back first (errata revert {self.history.folder} "
                f"{hard[0].files[0].removesuffix('.safetensors')}), or add it anyway (--anyway)"
            )
        self.found += new


def _replacing(entries: Sequence[Entry], entry: Entry, replaced: Sequence[str]) -> list[Entry]:
    """Entries with one more; those it replaces, at whose place it stands, are marked."""
    marked = [
        replace(e, state="replaced", by=entry.file) if e.file in replaced and e.state == "active" else e
        for e in entries
    ]
    place = max((i + 1 for i, e in enumerate(marked) if e.file in replaced), default=len(marked))
    return [*marked[:place], entry, *marked[place:]]


def _entry(patch: Patch, file: str, content: bytes) -> Entry:
    methods = tuple(dict.fromkeys(s["method"] for s in patch.about.get("steps", ())))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(file, _digest(content), len(patch.edits), methods, now)


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


def _refuse_foreign(folder: Path) -> None:
    """Refuse a place without a manifest where one can't be begun."""
    try:
        begun = not folder.exists() or (folder.is_dir() and ((folder / LOCK).exists() or not any(folder.iterdir())))
    except OSError as error:
        raise UsageError(f"{str(folder)!r} can't be read: {error.strerror or error}; give another folder") from error
    if not begun:  # a lock without a manifest: a process was killed before it wrote one
        raise UsageError(f"{str(folder)!r} holds no {MANIFEST}; give a new folder, or one that errata made")


def _sound_base(base: Any) -> dict[str, str] | None:
    if base is not None and not all(isinstance(base[name], str) for name in ("fingerprint", "name")):
        raise ValueError(f"its base is {said(base)}")
    return base


def _became(entry: Entry) -> str:
    return "taken back" if entry.state == "reverted" else f"replaced by {entry.by}"


def _is_plain(name: str) -> bool:
    return Path(name).name == name and not name.startswith(".")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _named(base: Mapping[str, str]) -> str:
    return f"{base['name']} ({base['fingerprint'][:8]})"
