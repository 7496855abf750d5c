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
ROUGH = 1e-5
"""So wrong may the square of a distance be that was taken by a product, as a share of the keys' own squares."""
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
        most = max(1, TOGETHER // (self.table.shape[1] * queries[0].numel()))
        parts = zip(queries.split(most), self.table.split(most), strict=True)
        distance, key = zip(*(self._among_own(*part) for part in parts), strict=True)
        return torch.cat(distance), torch.cat(key)

    def _among_own(self, queries: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        own = self.keys[table.clamp(min=0)]
        apart = (queries[:, :, None] - own[:, None]).norm(dim=-1)
        distance, place = apart.masked_fill((table < 0)[:, None], torch.inf).min(-1)
        return distance, table.gather(1, place)


def settle(
    keys: Tensor, radii: Tensor, start: int, live: Callable[[int], Tensor], meet: Callable[[int, int, Tensor], None]
) -> None:
    """Add keys from `start` on to a memory, one after another.

    One matrix product tells of many keys at once which may touch an earlier one; the others stay as they are. Only
    those are met one by one, because each changes what the next one finds.

    Args:
        keys: (n, d) of what is there and what is added; `meet` may move those that are there.
        radii: (n,) those of added keys are what they come with.
        start: how many are there.
        live: which of the first so many are searched.
        meet: what happens where a key's radius touches the nearest one's, of (added, nearest, distance).
    """
    first = max(start, 1)  # the very first has nothing before it
    while first < len(keys):
        stop = min(first + max(1, TOGETHER // (4 * len(keys))), len(keys))
        _settle_block(_Block(keys, radii, first, stop), live, meet)
        first = stop


def _settle_block(block: _Block, live: Callable[[int], Tensor], meet: Callable[[int, int, Tensor], None]) -> None:
    keys, radii = block.keys, block.radii
    near = block.near(slice(block.stop))
    for row, new in enumerate(range(block.first, block.stop)):
        if not near[row]:
            continue
        alive = live(new)
        few = alive[block.apart[row, alive].topk(min(CLOSE, len(alive)), largest=False).indices]
        distance, place = (keys[new] - keys[few]).norm(dim=-1).min(0)
        nearest = int(few[place])
        if distance <= radii[nearest] + radii[new]:
            meet(new, nearest, distance)
            block.measure(nearest)  # it may have moved; and both may reach further now
            near |= block.near(torch.tensor([nearest, new]))


class _Block:
    """Keys from `first` to `stop`, and how far they roughly are from all before them."""

    def __init__(self, keys: Tensor, radii: Tensor, first: int, stop: int) -> None:
        self.keys, self.radii, self.first, self.stop = keys, radii, first, stop
        own, known = keys[first:stop], keys[:stop]
        self.size = own.square().sum(1)[:, None] + known.square().sum(1)
        self.later = torch.arange(stop) >= torch.arange(first, stop)[:, None]
        self.apart = (self.size - 2 * own @ known.T).masked_fill_(self.later, torch.inf)
        """Squares of distances, inf of keys that come later."""

    def near(self, columns: slice | Tensor) -> Tensor:
        """Which keys may touch one of some keys before them; a product cancels digits, so some of these don't."""
        reach = self.radii[self.first : self.stop, None] + self.radii[columns]
        return (self.apart[:, columns] <= reach.square() + ROUGH * self.size[:, columns]).any(1)

    def measure(self, column: int) -> None:
        """Take the distances from one key anew."""
        apart = (self.keys[self.first : self.stop] - self.keys[column]).square().sum(1)
        self.apart[:, column] = apart.masked_fill(self.later[:, column], torch.inf)


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
