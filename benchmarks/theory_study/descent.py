"""Deterministic sharp steps of the layers from a depth on, many runs at once."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from theory_study.problems import Params, Problem


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
