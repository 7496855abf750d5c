"""Pitfall 13: importing is light and changes nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, logging, os, random, sys, warnings
def state():
    root = logging.getLogger()
    return [random.getstate(), dict(os.environ), root.level, [str(h) for h in root.handlers], warnings.filters[:]]
before = state()
import errata
loaded = [m for m in ("torch", "transformers", "safetensors", "numpy") if m in sys.modules]
light = state() == before
import torch
def settings():
    return torch.initial_seed(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
kept, draws = settings(), torch.get_rng_state()
import transformers
after_transformers = [*state()[2:4], transformers.logging.get_verbosity()]
errata.methods(), errata.load, errata.Patch
print(json.dumps({
    "loaded": loaded,
    "light": light,
    "torch": torch.equal(torch.get_rng_state(), draws) and settings() == kept,
    "logging": [*state()[2:4], transformers.logging.get_verbosity()] == after_transformers,
    "cuda": "CUDA_LAUNCH_BLOCKING" in os.environ,
    "all": [n for n in errata.__all__ if not hasattr(errata, n)],
}))
"""


def test_importing_loads_nothing_heavy_and_changes_no_global_state():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "loaded": [],
        "light": True,
        "torch": True,
        "logging": True,
        "cuda": False,
        "all": [],
    }


def test_a_name_that_is_not_there_is_an_attribute_error():
    import errata

    assert not hasattr(errata, "nowhere")
    assert set(errata.__all__) <= set(dir(errata))


def test_what_type_checkers_and_a_user_see_are_the_public_names():
    import errata

    stub = ast.parse(Path(errata.__file__).with_suffix(".pyi").read_text())
    named = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert named == set(errata.__all__) == set(dir(errata))
