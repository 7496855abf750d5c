"""The trainer that all learned editors share: Adam, a validation part, early stopping, and a file to go on from.

What a step draws hangs on the seed and the step's number alone, so a training that was killed goes on from its last
checkpoint to the same numbers. The method says what a network is and what a batch of cases teaches it (`Trained`).
"""

from __future__ import annotations

import json
import logging
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from . import editor as editors
from . import presets, store
from .data import Case
from .editor import Editor
from .effects import Setting
from .errors import ErrataError, UsageError
from .lm import LM
from .method import Method, versions
from .tokens import follow

log = logging.getLogger(__name__)

Losses = dict[str, float]
"""`total`, which is made small, and its parts."""
Progress = Callable[[int, Losses, bool], None]
"""Called with the number of the step, its losses, and whether they are those of the validation part."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How an editor is trained."""

    steps: int = 1000
    """Batches at most."""
    batch: int = 16
    """Cases in a batch."""
    accumulate: int = 1
    """Batches that a step is taken after, for the mean of their gradients: a step's cases need not fit in memory."""
    rate: float = 1e-3
    """Adam's learning rate."""
    fall: float = 0.0
    """The share of the steps, the last ones, in which the rate falls to zero."""
    clip: float = 1.0
    """The gradient's norm at most."""
    every: int = 50
    """Steps between two looks at the validation part, at which the state is written too."""
    patience: int = 5
    """Looks without a better loss before training ends."""
    held: int = 64
    """Cases in the validation part, which nothing is learned from; at most a fifth."""
    precision: Literal["highest", "high", "medium"] = "highest"
    """Of products of matrices (`torch.set_float32_matmul_precision`): `medium` takes half the time where a processor
    multiplies bfloat16."""
    seed: int = 0
    """Of the split, the first network, and what is drawn."""
    start: str = ""
    """An editor that training goes on from in place of a new network, also one of another method with such layers."""

    def rate_at(self, step: int) -> float:
        """Adam's learning rate in a step."""
        return self.rate * min(1.0, (self.steps - step) / (self.steps * self.fall)) if self.fall else self.rate


@dataclass(frozen=True, kw_only=True)
class Trained(Method):
    """A method whose edits are made by a network that was trained for the model."""

    trained = True

    editor: str = ""
    """The trained editor: the name of one that ships with errata, or a file that `errata train` wrote. It edits with
    the settings that it was trained with; those below say how a new one is trained."""

    @abstractmethod
    def network(self, lm: LM) -> nn.Module:
        """A network as training begins with it."""

    def fit(self, lm: LM, network: nn.Module, cases: Sequence[Case]) -> None:
        """Set what is not learned by steps (statistics of the inputs), from some of the cases."""

    @abstractmethod
    def learn(self, lm: LM, network: nn.Module, cases: Sequence[Case], draw: random.Random) -> Losses:
        """The losses of a batch, whose gradients are left in the network's parameters."""

    @abstractmethod
    def judge(self, lm: LM, network: nn.Module, cases: Sequence[Case], draw: random.Random) -> Losses:
        """The losses of a batch, for the validation part."""

    def prepare(self, lm: LM) -> None:
        self.ready(lm)  # without an editor no edit is begun

    def accept(self, editor: Editor, lm: LM) -> None:
        """Refuse an editor that was trained for another method or model."""
        editor.check(self.name, lm)

    def train(self, lm: LM, cases: Sequence[Case], course: Course | None = None, **places: Any) -> Editor:
        """Train an editor for a model.

        Args:
            lm: the model; it is left as it was.
            cases: what to learn from: never those the editor is judged by afterwards.
            course: how; by default the one of the model's preset.
            places: `held`, `out`, `log` and `progress` of `errata.train.train`.
        """
        chosen = course or Course(**presets.course(self.name, lm))
        return train(self, lm, cases, chosen, **places)

    def ready(self, lm: LM) -> tuple[Any, Any]:
        """This method with the settings of its editor, and the trained network.

        Raises:
            UsageError: no editor is named.
            ErrataError: it was trained for another model or method.
        """
        if not self.editor:
            raise UsageError(
                f"{self.name} needs an editor trained for {lm.name}; train one (errata train {self.name} --model "
                f"{lm.name} --data cases.json --out editor.safetensors), then give editor=editor.safetensors"
            )
        key = ("editor", self.name, self.editor)
        if key not in lm.memo:
            found = editors.find(self.editor)
            self.accept(found, lm)
            known = {k: presets.frozen(v) for k, v in found.about["settings"].items() if k not in ("editor", "seed")}
            how = replace(self, **known)
            network = how.network(lm)
            network.load_state_dict({k: t.float() if t.is_floating_point() else t for k, t in found.tensors.items()})
            lm.memo[key] = how, network.to(lm.device).requires_grad_(False).eval()
        return lm.memo[key]


def train(
    method: Trained,
    lm: LM,
    cases: Sequence[Case],
    course: Course,
    *,
    held: Sequence[Case] | None = None,
    out: str | Path | None = None,
    log: str | Path | None = None,
    progress: Progress | None = None,
) -> Editor:
    """Train an editor; with `out` it is written there, and until then the state to go on from after a kill.

    Args:
        method: whose editor.
        lm: the unedited model.
        cases: what to learn from. Those that the model's vocabulary can't write are left out.
        course: how.
        held: the validation part; by default as many of the cases as the course says. It has no more than that.
        out: the editor's file. An unfinished one there, of the same training, is gone on with.
        log: a JSON-lines file of the losses of every step.
        progress: told the losses, of steps and of the validation part.

    Raises:
        UsageError: fewer than five cases can be used, or `out` holds another unfinished training.
        ErrataError: the loss is no finite number.
    """
    precision = Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, course.precision)
    with lm.at_work(), lm.hold(precision):
        torch.manual_seed(course.seed)
        places = Path(out) if out else None, Path(log) if log else None
        return _Training(method, lm, cases, held, course, *places, progress).through()


@dataclass
class _Training:
    method: Trained
    lm: LM
    cases: Sequence[Case]
    given: Sequence[Case] | None
    course: Course
    out: Path | None
    log: Path | None
    progress: Progress | None
    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    looks: list[Losses] = field(default_factory=list)
    """The losses of the validation part, and the steps they were taken at."""

    def __post_init__(self) -> None:
        draw = random.Random(self.course.seed)
        usable = draw.sample(found := writable(self.lm, self.cases), len(found))
        if len(usable) < 5:
            raise UsageError(f"{len(usable)} of {len(self.cases)} cases can be learned from; give at least 5")
        if self.given is None:
            aside = min(self.course.held, len(usable) // 5)
            self.held, self.taught = usable[:aside], usable[aside:]
        else:
            asked = writable(self.lm, self.given)
            if not asked:
                raise UsageError(f"none of the {len(self.given)} cases held out can be asked; give others")
            self.held, self.taught = draw.sample(asked, min(self.course.held, len(asked))), usable
        self.network = self.method.network(self.lm).to(self.lm.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=self.course.rate)
        if not self._resumed():
            self._begin()
            self._look()

    def through(self) -> Editor:
        while self.step < self.course.steps and self._promising():
            self._learn()
            if self.step % self.course.every == 0 or self.step == self.course.steps:
                self._look()
        found = Editor(_halved(self.network, self.best), self._about())
        if self.out:
            found.save(self.out)
        return found

    def _begin(self) -> None:
        self.method.fit(self.lm, self.network, self.taught)
        if self.course.start:
            earlier = editors.find(self.course.start)
            earlier.check(earlier.about["method"], self.lm)
            own = self.network.state_dict()
            foreign = [k for k, t in earlier.tensors.items() if k not in own or own[k].shape != t.shape]
            if foreign:
                raise UsageError(
                    f"{self.course.start!r} has {foreign[0]}, which the network to be trained has not in this shape; "
                    "give the settings that the editor was trained with"
                )
            self.network.load_state_dict(dict(earlier.tensors), strict=False)

    def _learn(self) -> None:
        draw = random.Random(f"{self.course.seed}/{self.step}")
        each, n = self.course.batch, min(self.course.batch * self.course.accumulate, len(self.taught))
        cases = draw.sample(self.taught, n)
        batches = [cases[i : i + each] for i in range(0, n, each)]
        self.optimiser.zero_grad()
        losses: Losses = {}
        for batch in batches:
            for name, loss in self.method.learn(self.lm, self.network, batch, draw).items():
                losses[name] = losses.get(name, 0.0) + loss / len(batches)
        for p in self.network.parameters():
            if p.grad is not None:
                p.grad /= len(batches)
        if not math.isfinite(losses["total"]):
            raise ErrataError(f"the loss of step {self.step} is {losses['total']}; train with a lower rate")
        clip_grad_norm_(self.network.parameters(), self.course.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.course.rate_at(self.step)
        self.optimiser.step()
        self.step += 1
        self._tell(losses, held=False)

    def _look(self) -> None:
        """Judge the validation part, keep the best network, and write down where training stands."""
        with torch.no_grad():
            losses = self.method.judge(self.lm, self.network, self.held, random.Random(self.course.seed))
        if all(losses["total"] < look["total"] for look in self.looks):
            self.best = {k: t.detach().clone() for k, t in self.network.state_dict().items()}
        self.looks.append({"step": self.step, **losses})
        self._tell(losses, held=True)
        if self.out:
            Editor(self._state(), {**self._about(), "progress": {"step": self.step}}).save(self.out)

    def _promising(self) -> bool:
        totals = [look["total"] for look in self.looks]
        return len(totals) - 1 - totals.index(min(totals)) < self.course.patience

    def _tell(self, losses: Losses, held: bool) -> None:
        if self.log:
            with self.log.open("a") as file:
                file.write(json.dumps({"step": self.step, "held": held, **losses}) + "\n")
        if self.progress:
            self.progress(self.step, losses, held)

    # What a killed training goes on from

    def _about(self) -> dict[str, Any]:
        return {
            "base": {"fingerprint": self.lm.fingerprint, "name": self.lm.name},
            "method": self.method.name,
            "settings": json.loads(json.dumps(asdict(self.method))),
            "training": {
                "course": asdict(self.course),
                "cases": len(self.taught),
                "data": store.digest({}, {"prompts": [c.edit.to_dict() for c in self.taught + self.held]})[:16],
                "losses": self.looks,
            },
            "versions": versions(),
        }

    def _state(self) -> dict[str, Tensor]:
        moving = {f"now/{k}": t for k, t in self.network.state_dict().items()}
        best = {f"best/{k}": t for k, t in self.best.items()}
        adam = self.optimiser.state_dict()["state"]
        return moving | best | {f"adam/{i}/{k}": t for i, state in adam.items() for k, t in state.items()}

    def _resumed(self) -> bool:
        """Go on with an unfinished training of the same kind, if there is one."""
        if self.out is None or not self.out.is_file():
            return False
        kept = Editor.load(self.out)
        if "progress" not in kept.about:
            return False
        for what in ("base", "method", "settings"):
            if kept.about[what] != self._about()[what]:
                raise UsageError(
                    f"{str(self.out)!r} holds the unfinished training of another {what}; give another file"
                )
        begun, now = kept.about["training"], self._about()["training"]
        if {**asdict(Course()), **begun["course"]} != now["course"] or begun["data"] != now["data"]:
            raise UsageError(f"{str(self.out)!r} holds an unfinished training on other terms; give another file")
        self.step, self.looks = kept.about["progress"]["step"], list(kept.about["training"]["losses"])
        self.network.load_state_dict(_under(kept.tensors, "now/"))
        self.best = _under(kept.tensors, "best/")
        adam: dict[int, dict[str, Tensor]] = {}
        for name, t in _under(kept.tensors, "adam/").items():
            number, what = name.split("/")
            adam.setdefault(int(number), {})[what] = t
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": adam})
        if self.log and self.log.is_file():
            lines = [line for line in self.log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            store.write(self.log, "".join(f"{line}\n" for line in lines))
        return True


def _under(tensors: Any, start: str) -> dict[str, Tensor]:
    return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}


def _halved(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with parameters in half precision; statistics stay whole, as their range is wider."""
    learned = {name for name, _ in network.named_parameters()}
    return {k: t.half() if k in learned else t for k, t in state.items()}


def writable(lm: LM, cases: Sequence[Case]) -> list[Case]:
    """The cases that can be learned from, without the probes that can't be asked."""
    found, can = [], cache(lambda prompt, answer: _writable(lm, prompt, answer))
    for case in cases:
        probes = tuple(p for p in case.probes if can(p.prompt, p.answer))
        if probes and probes[0].kind == "efficacy":
            found.append(replace(case, probes=probes))
    if len(found) < len(cases):
        log.info("%d of %d cases left out: their words can't be written", len(cases) - len(found), len(cases))
    return found


def _writable(lm: LM, prompt: str, answer: str) -> bool:
    try:
        lm.encode([follow(prompt, answer)])
    except ErrataError:
        return False
    return True
