"""Rows of published data sets as cases: an edit and the questions that judge it. Nothing here knows a model.

`load` finds the rows (`hub` those that are elsewhere); a small file for each format turns a row into a `Case`:
`counterfact`, `zsre`, `knowedit`, `ripple`, `mquake`, `long` (UnKE, AKEW), `qaedit`, and `own` for a user's own.
"""

from .case import Case, Probe
from .read import load

__all__ = ["Case", "Probe", "load"]
