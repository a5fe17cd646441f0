"""Distributions over depths found by trying many, beside those that the theory calls best."""

from typing import Any

import numpy as np
from jaxtyping import Float

import dropmuon_jax as dm

CRITERIA = ("max", "sum")
MOVES = np.logspace(-7, -0.01, 15)  # of probability away from full steps
ROUNDING = 1e-12


def time_bound(
    probabilities: Float[np.ndarray, "candidates depths"],
    smoothness: Float[np.ndarray, " layers"],
    costs: Float[np.ndarray, " depths"],
    criterion: str,
) -> Float[np.ndarray, " candidates"]:
    """E cost · max L/π, or E cost · Σ L/π, written again."""
    with np.errstate(divide="ignore"):
        waits = smoothness / np.cumsum(probabilities, axis=1)
    return probabilities @ costs * (waits.max(1) if criterion == "max" else waits.sum(1))


def full_is_optimal(smoothness: np.ndarray, costs: np.ndarray, criterion: str) -> bool:
    """The condition of the theory: of costs that fall with every depth."""
    if criterion == "max":
        return bool(smoothness[0] == smoothness.max())
    shares = np.cumsum(smoothness)[:-1] / smoothness.sum()
    return bool(np.all(shares >= (costs[0] - costs[1:]) / costs[0]))


def random_problem(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Smoothness and costs of 2 to 6 layers; in half of them shallow layers tend to be stiff."""
    num_layers = int(generator.integers(2, 7))
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


def search(criterion: str, num_problems: int, num_candidates: int, seed: int) -> dict[str, Any]:
    """In how many random problems full steps were best, and what the theory says of each."""
    generator = np.random.default_rng(seed)
    found, condition, beaten_by = [], [], []
    for _ in range(num_problems):
        smoothness, costs = random_problem(generator)
        tried = candidates(len(costs), num_candidates, generator)
        full = time_bound(np.eye(len(costs))[:1], smoothness, costs, criterion)[0]
        best_found = time_bound(tried, smoothness, costs, criterion).min()
        problem: Any = (smoothness, costs)
        distribution = dm.planning.optimal_depth(*problem, criterion=criterion)
        speed_up = dm.planning.predicted_speed_up(distribution, *problem, criterion=criterion)
        found.append(bool(best_found >= full * (1 - ROUNDING)))
        condition.append(full_is_optimal(smoothness, costs, criterion))
        beaten_by.append(1 - best_found * speed_up / full)
    return {
        "problems": num_problems,
        "full_optimal": sum(found),
        "condition_holds": sum(condition),
        "contradictions": int(np.sum(np.not_equal(found, condition))),
        "beaten_by": float(max(beaten_by)),
    }
