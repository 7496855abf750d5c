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
from typing import TYPE_CHECKING, Any

from .edit import Edit
from .errors import ErrataError, UsageError

if TYPE_CHECKING:
    from . import bench, causal, changes, data, export, history
    from .bench import Report
    from .data import Case, Probe
    from .lm import LM, Site, load
    from .method import Method, methods, sequential
    from .methods import (
        EMMET,
        FT,
        FTL,
        FTM,
        GRACE,
        ICE,
        IKE,
        KE,
        KN,
        MALMEN,
        MEMIT,
        WISE,
        MEND,
        MELO,
        LoRA,
        PMET,
        ROME,
        RROME,
        SERAC,
        AlphaEdit,
        Retrieval,
        RLEdit,
        UltraEdit,
    )
    from .patch import Patch

__version__ = "0.1.0"

# What a newcomer meets, in that order: name -> the module it is in ("" for the module itself).
_WHERE = {
    "load": "lm",
    "LM": "lm",
    "Site": "lm",
    "Patch": "patch",
    "Method": "method",
    "methods": "method",
    "sequential": "method",
    **dict.fromkeys(("ROME", "RROME", "MEMIT", "EMMET", "PMET", "AlphaEdit", "KN"), "methods"),
    **dict.fromkeys(("FT", "FTL", "FTM", "GRACE", "WISE", "UltraEdit", "MEND", "MALMEN", "KE"), "methods"),
    **dict.fromkeys(("MELO", "LoRA", "RLEdit"), "methods"),
    **dict.fromkeys(("IKE", "ICE", "Retrieval", "SERAC"), "methods"),
    "Case": "data",
    "Probe": "data",
    "Report": "bench",
    "data": "",
    "changes": "",
    "bench": "",
    "causal": "",
    "export": "",
    "history": "",
}

__all__ = [
    "EMMET",
    "FT",
    "FTL",
    "FTM",
    "GRACE",
    "ICE",
    "IKE",
    "KE",
    "KN",
    "LM",
    "MALMEN",
    "MEMIT",
    "WISE",
    "MEND",
    "MELO",
    "LoRA",
    "PMET",
    "ROME",
    "RROME",
    "SERAC",
    "AlphaEdit",
    "Case",
    "Edit",
    "ErrataError",
    "Method",
    "Patch",
    "Probe",
    "Report",
    "Retrieval",
    "RLEdit",
    "Site",
    "UltraEdit",
    "UsageError",
    "bench",
    "causal",
    "changes",
    "data",
    "export",
    "history",
    "load",
    "methods",
    "sequential",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'errata' has no attribute {name!r}")
    module = importlib.import_module(f".{_WHERE[name] or name}", __name__)
    found = getattr(module, name) if _WHERE[name] else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
