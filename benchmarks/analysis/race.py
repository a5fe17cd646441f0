"""What a distribution over depths was predicted to gain on known problems, and what it gained."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import dropmuon_jax as dm
from analysis.descent import Descent, descend, repeated
from analysis.search import CRITERIA
from analysis.smooth_problems import Problem, coupled, huber

PROBLEMS: dict[str, Callable[..., Problem]] = {"Huber": huber, "coupled": coupled}
TOLERANCE = 0.1  # the gradient that ends a race, in that of the start
CHUNK = 100  # steps that are taken before anyone looks who has arrived


def profiles(num_layers: int, ratio: float) -> dict[str, Float[np.ndarray, " layers"]]:
    """The smoothness of each layer, shallow to deep, the largest `ratio` times the smallest."""
    rising = np.geomspace(1.0, ratio, num_layers)
    middle = np.where(np.arange(num_layers) == num_layers // 2, ratio, 1.0)
    return {
        "rising": rising,
        "falling": rising[::-1],
        "flat": np.ones(num_layers),
        "middle": middle,
    }


def race_costs(num_layers: int) -> Float[np.ndarray, " layers"]:
    """Of a step at each depth: a layer's forward pass costs 1, its backward pass 2."""
    return num_layers + 2.0 * np.arange(num_layers, 0, -1)


def race(
    problem_name: str,
    smoothness: Float[np.ndarray, " layers"],
    num_runs: int,
    num_steps: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Uniform depths and the best by each criterion, against full steps.

    A criterion is what predicts, and what ends the race: the root of Σ a_i², or Σ a_i, is small.
    """
    costs = race_costs(len(smoothness))
    numbers: Any = (smoothness, costs)
    with jax.enable_x64(True):
        problem = PROBLEMS[problem_name](smoothness.tolist(), seed)
        limits = num_runs, num_steps, seed
        spend = functools.partial(_spend, problem, descend(problem), costs, *limits)
        of_full, of_uniform = spend(dm.full_depth()), spend(dm.uniform_depth())
        outcomes = []
        for i, criterion in enumerate(CRITERIA):
            best = dm.planning.optimal_depth(*numbers, criterion=criterion)
            raced = {"uniform": (dm.uniform_depth(), of_uniform), "best": (best, spend(best))}
            for name, (distribution, spent) in raced.items():
                speed_up = dm.planning.predicted_speed_up(
                    distribution, *numbers, criterion=criterion
                )
                with np.errstate(invalid="ignore"):  # of two that gave up
                    measured = (of_full[i] / spent[i]).tolist()
                kind = {"criterion": criterion, "distribution": name}
                outcomes.append(kind | {"predicted": speed_up, "measured": measured})
    return outcomes


def _spend(
    problem: Problem,
    descent: Descent,
    costs: np.ndarray,
    num_runs: int,
    num_steps: int,
    seed: int,
    distribution: dm.LayerDistribution,
) -> Float[np.ndarray, "criteria runs"]:
    """The cost until the gradient is small by each criterion, infinite if a run gives up."""
    chances = np.asarray(distribution.probabilities(0, len(costs)), float)
    chances /= chances.sum()
    generator, params = np.random.default_rng(seed), repeated(problem.start, num_runs)
    paid, sizes = np.zeros((num_runs, 0)), np.zeros((2, num_runs, 0))
    arrived = sizes > 0
    for _ in range(0, num_steps, CHUNK):
        depths = generator.choice(len(costs), (num_runs, CHUNK), p=chances)
        params, steps = descent(params, jnp.asarray(depths))
        dual_norms = np.asarray(steps.dual_norms)
        size = np.stack([np.linalg.norm(dual_norms, axis=-1), dual_norms.sum(-1)])
        paid = np.concatenate([paid, costs[depths]], axis=1)
        sizes = np.concatenate([sizes, size], axis=2)
        arrived = sizes <= TOLERANCE * sizes[..., :1]
        if arrived.any(-1).all():
            break
    before = np.cumsum(paid, axis=1) - paid  # the gradient is that before the step
    return np.where(arrived, before, np.inf).min(-1)
