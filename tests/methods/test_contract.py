"""What every method promises (`errata.testing`), on every kind of architecture.

A method is found here by being registered. One that needs other settings on a tiny model says so in `small_settings`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest

import errata
from errata import Edit, Method, testing
from errata.testing import Made, Promise
from tests import tiny

FACTS = (*tiny.EDITS[:2], Edit(tiny.PROMPT, "Japan", "Paris"))
"""The third by a single token, so that it takes in few steps on every processor's tiny models."""


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=errata.methods().values(), ids=lambda m: m.name)
def made(request: pytest.FixtureRequest, architecture: str, corpus_file: str) -> Made:
    lm = tiny.trained(architecture)
    return Made.of(tiny.small_settings(request.param, lm, corpus_file), lm, FACTS)


@pytest.fixture(autouse=True)
def _as_it_was(made: Made) -> Iterator[None]:
    """Whatever a test below does to the model (pitfalls 6 and 9)."""
    yield
    made.comes_back()


@pytest.mark.parametrize("promise", testing.PROMISES, ids=lambda p: p.__name__)
def test_a_promise_is_kept(promise: Promise, made: Made):
    if reason := promise(made):
        pytest.skip(reason)


def test_nothing_of_another_model_has_a_part_in_an_edit(made: Made):
    """Pitfall 7."""
    other = tiny.lm("gpt2" if made.lm.config.model_type != "gpt2" else "opt", seed=1)
    with suppress(errata.ErrataError):  # an editor that was trained for this model is refused there
        dataclasses.replace(made.method, seed=7).prepare(other)
    assert testing.same(made.method.edit(made.anew(), [FACTS[0]]), made.patch)


def test_nothing_of_an_edit_stays_in_a_module(made: Made):
    """Pitfall 7: what is computed of a model is kept with it, and nowhere else."""
    before = module_state()
    made.method.edit(made.anew(), [FACTS[0]])
    after = module_state()
    assert {k: after[k] for k in before} == before


def module_state() -> dict[str, Any]:
    """Every variable of errata's modules and of their classes: which object it is, and of how many parts."""
    modules = [m for n, m in sorted(sys.modules.items()) if n.partition(".")[0] == "errata"]
    spaces = {m.__name__: vars(m) for m in modules}
    for name, variables in list(spaces.items()):
        spaces |= {f"{name}.{k}": vars(v) for k, v in variables.items() if isinstance(v, type)}
    return {
        f"{space}.{name}": (id(value), len(value) if isinstance(value, dict | list | set) else None)
        for space, variables in spaces.items()
        for name, value in variables.items()
        if not (name.startswith(("__", "_abc")) or isinstance(value, ModuleType))
    }


def test_edits_of_prompts_of_several_lengths_share_passes(made: Made):
    """Pitfalls 2 and 6: padded together."""
    longer = Edit("Today we learn. People in {} govern from", "New Zealand", "Cairo")
    several = dataclasses.replace(made, edits=(FACTS[0], longer, FACTS[1]))
    testing.edits_in_shared_passes_are_those_made_alone(several)


def test_the_settings_of_every_listed_model_can_be_made(made: Made):
    """Pitfall 14: a default that can't run."""
    for name in errata.presets._tables()["models"]:
        if name != "almanac" or type(made.method).name in errata.presets._tables()["models"][name]:
            assert isinstance(type(made.method).preset(name), Method)
