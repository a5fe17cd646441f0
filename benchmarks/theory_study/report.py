"""What the study leaves behind: tables, a picture and plain numbers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from panels import finish
from theory_study.bounds import Ratios
from theory_study.network import Plan
from theory_study.race import PROBLEMS, Outcome
from theory_study.search import CRITERIA, Verdict

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "full": "#000000",
    "uniform": "#D55E00",
    "best by max": "#0072B2",
    "best by sum": "#009E73",
}
MARKERS = {"rising": "^", "falling": "v", "flat": "s", "middle": "D"}


def print_tables(
    console: Console,
    bounds: Sequence[Ratios],
    verdicts: Sequence[Verdict],
    outcomes: Sequence[Outcome],
    plan: Plan,
) -> None:
    """Everything, and what it says."""
    table = _table("What happened over its bound: at most 1", "problem", "depths")
    for heading in ("fall of a step", "gradients of a run", "smallest gradient"):
        table.add_column(heading, justify="right")
    for row in bounds:
        table.add_row(*row[:2], *(f"{ratio:.3f}" for ratio in row[2:]))
    console.print(table)
    table = _table("Full steps are optimal only if …: random problems", "criterion")
    for heading in ("problems", "full optimal", "condition", "contradictions", "beaten by"):
        table.add_column(heading, justify="right")
    for of in verdicts:
        counts = (of.problems, of.full_optimal, of.condition_holds, of.contradictions)
        table.add_row(of.criterion, *map(str, counts), f"{max(0.0, of.beaten_by):.1e}")
    console.print(table)
    for problem in PROBLEMS:
        console.print(_race_table(problem, outcomes))
    for line in deviations(outcomes):
        console.print(line, highlight=False)
    console.print(_plan_table(plan))
    for name, of in plan.speed_ups.items():
        promises = ", ".join(f"{ratio:.2f} by {criterion}" for criterion, ratio in of.items())
        console.print(f"{name}: predicted speed-up {promises}.", highlight=False)


def deviations(outcomes: Sequence[Outcome]) -> list[str]:
    """How far predictions lie from what was measured, in a sentence for each problem."""
    sentences = []
    for problem in PROBLEMS:
        for criterion in CRITERIA:
            rows = [
                of
                for of in outcomes
                if (of.problem, of.criterion) == (problem, criterion) and of.distribution != "full"
            ]
            logs = [math.log(of.measured / of.predicted) for of in rows if of.measured > 0]
            worst = math.exp(max(map(abs, logs), default=math.nan))
            right = sum((of.predicted >= 0.999) == (of.measured >= 0.999) for of in rows)
            sentences.append(
                f"{problem}, {criterion}: measured and predicted speed-ups differ by up to "
                f"{worst:.2f}×, and agree in {right} of {len(rows)} on whether full steps win."
            )
    return sentences


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _race_table(problem: str, outcomes: Sequence[Outcome]) -> Table:
    table = _table(f"{problem}: predicted → measured speed-up", "L", "depths")
    for criterion in CRITERIA:
        table.add_column(f"by {criterion}", justify="right", no_wrap=True)
    cells: dict[tuple[str, str], list[str]] = {}
    for of in outcomes:
        if of.problem == problem and of.distribution != "full":
            text = f"{of.predicted:.2f} → {of.measured:.2f}"
            cells.setdefault((of.profile, of.distribution), []).append(text)
    for names, texts in cells.items():
        table.add_row(*names, *texts)
    return table


def _plan_table(plan: Plan) -> Table:
    table = _table("The network: probability of each depth", "layer")
    probabilities = plan.probabilities()
    for heading in ("L", "MFLOP from here", *probabilities):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, layer in enumerate(plan.layers):
        table.add_row(
            layer,
            f"{plan.smoothness['max'][i]:.3g}",
            f"{plan.costs[i] / 1e6:.1f}",
            *(f"{of[i]:.3f}" for of in probabilities.values()),
        )
    return table


def make_figure(bounds: Sequence[Ratios], outcomes: Sequence[Outcome], plan: Plan) -> Figure:
    """Bounds, races and plan."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)
    _draw_bounds(panels[0, 0], bounds)
    for axes, problem in zip((panels[0, 1], panels[1, 0]), PROBLEMS, strict=True):
        _draw_race(axes, problem, outcomes)
    _draw_plan(panels[1, 1], plan)
    return figure


def _draw_bounds(axes: Axes, bounds: Sequence[Ratios]) -> None:
    heights = {
        "fall of a step": [of.one_step for of in bounds],
        "gradients of a run": [of.many_steps for of in bounds],
        "smallest gradient": [of.gradient for of in bounds],
    }
    positions = np.arange(len(bounds))
    colours = ("#0072B2", "#E69F00", "#009E73")
    for i, ((label, of), colour) in enumerate(zip(heights.items(), colours, strict=True)):
        axes.bar(positions + 0.28 * (i - 1), of, 0.28, color=colour, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    names = [f"{of.problem}, {of.distribution}" for of in bounds]
    axes.set_xticks(positions, names, rotation=60, ha="right", fontsize="small")
    axes.set_title("What happened over its bound")
    axes.set_ylim(0, 1.35)
    axes.legend(fontsize="small", ncols=3, loc="upper center")
    finish(axes)


def _draw_race(axes: Axes, problem: str, outcomes: Sequence[Outcome]) -> None:
    """Criteria in two sizes of marker."""
    shown = [of for of in outcomes if of.problem == problem and of.measured > 0]
    for of in shown:
        if of.distribution != "full":
            axes.plot(
                *(of.predicted, of.measured, MARKERS[of.profile]),
                color=COLOURS[of.distribution],
                markersize=10 if of.criterion == "max" else 6,
                markerfacecolor="none" if of.criterion == "max" else None,
            )
    ends = [min(of.predicted for of in shown), max(of.predicted for of in shown)]
    axes.plot(ends, ends, ":", color="#777777")
    for value in (axes.axhline, axes.axvline):
        value(1, color="black", linewidth=0.6)
    for name in COLOURS:
        if name != "full":
            axes.plot([], [], "o", color=COLOURS[name], label=name)
    for name, marker in MARKERS.items():
        axes.plot([], [], marker, color="#777777", label=f"L {name}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize="small")
    axes.set_xlabel("predicted speed-up (hollow: max, filled: sum)")
    axes.set_ylabel("measured speed-up")
    axes.set_title(f"{problem}: over full steps, at counted cost")
    axes.legend(fontsize="small", ncols=2)
    finish(axes)


def _draw_plan(axes: Axes, plan: Plan) -> None:
    probabilities = plan.probabilities()
    positions = np.arange(len(plan.layers))
    for i, (name, of) in enumerate(probabilities.items()):
        promise = ", ".join(f"{ratio:.2f}× ({by})" for by, ratio in plan.speed_ups[name].items())
        label = f"{name}: {promise}"
        axes.bar(positions + 0.28 * (i - 1), of, 0.28, color=COLOURS[name], label=label)
    labels = [
        f"{layer}\nL = {of:.3g}\n{cost / 1e6:.0f} MFLOP"
        for layer, of, cost in zip(plan.layers, plan.smoothness["max"], plan.costs, strict=True)
    ]
    axes.set_xticks(positions, labels, fontsize="small")
    axes.set_ylim(0, 1.3)
    axes.set_title("The network: probability of each depth")
    axes.legend(fontsize="small")
    finish(axes)


def record(
    bounds: Sequence[Ratios],
    verdicts: Sequence[Verdict],
    outcomes: Sequence[Outcome],
    plan: Plan,
) -> dict[str, Any]:
    """Everything as plain numbers."""
    return {
        "bounds": [of._asdict() for of in bounds],
        "searches": [of._asdict() for of in verdicts],
        "races": [of._asdict() for of in outcomes],
        "network": {
            "layers": list(plan.layers),
            "smoothness": {name: of.tolist() for name, of in plan.smoothness.items()},
            "flops": plan.costs.tolist(),
            "probabilities": plan.probabilities(),
            "predicted_speed_ups": plan.speed_ups,
            "fit": {path: of._asdict() for path, of in plan.fit.leaves.items()},
        },
    }
