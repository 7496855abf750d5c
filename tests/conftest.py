from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a network

import pytest
import torch

from tests import tiny

torch.set_num_threads(1)  # on tiny models, more threads are slower


@pytest.fixture(autouse=True, scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory):
    """What is computed in tests is kept out of the user's store."""
    os.environ["ERRATA_STORE"] = str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny models' own text, for methods that need a second moment."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(tiny.corpus()))
    return str(path)
