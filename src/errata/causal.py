"""Causal tracing: which hidden states carry a fact from the subject to the answer.

Meng et al. 2022 (ROME), https://arxiv.org/abs/2202.05262, section 2. Noise on the subject's embeddings makes the model
lose its answer; then the clean state of one token at one layer is put back, and what p(answer) gains by that is the
indirect effect of that state. Over many facts this says at which layers a model can be edited.

Every row of a batch has another state restored, so a whole map takes few passes.
"""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import log_softmax

from . import store
from .edit import Edit
from .effects import hooked
from .errors import ErrataError, UsageError, unknown
from .lm import LM
from .tokens import Tokens, passage, subject_tokens
from .trace import read, rewriting

log = logging.getLogger(__name__)

Kind = Literal["hidden", "mlp", "attention"]
"""What is restored: a block's output, or what its MLP or its attention adds to the residual stream."""
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first further token",
    "further tokens",
    "last token",
)
"""The rows of the paper's figure 2. Tokens before the subject have no effect."""
TOKENS = 16_384
"""Tokens in one pass. Changes the memory, not the result."""
ROWS = 256
"""Prompts in one pass, where nothing is restored."""


class Map(ABC):
    """Indirect effects by row and layer, as a table in the terminal, a figure, or plain values."""

    @property
    @abstractmethod
    def effects(self) -> Mapping[Kind, Tensor]:
        """{kind: (rows, layers)} what p(answer) gains."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[str]:
        """A name for every row."""

    @property
    @abstractmethod
    def heading(self) -> str:
        """What was traced, in one line."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""

    @property
    def scale(self) -> float:
        """The largest effect: the darkest colour, the same for every kind."""
        return max(1e-9, *(float(e.max()) for e in self.effects.values()))

    def table(self) -> Group:
        """The map in colours (in shades, where there are none), for `rich.print`."""
        parts: list[Any] = [Text(self.heading), Text(f"darkest: p(answer) +{self.scale:.3f}", style="dim")]
        for kind, effects in self.effects.items():
            grid = Table.grid(padding=(0, 1))
            grid.add_row(Text(kind, style="bold", justify="right"), _ruler(effects.shape[1]))
            for label, row in zip(self.labels, (effects / self.scale).tolist(), strict=True):
                grid.add_row(Text(label, justify="right"), _heat(row, kind))
            parts += [Text(), grid]
        return Group(*parts)

    def plot(self, path: str | Path) -> None:
        """Write the map as a PNG, SVG or PDF figure, one panel for each kind.

        Raises:
            UsageError: another kind of file.
            ErrataError: matplotlib is missing.
        """
        check_drawable(path)
        content = BytesIO()
        self._figure().savefig(content, format=Path(path).suffix[1:].lower(), dpi=150)
        store.write(path, content.getvalue())

    def _figure(self) -> Any:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ErrataError(
                "figures are drawn by matplotlib, which is missing: pip install 'errata[plot]'"
            ) from error
        panels, rows = self.effects, len(self.labels)
        figure = Figure(figsize=(2 + 3.2 * len(panels), 1.4 + 0.24 * rows), layout="constrained")
        for axes, (kind, effects) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            shown = axes.imshow(effects.numpy(), cmap=_COLOURS[kind][0], vmin=0, vmax=self.scale, aspect="auto")
            axes.set_title(kind)
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_yticks(range(rows), [_plain(label) for label in self.labels])
            axes.label_outer()
            figure.colorbar(shown, ax=axes, label="p(answer) gained")
        figure.suptitle(_plain(self.heading), fontsize="medium")
        return figure


@dataclass(frozen=True, eq=False)
class Trace(Map):
    """What one fact's states do for its answer. All probabilities are of the whole answer, after the prompt."""

    edit: Edit
    answer: str
    """What p is of: by default what the model says of itself."""
    tokens: tuple[str, ...]
    """The prompt's."""
    subject: range
    """The indices of the subject's tokens."""
    clean: float
    """p(answer)."""
    corrupted: float
    """p(answer) with noise on the subject's embeddings; the mean over draws, as all that follows."""
    scores: Mapping[Kind, Tensor]
    """{kind: (tokens, layers)} p(answer) with a clean state put back; for MLP and attention in a window of layers."""
    window: int
    """Layers in that window, centred on the one that is named."""
    noise: float
    """Standard deviation of the noise."""

    @property
    def effects(self) -> Mapping[Kind, Tensor]:
        return {kind: score - self.corrupted for kind, score in self.scores.items()}

    @property
    def labels(self) -> Sequence[str]:
        return [f"{token}*" if i in self.subject else token for i, token in enumerate(self.tokens)]

    @property
    def heading(self) -> str:
        return f"{self.edit.text} → {self.answer}: p = {self.clean:.3f} clean, {self.corrupted:.3f} corrupted"

    def to_dict(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("answer", "clean", "corrupted", "window", "noise")}
        scores = {kind: score.tolist() for kind, score in self.scores.items()}
        lists = {"tokens": list(self.tokens), "subject": list(self.subject), "scores": scores}
        return {"prompt": self.edit.text, **named, **lists}

    def role(self, token: int) -> str | None:
        """What part a token of the prompt plays, one of `ROLES`; None before the subject."""
        named = {len(self.tokens) - 1: "last token", self.subject[0]: ROLES[0], self.subject[-1]: ROLES[2]}
        if token < self.subject[0]:
            return None
        if token in named:
            return named[token]
        if token < self.subject[-1]:
            return "middle subject tokens"
        return "first further token" if token == self.subject[-1] + 1 else "further tokens"

    def by_role(self, kind: Kind) -> Tensor:
        """(roles, layers) the mean effect of the tokens in each role, NaN where the prompt has none."""
        effects, roles = self.effects[kind], [self.role(i) for i in range(len(self.tokens))]
        return torch.stack([effects[[i for i, role in enumerate(roles) if role == name]].mean(0) for name in ROLES])


@dataclass(frozen=True, eq=False)
class Average(Map):
    """The average indirect effect (AIE) over facts: the paper's figure 2."""

    traces: tuple[Trace, ...]

    @property
    def effects(self) -> Mapping[Kind, Tensor]:
        """{kind: (roles, layers)}. A role is averaged within each fact first, then over the facts that have it."""
        stacked: dict[Kind, Tensor] = {
            k: torch.stack([t.by_role(k) for t in self.traces]) for k in self.traces[0].scores
        }
        return {kind: found.nanmean(0).nan_to_num(0.0) for kind, found in stacked.items()}

    @property
    def labels(self) -> Sequence[str]:
        return ROLES

    @property
    def heading(self) -> str:
        clean, corrupted = (sum(getattr(t, f) for t in self.traces) / len(self.traces) for f in ("clean", "corrupted"))
        return f"{len(self.traces)} facts: p(answer) = {clean:.3f} clean, {corrupted:.3f} corrupted"

    def to_dict(self) -> dict[str, Any]:
        effects = {k: e.tolist() for k, e in self.effects.items()}
        return {"facts": len(self.traces), "roles": list(ROLES), "window": self.traces[0].window, "effects": effects}


@dataclass(frozen=True)
class Proposal:
    """Where to edit a model for which nobody has published it."""

    layers: tuple[int, ...]
    """The window of MLPs whose restoration does most at the subject's last token: for methods that edit several."""
    peak: int
    """Its centre: for methods that edit one layer."""
    effect: float
    """The average indirect effect there."""
    sure: float
    """The share of bootstrap resamples of the facts whose peak is among `layers`; 0 for a single fact."""
    facts: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers)}


def trace(
    lm: LM,
    edit: Edit,
    answer: str | None = None,
    *,
    kinds: Sequence[Kind] | None = None,
    window: int | None = None,
    noise: float | None = None,
    draws: int = 10,
    seed: int = 0,
) -> Trace:
    """The indirect effect of every state on p(answer).

    Args:
        lm: the model, as it stands (also with a patch applied).
        edit: the fact; its target plays no part.
        answer: whose probability is measured (`edit.truth`, say); by default the token that the model says next.
        kinds: what to restore; by default all that the model has.
        window: how many neighbouring MLPs or attentions are restored at once; by default 10 of 48 layers.
        noise: standard deviation of the noise; by default 3 times that of the subject's embeddings.
        draws: how many times noise is drawn; the same for every restoration.
        seed: of the noise.
    """
    found = _traced(lm, edit, answer, kinds, window, noise_of(lm, [edit]) if noise is None else noise, draws, seed)
    if found.clean <= found.corrupted:
        warnings.warn(
            f"noise on {edit.subject!r} does not lower p({found.answer!r}), which is {found.clean:.3f} without it; "
            f"the map shows no fact that {lm.name} knows",
            stacklevel=2,
        )
    return found


def _traced(
    lm: LM,
    edit: Edit,
    answer: str | None = None,
    kinds: Sequence[Kind] | None = None,
    window: int | None = None,
    noise: float = 0.0,
    draws: int = 10,
    seed: int = 0,
) -> Trace:
    places, depth = _places(lm, kinds), len(lm.blocks)
    width = max(1, round(10 / 48 * depth)) if window is None else window
    if not 1 <= width <= depth:
        raise UsageError(f"window={width} can't be used; {lm.name} has {depth} layers")
    with lm.asked():
        question = _question(lm, edit, answer)
        run = _Corrupted(lm, question, _noise(lm, question, draws, noise, seed))
        nothing = torch.zeros(1, depth, question.prompt, dtype=torch.bool)
        return Trace(
            edit=edit,
            answer=answer or lm.tokenizer.decode(question.wanted).strip(),
            tokens=tuple(lm.tokenizer.decode([i]).strip() for i in question.batch.ids[0, : question.prompt].tolist()),
            subject=question.subject,
            clean=float(_probability(lm, question)),
            corrupted=float(run.restored(lm.blocks, nothing)),
            scores={kind: run.map(names, 1 if kind == "hidden" else width) for kind, names in places.items()},
            window=width,
            noise=noise,
        )


def average(
    lm: LM, edits: Sequence[Edit], progress: Callable[[int, int], None] | None = None, **settings: Any
) -> Average:
    """Traces of the facts that the model knows, to be averaged.

    Args:
        lm: the model.
        edits: facts. One whose `truth` the model doesn't say is left out, as in the paper.
        progress: told after each fact how many are done, of how many.
        settings: those of `trace`; the noise is by default measured on all of the subjects.
    """
    found = known(lm, edits)
    if settings.get("noise") is None:
        settings["noise"] = noise_of(lm, found)
    traces = []
    for edit in found:
        traces.append(_traced(lm, edit, **settings))
        if progress:
            progress(len(traces), len(found))
    return Average(tuple(traces))


def known(lm: LM, edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The facts whose truth the model says (its first token is the likeliest), and those that name no truth.

    Raises:
        UsageError: none is left.
    """
    with lm.asked():
        asked = [e for e in edits if e.truth]
        said = {e: ok for i in range(0, len(asked), ROWS) for e, ok in _says(lm, asked[i : i + ROWS])}
    found = tuple(e for e in edits if said.get(e, True))
    if not found:
        raise UsageError(f"{lm.name} knows none of the {len(edits)} facts; trace facts that it knows")
    if len(found) < len(edits):
        log.info("%d of %d facts are traced; %s doesn't know the others", len(found), len(edits), lm.name)
    return found


def propose(found: Average, resamples: int = 1000, seed: int = 0) -> Proposal:
    """The layers to edit: the window of MLPs with the highest average indirect effect at the subject's last token."""
    at = ROLES.index("last subject token")
    facts = torch.stack([t.by_role("mlp")[at] for t in found.traces])
    peak = int(facts.mean(0).argmax())
    layers = _window(peak, found.traces[0].window, facts.shape[1])
    drawn = torch.randint(len(facts), (resamples, len(facts)), generator=torch.Generator().manual_seed(seed))
    peaks = facts[drawn].mean(1).argmax(1)
    sure = float(((peaks >= layers[0]) & (peaks <= layers[-1])).double().mean()) if len(facts) > 1 else 0.0
    return Proposal(tuple(layers), peak, float(facts.mean(0)[peak]), sure, len(facts))


def noise_of(lm: LM, edits: Sequence[Edit], times: float = 3.0) -> float:
    """The noise that corrupts: 3 times the standard deviation of the entries of all the subjects' embeddings."""
    ids = []
    for edit in edits:
        batch = lm.encode([passage(edit)])
        ids += batch.ids[0, _first(lm, edit) : int(batch.subject) + 1].tolist()
    return times * float(lm.model.get_input_embeddings().weight[ids].detach().float().std())


# One fact


@dataclass(frozen=True, eq=False)
class _Question:
    """A prompt, tokenized, and the answer whose probability is asked for."""

    batch: Tokens
    """One row: the prompt and all but perhaps the last token of the answer."""
    prompt: int
    """How many tokens the prompt has."""
    subject: range
    cols: Tensor
    """(k,) where the answer's tokens are read."""
    wanted: Tensor
    """(k,) the answer's tokens."""


def _question(lm: LM, edit: Edit, answer: str | None) -> _Question:
    """With the model's own next token as the answer, if none is given."""
    batch = lm.encode([passage(edit, answer=answer)])
    subject = range(_first(lm, edit), int(batch.subject) + 1)
    if answer is not None:
        cols = batch.reads[1]
        return _Question(batch, int(cols[0]) + 1, subject, cols, batch.wanted)
    said = lm.logits(torch.zeros_like(batch.last), batch.last, **batch.inputs).argmax(-1)
    return _Question(batch, batch.ids.shape[1], subject, batch.last, said)


def _first(lm: LM, edit: Edit) -> int:
    """The index of the subject's first token."""
    return subject_tokens(lm.tokenizer, passage(edit))[0]


def _says(lm: LM, edits: Sequence[Edit]) -> Iterable[tuple[Edit, bool]]:
    """Whether the first token of each truth is the likeliest."""
    batch = lm.encode([passage(e, answer=e.truth) for e in edits])
    rows, cols = torch.arange(len(batch), device=lm.device), batch.target.long().argmax(1)
    said = lm.logits(rows, cols - 1, **batch.inputs).argmax(-1)
    return zip(edits, (said == batch.ids[rows, cols]).tolist(), strict=True)


def _probability(lm: LM, question: _Question, rows: int = 1) -> Tensor:
    """p(answer) in each of so many copies of the question, (rows,)."""
    k = len(question.cols)
    row = torch.arange(rows, device=lm.device).repeat_interleave(k)
    inputs = {name: t.expand(rows, -1) for name, t in question.batch.inputs.items()}
    said = log_softmax(lm.logits(row, question.cols.repeat(rows), **inputs), -1)
    return said.gather(1, question.wanted.repeat(rows)[:, None]).view(rows, k).sum(1).exp()


# Corrupting and restoring


@dataclass(frozen=True, eq=False)
class _Corrupted:
    """One fact with noise on its subject, and what putting clean states back does for its answer."""

    lm: LM
    question: _Question
    noise: Tensor
    """(draws, subject's tokens, d)."""

    def map(self, places: Sequence[str], window: int) -> Tensor:
        """p(answer) with each token restored in the window around each layer, (tokens, layers)."""
        tokens, depth = self.question.prompt, len(places)
        restore = torch.zeros(depth, tokens, depth, tokens, dtype=torch.bool)
        for layer in range(depth):
            for near in _window(layer, window, depth):
                restore[layer, :, near].fill_diagonal_(True)
        return self.restored(places, restore.flatten(0, 1)).view(depth, tokens).T.contiguous()

    def restored(self, places: Sequence[str], restore: Tensor) -> Tensor:
        """p(answer), mean over draws, for each of several sets of states to restore.

        Args:
            places: by layer, the module whose output is restored.
            restore: (m, layers, tokens) bool.

        Returns:
            (m,), on the processor.
        """
        cols = torch.arange(self.question.prompt, device=self.lm.device)
        seen = read(self.lm, places, self.question.batch, torch.zeros_like(cols), cols)
        clean = [seen[place][1] for place in places]
        together = max(1, TOKENS // (len(self.noise) * self.question.batch.ids.shape[1]))
        return torch.cat([self._pass(places, clean, part) for part in restore.split(together)])

    def _pass(self, places: Sequence[str], clean: Sequence[Tensor], restore: Tensor) -> Tensor:
        """One row for each set and each draw."""
        draws = len(self.noise)
        rows = len(restore) * draws
        hooks = [rewriting(self.lm, _embedding(self.lm), rows, self._corrupt)]
        for place, state, chosen in zip(places, clean, restore.unbind(1), strict=True):
            if chosen.any():
                back = _Back(state, chosen.to(state.device).repeat_interleave(draws, 0)[..., None])
                hooks.append(rewriting(self.lm, place, rows, back))
        with hooked(*hooks):
            return _probability(self.lm, self.question, rows).view(-1, draws).mean(1).cpu()

    def _corrupt(self, embeddings: Tensor) -> Tensor:
        out, subject = embeddings.clone(), self.question.subject
        out[:, subject.start : subject.stop] += self.noise.repeat(len(out) // len(self.noise), 1, 1).to(out)
        return out


@dataclass(frozen=True, eq=False)
class _Back:
    """Puts clean states back at the chosen tokens of each row."""

    clean: Tensor
    """(tokens, d)."""
    chosen: Tensor
    """(batch, tokens, 1) bool."""

    def __call__(self, output: Tensor) -> Tensor:
        out, tokens = output.clone(), len(self.clean)
        out[:, :tokens] = torch.where(self.chosen, self.clean, out[:, :tokens])
        return out


def _noise(lm: LM, question: _Question, draws: int, scale: float, seed: int) -> Tensor:
    shape = draws, len(question.subject), lm.model.get_input_embeddings().weight.shape[1]
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(lm.device)


def _embedding(lm: LM) -> str:
    """The name of the token embedding."""
    table = lm.model.get_input_embeddings()
    return next(name for name, module in lm.model.named_modules() if module is table)


def _places(lm: LM, kinds: Sequence[Kind] | None) -> dict[Kind, tuple[str, ...]]:
    """{kind: the module of each layer that puts it out}; by default of all kinds that the model has."""
    layers = range(len(lm.blocks))
    attention = [lm.attention_out(layer) for layer in layers]
    places: dict[Kind, tuple[str, ...]] = {"hidden": lm.blocks}
    places["mlp"] = tuple(lm.mlp_out(layer).name for layer in layers)
    if all(attention):
        places["attention"] = tuple(site.name for site in attention if site)
    for kind in kinds or ():
        if kind not in places:
            raise unknown("state to restore in this model", kind, places)
    return {kind: names for kind, names in places.items() if kinds is None or kind in kinds}


def _window(layer: int, width: int, depth: int) -> range:
    """So many layers around one, fewer at the ends."""
    return range(max(0, layer - width // 2), min(depth, layer + (width + 1) // 2))


# Drawing

_COLOURS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "hidden": ("Purples", (84, 39, 143)),
    "mlp": ("Greens", (0, 109, 44)),
    "attention": ("Reds", (165, 15, 21)),
}
"""For each kind a colour map of matplotlib, and its darkest colour for the terminal."""
_SHADES = " ·░▒▓█"


def _heat(row: Sequence[float], kind: str) -> Text:
    """Values between 0 and 1 as cells, two columns wide; a shade in each says the same where there are no colours."""
    out = Text()
    for value in row:
        share = min(1.0, max(0.0, value))
        colour = ",".join(str(round(255 - share * (255 - dark))) for dark in _COLOURS[kind][1])
        out.append(_SHADES[round(share * (len(_SHADES) - 1))] * 2, f"rgb({colour}) on rgb({colour})")
    return out


def _ruler(layers: int) -> Text:
    """Numbers over the cells of every fourth layer."""
    return Text("".join(f"{layer:<8}" for layer in range(0, layers, 4))[: 2 * layers + 1].rstrip(), style="dim")


def check_drawable(path: str | Path) -> None:
    """Find out before the long work whether a figure can be drawn.

    Raises:
        UsageError: the name is of another kind of file.
        ErrataError: matplotlib is missing.
    """
    if Path(path).suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise UsageError(f"{str(path)!r} is no figure; give a name that ends in .png, .svg or .pdf")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ErrataError("figures are drawn by matplotlib, which is missing: pip install 'errata[plot]'") from error


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
