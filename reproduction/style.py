"""One look for all reproduced figures."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes

# Okabe & Ito's palette: told apart by colour-blind readers and in print
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a"


@contextmanager
def figure_style() -> Iterator[None]:
    with matplotlib.rc_context(
        {
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6e6e6",
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.linewidth": 1.8,
            "figure.constrained_layout.use": True,
        }
    ):
        yield


def thousands(axes: Axes) -> None:
    """Iterations in thousands on the horizontal axis."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
