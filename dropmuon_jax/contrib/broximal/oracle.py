"""The broximal operator: a minimizer of a function in the ball of a norm around a point."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dropmuon_jax._checks import check_nonnegative, check_parameters, static_int
from dropmuon_jax.contrib.broximal.balls import Ball, Norms, balls_of, check_norms
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers
from dropmuon_jax.schedules import Radius, check_radius, distinct_radii, leaf_radii

Leaves = list[Array]
ValueAndGrad = Callable[[Leaves], tuple[Array, Leaves]]

_MEMORY = 10  # values that the next one may lie above: M of Birgin, Martínez and Raydan
_SUFFICIENT = 1e-4  # part of the slope that must be gained: their γ
_HALVINGS = 30


class Brox(NamedTuple):
    """What the operator returns."""

    point: Any
    """z, in the ball."""
    value: Float[Array, ""]
    """f(z)."""
    gap: Float[Array, ""]
    """⟨∇f(z), z - argmin_w ⟨∇f(z), w⟩⟩ over the ball, at least 0: for a convex f the value is at
    most so far above the smallest in the ball. NaN if the value is."""
    num_steps: Int[Array, ""]
    """How many steps were taken."""


def brox(
    f: Callable[[Any], Array],
    x: Any,
    radius: Radius,
    norm: Norms,
    *,
    tolerance: float | Array = 1e-6,
    max_steps: int = 1000,
    dimension_numbers: DimensionNumbers | None = None,
) -> Brox:
    r"""Minimises a function over the ball of a norm around a point.

    .. math::
        \operatorname{brox}_t(x) \in \operatorname{argmin}_{\|z - x\| \le t} f(z)

    The first step is the minimizer of the linearisation, x + argmin ⟨∇f(x), ·⟩: normalised gradient
    descent, Muon, signSGD. Those behind it are of the spectral projected gradient method, where
    projections to the ball have a formula: the norms of this package with exact directions. For
    others, a :class:`~dropmuon_jax.norms.Geometry` of your own or a spectral norm by Newton and
    Schulz, they are of Frank and Wolfe's method, whose gap falls as 1 / steps. Exact minimizers are
    :func:`brox_quadratic`, :func:`brox_linear` and :func:`brox_absolute`.

    Args:
        f: A function of one pytree, differentiable where the method comes along. Of what has kinks
            the gap is still an upper bound if f is convex, but does not fall to zero.
        x: The centre of the ball: a pytree of arrays, of which each has a ball of its own.
        radius: t, positive: a number, or one for each path pattern.
        norm: The norm of each array, or one for each path pattern.
        tolerance: The gap at which it stops, at least 0.
        max_steps: After so many steps it stops in any case. Static.
        dimension_numbers: Which axes are fan-in and which fan-out, as in :func:`norm_lmo`.

    Returns:
        A :class:`Brox`; look at its `gap`, which is above `tolerance` where the steps ran out, and
        NaN where it came to a value that is none: there it stops. It can be jitted and mapped, and
        has no derivative: that of its value is :func:`ball_envelope`.

    Raises:
        TypeError: If `norm` is no norm, or a leaf of `x` no floating-point array.
        ValueError: For numbers out of range, and for a leaf without norm or radius, naming it.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> f = lambda z: 0.5 * jnp.sum(jnp.array([1.0, 9.0]) * z**2)
        >>> norm = dm.norms.sign_norm(normalized=False)
        >>> found = dm.contrib.broximal.brox(f, jnp.array([3.0, 1.0]), 2.0, norm)
        >>> print(found.point, found.gap < 1e-6)
        [1. 0.] True

    References:
        Gruntkowska, Li, Rane, Richtárik, *The Ball-Proximal (="Broximal") Point Method*, 2025,
        arXiv:2502.02002, and the same in other norms, 2025, arXiv:2510.00823: the operator. The
        solver: Birgin, Martínez, Raydan, 2000; Jaggi, 2013, for the certificate.
    """
    check_number_of_radius(radius)
    check_norms(norm, dimension_numbers)
    check_nonnegative("tolerance", tolerance)
    static_int("max_steps", max_steps, minimum=1)
    check_parameters(x, "x")
    leaves, structure = jax.tree.flatten(x)
    if not leaves:
        raise ValueError("x has no arrays.")
    radii = [jnp.asarray(of) for of in leaf_radii("radius", radius, x)]
    balls = balls_of(x, norm, radii, dimension_numbers)

    def value_and_grad(point: Leaves) -> tuple[Array, Leaves]:
        value, grads = jax.value_and_grad(f)(structure.unflatten(point))
        return value, jax.tree.leaves(grads)

    wide = [leaf.astype(np.promote_types(leaf.dtype, np.float32)) for leaf in leaves]
    _, grads = value_and_grad(wide)
    found = minimise(value_and_grad, wide, grads, balls, tolerance, max_steps)
    restored = [z.astype(leaf.dtype) for z, leaf in zip(found.point, leaves, strict=True)]
    return found._replace(point=structure.unflatten(restored))


def ball_envelope(
    f: Callable[[Any], Array], x: Any, radius: Radius, norm: Norms, **options: Any
) -> Float[Array, ""]:
    """The smallest value of a function in the ball around x, as a function of x with derivatives.

    N(x) = min f(x + s) over ‖s‖ ≤ t, with ∇N(x) = ∇f(x + s*), as Danskin's theorem has it where the
    minimizer is unique. N is convex if f is, has the same smallest value, and has it in the whole
    of X* + the ball.

    Args:
        f: As in :func:`brox`.
        x: As in :func:`brox`.
        radius: As in :func:`brox`.
        norm: As in :func:`brox`.
        **options: The other arguments of :func:`brox`.

    Returns:
        N(x).

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> f, norm = lambda z: jnp.sum(z**2), dm.norms.euclidean_norm()
        >>> envelope = lambda x: dm.contrib.broximal.ball_envelope(f, x, 2.0, norm)
        >>> x = jnp.array([3.0, 4.0])  # of length 5: the minimizer in the ball has length 3
        >>> print(envelope(x).round(4), (10 * jax.grad(envelope)(x)).round())
        9.0 [36. 48.]

    References:
        The envelope of the Euclidean ball is arXiv:2502.02002's, by secondary sources; its gradient
        in other norms is derived here.
    """
    centre = jax.lax.stop_gradient(x)
    point = jax.lax.stop_gradient(brox(f, centre, radius, norm, **options).point)
    return f(jax.tree.map(lambda x, centre, z: x + (z - centre), x, centre, point))


def check_number_of_radius(radius: Any) -> None:
    """Error unless a radius is positive, or a mapping to such: a schedule needs a step."""
    check_radius("radius", radius)
    for of in distinct_radii(radius):
        if not isinstance(of, int | float) and not hasattr(of, "dtype"):
            raise TypeError(f"radius must be a number or a mapping to numbers here, got {of!r}.")


class _State(NamedTuple):
    point: Leaves
    value: Array
    grads: Leaves
    gap: Array
    spectral: Array
    """The inverse of a curvature, along the last step."""
    values: Float[Array, " memory"]
    num_steps: Array


def minimise(
    value_and_grad: ValueAndGrad,
    centre: Leaves,
    grads: Leaves,
    balls: Sequence[Ball],
    tolerance: Any,
    max_steps: int,
) -> Brox:
    """From the gradients at the centre to a point in the ball; leaves of gradient 0 do not move."""
    start = _added(centre, [ball.argmin(g) for ball, g in zip(balls, grads, strict=True)])
    value, new = value_and_grad(start)
    kinds = [value.dtype, *(x.dtype for x in centre)]
    number = functools.reduce(np.promote_types, kinds)  # of what is summed over leaves
    rounding = max(float(jnp.finfo(of).eps) for of in kinds)

    def inner(x: Leaves, y: Leaves) -> Array:
        each = (jnp.vdot(a, b).astype(number) for a, b in zip(x, y, strict=True))
        return sum(each, jnp.zeros((), number))

    def gap_of(point: Leaves, value: Array, grads: Leaves) -> Array:
        nearest = _added(centre, [ball.argmin(g) for ball, g in zip(balls, grads, strict=True)])
        gap = jnp.maximum(inner(grads, _minus(point, nearest)), 0)
        return jnp.where(jnp.isnan(value), jnp.nan, gap)

    def direction(now: _State) -> Leaves:
        steps = []
        for ball, x, z, g in zip(balls, centre, now.point, now.grads, strict=True):
            if ball.project is None:
                steps.append(x + ball.argmin(g) - z)
            else:
                steps.append(x + ball.project(z - now.spectral.astype(z.dtype) * g - x) - z)
        return steps

    def step(now: _State) -> _State:
        move = direction(now)
        slope, highest = inner(now.grads, move), now.values.max()

        def is_too_high(trial: tuple[Array, Array, Leaves, Array]) -> Bool[Array, ""]:
            length, value, _, halvings = trial
            # Rounding of the values must not keep it from a last step.
            slack = 4 * rounding * jnp.abs(highest)
            enough = highest + _SUFFICIENT * length * slope + slack
            return ~(value <= enough) & (halvings < _HALVINGS)

        def at(length: Array, halvings: Array) -> tuple[Array, Array, Leaves, Array]:
            value, grads = value_and_grad(_added(now.point, _scaled(length, move)))
            return length, value.astype(number), grads, halvings

        def shorter(
            trial: tuple[Array, Array, Leaves, Array],
        ) -> tuple[Array, Array, Leaves, Array]:
            length, value, _, halvings = trial
            curvature = 2 * (value - now.value - length * slope) / length**2
            best = jnp.where(curvature > 0, -slope / jnp.where(curvature > 0, curvature, 1), 0)
            return at(jnp.clip(best, 0.1 * length, 0.5 * length), halvings + 1)

        one = jnp.ones((), number)
        first = at(one, jnp.int32(0))
        length, value, grads, _ = jax.lax.while_loop(is_too_high, shorter, first)
        moved = _scaled(length, move)
        curvature = inner(moved, _minus(grads, now.grads))
        square = inner(moved, moved)
        point = _added(now.point, moved)
        inverse = jnp.where(curvature > 0, square / jnp.where(curvature > 0, curvature, 1), 1e10)
        return _State(
            point,
            value,
            grads,
            gap_of(point, value, grads),
            jnp.clip(inverse, 1e-10, 1e10),
            jnp.roll(now.values, 1).at[0].set(value),
            now.num_steps + 1,
        )

    curvature = inner(_minus(start, centre), _minus(new, grads))
    square = inner(_minus(start, centre), _minus(start, centre))
    inverse = jnp.where(curvature > 0, square / jnp.where(curvature > 0, curvature, 1), 1.0)
    value, most = value.astype(number), jnp.asarray(tolerance, number)
    first = _State(
        start,
        value,
        new,
        gap_of(start, value, new),
        jnp.clip(inverse, 1e-10, 1e10),
        jnp.full(_MEMORY, value),
        jnp.int32(1),
    )
    last = jax.lax.while_loop(
        lambda now: (now.gap > most) & (now.num_steps < max_steps), step, first
    )
    return Brox(last.point, last.value, last.gap, last.num_steps)


def _added(x: Leaves, y: Leaves) -> Leaves:
    return [a + b for a, b in zip(x, y, strict=True)]


def _minus(x: Leaves, y: Leaves) -> Leaves:
    return [a - b for a, b in zip(x, y, strict=True)]


def _scaled(length: Array, x: Leaves) -> Leaves:
    return [length.astype(a.dtype) * a for a in x]
