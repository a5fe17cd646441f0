"""What the panels of several pictures have in common."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rate_grid import RateGrid

Style = tuple[str, str, str]
"""Colour, dash and marker."""


def draw_band(
    axes: Axes, x: Sequence[Sequence[float]], losses: np.ndarray, style: Style, title: str
) -> None:
    """The mean over runs, the rows of `x` and `losses`, in a band of smallest to largest."""
    colour, dash, marker = style
    x_mean = np.mean(x, axis=0)
    axes.plot(x_mean, losses.mean(0), dash, color=colour, marker=marker, markersize=4, label=title)
    if len(losses) > 1:
        axes.fill_between(
            x_mean, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0
        )


def draw_grid(axes: Axes, grid: RateGrid, style: Style, title: str) -> None:
    """Validation loss by learning rate, the best of which has the large marker."""
    colour, dash, marker = style
    losses = finite(grid.validation_losses)
    axes.plot(
        *(grid.learning_rates, losses, dash),
        color=colour,
        marker=marker,
        markersize=4,
        label=title,
    )
    axes.plot(grid.best_rate, losses[grid.best], marker, color=colour, markersize=10)


def finish_rates(axes: Axes, learning_rates: Sequence[float]) -> None:
    """An axis of learning rates."""
    axes.set_xscale("log")
    axes.set_xticks(learning_rates, [f"{rate:g}" for rate in learning_rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate of the matrices")
    finish(axes)


def finite(losses: Sequence[Sequence[float]] | Sequence[float]) -> np.ndarray:
    """Diverged runs leave a gap."""
    values = np.array(losses, float)
    return np.where(np.isfinite(values), values, np.nan)


def legend(figure: Figure, axes: Axes) -> None:
    """One for all panels, beside them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")


def finish(axes: Axes) -> None:
    """A grid, and no box."""
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
