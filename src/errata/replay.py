"""Run a model again and again from one layer and one position on, where only what comes after can change.

Finding v* runs the model 20 times and more, but below the edited layer nothing changes, and before the edited position
nothing changes in any layer. So one pass over what comes before fills the KV cache, one pass through the lower blocks
keeps what enters the edited one, and every further pass is the model's own forward on the remaining tokens, with that
cache and with the lower blocks standing still. Masks, positions, final norm, head and its scaling stay the model's own,
so there is no line here for any architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .lm import LM
from .past import Past, empty, proven, roomy, takes_positions
from .tokens import Tokens
from .trace import outputs_of


class Passes(Protocol):
    """Passes of one batch through a model whose modules may be hooked."""

    start: Tensor
    """(batch,) the columns, in the hidden states that hooks see, at which each row begins to change."""

    def logits(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Logits (m, vocabulary) at positions of the batch; no column is before its row's start."""
        ...

    def keep(self, rows: Tensor) -> None:
        """From now on the batch is these rows of it."""
        ...


class FullPasses:
    """Every pass runs the whole model on every token."""

    def __init__(self, lm: LM, batch: Tokens, start: Tensor) -> None:
        self.lm, self.batch, self.start = lm, batch, start

    def logits(self, rows: Tensor, cols: Tensor) -> Tensor:
        return self.lm.logits(rows, cols, **self.batch.inputs)

    def keep(self, rows: Tensor) -> None:
        self.batch, self.start = self.batch[rows], self.start[rows]


class Replay:
    """Every pass runs what comes after the first of `places` to begin, on the tokens from `start` on.

    The blocks below stand still, and in the edited block so does all that is done by then; a place that is a block can
    only be written over, and stands still itself. Rows are aligned at their start: what comes before is padded on the
    left, what comes after on the right. The last token of a target is predicted, never read.
    """

    def __init__(self, lm: LM, batch: Tokens, places: Sequence[str], start: Tensor) -> None:
        self.lm, self.first, self.start = lm, start, torch.zeros_like(start)
        block = block_of(lm, places[0])
        assert block is not None
        whole = lm.blocks[block] in places
        self.below = block + whole
        before, after = int(start.max()), int((batch.ends - start).max()) + 1
        ids, mask, positions = _aligned(batch, start, before, after)
        self.inputs: dict[str, Any] = {"input_ids": ids[:, before:], "attention_mask": mask, "use_cache": True}
        if takes_positions(lm):
            self.inputs["position_ids"] = positions[:, before:]
        with torch.no_grad():
            self.past = Past(self._read(ids, mask, positions, before))
            self.still = self._pause(() if whole else places)
            self.past.hollow(self.below)

    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor, before: int) -> Any:
        """The cache after the tokens before the start."""
        if not before:
            return empty(self.lm)
        cache = roomy(self.lm, ids.shape[1] - before, slice(self.below, None))
        inputs = {"input_ids": ids[:, :before], "attention_mask": mask[:, :before]}
        if "position_ids" in self.inputs:
            inputs["position_ids"] = positions[:, :before]
        self.lm.model.get_decoder()(**inputs, use_cache=True, past_key_values=cache)
        return cache

    def _pause(self, inside: Sequence[str]) -> list[tuple[list[nn.Module], Any]]:
        """Modules that have nothing new to say, and what they put out: the blocks below, and of the next one what is
        done before the first of the places inside it begins."""
        names, parts = self.lm.blocks, []
        if inside:
            named = self.lm.module(names[self.below]).named_modules(prefix=names[self.below])
            parts = [n for n, m in named if any(True for _ in m.parameters())]  # others (dropout) may run again
        below = names[: self.below]
        with self.past.as_it_was() as cache:
            seen = outputs_of(self.lm, [*below[-1:], *parts], self.inputs | {"past_key_values": cache}, before=inside)
        done = [n for n in parts if n in seen and n.rpartition(".")[0] not in seen]
        still = [([self.lm.module(n)], seen[n]) for n in done]
        return still + [([self.lm.module(n) for n in below], seen[n]) for n in below[-1:]]

    def logits(self, rows: Tensor, cols: Tensor) -> Tensor:
        with self.past.as_it_was() as cache, _standing(self.still):
            return self.lm.logits(rows, cols - self.first[rows], **self.inputs, past_key_values=cache)

    def keep(self, rows: Tensor) -> None:
        """What was read of these rows stays: nothing is run again."""
        batch = len(self.first)
        self.past.keep(rows)
        self.past.hollow(self.below)
        self.still = [(modules, _rows_of(output, rows, batch)) for modules, output in self.still]
        self.first, self.start = self.first[rows], self.start[rows]
        self.inputs |= {k: v[rows] for k, v in self.inputs.items() if isinstance(v, Tensor)}


def passes(lm: LM, batch: Tokens, places: Sequence[str], start: Tensor) -> Passes:
    """The cheapest exact way to run a batch again when only the outputs of `places` from `start` on change.

    The first time for a model and a place, a replay is held against a full pass; a model that can't be replayed gets
    full passes, and the log says so.

    Args:
        lm: the model.
        batch: right-padded tokens.
        places: modules, the first one in the lowest block.
        start: (batch,) the first column that changes.
    """
    full = FullPasses(lm, batch, start)
    if block_of(lm, places[0]) is None:
        return full

    def both(replay: Replay) -> tuple[Tensor, Tensor]:
        rows = torch.stack([start.argmin(), start.argmax()])  # where the padding is longest and shortest
        few = batch[rows]
        with torch.no_grad():
            return replay.logits(rows, few.ends), FullPasses(lm, few, start[rows]).logits(
                torch.arange(2, device=start.device), few.ends
            )

    what = f"replayed from {places[0]}"
    return proven(lm, ("replays", *places), what, lambda: Replay(lm, batch, places, start), both) or full


def block_of(lm: LM, place: str) -> int | None:
    """The number of the block that a module is, or is a part of."""
    return next((i for i, b in enumerate(lm.blocks) if f"{place}.".startswith(f"{b}.")), None)


def in_pass(here: Tensor, shift: Tensor, length: int) -> Tensor:
    """Where in the hidden states of a pass, (batch, length), marked positions of a batch stand.

    Args:
        here: (batch, seq) bool.
        shift: (batch,) the batch's column at which each row of the pass begins (its first column less `Passes.start`).
        length: columns of the pass.
    """
    cols = torch.arange(length, device=here.device) + shift[:, None]
    return here.gather(1, cols.clamp(0, here.shape[1] - 1)) & (cols < here.shape[1])


def _rows_of(output: Any, rows: Tensor, batch: int) -> Any:
    """Some rows of what a module put out for a batch, in the form it gave it."""
    if isinstance(output, Tensor):
        return output.unflatten(0, (batch, -1))[rows].flatten(0, 1)
    return tuple(_rows_of(part, rows, batch) for part in output) if isinstance(output, tuple) else output


def _aligned(batch: Tokens, start: Tensor, before: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions (batch, before + after), with every row's start in column `before`."""
    cols = start[:, None] + torch.arange(-before, after, device=start.device)
    inside = (cols >= 0) & (cols <= batch.ends[:, None])
    return batch.ids.gather(1, cols.clamp(0, batch.ids.shape[1] - 1)), inside.long(), cols.clamp(min=0)


@contextmanager
def _standing(still: Sequence[tuple[list[nn.Module], Any]]) -> Iterator[None]:
    """While inside, these modules do no work; those of a group all put out the same."""
    with ExitStack() as undo:
        for modules, output in still:
            for module in modules:
                undo.callback(_let_run, module, vars(module).get("forward"))
                vars(module)["forward"] = lambda *_, output=output, **__: _copy(output)
        yield


def _let_run(module: nn.Module, forward: Any) -> None:
    del vars(module)["forward"]
    if forward is not None:
        vars(module)["forward"] = forward


def _copy(output: Any) -> Any:
    """What a module put out, for others to write into: some models add in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copy, output)) if isinstance(output, tuple) else output
