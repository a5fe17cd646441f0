"""Pictures of the race."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from language.contest import Contest
from language.methods import METHODS, REFERENCE, TITLES, MethodName
from language.outcomes import AXES, Axis, Outcome
from language.settings import Settings, count_seeds
from panels import Style, draw_band, draw_grid, finish, finish_rates, finite, legend

# Okabe and Ito's colours, which colour-blind readers can tell apart; dashes and markers as well.
STYLES: dict[MethodName, Style] = {
    "muon": ("#000000", "-", "o"),
    "muon_short": ("#CC79A7", "--", "D"),
    "optax_muon": ("#777777", ":", "x"),
    "drop_muon_uniform": ("#D55E00", "-", "s"),
    "drop_muon_epoch_shift": ("#0072B2", "-", "^"),
    "drop_muon_time_aware": ("#56B4E9", "-", "*"),
    "drop_muon_half": ("#009E73", "-", "P"),
    "drop_muon_long": ("#E69F00", "-.", "v"),
}
assert tuple(STYLES) == METHODS
LABELS: dict[Axis, str] = {"steps": "steps", "seconds": "training seconds"}
BLOCKS = {"validation_loss": "validation loss", "test_loss": "test loss"}


def figures(settings: Settings, contest: Contest, outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """All pictures, by the name of their file."""
    return {
        "language_race": _curves(settings, outcomes),
        "speed_up": _speed_up(settings, outcomes),
        "learning_rates": _learning_rates(settings, contest),
    }


def _curves(settings: Settings, outcomes: Sequence[Outcome]) -> Figure:
    """Losses, the mean over seeds in a band of smallest to largest, by steps and by seconds."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    panels = figure.subplots(len(BLOCKS), len(AXES), sharex="col", sharey=True)
    highest, lowest = -math.inf, math.inf
    for row, (name, label) in zip(panels, BLOCKS.items(), strict=True):
        for outcome in outcomes:
            losses = finite([getattr(run, name) for run in outcome.runs])
            for axes, axis in zip(row, AXES, strict=True):
                spent = [getattr(run, axis) for run in outcome.runs]
                draw_band(axes, spent, losses, STYLES[outcome.method], TITLES[outcome.method])
            mean = losses.mean(0)
            lowest = min(lowest, *losses[np.isfinite(losses)], math.inf)
            # Show where the methods differ, not the descent of the first evaluations.
            if outcome.method == REFERENCE and np.isfinite(mean).all():
                highest = max(highest, mean[len(mean) // 6])
        row[0].set_ylabel(f"{label} (nats a character)")
    if math.isfinite(highest) and lowest < highest:
        margin = 0.05 * (highest - lowest)
        panels[0, 0].set_ylim(lowest - margin, highest + margin)
    for axes in panels.flat:
        finish(axes)
    for axes, axis in zip(panels[-1], AXES, strict=True):
        axes.set_xlabel(LABELS[axis])
    seeds = f"mean and range of {count_seeds(settings)}, each method at its best rate"
    figure.suptitle(f"GPT of {settings.num_blocks} stacked blocks on characters: {seeds}")
    legend(figure, panels[0, 0])
    return figure


def _speed_up(settings: Settings, outcomes: Sequence[Outcome]) -> Figure:
    """How much sooner than Muon at a loss of Muon's run; gaps where it was not reached."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, axis in zip(panels, AXES, strict=True):
        for outcome in outcomes:
            colour, dash, marker = STYLES[outcome.method]
            ratios = [attainment.speed_up(axis) for attainment in outcome.attainments]
            axes.plot(
                *([100 * target for target in settings.targets], np.array(ratios, float), dash),
                color=colour,
                marker=marker,
                label=TITLES[outcome.method],
            )
        axes.set_xticks([100 * target for target in settings.targets])
        axes.set_xlabel("part of Muon's run (%), whose validation loss is to be reached")
        axes.set_title(f"speed-up in {axis}")
        finish(axes)
    panels[0].set_ylabel("times faster than Muon, median over seeds")
    legend(figure, panels[0])
    return figure


def _learning_rates(settings: Settings, contest: Contest) -> Figure:
    """Validation loss of the tuned runs; the best rate of each method has the large marker."""
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, grid in contest.grids.items():
        draw_grid(axes, grid, STYLES[name], TITLES[name])
    finish_rates(axes, settings.learning_rates)
    axes.set_ylabel("validation loss (nats a character)")
    figure.suptitle("Tuning, one seed; the large marker is the best rate")
    legend(figure, axes)
    return figure
