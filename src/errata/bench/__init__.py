"""Measuring a method: ask the model before and after (`answer`), score (`metrics`), for each regime (`run`), report.

report = errata.bench.run(errata.ROME.preset(lm), lm, errata.data.load("counterfact-mini", n=100))
print(report)
"""

from .report import Report
from .run import run

__all__ = ["Report", "run"]
