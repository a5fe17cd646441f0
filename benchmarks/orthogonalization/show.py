"""Tables and the figure of a record of orthogonalizations."""

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.table import Table

from drawing import draw_spread, finish, legend, median, new_table, show, style
from orthogonalization.methods import DEFAULT, REFERENCE
from study import Record

SHOWN_CONDITION = 1e3  # at which error is drawn against time, or the nearest that was measured
SHOWN_RATIOS = 0.25, 16.0  # of times; those beyond stand at the edge


class Timing(NamedTuple):
    """A method on a list or in an update, beside the reference; medians over rounds."""

    speed_up: tuple[float, float, float]
    """Lower quartile, median and upper quartile."""
    share: float | None
    """Above 1 where others slowed the machine while its rate was measured."""
    limit: float | None


def timing(subject: Record, method: str) -> Timing:
    """Of a method on one of the record's subjects."""
    program = subject["programs"][method]
    flops, needed = program["product_flops"], program["needed_flops"]
    speed_ups, shares, limits = [], [], []
    for taken in subject["rounds"]:
        reference, own = taken["pairs"][method]
        speed_ups.append(reference / own)
        if needed is not None and None not in flops.values():
            at_full_rate = sum(count / taken["rates"][dtype] for dtype, count in flops.items())
            shares.append(at_full_rate / own)
            limits.append(reference / at_full_rate * sum(flops.values()) / needed)
    lower, middle, upper = np.percentile(speed_ups, (25, 50, 75)).tolist()
    return Timing((lower, middle, upper), median(shares or [None]), median(limits or [None]))


def speed_ups_of(record: Record, group: str, method: str) -> dict[str, float]:
    """The medians on a group, by the names of those on which the method was timed."""
    return {
        subject["name"]: timing(subject, method).speed_up[1]
        for subject in record["subjects"]
        if subject["name"] in record["groups"][group] and method in subject["programs"]
    }


def errors_of(record: Record, method: str) -> dict[float, list[float | None]]:
    """Over shapes and seeds, by condition."""
    conditions = sorted({case["condition"] for case in record["errors"]})
    return {
        condition: [c["errors"][method] for c in record["errors"] if c["condition"] == condition]
        for condition in conditions
    }


def largest_error_ratio(record: Record, method: str) -> float | None:
    """The error of a method in that of the reference on the same matrix, where it is largest."""
    pairs = [(case["errors"][method], case["errors"][REFERENCE]) for case in record["errors"]]
    return None if any(None in pair for pair in pairs) else max(own / ref for own, ref in pairs)


def tables(record: Record) -> Iterator[Table | str]:
    """One for each list and update, a summary of groups, and the errors."""
    for subject in record["subjects"]:
        yield _subject_table(subject)
    yield (
        "limit: the speed-up if the needed products, at the machine's rate, were all; rate: the "
        "products' time at that rate in the whole; MiB: temporary; adamws: time in adamw's.\n"
    )
    summary = new_table(
        f"Speed-ups beside {REFERENCE}", "group", "method", "members", "geometric mean", "slowest"
    )
    methods = list(record["errors"][0]["errors"])
    for group in record["groups"]:
        for method in (*methods[1:], "adamw"):
            if found := speed_ups_of(record, group, method):
                mean, slowest = (
                    statistics.geometric_mean(found.values()),
                    min(found, key=found.__getitem__),
                )
                cells = (str(len(found)), f"{mean:.2f}", f"{found[slowest]:.2f} on {slowest}")
                summary.add_row(group, method, *cells)
    yield summary
    errors = new_table(
        f"Error ‖UVᵀ − O‖_F / √rank by condition, medians; the largest in {REFERENCE}'s",
        *("method", *(f"{condition:.0e}" for condition in errors_of(record, REFERENCE)), "largest"),
    )
    for method in methods:
        found = map(median, errors_of(record, method).values())
        cells = ["—" if error is None else f"{error:.2g}" for error in found]
        errors.add_row(method, *cells, show(largest_error_ratio(record, method)))
    yield errors


def _subject_table(subject: Record) -> Table:
    took = statistics.median(taken["pairs"][REFERENCE][0] for taken in subject["rounds"])
    timings = {method: timing(subject, method) for method in subject["programs"]}
    adamw = timings.get("adamw")
    table = new_table(
        f"{subject['name']}: {REFERENCE} takes {1e3 * took:,.3g} ms",
        *("method", "speed-up", "limit", "rate", "GFLOP", "MiB", "build s"),
        *(["adamws"] if adamw else []),
    )
    for method, program in subject["programs"].items():
        (lower, middle, upper), share, limit = timings[method]
        flops = program["product_flops"].values()
        table.add_row(
            method,
            f"{middle:.2f} ({lower:.2f}–{upper:.2f})",
            show(limit),
            show(share and 100 * share, 0, " %"),
            "—" if None in flops else f"{sum(flops) / 1e9:.3g}",
            f"{program['temporary_bytes'] / 2**20:.1f}",
            f"{program['build_seconds']:.2f}",
            *([f"{adamw.speed_up[1] / middle:.1f}"] if adamw else []),
        )
    return table


def figures(record: Record) -> dict[str, Figure]:
    """Speed-ups on everything; error against time; error by condition."""
    subjects = record["subjects"]
    figure = Figure(figsize=(14, max(7, 1 + 0.3 * len(subjects))), layout="constrained")
    panels = figure.subplot_mosaic([["left", "above"], ["left", "below"]], width_ratios=(1.3, 1))
    left, above, below = panels["left"], panels["above"], panels["below"]
    conditions = list(errors_of(record, REFERENCE))
    shown = np.argmin(np.abs(np.log(np.array(conditions) / SHOWN_CONDITION)))
    for k, method in enumerate(record["errors"][0]["errors"]):
        look = dict(style(k), linestyle="")
        errors = list(errors_of(record, method).values())
        error = draw_spread(below, conditions, errors, k, method)[shown]
        if times := [1 / up for up in speed_ups_of(record, "all lists", method).values()]:
            above.plot(_at_edge(times), [error] * len(times), markersize=4, alpha=0.3, **look)
            above.plot(_at_edge(statistics.geometric_mean(times)), error, markersize=10, **look)
        for row, subject in enumerate(subjects):
            if method in subject["programs"] and method != REFERENCE:
                (lower, speed_up, upper), _, limit = timing(subject, method)
                left.plot(_at_edge(speed_up), row + 0.1 * k, **look)
                left.plot(_at_edge((lower, upper)), [row + 0.1 * k] * 2, color=look["color"])
                if method == DEFAULT and limit is not None:
                    left.plot(_at_edge(limit), row, "|k", markersize=10)
    below.plot([], [], "|k", markersize=10, label="limit of five steps")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(range(len(subjects)), [subject["name"] for subject in subjects])
    left.invert_yaxis()
    for axes in (left, above):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    below.set(xscale="log", yscale="log")
    above.set_yscale("log")
    y = "error ‖UVᵀ − O‖_F / √rank"
    finish(
        left,
        f"Speed-up beside {REFERENCE}: medians and quartiles",
        "times as fast; others at the edge",
    )
    title = f"Error at condition {conditions[shown]:g} against time: lists, and their mean"
    finish(above, title, f"time, in {REFERENCE}'s", y)
    finish(below, "Error by condition: median, smallest to largest", "condition", y)
    legend(figure, below)
    return {"": figure}


def _at_edge(ratio: Any) -> Any:
    return np.clip(ratio, *SHOWN_RATIOS)
