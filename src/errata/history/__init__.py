"""Corrections as history: a folder of patches, what in it gets in each other's way, and two of them side by side."""

from .compare import diff, effect
from .conflicts import OVERLAP, Conflict, conflicts
from .folder import LOCK, MANIFEST, Entry, History

__all__ = ["LOCK", "MANIFEST", "OVERLAP", "Conflict", "Entry", "History", "conflicts", "diff", "effect"]
