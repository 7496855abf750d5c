"""A trained editor: the tensors of a network that makes edits, in one safetensors file with a JSON header.

The header says which model it was trained on, by which method with which settings, on what, and how its losses went. An
editor works on that model only, and is refused on another. Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from . import store
from .errors import ErrataError
from .lm import ALMANAC, LM

FORMAT = 1
MARK = "errata-editor"
SHIPPED = ALMANAC / "editors"


@dataclass(frozen=True, eq=False)
class Editor:
    """What training gives."""

    tensors: Mapping[str, Tensor]
    """The network's state."""
    about: Mapping[str, Any]
    """`base` (fingerprint and name of the model), `method`, `settings`, `training` (course, data, losses), `versions`;
    of a training that goes on, `progress` as well."""

    def save(self, path: str | Path) -> None:
        """Write the editor to one safetensors file, whole or not at all."""
        store.write(path, store.sealed(MARK, self.tensors, {"format": FORMAT, "about": dict(self.about)}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an editor.

        Raises:
            UsageError: there is no such file.
            ErrataError: it is damaged, or no editor.
        """
        wanted, foreign = (
            "an editor that `errata train` wrote",
            "holds no editor; give a file that `errata train` wrote",
        )
        return store.unseal(path, MARK, FORMAT, wanted, foreign, lambda header, tensors: cls(tensors, header["about"]))

    def check(self, method: str, lm: LM) -> None:
        """Refuse the editor for another method or model than it was trained for.

        Raises:
            ErrataError: it doesn't fit.
        """
        base = self.about["base"]
        if self.about["method"] != method:
            raise ErrataError(f"the editor was trained for {self.about['method']}, not for {method}; give one that was")
        if base["fingerprint"] != lm.fingerprint:
            raise ErrataError(
                f"the editor was trained on {base['name']} ({base['fingerprint'][:8]}), this model is {lm.name} "
                f"({lm.fingerprint[:8]}); train one for it: errata train {method} --model {lm.name}"
            )
        if "progress" in self.about:
            raise ErrataError("the editor's training is not finished; the command that began it goes on with it")


def find(name: str) -> Editor:
    """An editor by the name of one that ships with errata, or by its path."""
    shipped = SHIPPED / f"{name}.safetensors"
    return Editor.load(shipped if shipped.is_file() else name)
