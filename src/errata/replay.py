"""Run a model again and again from one layer and one position on, where only what comes after can change.

Finding v* runs the model 20 times and more, but below the edited layer nothing changes, and before the edited position
nothing changes in any layer. So one pass over what comes before fills the KV cache, one pass through the lower blocks
keeps what enters the edited one, and every further pass is the model's own forward on the remaining tokens, with that
cache and with the lower blocks standing still. Masks, positions, final norm, head and its scaling stay the model's own,
so there is no line here for any architecture.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .lm import LM
from .tokens import Tokens
from .trace import outputs_of

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference of a log-probability, relative to its spread, at which a replay counts as exact."""


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
    """Every pass runs the blocks from `layer` on, on the tokens from `start` on.

    Rows are aligned at their start: what comes before is padded on the left, what comes after on the right.
    """

    def __init__(self, lm: LM, batch: Tokens, layer: int, start: Tensor) -> None:
        self.lm, self.first, self.start = lm, start, torch.zeros_like(start)
        self.still = [lm.module(name) for name in lm.blocks[:layer]]
        before, after = int(start.max()), int((batch.last - start).max()) + 1
        ids, mask, positions = _aligned(batch, start, before, after)
        self.inputs: dict[str, Any] = {"input_ids": ids[:, before:], "attention_mask": mask, "use_cache": True}
        if "position_ids" in inspect.signature(lm.model.forward).parameters:
            self.inputs["position_ids"] = positions[:, before:]
        with torch.no_grad():
            self.inputs["past_key_values"] = self._read(ids, mask, positions, before)
            self._keep_cache()
            self.entering = self._enter()
            self._keep_cache(hollow=len(self.still))

    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor, before: int) -> Any:
        """The cache after the tokens before the start."""
        if not before:
            from transformers import DynamicCache

            return DynamicCache(config=self.lm.model.config)
        inputs = {"input_ids": ids[:, :before], "attention_mask": mask[:, :before]}
        if "position_ids" in self.inputs:
            inputs["position_ids"] = positions[:, :before]
        return self.lm.model.get_decoder()(**inputs, use_cache=True).past_key_values

    def _keep_cache(self, hollow: int = 0) -> None:
        """Remember the cache as it is. The first `hollow` blocks won't read theirs: only its shape is kept."""
        layers = self.inputs["past_key_values"].layers
        for layer in layers[:hollow]:
            for name, past in vars(layer).items():
                if isinstance(past, Tensor) and past.ndim == 4:
                    setattr(layer, name, past.new_zeros(1).expand(past.shape))
        self.kept = [dict(vars(layer)) for layer in layers]

    def _enter(self) -> Any:
        """What the last of the lower blocks puts out."""
        if not self.still:
            return None
        with self._as_it_was():
            return outputs_of(self.lm, [self.lm.blocks[len(self.still) - 1]], self.inputs).popitem()[1]

    def logits(self, rows: Tensor, cols: Tensor) -> Tensor:
        with self._as_it_was(), _standing(self.still, self.entering):
            return self.lm.logits(rows, cols - self.first[rows], **self.inputs)

    def keep(self, rows: Tensor) -> None:
        """What was read of these rows stays: nothing is run again."""
        self.inputs["past_key_values"].batch_select_indices(rows)
        self._keep_cache(hollow=len(self.still))
        self.entering = _rows_of(self.entering, rows)
        self.first, self.start = self.first[rows], self.start[rows]
        self.inputs |= {k: v[rows] for k, v in self.inputs.items() if isinstance(v, Tensor)}

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The cache without what the last pass added."""
        layers = self.inputs["past_key_values"].layers
        try:
            yield
        finally:
            for layer, kept in zip(layers, self.kept, strict=False):
                vars(layer).clear()
                vars(layer).update(kept)
            del layers[len(self.kept) :]


def passes(lm: LM, batch: Tokens, place: str, start: Tensor) -> Passes:
    """The cheapest exact way to run a batch again when only the outputs of `place` from `start` on change.

    The first time for a model and a layer, a replay is held against a full pass; a model that can't be replayed gets
    full passes, and the log says so.

    Args:
        lm: the model.
        batch: right-padded tokens.
        place: a module in one of the blocks.
        start: (batch,) the first column that changes.
    """
    layer = next((i for i, b in enumerate(lm.blocks) if place == b or place.startswith(f"{b}.")), None)
    full = FullPasses(lm, batch, start)
    if layer is None or lm.memo.get(("replays", layer)) is False:
        return full
    try:
        replay = Replay(lm, batch, layer, start)
        if ("replays", layer) not in lm.memo:
            lm.memo["replays", layer] = _agree(replay, full, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError, NotImplementedError) as error:
        log.debug("replay failed", exc_info=True)
        lm.memo["replays", layer] = False
        log.warning("%s can't be replayed from layer %d (%s); every pass runs the whole model", lm.name, layer, error)
        return full
    if not lm.memo["replays", layer]:
        log.warning(
            "%s gives other numbers when replayed from layer %d; every pass runs the whole model", lm.name, layer
        )
    return replay if lm.memo["replays", layer] else full


def in_pass(here: Tensor, shift: Tensor, length: int) -> Tensor:
    """Where in the hidden states of a pass, (batch, length), marked positions of a batch stand.

    Args:
        here: (batch, seq) bool.
        shift: (batch,) the batch's column at which each row of the pass begins (its first column less `Passes.start`).
        length: columns of the pass.
    """
    cols = torch.arange(length, device=here.device) + shift[:, None]
    return here.gather(1, cols.clamp(0, here.shape[1] - 1)) & (cols < here.shape[1])


@torch.no_grad()
def _agree(replay: Replay, full: FullPasses, batch: Tokens) -> bool:
    """Whether both give the same logits at the last token of every row."""
    rows = torch.arange(len(batch), device=batch.ids.device)
    got, want = replay.logits(rows, batch.last), full.logits(rows, batch.last)
    limit = TOLERANCE if want.dtype == torch.float32 and full.lm.dtype == torch.float32 else 0.1
    return bool((got - want).abs().max() <= limit * want.std())


def _rows_of(output: Any, rows: Tensor) -> Any:
    """Some rows of what a block put out, in the form it gave it."""
    if isinstance(output, Tensor):
        return output[rows]
    return tuple(_rows_of(part, rows) for part in output) if isinstance(output, tuple) else output


def _aligned(batch: Tokens, start: Tensor, before: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions (batch, before + after), with every row's start in column `before`."""
    cols = start[:, None] + torch.arange(-before, after, device=start.device)
    inside = (cols >= 0) & (cols <= batch.last[:, None])
    return batch.ids.gather(1, cols.clamp(0, batch.ids.shape[1] - 1)), inside.long(), cols.clamp(min=0)


@contextmanager
def _standing(blocks: list[nn.Module], output: Any) -> Iterator[None]:
    """While inside, these blocks do no work; all of them put out `output`."""
    kept = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = lambda *_, **__: output
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward
