"""The picture of the study."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scale_study.model import BARS, NOTE, ModelledStep
from scale_study.settings import Arrangement, Method, NetworkName, Settings
from scale_study.verdicts import TITLES, Measurements, bytes_over_least

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers as well, of which the
# first are larger and open, to show behind the others.
STYLES: dict[Method, tuple[str, str, int]] = {
    "set_mesh": ("#E69F00", "s", 11),
    "on_mesh": ("#56B4E9", "o", 8),
    "owner": ("#0072B2", ".", 6),
    "optax": ("#D55E00", "^", 6),
}
ARRANGED: dict[Arrangement, str] = {
    "fsdp": "leaves, rows sharded",
    "fsdp_tensor": "leaves, sharded over two axes",
    "stacked": "stacks, sharded inside rows",
    "stack_axis": "stacks, sharded by rows",
}
PARTS = (
    ("gradient_seconds", "#BBBBBB", "forward and backward"),
    ("optimizer_compute_seconds", "#009E73", "orthogonalization"),
    ("optimizer_transfer_seconds", "#CC79A7", "its collectives"),
)


def make_figure(measured: Measurements, settings: Settings) -> Figure:
    """Collectives and bytes by number of matrices and by depth, and modelled steps."""
    columns = max(len(settings.arrangements), len(settings.networks))
    figure = Figure(figsize=(4.7 * columns, 16), layout="constrained")
    panels = figure.subplots(4, columns, squeeze=False)
    for axes, arrangement in zip(panels[0], settings.arrangements, strict=False):
        _collectives(axes, measured, settings, arrangement)
    for axes, arrangement in zip(panels[1], settings.arrangements, strict=False):
        _bytes(axes, measured, settings, arrangement)
    for axes, arrangement in zip(panels[2], settings.arrangements, strict=False):
        _depths(axes, measured, settings, arrangement)
    for axes, network in zip(panels[3], settings.networks, strict=False):
        _modelled(axes, measured.modelled, network, settings.pod_devices)
    for row in panels:
        for axes in row:
            if not axes.has_data():
                axes.set_visible(False)
    places = ("upper left", "upper right", "upper right", "upper left")
    for row, place in zip(panels, places, strict=True):
        if row[0].get_visible():
            row[0].legend(fontsize=8, loc=place)
    return figure


def _collectives(
    axes: Axes, measured: Measurements, settings: Settings, arrangement: Arrangement
) -> None:
    for method in settings.methods:
        points = [
            (case.num_matrices, measured.counts[case].traffic.num_collectives)
            for case in measured.cases["matrices"]
            if (case.arrangement, case.method) == (arrangement, method)
        ]
        _draw(axes, points, method)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-0.3, 4000)
    _finish(axes, arrangement, settings.matrices, "number of matrices", "collectives in a step")


def _bytes(
    axes: Axes, measured: Measurements, settings: Settings, arrangement: Arrangement
) -> None:
    """Over the least; megabytes where that is nothing."""
    has_least = arrangement != "stack_axis"
    for method in settings.methods:
        points = []
        for case in measured.cases["matrices"]:
            if (case.arrangement, case.method) == (arrangement, method):
                counts = measured.counts[case]
                ratio = bytes_over_least(counts)
                moved = counts.traffic.num_bytes / 1e6 if ratio is None else ratio
                points.append((case.num_matrices, moved))
        _draw(axes, points, method)
    if has_least:
        axes.set_yscale("log")
        axes.set_ylim(0.8, 1500)
        axes.axhline(1, color="black", linewidth=0.8, label="each matrix there and back")
    label = "bytes received / least" if has_least else "MB received by a device"
    _finish(axes, arrangement, settings.matrices, "number of matrices", label)


def _depths(
    axes: Axes, measured: Measurements, settings: Settings, arrangement: Arrangement
) -> None:
    """Megabytes by depth, and the least."""
    least = {}
    for method in settings.methods:
        points = []
        for case in measured.cases["depth"]:
            if (case.arrangement, case.method) == (arrangement, method) and not case.is_traced:
                counts = measured.counts[case]
                points.append((case.depth, counts.traffic.num_bytes / 1e6))
                least[case.depth] = counts.least_bytes / 1e6
        if method != "optax":
            _draw(axes, points, method)
    if least:
        ends = sorted(least.items())
        label = "each active matrix there and back"
        axes.plot(*zip(*ends, strict=True), color="black", linewidth=0.8, label=label)
        axes.set_ylim(bottom=0)
        label = f"first active layer of {settings.layers}"
        _finish(axes, arrangement, list(least), label, "MB received by a device", log=False)


def _draw(axes: Axes, points: Sequence[tuple[int, float]], method: Method) -> None:
    if points:
        colour, marker, size = STYLES[method]
        x, y = zip(*points, strict=True)
        axes.plot(
            *(x, y, marker + "-"), color=colour, label=TITLES[method], markersize=size,
            markerfacecolor="none" if size > 6 else colour,
        )  # fmt: skip


def _finish(
    axes: Axes,
    arrangement: Arrangement,
    ticks: tuple[int, ...] | list[int],
    x_label: str,
    y_label: str,
    log: bool = True,
) -> None:
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_title(f"{arrangement}: {ARRANGED[arrangement]}", fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)


def _modelled(
    axes: Axes, steps: list[ModelledStep], network: NetworkName, pods: tuple[int, ...]
) -> None:
    """Stacked bars, side by side for each pod."""
    by_key = {
        (step.devices, step.optimizer, step.sharing): step
        for step in steps
        if step.network == network
    }
    positions, labels = [], []
    for group, devices in enumerate(pods):
        for place, (optimizer, sharing, label) in enumerate(BARS):
            step, x, bottom = by_key[devices, optimizer, sharing], group * 6 + place, 0.0
            for name, colour, title in PARTS:
                height = 1000 * getattr(step, name)
                text = title if not positions else None
                axes.bar(x, height, 0.85, bottom, color=colour, label=text)
                bottom += height
            share = f"{step.optimizer_share:.0%}"
            axes.text(x, bottom, share, ha="center", va="bottom", fontsize=7)
            positions.append(x)
            labels.append("Drop" if optimizer == "Drop-Muon" else label)
    for group, devices in enumerate(pods):
        axes.text(
            *(group * 6 + 2, -0.2, f"{devices} devices"),
            transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=9,
        )  # fmt: skip
    axes.set_xticks(positions, labels=labels, rotation=90, fontsize=8)
    axes.margins(y=0.35)  # for the legend
    axes.set_title(f"{network}: {NOTE}\n(above: the optimizer's share)", fontsize=10)
    axes.set_ylabel("modelled ms of a step")
    axes.grid(axis="y", alpha=0.3)
