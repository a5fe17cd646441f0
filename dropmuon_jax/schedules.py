"""Schedules with which theory proves rates, and radii: numbers, schedules, adaptive or by path."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float

from dropmuon_jax._checks import (
    check_decay,
    check_nonnegative,
    check_number,
    check_positive,
    is_python_number,
)
from dropmuon_jax.layers.by_path import match_leaves
from dropmuon_jax.layers.trees import leaf_paths, masked_paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptiveRadius:
    """The constants of a radius ‖M‖* / (L⁰ + L¹‖M‖*), made by :func:`adaptive_radius`."""

    l0: float | Array
    l1: float | Array


LeafRadius = float | Array | optax.Schedule | AdaptiveRadius
Radius = LeafRadius | Mapping[str, LeafRadius]


def gluon_decay() -> optax.Schedule:
    """Gluon's decay of the momentum for stochastic gradients: 1 - (k + 1)^-½ in step k.

    The first momentum is the first gradient, and the past weighs more and more.

    Returns:
        A schedule for :func:`momentum`.

    Examples:
        >>> import dropmuon_jax as dm
        >>> decay = dm.schedules.gluon_decay()
        >>> print(decay(0), decay(3), decay(99))
        0.0 0.5 0.9

    References:
        Riabinin et al., *Gluon*, 2025, arXiv:2505.13416, the stochastic theorem, with
        :func:`gluon_radius`.
    """
    return lambda count: 1 - _steps(count) ** -0.5


def mvr_decay() -> optax.Schedule:
    """The decay of MVR for noisy non-convex problems: 1 - (k + 1)^-⅔ in step k.

    With steps of length :func:`mvr_radius` the error of the momentum falls as K^-⅓, and with it
    the gradient; the averages of :func:`gluon_decay` reach K^-¼.

    Returns:
        A schedule for the decay of variant 1 of :func:`mvr_momentum`. Variants 2 and 3 reach the
        rate by :func:`mvr_q`, with any fixed decay.

    Examples:
        >>> import dropmuon_jax as dm
        >>> print(f"{dm.schedules.mvr_decay()(7):.3f}")
        0.750

    References:
        Qian et al., 2025, arXiv:2512.16598: the rate. The schedule is derived from it: weights of
        the new gradient and steps ∝ K^-⅔ balance noise and movement, as in STORM.
    """
    weight = mvr_q()
    return lambda count: 1 - weight(count)


def mvr_q() -> optax.Schedule:
    """The weight q of the new gradient in MVR-2 and MVR-3 for noisy problems: (k + 1)^-⅔ in step k.

    Returns:
        A schedule for the `q` of :func:`mvr_momentum`; at k = 7 it is ¼.

    References:
        Derived from the rate of Qian et al., 2025, arXiv:2512.16598, like :func:`mvr_decay`.
    """
    return lambda count: _steps(count) ** (-2 / 3)


def gluon_radius(radius: float | Array) -> optax.Schedule:
    """Gluon's radius for stochastic gradients: radius · (k + 1)^(-3/4) in step k.

    Args:
        radius: The radius of the first step, positive; a ValueError for other Python numbers.

    Returns:
        A schedule, for an LMO's `radius` or for a learning rate.

    Examples:
        >>> import dropmuon_jax as dm
        >>> schedule = dm.schedules.gluon_radius(0.8)
        >>> print(schedule(0), schedule(15))
        0.8 0.1

    References:
        Riabinin et al., *Gluon*, 2025, arXiv:2505.13416, the stochastic theorem, with
        :func:`gluon_decay` for the momentum.
    """
    return _falling_radius(radius, 0.75)


def mvr_radius(radius: float | Array) -> optax.Schedule:
    """The radius for variance-reduced momentum: radius · (k + 1)^-⅔ in step k.

    Args:
        radius: The radius of the first step, positive; a ValueError for other Python numbers.

    Returns:
        A schedule, for an LMO's `radius` or for a learning rate.

    Examples:
        >>> import dropmuon_jax as dm
        >>> print(f"{dm.schedules.mvr_radius(0.8)(7):.3f}")
        0.200

    References:
        Qian et al., *Muon is Provably Faster with Momentum Variance Reduction*, 2025,
        arXiv:2512.16598: the rate K^-⅓, from which the schedule is derived, with :func:`mvr_decay`
        for the momentum.
    """
    return _falling_radius(radius, 2 / 3)


def star_convex_rate() -> optax.Schedule:
    """γ of a constrained step for star-convex problems: 2 / (k + 2) in step k.

    Returns:
        A schedule for the learning rate of a step within a ball, whose weight decay is 1, as
        :func:`scion` takes it.

    Examples:
        >>> import dropmuon_jax as dm
        >>> rate = dm.schedules.star_convex_rate()
        >>> print(rate(0), rate(6))
        1.0 0.25

    References:
        The usual step of Frank and Wolfe's method; the constants of Qian et al., 2025,
        arXiv:2512.16598, are not seen written out.
    """
    return lambda count: 2 / (_steps(count) + 1)


def adaptive_radius(l0: float | Array, l1: float | Array = 0.0) -> AdaptiveRadius:
    r"""The radius of Gluon for a layer of known smoothness: give it as `radius` of an LMO.

    .. math::
        t = \frac{\|M\|_*}{L^0 + L^1 \|M\|_*}

    with the layer's own dual norm, which costs one inner product. It minimises the bound
    :math:`f(X) - t\|M\|_* + \tfrac{t^2}{2}(L^0 + L^1\|M\|_*)` for M = ∇f(X). With L¹ = 0 it is the
    sharp form with step size 1/L⁰; with L⁰ = 0 the constant radius 1/L¹. Behind it belongs a
    learning rate of 1; another one multiplies the radius.

    Args:
        l0: L⁰, at least 0, in the units ‖gradient‖* / ‖parameter‖.
        l1: L¹, at least 0, in the units 1 / ‖parameter‖. A ValueError if both are 0.

    Returns:
        What the argument `radius` of :func:`norm_lmo` takes, for all leaves or, in a mapping, by
        path pattern. :func:`~dropmuon_jax.planning.fit_smoothness` estimates the constants.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> sign = dm.norms.sign_norm(normalized=False)
        >>> tx = dm.norm_lmo(sign, dm.schedules.adaptive_radius(l0=2.0, l1=1.0))
        >>> grads = {"w": jnp.array([5.0, -1.0])}  # dual norm 6, so t = 6 / (2 + 6)
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(updates["w"])
        [ 0.75 -0.75]

    References:
        Riabinin et al., *Gluon: Making Muon & Scion Great Again!*, 2025, arXiv:2505.13416,
        Theorem 1, for exact gradients; with momentum it is a heuristic.
    """
    check_nonnegative("l0", l0)
    check_nonnegative("l1", l1)
    if is_python_number(l0) and is_python_number(l1) and l0 == l1 == 0:
        raise ValueError("l0 and l1 are both 0, which makes the radius infinite: give one of them.")
    return AdaptiveRadius(l0, l1)


def _steps(count: Any) -> Array:
    """The number of step k counted from 1, in the default floating-point dtype."""
    return jnp.asarray(count, jnp.result_type(float)) + 1


def _falling_radius(radius: float | Array, power: float) -> optax.Schedule:
    check_positive("radius", radius)
    return lambda count: jnp.asarray(radius, jnp.result_type(float)) * _steps(count) ** -power


def check_decay_or_schedule(name: str, value: Any) -> None:
    """Error unless a decay is a number in [0, 1), a scalar array or a schedule."""
    _check_called(name, value)
    if isinstance(first := _first_value(value), optax.GradientTransformation):
        raise TypeError(f"{name} is a function that makes a transformation: call it.")
    check_decay(name, first)


def check_q_or_schedule(name: str, value: Any) -> None:
    """Error unless the weight of a new gradient is a number in (0, 1], an array or a schedule."""
    _check_called(name, value)
    first = _first_value(value)
    check_number(name, first)
    if is_python_number(first) and not 0 < first <= 1:
        raise ValueError(f"{name} is the weight of the new gradient, in (0, 1], got {first}.")


def check_radius(name: str, radius: Any) -> None:
    """Error unless a radius is positive, a schedule, adaptive, or a mapping to such."""
    if isinstance(radius, Mapping):
        if not radius:
            raise ValueError(f"{name} is an empty mapping; give a number, or a pattern for each.")
        for pattern, of_leaf in radius.items():
            if not isinstance(pattern, str):
                raise TypeError(f"{name} is by path patterns, which are strings, got {pattern!r}.")
            if isinstance(of_leaf, Mapping):
                raise TypeError(
                    f"{name}[{pattern!r}] is a mapping again; write one pattern of both."
                )
            check_radius(f"{name}[{pattern!r}]", of_leaf)
        return
    _check_called(name, radius)
    if not isinstance(radius, AdaptiveRadius) and not callable(radius):
        check_positive(name, radius)


def _check_called(name: str, value: Any) -> None:
    """Error for a function that makes a schedule or radius, in the place of one."""
    factories = (gluon_decay, mvr_decay, mvr_q, gluon_radius, mvr_radius, star_convex_rate)
    for factory in (*factories, adaptive_radius):
        if value is factory:
            raise TypeError(f"{name} is dm.schedules.{factory.__name__} itself: call it.")


def _first_value(value: Any) -> Any:
    """A number as it is; the first value of a schedule, as a Python number if it is known now."""
    if not callable(value):
        return value
    first: Any = value(jnp.zeros((), jnp.int32))
    return first if isinstance(first, Tracer) or np.ndim(first) else float(first)


def leaf_radii(name: str, radius: Radius, tree: Any) -> list[LeafRadius]:
    """The radius of each leaf, in order; an error for a leaf or pattern that matches none."""
    paths = leaf_paths(tree)
    if not isinstance(radius, Mapping):
        return [radius] * len(paths)
    if not paths:  # a placeholder of Optax's, or an empty subtree
        return []
    radii = match_leaves(name, radius, paths, elsewhere=masked_paths(tree))
    if missing := [path for path in paths if path not in radii]:
        raise ValueError(
            f"{name} has no pattern for {missing[:3]}: every leaf needs one, got {list(radius)}."
        )
    return [radii[path].value for path in paths]


def distinct_radii(radius: Radius) -> list[LeafRadius]:
    """What a mapping maps to, or the one radius of all leaves."""
    return list(radius.values()) if isinstance(radius, Mapping) else [radius]


def step_length(
    name: str,
    radius: LeafRadius,
    count: Array | None,
    dual_norm: Callable[[], Float[Array, " batch"]],
) -> Array:
    """The length of the step: one number, or one for each matrix of the leaf."""
    if isinstance(radius, AdaptiveRadius):
        dual = dual_norm()
        l0, l1 = jnp.asarray(radius.l0, dual.dtype), jnp.asarray(radius.l1, dual.dtype)
        # Divided by ‖M‖*, for dual norms of any size. Of a zero gradient the step is zero.
        inverse = l0 / jnp.where(dual == 0, 1, dual) + l1
        return jnp.where(dual == 0, 0, 1 / jnp.where(dual == 0, 1, inverse))
    if callable(radius):
        assert count is not None  # the state of a schedule
        length = jnp.asarray(radius(count))
        if length.ndim:
            raise ValueError(
                f"A schedule must return one number; one of {name} returned shape {length.shape}."
            )
        return length
    return jnp.asarray(radius)
