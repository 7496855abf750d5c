from __future__ import annotations

import gc
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a network


import pytest
import torch
from hypothesis import HealthCheck, settings

import errata
from errata import LM, presets, pretrained
from tests import tiny

torch.set_num_threads(1)  # on tiny models, more threads are slower

# No test is timed: neither an example, nor how long the first ones take to draw (hypothesis tabulates Unicode then).
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


FETCHED = pretrained.folder("").absolute()
"""Where `errata models` puts them, in the user's own store."""


@pytest.fixture(autouse=True)
def _nobody_warned():
    """What a process says once, every test may hear."""
    presets._warned.clear()


@pytest.fixture
def interruptible():
    """SIGINT arrives: a process in the background ignores it, and one that comes while garbage is collected is lost in
    what hypothesis does then."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(autouse=True, scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory):
    """What is computed in tests is kept out of the user's store; fetched models are found there."""
    store = tmp_path_factory.mktemp("store")
    os.environ["ERRATA_STORE"] = str(store)
    if FETCHED.is_dir():
        (store / "models").symlink_to(FETCHED)


def _fetched(name: str) -> LM:
    if not (FETCHED / name).is_dir():
        pytest.skip(f"needs a real model: errata models {name}")
    return errata.load(name, device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> LM:
    """SmolLM2-135M-Instruct, shared by all tests: leave it as it was."""
    return _fetched("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> LM:
    """Gemma 3 270M, likewise."""
    return _fetched("gemma-3-270m")


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny models' own text, for methods that need a second moment."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(tiny.corpus()))
    return str(path)
