"""Run a model again and again from one layer and one position on, where only what comes after can change.

Finding v* runs the model 20 times and more, but below the edited layer nothing changes, and before the edited position
nothing changes in any layer. So one pass over what comes before fills the KV cache, one pass through the lower blocks
keeps what enters the edited one, and every further pass is the model's own forward on the remaining tokens, with that
cache and with the lower blocks standing still. Masks, positions, final norm, head and its scaling stay the model's own,
so there is no line here for any architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from . import effects
from .lm import LM
from .past import Past, Use, empty, grows, hooked, proven, roomy, takes
from .rounding import alike, tolerance
from .tokens import Tokens
from .trace import outputs_of, rewriting


class Passes(Protocol):
    """Passes of one batch through a model whose modules may be hooked."""

    lm: LM
    start: Tensor
    """(batch,) the columns, in the hidden states that hooks see, at which each row begins to change."""
    length: int
    """The columns that hooks see."""

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
        self.length = batch.ids.shape[1]

    def logits(self, rows: Tensor, cols: Tensor) -> Tensor:
        return self.lm.logits(rows, cols, **self.batch.inputs)

    def keep(self, rows: Tensor) -> None:
        self.batch, self.start = self.batch[rows], self.start[rows]


class Replay:
    """Every pass runs what comes after the first of `places` to begin, on the tokens from `start` on.

    The blocks below stand still, and in the edited block so does all that is done by then; a place that is a block can
    only be written over, and stands still itself. Rows are aligned at their start: what comes before is padded on the
    left, what comes after on the right. The last token of a target is predicted, never read.

    Where a model's cache holds states that a pass writes over (linear attention, convolutions, SSMs), passes begin with
    the first token: only the blocks below are spared.
    """

    def __init__(self, lm: LM, batch: Tokens, places: Sequence[str], start: Tensor) -> None:
        goes_on = takes(lm, "past_key_values") and grows(empty(lm))
        self.lm, self.first = lm, start if goes_on else torch.zeros_like(start)
        self.start = start - self.first
        block = block_of(lm, places[0])
        assert block is not None
        whole = lm.blocks[block] in places
        self.below = block + whole
        before, after = int(self.first.max()), int((batch.ends - self.first).max()) + 1
        ids, mask, positions = _aligned(batch, self.first, before, after)
        self.length = after
        self.inputs: dict[str, Any] = {"input_ids": ids[:, before:], "attention_mask": mask}
        if takes(lm, "position_ids"):
            self.inputs["position_ids"] = positions[:, before:]
        with torch.no_grad():
            self.past = Past(self._read(ids, mask, positions, before)) if before else None
            self.still = self._pause(() if whole else places)
            if self.past:
                self.past.hollow(self.below)

    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor, before: int) -> Any:
        """The cache after the tokens before the start."""
        cache = roomy(self.lm, ids.shape[1] - before, slice(self.below, None))
        inputs = {"input_ids": ids[:, :before], "attention_mask": mask[:, :before]}
        if "position_ids" in self.inputs:
            inputs["position_ids"] = positions[:, :before]
        self.lm.model.get_decoder()(**inputs, use_cache=True, past_key_values=cache)
        return cache

    @contextmanager
    def _going_on(self) -> Iterator[dict[str, Any]]:
        """What the model is called with."""
        if self.past is None:
            yield self.inputs
        else:
            with self.past.as_it_was() as cache:
                yield self.inputs | {"past_key_values": cache, "use_cache": True}

    def _pause(self, inside: Sequence[str]) -> list[tuple[list[nn.Module], Any]]:
        """Modules that have nothing new to say, and what they put out: the blocks below, and of the next one what is
        done before the first of the places inside it begins."""
        names, parts = self.lm.blocks, []
        if inside:
            named = self.lm.module(names[self.below]).named_modules(prefix=names[self.below])
            parts = [n for n, m in named if any(True for _ in m.parameters())]  # others (dropout) may run again
        below = names[: self.below]
        with self._going_on() as inputs:
            seen = outputs_of(self.lm, [*below[-1:], *parts], inputs, before=inside)
        seen = {n: output for n, output in seen.items() if _has_rows(output, len(self.first), self.length)}
        if below and below[-1] not in seen:
            raise ValueError(f"what {below[-1]} puts out is not row by row")
        done = [n for n in parts if n in seen and n.rpartition(".")[0] not in seen]
        still = [([self.lm.module(n)], seen[n]) for n in done]
        return still + [([self.lm.module(n) for n in below], seen[n]) for n in below[-1:]]

    def logits(self, rows: Tensor, cols: Tensor) -> Tensor:
        with self._going_on() as inputs, _standing(self.lm, self.still):
            return self.lm.logits(rows, cols - self.first[rows], **inputs)

    def keep(self, rows: Tensor) -> None:
        """What was read of these rows stays: nothing is run again."""
        shape = len(self.first), self.length
        if self.past:
            self.past.keep(rows)
            self.past.hollow(self.below)
        self.still = [(modules, _rows_of(output, rows, *shape)) for modules, output in self.still]
        self.first, self.start = self.first[rows], self.start[rows]
        self.inputs = {k: v[rows] for k, v in self.inputs.items()}

    def few(self, rows: Tensor) -> Replay:
        """A replay of these rows alone; this one stays as it is."""
        other = copy(self)
        other.past = copy(self.past)
        other.keep(rows)
        return other


def passes(lm: LM, batch: Tokens, places: Sequence[str], start: Tensor) -> Passes:
    """The cheapest exact way to run a batch again when only the outputs of `places` from `start` on change.

    In each kind of use, a replay is held against full passes the first time (`errata.past.proven`); a model that can't
    be replayed gets full passes, and the log says so.

    Args:
        lm: the model.
        batch: right-padded tokens.
        places: modules, the first one in the lowest block.
        start: (batch,) the first column that changes.
    """
    full = FullPasses(lm, batch, start)
    if block_of(lm, places[0]) is None:
        return full

    def use(_: Replay) -> Use:
        after = batch.ends - start
        kind = len(batch) > 1, bool(start.any()), bool((start != start[0]).any()), bool((after != after[0]).any())
        return (*kind, hooked(lm)), (int(start.max()), int(after.max()), int(batch.ends.max()))

    return (
        proven(
            lm,
            ("replays", *places),
            f"replayed from {places[0]}",
            lambda: Replay(lm, batch, places, start),
            use,
            lambda replay: _agrees(lm, replay, batch, places, start),
        )
        or full
    )


def _agrees(lm: LM, replay: Replay, batch: Tokens, places: Sequence[str], start: Tensor) -> bool:
    """Whether logits and their gradient at the places are those of full passes while the places put out something else:
    in a first pass of all rows, then in one of a few, after the others have left."""
    rows = _telling(batch, start)
    reads = torch.stack([start[rows], batch.ends[rows]], 1).flatten()
    number = torch.arange(len(rows), device=rows.device).repeat_interleave(2)
    nudge = _Nudge(lm, places)
    want, pull = nudge.pulled(FullPasses(lm, batch[rows], start[rows]), number, reads)
    with torch.no_grad():
        whole = nudge.logits(replay, rows.repeat_interleave(2), reads)
    got, pulled = nudge.pulled(replay.few(rows), number, reads)
    near = [(g - w).norm() <= tolerance(lm.dtype) * w.norm() for g, w in zip(pulled, pull, strict=True)]
    return alike(lm.dtype, whole, want) and alike(lm.dtype, got, want) and all(near)


def _telling(batch: Tokens, start: Tensor) -> Tensor:
    """Rows by which all are judged: the longest, those with most and with middling padding before their start (or
    others); fewer than there are."""
    padded = start.argsort(stable=True)
    first = torch.stack([batch.ends.argmax(), padded[0], padded[len(padded) // 2]])
    rows = torch.cat([first, padded]).tolist()
    return first.new_tensor(list(dict.fromkeys(rows))[: min(3, max(1, len(batch) - 1))])


class _Nudge:
    """What is added to the outputs of places from the start on: noise of their own size, alike in all rows."""

    def __init__(self, lm: LM, places: Sequence[str]) -> None:
        self.lm, self.places = lm, places
        self.vectors: dict[str, Tensor] = {}
        self.answers: Tensor | None = None

    def logits(self, run: Passes, rows: Tensor, cols: Tensor) -> Tensor:
        """Logits (m, vocabulary) of a nudged pass."""
        self.added: dict[str, Tensor] = {}

        def adder(place: str) -> Callable[[Tensor], Tensor]:
            def add(output: Tensor) -> Tensor:
                if place not in self.vectors:
                    draw = torch.randn(output.shape[2:], generator=torch.Generator().manual_seed(0))
                    self.vectors[place] = draw.to(output.device) * output.detach().float().std()
                if place not in self.added:
                    self.added[place] = (
                        self.vectors[place].repeat(len(output), *[1] * (output.ndim - 2)).requires_grad_()
                    )
                here = torch.arange(output.shape[1], device=output.device) >= run.start[:, None]
                here = here.view(*here.shape, *[1] * (output.ndim - 2))
                return (output + here * self.added[place][:, None]).to(output.dtype)

            return add

        with effects.hooked(*(rewriting(self.lm, p, len(run.start), adder(p)) for p in self.places)):
            return run.logits(rows, cols)

    def pulled(self, run: Passes, rows: Tensor, cols: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The logits, and the gradient (rows, d) at each place of the log-probability of the likeliest answers."""
        with torch.enable_grad():
            logits = self.logits(run, rows, cols)
            if self.answers is None:
                self.answers = logits.argmax(1)
            said = log_softmax(logits, -1).gather(1, self.answers[:, None]).sum()
            return logits.detach(), list(torch.autograd.grad(said, [self.added[p] for p in self.places]))


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


def _has_rows(output: Any, batch: int, length: int) -> bool:
    """Whether it is known which of what a module put out belongs to which row: of its hidden states, and what it may
    put out beside them, such as attention."""
    first, *others = output if isinstance(output, tuple) else (output,)
    if not isinstance(first, Tensor) or first.ndim < 2:
        return False
    flat = first.ndim == 2 and len(first) == batch * length != first.shape[1]
    beside = all(x is None or (isinstance(x, Tensor) and x.ndim > 2 and len(x) == batch) for x in others)
    return beside and (flat or (first.ndim > 2 and first.shape[:2] == (batch, length)))


def _rows_of(output: Any, rows: Tensor, batch: int, length: int) -> Any:
    """Some rows of what a module put out for a batch, in the form it gave it."""
    if isinstance(output, tuple):
        return tuple(_rows_of(part, rows, batch, length) for part in output)
    if output is None:
        return None
    return output.unflatten(0, (batch, length))[rows].flatten(0, 1) if output.ndim == 2 else output[rows]


def _aligned(batch: Tokens, start: Tensor, before: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions (batch, before + after), with every row's start in column `before`."""
    cols = start[:, None] + torch.arange(-before, after, device=start.device)
    inside = (cols >= 0) & (cols <= batch.ends[:, None])
    return batch.ids.gather(1, cols.clamp(0, batch.ids.shape[1] - 1)), inside.long(), cols.clamp(min=0)


def _standing(lm: LM, still: Sequence[tuple[list[nn.Module], Any]]) -> AbstractContextManager[LM]:
    """While inside, these modules do no work; those of a group all put out the same."""
    return lm.hold(
        *(
            effects.Overlay(module, "forward", lambda _own, output=output: lambda *_, **__: _copy(output))
            for modules, output in still
            for module in modules
        ),
        kind="pass",
    )


def _copy(output: Any) -> Any:
    """What a module put out, for others to write into: some models add in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copy, output)) if isinstance(output, tuple) else output
