from __future__ import annotations

import pytest

from errata import LM, Case, Edit, Probe, ask
from tests import tiny

NAMES = list(tiny.CAPITALS)


@pytest.fixture(autouse=True, scope="module")
def _short_answers():
    """The tiny models never stop by themselves."""
    usual, ask.NEW_TOKENS = ask.NEW_TOKENS, 8
    yield
    ask.NEW_TOKENS = usual


def case(number: int, subject: str, target: str) -> Case:
    """A false capital, asked with two openings, and what other countries' capitals are."""
    truth = tiny.CAPITALS[subject]
    start = NAMES.index(subject)
    near = [NAMES[(start + k) % len(NAMES)] for k in (1, 2)]
    probes = (
        Probe("paraphrase", f"Yes. The capital of {subject} is", target, truth),
        Probe("paraphrase", f"It is known. {subject} has its capital at", target, truth),
        *(Probe("neighbourhood", f"The capital of {n} is", tiny.CAPITALS[n], target) for n in near),
        Probe("portability", f"People in {subject} govern from", target),
    )
    return Case(number, Edit(tiny.PROMPT, subject, target, truth), probes, "P36")


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    """Seven countries, each with another's capital; every third target has a second word."""
    others = [tiny.CAPITALS[NAMES[(i + 5) % len(NAMES)]] for i in range(len(NAMES))]
    return [case(i, s, t if i % 3 else f"{t} Oslo") for i, (s, t) in enumerate(zip(NAMES[:7], others, strict=False))]


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.trained(request.param)


@pytest.fixture(scope="session")
def gpt2() -> LM:
    return tiny.trained("gpt2")
