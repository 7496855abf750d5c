"""Draw docs/demo.svg, the picture in the README: what `errata demo` prints, as it prints it.

python training/draw_demo.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from errata.cli import app, shell

PICTURE = Path(__file__).parent.parent / "docs" / "demo.svg"


def draw() -> int:
    shell.out = Console(record=True, width=112, highlight=False, force_terminal=True, color_system="truecolor")
    code = shell.run(app, ["demo", "--n", "8"])
    if code == 0:
        shell.out.save_svg(str(PICTURE), title="errata demo --n 8")
    return code


if __name__ == "__main__":
    sys.exit(draw())
