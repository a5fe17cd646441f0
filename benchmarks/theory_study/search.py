"""Distributions found by trying many, beside those that the theory calls best."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

import dropmuon_jax as dm
from theory_study.settings import Settings

CRITERIA = ("max", "sum")
NUM_LAYERS = (2, 3, 4, 5, 6)
MOVES = np.logspace(-7, -0.01, 15)  # of probability away from full steps
ROUNDING = 1e-12


class Verdict(NamedTuple):
    """What the searches said of one criterion."""

    criterion: str
    problems: int
    full_optimal: int
    """Problems in which no distribution was found that beats full steps."""
    condition_holds: int
    """Problems in which the theory says so."""
    contradictions: int
    """Problems in which they differ."""
    beaten_by: float
    """The most by which anything found beats what the theory calls best, relatively."""


def time_bound(
    probabilities: Float[np.ndarray, "candidates depths"],
    smoothness: Float[np.ndarray, " layers"],
    costs: Float[np.ndarray, " depths"],
    criterion: str,
) -> Float[np.ndarray, " candidates"]:
    """E cost · max L/π, or E cost · Σ L/π, written again."""
    included = np.cumsum(probabilities, axis=1)
    with np.errstate(divide="ignore"):
        waits = smoothness / included
    return probabilities @ costs * (waits.max(1) if criterion == "max" else waits.sum(1))


def full_is_optimal(smoothness: np.ndarray, costs: np.ndarray, criterion: str) -> bool:
    """The condition of the theory: of costs that fall with every depth."""
    if criterion == "max":
        return bool(smoothness[0] == smoothness.max())
    shares = np.cumsum(smoothness)[:-1] / smoothness.sum()
    return bool(np.all(shares >= (costs[0] - costs[1:]) / costs[0]))


def random_problem(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Smoothness and costs; in half of the problems shallow layers tend to be the stiff ones."""
    num_layers = int(generator.choice(NUM_LAYERS))
    tilt = generator.choice([0.0, 1.0]) * np.arange(num_layers)
    smoothness = np.exp(generator.normal(size=num_layers) - tilt)
    layer_costs = np.exp(generator.normal(size=num_layers))
    return smoothness, np.cumsum(layer_costs[::-1])[::-1] + np.exp(generator.normal())


def candidates(
    num_layers: int, number: int, generator: np.random.Generator
) -> Float[np.ndarray, "candidates depths"]:
    """Random distributions, of few depths or many, and all small moves away from full steps."""
    sparsity = np.exp(generator.uniform(-3, 1, (number, 1)))
    gamma = generator.gamma(np.broadcast_to(sparsity, (number, num_layers))) + 1e-12
    unit = np.eye(num_layers)
    moves = [(1 - t) * unit[0] + t * unit[s] for s in range(1, num_layers) for t in MOVES]
    return np.concatenate([gamma / gamma.sum(1, keepdims=True), moves])


def search(settings: Settings, criterion: str) -> Verdict:
    """Random problems, in each of which many distributions are tried."""
    generator = np.random.default_rng(settings.seed)
    found, predicted, beaten_by = [], [], -np.inf
    for _ in range(settings.problems):
        smoothness, costs = random_problem(generator)
        tried = candidates(len(costs), settings.candidates, generator)
        full = costs[0] * (smoothness.max() if criterion == "max" else smoothness.sum())
        best_found = time_bound(tried, smoothness, costs, criterion).min()
        distribution = dm.planning.optimal_depth(smoothness, costs, criterion=criterion)
        best = full / dm.planning.predicted_speed_up(
            distribution, smoothness, costs, criterion=criterion
        )
        found.append(bool(best_found >= full * (1 - ROUNDING)))
        predicted.append(full_is_optimal(smoothness, costs, criterion))
        beaten_by = max(beaten_by, float(1 - best_found / best))
    contradictions = int(np.sum(np.not_equal(found, predicted)))
    return Verdict(
        criterion, settings.problems, sum(found), sum(predicted), contradictions, beaten_by
    )
