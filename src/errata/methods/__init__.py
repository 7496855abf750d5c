"""One file per paper. Importing this registers them all."""

from .ft import FT, FTL, FTM
from .grace import GRACE
from .r_rome import RROME
from .rome import ROME

__all__ = ["FT", "FTL", "FTM", "GRACE", "ROME", "RROME"]
