"""One file per paper. Importing this registers them all."""

import sys
from types import ModuleType

from ..method import Method
from ..method import methods as _registered
from .alphaedit import AlphaEdit
from .emmet import EMMET
from .ft import FT, FTL, FTM
from .grace import GRACE
from .ike import ICE, IKE, Retrieval
from .ke import KE
from .kn import KN
from .lora import LoRA
from .malmen import MALMEN
from .melo import MELO
from .memit import MEMIT
from .mend import MEND
from .pmet import PMET
from .r_rome import RROME
from .rledit import RLEdit
from .rome import ROME
from .serac import SERAC
from .ultraedit import UltraEdit
from .wise import WISE

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
    "LoRA",
    "MELO",
    "WISE",
    "MALMEN",
    "MEMIT",
    "MEND",
    "PMET",
    "ROME",
    "RROME",
    "SERAC",
    "AlphaEdit",
    "Retrieval",
    "RLEdit",
    "UltraEdit",
]


class _Registry(ModuleType):
    """`errata.methods` is this package and, called, the registry: Python puts a package over a function of its name."""

    def __call__(self) -> dict[str, type[Method]]:
        return _registered()


sys.modules[__name__].__class__ = _Registry
