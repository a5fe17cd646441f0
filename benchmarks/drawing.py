"""What tables and figures of several studies have in common."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

# Okabe and Ito's, which the colour-blind tell apart; neighbours differ in marker and dash as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of a series, as arguments of `Axes.plot`."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def new_table(title: str, *headings: str) -> Table:
    """One that fits into 80 columns, whose first column is text and the others are numbers."""
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def show(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A number; None, which was not finite, is a dash."""
    return "—" if value is None else f"{value:.{digits}f}{unit}"


def show_spread(values: Sequence[float | None], digits: int = 2, unit: str = "") -> str:
    """The median (smallest–largest); of values that are None, which come last, how many are not."""
    there = sorted(value for value in values if value is not None)
    if len(there) < len(values):
        middle = median(values)
        told = f"{len(there)} of {len(values)}"
        return told if middle is None else f"{middle:.{digits}f}{unit} ({told})"
    if len(values) == 1:
        return f"{there[0]:.{digits}f}{unit}"
    middle = statistics.median(there)
    return f"{middle:.{digits}f}{unit} ({there[0]:.{digits}f}–{there[-1]:.{digits}f})"


def median(values: Sequence[float | None]) -> float | None:
    """Of values of which None is larger than any number; None if it is in the middle."""
    there = sorted(value for value in values if value is not None)
    middle = (len(values) - 1) // 2, len(values) // 2
    return (there[middle[0]] + there[middle[1]]) / 2 if middle[1] < len(there) else None


def draw_spread(
    axes: Axes, x: Sequence[float], values: Sequence[Sequence[float | None]], index: int, label: str
) -> np.ndarray:
    """A line through the medians of the values at each x, and a band from smallest to largest.

    Returns:
        The medians, NaN where None is in the middle.
    """
    middle = np.array([median(of) for of in values], float)
    of_all = np.array(values, float)  # None becomes NaN
    axes.plot(x, middle, **style(index), markersize=4, label=label)
    band = of_all.min(1), of_all.max(1)
    axes.fill_between(x, *band, color=style(index)["color"], alpha=0.15, linewidth=0)
    return middle


def finish(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """A grid, no box, and labels."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title)
    if x:
        axes.set_xlabel(x)
    if y:
        axes.set_ylabel(y)


def legend(figure: Figure, axes: Axes) -> None:
    """One for all panels, beside them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
