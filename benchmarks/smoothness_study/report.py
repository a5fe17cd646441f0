"""What the study leaves behind: tables, a plot of the sweeps and plain numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import dropmuon_jax as dm
from smoothness_study.comparison import Sweep
from smoothness_study.training import GRADIENTS, SampleKind, Samples

# Okabe and Ito's colours, which colour-blind readers can tell apart; a marker as well.
STYLES: dict[SampleKind | None, tuple[str, str]] = {
    "exact": ("#0072B2", "o"),
    "minibatch": ("#D55E00", "s"),
    "same batch": ("#009E73", "^"),
    None: ("#777777", "x"),
}


def noise_by_leaf(samples: Mapping[SampleKind, Samples]) -> dict[str, tuple[float, float]]:
    """Median L̂ of different batches over L̂ of the same batch, in each half of the run."""
    ratios = {}
    for path, noisy in samples["minibatch"].items():
        clean = samples["same batch"][path]
        _, rows, clean_rows = np.intersect1d(noisy.steps, clean.steps, return_indices=True)
        of_steps = noisy.smoothness[rows] / clean.smoothness[clean_rows]
        first, second = np.array_split(of_steps, 2)
        ratios[path] = float(np.median(first)), float(np.median(second))
    return ratios


def print_tables(
    console: Console,
    samples: Mapping[SampleKind, Samples],
    fits: Mapping[SampleKind, dm.planning.SmoothnessFit],
    sweeps: Sequence[Sweep],
) -> None:
    """The fits, the noise of minibatches, the sweeps, and what they say."""
    for kind, fit in fits.items():
        console.print(f"\nSmoothness of {_gradients_of(kind)}:\n{fit}", highlight=False)
    table = _table("How much of L̂ is noise", "L̂ of different batches / of the same, medians")
    table.add_column("leaf", no_wrap=True)
    for heading in ("first half", "second half"):
        table.add_column(heading, justify="right")
    for path, (first, second) in noise_by_leaf(samples).items():
        table.add_row(path, f"{first:.1f}×", f"{second:.1f}×")
    console.print(table)
    predicted = [sweep for sweep in sweeps if sweep.fit]
    constant = [sweep for sweep in sweeps if not sweep.fit]
    console.print(_sweep_table("Predicted radii", "multiplier", predicted))
    console.print(_sweep_table("One radius for every leaf", "radius", constant))
    for sweep in sweeps:
        console.print(verdict(sweep, sweeps), highlight=False)


def verdict(sweep: Sweep, sweeps: Sequence[Sweep]) -> str:
    """What a sweep found, in a sentence."""
    value, loss = sweep.values[sweep.best], sweep.losses[sweep.best]
    edge = " (the edge of the grid)" if sweep.best_at_edge else ""
    if sweep.fit is None:
        return f"{sweep.title}: best at {value:g}{edge}, loss {loss:.2g}."
    sentence = f"{sweep.title}: best at {value:g} × the predicted radii{edge}, loss {loss:.2g}"
    if 1.0 in sweep.values:
        at_one = sweep.losses[sweep.values.index(1.0)]
        constant = next(s for s in sweeps if s.gradients == sweep.gradients and s.fit is None)
        rank = sum(loss < at_one for loss in constant.losses)
        sentence += (
            f"; as predicted {at_one:.2g}, which {rank} of {len(constant.values)} constant radii "
            "beat"
        )
    return sentence + "."


def _gradients_of(kind: SampleKind) -> str:
    return {
        "exact": "exact gradients",
        "minibatch": "minibatch gradients, of different batches",
        "same batch": "minibatch gradients, two of the same batch",
    }[kind]


def _sweep_table(title: str, swept: str, sweeps: Sequence[Sweep]) -> Table:
    table = _table(
        title, "training loss, test accuracy after equal steps\n(steps that raised the loss)"
    )
    table.add_column(swept, justify="right")
    for sweep in sweeps:
        fit = f"\nfit: {sweep.fit}" if sweep.fit else ""
        table.add_column(f"{sweep.gradients}{fit}", justify="right", no_wrap=True)
    for i, value in enumerate(sweeps[0].values):
        table.add_row(f"{value:g}", *(_cell(sweep, i) for sweep in sweeps))
    return table


def _cell(sweep: Sweep, i: int) -> str:
    loss = f"{sweep.losses[i]:.4f}"
    text = f"[bold]{loss}[/bold]" if i == sweep.best else loss
    uphill = sweep.uphill[i]
    rises = "" if uphill is None else f" ({uphill:3.0%})"
    return f"{text} {sweep.accuracies[i]:6.1%}{rises}"


def _table(title: str, note: str) -> Table:
    return Table(title=f"{title}\n{note}", box=SIMPLE, pad_edge=False)


def sweep_figure(sweeps: Sequence[Sweep]) -> Figure:
    """Loss against the multiplier of predicted radii, and against a radius for every leaf."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row", squeeze=False)
    for row, gradients in zip(panels, GRADIENTS, strict=True):
        labels = ("multiplier of predicted radii", "radius of every leaf")
        for axes, label in zip(row, labels, strict=True):
            for sweep in sweeps:
                if sweep.gradients == gradients and (sweep.fit is None) == (axes is row[1]):
                    colour, marker = STYLES[sweep.fit]
                    name = f"fit: {sweep.fit}" if sweep.fit else "one radius"
                    axes.plot(sweep.values, sweep.losses, marker=marker, color=colour, label=name)
                    axes.set_xscale("log")
                    axes.set_xticks(sweep.values, [f"{value:g}" for value in sweep.values])
            axes.minorticks_off()
            axes.set_yscale("log")
            axes.set_xlabel(label)
            axes.set_title(f"{gradients} gradients")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        row[0].axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        row[0].set_ylabel("final training loss")
    return figure


def record(
    samples: Mapping[SampleKind, Samples],
    fits: Mapping[SampleKind, dm.planning.SmoothnessFit],
    sweeps: Sequence[Sweep],
) -> dict[str, Any]:
    """Everything as plain numbers."""
    return {
        "fits": {
            kind: {
                path: leaf._asdict() | {"radius": leaf.radius} for path, leaf in fit.leaves.items()
            }
            for kind, fit in fits.items()
        },
        "samples": {
            kind: {
                path: {name: values.tolist() for name, values in of_leaf._asdict().items()}
                for path, of_leaf in of_kind.items()
            }
            for kind, of_kind in samples.items()
        },
        "noise_by_leaf": noise_by_leaf(samples),
        "sweeps": [
            dataclasses.asdict(sweep)
            | {
                "losses": sweep.losses,
                "uphill": sweep.uphill,
                "best": sweep.values[sweep.best],
                "best_at_edge": sweep.best_at_edge,
            }
            for sweep in sweeps
        ],
    }
