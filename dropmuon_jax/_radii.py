"""How far a step goes: the radius of each leaf's ball, fixed, scheduled or from the dual norm."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dropmuon_jax._checks import check_nonnegative, check_positive, is_python_number
from dropmuon_jax._layers import leaf_paths, masked_paths, match_leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptiveRadius:
    """The constants of a radius ‖M‖* / (L⁰ + L¹‖M‖*), made by :func:`adaptive_radius`."""

    l0: float | Array
    l1: float | Array


LeafRadius = float | Array | optax.Schedule | AdaptiveRadius
Radius = LeafRadius | Mapping[str, LeafRadius]


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
        l1: L¹, at least 0, in the units 1 / ‖parameter‖. One of the two is positive.

    Returns:
        What the argument `radius` of :func:`norm_lmo` and its family takes, for all leaves or, in a
        mapping, by path pattern. :func:`fit_smoothness` estimates the constants.

    Raises:
        ValueError: If a Python number is negative, or both are zero.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.sign_lmo(dm.adaptive_radius(l0=2.0, l1=1.0), normalized=False)
        >>> grads = {"w": jnp.array([5.0, -1.0])}  # dual norm 6, so t = 6 / (2 + 6)
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(updates["w"])
        [ 0.75 -0.75]

    References:
        Riabinin et al., *Gluon: Making Muon & Scion Great Again!*, 2025, arXiv:2505.13416,
        Theorem 1, for exact gradients; with momentum in the place of the gradient it is a
        heuristic.
    """
    check_nonnegative("l0", l0)
    check_nonnegative("l1", l1)
    if is_python_number(l0) and is_python_number(l1) and l0 == 0 and l1 == 0:
        raise ValueError("l0 and l1 are both 0, which makes the radius infinite: give one of them.")
    return AdaptiveRadius(l0, l1)


def gluon_radius(radius: float | Array) -> optax.Schedule:
    """Gluon's radius for stochastic gradients: radius · (k + 1)^(-3/4) in step k.

    Args:
        radius: That of the first step, positive.

    Returns:
        A schedule, for an LMO's `radius` or for a learning rate.

    Raises:
        ValueError: If `radius` is a Python number that is not positive.

    Examples:
        >>> import dropmuon_jax as dm
        >>> schedule = dm.gluon_radius(0.8)
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
        radius: That of the first step, positive.

    Returns:
        A schedule, for an LMO's `radius` or for a learning rate.

    Raises:
        ValueError: If `radius` is a Python number that is not positive.

    Examples:
        >>> import dropmuon_jax as dm
        >>> schedule = dm.mvr_radius(0.8)
        >>> print(f"{schedule(0):.3f} {schedule(7):.3f}")
        0.800 0.200

    References:
        Qian et al., *Muon is Provably Faster with Momentum Variance Reduction*, 2025,
        arXiv:2512.16598: the rate K^-⅓, from which the schedule is derived, with :func:`mvr_decay`
        for the momentum.
    """
    return _falling_radius(radius, 2 / 3)


def star_convex_rate() -> optax.Schedule:
    """γ of a constrained step for star-convex problems: 2 / (k + 2) in step k.

    Returns:
        A schedule for the learning rate of :func:`muon_mvr`.

    Examples:
        >>> import dropmuon_jax as dm
        >>> rate = dm.star_convex_rate()
        >>> print(rate(0), rate(6))
        1.0 0.25

    References:
        The usual step of Frank and Wolfe's method; the constants of Qian et al., 2025,
        arXiv:2512.16598, are not seen written out.
    """

    def schedule(count: Any) -> Array:
        return 2 / (jnp.asarray(count, jnp.result_type(float)) + 2)

    return schedule


def _falling_radius(radius: float | Array, power: float) -> optax.Schedule:
    check_positive("radius", radius)

    def schedule(count: Any) -> Array:
        steps = jnp.asarray(count, jnp.result_type(float)) + 1
        return jnp.asarray(radius, steps.dtype) * steps**-power

    return schedule


def check_radius(name: str, radius: Any) -> None:
    """Error unless a radius is positive, a schedule, adaptive, or a mapping to such."""
    if isinstance(radius, Mapping):
        if not radius:
            raise ValueError(
                f"{name} is an empty mapping; give a number, or a pattern for each leaf."
            )
        for pattern, of_leaf in radius.items():
            if not isinstance(pattern, str):
                raise TypeError(f"{name} is by path patterns, which are strings, got {pattern!r}.")
            if isinstance(of_leaf, Mapping):
                raise TypeError(
                    f"{name}[{pattern!r}] is a mapping again; write one pattern of both."
                )
            check_radius(f"{name}[{pattern!r}]", of_leaf)
    elif any(radius is factory for factory in (gluon_radius, mvr_radius, adaptive_radius)):
        raise TypeError(f"{name} is dm.{radius.__name__} itself: call it with its arguments.")
    elif not isinstance(radius, AdaptiveRadius) and not callable(radius):
        check_positive(name, radius)


def leaf_radii(name: str, radius: Radius, tree: Any) -> list[LeafRadius]:
    """The radius of each leaf, in order.

    Raises:
        ValueError: For a pattern that matches no leaf, here or in another chain of the tree, and
            for a leaf that matches none or two.
    """
    paths = leaf_paths(tree)
    if not isinstance(radius, Mapping):
        return [radius] * len(paths)
    if not paths:  # a placeholder of Optax's, or an empty subtree
        return []
    radii = match_leaves(name, radius, paths, elsewhere=masked_paths(tree))
    missing = [path for path in paths if path not in radii]
    if missing:
        raise ValueError(
            f"{name} has no pattern for {missing[:3]}: every leaf needs one. The patterns are "
            f"{list(radius)}."
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
                f"A schedule must return one number, and one of {name} returned an array of shape "
                f"{length.shape}."
            )
        return length
    return jnp.asarray(radius)
