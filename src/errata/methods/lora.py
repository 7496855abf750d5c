"""LoRA: fine-tuning of a low-rank adapter, built and run by PEFT; what it learnt is a low-rank change like any other.

A baseline. On a quantised model (QLoRA) PEFT puts its own quantised layers under the adapter, and the patch goes beside
the weight as it does for every method. EasyEdit's preset trains with dropout 0.1 and no stop; both are fields here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from ..changes import LowRank
from ..edit import Edit
from ..effects import Parts
from ..errors import ErrataError, UsageError
from ..lm import LM, Site
from ..method import Method
from ..parts import descend
from ..parts.scaled import Scaled
from ..patch import Patch
from ..tokens import Tokens, passage

ADAPTER = "errata"
WITHIN = "model"
"""Name under which PEFT finds the model. (Of one of fused experts it would adapt others than were named.)"""


@dataclass(frozen=True, kw_only=True)
class LoRA(Scaled, Method, name="lora"):
    """An adapter of its own for every edit, trained on the target's tokens. Needs PEFT (`pip install errata[peft]`)."""

    paper = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"
    source = "https://arxiv.org/abs/2106.09685"
    scalable = ("rate",)
    batched = False  # one adapter for several edits could not be taken apart again

    kind: Literal["lora", "adalora"] = "lora"
    """AdaLoRA (Zhang et al. 2023, https://arxiv.org/abs/2303.10512) starts at 1.5 times the rank and prunes to it."""
    modules: tuple[str, ...] = ()
    """Endings of the names of the linear modules (`q_proj`); by default the MLPs' write matrices."""
    layers: tuple[int, ...] = ()
    """The blocks that get the adapter; by default all."""
    rank: int = 8
    """Of every module's change."""
    alpha: float = 32.0
    """The change is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero while it trains."""
    scaled_by_root: bool = False
    """Multiply by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""
    orthogonal: float = 0.5
    """AdaLoRA: weight of keeping its factors orthogonal."""
    warm: int = 0
    """AdaLoRA: steps before it begins to prune."""
    final: int = 0
    """AdaLoRA: steps at the end at which it prunes no more."""
    every: int = 1
    """AdaLoRA: steps from one pruning to the next."""
    steps: int = 70
    """Adam steps at most."""
    rate: float = 5e-3
    """Adam's learning rate; if `scaled`, about the share of what a module puts out by which a step moves it."""
    decay: float = 0.0
    """Adam's weight decay."""
    stop: float = 0.01
    """The loss at which training ends; AdaLoRA goes on until it has pruned."""
    margin: float | None = None
    """Training ends, too, when every token of the target is by so many nats the likeliest."""
    ending: str = ""
    """What is trained to follow the target, so that the answer ends there: nothing, or a full stop."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        tokens = lm.encode([passage(e, answer=e.target + self.ending) for e in edits])
        with lm.hold(Parts(lm.model)):
            tuner, layers = self._adapted(lm)
            self._train(lm, tuner, layers, tokens)
            found = {name: _change(layer) for name, layer in layers.items()}
        return Patch({name: (change,) for name, change in found.items() if change is not None})

    def _train(self, lm: LM, tuner: Any, layers: Mapping[str, Any], tokens: Tokens) -> None:
        groups = self._groups(tuner, layers)
        weights = [p for group in groups for p in group["params"]]
        optimiser = torch.optim.Adam(groups, lr=self.rate, weight_decay=self.decay)
        for step in range(self.steps):
            logits = lm.logits(*tokens.reads, **tokens.inputs)
            loss, lead = cross_entropy(logits, tokens.wanted), descend.leads(logits.detach(), tokens.wanted).min()
            said = loss < self.stop or (self.margin is not None and lead >= self.margin)
            if said and self.kind == "lora":
                break
            optimiser.zero_grad()
            descend.pull(lm, loss + self._irregularity(tuner), weights)
            optimiser.step()
            if self.kind == "adalora":
                tuner.update_and_allocate(step + 1)

    def _groups(self, tuner: Any, layers: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The adapter's parameters, with what learning rate.

        By a step of B at rate b, with PEFT's start of A, an entry of the output moves by about
        b alpha |k| / sqrt(3 d_in) for an input k; by W it is about |k| times the root mean square of W's entries.
        """
        if "rate" not in self.scaled:
            return [{"params": [p for p in tuner.parameters() if p.requires_grad]}]
        groups = []
        for name, layer in layers.items():
            site = Site(name, layer.get_base_layer())
            root, alpha = (3 * site.shape[1]) ** 0.5, layer.scaling[ADAPTER] * self.rank
            rates = {"lora_A": 1 / root / site.shape[1] ** 0.5, "lora_B": descend.entry(site) * root / alpha}
            groups += [
                {"params": [p], "lr": self.rate * rates.get(n.split(".")[0], 1.0)}
                for n, p in layer.named_parameters()
                if p.requires_grad
            ]
        return groups

    def _irregularity(self, tuner: Any) -> Tensor | float:
        """AdaLoRA's regulariser: how far the factors are from orthogonal."""
        if self.kind == "lora" or not self.orthogonal:
            return 0.0
        grams = [
            p @ p.T if "lora_A" in name else p.T @ p
            for name, p in tuner.named_parameters()
            if p.requires_grad and ("lora_A" in name or "lora_B" in name)
        ]
        apart = [(g - torch.eye(len(g), device=g.device)).norm() for g in grams]
        return self.orthogonal * torch.stack(apart).mean()

    def _adapted(self, lm: LM) -> tuple[Any, dict[str, Any]]:
        """PEFT's tuner, and its layers, which now stand where the chosen modules stood."""
        if any(hasattr(module, "base_layer") for module in lm.model.modules()):
            raise UsageError(f"{lm.name} already has an adapter of PEFT; merge it into the model, or unload it, first")
        names = self._places(lm)
        kind, config = self._config(lm, names)
        tuner = kind(nn.ModuleDict({WITHIN: lm.model}), config, ADAPTER)
        layers = {name: lm.module(name) for name in names}
        for parameter in tuner.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        for layer in layers.values():
            layer.lora_dropout.train()
        return tuner, layers

    def _places(self, lm: LM) -> list[str]:
        """The full names of the modules that are adapted."""
        for layer in self.layers:
            if not 0 <= layer < len(lm.blocks):
                raise UsageError(f"{lm.name} has layers 0 to {len(lm.blocks) - 1}, not {layer}")
        chosen = self.layers or tuple(range(len(lm.blocks)))
        if not self.modules:
            return [lm.mlp_out(layer).name for layer in chosen]
        linear = {
            f"{lm.blocks[layer]}.{name}": module
            for layer in chosen
            for name, module in lm.module(lm.blocks[layer]).named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        found = [name for name in linear if name.endswith(tuple(f".{ending}" for ending in self.modules))]
        if not found:
            there = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UsageError(
                f"{lm.name} has no linear module named {', '.join(self.modules)}; it has {', '.join(there)}"
            )
        return found

    def _config(self, lm: LM, names: list[str]) -> tuple[type, Any]:
        try:
            import peft
        except ImportError as error:
            raise ErrataError("lora needs PEFT, which is not installed; pip install 'errata[peft]'") from error
        given: dict[str, Any] = {
            "target_modules": [f"{WITHIN}.{name}" for name in names],
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "fan_in_fan_out": all(isinstance(lm.module(n), Conv1D) for n in names),
        }
        if self.kind == "lora":
            return peft.LoraModel, peft.LoraConfig(**given, r=self.rank, use_rslora=self.scaled_by_root)
        if self.warm + self.final >= self.steps:
            raise UsageError(
                f"adalora prunes between warm = {self.warm} steps and the last final = {self.final}; "
                f"of {self.steps} steps none are left"
            )
        given |= {"target_r": self.rank, "init_r": math.ceil(1.5 * self.rank), "total_step": self.steps}
        given |= {"tinit": self.warm, "tfinal": self.final, "deltaT": self.every}
        return peft.AdaLoraModel, peft.AdaLoraConfig(**given)


@torch.no_grad()
def _change(layer: Any) -> LowRank | None:
    """What a layer of PEFT adds to the weight beneath it, without the ranks that do nothing."""
    scale, right, left = layer.scaling[ADAPTER], layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    if isinstance(right, Tensor):  # AdaLoRA: three bare factors, and the scale is spread over the ranks that are left
        right = right * layer.lora_E[ADAPTER]
        scale = scale / (layer.ranknum[ADAPTER] + 1e-5)
    else:
        right, left = right.weight, left.weight
    left, right = (left * scale).detach().float().cpu(), right.detach().float().cpu()
    used = (left != 0).any(0) & (right != 0).any(1)
    if not used.any():
        return None
    return LowRank(torch.zeros(int(used.sum()), dtype=torch.long), left[:, used], right[used])
