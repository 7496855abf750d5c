"""Where corrections get in each other's way: two answers to one question, one asked for twice, keys that meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..changes import Codebook, LowRank
from ..edit import Edit, asks
from ..patch import Patch
from ..text import words

OVERLAP = 0.65
"""Cosine from which two keys are taken for one. ROME on almanac: all of 20 pairs of one subject in two prompts are over
it, and of 1,770 pairs of different subjects one is, 0.87 (two glaciers, whose last token is the same)."""


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


def conflicts(patches: Mapping[str, Patch]) -> list[Conflict]:
    """Where corrections get in each other's way, within a patch and between patches.

    Args:
        patches: by the name of the file they are in, in the order in which they apply.
    """
    owned = [(file, i, e) for file, p in patches.items() for i, e in enumerate(p.edits)]
    out: list[Conflict] = []
    seen: dict[str, list[int]] = {}
    for number, (file, _, edit) in enumerate(owned):
        asked = asks(edit)
        for earlier in seen.get(asked, ()):
            other_file, _, other = owned[earlier]
            kind = "twice" if same(other.target, edit.target) else "target"
            if kind == "target" or other_file != file:
                out.append(Conflict(kind, other, edit, (other_file, file)))
        seen.setdefault(asked, []).append(number)
    known = {(asks(c.first), asks(c.second)) for c in out}
    for a, b, cosine in _overlapping(patches, owned):
        (file_a, _, first), (file_b, _, second) = owned[a], owned[b]
        if (asks(first), asks(second)) not in known:
            out.append(Conflict("keys", first, second, (file_a, file_b), cosine))
    return out


def same(a: str, b: str) -> bool:
    """Whether two answers are one, whichever way they are written."""
    return words(a) == words(b)


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
