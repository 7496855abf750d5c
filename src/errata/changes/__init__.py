"""The kinds of change a patch is made of, one file a kind.

`LowRank` and `Dense` add to a weight; `Codebook` (GRACE) answers in its place near a key; `Blocks` (MELO) and
`SideMemories` (WISE) add to its output where a router lets them; `Context` (IKE) puts text before a prompt and
`Deferral` (SERAC) lets another model answer it, both under the name `WHOLE`, as they are of no module. Numbers are
stored in float32, whatever the model computes in.
"""

from .change import Change, Undo, joined, kind_of
from .codebook import Codebook
from .context import Context
from .deferral import Deferral
from .gated import Blocks, Gated, SideMemories, ties
from .remembered import WHOLE, Remembered
from .weights import Dense, LowRank, attach_rows, share, total

__all__ = [
    "WHOLE",
    "Blocks",
    "Change",
    "Codebook",
    "Context",
    "Deferral",
    "Dense",
    "Gated",
    "LowRank",
    "Remembered",
    "SideMemories",
    "Undo",
    "attach_rows",
    "joined",
    "kind_of",
    "share",
    "ties",
    "total",
]
