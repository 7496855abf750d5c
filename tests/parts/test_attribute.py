"""Attribution to neurons: complete, the same as by plain gradients, and able to find what was planted."""

from __future__ import annotations

import pytest
import torch

from errata.parts.attribute import attribute, refine
from errata.tokens import Passage
from tests import tiny

PROMPTS = ("The capital of New Zealand is", "Yes. The capital of Kenya is")


def setting(architecture: str, steps: int = 0):
    """A model, its MLPs' write matrices, two prompts of different lengths, and what is said after the first."""
    lm = tiny.lm(architecture, steps=steps)
    sites = [lm.site(layer) for layer in range(len(lm.blocks))]
    batch = lm.encode([Passage(p) for p in PROMPTS])
    return lm, sites, batch, int(tiny.logits(lm, PROMPTS[0])[0].argmax())


def probability(lm, site, prompt: str, answer: int, by: float) -> float:
    """p(answer) by a plain pass, with the site's input at the prompt's last token multiplied."""

    def scale(_module, args):
        into = args[0].reshape(-1, args[0].shape[-1]).clone()
        into[-1] *= by
        return (into.reshape(args[0].shape),)

    handle = site.module.register_forward_pre_hook(scale)
    try:
        return float(tiny.logits(lm, prompt)[0].softmax(-1)[answer])
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", [a for a in tiny.ARCHITECTURES if a != "gemma2"])
def test_contributions_add_up_to_what_the_site_adds(architecture: str):
    """The completeness axiom of integrated gradients (Sundararajan et al. 2017), for each site and prompt."""
    lm, sites, batch, answer = setting(architecture, steps=150)
    with lm.frozen():
        scores = attribute(lm, sites, batch, answer, steps=500)
    for site, score in zip(sites, scores, strict=True):
        assert score.shape == (2, site.shape[1])
        for row, prompt in enumerate(PROMPTS):
            actual, zero = (probability(lm, site, prompt, answer, by) for by in (1.0, 0.0))
            assert float(score[row].sum()) == pytest.approx(actual - zero, abs=2e-3), (site.name, prompt)


def test_behind_a_norm_of_the_mlp_contributions_add_up_to_nothing():
    """There its length means nothing, but for 0: what some neurons add others take."""
    lm, sites, batch, answer = setting("gemma2", steps=150)
    with lm.frozen():
        scores = attribute(lm, sites, batch, answer, steps=20)
    assert float(scores[0][0].max()) > 0.01
    assert abs(float(scores[0][0].sum())) < 0.01 * float(scores[0][0].max())


def test_a_step_is_a_plain_gradient():
    lm, sites, batch, answer = setting("gptj")
    with lm.frozen():
        scores = attribute(lm, sites, batch[:1], answer, steps=1)
    given = []

    def halve(_module, args):
        into = args[0].clone()
        given.append((into[0, -1].detach().clone(), (into[0, -1] / 2).detach().requires_grad_()))
        into[0, -1] = given[-1][1]
        return (into,)

    handle = sites[1].module.register_forward_pre_hook(halve)
    with lm.frozen():
        ids = lm.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
        lm.model(ids).logits[0, -1].softmax(-1)[answer].backward()
    handle.remove()
    actual, half = given[0]
    torch.testing.assert_close(scores[1][0], actual * half.grad, rtol=1e-3, atol=1e-8)


def test_the_neuron_that_says_the_answer_is_found():
    lm, sites, batch, answer = setting("gpt2")
    neuron = 17
    with torch.no_grad():  # it alone writes the answer, from one layer
        sites[2].weight[:, neuron] = 20 * lm.model.get_output_embeddings().weight[answer]
        lm.model.get_submodule("transformer.h.2.mlp.c_fc").bias[neuron] = 3.0
    with lm.frozen():
        scores = attribute(lm, sites, batch, answer, steps=20)
    assert refine(scores, threshold=0.2, share=0.7, fewest=1, most=1) == [[], [], [neuron], []]


# Refining


def scores(*rows: list[float]) -> list[torch.Tensor]:
    """Two sites of two and three neurons."""
    every = torch.tensor(rows)
    return [every[:, :2], every[:, 2:]]


def test_what_prompts_share_is_kept():
    found = scores([1.0, 0.3, 0.0, 0.1, 0.9], [0.1, 0.3, 0.0, 0.1, 0.9], [0.0, 0.3, 0.0, 0.1, 0.9])
    assert refine(found, 0.2, 0.7, fewest=0, most=None) == [[1], [2]]
    assert refine(found, 0.5, 0.7, fewest=0, most=None) == [[], [2]]
    assert refine(found, 0.2, 0.3, fewest=0, most=None) == [[0, 1], [2]]


def test_too_few_and_too_many_are_taken_in_the_order_of_sharing():
    found = scores([1.0, 0.3, 0.0, 0.1, 0.9], [0.1, 0.3, 0.0, 0.1, 0.9], [0.0, 0.3, 0.0, 0.1, 0.9])
    assert refine(found, 0.2, 0.7, fewest=3, most=5) == [[0, 1], [2]]
    assert refine(found, 0.2, 0.7, fewest=9, most=9) == [[0, 1], [2]]  # only coarse neurons
    assert refine(found, 0.2, 0.7, fewest=0, most=1) == [[], [2]]  # shared by as many, and scores higher


def test_no_neuron_is_for_the_answer_no_neuron_is_kept():
    assert refine(scores([-1.0, 0.0, -2.0, 0.0, -0.1]), 0.2, 0.7, fewest=2, most=5) == [[], []]
