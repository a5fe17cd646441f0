"""The smoothness of each leaf between two steps, measured as a transformation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from dropmuon_jax._checks import describe, static_int
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers, check_dimension_numbers
from dropmuon_jax.layers.matrices import MatrixAxes, matrix_shape, parts_of, to_matrices
from dropmuon_jax.layers.trees import map_active, restructure_like
from dropmuon_jax.norms.norm import Norm
from dropmuon_jax.orthogonalize.batches import execution
from dropmuon_jax.transforms.masked import masked_transformation
from dropmuon_jax.transforms.momentum import active_entries, num_entries, wide_dtype
from dropmuon_jax.transforms.prev_params import copied_like

OfMatrices = Float[Array, " matrices"]


class RememberedPoint(NamedTuple):
    """Where a step was, to be compared with the next."""

    params: optax.Params
    """X of the leaves that were active."""
    gradients: optax.Updates
    """g at X, in float32 at least."""
    active: Bool[Array, " leaves"]
    """Which leaves were active; a single entry where there are no leaves."""


class SmoothnessSample(NamedTuple):
    """What a step measured of each matrix; -1 for those that were inactive or did not move.

    The mark is not NaN, for which `jax_debug_nans` would stop the run. Where there are no matrices
    the vectors have a single entry.
    """

    step: Int[Array, ""]
    """Which step, -1 before the first sample."""
    dual_norm: OfMatrices
    """‖g‖*."""
    smoothness: OfMatrices
    """L̂."""


class SmoothnessState(NamedTuple):
    """State of :func:`track_smoothness`; :class:`SmoothnessRecord` reads it."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of all steps."""
    remembered: RememberedPoint
    """The step before the next sample, or before the last one."""
    sample: SmoothnessSample
    """The last sample."""
    leaf_of_matrix: Int[Array, " matrices"]
    """The leaf of each entry of the sample; without batch axes and parts a leaf has one entry."""


def track_smoothness(
    norm: Norm, *, every: int = 1, dimension_numbers: DimensionNumbers | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Passes the gradients on, and measures how fast those of each leaf change along the run.

    .. math::
        \hat L^{k+1} = \frac{\|g^{k+1} - g^k\|_*}{\|X^{k+1} - X^k\|}, \qquad
        \text{beside it } \|g^{k+1}\|_*

    in the norm in which the leaf steps, from which :func:`fit_smoothness` gets the constants of
    :func:`adaptive_radius`. It stands first in a chain, before anything that changes the gradients;
    in the chain of each subtree, if subtrees have norms of their own::

        track = dm.planning.track_smoothness(norm, every=20)
        dm.chain_subtrees({"matrix": optax.chain(track, dm.momentum(), …), …

    **Cost.** A sample takes two dual norms and a norm of every leaf, and one copy of parameters and
    gradients, in steps 0, every, 2 · every, … and the steps after them. All other steps pay for a
    comparison: the rest is inside conditionals (for which XLA on a CPU also copies parameters that
    are donated). The memory is a copy of parameters and gradients. With a norm that is made with
    `orthogonalize=dm.orthogonalize.newton_schulz()` a dual norm is ⟨G, D⟩, one iteration instead of
    an SVD, and as accurate as D. Outside of `jax.jit` every step compiles the conditionals anew.

    **Noise.** With minibatches the two gradients are of different batches, and their noise is in
    the sample, divided by the length of the step: the shorter the steps, the more of L̂ is noise.
    Without the noise, take both gradients of the same batch, with :func:`keep_prev_params` in the
    chain and :func:`masked_value_and_grad_pair`, and pass the second one to `update` as
    `prev_params_grads`: it then takes the place of the remembered gradient.

    Args:
        norm: The norm of every leaf.
        every: A sample is taken in every so many steps. Static.
        dimension_numbers: Which axes of a leaf are fan-in and fan-out, as :func:`norm_lmo` takes
            them; each matrix of a batch gives samples of its own.

    Returns:
        A transformation whose `update` needs `params` and takes the extra arguments `layer_mask`
        (by default all active) and `prev_params_grads`, of the gradients' structure. The gradients
        of active leaves are returned as they are; an inactive leaf has update zero. A leaf has a
        sample if it was active in both steps, and moved. The state is a :class:`SmoothnessState`,
        whose sample stays until the next.
        bfloat16 parameters are subtracted in float32, so that the step is what it was after
        rounding; a leaf whose step was rounded away has no sample, and bfloat16 gradients bring
        their rounding, 2⁻⁹ ‖g‖*, as noise.

    Raises:
        TypeError: If `norm` is no :class:`Norm` or `every` no Python integer; at `init`, for
            leaves that are not of floating-point numbers.
        ValueError: If `every` is below 1; at `init`, with the path, for a leaf that the norm cannot
            take; in `update`, without `params`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.planning.track_smoothness(dm.norms.euclidean_norm())
        >>> gradient = lambda params: {"w": jnp.array([2.0, 9.0]) * params["w"]}
        >>> start, end = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([0.5, 1.0])}
        >>> _, state = tx.update(gradient(start), tx.init(start), start)
        >>> print(state.sample.smoothness)
        [-1.]
        >>> _, state = tx.update(gradient(end), state, end)
        >>> print(state.sample.smoothness)  # moved along the first axis, where the curvature is 2
        [2.]

    References:
        Riabinin et al., *Gluon: Making Muon & Scion Great Again!*, 2025, arXiv:2505.13416, the
        estimate of their experiments. The masks, the batches of matrices and `prev_params_grads`
        are not in the paper.
    """
    if not isinstance(norm, Norm):
        way_out = (
            " Call it: it makes one."
            if callable(norm)
            else " Give leaves with other norms chains of their own, with dm.chain_subtrees."
        )
        raise TypeError(f"norm must be a dm.norms.Norm, got {describe(norm)}.{way_out}")
    hint = "It is static: under optax.inject_hyperparams name it in static_args."
    every = static_int("every", every, minimum=1, hint=hint)
    check_dimension_numbers(dimension_numbers)

    def init(params: optax.Params) -> SmoothnessState:
        leaves = jax.tree.leaves(params)
        all_axes = norm.axes(params, dimension_numbers)
        leaf_of_part, _ = _axes_of_parts(all_axes)
        leaf_of_matrix = leaf_of_part[_part_of_matrix(leaves, all_axes)]
        nothing = jnp.full(leaf_of_matrix.shape, -1, wide_dtype(*leaves))
        return SmoothnessState(
            count=jnp.zeros((), jnp.int32),
            remembered=RememberedPoint(
                jax.tree.map(lambda p: jnp.zeros_like(p, dtype=p.dtype), params),
                jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params),
                jnp.zeros(num_entries(params), bool),
            ),
            sample=SmoothnessSample(jnp.full((), -1, jnp.int32), nothing, jnp.array(nothing)),
            leaf_of_matrix=jnp.asarray(leaf_of_matrix),
        )

    def update(
        updates: optax.Updates, state: SmoothnessState, params: Any, layer_mask: Any, extra: Any
    ) -> tuple[optax.Updates, SmoothnessState]:
        if params is None:
            raise ValueError(
                "track_smoothness measures how far the parameters move: pass them to update, "
                "tx.update(grads, opt_state, params)."
            )
        second = extra.get("prev_params_grads")
        if second is not None:
            second = restructure_like("prev_params_grads", second, updates)
        all_axes = norm.axes(updates, dimension_numbers)
        active = active_entries(layer_mask)

        def measured(
            updates: optax.Updates, state: SmoothnessState, params: Any, second: Any
        ) -> tuple[RememberedPoint, SmoothnessSample]:
            def remember(old: RememberedPoint) -> RememberedPoint:
                return RememberedPoint(
                    copied_like(old.params, params, layer_mask),
                    copied_like(old.gradients, updates, layer_mask),
                    jnp.asarray(active),
                )

            def take_sample(old: RememberedPoint) -> SmoothnessSample:
                old_gradients = old.gradients if second is None else second
                trees = (updates, old_gradients, params, old.params)
                parts = list(zip(*(_parts(tree, all_axes) for tree in trees), strict=True))
                leaf_of_part, of_parts = _axes_of_parts(all_axes)
                of_params = [of_part[2] for of_part in parts]
                part_of_matrix = _part_of_matrix(jax.tree.leaves(params), all_axes)
                leaf_of_matrix = leaf_of_part[part_of_matrix]
                dual_norm = smoothness = jnp.full_like(state.sample.smoothness, -1)
                for members in _of_one_shape(of_params, of_parts, active[leaf_of_part]):
                    matrices = np.flatnonzero(np.isin(part_of_matrix, members))
                    of_members = _measure(norm, [(parts[i], of_parts[i]) for i in members])
                    dual_norm = dual_norm.at[matrices].set(of_members[0])
                    smoothness = smoothness.at[matrices].set(of_members[1])
                known = old.active[leaf_of_matrix] & (smoothness >= 0)
                return SmoothnessSample(
                    state.count, jnp.where(known, dual_norm, -1), jnp.where(known, smoothness, -1)
                )

            remembered, sample = state.remembered, state.sample
            if every == 1:
                return remember(remembered), take_sample(remembered)
            phase = state.count % every
            # Two conditionals, in this order: XLA keeps what is remembered where it is. In the
            # other order, or in one conditional, it copied all of it in every step.
            remembered = jax.lax.cond(phase == 0, remember, lambda old: old, remembered)
            sample = jax.lax.cond(
                phase == 1, lambda _: take_sample(remembered), lambda old: old, sample
            )
            return remembered, sample

        remembered, sample = execution(updates, params, state).call(
            measured,
            updates,
            state,
            params,
            second,
            named=updates,
            results_like=(state.remembered, state.sample),
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        state = SmoothnessState(count, remembered, sample, state.leaf_of_matrix)
        return map_active(lambda update: update, layer_mask, updates), state

    return masked_transformation(init, update)


def _measure(
    norm: Norm, members: Sequence[tuple[tuple[Array, ...], MatrixAxes]]
) -> tuple[OfMatrices, OfMatrices]:
    """‖g‖* and L̂ of the matrices of leaves of one shape; L̂ = -1 of those that did not move.

    Args:
        norm: The norm of these leaves.
        members: Of each leaf the gradient, the old one, the parameter and the old one.
    """
    stacks = [
        [to_matrices(leaf.astype(wide_dtype(leaves[2])), axes)[0] for leaf in leaves]
        for leaves, axes in members
    ]
    gradients, old_gradients, params, old_params = map(jnp.concatenate, zip(*stacks, strict=True))
    (leaf, *_), axes = members[0]
    factor = norm.factor(matrix_shape(leaf, axes))
    step = norm.geometry.norm(params - old_params) / factor
    both = jnp.concatenate([gradients, gradients - old_gradients])
    dual_norm, change = jnp.split(norm.geometry.dual_norm(both) * factor, 2)
    return dual_norm, jnp.where(step > 0, change / jnp.where(step > 0, step, 1), -1)


def _of_one_shape(
    leaves: Sequence[Array], all_axes: Sequence[MatrixAxes], active: np.ndarray
) -> list[list[int]]:
    """The active leaves, those of one shape of matrices together: they share a program."""
    groups: dict[Any, list[int]] = {}
    for i, (leaf, axes) in enumerate(zip(leaves, all_axes, strict=True)):
        if active[i]:
            groups.setdefault((matrix_shape(leaf, axes), wide_dtype(leaf)), []).append(i)
    return list(groups.values())


def _parts(tree: Any, all_axes: Sequence[MatrixAxes]) -> list[Array]:
    """The leaves of a tree, or their parts."""
    return list(itertools.chain(*map(parts_of, jax.tree.leaves(tree), all_axes)))


def _axes_of_parts(
    all_axes: Sequence[MatrixAxes],
) -> tuple[Int[np.ndarray, " parts"], list[MatrixAxes]]:
    """The index of the leaf of each part, and its axes; 0 without leaves."""
    counts = [len(axes.cut.runs) if axes.cut else 1 for axes in all_axes]
    of_parts = [axes.of_part for axes, n in zip(all_axes, counts, strict=True) for _ in range(n)]
    leaf_of_part = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return leaf_of_part if counts else np.zeros(1, np.int32), of_parts


def _part_of_matrix(
    leaves: Sequence[Array], all_axes: Sequence[MatrixAxes]
) -> Int[np.ndarray, " matrices"]:
    """The index of the part of each matrix, in the order of the leaves; 0 without matrices."""
    counts = [
        count * math.prod(n for i, n in enumerate(x.shape) if i not in axes.fan_in + axes.fan_out)
        for x, axes in zip(leaves, all_axes, strict=True)
        for count, _ in (axes.cut.runs if axes.cut else [(1, 0)])
    ]
    indices = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return indices if indices.size else np.zeros(1, np.int32)
