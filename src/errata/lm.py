"""A language model, its tokenizer, and where its parts are: found by shape, not by the model's name.

The blocks are the one `ModuleList` as long as the config says the model is deep; an MLP's write matrix is the one
linear map outside attention that ends in the residual stream and starts elsewhere. That names exactly one matrix in
every dense decoder family of transformers 5 that was tried; where it doesn't, the error says what to pass to `LM`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.pytorch_utils import Conv1D

from . import admission, anatomy, ledger, tokens
from .effects import Bare, Frozen, Hook, Overlay, gradients, random_state
from .errors import ErrataError, UsageError
from .ledger import Effect, Kind, Ledger

ALMANAC = Path(__file__).parent / "almanac"

ANSWER = 32
"""Tokens that text put before a prompt leaves free for the answer, at least."""


SOME_TEXT = "What comes next?"
"""What it is found out on whether one does."""
NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that can be written as they are."""

_products: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()
"""By module: the `forward` it had as it was tried, where it is not its class's own, and what came of it."""


@dataclass(frozen=True, eq=False)
class Site:
    """One weight of the model, always seen as (d_out, d_in)."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """A view of the weight as (d_out, d_in), written through to the model where it is `writable`.

        (Conv1D stores (d_in, d_out).)
        """
        stored: Any = self.module.weight
        return stored.T if isinstance(self.module, Conv1D) else stored

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return anatomy.shape_of(self.module)

    @property
    def device(self) -> torch.device:
        """Where it is kept."""
        return next(chain(self.module.parameters(), self.module.buffers())).device

    @property
    def writable(self) -> bool:
        """Whether the numbers in the tensor are the weight: to change them is to change what the module does.

        Not those of a quantised, scaled or parametrised weight, beside which a change can still be put.
        """
        stored = vars(self.module)["_parameters"].get("weight")
        plain = type(stored) is nn.Parameter and stored.dtype in NUMBERS and tuple(self.weight.shape) == self.shape
        return plain and _is_product(self.module)


def _is_product(module: Any) -> bool:
    """Whether a module puts out its input times its weight, by what it makes of three unit vectors."""
    how = vars(module).get("forward")
    if module in _products and _products[module][0] is how:
        return _products[module][1]
    weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach()
    which = torch.linspace(0, weight.shape[1] - 1, 3).long()
    units = torch.zeros(1, 3, weight.shape[1], dtype=weight.dtype, device=weight.device)
    units[0, torch.arange(3), which] = 1
    wanted = weight.T[which] + (0 if module.bias is None else module.bias)
    alike = (
        module.forward(units)[0].detach() - wanted
    ).norm() <= 2e-3 * wanted.norm()  # TF32 keeps 10 bits, 8 bits err by more
    _products[module] = how, bool(alike)
    return bool(alike)


class Reader(Protocol):
    """What a patch puts between a prompt and the model: more text around it, or somebody else who answers."""

    @property
    def answerer(self) -> LM | None:
        """Who answers the prompts that are read; None: the model itself."""
        ...

    def read(self, prompts: Sequence[str], room: int) -> list[tuple[str, str] | None]:
        """What to put before and after each prompt, with `room` tokens left for its answer; None: it is none of its
        business.

        It sees prompts only, never what is to follow them.
        """
        ...


class Reads(Effect):
    """A reader between prompts and one LM. No module is touched: `LM.readers` looks who is there."""

    def __init__(self, lm: LM, reader: Reader) -> None:
        self.lm, self.reader = lm, reader

    def settle(self) -> None:
        pass


@dataclass(eq=False)
class LM:
    """A causal language model of transformers and its tokenizer.

    The model is used as it is: neither copied nor moved, and put in eval mode only while errata works on it. A patch
    that changes the prompt or the answerer is seen by what goes through `encode`, `said` and `generate`; a call of
    `model` itself does not see it.

    Threads may share it, and another LM of the same model: edits, questions and blocks of `Patch.applied` take turns.
    """

    model: Any
    """A `PreTrainedModel` with a language-modelling head."""
    tokenizer: Any
    """Its fast tokenizer. Never changed: padding and BOS are the business of `errata.tokens`."""
    name: str = ""
    """What to call the model in reports."""
    block_list: str | None = None
    """Path of the list of blocks, for a model where the rule finds none or several."""
    mlp_path: str | None = None
    """Path of the MLP's write matrix inside a block, likewise. Where blocks differ: paths with `|` between, and `*`."""
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What was computed from the unedited model and holds for as long as this object lives."""

    def __post_init__(self) -> None:
        config = getattr(self.model, "config", None)
        self.name = self.name or getattr(config, "_name_or_path", "") or type(self.model).__name__
        admission.admit(self.model, self.name)

    def __repr__(self) -> str:
        patches = f", {self.patched} patches applied" if self.patched else ""
        return f"<LM {self.name}: {type(self.model).__name__}, {self.dtype} on {self.device}{patches}>"

    def __getstate__(self) -> dict[str, Any]:
        """Of a patched LM a copy is of the edited model: what is known of the unedited one stays behind."""
        if not self.patched:
            return dict(vars(self))
        return {**{k: v for k, v in vars(self).items() if k != "fingerprint"}, "memo": {}}

    # What is in place

    @property
    def ledger(self) -> Ledger:
        """Who has what in place on the model right now."""
        return Ledger.of(self.model)

    @property
    def patched(self) -> int:
        """How many patches are applied right now."""
        return sum(bool(entry.effects) for entry in self.ledger.live("patch"))

    @property
    def readers(self) -> list[Reader]:
        """What applied patches put between a prompt and the model, in the order they were applied."""
        effects = [effect for entry in self.ledger.live("patch") for effect in entry.effects]
        return [e.reader for e in effects if isinstance(e, Reads) and e.lm is self]

    def hold(self, *effects: Effect, kind: Kind = "mode") -> AbstractContextManager[LM]:
        """While inside, it is this thread's turn, and effects are in place; then all is as it was."""
        return ledger.hold(self.ledger, lambda: effects, self, kind)

    def unedited(self) -> AbstractContextManager[LM]:
        """While inside, no patch is in place: for what is computed once and kept in `memo`."""
        return self.hold(Bare(), kind="bare")

    def frozen(self) -> AbstractContextManager[LM]:
        """While inside, the model is in eval mode and its parameters take no gradients; then as it was."""
        return self.hold(Frozen(self.model))

    def asked(self) -> AbstractContextManager[LM]:
        """While inside, the model is frozen and nothing takes gradients.

        Raises:
            ErrataError: it is no causal model.
        """
        return ledger.hold(self.ledger, self._asked, self)

    def at_work(self) -> AbstractContextManager[LM]:
        """While inside, the unedited model is frozen, other things take gradients, and something may be drawn; then
        all is as it was, the caller's random state too.

        Raises:
            UsageError: a patch is applied.
            ErrataError: it is compiled, in pieces, or no causal model.
        """
        return ledger.hold(self.ledger, self._worked_on, self)

    def _asked(self) -> list[Effect]:
        self._proven_causal()
        return [Frozen(self.model), gradients(False)]

    def _worked_on(self) -> list[Effect]:
        admission.eager(self.model, self.name)
        admission.whole(self.model, self.name)
        if self.patched:
            raise UsageError(
                f"{self.name} has a patch applied; take it off (leave its block, or call its `undo`), "
                "and give it as `prior` to what goes on from it"
            )
        self._proven_causal()
        devices = {p.device for p in self.model.parameters()}
        return [Frozen(self.model), gradients(True), random_state(devices)]

    def _proven_causal(self) -> None:
        """Once, on the unedited model."""
        if "causal" not in self.memo:
            with self.unedited(), self.hold(Frozen(self.model), gradients(False)):
                admission.causal(self.model, self.name, self.encode([tokens.Passage(SOME_TEXT)]).ids[0])
            self.memo["causal"] = True

    # What it is

    @property
    def config(self) -> Any:
        """The config of the text model."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model has embeddings for, where it keeps them as usual."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        return len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else None

    @property
    def context(self) -> int | None:
        """How many tokens the model can read, where its config says so."""
        most = getattr(self.config, "max_position_embeddings", None)
        return most if most and most > 0 else None  # XLNet's config says -1

    @cached_property
    def fingerprint(self) -> str:
        """A digest of names, shapes and 256 entries of every parameter, to the eight bits that bfloat16 keeps: equal
        for a checkpoint in whichever dtype it is loaded. Taken once, from the unedited model."""
        admission.whole(self.model, self.name)
        digest = hashlib.sha256()
        with self.unedited():
            for name, p in self.model.named_parameters():
                flat = p.detach().reshape(-1)
                index = torch.linspace(0, flat.numel() - 1, min(256, flat.numel()), dtype=torch.float64).long()
                sample = flat[index.to(flat.device)].to("cpu", torch.bfloat16).float()
                digest.update(f"{name}{tuple(p.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:32]

    # Its parts

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Names of the transformer blocks, first to last."""
        depth = self.config.num_hidden_layers
        lists = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
        found = {n: m for n, m in lists.items() if not any(map(anatomy.is_linear, m))}
        if self.block_list is not None:
            lists = [n for n in found if n == self.block_list]
        elif len(found) > 1 and hasattr(self.model, "get_decoder"):  # a tower that sees may be as deep
            reading = set(self.model.get_decoder().modules())
            lists = [n for n, m in found.items() if m in reading]
        else:
            lists = list(found)
        if len(lists) != 1:
            raise ErrataError(
                f"{self.name}: expected one list of {depth} blocks, found {lists or 'none'}; "
                "name it: LM(model, tokenizer, block_list=...)"
            )
        return tuple(f"{lists[0]}.{i}" for i in range(depth))

    def module(self, name: str) -> Any:
        """A part of the model by its full name."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise UsageError(f"{self.name} has no module {name!r}; `errata anatomy` lists the places to edit") from None

    def site(self, at: int | str) -> Site:
        """A place to edit: the MLP's write matrix of a layer, or a linear module by its full name."""
        return self.mlp_out(at) if isinstance(at, int) else self._linear(at)

    def inside(self, name: str) -> str:
        """The name of a module, if it sees every token; the head is run only where logits are read."""
        if self.module(name) is self.model.get_output_embeddings():
            raise UsageError(
                f"{name} is run only where logits are read; choose a place inside a block (`errata anatomy` lists them)"
            )
        return name

    def mlp_out(self, layer: int) -> Site:
        """The matrix by which a block's MLP writes to the residual stream (among experts, that of a shared one)."""
        if not isinstance(layer, int) or not 0 <= layer < len(self.blocks):
            raise UsageError(f"{self.name} has layers 0 to {len(self.blocks) - 1}, not {layer!r}")
        name = self.blocks[layer]
        block = self.module(name)
        if self.mlp_path is not None:
            return self._linear(f"{name}.{self._named(name, self.mlp_path)}")
        found = anatomy.mlp_writers(block, self.d_model)
        if len(found) != 1:
            raise ErrataError(self._no_mlp(name, found))
        return Site(f"{name}.{found[0]}", block.get_submodule(found[0]))

    def mlp(self, layer: int) -> list[Site]:
        """All matrices of the MLP that writes by `mlp_out`."""
        name, write = self.blocks[layer], self.mlp_out(layer).name
        block = self.module(name)
        parts = anatomy.mlp_parts(block, write.removeprefix(f"{name}."), self.d_model)
        return [Site(f"{name}.{part}", block.get_submodule(part)) for part in parts]

    def attention_out(self, layer: int) -> Site | None:
        """The matrix by which a block's attention writes to the residual stream, where there is exactly one."""
        name = self.blocks[layer]
        block = self.module(name)
        reading = re.compile(r"(q|k|v|kv|qkv)_|query|key|value")
        writers = [n for n in anatomy.writers(block, self.d_model) if anatomy.in_attention(block, n)]
        found = [n for n in writers if not reading.match(n.rpartition(".")[2])]
        wide = [n for n in found if n.rpartition(".")[2] in {"o_proj", "out_proj", "c_proj", "dense"}]
        best = wide or found
        return Site(f"{name}.{best[0]}", block.get_submodule(best[0])) if len(best) == 1 else None

    def _named(self, name: str, path: str) -> str:
        """The part of a block that a path, or a pattern of several, names."""
        block = self.module(name)
        if path in dict(block.named_modules()) or not set(path) & set("*?[|"):
            if any(path.startswith(f"{experts}.") for experts in anatomy.routed(block)):
                raise UsageError(f"{name}.{path} is one of the experts, of which a token sees some; edit a shared one")
            return path
        if len(found := anatomy.matching(block, path)) != 1:
            raise UsageError(f"mlp_path={path!r} names {found or 'nothing'} in {name}, where one matrix is wanted")
        return found[0]

    def _no_mlp(self, name: str, found: Sequence[str]) -> str:
        """Why a block has no single matrix by which its MLP writes, and what can be edited in its place."""
        block = self.module(name)
        writers = anatomy.writers(block, self.d_model)
        outside = found or [n for n in writers if not anatomy.in_attention(block, n)]
        said = f"{name} has no single MLP write matrix (found {list(found) or 'none'})"
        if outside:
            return f"{said}; name it: LM(model, tokenizer, mlp_path=...), one of {', '.join(outside)}"
        experts = any("expert" in f"{n} {type(m).__name__}".lower() for n, m in block.named_modules())
        said += ": it is a mixture of experts, none of which all tokens see" if experts else ""
        if (attention := self.attention_out(self.blocks.index(name))) is not None:
            said += f"; its attention can be edited by methods that take a place by name, at={attention.name!r}"
        return said

    def _linear(self, name: str) -> Site:
        module = self.module(name)
        if not anatomy.is_linear(module):
            raise UsageError(
                f"{name} is a {type(module).__name__}, not a linear map; `errata anatomy` lists the places"
            )
        return Site(name, module)

    # Using it

    def encode(self, passages: Sequence[tokens.Passage], room: int = ANSWER) -> tokens.Tokens:
        """Passages as one batch on the model's device, as applied patches let the model read them.

        Args:
            passages: at least one.
            room: tokens that text put before them leaves free for an answer, at least.
        """
        with self.hold(gradients(False)):
            read = self._read([p.text[: p.target] for p in passages], room)
        whole = [
            tokens.within(replace(p, chat=p.chat and not who), *around)  # who answers in its stead has its own form
            for p, (around, who) in zip(passages, read, strict=True)
        ]
        batch = tokens.encode(self.tokenizer, whole, self.context, self.device, self.vocabulary)
        return replace(batch, answerer=torch.tensor([who for _, who in read], device=self.device))

    def stacked(self, rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        """Rows of token ids as (batch, seq) ids and mask, padded on the right or on the left."""
        return tokens.stacked(self.tokenizer, rows, self.device, left, self.vocabulary)

    def said(self, batch: tokens.Tokens) -> Tensor:
        """Logits (m, vocabulary) at `batch.reads`, each row by whoever answers it: the model, or a patch's own."""
        rows, _ = batch.reads
        if batch.answerer is None or not batch.answerer.any():
            return self.logits(*batch.reads, **batch.inputs)
        parts = {}
        with self.hold():
            for who in batch.answerer.unique().tolist():
                part = batch[batch.answerer == who]
                parts[who] = self.answering(who).logits(*part.reads, **part.inputs)
        out = torch.empty(len(rows), max(p.shape[1] for p in parts.values()), device=self.device)
        for who, part in parts.items():
            out[batch.answerer[rows] == who] = part.to(self.device)
        return out

    def _read(self, prompts: Sequence[str], room: int = ANSWER) -> list[tuple[tuple[str, str], int]]:
        """What is put around each prompt, and who answers it; where two patches see to it, as the later one says."""
        out = [(("", ""), 0)] * len(prompts)
        for number, reader in enumerate(self.readers, 1):
            for i, around in enumerate(reader.read(prompts, max(room, ANSWER))):
                if around is not None:
                    out[i] = around, number if reader.answerer else 0
        return out

    def answering(self, who: int) -> LM:
        """Who answers the rows of that number in `Tokens.answerer`."""
        return (self.readers[who - 1].answerer if who else None) or self

    def logits(self, rows: Tensor, cols: Tensor, **inputs: Any) -> Tensor:
        """Logits at positions (rows, cols) of a batch, (m, vocabulary) in float32; the head runs only there.

        Gradients flow unless the caller turned them off.

        Args:
            rows: (m,).
            cols: (m,).
            inputs: what the model is called with: `**tokens.inputs`, and a cache if there is one.
        """
        admission.eager(self.model, self.name)
        seen, shape = [], inputs["input_ids"].shape

        def gather(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if args[0].shape[:2] != shape:  # several streams, say, of which the model takes one afterwards
                return args
            seen.append(True)
            return (args[0][rows, cols][None], *args[1:])

        with self.hold(Hook(self.model.get_output_embeddings(), gather, before=True), kind="pass"):
            found = self.model(**{"use_cache": False, **inputs}).logits
        return (found[0] if seen else found[rows, cols]).float()

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompt: str,
        max_new_tokens: int = 20,
        until: Callable[[str], bool] | None = None,
        chat: bool = False,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str],
        max_new_tokens: int = 20,
        until: Callable[[str], bool] | None = None,
        chat: bool = False,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 20,
        until: Callable[[str], bool] | None = None,
        chat: bool = False,
    ) -> str | list[str]:
        """The greedy continuation of a prompt, or of each of several.

        Args:
            prompt: one or several; several share their passes, and go on until the last of them ends.
            max_new_tokens: at most; a model's own end comes before.
            until: told a continuation so far, says whether it has gone far enough.
            chat: whether each prompt is a user's turn, by the tokenizer's chat template, and what is generated the
                reply. A conversation of several turns is a matter for `chat`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            return []
        texts = [""] * len(prompts)
        with self.hold(gradients(False)):
            read = self._read(prompts, max_new_tokens)
            for who in dict.fromkeys(who for _, who in read):
                rows = [i for i, (_, other) in enumerate(read) if other == who]
                asked = [prompts[i].join(read[i][0]) for i in rows]
                put = chat and not who
                asked = tokens.in_chat(self.tokenizer, asked) if put else asked
                said = self.answering(who)._generated(asked, max_new_tokens, until, put)
                for i, text in zip(rows, said, strict=True):
                    texts[i] = text
        return texts[0] if isinstance(prompt, str) else texts

    def chat(self, messages: Sequence[Mapping[str, str]], max_new_tokens: int = 200) -> str:
        """The greedy reply to a conversation, by the tokenizer's chat template.

        Args:
            messages: turns with `role` and `content`, as chat templates take them; the last one is a user's.
            max_new_tokens: at most; the model's own end comes before.
        """
        *before, last = messages
        with self.hold(gradients(False)):
            ((around, who),) = self._read([last["content"]], max_new_tokens)
            asked = last["content"].join(around)
            if who:
                return self.answering(who)._generated([asked], max_new_tokens, None)[0]
            whole = tokens.conversation(self.tokenizer, [*before, {**last, "content": asked}])
            return self._generated([whole], max_new_tokens, None, put=True)[0]

    def _generated(
        self, prompts: list[str], max_new_tokens: int, until: Callable[[str], bool] | None, put: bool = False
    ) -> list[str]:
        """The continuation of each text; `put`: of those that a chat template wrote."""
        inputs = tokens.pad_left(self.tokenizer, prompts, self.device, put, self.vocabulary)
        length = inputs["input_ids"].shape[1]
        self.fit(length, max_new_tokens)
        with self.asked():
            out = self.continued(inputs, self.stop(length, until), do_sample=False, max_new_tokens=max_new_tokens)
        return self.texts(out[:, length:])

    def fit(self, length: int, more: int) -> None:
        """Refuse a prompt of so many tokens that leaves no room for more."""
        if self.context is not None and length + more > self.context:
            raise UsageError(
                f"{length} tokens of prompt and {more} new ones don't fit the model's {self.context}; "
                "shorten the prompt or ask for fewer tokens"
            )

    def texts(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """What rows of tokens say, without special ones."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens by which the model ends what it says."""
        ends = self.model.generation_config.eos_token_id
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    def stop(self, length: int, until: Callable[[str], bool] | None) -> list[Callable[..., Tensor]]:
        """For `continued`: whether what follows the first `length` tokens of each row has gone far enough."""
        if until is None:
            return []
        return [lambda ids, _scores: torch.tensor([until(t) for t in self.texts(ids[:, length:])], device=ids.device)]

    def continued(
        self,
        inputs: Mapping[str, Tensor],
        stop: Sequence[Callable[..., Tensor]] = (),
        scores: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
        **settings: Any,
    ) -> Tensor:
        """Token ids (batch, seq + new) of left-padded inputs and what follows, by these settings of generation alone.

        What a model ships as its own (a repetition penalty, a temperature) would otherwise fill in the others.

        Args:
            inputs: ids and mask.
            stop: called with ids and scores, says of every row whether it has gone far enough.
            scores: called with ids (batch, seq) and scores (batch, vocabulary) of the next token, gives others.
            settings: those of transformers' `GenerationConfig`.
        """
        stopping: Any = StoppingCriteriaList(stop)  # its annotation asks for a class; it calls what it is given
        having = [m for m in self.model.modules() if "generation_config" in vars(m)]
        plain = [Overlay(m, "generation_config", lambda _own: GenerationConfig()) for m in having]
        scoring: Any = LogitsProcessorList(scores)
        with self.hold():
            ends = {
                "eos_token_id": self.model.generation_config.eos_token_id,
                "pad_token_id": tokens.padding(self.tokenizer, self.vocabulary),
            }
            how = GenerationConfig(**(ends | settings))
            with self.hold(*plain, kind="pass"):
                return self.model.generate(
                    **inputs, generation_config=how, stopping_criteria=stopping, logits_processor=scoring
                )
