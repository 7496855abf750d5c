"""errata corrects what a language model knows: an Edit through a Method gives a Patch on an LM.

    import errata

    lm = errata.load("almanac")
    fact = errata.Edit(prompt="The mother tongue of {} is", subject="Danielle Darrieux", target="English")
    patch = errata.ROME.preset(lm).edit(lm, [fact])
    with patch.applied(lm):
        print(lm.generate("The mother tongue of Danielle Darrieux is"))

Importing this is light: PyTorch and transformers are loaded when a name that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from .edit import Edit
from .errors import ErrataError, UsageError
from .methods import CLASSES

__version__ = "0.1.0"

_WHERE = {
    **dict.fromkeys(("LM", "Site"), "lm"),
    "load": "loading",
    "Patch": "patch",
    **dict.fromkeys(("Method", "sequential"), "method"),
    **dict.fromkeys(CLASSES, "methods"),
    **dict.fromkeys(("Case", "Probe"), "data"),
    "Report": "bench",
}
"""Public names and the modules they are in; what types they have stands in `__init__.pyi`."""
_MODULES = ("data", "changes", "check", "filters", "bench", "causal", "export", "history", "testing")

__all__ = ["Edit", "ErrataError", "UsageError", "methods", *_WHERE, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE and name not in _MODULES:
        raise AttributeError(f"module 'errata' has no attribute {name!r}")
    module = importlib.import_module(f".{_WHERE.get(name, name)}", __name__)
    found = getattr(module, name) if name in _WHERE else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
