"""Maps of effects by row and layer: as a table in the terminal, a figure, or plain values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .. import store
from ..errors import ErrataError, UsageError
from .restoring import Kind


class Map(ABC):
    """Indirect effects by row and layer, as a table in the terminal, a figure, or plain values."""

    @property
    @abstractmethod
    def effects(self) -> Mapping[Kind, Tensor]:
        """{kind: (rows, layers)} what p(answer) gains."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[str]:
        """A name for every row."""

    @property
    @abstractmethod
    def heading(self) -> str:
        """What was traced, in one line."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""

    @property
    def scale(self) -> float:
        """The largest effect: the darkest colour, the same for every kind."""
        return max(1e-9, *(float(e.max()) for e in self.effects.values()))

    def table(self) -> Group:
        """The map in colours (in shades, where there are none), for `rich.print`."""
        parts: list[Any] = [Text(self.heading), Text(f"darkest: p(answer) +{self.scale:.3f}", style="dim")]
        for kind, effects in self.effects.items():
            grid = Table.grid(padding=(0, 1))
            grid.add_row(Text(kind, style="bold", justify="right"), _ruler(effects.shape[1]))
            for label, row in zip(self.labels, (effects / self.scale).tolist(), strict=True):
                grid.add_row(Text(label, justify="right"), _heat(row, kind))
            parts += [Text(), grid]
        return Group(*parts)

    def plot(self, path: str | Path) -> None:
        """Write the map as a PNG, SVG or PDF figure, one panel for each kind.

        Raises:
            UsageError: another kind of file.
            ErrataError: matplotlib is missing.
        """
        check_drawable(path)
        content = BytesIO()
        self._figure().savefig(content, format=Path(path).suffix[1:].lower(), dpi=150)
        store.write(path, content.getvalue())

    def _figure(self) -> Any:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ErrataError(
                "figures are drawn by matplotlib, which is missing: pip install 'errata[plot]'"
            ) from error
        panels, rows = self.effects, len(self.labels)
        figure = Figure(figsize=(2 + 3.2 * len(panels), 1.4 + 0.24 * rows), layout="constrained")
        for axes, (kind, effects) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            shown = axes.imshow(effects.numpy(), cmap=_COLOURS[kind][0], vmin=0, vmax=self.scale, aspect="auto")
            axes.set_title(kind)
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_yticks(range(rows), [_plain(label) for label in self.labels])
            axes.label_outer()
            figure.colorbar(shown, ax=axes, label="p(answer) gained")
        figure.suptitle(_plain(self.heading), fontsize="medium")
        return figure


_COLOURS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "hidden": ("Purples", (84, 39, 143)),
    "mlp": ("Greens", (0, 109, 44)),
    "attention": ("Reds", (165, 15, 21)),
}
"""For each kind a colour map of matplotlib, and its darkest colour for the terminal."""
_SHADES = " ·░▒▓█"


def _heat(row: Sequence[float], kind: str) -> Text:
    """Values between 0 and 1 as cells, two columns wide; a shade in each says the same where there are no colours."""
    out = Text()
    for value in row:
        share = min(1.0, max(0.0, value))
        colour = ",".join(str(round(255 - share * (255 - dark))) for dark in _COLOURS[kind][1])
        out.append(_SHADES[round(share * (len(_SHADES) - 1))] * 2, f"rgb({colour}) on rgb({colour})")
    return out


def _ruler(layers: int) -> Text:
    """Numbers over the cells of every fourth layer."""
    return Text("".join(f"{layer:<8}" for layer in range(0, layers, 4))[: 2 * layers + 1].rstrip(), style="dim")


def check_drawable(path: str | Path) -> None:
    """Find out before the long work whether a figure can be drawn.

    Raises:
        UsageError: the name is of another kind of file.
        ErrataError: matplotlib is missing.
    """
    if Path(path).suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise UsageError(f"{str(path)!r} is no figure; give a name that ends in .png, .svg or .pdf")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ErrataError("figures are drawn by matplotlib, which is missing: pip install 'errata[plot]'") from error


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
