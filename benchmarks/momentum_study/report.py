"""What the study leaves behind: tables and plain numbers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from momentum_study.contest import Contest
from momentum_study.methods import TITLES
from momentum_study.outcomes import AXES, NEVER, Outcome, verdict
from momentum_study.settings import Settings
from momentum_study.training import Study
from records import environment
from text import Text


def print_tables(console: Console, settings: Settings, outcomes: Sequence[Outcome]) -> None:
    """For each batch size what every method reached and what it took, and what that says."""
    for batch_size in settings.batch_sizes:
        of_size = [o for o in outcomes if o.grid.batch_size == batch_size]
        console.print(_table(settings, of_size))
        at_edge = [TITLES[o.method] for o in of_size if o.grid.best_is_at_edge]
        if at_edge:
            console.print(
                "Better rates may lie outside of the grid, whose edge is the best of "
                f"{'; '.join(at_edge)}.",
                highlight=False,
                soft_wrap=True,
            )
    for batch_size in settings.batch_sizes:
        console.print(verdict(batch_size, outcomes), highlight=False, soft_wrap=True)


def _table(settings: Settings, outcomes: Sequence[Outcome]) -> Table:
    count = len(settings.seeds)
    title = (
        f"Batch {outcomes[0].grid.batch_size}, {settings.num_steps} steps of EMA, "
        f"{'one seed' if count == 1 else f'{count} seeds'}\n"
        "loss: mean ± half the range; ratios: to reach EMA's final test loss, medians"
        "\n* at the edge of the grid"
    )
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    headings = (
        "best\nrate",
        "final\ntest loss",
        "steps",
        "gra-\ndients",
        "sec-\nonds",
        "ms a\nstep",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    best = min(outcomes, key=lambda o: o.test_loss)
    for outcome in outcomes:
        loss = f"{outcome.test_loss:.4f}"
        if outcome is best:
            loss = f"[bold]{loss}[/bold]"
        if count > 1 and math.isfinite(outcome.half_range):
            loss += f" ± {outcome.half_range:.4f}"
        table.add_row(
            TITLES[outcome.method],
            f"{outcome.grid.best_rate:g}{'*' if outcome.grid.best_is_at_edge else ''}",
            loss if math.isfinite(outcome.test_loss) else "diverged",
            *("—" if outcome.ratios[a] == NEVER else f"{outcome.ratios[a]:.2f}" for a in AXES),
            f"{1000 * outcome.seconds_per_step:.0f}",
        )
    return table


def record(
    settings: Settings, text: Text, study: Study, contest: Contest, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Everything as plain numbers."""
    arguments = dataclasses.asdict(settings)
    del arguments["output_dir"]  # of the machine, not of the measurement
    return {
        "benchmark": "momentum",
        "arguments": arguments,
        "environment": environment(),
        "text": text.record(),
        "tuning": [
            dataclasses.asdict(grid)
            | {"best_learning_rate": grid.best_rate, "best_is_at_edge": grid.best_is_at_edge}
            for grid in contest.grids
        ],
        "outcomes": [
            {
                "method": outcome.method,
                "batch_size": outcome.grid.batch_size,
                "learning_rate": outcome.grid.best_rate,
                "test_loss": outcome.test_loss,
                "test_loss_half_range": outcome.half_range,
                "validation_loss": outcome.validation_loss,
                "ratios_to_reach_ema": outcome.ratios,
                "seconds_per_step": outcome.seconds_per_step,
                "compile_seconds": study.compile_seconds[outcome.method, outcome.grid.batch_size],
            }
            for outcome in outcomes
        ],
        "verdicts": [verdict(batch_size, outcomes) for batch_size in settings.batch_sizes],
        "curves": [dataclasses.asdict(run) for run in contest.runs],
    }
