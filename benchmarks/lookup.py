"""What a look-up in a GRACE codebook costs per token, by entries: `python benchmarks/lookup.py`.

One thread (on small models two can be many times slower), in processor time, so that other work counts little. Joined:
all entries met one after another. Prefill: 256 tokens in one pass. Decode: one token a pass, as in generation. The time
of the bare module is taken off.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from errata import Site
from errata.changes import Codebook

SHAPE = (256, 768)
"""(d_out, d_in): the MLP write matrix of almanac."""


def book(entries: int) -> Codebook:
    """Far-apart entries, each of its own edit."""
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(entries, d, generator=draw) for d in reversed(SHAPE))
    order = torch.arange(entries)
    return Codebook.of(order, keys, values, torch.ones(entries), order[:, None], torch.zeros_like(order))


def seconds(module: nn.Module, x: Tensor, rounds: int = 10) -> float:
    """One pass; the best of three times so many."""
    return min(_timed(module, x, rounds) for _ in range(3)) / rounds


def _timed(module: nn.Module, x: Tensor, rounds: int) -> float:
    start = time.process_time()
    for _ in range(rounds):
        module(x)
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    print("| entries | joined in s | prefill, µs a token | decode, µs a token |\n|---|---|---|---|")
    for entries in (100, 1_000, 10_000):
        start = time.process_time()
        made = book(entries)
        joined = time.process_time() - start
        site = Site("it", nn.Linear(SHAPE[1], SHAPE[0]))
        costs = []
        for tokens in (256, 1):
            x = torch.randn(1, tokens, SHAPE[1])
            bare = seconds(site.module, x)
            undo = made.attach(site)
            costs.append((seconds(site.module, x) - bare) / tokens * 1e6)
            undo()
        print(f"| {entries:,} | {joined:.2f} | {costs[0]:.1f} | {costs[1]:.0f} |")


if __name__ == "__main__":
    main()
