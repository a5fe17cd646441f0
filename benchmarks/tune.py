"""Choose the learning rates of the race, on training images that are held out.

Each method is trained as in the race at each of the same few rates around the one that it has in
the settings; the images that judge are neither trained on nor those of the test set.

python benchmarks/tune.py --output-dir results
python benchmarks/tune.py --output-dir results --methods scion gluon --scion-learning-rate 0.1
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from images import Images, load_images
from models import CNN
from racing import Race, Run, run_all
from records import to_json
from reporting import TITLES, new_table, provenance
from settings import (
    LEARNING_RATES,
    MethodName,
    Settings,
    check_batch_size,
    check_settings,
    learning_rate,
)


@dataclasses.dataclass(frozen=True)
class Tuning(Settings):
    """Train the race's methods at several learning rates; held-out training images judge.

    A method's grid is centred on its rate among the arguments.
    """

    seeds: tuple[int, ...] = (100,)
    """As in the race, but not those that race."""
    num_rates: int = 5
    """Of each method: an odd number."""
    factor: float = 2.0
    """From one rate to the next."""
    num_validation: int = 1000
    """Training images that are held out; --max-train counts those that are left."""


@dataclasses.dataclass
class Grid:
    """One method at all its rates."""

    method: MethodName
    rates: list[float]
    runs: list[list[Run]]
    """For each rate, one for each seed; what they call test images are the held-out ones."""

    @property
    def accuracies(self) -> list[float]:
        """Of each rate, on the held-out images after the last step, the mean over seeds."""
        return [statistics.mean(run.test_accuracy[-1] for run in runs) for runs in self.runs]

    @property
    def best(self) -> int:
        """Which rate is the best; of equal ones the smallest."""
        return self.accuracies.index(max(self.accuracies))

    @property
    def is_at_edge(self) -> bool:
        """Whether a better rate may lie outside."""
        return self.best in (0, len(self.rates) - 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes the methods that the command line names."""
    tuning = tyro.cli(Tuning, args=arguments)
    check_tuning(tuning)
    console = Console()
    with console.status(f"reading {tuning.dataset}"):
        limit = None if tuning.max_train is None else tuning.max_train + tuning.num_validation
        images = load_images(
            tuning.dataset, data_dir=tuning.data_dir, download=tuning.download, max_train=limit
        )
        images = hold_out(images, tuning.num_validation)
    check_batch_size(tuning, len(images.train_labels))
    tuning.output_dir.mkdir(parents=True, exist_ok=True)
    path = tuning.output_dir / "tune.json"

    progress = Progress(
        TextColumn("{task.description:<48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rates"),
        TimeElapsedColumn(),
        console=console,
    )
    race = Race(tuning, CNN(tuning.channels), images)
    grids = []
    with progress:
        task = progress.add_task("", total=len(tuning.methods) * tuning.num_rates)
        for method in tuning.methods:
            grid = Grid(method, [], [])
            for rate, settings in candidates(tuning, method):
                progress.update(task, description=f"{TITLES[method]} at {rate:.4g}")
                grid.rates.append(rate)
                grid.runs.append(run_all(race.with_settings(settings)))
                progress.advance(task)
            grids.append(grid)
            # After each method, so that a long tuning that is ended leaves what it has.
            path.write_text(to_json(record(tuning, grids)), encoding="utf-8")
    print_grids(console, tuning, grids)
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)


def check_tuning(tuning: Tuning) -> None:
    """Ends the program with a sentence for arguments that make no grid, or no race."""
    check_settings(tuning)
    if tuning.num_rates < 3 or tuning.num_rates % 2 == 0:
        raise SystemExit(f"--num-rates must be an odd number from 3, got {tuning.num_rates}.")
    if tuning.factor <= 1:
        raise SystemExit(f"--factor must be more than 1, got {tuning.factor}.")
    if tuning.num_validation < 1:
        raise SystemExit(f"--num-validation must be at least 1, got {tuning.num_validation}.")
    for method in tuning.methods:
        for _, settings in candidates(tuning, method):
            check_settings(settings)


def candidates(tuning: Tuning, method: MethodName) -> Iterator[tuple[float, Settings]]:
    """The rates of a method, ascending, each with the settings of its race."""
    centre, half = learning_rate(tuning, method), tuning.num_rates // 2
    for exponent in range(-half, half + 1):
        rate = centre * tuning.factor**exponent
        chosen: dict[str, Any] = {"methods": (method,), LEARNING_RATES[method][0]: rate}
        yield rate, dataclasses.replace(tuning, **chosen)


def hold_out(images: Images, count: int) -> Images:
    """Some training images, drawn at random once and for all, in the place of the test images."""
    total = len(images.train_labels)
    if count >= total:
        raise SystemExit(f"--num-validation is {count}, and there are only {total} training images")
    rows = np.random.default_rng(0).permutation(total)
    held_out, kept = rows[:count], rows[count:]
    return Images(
        images.train_images[kept],
        images.train_labels[kept],
        images.train_images[held_out],
        images.train_labels[held_out],
    )


def print_grids(console: Console, tuning: Tuning, grids: Sequence[Grid]) -> None:
    """The accuracies of every rate and the best one, and who needs another grid."""
    note = f"{tuning.num_validation} held-out training images, after {tuning.epochs} epochs; "
    note += f"mean of {len(tuning.seeds)} seeds" if len(tuning.seeds) > 1 else "one seed"
    table = new_table(f"Validation accuracy in % on {tuning.dataset}", note)
    half = tuning.num_rates // 2
    for heading in (
        "centre",
        *(f"÷{tuning.factor**exponent:.4g}" for exponent in range(half, 0, -1)),
        *(f"×{tuning.factor**exponent:.4g}" for exponent in range(half + 1)),
        "best",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for grid in grids:
        shown = [f"{100 * accuracy:.1f}" for accuracy in grid.accuracies]
        shown[grid.best] = f"[bold]{shown[grid.best]}[/bold]"
        centre, best = grid.rates[half], grid.rates[grid.best]
        table.add_row(TITLES[grid.method], f"{centre:.4g}", *shown, f"{best:.4g}")
    console.print(table)
    for grid in grids:
        if grid.is_at_edge:
            argument = LEARNING_RATES[grid.method][0].replace("_", "-")
            rate = f"{grid.rates[grid.best]:.4g}"
            console.print(
                f"{TITLES[grid.method]}: the best rate, {rate}, is at the edge of its grid, and a "
                f"better one may lie outside. Tune it again with --methods {grid.method} "
                f"--{argument} {rate}.",
                highlight=False,
                soft_wrap=True,
            )


def record(tuning: Tuning, grids: Sequence[Grid]) -> dict[str, Any]:
    """Everything as plain numbers: arguments, environment, the grids, every curve."""
    return {
        **provenance("tune", tuning),
        "grids": [
            {
                "method": grid.method,
                "argument": LEARNING_RATES[grid.method][0],
                "learning_rates": grid.rates,
                "validation_accuracy": grid.accuracies,
                "best_learning_rate": grid.rates[grid.best],
                "best_is_at_edge": grid.is_at_edge,
            }
            for grid in grids
        ],
        "curves": [
            {"learning_rate": rate, **_curve(run)}
            for grid in grids
            for rate, runs in zip(grid.rates, grid.runs, strict=True)
            for run in runs
        ],
    }


def _curve(run: Run) -> dict[str, Any]:
    curve = dataclasses.asdict(run)
    curve["validation_accuracy"] = curve.pop("test_accuracy")
    return curve


if __name__ == "__main__":
    main()
