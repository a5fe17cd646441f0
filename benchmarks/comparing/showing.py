"""Tables and figures of a comparison; both show medians over seeds, with smallest and largest."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

from comparing.methods import TITLES
from comparing.outcomes import (
    PARTS,
    budgets,
    final,
    methods,
    predicted,
    reached,
    runs_of,
    saved,
    show_saved,
    time_agreement,
)
from comparing.racing import best_rate
from comparing.settings import REFERENCE
from drawing import draw_spread, finish, legend, median, new_table, show, show_spread, style
from study import Record

NEVER_MISSES = 0.2  # percent that an accuracy of 100 % is taken to miss, on a logarithmic axis
DASHES: dict[str, Any] = {"max": "--", "sum": ":"}  # by the criterion of a prediction
AXES = {
    "spent": "budget spent, in full steps of Muon",
    "steps": "steps",
    "seconds": "seconds that passed",
}


def make_tables(record: Record) -> Iterable[Table | str]:
    """Where everyone ends, how much sooner, and what steps cost."""
    settings = record["settings"]
    seeds = len(settings["seeds"])
    over = "one seed" if seeds == 1 else f"median of {seeds} seeds (smallest–largest)"
    yield _ends(
        record, f"{settings['task']}, {_words(record)}, after equal {settings['unit']}\n{over}"
    )
    if len(budgets(record)) > 1:
        yield _frontier(record, over)
    yield _sooner(record)
    yield _costs(record)


def _ends(record: Record, title: str) -> Table:
    table = new_table(title, "budget, method", "rate", "steps", "train", "test", "seconds")
    for budget in budgets(record):
        table.add_section()
        table.add_row(f"[bold]{budget} steps of Muon")
        for method in methods(record):
            runs = runs_of(record, method, budget)
            table.add_row(
                f" {TITLES[method]}",
                _rate(record, method, budget),
                show(median([run["steps"][-1] for run in runs]), 0),
                _measured(record, [median([run["train"][-1] for run in runs])]),
                _measured(record, final(record, method, budget)),
                show(median([run["seconds"][-1] for run in runs]), 1),
            )
    return table


def _rate(record: Record, method: str, budget: float) -> str:
    """The learning rate, in Muon's unit, and a star where it is at an edge of the grid."""
    rate = runs_of(record, method, budget)[0]["rate"]
    for tuned in record["tuning"]:
        if (tuned["method"], tuned["budget"]) == (method, budget):
            assert rate == best_rate(tuned)
            return f"{rate:g}{'*' if rate in (tuned['rates'][0], tuned['rates'][-1]) else ''}"
    return f"{rate:g}"


def _frontier(record: Record, over: str) -> Table:
    title = f"Budget that Muon needs for the same test {record['measure']} ÷ budget\n{over}"
    table = new_table(title, "method", *(str(budget) for budget in budgets(record)))
    for method in methods(record):
        if method != REFERENCE:
            at = budgets(record)
            table.add_row(TITLES[method], *(show_saved(record, method, b) for b in at))
            for criterion, speed_ups in predicted(record, method).items():
                shown = (show(speed_up, unit="×") for speed_up in speed_ups)
                table.add_row(f"  theory, by {criterion}", *shown)
    return table


def _sooner(record: Record) -> Table:
    unit = record["settings"]["unit"]
    title = f"Times sooner, by {unit}, where Muon is after a part of its run, on test data"
    table = new_table(title, "method", *(f"{part:.0%}" for part in PARTS))
    for method in methods(record):
        if method != REFERENCE:
            found = [reached(record, method, part) for part in PARTS]
            table.add_row(TITLES[method], *(show(median(ratios), unit="×") for ratios in found))
    return table


def _costs(record: Record) -> Table:
    headings = ("ms a step, by depth", "seconds passed\nover added up")
    table = new_table("What steps cost", "method", *headings)
    for method in methods(record):
        table.add_row(
            TITLES[method],
            " / ".join(f"{1000 * seconds:.1f}" for seconds in record["step_seconds"][method]),
            show(time_agreement(record, method, budgets(record)[-1])),
        )
    return table


def _measured(record: Record, values: Sequence[float | None]) -> str:
    return show_spread(_as_shown(record, values), 3 if record["measure"] == "loss" else 2)


def make_figures(record: Record) -> Mapping[str, Figure]:
    """Curves of the largest budget; with several budgets the frontier, with a grid its rates."""
    figures = {"": _curves(record)}
    if len(budgets(record)) > 1:
        figures["frontier"] = _frontier_figure(record)
    if record["tuning"]:
        figures["rates"] = _rates(record)
    return figures


def _curves(record: Record) -> Figure:
    unit = record["settings"]["unit"]
    axes = ("spent", "seconds" if unit == "steps" else "steps")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True)
    for panel, axis in zip(panels, axes, strict=True):
        for i, method in enumerate(methods(record)):
            runs = runs_of(record, method, budgets(record)[-1])
            x = np.median([run[axis][1:] for run in runs], axis=0)
            seen = zip(*(_as_shown(record, run["test"][1:]) for run in runs), strict=True)
            draw_spread(panel, x.tolist(), list(seen), i, TITLES[method])
        finish(panel, x=AXES[axis])
    _scale(panels[0], record)
    legend(figure, panels[0])
    return figure


def _frontier_figure(record: Record) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = budgets(record)
    for i, method in enumerate(methods(record)):
        ends = [_as_shown(record, final(record, method, budget)) for budget in at]
        draw_spread(left, at, ends, i, TITLES[method])
        if method != REFERENCE:
            ratios = [saved(record, method, budget) for budget in at]
            draw_spread(right, at, ratios, i, TITLES[method])
            for of, speed_ups in predicted(record, method).items():
                right.plot(at, speed_ups, DASHES[of], color=style(i)["color"], linewidth=1)
    right.axhline(1, color="black", linewidth=0.8)
    if record.get("predicted"):
        kinds = [Line2D([], [], color="grey", linestyle=dash) for dash in DASHES.values()]
        right.legend(kinds, [f"theory, by {of}" for of in DASHES], fontsize="small")
    x = "budget, in full steps of Muon"
    finish(left, x=x)
    _scale(left, record)
    finish(right, x=x, y=f"budget that Muon needs for the same\ntest {record['measure']} ÷ budget")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [str(budget) for budget in at])
    legend(figure, left)
    return figure


def _rates(record: Record) -> Figure:
    at = list(budgets(record))
    figure = Figure(figsize=(1.5 + 3 * len(at), 3.8), layout="constrained")
    panels = figure.subplots(1, len(at), squeeze=False)[0]
    for panel, budget in zip(panels, at, strict=True):
        for tuned in record["tuning"]:
            if tuned["budget"] == budget:
                index = list(methods(record)).index(tuned["method"])
                found = np.array(_as_shown(record, tuned["validation"]), float)
                panel.plot(tuned["rates"], found, label=TITLES[tuned["method"]], **style(index))
        rates = record["settings"]["rates"]
        panel.set_xscale("log")
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
        panel.minorticks_off()
        finish(panel, f"budget {budget}", "learning rate, in Muon's unit")
    panels[0].set_ylabel("validation " + _words(record))
    legend(figure, panels[0])
    return figure


def _as_shown(record: Record, values: Sequence[float | None]) -> list[float | None]:
    """Errors as accuracies in percent."""
    if record["measure"] == "loss":
        return list(values)
    return [None if value is None else 100 * (1 - value) for value in values]


def _words(record: Record) -> str:
    return "loss, nats a character" if record["measure"] == "loss" else "accuracy, %"


def _scale(axes: Axes, record: Record) -> None:
    """Losses on a logarithmic axis, and accuracies on one of what they miss."""
    axes.set_ylabel("test " + _words(record))
    if record["measure"] == "loss":
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:g}")
        return
    above, low = 100 + NEVER_MISSES, axes.get_ylim()[0]
    high = above - 0.85 * (above - axes.dataLim.y1)
    functions = lambda shown: -np.log10(np.maximum(above - shown, 1e-3)), lambda y: above - 10**-y
    axes.set_yscale("function", functions=functions)
    ticks = [tick for tick in (0, 50, 80, 90, 95, 98, 99, 99.5, 100) if low <= tick <= high]
    if len(ticks) < 3:
        ticks = [tick for tick in range(101) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(low, high)
