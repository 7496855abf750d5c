"""A language model, its tokenizer, and where its parts are: found by shape, not by the model's name.

The blocks are the one `ModuleList` as long as the config says the model is deep; an MLP's write matrix is the one
linear map outside attention that ends in the residual stream and starts elsewhere. That names exactly one matrix in
every dense decoder family of transformers 5 that was tried; where it doesn't, the error says what to pass to `LM`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteriaList
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from . import tokens
from .errors import ErrataError, UsageError

ALMANAC = Path(__file__).parent / "almanac"

ANSWER = 32
"""Tokens that text put before a prompt leaves free for the answer, at least."""


@dataclass(frozen=True, eq=False)
class Site:
    """One weight of the model, always seen as (d_out, d_in)."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """A view of the weight as (d_out, d_in), written through to the model. (Conv1D stores (d_in, d_out).)"""
        stored = self.module.get_parameter("weight")
        return stored.T if isinstance(self.module, Conv1D) else stored

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        if isinstance(self.module, nn.Linear):
            return self.module.out_features, self.module.in_features
        d_out, d_in = self.weight.shape
        return d_out, d_in

    @property
    def writable(self) -> bool:
        """Whether the weight holds plain numbers of that shape; a quantised one does not."""
        return self.weight.is_floating_point() and tuple(self.weight.shape) == self.shape


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


@dataclass(eq=False)
class LM:
    """A causal language model of transformers and its tokenizer.

    The model is used as it is: neither copied nor moved, and put in eval mode only while errata works on it. A patch
    that changes the prompt or the answerer is seen by what goes through `encode`, `said` and `generate`; a call of
    `model` itself does not see it.
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
    """Path of the MLP's write matrix inside a block, likewise."""
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What was computed from the unedited model and holds for as long as this object lives."""
    patched: int = field(default=0, init=False, repr=False)
    """How many patches are applied right now."""
    readers: list[Reader] = field(default_factory=list, init=False, repr=False)
    """What applied patches put between a prompt and the model, in the order they were applied."""

    def __post_init__(self) -> None:
        self.name = self.name or getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__

    def __repr__(self) -> str:
        patches = f", {self.patched} patches applied" if self.patched else ""
        return f"<LM {self.name}: {type(self.model).__name__}, {self.dtype} on {self.device}{patches}>"

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
    def context(self) -> int | None:
        """How many tokens the model can read, where its config says so."""
        return getattr(self.config, "max_position_embeddings", None)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of names, shapes and 256 entries of every parameter, to the eight bits that bfloat16 keeps: equal
        for a checkpoint in whichever dtype it is loaded. Taken once, from the unedited model."""
        digest = hashlib.sha256()
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
        lists = [n for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if self.block_list is not None:
            lists = [n for n in lists if n == self.block_list]
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

    def mlp_out(self, layer: int) -> Site:
        """The matrix by which a block's MLP writes to the residual stream."""
        if not 0 <= layer < len(self.blocks):
            raise UsageError(f"{self.name} has layers 0 to {len(self.blocks) - 1}, not {layer}")
        block = self.blocks[layer]
        if self.mlp_path is not None:
            return self._linear(f"{block}.{self.mlp_path}")
        outside = [s for s in self._writers(block) if s.shape[1] != self.d_model and not _in_attention(s.name)]
        fused = any(p.ndim > 2 for p in self.module(block).parameters())
        if len(outside) != 1 or fused:
            names = [s.name.removeprefix(block + ".") for s in outside]
            raise ErrataError(
                f"{block} has no single MLP write matrix (found {names or 'none'}"
                f"{', next to fused experts' if fused else ''}); name it: LM(model, tokenizer, mlp_path=...)"
            )
        return outside[0]

    def mlp(self, layer: int) -> list[Site]:
        """All matrices of a block outside its attention: those of its MLP."""
        self.mlp_out(layer)  # an MLP of fused experts has no matrices to speak of
        block = self.blocks[layer]
        named = self.module(block).named_modules()
        found = [Site(f"{block}.{n}", m) for n, m in named if isinstance(m, nn.Linear | Conv1D)]
        return [site for site in found if not _in_attention(site.name)]

    def attention_out(self, layer: int) -> Site | None:
        """The matrix by which a block's attention writes to the residual stream, where there is exactly one."""
        found = [s for s in self._writers(self.blocks[layer]) if _in_attention(s.name)]
        wide = [s for s in found if s.name.rsplit(".", 1)[-1] in {"o_proj", "out_proj", "c_proj", "dense"}]
        return (wide or found)[0] if len(wide or found) == 1 else None

    def _writers(self, block: str) -> list[Site]:
        linear = [
            Site(f"{block}.{n}", m) for n, m in self.module(block).named_modules() if isinstance(m, nn.Linear | Conv1D)
        ]
        return [s for s in linear if s.shape[0] == self.d_model]

    def _linear(self, name: str) -> Site:
        module = self.module(name)
        if not isinstance(module, nn.Linear | Conv1D):
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
        read = self._read([p.text[: p.target] for p in passages], room)
        whole = [tokens.within(p, *around) for p, (around, _) in zip(passages, read, strict=True)]
        batch = tokens.encode(self.tokenizer, whole, limit=self.context, device=self.device)
        return replace(batch, answerer=torch.tensor([who for _, who in read], device=self.device))

    def said(self, batch: tokens.Tokens) -> Tensor:
        """Logits (m, vocabulary) at `batch.reads`, each row by whoever answers it: the model, or a patch's own."""
        rows, _ = batch.reads
        if batch.answerer is None or not batch.answerer.any():
            return self.logits(*batch.reads, **batch.inputs)
        parts = {}
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
        seen = []

        def gather(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(True)
            return (args[0][rows, cols][None], *args[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(gather)
        try:
            found = self.model(**{"use_cache": False, **inputs}).logits
        finally:
            handle.remove()
        return (found[0] if seen else found[rows, cols]).float()

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: str, max_new_tokens: int = 20, until: Callable[[str], bool] | None = None
    ) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str], max_new_tokens: int = 20, until: Callable[[str], bool] | None = None
    ) -> list[str]: ...

    def generate(
        self, prompt: str | Sequence[str], max_new_tokens: int = 20, until: Callable[[str], bool] | None = None
    ) -> str | list[str]:
        """The greedy continuation of a prompt, or of each of several.

        Args:
            prompt: one or several; several share their passes, and go on until the last of them ends.
            max_new_tokens: at most; a model's own end comes before.
            until: told a continuation so far, says whether it has gone far enough.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            return []
        read = self._read(prompts, max_new_tokens)
        texts = [""] * len(prompts)
        for who in dict.fromkeys(who for _, who in read):
            rows = [i for i, (_, other) in enumerate(read) if other == who]
            asked = [prompts[i].join(read[i][0]) for i in rows]
            said = self.answering(who)._generated(asked, max_new_tokens, until)
            for i, text in zip(rows, said, strict=True):
                texts[i] = text
        return texts[0] if isinstance(prompt, str) else texts

    def _generated(self, prompts: list[str], max_new_tokens: int, until: Callable[[str], bool] | None) -> list[str]:
        inputs = tokens.pad_left(self.tokenizer, prompts, self.device)
        length = inputs["input_ids"].shape[1]
        self.fit(length, max_new_tokens)
        with self.frozen(), torch.no_grad():
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
        self, inputs: Mapping[str, Tensor], stop: Sequence[Callable[..., Tensor]] = (), **settings: Any
    ) -> Tensor:
        """Token ids (batch, seq + new) of left-padded inputs and what follows, by these settings of generation alone.

        What a model ships as its own (a repetition penalty, a temperature) would otherwise fill in the others.
        """
        stopping: Any = StoppingCriteriaList(stop)  # its annotation asks for a class; it calls what it is given
        own = self.model.generation_config
        ends = {"eos_token_id": own.eos_token_id, "pad_token_id": tokens.padding(self.tokenizer)}
        self.model.generation_config = GenerationConfig()
        try:
            how = GenerationConfig(**ends, **settings)
            return self.model.generate(**inputs, generation_config=how, stopping_criteria=stopping)
        finally:
            self.model.generation_config = own

    @contextmanager
    def frozen(self) -> Iterator[LM]:
        """While inside, the model is in eval mode and its parameters take no gradients; then as it was."""
        training = [m for m in self.model.modules() if m.training]
        wanting = [p for p in self.model.parameters() if p.requires_grad]
        with ExitStack() as undo:
            for m in training:
                undo.callback(setattr, m, "training", True)
                m.training = False
            for p in wanting:
                undo.callback(p.requires_grad_, True)
                p.requires_grad_(False)
            yield self


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> LM:
    """Load a model: `almanac` (built in), a folder, or a name on the hub.

    Args:
        name: which model.
        dtype: of the weights; by default what they were saved in (`almanac`: float32).
        device: where to; by default a GPU if there is one.
        trust_remote_code: run Python code that comes with the model. Off unless asked for.

    Raises:
        ErrataError: the model can't be found or read.
    """
    built_in = str(name) == "almanac"
    place = ALMANAC if built_in else name
    if not built_in and _looks_like_a_path(name) and not Path(name).is_dir():
        raise UsageError(f"there is no folder {str(name)!r}; give a model's folder, a name on the hub, or almanac")
    wanted = torch.float32 if built_in and dtype is None else dtype or "auto"
    bars = transformers_logging.is_progress_bar_enabled()
    if built_in:
        transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=wanted, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, SafetensorError) as error:
        raise ErrataError(f"the model {str(name)!r} can't be loaded: {_first_sentence(error)}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    target = device or ("cuda" if torch.cuda.is_available() else None)
    if target is not None:
        model.to(target)  # pyright: ignore[reportArgumentType] - transformers' own annotation
    return LM(model.eval(), tokenizer, name=str(name))


def _looks_like_a_path(name: str | Path) -> bool:
    return isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1


def _in_attention(name: str) -> bool:
    return "attn" in name or "attention" in name


def _first_sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
