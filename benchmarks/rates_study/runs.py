"""Runs of every method on the non-convex and on the star-convex problems."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import dropmuon_jax as dm
from rates_study.problems import BALL, Problem
from rates_study.settings import Settings

SPECTRAL_NORM = dm.norms.spectral_norm(orthogonalize=dm.orthogonalize.svd_polar_factor)
STAR_CONVEX_RATE = dm.schedules.star_convex_rate()


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer by its first radius, and the exponent of K in its upper bound."""

    make: Callable[[Settings, Any], optax.GradientTransformation]
    bound: float
    two_gradients: bool


def _nonconvex(momentum: Any, radius: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(momentum, dm.norm_lmo(SPECTRAL_NORM), optax.scale_by_learning_rate(radius))


def _star_convex(momentum: Any) -> optax.GradientTransformation:
    return optax.chain(
        momentum,
        dm.norm_lmo(SPECTRAL_NORM, BALL),
        optax.add_decayed_weights(1.0),
        optax.scale_by_learning_rate(STAR_CONVEX_RATE),
    )


NONCONVEX: dict[str, Method] = {
    "EMA": Method(
        lambda _, t: _nonconvex(
            dm.momentum(dm.schedules.gluon_decay()), dm.schedules.gluon_radius(t)
        ),
        bound=-1 / 4,
        two_gradients=False,
    ),
    "MVR-1": Method(
        lambda _, t: _nonconvex(
            dm.mvr_momentum(dm.schedules.mvr_decay()), dm.schedules.mvr_radius(t)
        ),
        bound=-1 / 3,
        two_gradients=True,
    ),
    "MVR-2": Method(
        lambda settings, t: _nonconvex(
            dm.mvr_momentum(settings.mvr_decay, variant=2, q=dm.schedules.mvr_q()),
            dm.schedules.mvr_radius(t),
        ),
        bound=-1 / 3,
        two_gradients=True,
    ),
    "MVR-3": Method(
        lambda settings, t: _nonconvex(
            dm.mvr_momentum(settings.mvr_decay, variant=3, q=dm.schedules.mvr_q()),
            dm.schedules.mvr_radius(t),
        ),
        bound=-1 / 3,
        two_gradients=True,
    ),
}
"""Muon with the schedules of the non-convex theorems."""

STAR_CONVEX: dict[str, Method] = {
    "EMA": Method(
        lambda *_: _star_convex(
            dm.momentum(lambda count: 1 - STAR_CONVEX_RATE(count) ** (2 / 3)),
        ),
        bound=-1 / 3,
        two_gradients=False,
    ),
    "MVR-1": Method(
        lambda *_: _star_convex(dm.mvr_momentum(lambda count: 1 - STAR_CONVEX_RATE(count))),
        bound=-1 / 2,
        two_gradients=True,
    ),
}
"""X ← (1 - β_k)X - β_k · ball · UVᵀ; the new gradient weighs β_k^⅔ in the average, β_k in MVR."""


def gradient_norm(problem: Problem, params: Array) -> Array:
    """‖∇f(X)‖* in the dual of the spectral norm: the nuclear norm."""
    return dm.norms.spectral_norm().dual_norm(jax.grad(problem.value)(params))


def gap(problem: Problem, params: Array) -> Array:
    """F(X) - f*, where f* = 0."""
    return problem.value(params)


def run(
    settings: Settings,
    problem: Problem,
    method: Method,
    radii: tuple[float, ...],
    measure: Callable[[Problem, Array], Array],
) -> Float[np.ndarray, "radii seeds measurements"]:
    """What is measured after every `measure_every` steps."""

    def of_run(key: Array, radius: Array) -> Array:
        tx = optax.with_extra_args_support(method.make(settings, radius))

        def step(carry: Any, key: Array) -> Any:
            params, state = carry
            sample, extra_args = problem.sample(key), {}
            if method.two_gradients:
                _, (grads, extra_args["prev_params_grads"]) = dm.masked_value_and_grad_pair(
                    problem.loss
                )(params, dm.prev_params(state, params), sample, layer_mask=None)
            else:
                grads = jax.grad(problem.loss)(params, sample)
            updates, state = tx.update(grads, state, params, **extra_args)
            return (optax.apply_updates(params, updates), state), None

        def block(carry: Any, key: Array) -> Any:
            carry, _ = jax.lax.scan(step, carry, jax.random.split(key, settings.measure_every))
            return carry, measure(problem, carry[0])

        keys = jax.random.split(key, settings.horizon // settings.measure_every)
        return jax.lax.scan(block, (problem.start, tx.init(problem.start)), keys)[1]

    of_seeds = jax.vmap(of_run, (0, None))
    keys = jax.random.split(jax.random.key(settings.seed), settings.num_seeds)
    return np.asarray(jax.jit(jax.vmap(of_seeds, (None, 0)))(keys, jnp.asarray(radii)))
