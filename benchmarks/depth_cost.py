"""What a step costs at each depth, beside a network in which only those layers are trainable.

python benchmarks/depth_cost.py --output-dir results
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import tyro
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from records import environment, to_json
from steps_by_depth import (
    MODELS,
    DepthSettings,
    ModelName,
    check_settings,
    make_subject,
    step_by_hand,
    step_of_package,
)

ALLOWED_GAP = 0.02
GAPS = ("flops_gap", "memory_gap", "traffic_gap", "seconds_gap")


@dataclasses.dataclass(frozen=True)
class Settings(DepthSettings):
    """Compare FLOPs, memory and time of a step at each depth with a step by hand."""

    models: tuple[ModelName, ...] = MODELS
    """Networks to measure."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """A step at one depth of one network; a gap is package / by hand − 1."""

    model: ModelName
    depth: int
    layer: str
    flops: float
    flops_by_hand: float
    temporary_bytes: int
    temporary_bytes_by_hand: int
    bytes_accessed: float
    bytes_accessed_by_hand: float
    seconds: float | None
    seconds_by_hand: float | None

    @property
    def flops_gap(self) -> float:
        """Of the floating-point operations."""
        return self.flops / self.flops_by_hand - 1

    @property
    def memory_gap(self) -> float:
        """Of the temporary memory."""
        return self.temporary_bytes / self.temporary_bytes_by_hand - 1

    @property
    def traffic_gap(self) -> float:
        """Of the bytes read and written."""
        return self.bytes_accessed / self.bytes_accessed_by_hand - 1

    @property
    def seconds_gap(self) -> float | None:
        """Of the median time."""
        if self.seconds is None or self.seconds_by_hand is None:
            return None
        return self.seconds / self.seconds_by_hand - 1


def measure(settings: Settings, model: ModelName, console: Console) -> list[Cost]:
    """Every depth of one network, with progress bars."""
    subject = make_subject(model, settings)
    layers = subject.layers()
    depths = range(layers.num_layers)
    steps = {}
    for depth in track(depths, f"{model}: compiling", console=console):
        for make in (step_of_package, step_by_hand):
            steps[depth, make] = make(subject, depth)
    # Steps of all depths and both kinds take turns; the first round warms up.
    samples: dict[Any, list[float]] = {key: [] for key in steps}
    rounds = settings.repetitions + 1 if settings.repetitions else 0
    for repetition in track(range(rounds), f"{model}: timing", console=console):
        for key in steps:
            start = time.perf_counter()
            steps[key] = steps[key].run()
            if repetition > 0:
                samples[key].append(time.perf_counter() - start)
    costs = []
    for depth in depths:
        package, by_hand = (depth, step_of_package), (depth, step_by_hand)
        costs.append(
            Cost(
                model,
                depth,
                layers.names[depth],
                steps[package].flops(),
                steps[by_hand].flops(),
                steps[package].temporary_bytes(),
                steps[by_hand].temporary_bytes(),
                steps[package].bytes_accessed(),
                steps[by_hand].bytes_accessed(),
                statistics.median(samples[package]) if samples[package] else None,
                statistics.median(samples[by_hand]) if samples[by_hand] else None,
            )
        )
    return costs


def print_table(console: Console, costs: Sequence[Cost]) -> None:
    """Every depth, and how far it is from the step by hand."""
    table = Table(
        title="A step at each depth; in brackets against the step by hand",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("from layer", no_wrap=True)
    for heading in ("MFLOP", "temp. MiB", "MiB moved", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for cost in costs:
        if cost.model != previous:
            previous = cost.model
            table.add_section()
            table.add_row(f"[bold]{cost.model}")
        table.add_row(
            f" {cost.depth} {cost.layer}",
            f"{cost.flops / 1e6:.1f} {_gap(cost.flops_gap)}",
            f"{cost.temporary_bytes / 2**20:.1f} {_gap(cost.memory_gap)}",
            f"{cost.bytes_accessed / 2**20:.1f} {_gap(cost.traffic_gap)}",
            (
                "–"
                if cost.seconds is None or cost.seconds_gap is None
                else f"{cost.seconds * 1000:.1f} ({cost.seconds_gap:+.0%})"
            ),
        )
    console.print(table)
    for name, gap in (
        ("FLOPs", "flops_gap"),
        ("temporary memory", "memory_gap"),
        ("bytes moved", "traffic_gap"),
    ):
        worst = max(costs, key=lambda cost: abs(getattr(cost, gap)))
        worst_gap = getattr(worst, gap)
        verdict = "within" if abs(worst_gap) <= ALLOWED_GAP else "NOT within"
        console.print(
            f"Largest gap in {name}: {worst_gap:+.4%}, {worst.model} at depth {worst.depth}: "
            f"{verdict} {ALLOWED_GAP:.0%}.",
            highlight=False,
        )


def _gap(gap: float) -> str:
    text = f"({gap:+.1%})"
    return text if abs(gap) <= ALLOWED_GAP else f"[red]{text}[/red]"


def make_figure(costs: Sequence[Cost]) -> Figure:
    """A row for each network; bars of both steps at each depth."""
    models = list(dict.fromkeys(cost.model for cost in costs))
    metrics = [
        ("flops", 1e-6, "MFLOP (XLA's cost analysis)"),
        ("temporary_bytes", 2**-20, "temporary memory (MiB)"),
        ("bytes_accessed", 2**-20, "bytes moved (MiB)"),
    ]
    if all(cost.seconds is not None for cost in costs):
        metrics.append(("seconds", 1e3, "median time (ms)"))
    figure = Figure(figsize=(4.2 * len(metrics), 3 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(metrics), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        own = [cost for cost in costs if cost.model == model]
        for axes, (metric, unit, label) in zip(row, metrics, strict=True):
            for shift, suffix, colour, title in (
                (-0.2, "", "#0072B2", "dropmuon_jax"),
                (0.2, "_by_hand", "#999999", "by hand, only these layers trainable"),
            ):
                heights = [getattr(cost, metric + suffix) * unit for cost in own]
                positions = [cost.depth + shift for cost in own]
                axes.bar(positions, heights, 0.4, color=colour, label=title)
            axes.set_xticks([cost.depth for cost in own])
            axes.set_title(model)
            axes.set_xlabel("depth (0 trains all layers)")
            axes.set_ylabel(label)
            axes.grid(axis="y", alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    costs = []
    for model in settings.models:
        costs += measure(settings, model, console)
    arguments_record = dataclasses.asdict(settings)
    del arguments_record["output_dir"]  # of the machine, not of the measurement
    rows = [
        dataclasses.asdict(cost) | {name: getattr(cost, name) for name in GAPS} for cost in costs
    ]
    text = to_json(
        {
            "benchmark": "depth_cost",
            "arguments": arguments_record,
            "environment": environment(),
            "costs": rows,
        }
    )
    (settings.output_dir / "depth_cost.json").write_text(text, encoding="utf-8")
    make_figure(costs).savefig(settings.output_dir / "depth_cost.png", dpi=150)
    print_table(console, costs)
    console.print(f"Written to {settings.output_dir}: depth_cost.json, depth_cost.png")


if __name__ == "__main__":
    main()
