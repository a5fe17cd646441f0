"""Deterministic sharp steps of the layers from a depth on, and the bounds on what they bring."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from analysis.smooth_problems import Params, Problem


class Step(NamedTuple):
    """What a step saw."""

    value: Float[Array, ""]
    """f before it."""
    dual_norms: Float[Array, " layers"]
    """Of the gradient there."""
    values_after: Float[Array, " depths"]
    """f after a step at each depth, of which one was taken."""


Descent = Callable[[Params, Int[Array, "runs steps"]], tuple[Params, Step]]


def descend(problem: Problem) -> Descent:
    """X_i ← X_i - sharp(∇_i f) / (L⁰_i + L¹_i ‖∇_i f‖*) for every layer from the depth on.

    Returns:
        A jitted function of parameters and the depths of each step, both with an axis of runs: the
        parameters after them, and a :class:`Step` with axes of runs and of steps.
    """

    def step(params: Params, depth: Int[Array, ""]) -> tuple[Params, Step]:
        value, grads = jax.value_and_grad(problem.loss)(params)
        sharps = [norm.sharp(g) for norm, g in zip(problem.norms, grads, strict=True)]
        # ⟨G, G♯⟩ = ‖G‖*²
        squares = [jnp.sum(g * sharp) for g, sharp in zip(grads, sharps, strict=True)]
        dual_norms = jnp.sqrt(jnp.stack(squares))
        bounds = problem.l0 + problem.l1 * dual_norms
        full = tuple(x - sharp / of for x, sharp, of in zip(params, sharps, bounds, strict=True))

        def at(depth: int | Int[Array, ""]) -> Params:
            both = enumerate(zip(params, full, strict=True))
            return tuple(jnp.where(i >= depth, new, old) for i, (old, new) in both)

        values_after = jnp.stack([problem.loss(at(s)) for s in range(len(params))])
        return at(depth), Step(value, dual_norms, values_after)

    return jax.jit(jax.vmap(lambda params, depths: jax.lax.scan(step, params, depths)))


def repeated(params: Params, runs: int) -> Params:
    """The same start for every run."""
    return tuple(jnp.broadcast_to(x, (runs, *x.shape)) for x in params)


class Ratios(NamedTuple):
    """What is bounded over its bound, at most 1 if the theory is right."""

    one_step: float
    """The promised over the expected fall of f in a step, at the worst of all points visited; the
    expectation over depths is exact."""
    many_steps: float
    """What the gradients of a run promise together, over f(X⁰) - inf f."""
    gradient: float
    """The smallest E Σ_i a_i of a step, over the ε for which the number of steps is enough."""


def ratios(
    problem: Problem,
    descent: Descent,
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
    # ε of K = 2Δ Σ(L⁰_i / π_i) / ε² + 2Δ max(L¹_i / π_i) / ε
    quadratic = 2 * gap * np.sum(problem.l0 / included)
    linear = 2 * gap * np.max(problem.l1 / included)
    num_steps = depths.shape[1]
    enough_for = (linear + math.sqrt(linear**2 + 4 * num_steps * quadratic)) / (2 * num_steps)
    return Ratios(
        float((promised / fall)[visible].max()),
        float(weights @ promised.sum(-1)) / gap,
        float((weights @ dual_norms.sum(-1)).min() / enough_for),
    )
