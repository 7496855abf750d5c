"""SERAC's change: prompts in the scope of a remembered edit are answered by a small model that reads the edit."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus
from transformers import LlamaConfig, LlamaForCausalLM

from ..edit import Edit
from ..errors import ErrataError
from ..lm import LM, Reader
from ..tokens import padding, passage
from .change import Change
from .remembered import Remembered

log = logging.getLogger(__name__)

ROWS = 64
"""Prompts whose scope is looked at together; the memory grows with it, times the edits remembered."""


@dataclass(frozen=True, eq=False)
class Deferral(Remembered, kind="deferral"):
    """A prompt in the scope of an edit is answered by the counterfactual model, which reads the edit before it; every
    other by the untouched model.

    SERAC, Mitchell et al. 2022, https://arxiv.org/abs/2206.06520. The scope classifier and the counterfactual model
    come with the patch, once for all of its edits. The texts of an edit: its prompt (a template), subject, target.
    """

    form: ClassVar = {**Remembered.form, "network": "float32 numbers", "shape": "int64 4", "vocabulary": "int64 16"}

    network: Tensor
    """Every number of both networks (`Networks`), one after another."""
    shape: Tensor
    """int64: what `Networks` is built of."""
    vocabulary: Tensor
    """int64: a digest of the tokenizer that both read with."""

    def reader(self, lm: LM) -> Reader:
        return _Router(self, lm)

    def check(self, lm: LM, name: str) -> None:
        super().check(lm, name)
        refuse_other_vocabulary(self.vocabulary, lm)

    def join(self, later: Change) -> tuple[Change, ...]:
        if isinstance(later, Deferral) and torch.equal(self.network, later.network):
            return (self.and_later(later),)
        return self, later

    def refuse_inconsistent(self) -> None:
        super().refuse_inconsistent()
        len(self.edits)  # what makes no edit raises
        words, width, scope, end = self.shape.tolist()
        numbers = Networks.size(words, width, scope)
        if min(words, width, scope) < 1 or not 0 <= end < words or numbers != len(self.network):
            raise ValueError("the networks of a deferral change are not of the shape that it names")

    @property
    def told(self) -> list[str]:
        return [f"edit {i}: {e.text!r} -> {e.target!r}" for i, e in zip(self.owners.tolist(), self.edits, strict=True)]

    @property
    def edits(self) -> list[Edit]:
        """The edits remembered."""
        return [Edit.read(dict(zip(("prompt", "subject", "target"), texts, strict=True))) for texts in self.texts]


class _Router:
    """Tells which prompts of one model are in the scope of which edit."""

    def __init__(self, deferral: Deferral, lm: LM) -> None:
        self.deferral, self.lm, self.edits = deferral, lm, deferral.edits
        networks = Networks(*deferral.shape.tolist()).to(lm.device)
        networks.load(deferral.network)
        self.scope = networks.requires_grad_(False).eval().scope
        self.answerer = LM(networks.counterfactual, lm.tokenizer, name="the counterfactual model")
        self.known = written(lm, self.edits)
        self.own = {edit.text: i for i, edit in enumerate(self.edits)}  # of equals, the later

    @torch.no_grad()
    def read(self, prompts: Sequence[str], room: int) -> list[tuple[str, str] | None]:
        out: list[tuple[str, str] | None] = []
        for start in range(0, len(prompts), ROWS):
            some = prompts[start : start + ROWS]
            chance = self.scope(self.known, Asked.of(self.lm, some)).sigmoid()
            out += [self._around(*row) for row in zip(some, chance, strict=True)]
        return out

    def _around(self, prompt: str, chances: Tensor) -> tuple[str, str] | None:
        own = self.own.get(prompt)  # in scope whatever the classifier says, which knows no edit without a subject
        near = len(chances) - 1 - int(chances.flip(0).argmax()) if own is None else own
        chance, edit = float(chances[near]), self.edits[near]
        inside = own is not None or chance >= 0.5
        log.debug(
            "%r: nearest is edit %d, %r, in scope with p = %.2f: %s answers",
            *(prompt, int(self.deferral.owners[near]), edit.text, chance),
            "the counterfactual model" if inside else self.lm.name,
        )
        return told(edit) if inside else None


def told(edit: Edit) -> tuple[str, str]:
    """An edit as the counterfactual model reads it: what is put before a prompt and after it."""
    return f"{' '.join(edit.text.split())} -> {' '.join(edit.target.split())}\n", " ->"


class Networks(nn.Module):
    """The scope classifier and the counterfactual model: a Llama of two blocks that shares the model's vocabulary."""

    def __init__(self, vocabulary: int, width: int, scope: int, end: int) -> None:
        super().__init__()
        self.shape = (vocabulary, width, scope, end)
        self.scope = Scope(vocabulary, scope)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=2**20,
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=end,
        )
        self.counterfactual = LlamaForCausalLM(config)
        write_copier(self.counterfactual)
        self.counterfactual.requires_grad_(False)
        self.register_state_dict_post_hook(_untied)
        self.register_load_state_dict_pre_hook(_tied)

    @staticmethod
    def size(vocabulary: int, width: int, scope: int) -> int:
        """How many numbers networks of that shape have."""
        return vocabulary * (scope + 1) + 3 + vocabulary * width + 20 * width**2 + 5 * width

    @property
    def numbers(self) -> Tensor:
        """All parameters, one after another."""
        return torch.cat([p.detach().reshape(-1).float().cpu() for p in self.parameters()])

    @torch.no_grad()
    def load(self, numbers: Tensor) -> None:
        """Take the parameters from `numbers`."""
        for p, part in zip(self.parameters(), numbers.split([p.numel() for p in self.parameters()]), strict=True):
            p.copy_(part.view_as(p))


def _untied(module: nn.Module, state: Any, start: str, *_: Any) -> None:
    """The head is the embeddings: kept once."""
    del state[f"{start}counterfactual.lm_head.weight"]


def _tied(module: nn.Module, state: Any, start: str, *_: Any) -> None:
    state[f"{start}counterfactual.lm_head.weight"] = state[f"{start}counterfactual.model.embed_tokens.weight"]


@torch.no_grad()
def write_copier(model: Any) -> None:
    """Write the induction circuit (Olsson et al. 2022, https://arxiv.org/abs/2209.11895) into a Llama of two blocks.

    One half of the residual stream holds who a token is, the other who stood before it. Block 0 looks one token back;
    block 1 looks for a token that had the present one before it, and says it. Second heads and MLPs say nothing.
    (Trained from nothing, the same model had not begun to copy after 200 steps; trained from here it got worse.)
    """
    width, half = model.config.hidden_size, model.config.hidden_size // 2
    who, before = slice(1, half), slice(half + 1, width)
    names = torch.randn(model.config.vocab_size, half - 1)
    words = model.model.embed_tokens.weight
    words.zero_()[:, who] = normalize(names, dim=-1)
    words[:, 0] = 1.0  # the same for all, for a head that looks by place alone
    for block in model.model.layers:
        for p in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            p.zero_()
    back, match = (block.self_attn for block in model.model.layers)
    for p in (back.q_proj, back.k_proj, match.q_proj, match.k_proj, back.v_proj, match.v_proj):
        p.weight[:half] = 0.0
    turn = 10000.0 ** (-torch.arange(half // 2) / (half // 2))  # radians a token, by pair of a head's dimensions
    strength, quick = (2.8 / width**0.25, turn > 0.05)
    back.q_proj.weight[: half // 2, 0] = strength * quick
    back.k_proj.weight[: half // 2, 0] = strength * quick * turn.cos()
    back.k_proj.weight[half // 2 : half, 0] = strength * quick * turn.sin()
    same = torch.eye(half - 1)
    back.v_proj.weight[1:half, who] = same
    back.o_proj.weight[before, 1:half] = same * (2 / width) ** 0.5
    slow = (turn < 0.03).repeat(2)
    look = 1.5 * torch.randn(int(slow.sum()), half - 1) / float(slow.sum()) ** 0.5
    match.q_proj.weight[:half][slow, who] = look
    match.k_proj.weight[:half][slow, before] = look
    match.v_proj.weight[1:half, who] = same
    match.o_proj.weight[who, 1:half] = same
    model.model.norm.weight.fill_(2.0)


@dataclass(frozen=True)
class Asked:
    """Tokens of texts, and which of them belong to a subject."""

    ids: Tensor
    """(texts, seq) int64."""
    mask: Tensor
    """(texts, seq) bool."""
    subject: Tensor
    """(texts, seq) bool."""

    @classmethod
    def of(cls, lm: LM, texts: Sequence[str], spans: Sequence[tuple[int, int]] | None = None) -> Asked:
        """Texts, and in each the characters of its subject."""
        found = lm.tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, padding=False, verbose=False
        )
        longest = max(1, *map(len, found["input_ids"]))
        ids = torch.full((len(texts), longest), padding(lm.tokenizer))
        mask, subject = (torch.zeros(len(texts), longest, dtype=torch.bool) for _ in range(2))
        for i, row in enumerate(found["input_ids"]):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = True
            if spans is not None:
                start, end = spans[i]
                inside = [a < end and b > start for a, b in found["offset_mapping"][i]]
                subject[i, : len(row)] = torch.tensor(inside, dtype=torch.bool)
        return cls(ids.to(lm.device), mask.to(lm.device), subject.to(lm.device))


def written(lm: LM, edits: Sequence[Edit]) -> Asked:
    """The prompts of edits."""
    passages = [passage(e) for e in edits]
    return Asked.of(lm, [p.text for p in passages], [p.subject or (0, 0) for p in passages])


class Scope(nn.Module):
    """Whether a text is in the scope of an edit: how well each word of the edit is met by some word of the text.

    Late interaction (Khattab and Zaharia 2020) of token vectors, so that the edits are read once; the mean of the
    subject and the mean of the other words each have a say. A name never seen in training still meets itself.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(vocabulary, width)
        self.weights = nn.Embedding(vocabulary, 1)
        nn.init.normal_(self.vectors.weight, std=0.01)  # only their direction counts: the shorter, the faster they turn
        nn.init.zeros_(self.weights.weight)
        self.say = nn.Parameter(torch.tensor([0.06, 0.06]))
        self.threshold = nn.Parameter(torch.tensor(0.1))

    def forward(self, edits: Asked, texts: Asked) -> Tensor:
        """Log-odds (texts, edits), of every text with every edit."""
        e, t = self.read(edits), self.read(texts)
        alike = torch.einsum("eid,tjd->teij", e, t).masked_fill(~texts.mask[:, None, None], -1.0)
        return self.judge(edits, alike.amax(-1))

    def pairs(self, edits: Asked, texts: Asked) -> Tensor:
        """Log-odds (n, edits), of each edit with its own n texts alone: texts i, i + edits, i + 2 edits ..."""
        e, t = (
            self.read(edits),
            self.read(texts).view(-1, len(edits.ids), *texts.ids.shape[1:], self.vectors.embedding_dim),
        )
        mask = texts.mask.view(*t.shape[:2], 1, -1)
        return self.judge(edits, torch.einsum("eid,nejd->neij", e, t).masked_fill(~mask, -1.0).amax(-1))

    def read(self, texts: Asked) -> Tensor:
        """Token vectors of length 1, (texts, seq, width)."""
        return normalize(self.vectors(texts.ids), dim=-1)

    def judge(self, edits: Asked, met: Tensor) -> Tensor:
        """Log-odds (n, edits) by how well each token of an edit is met, (n, edits, seq)."""
        weight = softplus(self.weights(edits.ids)[..., 0]) * edits.mask
        name, rest = (weight * m for m in (edits.subject, ~edits.subject))
        seen = torch.stack([_mean(met, name), _mean(met, rest)], -1)
        return 100 * (seen @ self.say - self.threshold)


def _mean(met: Tensor, weight: Tensor) -> Tensor:
    return (met * weight).sum(-1) / weight.sum(-1).clamp(min=1e-6)


def vocabulary(lm: LM) -> Tensor:
    """A digest of a model's tokenizer."""
    words = json.dumps(sorted(lm.tokenizer.get_vocab().items()))
    return torch.tensor(list(hashlib.sha256(words.encode()).digest()[:16]))


def refuse_other_vocabulary(digest: Tensor, lm: LM) -> None:
    """Networks read what they were taught to read.

    Raises:
        ErrataError: the model has another tokenizer.
    """
    if not torch.equal(digest.cpu(), vocabulary(lm)):
        raise ErrataError(
            f"the editor of serac was trained with another tokenizer than that of {lm.name}; train one for it: "
            f"errata train serac --model {lm.name}"
        )
