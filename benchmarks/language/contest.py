"""The order of events: each method finds its learning rate, then all race for each seed."""

import dataclasses
from collections.abc import Callable, Mapping

from language.methods import MethodName
from language.training import Race, Run
from rate_grid import RateGrid

# Told what happens, and how many steps have been taken since the last time.
Report = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True)
class Contest:
    """Everything that the race measured."""

    grids: dict[MethodName, RateGrid]
    """With the seed that does not race."""
    runs: list[Run]
    """Those that race, at the best rates."""


def hold_contest(race: Race, report: Report = lambda text, steps: None) -> Contest:
    """Tunes all methods, and lets them race."""
    grids: dict[MethodName, RateGrid] = {}
    for name in race.settings.methods:
        grids[name] = tune(race, name, report)
    return Contest(grids, hold_race(race, grids, report))


def tune(race: Race, name: MethodName, report: Report) -> RateGrid:
    """A whole run at each rate, judged by the validation loss at its end."""
    settings, losses = race.settings, []
    for rate in settings.learning_rates:
        text = f"tuning {name} at {rate:g}"
        report(text, 0)
        runner = race.start(name, rate, settings.tuning_seed)
        for _ in range(race.num_turns):
            runner.train()
            report(text, race.steps_per_turn(name))
        runner.evaluate()
        losses.append(runner.run.validation_loss[-1])
    return RateGrid(settings.learning_rates, tuple(losses))


def hold_race(race: Race, grids: Mapping[MethodName, RateGrid], report: Report) -> list[Run]:
    """A run for each seed of each method at its best rate.

    The methods take turns, of the steps between two evaluations: whatever slows the machine for a
    while slows all of them alike. Who begins changes from turn to turn.
    """
    runs = []
    for seed in race.settings.seeds:
        runners = [race.start(name, grid.best_rate, seed) for name, grid in grids.items()]
        for runner in runners:
            runner.evaluate()
        for turn in range(race.num_turns):
            begin = turn % len(runners)
            for runner in runners[begin:] + runners[:begin]:
                runner.train()
                runner.evaluate()
                name, loss = runner.run.method, runner.run.validation_loss[-1]
                text = f"seed {seed}, {name}: {loss:.3f}"
                report(text, race.steps_per_turn(name))
        runs += [runner.run for runner in runners]
    return runs


def num_steps(race: Race) -> int:
    """How many steps :func:`hold_contest` reports."""
    settings = race.settings
    num_runs = len(settings.learning_rates) + len(settings.seeds)
    return num_runs * sum(race.num_steps(name) for name in settings.methods)
