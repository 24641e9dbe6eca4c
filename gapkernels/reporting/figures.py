"""Figures that are small enough to be read on a phone, and never tell things apart by colour alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, made to be told apart with every common form of colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
WIDTH, DPI = 5.2, 150  # inches, and pixels of one


@dataclass(frozen=True)
class Plot:
    """A finished figure.

    Args:
        section: heading it belongs under.
        name: file name without suffix.
        caption: what it shows.
        png: the image.
    """

    section: str
    name: str
    caption: str
    png: bytes


@contextmanager
def plain_text() -> Iterator[None]:
    """Draw names as they are for as long as the block lasts: to matplotlib a dollar sign begins a formula."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, "text.usetex": False}):
        yield


def new_figure(height: float = 3.9) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, `height` inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def finish(figure: Figure, section: str, name: str, caption: str) -> Plot:
    """Draw a figure."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        # A sign that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return Plot(section, name, caption, buffer.getvalue())


def write_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write figures as PNG files into a folder, and return their paths."""
    if plots:
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{plot.name}.png" for plot in plots]
    for path, plot in zip(paths, plots, strict=True):
        path.write_bytes(plot.png)
    return paths
