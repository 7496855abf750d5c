"""The kinds of change a patch is made of, one file a kind.

`LowRank` and `Dense` add to a weight; `Codebook` (GRACE) answers beside it. All tensors of a change are stored in
float32, whatever the model computes in.
"""

from .change import Change, Undo, joined, kind_of
from .codebook import Codebook
from .weights import Dense, LowRank, attach_rows

__all__ = ["Change", "Codebook", "Dense", "LowRank", "Undo", "attach_rows", "joined", "kind_of"]
