"""Rows against the row of their reference, as numbers, tables and pictures."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from counting.programs import Row
from drawing import finish, legend, new_table, show, style

# Heading, name and unit.
METRICS = {
    "flops": ("MFLOP", "FLOPs", 1e6),
    "matmul_flops": ("MFLOP,\nproducts", "FLOPs of matrix products", 1e6),
    "temporary_bytes": ("temp.\nMiB", "temporary memory", 2**20),
    "bytes_accessed": ("MiB\nmoved", "bytes moved", 2**20),
    "characters": ("thousand\nchar.", "characters", 1e3),
    "executables": ("exec.", "executables", 1),
    "collectives": ("coll.", "collectives", 1),
    "collective_bytes": ("kB\nrec.", "bytes received", 1e3),
    "seconds": ("ms", "time", 1e-3),
}
SHOWN = {
    "depths": ("flops", "temporary_bytes", "bytes_accessed", "seconds"),
    "two_gradients": ("flops", "temporary_bytes", "seconds"),
    "stacked": ("matmul_flops", "temporary_bytes", "characters", "executables", "seconds"),
    "leaves": ("matmul_flops", "temporary_bytes", "characters"),
    "mesh": ("collectives", "collective_bytes"),
}


def by(key: str, rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that share what they have under a key."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def shown(subject: str, rows: Sequence[Row]) -> list[str]:
    """The metrics that all rows have, and not all 1; of loops, the FLOPs of matrix products."""
    loops = any(row.get("flops") is None for row in rows)
    found = []
    for name in SHOWN[subject]:
        metric = "matmul_flops" if loops and name == "flops" else name
        values = {value(row, metric) for row in rows}
        found += [] if None in values or values == {1} else [metric]
    return found


def value(row: Row, metric: str) -> Any:
    """A number: of the seconds their median, of the collectives how many there are."""
    found = row.get(metric)
    if isinstance(found, list):
        return statistics.median(found) if found else None
    return sum(found.values()) if isinstance(found, dict) else found


def ratio(row: Row, other: Row | None, metric: str) -> float | None:
    """Of the seconds, the median of the ratios in each round."""
    if other is None or not value(row, metric) or not value(other, metric):
        return None
    if metric == "seconds":
        pairs = zip(row[metric], other[metric], strict=True)
        return statistics.median(a / b for a, b in pairs)
    return value(row, metric) / value(other, metric)


def reference(row: Row, rows: Iterable[Row]) -> Row | None:
    """That of the same sizes, or the only one."""
    own = [other for other in rows if other["program"] == row["reference"]]
    same = [other for other in own if other["sizes"] == row["sizes"]]
    return same[0] if same else own[0] if len(own) == 1 else None


def table(subject: str, network: str, rows: Sequence[Row]) -> Table:
    """The numbers of references, and of the others their ratios to these."""
    headings = [METRICS[metric][0] for metric in shown(subject, rows)]
    found = new_table(f"{subject}, {network}: × {rows[0]['reference']}", "", *headings)
    for row in sorted(rows, key=lambda row: [*row["sizes"].values()]):
        cells = []
        for metric in shown(subject, rows):
            times, own = ratio(row, reference(row, rows), metric), value(row, metric)
            if times is not None and row["program"] != row["reference"]:
                cells.append(show(times, 2 if metric == "seconds" else 4, " ×"))
            else:
                cells.append(show(own and own / METRICS[metric][2], 3))
        sizes = ", ".join(f"{name} {size}" for name, size in row["sizes"].items())
        found.add_row(f"{sizes}, {row['program']}", *cells)
    return found


def points(rows: Sequence[Row], program: str, metric: str) -> list[tuple[int, float]]:
    """The first size of each row of a program, and its ratio."""
    return sorted(
        (next(iter(row["sizes"].values())), times)
        for row in rows
        if row["program"] == program != row["reference"]
        and (times := ratio(row, reference(row, rows), metric)) is not None
    )


def summaries(subject: str, network: str, rows: Sequence[Row]) -> Iterator[str]:
    """For each program the range of its ratios, and where the largest is."""
    name, *_ = rows[0]["sizes"]
    for program in by("program", rows):
        said = []
        for metric in shown(subject, rows):
            if found := points(rows, program, metric):
                times = [of_size for _, of_size in found]
                size, high = max(found, key=lambda point: point[1])
                said.append(f"{METRICS[metric][1]} {min(times):.4f}–{high:.4f} ({name} {size})")
                if metric == "seconds":
                    said[-1] += f", in the geometric mean {statistics.geometric_mean(times):.3f}"
        if said:
            yield f"{network}, {program} ÷ {rows[0]['reference']}: {'; '.join(said)}."


def figure(subject: str, rows: Sequence[Row]) -> Figure:
    """A row of panels for each network, one for each metric; lines are programs."""
    networks = by("network", rows)
    width = max(len(shown(subject, of_one)) for of_one in networks.values())
    drawn = Figure(figsize=(3.4 * width + 2.2, 2.6 * len(networks)), layout="constrained")
    panels: Any = drawn.subplots(len(networks), width, squeeze=False)
    for line, (network, of_one) in zip(panels, networks.items(), strict=True):
        for axes, metric in zip(line, shown(subject, of_one), strict=False):
            for index, program in enumerate(by("program", rows)):
                if found := points(of_one, program, metric):
                    axes.plot(*zip(*found, strict=True), label=program, **style(index))
            axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
            if subject == "mesh":
                axes.set_yscale("log")
            else:
                axes.axhline(0, color="none")  # is in sight
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            label = f"{METRICS[metric][1]}\n÷ {of_one[0]['reference']}"
            finish(axes, network, next(iter(of_one[0]["sizes"])), label)
        for axes in line[len(shown(subject, of_one)) :]:
            axes.set_visible(False)
    legend(drawn, panels[0][0])
    return drawn
