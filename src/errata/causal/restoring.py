"""One fact with noise on its subject, and what putting clean states back does for its answer.

A noised token is a token of its own, with an id behind the vocabulary, so that passes may be cut, padded and replayed
as they like. What is restored at a token changes nothing before it and nothing below its layer, so only what comes
after is run again (`errata.replay`), every row of a batch with another state restored.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..edit import Edit
from ..effects import Overlay, hooked
from ..errors import UsageError, unknown
from ..lm import LM
from ..replay import passes
from ..tokens import Tokens, passage, subject_tokens
from ..trace import read, rewriting

log = logging.getLogger(__name__)

Kind = Literal["hidden", "mlp", "attention"]
"""What is restored: a block's output, or what its MLP or its attention adds to the residual stream."""
State = tuple[range, int]
"""What is restored together: layers, at one token."""
TIMES = 3.0
"""Standard deviations of the subjects' embeddings in that of the noise (the paper, section 2)."""
LOST = 0.1
"""The share of p(answer) that noise takes away, at least, from a fact that can be traced."""
TOKENS = 16_384
"""Tokens in one pass. Changes the memory, not the result."""
ROWS = 256
"""Prompts in one pass, where nothing is restored."""
BANDS = 6
"""Parts of the model's depth, from the lowest layer of each of which passes are run again. Changes the time alone."""


def noise_of(lm: LM, edits: Sequence[Edit], times: float = TIMES) -> float:
    """The noise that corrupts: 3 times the standard deviation of the entries of all the subjects' embeddings, as the
    module puts them out (some models scale them there)."""
    ids: list[int] = []
    for edit in edits:
        batch = lm.encode([passage(edit)])
        ids += batch.ids[0, _first(lm, edit) : int(batch.subject) + 1].tolist()
    with torch.no_grad():
        return times * float(lm.model.get_input_embeddings()(torch.tensor([ids], device=lm.device)).float().std())


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


def _says(lm: LM, edits: Sequence[Edit]) -> Iterable[tuple[Edit, bool]]:
    """Whether the first token of each truth is the likeliest."""
    batch = lm.encode([passage(e, answer=e.truth) for e in edits])
    rows, cols = torch.arange(len(batch), device=lm.device), batch.target.long().argmax(1)
    said = lm.logits(rows, cols - 1, **batch.inputs).argmax(-1)
    return zip(edits, (said == batch.ids[rows, cols]).tolist(), strict=True)


def warn_if_kept(lm: LM, clean: float, corrupted: float, of: str) -> None:
    """Where noise hardly takes the answer away, there is nothing to bring back."""
    if corrupted > (1 - LOST) * clean:
        warnings.warn(
            f"noise on the subject hardly lowers p(answer) of {of}: {clean:.3f} without it, {corrupted:.3f} with it; "
            f"what is traced is no fact that {lm.name} recalls by the subject",
            stacklevel=3,
        )


# One fact


@dataclass(frozen=True, eq=False)
class Question:
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

    @property
    def tokens(self) -> list[int]:
        """The prompt's ids."""
        return self.batch.ids[0, : self.prompt].tolist()


def question(lm: LM, edit: Edit, answer: str | None) -> Question:
    """With the model's own next token as the answer, if none is given."""
    batch = lm.encode([passage(edit, answer=answer)])
    subject = range(_first(lm, edit), int(batch.subject) + 1)
    if answer is not None:
        cols = batch.reads[1]
        return Question(batch, int(cols[0]) + 1, subject, cols, batch.wanted)
    said = lm.logits(torch.zeros_like(batch.last), batch.last, **batch.inputs).argmax(-1)
    return Question(batch, batch.ids.shape[1], subject, batch.last, said)


def _first(lm: LM, edit: Edit) -> int:
    """The index of the subject's first token."""
    return subject_tokens(lm.tokenizer, passage(edit))[0]


class Corrupted:
    """A fact with noise on its subject, drawn several times, which is the same for every restoration."""

    def __init__(self, lm: LM, asked: Question, noise: float, draws: int, seed: int) -> None:
        self.lm, self.asked, self.draws = lm, asked, draws
        subject, table = asked.subject, lm.model.get_input_embeddings()
        draw = torch.Generator().manual_seed(seed)
        shape = draws * len(subject), lm.model.get_input_embeddings().weight.shape[1]
        self.noise = noise * torch.randn(shape, generator=draw).to(lm.device)
        self.behind = int(table.weight.shape[0])
        ids = asked.batch.ids.repeat(draws, 1)
        noised = self.behind + torch.arange(len(self.noise), device=ids.device).view(draws, -1)
        ids[:, subject.start : subject.stop] = noised
        self.batch = replace(asked.batch[torch.zeros(draws, dtype=torch.long, device=ids.device)], ids=ids)

    def clean(self) -> float:
        """p(answer) without noise."""
        rows = torch.zeros_like(self.asked.cols)
        return float(self._p(self.lm.logits(rows, self.asked.cols, **self.asked.batch.inputs)))

    def corrupted(self) -> float:
        """p(answer) with noise, mean over the draws."""
        with self._noised():
            rows, cols = self._reads(self.draws)
            return float(self._p(self.lm.logits(rows, cols, **self.batch.inputs)).mean())

    def restored(self, places: Sequence[str], states: Sequence[State]) -> Tensor:
        """p(answer), mean over the draws, where each of several states is put back.

        Args:
            places: by layer, the module whose output is restored.
            states: m of them.

        Returns:
            (m,), on the processor.
        """
        cols = torch.arange(self.asked.prompt, device=self.lm.device)
        seen = read(self.lm, places, self.asked.batch, torch.zeros_like(cols), cols)
        clean = [seen[place][1] for place in places]
        band = -(-len(places) // BANDS)
        together = max(1, TOKENS // (self.draws * self.batch.ids.shape[1]))
        order = sorted(range(len(states)), key=lambda i: states[i][0][0])
        found = torch.empty(len(states))
        with self._noised():
            for low in range(0, len(places), band):
                here = [i for i in order if states[i][0][0] in range(low, low + band)]
                for i in range(0, len(here), together):
                    part = here[i : i + together]
                    from_here = places[low : low + band]
                    found[part] = self._again(places, clean, [states[j] for j in part], from_here)
        return found

    def _again(
        self, places: Sequence[str], clean: Sequence[Tensor], states: Sequence[State], first: Sequence[str]
    ) -> Tensor:
        """p(answer) for states whose lowest layers are among the `first` places, (m,)."""
        tokens = sorted({token for _, token in states})
        start = torch.tensor(tokens, device=self.lm.device).repeat_interleave(self.draws)
        every = torch.arange(self.draws, device=self.lm.device).repeat(len(tokens))
        run = passes(self.lm, self.batch[every], first, start)
        number = torch.tensor([tokens.index(token) for _, token in states], device=self.lm.device)
        rows = number[:, None] * self.draws + torch.arange(self.draws, device=self.lm.device)
        run.keep(rows.flatten())
        hooks = []
        for layer in sorted({layer for layers, _ in states for layer in layers}):
            chosen = torch.tensor([layer in layers for layers, _ in states], device=self.lm.device)
            state = clean[layer][[token for _, token in states]].repeat_interleave(self.draws, 0)
            back = _Back(state, chosen.repeat_interleave(self.draws, 0), run.start)
            hooks.append(rewriting(self.lm, places[layer], len(run.start), back))
        with hooked(*hooks):
            at, cols = self._reads(len(run.start))
            return self._p(run.logits(at, cols)).view(-1, self.draws).mean(1).cpu()

    def _reads(self, rows: int) -> tuple[Tensor, Tensor]:
        """Where the answer's tokens are read in so many rows."""
        row = torch.arange(rows, device=self.lm.device).repeat_interleave(len(self.asked.cols))
        return row, self.asked.cols.repeat(rows)

    def _p(self, logits: Tensor) -> Tensor:
        """p(answer) of each row, (rows,)."""
        said, wanted = log_softmax(logits, -1), self.asked.wanted
        return said.gather(1, wanted.repeat(len(said) // len(wanted))[:, None]).view(-1, len(wanted)).sum(1).exp()

    def _noised(self) -> AbstractContextManager[LM]:
        """While inside, the model's embeddings know the noised tokens."""
        table = self.lm.model.get_input_embeddings()
        plain: Callable[..., Tensor] = table.forward
        subject = self.asked.subject
        meant = self.asked.batch.ids[0, subject.start : subject.stop].repeat(self.draws)

        def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            number = ids - self.behind
            out = plain(torch.where(number < 0, ids, meant[number.clamp(min=0)]), *args, **kwargs)
            added = self.noise[number.clamp(min=0)].to(out)
            return out + added * (number >= 0)[..., None]

        return self.lm.hold(Overlay(table, "forward", lambda _: forward))


@dataclass(frozen=True, eq=False)
class _Back:
    """Puts a clean state back in the chosen rows."""

    state: Tensor
    """(rows, d)."""
    chosen: Tensor
    """(rows,) bool."""
    cols: Tensor
    """(rows,)."""

    def __call__(self, output: Tensor) -> Tensor:
        out, rows = output.clone(), self.chosen.nonzero()[:, 0]
        out[rows, self.cols[rows]] = self.state[rows].to(out)
        return out


def places_of(lm: LM, kinds: Sequence[Kind] | None) -> Mapping[Kind, tuple[str, ...]]:
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


def width_of(lm: LM, window: int | None) -> int:
    """Layers in a window: by default 10 of 48, as in the paper."""
    depth = len(lm.blocks)
    width = max(1, round(10 / 48 * depth)) if window is None else window
    if not 1 <= width <= depth:
        raise UsageError(f"window={width} can't be used; {lm.name} has {depth} layers")
    return width


def window_at(layer: int, width: int, depth: int) -> range:
    """So many layers around one, fewer at the ends."""
    return range(max(0, layer - width // 2), min(depth, layer + (width + 1) // 2))
