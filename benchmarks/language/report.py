"""What the race leaves behind: tables and plain numbers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from language.contest import Contest
from language.methods import TITLES
from language.outcomes import AXES, Axis, Outcome, half_range, verdicts
from language.settings import Settings, count_seeds
from language.training import Race
from records import environment
from text import Text

UNITS: dict[Axis, str] = {"steps": "in steps", "seconds": "in seconds"}


def print_tables(console: Console, settings: Settings, outcomes: Sequence[Outcome]) -> None:
    """Where every method ends, and how much sooner than Muon it was where Muon was."""
    console.print(_ends(settings, outcomes))
    at_edge = [TITLES[outcome.method] for outcome in outcomes if outcome.grid.best_is_at_edge]
    if at_edge:
        sentence = "Better rates may lie outside of the grid, whose edge is the best of "
        console.print(f"{sentence}{'; '.join(at_edge)}.", highlight=False, soft_wrap=True)
    console.print(_speed_ups(settings, outcomes))
    for verdict in verdicts(outcomes):
        console.print(verdict, highlight=False, soft_wrap=True)


def _ends(settings: Settings, outcomes: Sequence[Outcome]) -> Table:
    note = f"loss in nats a character: mean ± half the range of {count_seeds(settings)}"
    table = _new_table("At the end", f"{note}\n* at the edge of the grid")
    for heading in ("best\nrate", "validation\nloss", "test\nloss", "steps", "sec-\nonds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(
            TITLES[outcome.method],
            f"{outcome.grid.best_rate:g}{'*' if outcome.grid.best_is_at_edge else ''}",
            _with_spread(outcome.validation_losses),
            _with_spread(outcome.test_losses),
            f"{outcome.runs[0].steps[-1]}",
            f"{outcome.seconds:.1f}",
        )
    return table


def _speed_ups(settings: Settings, outcomes: Sequence[Outcome]) -> Table:
    note = f"times faster than Muon, median of {count_seeds(settings)}; — not reached"
    table = _new_table("To Muon's validation loss after parts of its run", note)
    table.add_column("", no_wrap=True)
    for target in settings.targets:
        table.add_column(f"{100 * target:.4g} %", justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_section()
        for axis in AXES:
            ratios = [attainment.speed_up(axis) for attainment in outcome.attainments]
            table.add_row(
                TITLES[outcome.method] if axis == AXES[0] else "",
                UNITS[axis],
                *("—" if ratio is None else f"{ratio:.2f}×" for ratio in ratios),
            )
    return table


def _new_table(title: str, note: str) -> Table:
    table = Table(title=f"{title}\n{note}", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    return table


def _with_spread(losses: Sequence[float]) -> str:
    if not math.isfinite(max(losses)):
        return "diverged"
    mean = f"{sum(losses) / len(losses):.4f}"
    return mean if len(losses) == 1 else f"{mean} ± {half_range(losses):.4f}"


def record(
    settings: Settings, text: Text, race: Race, contest: Contest, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Everything as plain numbers."""
    arguments = dataclasses.asdict(settings)
    del arguments["output_dir"]  # of the machine, not of the measurement
    params = jax.eval_shape(race.init_params, 0)
    return {
        "benchmark": "language_race",
        "arguments": arguments,
        "environment": environment(),
        "text": text.record(),
        "network": {
            "num_layers": race.layers.num_layers,
            "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        },
        "depth_costs_in_seconds": race.measured_costs,
        "compilation": {
            name: {"num_compilations": len(seconds), "seconds": sum(seconds)}
            for name, seconds in race.compile_seconds.items()
        },
        "tuning": [
            {"method": name}
            | dataclasses.asdict(grid)
            | {"best_learning_rate": grid.best_rate, "best_is_at_edge": grid.best_is_at_edge}
            for name, grid in contest.grids.items()
        ],
        "outcomes": [
            {
                "method": outcome.method,
                "learning_rate": outcome.grid.best_rate,
                "num_steps": outcome.runs[0].steps[-1],
                "seconds": outcome.seconds,
                "seconds_per_step": outcome.seconds_per_step,
                "mean_depth": outcome.mean_depth,
                "validation_losses": outcome.validation_losses,
                "test_losses": outcome.test_losses,
                "test_loss": outcome.test_loss,
                "test_loss_half_range": half_range(outcome.test_losses),
            }
            for outcome in outcomes
        ],
        "targets": [
            {
                "method": outcome.method,
                "part_of_muons_run": attainment.target,
                "validation_losses": attainment.losses,
                "num_seeds_reached": attainment.num_reached,
            }
            | {f"{axis}_by_seed": attainment.reached[axis] for axis in AXES}
            | {f"speed_up_in_{axis}": attainment.speed_up(axis) for axis in AXES}
            for outcome in outcomes
            for attainment in outcome.attainments
        ],
        "verdicts": verdicts(outcomes),
        "curves": [dataclasses.asdict(run) for run in contest.runs],
    }
