"""Error against time, list by list, and error against condition."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orthogonalization.orthogonalizers import METHODS, REFERENCE, MethodName
from orthogonalization.polar_errors import GAIN_CONDITION, Accuracy, median_error
from orthogonalization.verdicts import Measurements

# Okabe and Ito's colours, which colour-blind readers can tell apart; a marker as well.
STYLES: dict[MethodName, tuple[str, str]] = {
    "optax_muon": ("#777777", "X"),
    "newton_schulz": ("#D55E00", "o"),
    "newton_schulz_muon": ("#000000", "s"),
    "newton_schulz_dion": ("#009E73", "D"),
    "newton_schulz_bf16": ("#CC79A7", "P"),
    "turbo_muon": ("#56B4E9", "^"),
    "polar_express_7": ("#0072B2", "v"),
    "svd": ("#E69F00", "*"),
}
assert set(STYLES) == set(METHODS)
PANELS_IN_ROW = 4
TIMES = (0.25, 0.5, 1, 2, 4)
LONGEST = TIMES[-1]  # longer ones stand at the edge, with their number


def make_figure(measurements: Measurements, dtype: str) -> Figure:
    """A panel for each list, one for the condition, and the methods below."""
    lists, _, accuracies = measurements
    condition = shown_condition(accuracies)
    columns = min(PANELS_IN_ROW, len(lists) + 1)
    rows = math.ceil((len(lists) + 1) / columns)
    figure = Figure(figsize=(3.4 * columns, 3.3 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    last = len(lists)
    for axes, timings in zip(panels, lists, strict=False):
        for timing in timings.timings:
            colour, marker = STYLES[timing.method]
            error = median_error(accuracies, timing.method, condition)
            time = 1 / timing.speed_up
            axes.plot(min(time, LONGEST), error, marker, color=colour, markersize=9, alpha=0.9)
            if time > LONGEST:
                axes.annotate(f"{time:.0f} → ", (LONGEST, error), ha="right", va="center")
        axes.axvline(1, color="#777777", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks(TIMES, [f"{time:g}" for time in TIMES])
        axes.minorticks_off()
        shortest = min(1 / timing.speed_up for timing in timings.timings)
        axes.set_xlim(min(shortest / 1.2, TIMES[0]), LONGEST * 1.2)
        _finish(axes, timings.name, f"time, in {REFERENCE}'s")
    _by_condition(panels[last], accuracies)
    for axes in panels[last + 1 :]:
        axes.set_visible(False)
    for axes in panels[: last + 1 : columns]:
        axes.set_ylabel("error ‖UVᵀ − O‖_F / √rank")
    figure.suptitle(
        f"Error on test matrices of condition {condition:g} against time on each list, "
        f"and error by condition ({dtype})"
    )
    handles, labels = panels[last].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def shown_condition(accuracies: Sequence[Accuracy]) -> float:
    """The largest at which the band of gains is judged, or the smallest of all."""
    conditions = {accuracy.condition for accuracy in accuracies}
    judged = [condition for condition in conditions if condition <= GAIN_CONDITION]
    return max(judged) if judged else min(conditions)


def _by_condition(axes: Axes, accuracies: Sequence[Accuracy]) -> None:
    conditions = sorted({accuracy.condition for accuracy in accuracies})
    for method in METHODS:
        if any(accuracy.method == method for accuracy in accuracies):
            colour, marker = STYLES[method]
            errors = [median_error(accuracies, method, condition) for condition in conditions]
            # The reference is broad, to show behind a method with the same coefficients.
            width, size = (5.0, 12) if method == REFERENCE else (1.5, 6)
            line = axes.plot(conditions, errors, marker=marker, color=colour, label=method)
            line[0].set(linewidth=width, markersize=size)
    axes.set_xscale("log")
    _finish(axes, "error by condition", "condition of the input")


def _finish(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
