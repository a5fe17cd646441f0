"""What the two gradients of variance reduction cost at each depth, in gradients.

python benchmarks/two_gradients.py --output-dir results
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

import dropmuon_jax as dm
from records import environment, to_json
from steps_by_depth import (
    DepthSettings,
    ModelName,
    Subject,
    check_settings,
    init_params,
    make_subject,
)

FORMS = ("in turn", "stacked")
STYLES = {"in turn": ("#0072B2", "o"), "stacked": ("#D55E00", "s")}
ALLOWED = 2.04  # twice the truncated gradient, and 2 %


@dataclasses.dataclass(frozen=True)
class Settings(DepthSettings):
    """Compare two gradients of one batch with one, at each depth, in both forms."""


class Program(NamedTuple):
    """A compiled gradient, or two, and its arguments."""

    compiled: Any
    arguments: tuple[Any, ...]

    def flops(self) -> float:
        """By XLA's cost analysis."""
        return float(self.compiled.cost_analysis()["flops"])

    def temporary_bytes(self) -> int:
        """By XLA's memory analysis."""
        return int(self.compiled.memory_analysis().temp_size_in_bytes)

    def seconds(self) -> float:
        """Of one evaluation."""
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Cost:
    """One form at one depth of one network, in units of one truncated gradient."""

    model: ModelName
    depth: int
    form: str
    flops: float
    temporary_bytes: float
    seconds: float | None


def compile_programs(subject: Subject, depth: int) -> dict[str, Program]:
    """One gradient, "one", and both forms of two."""
    params = init_params(subject)
    prev_params = jax.tree.map(lambda leaf: 0.9 * leaf, params)
    mask = subject.layers().mask(depth)

    def loss_fn(params, batch):
        return subject.loss(params, batch, depth)

    def one(now, batch):
        return dm.masked_value_and_grad(loss_fn)(now, batch, layer_mask=mask)

    def in_turn(now, old, batch):
        gradients = dm.masked_value_and_grad_pair(loss_fn)
        return gradients(now, old, batch, layer_mask=mask)

    def stacked(now, old, batch):
        both = jax.tree.map(_both_points, mask, now, old)
        axes = jax.tree.map(lambda flag: 0 if np.any(flag) else None, mask)
        values, grads = jax.vmap(lambda at: one(at, batch), in_axes=(axes,))(both)
        first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], grads) for i in (0, 1))
        return values[0], (first, second)

    both = (params, prev_params, subject.batch)
    return {
        "one": _compile(one, params, subject.batch),
        "in turn": _compile(in_turn, *both),
        "stacked": _compile(stacked, *both),
    }


def _both_points(flag: Any, now: jax.Array, old: jax.Array) -> jax.Array:
    """An active leaf, or one with active rows, now and before, stacked; another as it is now."""
    if not np.any(flag):
        return now
    if np.ndim(flag):
        old = jnp.where(np.reshape(flag, (-1, *[1] * (now.ndim - 1))), old, now)
    return jnp.stack([now, old])


def _compile(function: Callable[..., Any], *arguments: Any) -> Program:
    return Program(jax.jit(function).lower(*arguments).compile(), arguments)


def measure(settings: Settings, model: ModelName, console: Console) -> list[Cost]:
    """Every depth of one network, with progress bars."""
    subject = make_subject(model, settings)
    depths = range(subject.layers().num_layers)
    programs = {
        (depth, name): program
        for depth in track(depths, f"{model}: compiling", console=console)
        for name, program in compile_programs(subject, depth).items()
    }
    # Programs take turns, so that the machine's noise meets all of them; the first round warms up.
    samples: dict[Any, list[float]] = {key: [] for key in programs}
    rounds = settings.repetitions + 1 if settings.repetitions else 0
    for repetition in track(range(rounds), f"{model}: timing", console=console):
        for key, program in programs.items():
            seconds = program.seconds()
            if repetition > 0:
                samples[key].append(seconds)
    costs = []
    for depth in depths:
        one = programs[depth, "one"]
        for form in FORMS:
            two = programs[depth, form]
            ratios = [
                a / b for a, b in zip(samples[depth, form], samples[depth, "one"], strict=True)
            ]
            costs.append(
                Cost(
                    model,
                    depth,
                    form,
                    two.flops() / one.flops(),
                    two.temporary_bytes() / max(one.temporary_bytes(), 1),
                    statistics.median(ratios) if ratios else None,
                )
            )
    return costs


def print_table(console: Console, costs: Sequence[Cost]) -> None:
    """Each form at each depth, and the verdict on the FLOPs."""
    table = Table(
        title="Two gradients of a batch, in truncated gradients", box=SIMPLE, pad_edge=False
    )
    table.add_column("network, depth", no_wrap=True)
    for form in FORMS:
        for heading in ("FLOPs", "memory", "time"):
            table.add_column(f"{form}\n{heading}", justify="right", no_wrap=True)
    rows: dict[tuple[str, int], list[str]] = {}
    for cost in costs:
        seconds = "–" if cost.seconds is None else f"{cost.seconds:.2f}"
        cells = [f"{cost.flops:.3f}", f"{cost.temporary_bytes:.2f}", seconds]
        rows.setdefault((cost.model, cost.depth), []).extend(cells)
    for (model, depth), cells in rows.items():
        table.add_row(f"{model} {depth}", *cells)
    console.print(table)
    for form in FORMS:
        own = [cost for cost in costs if cost.form == form]
        worst = max(own, key=lambda cost: cost.flops)
        verdict = "within" if worst.flops <= ALLOWED else "NOT within"
        console.print(
            f"{form}: at most {worst.flops:.3f} × the FLOPs ({worst.model}, depth {worst.depth}): "
            f"{verdict} 2 % of twice.",
            highlight=False,
        )
        times = [cost.seconds for cost in own if cost.seconds is not None]
        if times:
            console.print(
                f"{form}: {statistics.geometric_mean(times):.2f} × the time in the geometric mean, "
                f"{min(times):.2f} to {max(times):.2f}.",
                highlight=False,
            )


def make_figure(costs: Sequence[Cost]) -> Figure:
    """A panel for each network and metric."""
    models = list(dict.fromkeys(cost.model for cost in costs))
    metrics = [("flops", "FLOPs"), ("temporary_bytes", "temporary memory")]
    if all(cost.seconds is not None for cost in costs):
        metrics.append(("seconds", "time"))
    figure = Figure(figsize=(4.2 * len(metrics), 2.8 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(metrics), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        for axes, (metric, label) in zip(row, metrics, strict=True):
            for form, (colour, marker) in STYLES.items():
                own = [cost for cost in costs if (cost.model, cost.form) == (model, form)]
                heights = [getattr(cost, metric) for cost in own]
                depths = [cost.depth for cost in own]
                axes.plot(depths, heights, color=colour, marker=marker, label=form)
            axes.axhline(2, color="black", linewidth=0.8, linestyle=":")
            axes.set_xticks(sorted({cost.depth for cost in costs if cost.model == model}))
            axes.set_ylim(bottom=0)
            axes.set_title(model)
            axes.set_xlabel("depth (0 trains all layers)")
            axes.set_ylabel(f"{label}, in gradients")
            axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    costs = [cost for model in settings.models for cost in measure(settings, model, console)]
    arguments_record = dataclasses.asdict(settings)
    del arguments_record["output_dir"]  # of the machine, not of the measurement
    text = to_json(
        {
            "benchmark": "two_gradients",
            "arguments": arguments_record,
            "environment": environment(),
            "costs": [dataclasses.asdict(cost) for cost in costs],
        }
    )
    (settings.output_dir / "two_gradients.json").write_text(text, encoding="utf-8")
    make_figure(costs).savefig(settings.output_dir / "two_gradients.png", dpi=150)
    print_table(console, costs)
    console.print(f"Written to {settings.output_dir}: two_gradients.json, two_gradients.png")


if __name__ == "__main__":
    main()
