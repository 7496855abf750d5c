"""The kinds of change a patch is made of, one file a kind.

`LowRank` and `Dense` add to a weight; `Codebook` (GRACE) answers in its place near a key, `Blocks` (MELO) add to its
output there; `Context` (IKE) puts text before a prompt, under the name `WHOLE`, as it is of no module.
Numbers are stored in float32, whatever the model computes in.
"""

from .change import Change, Undo, joined, kind_of
from .codebook import Codebook
from .context import Context
from .gated import Blocks, Gated
from .remembered import WHOLE, Remembered
from .weights import Dense, LowRank, attach_rows

__all__ = [
    "WHOLE",
    "Blocks",
    "Change",
    "Codebook",
    "Context",
    "Dense",
    "Gated",
    "LowRank",
    "Remembered",
    "Undo",
    "attach_rows",
    "joined",
    "kind_of",
]
