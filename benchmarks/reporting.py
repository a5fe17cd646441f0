"""What the race leaves behind: tables on the terminal and numbers in race.json."""

import dataclasses
import statistics
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from racing import Contest
from records import environment
from settings import METHODS, Settings
from targets import Summary, median_and_spread, show_speed_up

TITLES = {
    "muon": "Muon",
    "muon_short": "Muon, shorter run",
    "drop_muon_uniform": "Drop-Muon, uniform",
    "drop_muon_epoch_shift": "Drop-Muon, epoch-shift",
    "drop_muon_time_aware": "Drop-Muon, time-aware",
    "optax_muon": "optax.contrib.muon",
    "adamw": "AdamW",
    "scion": "Scion",
    "scion_constrained": "Scion, constrained",
    "gluon": "Gluon",
    "drop_scion": "Drop-Scion, uniform",
    "drop_gluon": "Drop-Gluon, uniform",
    "muon_with_mvr": "Muon, MVR-1",
    "drop_muon_with_mvr": "Drop-Muon, MVR-1",
}
assert set(TITLES) == set(METHODS)


def print_tables(
    console: Console, settings: Settings, contest: Contest, summaries: list[Summary]
) -> None:
    """Who reached which accuracy when, what everyone reached at the end, and what a step costs."""
    count = len(settings.seeds)
    seeds = f"{count} seeds: median (smallest–largest)" if count > 1 else "one seed"
    seeds += "; training seconds, without compilation and evaluation"
    table = new_table(f"Time to accuracy on {settings.dataset}", seeds)
    for heading in ("seconds", "steps", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for summary in summaries:
        if summary.target is not previous:
            previous = summary.target
            table.add_section()
            table.add_row(f"[bold]{previous.split} ≥ {previous.label}")
        table.add_row(
            f"  {TITLES[summary.method]}",
            median_and_spread(summary.seconds),
            median_and_spread(summary.steps, digits=0),
            show_speed_up(summary),
        )
    console.print(table)

    table = new_table("At the end", seeds)
    for heading in ("train %", "test %", "seconds"):
        table.add_column(heading, justify="right", no_wrap=heading != "seconds")
    for method in settings.methods:
        runs = [run for run in contest.runs if run.method == method]
        table.add_row(
            TITLES[method],
            median_and_spread([100 * run.train_accuracy[-1] for run in runs]),
            median_and_spread([100 * run.test_accuracy[-1] for run in runs]),
            median_and_spread([run.seconds[-1] for run in runs]),
        )
    console.print(table)

    table = new_table("What a step costs, and its compilation", "by depth, shallow to deep")
    for heading in ("ms a step", "seconds to compile"):
        table.add_column(heading, justify="right", no_wrap=True)
    for method in settings.methods:
        table.add_row(
            TITLES[method],
            " / ".join(f"{1000 * seconds:.0f}" for seconds in contest.step_seconds[method]),
            " / ".join(f"{seconds:.1f}" for seconds in contest.compile_seconds[method]),
        )
    console.print(table)


def new_table(title: str, note: str) -> Table:
    """One that fits into 80 columns."""
    table = Table(title=f"{title}\n{note}", box=SIMPLE, pad_edge=False)
    table.add_column("method", no_wrap=True)
    return table


def provenance(benchmark: str, settings: Settings) -> dict[str, Any]:
    """What was run, with which arguments and where, without paths of the machine."""
    arguments = dataclasses.asdict(settings)
    for path in ("data_dir", "output_dir"):
        del arguments[path]
    return {"benchmark": benchmark, "arguments": arguments, "environment": environment()}


def record(settings: Settings, contest: Contest, summaries: list[Summary]) -> dict[str, Any]:
    """Everything as plain numbers: arguments, environment, summary, every curve."""
    return {
        **provenance("race", settings),
        "steps_per_epoch": contest.steps_per_epoch,
        "compile_seconds_by_depth": contest.compile_seconds,
        "step_seconds_by_depth": contest.step_seconds,
        "depth_costs_in_seconds": contest.depth_costs,
        "probability_of_depth_by_epoch": contest.probabilities,
        "targets": [
            {
                "method": summary.method,
                "split": summary.target.split,
                "target": summary.target.label,
                "accuracy_by_seed": list(summary.target.accuracy.values()),
                "seconds_by_seed": summary.seconds,
                "steps_by_seed": summary.steps,
                "num_seeds_reached": summary.num_reached,
                "speed_up_against_muon_by_seed": summary.speed_ups,
                "speed_up_against_muon": (
                    statistics.median(summary.speed_ups) if summary.speed_ups else None
                ),
            }
            for summary in summaries
        ],
        "curves": [dataclasses.asdict(run) for run in contest.runs],
    }
