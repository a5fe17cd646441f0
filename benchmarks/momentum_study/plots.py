"""Pictures of the study."""

import math

import numpy as np
from matplotlib.figure import Figure

from momentum_study.contest import Contest
from momentum_study.methods import METHODS, REFERENCE, TITLES, MethodName
from momentum_study.outcomes import AXES, Axis
from momentum_study.settings import Settings
from panels import Style, draw_band, draw_grid, finish, finish_rates, finite, legend

# Okabe and Ito's colours, which colour-blind readers can tell apart; dashes and markers as well.
STYLES: dict[MethodName, Style] = {
    "ema": ("#000000", "-", "o"),
    "mvr1": ("#D55E00", "-", "s"),
    "mvr2": ("#0072B2", "-", "^"),
    "mvr3": ("#009E73", "-", "v"),
    "mars": ("#CC79A7", "-.", "D"),
    "ema_twice_the_steps": ("#777777", "--", "x"),
    "ema_twice_the_batch": ("#E69F00", ":", "P"),
}
assert tuple(STYLES) == METHODS
LABELS: dict[Axis, str] = {
    "steps": "steps",
    "evaluations": "gradients of one batch",
    "seconds": "training seconds",
}


def figures(settings: Settings, contest: Contest) -> dict[str, Figure]:
    """All pictures, by the name of their file."""
    curves = {f"momentum_batch_{b}": _curves(settings, contest, b) for b in settings.batch_sizes}
    return curves | {"learning_rates": _learning_rates(settings, contest)}


def _curves(settings: Settings, contest: Contest, batch_size: int) -> Figure:
    """Test loss, the mean over seeds in a band of smallest to largest, by what it took."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    highest, lowest = -math.inf, math.inf
    for method in settings.methods:
        runs = [r for r in contest.runs if (r.method, r.batch_size) == (method, batch_size)]
        losses = finite([run.test_loss for run in runs])
        for axes, axis in zip(panels, AXES, strict=True):
            spent = [getattr(run, axis) for run in runs]
            draw_band(axes, spent, losses, STYLES[method], TITLES[method])
        mean = losses.mean(0)
        lowest = min(lowest, *losses[np.isfinite(losses)], math.inf)
        # Show where the methods differ, not the descent of the first evaluations.
        if method == REFERENCE and np.isfinite(mean).all():
            highest = max(highest, mean[len(mean) // 4])
    if math.isfinite(highest) and lowest < highest:
        margin = 0.05 * (highest - lowest)
        panels[0].set_ylim(lowest - margin, highest + margin)
    for axes, axis in zip(panels, AXES, strict=True):
        axes.set_xlabel(LABELS[axis])
        finish(axes)
    panels[0].set_ylabel("test loss (nats a character)")
    seeds = f"mean and range of {len(settings.seeds)} seeds, each method at its best rate"
    figure.suptitle(f"Transformer on characters, batch {batch_size}: {seeds}")
    legend(figure, panels[0])
    return figure


def _learning_rates(settings: Settings, contest: Contest) -> Figure:
    """Validation loss of the tuned runs; the best rate of each method is filled."""
    sizes = settings.batch_sizes
    figure = Figure(figsize=(4 + 4.5 * len(sizes), 4.5), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axes, batch_size in zip(panels, sizes, strict=True):
        for grid in contest.grids:
            if grid.batch_size == batch_size:
                draw_grid(axes, grid, STYLES[grid.method], TITLES[grid.method])
        axes.set_title(f"batch {batch_size}")
        finish_rates(axes, settings.learning_rates)
    panels[0].set_ylabel("validation loss (nats a character)")
    figure.suptitle("Tuning, one seed; the large marker is the best rate")
    legend(figure, panels[0])
    return figure
