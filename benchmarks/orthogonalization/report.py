"""What the comparison of orthogonalizations leaves behind: tables and plain numbers."""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orthogonalization.list_timing import ListTimings, Timing, quartiles
from orthogonalization.matrix_products import necessary_flops
from orthogonalization.orthogonalizers import METHODS, REFERENCE
from orthogonalization.polar_errors import Accuracy, median_error
from orthogonalization.shape_lists import matrix_shape
from orthogonalization.verdicts import BAND, Measurements, Target, gain_band, summarise, within_band

ROUNDING = 1.001  # errors of equal coefficients differ by rounding


def print_tables(console: Console, measurements: Measurements, num_steps: int) -> None:
    """Every list, the summary over lists, the size of programs, and the accuracy."""
    for timings in measurements.lists:
        console.print(_list_table(timings, num_steps))
    console.print(_summary_table(measurements))
    console.print(_size_table(measurements))
    for table in _accuracy_tables(measurements.accuracies):
        console.print(table)


def print_targets(console: Console, targets: Sequence[Target]) -> None:
    """One line each."""
    for target in targets:
        verdict = {
            True: "[green]met[/green]",
            False: "[red]NOT met[/red]",
            None: "[yellow]not judged[/yellow]",
        }[target.met]
        console.print(
            f"{verdict}: {escape(target.sentence)}: {escape(target.found)}.", highlight=False
        )


def _list_table(timings: ListTimings, num_steps: int) -> Table:
    reference = timings.of(REFERENCE)
    assert reference is not None
    own, rounds = 1000 * statistics.median(reference.seconds), len(reference.seconds)
    kinds = len({matrix_shape(shape) for shape in timings.shapes})
    necessary = _giga(necessary_flops(timings.shapes, num_steps))
    table = _table(
        f"{timings.name}: {_count(len(timings.shapes), 'leaf', 'leaves')} of "
        f"{_count(kinds, 'matrix shape', 'matrix shapes')}",
        f"{REFERENCE} takes {own:,.1f} ms, {num_steps} steps need {necessary} GFLOP;\n"
        f"medians and quartiles of {_count(rounds, 'round', 'rounds')}; rate: of matrix products",
        "method",
        ("speed-up", "of\nrate", "GFLOP", "compile\ns", "HLO\nKiB", "temp\nMiB"),
    )
    for timing in timings.timings:
        program = timing.program
        table.add_row(
            timing.method,
            _speed_up(timing),
            "–" if math.isnan(timing.share) else f"{timing.share:.0%}",
            _giga(program.total_product_flops),
            f"{program.trace_seconds + program.compile_seconds:.1f}",
            f"{program.hlo_bytes / 1024:.0f}",
            f"{program.temporary_bytes / 2**20:.1f}",
        )
    table.caption = "\n".join(
        f"{method} is not timed: {reason}" for method, reason in timings.not_timed.items()
    )
    return table


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _giga(flops: float) -> str:
    if math.isnan(flops):
        return "–"
    return f"{flops / 1e9:,.0f}" if flops >= 1e11 else f"{flops / 1e9:.3g}"


def _speed_up(timing: Timing) -> str:
    lower, upper = quartiles(timing.speed_ups)
    text = f"{timing.speed_up:.2f} ({lower:.2f}–{upper:.2f})"
    return text if timing.speed_up >= 1 else f"[red]{text}[/red]"


def _summary_table(measurements: Measurements) -> Table:
    table = _table(
        "Over the lists",
        f"speed-up against {REFERENCE}",
        "method",
        ("lists", "geometric mean", "slowest", "on"),
    )
    for method in METHODS:
        if summary := summarise(measurements.lists, method):
            table.add_row(
                method,
                str(summary.num_lists),
                _red(f"{summary.geometric_mean:.2f}", summary.geometric_mean < 1),
                _red(f"{summary.slowest:.2f}", summary.slowest < 1),
                summary.slowest_list,
            )
    return table


def _red(text: str, wrong: bool) -> str:
    return f"[red]{text}[/red]" if wrong else text


def _size_table(measurements: Measurements) -> Table:
    table = _table(
        "The program for equal leaves",
        "optimized HLO without its notes about the source",
        "method",
        ("leaves", "HLO KiB", "instructions", "products", "compile s", "temp MiB"),
    )
    previous = None
    for size in measurements.sizes:
        if size.shape != previous:
            previous = size.shape
            table.add_section()
            table.add_row(f"[bold]{'x'.join(map(str, size.shape))}")
        program = size.program
        table.add_row(
            f"  {size.method}",
            str(size.leaves),
            f"{program.hlo_bytes / 1024:.0f}",
            str(program.instructions),
            str(program.products),
            f"{program.trace_seconds + program.compile_seconds:.1f}",
            f"{program.temporary_bytes / 2**20:.1f}",
        )
    return table


def _accuracy_tables(accuracies: Sequence[Accuracy]) -> list[Table]:
    measured = {accuracy.method for accuracy in accuracies}
    conditions = sorted({a.condition for a in accuracies})
    headings = [f"{condition:.0e}" for condition in conditions]
    errors = _table(
        "Error ‖UVᵀ − O‖_F / √rank against an SVD in float64, by condition",
        "medians over shapes and seeds, red where larger than optax_muon's;\n"
        "gains: of singular values ≥ 1e-3 ‖·‖_F, condition ≤ 1e3, red outside "
        + escape(str(list(BAND))),
        "method",
        (*headings, "gains"),
    )
    ranges = _table(
        "Smallest–largest singular value of the result, by condition",
        "over all shapes and seeds",
        "method",
        headings,
    )
    for method in METHODS:
        if method not in measured:
            continue
        cells, spans = [], []
        for condition in conditions:
            error = median_error(accuracies, method, condition)
            theirs = median_error(accuracies, REFERENCE, condition)
            cells.append(_red(_error(error), not error <= ROUNDING * theirs))
            own = [a for a in accuracies if (a.method, a.condition) == (method, condition)]
            spans.append(_span(min(a.smallest for a in own), max(a.largest for a in own)))
        gains = gain_band(accuracies, method)
        cells.append(_red(f"{gains[0]:.3f}–{gains[1]:.3f}", not within_band(gains)))
        errors.add_row(method, *cells)
        ranges.add_row(method, *spans)
    return [errors, ranges]


def _error(error: float) -> str:
    return "not finite" if math.isnan(error) else f"{error:.3f}" if error > 0.01 else f"{error:.0e}"


def _span(smallest: float, largest: float) -> str:
    return f"{smallest:.2f}–{largest:.2f}" if smallest > 0.01 else f"{smallest:.0e}–{largest:.2f}"


def _table(title: str, note: str, first: str, headings: Sequence[str]) -> Table:
    """One that fits into 80 columns."""
    table = Table(title=f"{title}\n{note}", box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def record(measurements: Measurements, targets: Sequence[Target], num_steps: int) -> dict[str, Any]:
    """Everything as plain numbers."""
    summaries = [summarise(measurements.lists, method) for method in METHODS]
    return {
        "lists": [
            {
                "list": timings.name,
                "leaves": len(timings.shapes),
                "matrices": {
                    f"{rows}x{cols}": count
                    for (rows, cols), count in Counter(map(matrix_shape, timings.shapes)).items()
                },
                "necessary_flops": necessary_flops(timings.shapes, num_steps),
                "not_timed": timings.not_timed,
                "methods": [_timing_record(timing) for timing in timings.timings],
            }
            for timings in measurements.lists
        ],
        "over_lists": [dataclasses.asdict(summary) for summary in summaries if summary],
        "program_size": [
            {"shape": size.shape, "leaves": size.leaves, "method": size.method}
            | size.program.record()
            for size in measurements.sizes
        ],
        "accuracy": [dataclasses.asdict(accuracy) for accuracy in measurements.accuracies],
        "targets": [dataclasses.asdict(target) for target in targets],
    }


def _timing_record(timing: Timing) -> dict[str, Any]:
    return {
        "method": timing.method,
        "seconds": timing.seconds,
        "speed_ups": timing.speed_ups,
        "speed_up": timing.speed_up,
        "speed_up_quartiles": quartiles(timing.speed_ups),
        "shares_of_product_rate": timing.shares,
        "share_of_product_rate": timing.share,
    } | timing.program.record()
