"""Pictures of a race."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from racing import Contest, Run
from reporting import TITLES
from settings import METHODS, MethodName, Settings
from targets import SPLITS, accuracies

# Okabe and Ito's colours, which colour-blind readers can tell apart, and two more of Tol's; a dash
# as well, and a marker for those who are not of the demo.
STYLES: dict[MethodName, tuple[str, str]] = {
    "muon": ("#000000", "-"),
    "muon_short": ("#CC79A7", "--"),
    "drop_muon_uniform": ("#D55E00", "-"),
    "drop_muon_epoch_shift": ("#0072B2", "-"),
    "drop_muon_time_aware": ("#56B4E9", "-"),
    "optax_muon": ("#777777", "--"),
    "adamw": ("#009E73", "-."),
    "scion": ("#E69F00", "-o"),
    "scion_constrained": ("#999933", "--s"),
    "gluon": ("#117733", "-^"),
    "drop_scion": ("#882255", "-o"),
    "drop_gluon": ("#332288", "-^"),
    "muon_with_mvr": ("#44AA99", "-v"),
    "drop_muon_with_mvr": ("#AA4499", "-v"),
}
assert set(STYLES) == set(METHODS)
DEPTH_COLOURS = ("#440154", "#3B528B", "#21918C", "#5EC962", "#C8B020", "#B5367A", "#F98E09")


def save_plots(settings: Settings, contest: Contest, folder: Path) -> list[Path]:
    """All pictures of a race, as PNG.

    Returns:
        The files written.
    """
    paths = []
    for name, figure in {
        "accuracy_by_seconds": _accuracy(settings, contest, "training seconds", _seconds),
        "accuracy_by_steps": _accuracy(settings, contest, "training steps", _steps),
        "sampling": _sampling(settings, contest),
        "step_time_by_depth": _step_time(contest),
    }.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def _seconds(run: Run) -> list[float]:
    return run.seconds


def _steps(run: Run) -> list[int]:
    return run.steps


def _accuracy(
    settings: Settings,
    contest: Contest,
    label: str,
    axis_of: Callable[[Run], list[float]] | Callable[[Run], list[int]],
) -> Figure:
    """Training and test accuracy, the median over seeds in a band of smallest to largest."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    for axes, split in zip(figure.subplots(1, 2), SPLITS, strict=True):
        lowest = 100.0
        for method in settings.methods:
            runs = [run for run in contest.runs if run.method == method]
            x = np.median([axis_of(run) for run in runs], axis=0)
            y = 100 * np.array([accuracies(run, split) for run in runs])
            colour, dash = STYLES[method]
            title = TITLES[method]
            axes.plot(x, np.median(y, axis=0), dash, color=colour, label=title, markersize=4)
            if len(runs) > 1:
                axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
            # Show where the race is decided, not the climb of the first evaluations.
            lowest = min(lowest, float(np.median(y[:, len(x) // 4])))
        axes.set_ylim(max(0.0, lowest - 5), 100.5)
        _finish(axes, f"{split}ing accuracy" if split == "train" else "test accuracy", label)
        axes.set_ylabel("accuracy (%)")
    seeds = f"median and range of {len(settings.seeds)} seeds"
    figure.suptitle(f"{settings.dataset}, batch {settings.batch_size}: {seeds}")
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside right center")
    return figure


def _sampling(settings: Settings, contest: Contest) -> Figure | None:
    """How likely each depth is in each epoch, and how often it was drawn."""
    if not contest.probabilities:
        return None
    columns = min(len(contest.probabilities), 2)
    rows = math.ceil(len(contest.probabilities) / columns)
    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes in panels[len(contest.probabilities) :]:
        axes.set_axis_off()
    epochs = np.arange(settings.epochs) + 0.5
    for axes, (method, table) in zip(panels, contest.probabilities.items(), strict=False):
        drawn = np.array([run.depths for run in contest.runs if run.method == method])
        drawn = drawn.reshape(len(drawn), settings.epochs, contest.steps_per_epoch)
        num_depths = len(table[0])
        for depth, probabilities in enumerate(np.array(table).T):
            colour = DEPTH_COLOURS[depth % len(DEPTH_COLOURS)]
            # Thinner and shifted with the depth, so that equal ones show one behind the other.
            width, shift = 0.9 * (num_depths - depth) + 0.6, 0.05 * (depth - (num_depths - 1) / 2)
            axes.plot(epochs, probabilities, color=colour, linewidth=width, label=f"depth {depth}")
            axes.plot(epochs + shift, (drawn == depth).mean((0, 2)), "o", color=colour)
        _finish(axes, TITLES[method], "epoch")
        axes.set_xlim(0, settings.epochs)
    panels[0].set_ylim(bottom=0)
    for axes in panels[::columns]:
        axes.set_ylabel("probability (lines), frequency drawn (dots)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="0 = all layers")
    return figure


def _step_time(contest: Contest) -> Figure:
    """What one step costs at each depth; methods that train everything have a single bar."""
    num_methods = len(contest.step_seconds)
    figure = Figure(figsize=(4 + num_methods, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / num_methods
    for i, (method, seconds) in enumerate(contest.step_seconds.items()):
        positions = np.arange(len(seconds)) + (i - (num_methods - 1) / 2) * width
        bars = axes.bar(
            positions,
            np.array(seconds) * 1000,
            width,
            color=STYLES[method][0],
            label=TITLES[method],
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(max(len(seconds) for seconds in contest.step_seconds.values())))
    _finish(axes, "One training step", "depth: the shallowest layer trained (0 = all layers)")
    axes.set_ylabel("median time of a step (ms)")
    figure.legend(loc="outside right center")
    return figure


def _finish(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
