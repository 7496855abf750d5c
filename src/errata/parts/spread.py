"""Write many facts over several layers, each taking its share of what is still missing (MEMIT, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..changes import LowRank
from ..edit import Edit
from ..lm import LM, Site
from ..patch import Patch
from .locate import at_subject


def spread(
    lm: LM,
    edits: Sequence[Edit],
    layers: Sequence[int],
    contexts: Sequence[str],
    wanted: Mapping[str, Tensor],
    solve: Callable[[Site, Tensor, Tensor], LowRank],
    share: Callable[[int], float],
) -> Patch:
    """The changes that bring modules to what they should put out at the subjects.

    Args:
        lm: the model.
        edits: n of them.
        layers: the blocks whose MLP write matrices are changed, lowest first.
        contexts: that the keys are averaged over.
        wanted: the module and what it should put out, (n, d); or matrices of several layers, each with its own.
        solve: a layer's change for keys (n, d_in) and what is missing there (n, d_out).
        share: how much of what is missing elsewhere a layer takes, by the number of layers left.
    """
    patch, *_, last = Patch(), *wanted
    for i, layer in enumerate(layers):
        site = lm.site(layer)
        with patch.applied(lm):
            K = mean_key(lm, site, edits, contexts)
            place = site.name if site.name in wanted else last
            R = wanted[place] - at_subject(lm, place, edits)[1][:, 0]
        R = R if place == site.name else R * share(len(layers) - i)
        patch = patch + Patch({site.name: (solve(site, K, R),)})
    return patch


def mean_key(lm: LM, site: Site, edits: Sequence[Edit], contexts: Sequence[str]) -> Tensor:
    """A key for each edit, (n, d_in): half of it the bare prompt's (the first context), half the mean of the others."""
    keys, _ = at_subject(lm, site.name, edits, contexts)
    return keys[:, 0] if len(contexts) == 1 else (keys[:, 0] + keys[:, 1:].mean(1)) / 2
