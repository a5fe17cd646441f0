"""What the curves say: when each method is where Muon was, where it ends, and who is ahead."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np

from curves import NEVER, first_reached
from language.contest import Contest
from language.methods import CONTROL, REFERENCE, TITLES, MethodName, drops_layers
from language.settings import Settings
from language.training import Run
from rate_grid import RateGrid

Axis = Literal["steps", "seconds"]
AXES: tuple[Axis, ...] = ("steps", "seconds")
Standing = Literal["ahead of", "behind", "neither ahead of nor behind"]
# Of two runs of the same program in turns on a shared machine, whose times differ by a few percent.
SAME_TIME = 0.05


@dataclasses.dataclass(frozen=True)
class Attainment:
    """When a method had a validation loss that Muon with the same seed had, seed by seed."""

    target: float
    """The part of Muon's run."""
    losses: list[float]
    """Muon's there, on the straight line between its evaluations."""
    reached: dict[Axis, list[float]]
    """The first time, infinite for never."""
    speed_ups: dict[Axis, list[float]]
    """What it took Muon over what it took this method; 0 where it never came so far."""

    def speed_up(self, axis: Axis) -> float | None:
        """The median over seeds; None if one of the middle did not come so far."""
        ratios = sorted(self.speed_ups[axis])
        middle = ratios[(len(ratios) - 1) // 2 : len(ratios) // 2 + 1]
        return statistics.fmean(middle) if min(middle) > 0 else None

    @property
    def num_reached(self) -> int:
        """With how many seeds."""
        return sum(steps < NEVER for steps in self.reached["steps"])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One method, over the seeds."""

    method: MethodName
    grid: RateGrid
    runs: list[Run]
    attainments: list[Attainment]
    """One for each target."""

    @property
    def test_losses(self) -> list[float]:
        """At the end, of each seed."""
        return [run.test_loss[-1] for run in self.runs]

    @property
    def validation_losses(self) -> list[float]:
        """At the end, of each seed."""
        return [run.validation_loss[-1] for run in self.runs]

    @property
    def test_loss(self) -> float:
        """At the end, the mean over seeds."""
        return statistics.fmean(self.test_losses)

    @property
    def seconds(self) -> float:
        """Of a whole run, the median over seeds."""
        return statistics.median(run.seconds[-1] for run in self.runs)

    @property
    def seconds_per_step(self) -> float:
        """The median over seeds."""
        return self.seconds / self.runs[0].steps[-1]

    @property
    def mean_depth(self) -> float:
        """Of all steps: how many layers, of those nearest the input, a step leaves out."""
        return statistics.fmean(depth for run in self.runs for depth in run.depths)


def half_range(losses: Sequence[float]) -> float:
    """Half the distance of the largest from the smallest; infinite if a run has diverged."""
    return (max(losses) - min(losses)) / 2 if max(losses) < NEVER else NEVER


def loss_after(run: Run, part: float) -> float:
    """The validation loss after a part of the run, on the straight line between evaluations."""
    return float(np.interp(part * run.steps[-1], run.steps, run.validation_loss))


def summarise(settings: Settings, contest: Contest) -> list[Outcome]:
    """Every method, in the order of the grids."""

    def runs_of(name: MethodName) -> list[Run]:
        return [run for run in contest.runs if run.method == name]

    def attain(runs: list[Run], target: float) -> Attainment:
        references = runs_of(REFERENCE)
        losses = [loss_after(reference, target) for reference in references]
        attainment = Attainment(target, losses, {}, {})
        for axis in AXES:

            def first(run: Run, loss: float, axis: Axis = axis) -> float:
                return first_reached(getattr(run, axis), run.validation_loss, loss)

            theirs = [first(*pair) for pair in zip(references, losses, strict=True)]
            own = [first(*pair) for pair in zip(runs, losses, strict=True)]
            attainment.reached[axis] = own
            attainment.speed_ups[axis] = [_ratio(*pair) for pair in zip(theirs, own, strict=True)]
        return attainment

    outcomes = []
    for name, grid in contest.grids.items():
        runs = runs_of(name)
        attainments = [attain(runs, target) for target in settings.targets]
        outcomes.append(Outcome(name, grid, runs, attainments))
    return outcomes


def _ratio(of_muon: float, own: float) -> float:
    if own == NEVER:
        return 0.0
    return 1.0 if own == of_muon else of_muon / own  # both are there at 0, with the same parameters


def num_lower(outcome: Outcome, other: Outcome) -> int:
    """With how many seeds the final test loss is lower."""
    return sum(a < b for a, b in zip(outcome.test_losses, other.test_losses, strict=True))


def standing(outcome: Outcome, other: Outcome) -> Standing:
    """Who is ahead: by the final test loss, with every seed, in no more time."""
    time = outcome.seconds / other.seconds
    if num_lower(outcome, other) == len(outcome.runs) and time <= 1 + SAME_TIME:
        return "ahead of"
    if num_lower(other, outcome) == len(outcome.runs) and time >= 1 - SAME_TIME:
        return "behind"
    return "neither ahead of nor behind"


def verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence about each method that drops layers, against Muon and its shorter run."""
    by_method = {outcome.method: outcome for outcome in outcomes}
    opponents = [by_method[name] for name in (REFERENCE, CONTROL) if name in by_method]
    return [
        f"{TITLES[outcome.method]} ends at a test loss of {outcome.test_loss:.4f}: "
        + "; ".join(_compared(outcome, opponent) for opponent in opponents)
        + "."
        for outcome in outcomes
        if drops_layers(outcome.method)
    ]


def _compared(outcome: Outcome, other: Outcome) -> str:
    return (
        f"{standing(outcome, other)} {TITLES[other.method]} ({other.test_loss:.4f}), lower with "
        f"{num_lower(outcome, other)} of {len(outcome.runs)} seeds in "
        f"{outcome.seconds / other.seconds:.2f} × the seconds"
    )
