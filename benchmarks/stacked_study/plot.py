"""The picture of the study."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stacked_study.counts import Compilation
from stacked_study.programs import Case, Form, Part
from stacked_study.settings import Policy, Settings
from stacked_study.verdicts import Measurements, Statistic, lines

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers as well.
COLOURS: dict[Policy | None, str] = {"inputs": "#0072B2", "everything": "#D55E00", None: "#009E73"}
COMPILED = {"dynamic": ("#0072B2", "o", "traced depth"), "static": ("#999999", "s", "static depth")}
PARTS: tuple[Part, ...] = ("gradient", "step", "update")
FORMS: dict[Form, tuple[str, str]] = {
    "dynamic": ("o", "traced depth"),
    "static": ("s", "static depth"),
    "lax.scan": ("x", "lax.scan"),
    "all active": ("x", "all layers"),
    "by hand": ("+", "all layers at once, by hand"),
}
OPEN = {"fillstyle": "none", "markersize": 10}
TIMES: dict[Statistic, str] = {
    "seconds": "median ms",
    "processor_seconds": "median ms of all cores together",
}


def make_figure(measured: Measurements, settings: Settings) -> Figure:
    """Times by depth, where there are any; compilations by number of blocks, and memory."""
    parts = {case.part for case in measured.times}
    measured_by = {statistic for _, _, statistic in lines(measured, settings)}
    timed: list[tuple[Statistic, Part]] = [
        (statistic, part)
        for statistic in TIMES
        for part in PARTS
        if statistic in measured_by and part in parts
    ]
    num_rows = -(-(len(timed) + 3) // 3)
    figure = Figure(figsize=(14, 4.2 * num_rows), layout="constrained")
    panels = list(figure.subplots(num_rows, 3, squeeze=False).flat)
    for axes, (statistic, part) in zip(panels, timed, strict=False):
        _times(axes, measured, settings, part, statistic)
    programs, seconds, memory, *empty = panels[len(timed) :]
    _compilations(programs, measured.compilations, "num_programs", "programs compiled")
    label = "processor seconds to compile them"
    _compilations(seconds, measured.compilations, "processor_seconds", label)
    _memory(memory, measured, settings)
    for axes in empty:
        axes.set_visible(False)
    return figure


def _times(
    axes: Axes, measured: Measurements, settings: Settings, part: Part, statistic: Statistic
) -> None:
    """Milliseconds by depth, with the line and the other programs."""
    for policy in [None] if part == "update" else settings.policies:
        colour, saves = COLOURS[policy], f", saves {policy}" if policy else ""
        for form, (marker, label) in FORMS.items():
            own = [
                (case.depth, 1000 * getattr(time, statistic))
                for case, time in measured.times.items()
                if (case.part, case.form, case.policy) == (part, form, policy)
            ]
            if own:
                style: dict[str, Any] = {} if form == "dynamic" else OPEN
                label += saves
                axes.plot(*zip(*own, strict=True), marker, color=colour, label=label, **style)
        if policy:
            line = lines(measured, settings)[part, policy, statistic]
            ends = 1, settings.num_blocks + 1
            heights = [1000 * (line.a + line.b * n) for n in (settings.num_blocks, 0)]
            axes.plot(ends, heights, color=colour, linewidth=0.8)
    axes.set_title(part)
    axes.set_xlabel("depth (0 embeddings, 1 first block, last the head)")
    axes.set_ylabel(TIMES[statistic])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)


def _compilations(axes: Axes, compilations: Sequence[Compilation], metric: str, label: str) -> None:
    for form, (colour, marker, title) in COMPILED.items():
        own = [found for found in compilations if found.form == form]
        blocks = [found.num_blocks for found in own]
        heights = [getattr(found, metric) for found in own]
        axes.plot(blocks, heights, color=colour, marker=marker, label=title)
    axes.set_xticks(sorted({found.num_blocks for found in compilations}))
    axes.set_title(f"{compilations[0].part} at every depth, narrow networks")
    axes.set_xlabel("blocks")
    axes.set_ylabel(label)
    _finish(axes)


def _memory(axes: Axes, measured: Measurements, settings: Settings) -> None:
    """Bars of the temporary memory of gradients from the first block on."""
    forms: dict[Form, str] = {"dynamic": "traced", "static": "static", "lax.scan": "lax.scan"}
    names, heights, colours = [], [], []
    for policy in settings.policies:
        for form, name in forms.items():
            counts = measured.counts[Case("gradient", form, policy, 1)]
            names.append(f"{name},\n{policy}")
            heights.append(counts.temporary_bytes / 2**20)
            colours.append(COLOURS[policy])
    bars = axes.bar(names, heights, color=colours)
    axes.bar_label(bars, fmt="%.1f")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("gradient from depth 1")
    axes.set_ylabel("temporary memory (MiB)")
    axes.grid(axis="y", alpha=0.3)


def _finish(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
