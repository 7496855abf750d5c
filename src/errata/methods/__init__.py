"""One file per paper, imported when its method is first asked for."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..method import Method

FILES = {
    "rome": "rome:ROME",
    "r-rome": "r_rome:RROME",
    "memit": "memit:MEMIT",
    "emmet": "emmet:EMMET",
    "pmet": "pmet:PMET",
    "alphaedit": "alphaedit:AlphaEdit",
    "rect": "rect:RECT",
    "prune": "prune:PRUNE",
    "ultraedit": "ultraedit:UltraEdit",
    "kn": "kn:KN",
    "ft": "ft:FT",
    "ft-m": "ft:FTM",
    "ft-l": "ft:FTL",
    "lora": "lora:LoRA",
    "grace": "grace:GRACE",
    "melo": "melo:MELO",
    "wise": "wise:WISE",
    "serac": "serac:SERAC",
    "ike": "ike:IKE",
    "ice": "ike:ICE",
    "retrieval": "ike:Retrieval",
    "ke": "ke:KE",
    "mend": "mend:MEND",
    "malmen": "malmen:MALMEN",
    "rledit": "rledit:RLEdit",
}
"""Every method's name in the shell, with its file and class."""

CLASSES = {where.partition(":")[2]: where.partition(":")[0] for where in FILES.values()}
"""Every method's class, with its file."""


def __getattr__(name: str) -> Any:
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{CLASSES[name]}", __name__), name)


class _Registry(ModuleType):
    """`errata.methods` is this package and, called, the registry: Python puts a package over a function of its name."""

    def __call__(self) -> "dict[str, type[Method]]":
        from ..method import methods

        return methods()


sys.modules[__name__].__class__ = _Registry
