"""Where to edit a model for which nobody has published it: by what MLPs bring back at the subject's last token.

A window of MLPs that holds the first layer brings back nearly all, wherever the fact is kept, as noise on embeddings
takes away who the subject is, and that MLP writes it anew. So a window counts by what it brings back without its first
layer or without its last, whichever is less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..edit import Edit
from ..lm import LM
from .drawing import Map
from .restoring import (
    Corrupted,
    Kind,
    State,
    known,
    noise_of,
    places_of,
    question,
    warn_if_kept,
    width_of,
    window_at,
)


@dataclass(frozen=True, eq=False)
class Scan(Map):
    """What MLPs bring back of p(answer) at the subject's last token, restored in windows of layers and alone."""

    facts: tuple[Edit, ...]
    clean: Tensor
    """(facts,) p(answer)."""
    corrupted: Tensor
    """(facts,) p(answer) with noise on the subject's embeddings; the mean over draws, as all that follows."""
    windows: Tensor
    """(facts, layers) p(answer) with the window around each layer put back."""
    later: Tensor
    """(facts, layers) the same without the window's first layer."""
    earlier: Tensor
    """(facts, layers) the same without its last."""
    alone: Tensor
    """(facts, layers) p(answer) with one layer put back."""
    window: int
    """Layers in a window."""
    noise: float
    """Standard deviation of the noise."""

    @property
    def inner(self) -> Tensor:
        """(facts, layers) p(answer) with a window put back less one of its ends: that which it misses most, on average
        over the facts."""
        later = self.later.mean(0) < self.earlier.mean(0)
        return torch.where(later, self.later, self.earlier)

    @property
    def effects(self) -> Mapping[Kind, Tensor]:
        found = [self.windows, self.inner, self.alone]
        return {"mlp": torch.stack([(x - self.corrupted[:, None]).mean(0) for x in found])}

    @property
    def labels(self) -> Sequence[str]:
        return f"a window of {self.window}", "less its first or last", "one layer alone"

    @property
    def heading(self) -> str:
        facts = f"{len(self.facts)} facts" if len(self.facts) != 1 else next(iter(self.facts)).text
        p = f"p(answer) = {self.clean.mean():.3f} clean, {self.corrupted.mean():.3f} corrupted"
        return f"MLPs at the subject's last token, {facts}: {p}"

    def to_dict(self) -> dict[str, Any]:
        plain = {"clean": float(self.clean.mean()), "corrupted": float(self.corrupted.mean())}
        named = dict(zip(("window", "inner", "alone"), self.effects["mlp"].tolist(), strict=True))
        return {"facts": len(self.facts), "window": self.window, "noise": self.noise, **plain, "profile": named}


@dataclass(frozen=True)
class Proposal:
    """Where to edit a model for which nobody has published it."""

    layers: tuple[int, ...]
    """The window of MLPs whose restoration does most at the subject's last token: for methods that edit several."""
    peak: int
    """The one of them that does most alone: for methods that edit one layer."""
    effect: float
    """The average indirect effect of the window, less that of its ends: its first or its last layer is left out."""
    lost: float
    """What noise takes from p(answer), on average."""
    sure: float
    """The share of bootstrap resamples of the facts whose best window is centred in this one; 0 for a single fact."""
    facts: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers)}


def scan(
    lm: LM,
    edits: Sequence[Edit],
    progress: Callable[[int, int], None] | None = None,
    *,
    answer: str | None = None,
    window: int | None = None,
    noise: float | None = None,
    draws: int = 4,
    seed: int = 0,
) -> Scan:
    """What a proposal needs, which is a small part of a map: MLPs alone, at the subject's last token.

    Args:
        lm: the model, as it stands.
        edits: facts. One whose `truth` the model doesn't say is left out.
        progress: told after each fact how many are done, of how many.
        answer: whose probability is measured; by default the token that the model says next.
        window: how many neighbouring MLPs are restored at once; by default 10 of 48 layers.
        noise: standard deviation of the noise; by default 3 times that of all the subjects' embeddings.
        draws: how many times noise is drawn for each fact; more facts tell more.
        seed: of the noise.
    """
    facts, width, depth = known(lm, edits), width_of(lm, window), len(lm.blocks)
    noise = noise_of(lm, facts) if noise is None else noise
    places = places_of(lm, ["mlp"])["mlp"]
    windows = [window_at(layer, width, depth) for layer in range(depth)]
    later, earlier = ([w[cut] or w for w in windows] for cut in (slice(1, None), slice(None, -1)))
    alone = [range(layer, layer + 1) for layer in range(depth)]
    groups = windows, later, earlier, alone
    every = list(dict.fromkeys(layers for group in groups for layers in group))
    ends, scores = [], []
    with lm.asked():
        for number, edit in enumerate(facts, 1):
            asked = question(lm, edit, answer)
            run = Corrupted(lm, asked, noise, draws, seed)
            ends.append([run.clean(), run.corrupted()])
            states: list[State] = [(layers, asked.subject[-1]) for layers in every]
            scores.append(run.restored(places, states))
            if progress:
                progress(number, len(facts))
    clean, corrupted = torch.tensor(ends).T
    p = torch.stack(scores)
    parts = [p[:, [every.index(layers) for layers in group]] for group in groups]
    found = Scan(facts, clean, corrupted, *parts, window=width, noise=noise)
    of = f"{facts[0].text!r}" if len(facts) == 1 else f"{len(facts)} facts, on average"
    warn_if_kept(lm, float(clean.mean()), float(corrupted.mean()), of)
    return found


def propose(found: Scan, resamples: int = 1000, seed: int = 0) -> Proposal:
    """The layers to edit: the window that does most without its first or its last layer, whichever is less."""
    later, earlier = (x - found.corrupted[:, None] for x in (found.later, found.earlier))
    score = torch.minimum(later.mean(0), earlier.mean(0))
    count, depth = later.shape
    centre = int(score.argmax())
    layers = window_at(centre, found.window, depth)
    alone = found.alone.mean(0)
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=draw)
    centres = torch.minimum(later[drawn].mean(1), earlier[drawn].mean(1)).argmax(1)
    inside = (centres >= layers[0]) & (centres <= layers[-1])
    return Proposal(
        layers=tuple(layers),
        peak=max(layers, key=lambda layer: float(alone[layer])),
        effect=float(score[centre]),
        lost=float((found.clean - found.corrupted).mean()),
        sure=float(inside.double().mean()) if count > 1 else 0.0,
        facts=count,
    )
