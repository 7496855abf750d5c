"""Rows of published data sets as cases: an edit and the questions that judge it. Nothing here knows a model.

`table` reads files as rows, `read` finds a data set (`hub` those that are elsewhere) and tells its format; a small file
for each format turns a row into a `Case`: `counterfact`, `zsre`, `knowedit`, `ripple`, `mquake`, `long` (UnKE, AKEW),
`qaedit`, and `own` for a user's own. `corrections` reads a list of corrections, which needs no questions.
"""

from .case import Case, Probe
from .corrections import Correction, corrections
from .read import Loaded, load, loaded

__all__ = ["Case", "Correction", "Loaded", "Probe", "corrections", "load", "loaded"]
