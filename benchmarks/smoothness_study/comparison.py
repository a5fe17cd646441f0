"""Sweeps of a multiplier on the predicted radii, and of one radius for every leaf."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping

import dropmuon_jax as dm
from smoothness_study.settings import Settings
from smoothness_study.training import GRADIENTS, Gradients, Result, SampleKind, Study

# Which gradients step with the radii of which fit.
PREDICTIONS: tuple[tuple[Gradients, SampleKind], ...] = (
    ("exact", "exact"),
    ("minibatch", "minibatch"),
    ("minibatch", "same batch"),
)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs with the same gradients that differ in one number."""

    gradients: Gradients
    fit: SampleKind | None
    """Whose radii are multiplied; without, one radius for every leaf is swept."""
    values: tuple[float, ...]
    results: tuple[tuple[Result, ...], ...]
    """By value, then by seed."""

    @property
    def title(self) -> str:
        """What was swept."""
        steps = f"fit: {self.fit}" if self.fit else "one radius"
        return f"{self.gradients} gradients, {steps}"

    @property
    def losses(self) -> list[float]:
        """Final training loss of each value, the mean over seeds; infinite where one diverged."""
        means = [statistics.fmean(result.train_loss for result in of) for of in self.results]
        return [mean if math.isfinite(mean) else math.inf for mean in means]

    @property
    def accuracies(self) -> list[float]:
        """Final test accuracy of each value, the mean over seeds."""
        return [statistics.fmean(result.test_accuracy for result in of) for of in self.results]

    @property
    def uphill(self) -> list[float | None]:
        """The share of steps of each value that raised the loss, the mean over seeds."""
        return [
            None if of[0].uphill is None else statistics.fmean(result.uphill or 0 for result in of)
            for of in self.results
        ]

    @property
    def best(self) -> int:
        """The index of the smallest loss."""
        return min(range(len(self.values)), key=self.losses.__getitem__)

    @property
    def best_at_edge(self) -> bool:
        """Whether the best value is the first or last of the grid, so that a better may lie out."""
        return self.best in (0, len(self.values) - 1)


def compare(
    study: Study,
    fits: Mapping[SampleKind, dm.planning.SmoothnessFit],
    report: Callable[[str, int], None] = lambda text, runs: None,
) -> list[Sweep]:
    """Every sweep.

    Args:
        study: Whose runs are compared.
        fits: Whose radii are multiplied.
        report: Told what starts, and how many runs have ended since it was last told.
    """
    settings = study.settings

    def sweep(gradients: Gradients, fit: SampleKind | None) -> Sweep:
        values = settings.multipliers if fit else settings.constant_radii

        def run(value: float, seed: int) -> Result:
            text = f"{gradients}, {fit or 'one radius'} × {value:g}, seed {seed}"
            report(text, 0)
            if fit:
                result = study.train(gradients, seed, fits[fit].radii(), value)
            else:
                result = study.train(gradients, seed, study.constant(value), 1.0)
            report(text, 1)
            return result

        results = [tuple(run(value, seed) for seed in settings.seeds) for value in values]
        return Sweep(gradients, fit, values, tuple(results))

    sweeps = []
    for gradients in GRADIENTS:
        sweeps += [sweep(gradients, fit) for own, fit in PREDICTIONS if own == gradients]
        sweeps.append(sweep(gradients, None))
    return sweeps


def num_runs(settings: Settings) -> int:
    """How many runs :func:`compare` makes."""
    predicted = len(PREDICTIONS) * len(settings.multipliers)
    constant = len(GRADIENTS) * len(settings.constant_radii)
    return (predicted + constant) * len(settings.seeds)
