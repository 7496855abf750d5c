"""Rows of published data sets as cases: an edit and the questions that judge it. Nothing here knows a model.

`load` finds the rows; one small file for each format (`counterfact`, `zsre`, `knowedit`) turns a row into a `Case`.
"""

from .case import Case, Probe
from .read import load

__all__ = ["Case", "Probe", "load"]
