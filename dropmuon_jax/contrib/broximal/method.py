"""The broximal point method as an Optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dropmuon_jax._checks import check_nonnegative, static_int
from dropmuon_jax.contrib.broximal.balls import Norms, balls_of, check_norms
from dropmuon_jax.contrib.broximal.oracle import minimise
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers
from dropmuon_jax.schedules import (
    AdaptiveRadius,
    Radius,
    check_radius,
    distinct_radii,
    leaf_radii,
)
from dropmuon_jax.transforms.masked import masked_transformation


class BroximalPointState(NamedTuple):
    """State of :func:`broximal_point`."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of all steps."""
    value: Array
    """What the last step has reached, of its own batch."""
    gap: Array
    """How far that is above the smallest in the ball at most, if the loss is convex."""


def broximal_point(
    radius: Radius,
    norm: Norms,
    *,
    num_steps: int,
    tolerance: float = 0.0,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps to where the loss of a batch is smallest in the ball around the parameters.

    .. math::
        X \leftarrow \text{about } \operatorname{argmin}_{\|Z - X\| \le \text{radius}} f(Z)

    by so many inner steps of :func:`brox`. The first one minimises the linearisation by the
    gradient that `update` is given: with `num_steps=1` this is :func:`norm_lmo`, normalised
    gradient descent in the Euclidean norm and Muon in the spectral one, with the sign of a step.
    Each further inner step takes the value and the gradient of the same batch once or more, at the
    points that it tries.

    Args:
        radius: The size of the ball around each leaf: a number, a scalar array or a schedule of it
            over all steps, or a mapping from path patterns to these.
        norm: Of each leaf, or a mapping from path patterns to norms.
        num_steps: Inner steps, at least 1. Static.
        tolerance: The gap at which it needs no further ones.
        dimension_numbers: Which axes are fan-in and which fan-out, as in :func:`norm_lmo`.

    Returns:
        A transformation whose updates are added to the parameters as they are, with no learning
        rate behind it. Its `update` needs `params` and `value_and_grad_fn`, from parameters to the
        value and the gradient of this batch, and takes `layer_mask` (by default all active):
        inactive leaves stay where they are in the minimization, too. The state is a
        :class:`BroximalPointState`.

    Raises:
        TypeError: For an adaptive radius or what is no norm; in `update`, without
            `value_and_grad_fn`.
        ValueError: For numbers out of range; at `init`, for a leaf without norm or radius, naming
            it; in `update`, without `params`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> loss = lambda p: jnp.sum(jnp.array([1.0, 9.0]) * p["w"] ** 2)
        >>> tx = dm.contrib.broximal.broximal_point(1.0, dm.norms.euclidean_norm(), num_steps=20)
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> state, value_and_grad_fn = tx.init(params), jax.value_and_grad(loss)
        >>> for _ in range(6):
        ...     value, grads = value_and_grad_fn(params)
        ...     updates, state = tx.update(
        ...         grads, state, params, value_and_grad_fn=value_and_grad_fn
        ...     )
        ...     params = optax.apply_updates(params, updates)
        >>> print(value > 0.1, state.value < 1e-6)  # before the last step, and after it
        True True

    References:
        Gruntkowska, Li, Rane, Richtárik, 2025, arXiv:2502.02002, and in other norms
        arXiv:2510.00823. The inexact steps, and what is done with dropped layers, are ours.
    """
    check_radius("radius", radius)
    if any(isinstance(of, AdaptiveRadius) for of in distinct_radii(radius)):
        raise TypeError("radius must be numbers or schedules here: an adaptive one is of an LMO.")
    check_norms(norm, dimension_numbers)
    static_int("num_steps", num_steps, minimum=1)
    check_nonnegative("tolerance", tolerance)

    def init(params: optax.Params) -> BroximalPointState:
        radii = leaf_radii("radius", radius, params)
        balls_of(params, norm, [jnp.zeros(()) for _ in radii], dimension_numbers)
        nothing = jnp.full((), jnp.inf)
        return BroximalPointState(jnp.zeros((), jnp.int32), nothing, nothing)

    def update(
        updates: optax.Updates, state: Any, params: Any, layer_mask: Any, extra_args: Any
    ) -> tuple[optax.Updates, BroximalPointState]:
        value_and_grad_fn = extra_args.get("value_and_grad_fn")
        if value_and_grad_fn is None:
            raise TypeError(
                "broximal_point needs value_and_grad_fn, the value and the gradient of this batch "
                "at other parameters: tx.update(grads, opt_state, params, "
                "value_and_grad_fn=lambda params: jax.value_and_grad(loss_fn)(params, batch))."
            )
        if params is None:
            raise ValueError(
                "broximal_point steps from the parameters: pass them to update, "
                "tx.update(grads, opt_state, params, value_and_grad_fn=…)."
            )
        leaves, structure = jax.tree.flatten(params)
        flags = jax.tree.leaves(layer_mask)

        def active(grads: Any) -> list[Array]:
            pairs = zip(jax.tree.leaves(grads), flags, leaves, strict=True)
            return [(g if on else jnp.zeros_like(g)).astype(_wide(x)) for g, on, x in pairs]

        def value_and_grad(point: list[Array]) -> tuple[Array, list[Array]]:
            narrow = [z.astype(leaf.dtype) for z, leaf in zip(point, leaves, strict=True)]
            value, grads = value_and_grad_fn(structure.unflatten(narrow))
            return value.astype(np.promote_types(value.dtype, np.float32)), active(grads)

        radii = [
            jnp.asarray(of(state.count) if callable(of) else of)
            for of in leaf_radii("radius", radius, params)
        ]
        balls = balls_of(params, norm, radii, dimension_numbers)
        centre = [leaf.astype(_wide(leaf)) for leaf in leaves]
        found = minimise(value_and_grad, centre, active(updates), balls, tolerance, num_steps)
        steps = [
            (z - x).astype(leaf.dtype)
            for z, x, leaf in zip(found.point, centre, leaves, strict=True)
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        default = jnp.zeros(()).dtype
        new = BroximalPointState(count, found.value.astype(default), found.gap.astype(default))
        return structure.unflatten(steps), new

    return masked_transformation(init, update)


def _wide(leaf: Array) -> Any:
    return np.promote_types(leaf.dtype, np.float32)
