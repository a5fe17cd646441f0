"""The order of events: each method finds its learning rate, then all race for each seed."""

import dataclasses
from collections.abc import Callable, Sequence

from momentum_study.methods import MethodName, spending
from momentum_study.settings import Settings
from momentum_study.training import Run, Study
from rate_grid import RateGrid

# Told what happens, and how many windows of text have been through a gradient since the last time.
Report = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True)
class Grid(RateGrid):
    """One method at all learning rates, with the seed that does not race."""

    method: MethodName
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Contest:
    """Everything that the study measured."""

    grids: list[Grid]
    runs: list[Run]
    """Those that race, at the best rates."""


def hold_contest(study: Study, report: Report = lambda text, windows: None) -> Contest:
    """Tunes and races all methods, one batch size after the other."""
    contest = Contest([], [])
    for batch_size in study.settings.batch_sizes:
        grids = [tune(study, method, batch_size, report) for method in study.settings.methods]
        contest.grids.extend(grids)
        contest.runs.extend(race(study, grids, report))
    return contest


def tune(study: Study, method: MethodName, batch_size: int, report: Report) -> Grid:
    """A whole run at each rate, judged by the validation loss at its end."""
    settings, num_steps = study.settings, study.num_steps(method)
    losses = []
    for rate in settings.learning_rates:
        text = f"batch {batch_size}, tuning {method} at {rate:g}"
        report(text, 0)
        runner = study.start(method, batch_size, rate, settings.tuning_seed)
        runner.train(0, num_steps)
        runner.evaluate(num_steps)
        losses.append(runner.run.validation_loss[-1])
        report(text, _windows(method, batch_size, settings.num_steps))
    return Grid(settings.learning_rates, tuple(losses), method, batch_size)


def race(study: Study, grids: Sequence[Grid], report: Report) -> list[Run]:
    """A run for each seed of each grid's method at its best rate.

    The methods take turns: whatever slows the machine for a while slows all of them alike. A turn
    is `eval_every` steps of EMA, and who begins changes from turn to turn.
    """
    settings, runs = study.settings, []
    for seed in settings.seeds:
        runners = [study.start(g.method, g.batch_size, g.best_rate, seed) for g in grids]
        for runner in runners:
            runner.evaluate(0)
        for turn, first in enumerate(range(0, settings.num_steps, settings.eval_every)):
            last = min(first + settings.eval_every, settings.num_steps)
            begin = turn % len(runners)
            for runner in runners[begin:] + runners[:begin]:
                run = runner.run
                factor = spending(run.method).steps
                runner.train(first * factor, last * factor)
                runner.evaluate(last * factor)
                text = f"batch {run.batch_size}, seed {seed}, {run.method}"
                report(text, _windows(run.method, run.batch_size, last - first))
        runs += [runner.run for runner in runners]
    return runs


def num_windows(settings: Settings) -> int:
    """How many windows :func:`hold_contest` reports."""
    num_runs = len(settings.learning_rates) + len(settings.seeds)
    return num_runs * sum(
        _windows(method, batch_size, settings.num_steps)
        for method in settings.methods
        for batch_size in settings.batch_sizes
    )


def _windows(method: MethodName, batch_size: int, num_steps: int) -> int:
    """Windows that go through a gradient in the place of so many steps of EMA."""
    spent = spending(method)
    return num_steps * spent.steps * spent.evaluations_per_step * batch_size
