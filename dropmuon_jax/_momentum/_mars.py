"""MARS: variance reduction with one gradient a step, approximately."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from dropmuon_jax._checks import check_floating, check_nonnegative, check_positive
from dropmuon_jax._masks import resolve_mask
from dropmuon_jax._mesh import on_auto_axes
from dropmuon_jax._momentum._schedules import check_decay_or_schedule
from dropmuon_jax._norms import euclidean_norm


class MarsMomentumState(NamedTuple):
    """State of :func:`mars_momentum`; of a leaf, as of the last step in which it was active."""

    momentum: optax.Updates
    """M, with the structure of the parameters."""
    last_grads: optax.Updates
    """The gradient of the last step, on its own batch."""
    started: Bool[Array, " leaves"]
    """Which leaves have a last gradient."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """All steps, for a schedule of the decay."""


def mars_momentum(
    decay: float | jax.Array | optax.Schedule = 0.95,
    *,
    gamma: float | jax.Array = 0.025,
    max_norm: float | jax.Array | None = 1.0,
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradients of active layers by the momentum of MARS, with one gradient a step.

    .. math::
        C &= g + \gamma \tfrac{\text{decay}}{1 - \text{decay}}\,(g - g_{\text{last}}) \\
        M &\leftarrow \text{decay}\, M + (1 - \text{decay})\,
            C \min\left(1, \tfrac{\text{max\_norm}}{\|C\|_F}\right)

    from M = 0. The last gradient stands in for the one of this batch at the previous parameters. It
    has noise of its own, so a small γ corrects a little and adds little: with γ = 1 this would be
    the raw gradient. With both gradients of a batch take :func:`mvr_momentum`, whose table compares
    the costs. γ = 0 without `max_norm` is :func:`momentum`.

    Args:
        decay: The weight of the past, in [0, 1): a number, a scalar array or a schedule of it over
            all steps.
        gamma: γ, the strength of the correction, at least 0.
        max_norm: Each leaf's C is shortened to this Frobenius norm, so that no batch outweighs the
            others; None for no limit. Gradients that are always longer all count alike.
        dtype: The dtype in which M and the last gradient are stored, by default the parameter's.
            The arithmetic is in float32 at least.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). Updates have the gradient's shape and dtype, and its sign. An inactive leaf has
        update zero and keeps every bit of its state, a :class:`MarsMomentumState`: when it wakes,
        its last gradient is that of its own last step. In a leaf's first step C = g.

    Raises:
        TypeError: If `dtype` is not of floating-point numbers.
        ValueError: For numbers out of range.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.mars_momentum(decay=0.75, gamma=0.5)
        >>> state = tx.init({"w": jnp.zeros(2)})
        >>> updates, state = tx.update({"w": jnp.array([3.0, 4.0])}, state)
        >>> print(updates["w"])  # of the direction of norm 1
        [0.15 0.2 ]

    References:
        Yuan et al., *MARS: Unleashing the Power of Variance Reduction for Training Large Models*,
        2024, arXiv:2411.10438, in its approximate form; Liu, Yuan, Gu, *MARS-M: When Variance
        Reduction Meets Matrices*, 2025, for matrices, with these defaults. Its code takes 0 for the
        gradient before the first, which makes the first C longer by 1 + γ decay / (1 - decay).
    """
    check_decay_or_schedule("decay", decay)
    check_nonnegative("gamma", gamma)
    if max_norm is not None:
        check_positive("max_norm", max_norm)
    if dtype is not None:
        check_floating("dtype", dtype)

    frobenius = euclidean_norm()

    def shortened(c: jax.Array, limit: jax.Array) -> jax.Array:
        return jnp.where(frobenius.norm(c) > limit, limit * frobenius.direction(c), c)

    def init_fn(params: optax.Params) -> MarsMomentumState:
        def zeros() -> optax.Updates:
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype or p.dtype), params)

        started = jnp.zeros(len(jax.tree.leaves(params)), bool)
        return MarsMomentumState(zeros(), zeros(), started, jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        del params
        layer_mask = resolve_mask(layer_mask, updates, extra_args)
        if not isinstance(state, MarsMomentumState):
            raise TypeError(
                "The state given to mars_momentum is that of another momentum: make one with "
                "tx.init(params)."
            )
        past = jnp.asarray(decay(state.count) if callable(decay) else decay)

        def step(m: Array, g: Array, g_last: Array, started: Array) -> Array:
            beta = past.astype(m.dtype)
            correction = jnp.where(started, g - g_last, 0)
            c = g + jnp.asarray(gamma, m.dtype) * beta / (1 - beta) * correction
            if max_norm is not None:
                limit = jnp.asarray(max_norm, m.dtype)
                c = on_auto_axes(shortened, c, limit, named=(), results_like=c)
            return beta * m + (1 - beta) * c

        treedef, structure = jax.tree.structure(state.momentum), jax.tree.structure(updates)
        momentum, last_grads = jax.tree.leaves(state.momentum), jax.tree.leaves(state.last_grads)
        directions = []
        gradients = zip(*map(jax.tree.leaves, (updates, layer_mask)), strict=True)
        for i, (g, active) in enumerate(gradients):
            if not active:
                directions.append(jnp.zeros_like(g))
                continue
            m, g_last = momentum[i], last_grads[i]
            wide = np.result_type(np.float32, m.dtype, g.dtype)
            new = step(m.astype(wide), g.astype(wide), g_last.astype(wide), state.started[i])
            directions.append(new.astype(g.dtype))
            momentum[i], last_grads[i] = new.astype(m.dtype), g.astype(g_last.dtype)
        return structure.unflatten(directions), MarsMomentumState(
            treedef.unflatten(momentum),
            treedef.unflatten(last_grads),
            state.started | np.array(jax.tree.leaves(layer_mask), bool),
            jnp.asarray(optax.safe_increment(state.count)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
