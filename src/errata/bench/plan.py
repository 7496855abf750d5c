"""What a run is: model, data, methods, regimes. As a YAML file it can be run again: `errata bench run.yaml`.

```yaml
model: almanac
data: counterfact-mini
n: 200
method: {rome: {}, ft-l: {steps: 20}}   # or a list of names
regime: [single, sequential]
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from ..ask import Asking
from ..data import Case
from ..documents import parsed_yaml, said
from ..edit import UNSET
from ..errors import UsageError, unknown
from ..typed import NONE_SUCH, fitted, hints, spelled
from .run import CHECKPOINTS

REGIMES = ("single", "batch", "sequential")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """A run, before it has begun.

    Raises:
        UsageError: there is no such regime, or the parts don't go together.
    """

    model: str = "almanac"
    data: str = "counterfact-mini"
    method: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"rome": {}})
    """The settings that differ from the preset, by method."""
    regime: tuple[str, ...] = ("single",)
    n: int | None = None
    """Only the first so many cases."""
    known: bool = False
    """Whether only cases count whose truth the model says before the edit; it is asked until `n` are found."""
    part: str = "edit"
    """Of a data set that has several."""
    bad: str = "skip"
    """What a malformed row does: `skip` leaves it out and counts it, `fail` ends the run."""
    batch: int | None = None
    """Cases edited at once; by default all in the batch regime, one in the sequential one."""
    checkpoints: tuple[int, ...] = CHECKPOINTS
    """After so many cases a sequential run is asked what it retains."""
    seed: int = 0
    """Of the intervals."""
    chat: bool = False
    """Whether edits are made and all questions asked as a user's turn, by the tokenizer's chat template."""
    new_tokens: int | None = None
    """At most so many tokens of a generated answer."""
    openings: bool = False
    """Whether the model also writes on at length, for fluency and consistency."""
    text: str | None = None
    """A file of held-out text, for perplexity and KL."""
    tasks: tuple[str, ...] = ()
    """Of lm-evaluation-harness, on the edited model."""
    judge: Mapping[str, Any] | None = None
    """An endpoint that judges generated answers: `url`, `model`, `key_variable`."""
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "regime", tuple(dict.fromkeys(self.regime)))
        for name in self.regime:
            if name not in REGIMES:
                raise unknown("regime", name, REGIMES)
        if not self.method:
            raise UsageError("the run names no method; give one, or several")
        if not self.regime:
            raise UsageError(f"the run names no regime; give some of {', '.join(REGIMES)}")
        if self.regime == ("single",) and self.batch not in (None, 1):
            raise UsageError("the single regime makes edits one by one; give --regime batch (or sequential) with it")
        if self.bad not in ("skip", "fail"):
            raise unknown("way to treat a malformed row", self.bad, ("skip", "fail"))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype of weights", self.dtype, DTYPES)
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"the seed is {self.seed}; give a number of at most 63 bits")
        if any(after < 1 for after in self.checkpoints):
            raise UsageError(f"a checkpoint is after {min(self.checkpoints)} cases; give numbers of 1 or more")
        if self.judge is not None and not all(isinstance(v, str) for v in self.judge.values()):
            raise UsageError(f"judge takes texts by name (url, model, key_variable), not {said(self.judge)}")

    @property
    def asking(self) -> Asking:
        """How questions are put."""
        return Asking() if self.new_tokens is None else Asking(new_tokens=self.new_tokens)

    def size(self, regime: str, n: int) -> int:
        """How many of n cases are edited at once."""
        return {"single": 1, "batch": self.batch or n, "sequential": self.batch or 1}[regime]

    def to_yaml(self, made_with: Mapping[str, Any]) -> str:
        """The run as a file that gives it again, with what it was made with."""
        usual = asdict(Plan())
        found = json.loads(json.dumps({k: v for k, v in asdict(self).items() if k in _ALWAYS or v != usual[k]}))
        text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
        note = yaml.safe_dump({"made_with": json.loads(json.dumps(made_with))}, sort_keys=False, allow_unicode=True)
        return (
            f"# errata bench FILE runs this again\n{text}\n# What it was made with; a difference is warned of.\n{note}"
        )

    @classmethod
    def load(cls, path: str | Path) -> tuple[Self, dict[str, Any]]:
        """A run from its file, and what the file says it was made with.

        Raises:
            UsageError: there is no such file, it is no YAML, or a field of it is of another type.
        """
        try:
            found = parsed_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{str(path)!r} can't be read as a run ({error}); give a YAML file") from error
        if not isinstance(found, dict):
            raise UsageError(f"{str(path)!r} holds no run: expected fields like `method: [rome]`, found {said(found)}")
        made_with = found.pop("made_with", None) or {}
        if not isinstance(made_with, dict):
            raise UsageError(f"{str(path)!r}: made_with takes values by name, not {said(made_with)}")
        return cls.of(found, str(path)), made_with

    @classmethod
    def of(cls, found: Mapping[str, Any], where: str) -> Self:
        """A run from plain values.

        Args:
            found: fields by name; methods and regimes may also be a name, or a list of names.
            where: what to call them in an error.

        Raises:
            UsageError: there is no such field, or it is of another type.
        """
        known = hints(cls)
        values = {}
        for name, value in found.items():
            if name not in known:
                raise unknown(f"field of a run in {where}", str(name), known)
            plain = _methods(value) if name == "method" else _list(value) if name in _LISTS else value
            values[name] = fitted(plain, known[name])
            if values[name] is NONE_SUCH:
                raise UsageError(f"{where}: {name} takes {spelled(known[name])}, not {said(value)}")
        for name in ("n", "batch", "new_tokens"):
            value = values.get(name)
            if value is not None and value < 1:
                raise UsageError(f"{where}: {name} is {value!r}; give a number of 1 or more")
        return cls(**values)


_LISTS = ("regime", "tasks", "checkpoints")
_ALWAYS = ("model", "data", "method", "regime", "n", "seed")


def digest(cases: Sequence[Case]) -> str:
    """Of the cases themselves, so that a report says which they were."""
    values = [asdict(c, dict_factory=_set) for c in cases]
    text = json.dumps(values, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _set(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Fields without those that go without saying."""
    return {name: value for name, value in pairs if value != UNSET.get(name, ...)}


def _list(found: Any) -> Any:
    if isinstance(found, str):
        return [part.strip() for part in found.split(",") if part.strip()]
    return found if isinstance(found, list | tuple | Mapping) else [found]


def _methods(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {name: {} if settings is None else settings for name, settings in found.items()}
    names = _list(found)
    return {name: {} for name in names} if all(isinstance(name, str) for name in names) else found
