"""Measuring a method: ask the model before and after (`answer`), score (`metrics`), for each regime (`run`), report.

report = errata.bench.run(errata.ROME.preset(lm), lm, errata.data.load("counterfact-mini", n=100))
print(report)

A grid of methods and regimes (`plan`, `grid`) keeps a `journal` and gives `Results`.
"""

from .grid import run_grid
from .plan import Plan
from .report import Report
from .results import Results
from .run import run

__all__ = ["Plan", "Report", "Results", "run", "run_grid"]
