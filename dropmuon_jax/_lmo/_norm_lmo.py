"""A norm as a transformation: the steepest step in its ball, or its sharp operator."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dropmuon_jax._checks import describe, static_int
from dropmuon_jax._many_matrices import DEFAULT_MEMORY_LIMIT, map_matrices, working_bytes
from dropmuon_jax._masks import resolve_mask
from dropmuon_jax._matrices import (
    Blocks,
    DimensionNumbers,
    check_dimension_numbers,
    matrix_shape,
    to_blocks,
)
from dropmuon_jax._mesh import known_shardings, on_auto_axes
from dropmuon_jax._norms import Norm, inner
from dropmuon_jax._radii import (
    AdaptiveRadius,
    Radius,
    check_radius,
    distinct_radii,
    leaf_radii,
    step_length,
)


class RadiusState(NamedTuple):
    """State of an LMO whose radius is a schedule; the others have none."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """All steps, those of inactive leaves included."""


def norm_lmo(
    norm: Norm,
    radius: Radius = 1.0,
    *,
    dimension_numbers: DimensionNumbers | None = None,
    memory_limit: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the updates of active layers by the steepest step in a norm's ball.

    .. math::
        \text{radius} \cdot D(G)
        = -\operatorname{argmin}_{\|Z\| \le \text{radius}} \langle G, Z \rangle

    It keeps the gradient's sign, so that `optax.scale_by_learning_rate` descends:

    * the unconstrained step X - γ radius D is `optax.chain(lmo, scale_by_learning_rate(γ))`;
    * the constrained one, (1 - γ)X - γ radius D, is
      `optax.chain(lmo, optax.add_decayed_weights(1.0), optax.scale_by_learning_rate(γ))`: with
      0 ≤ γ ≤ 1 a convex combination, so that ‖X‖ ≤ radius stays true once it is. (With layers that
      are dropped, `dm.per_layer(optax.add_decayed_weights(1.0), layers)`.)

    :func:`newton_schulz_lmo`, :func:`svd_lmo`, :func:`sign_lmo`, :func:`column_lmo`,
    :func:`row_lmo`, :func:`rms_lmo` and :func:`euclidean_lmo` are this with their norms.

    Args:
        norm: The norm, such as :func:`spectral_norm`, the same for every leaf; send leaves with
            other norms through chains of their own, by :func:`chain_subtrees`.
        radius: Size of the ball: a positive number or scalar array, a schedule of it over all
            steps, :func:`adaptive_radius`, or a mapping from path patterns, as in
            :func:`layers_by_path`, to one of these. A mapping must match every leaf once.
        dimension_numbers: Which axes of a matrix are fan-in and which fan-out; all others are batch
            axes, and each matrix of a batch has a ball of its own. One
            `optax.contrib.MuonDimensionNumbers` for every leaf, "conv" for (\*window, in, out), or
            a mapping from path patterns to one each. Leaves without any are taken as Flax kernels:
            (in, out), or (height, width, in, out) with fan-in height · width · in.
        memory_limit: Working memory in bytes of a norm with an iteration, static; see
            :func:`newton_schulz_lmo`.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). Updates keep shape and dtype; an inactive leaf has update zero. It is stateless
        unless a radius is a schedule: then the state is a :class:`RadiusState`.

    Raises:
        TypeError: If `norm` is no :class:`Norm`.
        ValueError: At construction, if a radius is a Python number that is not positive. At `init`,
            with the path, for a leaf that the norm cannot take, for patterns that do not fit, and
            for a matrix that needs more than `memory_limit`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> grads = {"stem": jnp.array([3.0, 4.0]), "head": jnp.array([0.0, 2.0])}
        >>> tx = dm.norm_lmo(dm.euclidean_norm(), radius={"stem": 1.0, "head": 0.5})
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(updates["stem"], updates["head"])
        [0.6 0.8] [0.  0.5]
    """
    check_radius("radius", radius)

    lengths = functools.partial(step_length, "radius")
    return _steepest_step(norm, "radius", radius, lengths, dimension_numbers, memory_limit)


def norm_sharp(
    norm: Norm,
    step_size: Radius = 1.0,
    *,
    dimension_numbers: DimensionNumbers | None = None,
    memory_limit: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the updates of active layers by the sharp operator: dual norm times direction.

    .. math::
        \text{step size} \cdot G^\sharp, \qquad
        G^\sharp = \operatorname{argmax}_Z \langle G, Z \rangle - \tfrac12 \|Z\|^2
        = \|G\|_* D(G)

    the steepest descent of a norm: a step that grows with the gradient, where that of
    :func:`norm_lmo` does not. With step size 1/L it minimises the bound of a function that is
    L-smooth in this norm. The two agree where radius = step size · ‖G‖*. The gradient's sign is
    kept. The dual norm is ⟨G, D⟩ of the direction at hand, without an SVD.

    Args:
        norm: As in :func:`norm_lmo`.
        step_size: A positive number or scalar array, a schedule of it over all steps, or a mapping
            from path patterns to one of these.
        dimension_numbers: As in :func:`norm_lmo`; each matrix of a batch has its own dual norm.
        memory_limit: Likewise.

    Returns:
        A transformation, as :func:`norm_lmo`.

    Raises:
        TypeError: As :func:`norm_lmo`, and for an adaptive radius.
        ValueError: As :func:`norm_lmo`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> grads = {"w": jnp.array([[3.0], [-1.0]])}
        >>> tx = dm.norm_sharp(dm.sign_norm(normalized=False))
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(updates["w"].T)  # ‖G‖* = |3| + |-1|
        [[ 4. -4.]]

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1, in its sharp form.
    """
    check_radius("step_size", step_size)
    if any(isinstance(size, AdaptiveRadius) for size in distinct_radii(step_size)):
        raise TypeError(
            "step_size multiplies the dual norm already; an adaptive radius goes into the LMO's "
            "radius, such as dm.newton_schulz_lmo(dm.adaptive_radius(l0, l1))."
        )

    def lengths(leaf_size: Any, count: Array | None, dual_norm: Callable[[], Array]) -> Array:
        dual = dual_norm()
        return step_length("step_size", leaf_size, count, dual_norm).astype(dual.dtype) * dual

    return _steepest_step(norm, "step_size", step_size, lengths, dimension_numbers, memory_limit)


def _steepest_step(
    norm: Norm,
    name: str,
    radius: Radius,
    lengths: Callable[[Any, Array | None, Callable[[], Array]], Array],
    dimension_numbers: DimensionNumbers | None,
    memory_limit: int | None,
) -> optax.GradientTransformationExtraArgs:
    """The directions of all active leaves at once, each times its length."""
    if not isinstance(norm, Norm):
        called = " Call it: it makes one." if callable(norm) else ""
        raise TypeError(f"norm must be a dm.Norm, got {describe(norm)}.{called}")
    check_dimension_numbers(dimension_numbers)
    if memory_limit is not None:
        memory_limit = static_int(
            "memory_limit",
            memory_limit,
            minimum=1,
            hint="It is in bytes, and static: under optax.inject_hyperparams name it in "
            "static_args.",
        )
    scheduled = any(map(callable, distinct_radii(radius)))

    def init_fn(params: optax.Params) -> optax.EmptyState | RadiusState:
        leaf_radii(name, radius, params)
        all_axes = norm.axes(params, dimension_numbers)
        for leaf, axes in zip(jax.tree.leaves(params), all_axes, strict=True):
            shape = matrix_shape(leaf, axes)
            needed = working_bytes(shape[:2], _at_least_f32(leaf))
            if memory_limit is not None and needed > memory_limit:
                raise ValueError(
                    f"memory_limit is {memory_limit:,} bytes, and the iteration of one matrix of "
                    f"leaf '{axes.path}', {shape.fan_in}×{shape.fan_out}, needs {needed:,}: give "
                    "at least that."
                )
        return RadiusState(jnp.zeros((), jnp.int32)) if scheduled else optax.EmptyState()

    def directions(leaves: Sequence[Blocks]) -> Sequence[Array]:
        if norm.geometry.orthogonalize is None:
            return [
                norm.geometry.direction(leaf.matrices()).reshape(leaf.array.shape)
                for leaf in leaves
            ]
        limit = memory_limit or DEFAULT_MEMORY_LIMIT
        return map_matrices(norm.geometry.orthogonalize, leaves, limit)

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        del params
        layer_mask = resolve_mask(layer_mask, updates, extra_args)

        radii = leaf_radii(name, radius, updates)
        traced = {
            i: of_leaf
            for i, of_leaf in enumerate(radii)
            if any(isinstance(x, jax.Array) for x in jax.tree.leaves(of_leaf))
        }

        def steps_of(
            updates: optax.Updates, state: Any, traced: dict[int, Any]
        ) -> tuple[optax.Updates, Any]:
            leaves, treedef = jax.tree.flatten(updates)
            all_axes, shardings = norm.axes(updates, dimension_numbers), known_shardings(updates)
            active = [i for i, flag in enumerate(jax.tree.leaves(layer_mask)) if flag]
            views = [to_blocks(leaves[i], all_axes[i], shardings[i]) for i in active]
            wide = [
                view._replace(array=view.array.astype(_at_least_f32(view.array)))
                for view, _ in views
            ]
            steps = [jnp.zeros_like(leaf) for leaf in leaves]
            count = state.count if scheduled else None
            for i, (_, restore), (grads, *_), plain in zip(
                active, views, wide, directions(wide), strict=True
            ):
                # In float32 until the end: a bfloat16 leaf is rounded once.
                direction = norm.factor(matrix_shape(leaves[i], all_axes[i])) * plain
                length = lengths(
                    traced.get(i, radii[i]), count, lambda g=grads, d=direction: inner(g, d)
                )
                length = length.astype(grads.dtype)
                if length.ndim:
                    length = length.reshape(-1, *(1,) * (grads.ndim - 1))
                steps[i] = restore(length * direction).astype(leaves[i].dtype)
            if scheduled:
                state = RadiusState(jnp.asarray(optax.safe_increment(state.count)))
            return treedef.unflatten(steps), state

        return on_auto_axes(
            steps_of, updates, state, traced, named=updates, results_like=(updates, state)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _at_least_f32(leaf: jax.Array) -> np.dtype:
    return np.promote_types(leaf.dtype, np.float32)
