"""What second moments cost: `python benchmarks/second_moments.py --model smollm2-135m --layers 4-8 --text FILE`.

Tokens a processor second, on one thread: of the pass as it is, of the pass as it was at first (whole products, summed
in float64), of the model's passes alone without any sums, and of drawing the model's own samples. All in one run, in
turns, so that a busy machine is as busy for each; the median of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

import errata
from errata import LM
from errata.parts import corpus, moments
from errata.tokens import batches
from errata.trace import hidden, watch


@torch.no_grad()
def first(lm: LM, names: list[str], rows: list[list[int]], summed: bool = True) -> None:
    """The pass of the first version: texts of like length padded together, all of K^T K summed in float64."""
    totals: dict[str, Any] = {}
    for batch in batches([len(row) for row in rows], 8192):
        ids = pad_sequence([torch.tensor(rows[i]) for i in batch], batch_first=True, padding_value=-1)
        mask = ids >= 0

        def see(name: str, given: Any, _output: Any, mask: torch.Tensor = mask) -> None:
            if summed:
                every = hidden(given, len(mask)).float() * mask[:, :, None]
                k = every[mask]
                totals[name] = totals.get(name, 0) + (k.T @ k).double()
                (every @ every.mT).double().square().sum()

        watch(lm, names, {"input_ids": ids.clamp(min=0), "attention_mask": mask.long()}, see)


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def drawn(lm: LM) -> int:
    """The model's own samples, drawn anew; how many tokens they have."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ERRATA_STORE"] = folder
        return corpus.samples(lm).numel()


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    asked.add_argument("--model", default="almanac")
    asked.add_argument("--layers", default="1-3", help="first and last, e.g. 4-8")
    asked.add_argument("--text", default=corpus.BUILT_IN)
    asked.add_argument("--tokens", type=int, default=8192)
    asked.add_argument("--rounds", type=int, default=3)
    given = asked.parse_args()
    torch.set_num_threads(1)
    lm = errata.load(given.model)
    begin, end = map(int, given.layers.split("-"))
    names = [lm.mlp_out(i).name for i in range(begin, end + 1)]
    source = corpus.rows(lm, given.text)
    rows: list[list[int]] = []
    while (tokens := sum(map(len, rows))) < given.tokens and (row := next(source, None)):
        rows.append(row)
    ways: dict[str, Callable[[], Any]] = {
        "the pass": lambda: moments.second_moments(lm, names, rows),
        "the pass at first": lambda: first(lm, names, rows),
        "the model alone": lambda: first(lm, names, rows, summed=False),
    }
    rounds = [{name: seconds(work) for name, work in ways.items()} for _ in range(given.rounds + 1)][1:]
    print(f"{given.model}, layers {given.layers}, {tokens} tokens in {len(rows)} texts")
    for name in ways:
        spent = statistics.median(spent[name] for spent in rounds)
        print(f"{name:20} {tokens / spent:8,.0f} tokens a second")
    start = time.process_time()
    count = drawn(lm)
    print(f"{'drawing samples':20} {count / (time.process_time() - start):8,.0f} tokens a second ({count} tokens)")


if __name__ == "__main__":
    main()
