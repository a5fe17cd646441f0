"""How near the bounds of the theory are to what they bound."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from theory_study.descent import Descent, descend, repeated
from theory_study.problems import Problem, coupled, huber, hyperbolic, separable
from theory_study.settings import Settings

SMOOTHNESS = (0.5, 4.0, 1.0, 2.0)
PROBLEMS: tuple[Callable[..., Problem], ...] = (
    separable,
    coupled,
    hyperbolic,
    functools.partial(huber, num_steps=60),
)
PROBABILITIES = {
    "full": (1.0, 0.0, 0.0, 0.0),
    "uniform": (0.25, 0.25, 0.25, 0.25),
    "mostly deep": (0.05, 0.1, 0.15, 0.7),
}


class Ratios(NamedTuple):
    """What is bounded over its bound, at most 1 if the theory is right."""

    problem: str
    distribution: str
    one_step: float
    """The promised over the expected fall of f in a step, at the worst of all points visited; the
    expectation over depths is exact."""
    many_steps: float
    """What the gradients of a run promise together, over f(X⁰) - inf f."""
    gradient: float
    """The smallest E Σ_i a_i of a step, over the ε for which the number of steps is enough."""


def check_bounds(settings: Settings) -> list[Ratios]:
    """Every problem with every distribution."""
    with jax.enable_x64(True):
        rows = []
        for make in PROBLEMS:
            problem = make(SMOOTHNESS, settings.seed)
            descent = descend(problem)
            for name, probabilities in PROBABILITIES.items():
                generator = np.random.default_rng(settings.seed)
                shape = settings.bound_runs, settings.bound_steps
                depths = generator.choice(len(probabilities), shape, p=probabilities)
                weights = np.full(len(depths), 1 / len(depths))
                chances = np.array(probabilities)
                rows.append(ratios(problem, descent, name, chances, depths, weights))
        return rows


def ratios(
    problem: Problem,
    descent: Descent,
    distribution: str,
    probabilities: Float[np.ndarray, " depths"],
    depths: Int[np.ndarray, "runs steps"],
    weights: Float[np.ndarray, " runs"],
) -> Ratios:
    """Of runs with the given depths, whose weights make means of them expectations."""
    included = np.cumsum(probabilities)
    _, steps = descent(repeated(problem.start, len(depths)), jnp.asarray(depths))
    value, dual_norms, values_after = (np.asarray(of, float) for of in steps)
    promised = dual_norms**2 / (2 * (problem.l0 + problem.l1 * dual_norms)) @ included
    fall = value - values_after @ probabilities
    # Once rounding is larger than what is left to gain, there is nothing to compare.
    visible = promised > 1e-10 * value[0, 0]
    gap = float(value[0, 0]) - problem.infimum
    smallest = (weights @ dual_norms.sum(-1)).min()
    return Ratios(
        problem.name,
        distribution,
        float((promised / fall)[visible].max()),
        float(weights @ promised.sum(-1)) / gap,
        float(smallest / _enough_for(problem, included, gap, depths.shape[1])),
    )


def _enough_for(problem: Problem, included: np.ndarray, gap: float, num_steps: int) -> float:
    """The ε of K = 2Δ Σ(L⁰_i / π_i) / ε² + 2Δ max(L¹_i / π_i) / ε."""
    quadratic = 2 * gap * np.sum(problem.l0 / included)
    linear = 2 * gap * np.max(problem.l1 / included)
    return (linear + math.sqrt(linear**2 + 4 * num_steps * quadratic)) / (2 * num_steps)
