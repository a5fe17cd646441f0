"""What the paper's figures leave behind: tables and plain numbers."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from paper_study.contest import Contest
from paper_study.outcomes import OPPONENTS, Outcome, SpeedUp, part_label, verdicts
from paper_study.presets import left_out
from paper_study.settings import Settings
from reporting import TITLES
from targets import SPLITS


def print_tables(
    console: Console, settings: Settings, contests: Sequence[Contest], outcomes: Sequence[Outcome]
) -> None:
    """Speed-ups against each opponent, accuracy after equal time, and what was hoped for."""
    for contest, outcome in zip(contests, outcomes, strict=True):
        console.print(_ends(settings, contest, outcome))
        opponents = [name for name in OPPONENTS if name in contest.chosen.race.methods]
        for opponent in opponents:
            for split in SPLITS:
                found = [
                    speed_up
                    for speed_up in outcome.speed_ups
                    if speed_up.split == split
                    and speed_up.opponent == opponent
                    and speed_up.method != opponent
                ]
                console.print(_speed_ups(contest, found))
        if contest.prediction:
            console.print(_prediction(settings, contest, outcome), highlight=False, soft_wrap=True)
        for sentence in verdicts(settings, outcome, contest.chosen.race.dataset):
            console.print(sentence, highlight=False, soft_wrap=True)
    missing = left_out(settings, [contest.chosen.race.dataset for contest in contests])
    if missing:
        console.print(f"[bold]Without {', '.join(missing)}: not at hand, or not asked for.[/bold]")


def _ends(settings: Settings, contest: Contest, outcome: Outcome) -> Table:
    """Rates, final accuracy and time."""
    race = contest.chosen.race
    note = f"median of {len(settings.seeds)} seeds; * best rate at the edge of the grid"
    table = _new_table(f"{race.dataset}: whole runs", note)
    for heading in ("rate", "train %", "test %", "time in\nMuon's", "test at Muon's\nend, points"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, equal in zip(race.methods, outcome.equal_time, strict=True):
        runs = [run for run in contest.runs if run.method == name]
        edge = "*" if name in contest.grids and contest.grids[name].best_is_at_edge else ""
        table.add_row(
            TITLES[name],
            f"{contest.learning_rates[name]:g}{edge}",
            f"{100 * statistics.median(run.train_accuracy[-1] for run in runs):.2f}",
            f"{100 * statistics.median(run.test_accuracy[-1] for run in runs):.2f}",
            f"{statistics.median(equal.seconds_by_seed):.2f}",
            f"{100 * statistics.median(equal.difference_by_seed):+.2f}",
        )
    return table


def _prediction(settings: Settings, contest: Contest, outcome: Outcome) -> str:
    """What the bounds promised of uniform depths, and what they did."""
    promised = contest.prediction["predicted_speed_ups"]["uniform"]
    said = ", ".join(f"{ratio:.2f}× by {name}" for name, ratio in promised.items())
    found = [
        outcome.find("drop_muon_uniform", "train", part_label(part)).median
        for part in settings.parts
    ]
    seen = ", ".join("—" if ratio is None else f"{ratio:.2f}×" for ratio in found)
    parts = ", ".join(f"{100 * part:.4g}" for part in settings.parts)
    return (
        f"Uniform depths: predicted {said}; measured {seen} to the training accuracy of Muon after "
        f"{parts} % of its run."
    )


def _speed_ups(contest: Contest, found: Sequence[SpeedUp]) -> Table:
    """A row for each method, a column for each target."""
    title = f"{contest.chosen.race.dataset}, {found[0].split} accuracy" if found else ""
    opponent = TITLES[found[0].opponent] if found else ""
    table = _new_table(
        f"{title}: times faster than {opponent}",
        "median of seeds (95 % interval of the geometric mean); between two\n"
        "evaluations, on the straight line",
    )
    targets = list(dict.fromkeys(speed_up.target for speed_up in found))
    for target in targets:
        table.add_column(target.replace("Muon's after ", "Muon's\nafter "), justify="right")
    for name in dict.fromkeys(speed_up.method for speed_up in found):
        own = {speed_up.target: speed_up for speed_up in found if speed_up.method == name}
        table.add_row(TITLES[name], *(_show(own[target]) for target in targets))
    return table


def _show(speed_up: SpeedUp) -> str:
    median, interval = speed_up.median, speed_up.interval
    if interval is not None and median is not None:
        return f"{median:.2f}×\n({interval.low:.2f}–{interval.high:.2f})"
    reached = f"\n({speed_up.num_reached} of {len(speed_up.ratios)})"
    if median is None:
        return f"—{reached}"
    return f"{median:.2f}×{reached if len(speed_up.ratios) > 1 else ''}"


def _new_table(title: str, note: str) -> Table:
    table = Table(title=f"{title}\n{note}", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    return table


def record(
    settings: Settings, contests: Sequence[Contest], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Everything as plain numbers."""
    used = [contest.chosen.race.dataset for contest in contests]
    return {
        "left_out": left_out(settings, used),
        "datasets": [
            _dataset(settings, contest, outcome)
            for contest, outcome in zip(contests, outcomes, strict=True)
        ],
    }


def _dataset(settings: Settings, contest: Contest, outcome: Outcome) -> dict[str, Any]:
    race = dataclasses.asdict(contest.chosen.race)
    kept = ("dataset", "methods", "channels", "batch_size", "epochs", "max_train", "eval_every")
    return {
        **{name: race[name] for name in (*kept, "short_run", "decay", "alpha")},
        "depth_costs_in_seconds": contest.depth_costs,
        "learning_rates": contest.learning_rates,
        "tuning": [
            {
                "method": name,
                "learning_rates": grid.learning_rates,
                "validation_errors": grid.validation_losses,
                "best_is_at_edge": grid.best_is_at_edge,
            }
            for name, grid in contest.grids.items()
        ],
        "speed_ups": [
            dataclasses.asdict(speed_up)
            | {
                "speed_up_by_seed": speed_up.ratios,
                "median_speed_up": speed_up.median,
                "num_seeds_reached": speed_up.num_reached,
                "interval": speed_up.interval and dataclasses.asdict(speed_up.interval),
            }
            for speed_up in outcome.speed_ups
            if speed_up.method != speed_up.opponent
        ],
        "equal_time": [dataclasses.asdict(equal) for equal in outcome.equal_time],
        "prediction": contest.prediction,
        "muons_seed_spread": outcome.seed_spread,
        "verdicts": verdicts(settings, outcome, contest.chosen.race.dataset),
        "curves": [dataclasses.asdict(run) for run in contest.runs],
    }
