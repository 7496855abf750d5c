"""Which part of a memory answers a token: the nearest key among many, and a log of what answered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

log = logging.getLogger(__name__)

CLOSE = 8
"""So many keys that look nearest are measured exactly."""
SAME = 1e-3
"""Keys nearer than this share of a radius are one key."""
TOGETHER = 2**24
"""Numbers held at a time in a search. Changes the memory, not what is found."""


class Index:
    """Sets of keys (n, d), searched by Euclidean distance: one set for all, or one for each row of the batch.

    Keys are counted through all sets. In a set for all, one matrix product finds the few nearest; it cancels digits, so
    the distances that are answered, and compared with a radius, are taken of the differences. No loop runs over keys.
    """

    def __init__(self, sets: Sequence[Tensor]) -> None:
        self.keys = torch.cat(list(sets))
        self.squares = self.keys.square().sum(1)
        numbers = torch.arange(len(self.keys), device=self.keys.device).split([len(s) for s in sets])
        self.table = pad_sequence(list(numbers), batch_first=True, padding_value=-1)

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Of every query (batch, seq, d) the distance to the nearest key, and which that is; both (batch, seq)."""
        if len(self.table) > 1:
            return self._in_rows(queries.view(len(self.table), -1, queries.shape[-1]))
        most = max(1, TOGETHER // max(len(self.keys), CLOSE * self.keys.shape[1]))
        found = [self._among_all(part) for part in queries.reshape(-1, queries.shape[-1]).split(most)]
        distance, key = (torch.cat(parts).view(queries.shape[:-1]) for parts in zip(*found, strict=True))
        return distance, key

    def _among_all(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        few = (self.squares - 2 * queries @ self.keys.T).topk(min(CLOSE, len(self.keys)), largest=False).indices
        distance, place = (queries[:, None] - self.keys[few]).norm(dim=-1).min(1)
        return distance, few.gather(1, place[:, None])[:, 0]

    def _in_rows(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        own = self.keys[self.table.clamp(min=0)]
        apart = (queries[:, :, None] - own[:, None]).norm(dim=-1)
        distance, place = apart.masked_fill((self.table < 0)[:, None], torch.inf).min(-1)
        return distance, self.table.gather(1, place)


def settle(
    keys: Tensor, radii: Tensor, start: int, live: Callable[[int], Tensor], meet: Callable[[int, int, Tensor], None]
) -> None:
    """Add keys from `start` on to a memory, one after another.

    Keys that are far from everything before them are found many at a time, and stay as they are; only those that are
    near are met one by one, because each changes what the next one finds.

    Args:
        keys: (n, d) of what is there and what is added; `meet` may move those that are there.
        radii: (n,) those of added keys are what they come with.
        start: how many are there.
        live: which of the first so many are searched.
        meet: what happens where a key's radius touches the nearest one's, of (added, nearest, distance).
    """
    done, most = max(start, 1), 1  # the first has nothing before it
    while done < len(keys):
        block = slice(done, min(done + most, len(keys)))
        distance, near = _before(keys, live(done), block)
        meets = distance <= radii[near] + radii[block]
        far = int(meets.long().argmax()) if meets.any() else len(meets)
        done, most = done + far, min(2 * most, 64) if far == len(meets) else 1
        if far < len(meets):
            meet(done, int(near[far]), distance[far])
            done += 1


def _before(keys: Tensor, live: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """For every key of a block the distance to the nearest one before it, and which that is."""
    distance, near = Index([keys[live]]).nearest(keys[block][None])
    own = torch.arange(block.stop - block.start)
    apart = (keys[block][:, None] - keys[block]).norm(dim=-1).masked_fill(own >= own[:, None], torch.inf)
    distance, place = torch.cat([distance.T, apart], 1).min(1)
    return distance, torch.where(place == 0, live[near[0]], place - 1 + block.start)


def tell(module: str, answered: Tensor, part: Tensor, distance: Tensor, limit: Tensor) -> None:
    """Log, for every token that a memory answered, which part of it did. Costs nothing where nobody listens.

    Args:
        module: where the memory is.
        answered: (batch, seq) bool.
        part: (batch, seq) which edit's entry, or which memory.
        distance: (batch, seq) how near the token was, or how far it moved.
        limit: (batch, seq) the radius or threshold that it was compared with.
    """
    if not log.isEnabledFor(logging.DEBUG):
        return
    if not answered.any():
        log.debug("%s: the memory answers none of %d tokens", module, answered.numel())
    for row, token in answered.nonzero().tolist():
        at = row, token
        log.debug(
            "%s: row %d, token %d is answered by %d, at %.4g where the limit is %.4g",
            *(module, row, token, part[at], distance[at], limit[at]),
        )
