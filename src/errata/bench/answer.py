"""The old name of `errata.ask`."""

from ..ask import Answer, Asking, Spoken, ask, ask_cases, ended, stopped, tolerant

__all__ = ["Answer", "Asking", "Spoken", "ask", "ask_cases", "ended", "stopped", "tolerant"]
