"""What the curves say: final losses, what it takes to reach EMA's, and who beats whom."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

import curves
from curves import NEVER
from momentum_study.contest import Contest, Grid
from momentum_study.methods import CONTROLS, MVR, REFERENCE, TITLES, MethodName
from momentum_study.training import Run

Axis = Literal["steps", "evaluations", "seconds"]
AXES: tuple[Axis, ...] = ("steps", "evaluations", "seconds")
Relation = Literal["beats", "loses to", "neither beats nor loses to"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One method at one batch size, over the seeds."""

    grid: Grid
    runs: list[Run]
    ratios: dict[Axis, float]
    """What it takes to reach the final test loss of EMA with the same seed, of what EMA takes: the
    median over seeds, infinite if most do not get there."""

    @property
    def method(self) -> MethodName:
        """Whose outcome it is."""
        return self.grid.method

    @property
    def test_losses(self) -> list[float]:
        """At the end, of each seed."""
        return [run.test_loss[-1] for run in self.runs]

    @property
    def test_loss(self) -> float:
        """At the end, the mean over seeds."""
        return statistics.fmean(self.test_losses)

    @property
    def half_range(self) -> float:
        """Half the distance of the largest final test loss from the smallest."""
        largest = max(self.test_losses)
        return (largest - min(self.test_losses)) / 2 if math.isfinite(largest) else math.inf

    @property
    def validation_loss(self) -> float:
        """At the end, the mean over seeds."""
        return statistics.fmean(run.validation_loss[-1] for run in self.runs)

    @property
    def seconds(self) -> float:
        """Of a whole run, the median over seeds."""
        return statistics.median(run.seconds[-1] for run in self.runs)

    @property
    def seconds_per_step(self) -> float:
        """The median over seeds."""
        return self.seconds / self.runs[0].steps[-1]


def first_reached(run: Run, axis: Axis, loss: float) -> float:
    """Where a test loss is reached first, on the straight lines between evaluations."""
    return curves.first_reached(getattr(run, axis), run.test_loss, loss)


def summarise(contest: Contest) -> list[Outcome]:
    """Every method at every batch size, in the order of the grids."""

    def runs_of(method: MethodName, batch_size: int) -> list[Run]:
        return [r for r in contest.runs if (r.method, r.batch_size) == (method, batch_size)]

    def ratio(run: Run, reference: Run, axis: Axis) -> float:
        loss = reference.test_loss[-1]
        least = first_reached(reference, axis, loss)
        return first_reached(run, axis, loss) / least if 0 < least < NEVER else NEVER

    outcomes = []
    for grid in contest.grids:
        runs = runs_of(grid.method, grid.batch_size)
        pairs = list(zip(runs, runs_of(REFERENCE, grid.batch_size), strict=True))
        ratios: dict[Axis, float] = {}
        for axis in AXES:
            ratios[axis] = statistics.median(ratio(*pair, axis) for pair in pairs)
        outcomes.append(Outcome(grid, runs, ratios))
    return outcomes


def num_lower(outcome: Outcome, other: Outcome) -> int:
    """With how many seeds the final test loss is lower."""
    return sum(a < b for a, b in zip(outcome.test_losses, other.test_losses, strict=True))


def relation(outcome: Outcome, other: Outcome) -> Relation:
    """Who beats whom: by the final test loss, with every seed."""
    if num_lower(outcome, other) == len(outcome.runs):
        return "beats"
    if num_lower(other, outcome) == len(outcome.runs):
        return "loses to"
    return "neither beats nor loses to"


def verdict(batch_size: int, outcomes: Sequence[Outcome]) -> str:
    """Whether the second gradient paid at a batch size, in a sentence.

    The variant that is judged has the smallest validation loss: test losses would flatter it.
    """
    by_method = {o.method: o for o in outcomes if o.grid.batch_size == batch_size}
    variants = [by_method[method] for method in MVR if method in by_method]
    if not variants:
        return f"Batch {batch_size}: no MVR took part."
    best, reference = min(variants, key=lambda o: o.validation_loss), by_method[REFERENCE]
    controls = [by_method[method] for method in CONTROLS if method in by_method]
    relations = [relation(best, other) for other in (reference, *controls)]
    sentence = (
        f"Batch {batch_size}: {TITLES[best.method]}, the best variant by validation loss, ends "
        f"at a test loss of {best.test_loss:.4f}; after equal steps, in "
        f"{best.seconds / reference.seconds:.2f} × the seconds, it "
        f"{_compared(best, reference)}; "
    )
    if controls:
        compared = " and ".join(_compared(best, control) for control in controls)
        sentence += f"after equal gradient evaluations it {compared}; "
    if len(best.runs) < 2:
        return sentence + "one seed gives no verdict."
    if "loses to" in relations:
        return sentence + "so the second gradient did not pay."
    if len(controls) < len(CONTROLS):
        return sentence + "whether the second gradient paid is not known without both controls."
    if all(of_one == "beats" for of_one in relations):
        return sentence + "so the second gradient paid."
    return sentence + "so it is not clear that the second gradient paid."


def _compared(best: Outcome, other: Outcome) -> str:
    seeds = f"lower with {num_lower(best, other)} of {len(best.runs)} seeds"
    return f"{relation(best, other)} {TITLES[other.method]} ({other.test_loss:.4f}, {seeds})"
