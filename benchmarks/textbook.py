"""ROME as a textbook has it, written for comparison: full passes over every token, one edit at a time, and evaluation
by patching the weight, asking, and undoing.

It shares with errata the settings, the tokens, the contexts and the factor of C, so that both do the same edit; nothing
of replay, of batches over edits, of the head at read positions only, or of answers of many models in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from errata import LM, ROME, Case, Edit
from errata.ask import NEW_TOKENS
from errata.parts import contexts, moments
from errata.tokens import Tokens, follow, pad_left, passage


def edit(lm: LM, rome: ROME, fact: Edit) -> tuple[Tensor, Tensor]:
    """The update of one fact: left (d_out,) and right (d_in,)."""
    site, templates = lm.site(rome.layer), contexts.sample(lm, rome.lengths, rome.seed)
    k_star = _at_subject(lm, site.module, lm.encode([passage(fact, c) for c in templates]))[0].mean(0)
    v_star = _target(lm, site.module, rome, fact, templates)
    k, v = (t[0] for t in _at_subject(lm, site.module, lm.encode([passage(fact)])))
    u = k_star.double()[:, None]
    if rome.whiten:
        u = torch.cholesky_solve(u, moments.cholesky(lm, site, rome.corpus).to(u.device))
    u = u[:, 0] / u.norm()
    return ((v_star - v).double() / (k.double() @ u)).float(), u.float()


def answers(lm: LM, cases: Sequence[Case], rome: ROME) -> list[list[str]]:
    """Every case edited by itself: what the model says to its probes before and after, each case in one batch."""
    out = []
    for case in cases:
        _ask(lm, case)
        left, right = edit(lm, rome, case.edit)
        with _patched(lm.site(rome.layer).weight, torch.outer(left, right)):
            out.append(_ask(lm, case))
    return out


@torch.no_grad()
def _at_subject(lm: LM, module: Any, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """What goes into and comes out of a module at the subjects, from one full pass."""
    seen: list[Tensor] = []
    rows = torch.arange(len(tokens), device=lm.device)

    def see(_module: Any, args: Any, output: Tensor) -> None:
        seen.extend(t.view(len(tokens), -1, t.shape[-1])[rows, tokens.subject].float() for t in (args[0], output))

    with _hooked(module, see):
        lm.model(**tokens.inputs)
    return seen[0], seen[1]


def _target(lm: LM, module: Any, rome: ROME, fact: Edit, templates: Sequence[str]) -> Tensor:
    """v*, by Adam on a delta that is added in full passes (ROME, eq. 4)."""
    is_a = Edit("{} is a", fact.subject, fact.target)
    tokens = lm.encode([*(passage(fact, c, fact.target) for c in templates), passage(is_a)])
    rows = torch.arange(len(tokens), device=lm.device)
    delta = torch.zeros(lm.d_model, device=lm.device, requires_grad=True)
    before: list[Tensor] = []

    def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        before.append(output.detach()[0, tokens.subject[0]].float())
        output[rows, tokens.subject] += delta.to(output.dtype)
        return output

    end = tokens.last if rome.kl_at == "end" else tokens.subject
    at, cols = tokens.reads
    share = 1 / (tokens.target.sum(1)[at] * len(templates))
    optimiser, first = torch.optim.Adam([delta], lr=rome.rate), None
    for step in range(rome.steps):
        with _hooked(module, add):
            said = lm.model(**tokens.inputs).logits.float().log_softmax(-1)
        nll = -(said[at, cols].gather(1, tokens.wanted[:, None])[:, 0] * share).sum()
        now, v = said[-1, end[-1]], before[0]
        first = now.detach() if first is None else first
        kl = torch.nn.functional.kl_div(first, now, log_target=True, reduction="sum")
        loss = nll + rome.kl * kl + rome.decay * delta.norm() / v.norm() ** 2
        if loss < rome.stop or step == rome.steps - 1:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            delta *= (rome.clamp * v.norm() / delta.norm()).clamp(max=1)
    return before[0] + delta.detach()


@torch.no_grad()
def _ask(lm: LM, case: Case) -> list[str]:
    """Teacher-forced logits of every answer and of every other answer, and what is said greedily."""
    given = [follow(p.prompt, a) for p in case.probes for a in (p.answer, p.other) if a]
    lm.model(**lm.encode(given).inputs).logits.float().log_softmax(-1)
    inputs = pad_left(lm.tokenizer, [p.prompt for p in case.probes], lm.device)
    out = lm.continued(inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return lm.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def _patched(weight: Tensor, delta: Tensor) -> Iterator[None]:
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += delta.to(weight.dtype)
    yield
    with torch.no_grad():
        weight.copy_(kept)


@contextmanager
def _hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    yield
    handle.remove()
