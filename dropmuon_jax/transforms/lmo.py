"""Linear minimization oracles (LMOs) as transformations: the steepest steps of norms."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dropmuon_jax._checks import describe, static_int
from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers, check_dimension_numbers
from dropmuon_jax.layers.matrices import part_shapes, sum_of_each
from dropmuon_jax.norms.named import spectral_norm
from dropmuon_jax.norms.norm import Norm
from dropmuon_jax.orthogonalize.batches import DEFAULT_MEMORY_LIMIT, execution, working_bytes
from dropmuon_jax.orthogonalize.coefficients import Coefficients
from dropmuon_jax.orthogonalize.newton_schulz import newton_schulz
from dropmuon_jax.schedules import (
    AdaptiveRadius,
    Radius,
    check_radius,
    distinct_radii,
    leaf_radii,
    step_length,
)
from dropmuon_jax.transforms.masked import masked_transformation


class RadiusState(NamedTuple):
    """State of an LMO whose radius is a schedule; the others have none."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of all steps, those in which a leaf was inactive included."""


@names_counterparts
def newton_schulz_lmo(
    radius: Radius = 1.0,
    *,
    shape_factor: str = "spectral",
    coefficients: Coefficients = "polar_express",
    num_steps: int | None = None,
    preconditioning: str | None = None,
    dtype: Any = None,
    precision: jax.lax.Precision | str | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    memory_limit: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the updates of active layers by their polar factors, scaled to the radius.

    For a matrix M = UΣVᵀ of shape (fan-in, fan-out) the update becomes

    .. math::
        \text{radius} \cdot \text{factor} \cdot UV^\top
        = -\operatorname{argmin}_{\|Z\|_{2 \to 2} \le \text{radius} \cdot \text{factor}}
          \langle M, Z \rangle

    It keeps the gradient's sign, so that `optax.scale_by_learning_rate` descends. UVᵀ is
    approximated by odd polynomials, and 0 for 0. This is :func:`norm_lmo` of the norm
    `spectral_norm(shape_factor, orthogonalize=newton_schulz(…))`.

    **Accuracy.** Singular values of M that are at least 1e-3 or 1e-2 of ‖M‖_F become

    ========================  ================  ================
    coefficients, num_steps   from [1e-3, 1]    from [1e-2, 1]
    ========================  ================  ================
    "polar_express", 5        [0.86, 1.14]      [0.87, 1.13]
    "polar_express", 6        1 ± 2e-3          1 ± 2e-3
    "polar_express", 7        1 ± 1e-4          1 ± 1e-4
    "nonic", 3                [0.37, 1.17]      [0.83, 1.17]
    "dion", 5                 [0.47, 1.15]      [0.97, 1.04]
    "muon", 5                 [0.46, 1.21]      [0.68, 1.14]
    "turbo_muon", 4           —                 [0.78, 1.06]
    "polar_express", 5, f16   [0.77, 1.13]      [0.86, 1.13]
    "polar_express", 5, bf16  [0.00, 1.14]      [0.82, 1.14]
    ========================  ================  ================

    and smaller ones less: on a CPU. A GPU or TPU rounds float32 to TF32 or bfloat16, with the
    bands of f16 or bf16, unless `precision` says otherwise.

    Args:
        radius: Size of the ball: a positive number or scalar array, a schedule of it over all
            steps, :func:`~dropmuon_jax.schedules.adaptive_radius`, or a mapping from path patterns,
            as in :func:`layers_by_path`, to these, which must match every leaf once.
        shape_factor: How the ball grows with the shape: "spectral", "muon", "moonlight",
            "rms_to_rms" or "scion", of the table of :func:`~dropmuon_jax.norms.spectral_norm`.
        coefficients: "polar_express", "nonic", "dion", "muon", "turbo_muon", or a sequence of
            (a, b, c), one for each step X ← aX + b(XXᵀ)X + c(XXᵀ)²X (up to degree 9, with five
            numbers), such as :func:`~dropmuon_jax.orthogonalize.polar_express_coefficients` gives.
            Static. "nonic", of degree 9, is the fastest.
        num_steps: Number of steps, static; by default 3 for "nonic", 4 for "turbo_muon", else 5. A
            named set is cut off, or its last polynomial repeated; only "polar_express" and "nonic"
            come nearer to 1 with every step.
        preconditioning: What M is divided by first, to bring its singular values into [0, 1]:
            "frobenius", ‖M‖_F; "schatten", the smaller ‖MMᵀ‖_F^½, as "polar_express" and "nonic"
            have it; or "aol", row by row, which rotates singular vectors, as "turbo_muon" has it.
        dtype: Of the factors of products: float32, bfloat16 or float16; sums are in float32 at
            least. By default float32, and float64 for float64 leaves.
        precision: `jax.lax.Precision` of the products on a GPU or TPU, or its name.
        dimension_numbers: Which axes are fan-in and which fan-out; see :func:`norm_lmo`.
        memory_limit: Working memory in bytes, static; by default 256 MiB, or what one matrix needs.
            Beyond it leaves of a shape are joined in groups, at most eight, and pass in slices.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). Updates keep shape and dtype; an inactive leaf has update zero. It is stateless
        unless a radius is a schedule: then the state is a :class:`RadiusState`.

    Raises:
        ValueError: At construction, for an argument that is not among the known ones or out of its
            range, or an iteration that overflows in float16. At `init`, with the path, for a leaf
            that is no matrix: one with fewer than two axes, or with three or more than four axes
            and no dimension numbers (a stack and a 1-D convolution look the same); for patterns
            that do not fit; and for a matrix that needs more than `memory_limit`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.newton_schulz_lmo(radius=2.0, num_steps=7)
        >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([5.0, -0.1]))}, tx.init({}))
        >>> print(updates["kernel"].round(3))
        [[ 2.  0.]
         [ 0. -2.]]

    References:
        Jordan et al., *Muon*, 2024; Pethick et al., *Scion*, 2025, arXiv:2502.07529. Amsel et al.,
        *The Polar Express*, 2025, arXiv:2505.16932; Ahn et al., *Dion*, 2025, arXiv:2504.05295,
        with You's coefficients; Boissin et al., *Turbo-Muon*, 2025, arXiv:2512.04632, with "aol";
        Grishina et al., 2025, arXiv:2506.10935, with "schatten".
    """
    kernel = newton_schulz(
        coefficients,
        num_steps=num_steps,
        preconditioning=preconditioning,
        dtype=dtype,
        precision=precision,
    )
    norm = spectral_norm(shape_factor, orthogonalize=kernel)
    return _steepest(norm, radius, dimension_numbers, memory_limit)


@names_counterparts
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

    It keeps the gradient's sign, so that with `optax.scale_by_learning_rate(γ)` behind it the step
    is X - γ radius D. With `optax.add_decayed_weights(1.0)` between the two it is the constrained
    one, (1 - γ)X - γ radius D: for 0 ≤ γ ≤ 1 a convex combination, so that ‖X‖ ≤ radius stays true
    once it is. (With layers that are dropped, `dm.per_layer(optax.add_decayed_weights(1.0),
    layers)`.) The returned transformation and the errors are those of :func:`newton_schulz_lmo`.

    Args:
        norm: Of every leaf, such as `dm.norms.sign_norm()`; for several see :func:`chain_subtrees`.
        radius: Size of the ball, as there.
        dimension_numbers: Which axes of a matrix are fan-in and which fan-out; all others are batch
            axes, and each matrix of a batch has a ball of its own. One
            `optax.contrib.MuonDimensionNumbers` for every leaf, "in_out" for (\*window, in, out) as
            in Flax, "out_in" for (out, in, \*window) as in Equinox and PyTorch, or a mapping from
            path patterns to one each, or to `dm.layers.Parts` of an axis that has parts. Leaves
            without any are taken as Flax kernels: (in, out), or (height, width, in, out) with
            fan-in height · width · in.
        memory_limit: Of a norm with an iteration: its working memory in bytes, static.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> grads = {"stem": jnp.array([3.0, 4.0]), "head": jnp.array([0.0, 2.0])}
        >>> tx = dm.norm_lmo(dm.norms.euclidean_norm(), radius={"stem": 1.0, "head": 0.5})
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(updates["stem"], updates["head"])
        [0.6 0.8] [0.  0.5]
    """
    return _steepest(norm, radius, dimension_numbers, memory_limit)


@names_counterparts
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

    This is the steepest descent of a norm: its step grows with the gradient, where that of
    :func:`norm_lmo` does not. With step size 1/L it minimises the bound of a function that is
    L-smooth in this norm. The two agree where radius = step size · ‖G‖*, with ‖G‖* from ⟨G, D⟩.

    `step_size` is a positive number or scalar array, a schedule of it over all steps, or a mapping
    from path patterns to one of these; an adaptive radius is an error. The other arguments, the
    returned transformation, its sign and the errors are those of :func:`norm_lmo`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> grads = {"w": jnp.array([[3.0], [-1.0]])}
        >>> tx = dm.transforms.norm_sharp(dm.norms.sign_norm(normalized=False))
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(updates["w"].T)  # ‖G‖* = |3| + |-1|
        [[ 4. -4.]]

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1, in its sharp form.
    """
    return _steepest(norm, step_size, dimension_numbers, memory_limit, sharp=True)


def _steepest(
    norm: Norm,
    radius: Radius,
    dimension_numbers: DimensionNumbers | None,
    memory_limit: int | None,
    *,
    sharp: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The direction of each active leaf times the radius, and if `sharp` times its dual norm."""
    name = "step_size" if sharp else "radius"
    check_radius(name, radius)
    kinds = distinct_radii(radius)
    if sharp and any(isinstance(kind, AdaptiveRadius) for kind in kinds):
        raise TypeError(
            "step_size multiplies the dual norm already; an adaptive radius goes into the LMO's "
            "radius, such as dm.newton_schulz_lmo(dm.schedules.adaptive_radius(l0, l1))."
        )
    if not isinstance(norm, Norm):
        called = " Call it: it makes one." if callable(norm) else ""
        raise TypeError(f"norm must be a dm.norms.Norm, got {describe(norm)}.{called}")
    check_dimension_numbers(dimension_numbers)
    if memory_limit is not None:
        hint = "It is in bytes; under optax.inject_hyperparams name it in static_args."
        memory_limit = static_int("memory_limit", memory_limit, minimum=1, hint=hint)
    limit, is_scheduled = memory_limit or DEFAULT_MEMORY_LIMIT, any(map(callable, kinds))

    def init(params: optax.Params) -> optax.EmptyState | RadiusState:
        leaf_radii(name, radius, params)
        all_axes = norm.axes(params, dimension_numbers)
        for leaf, axes in zip(jax.tree.leaves(params), all_axes, strict=True):
            for shape in part_shapes(leaf, axes):
                needed = working_bytes(shape[:2], np.promote_types(leaf.dtype, np.float32))
                if memory_limit is not None and needed > memory_limit:
                    raise ValueError(
                        f"memory_limit is {memory_limit:,} bytes, and the iteration of one matrix "
                        f"of leaf '{axes.path}', {shape.fan_in}×{shape.fan_out}, needs {needed:,}."
                    )
        return RadiusState(jnp.zeros((), jnp.int32)) if is_scheduled else optax.EmptyState()

    def update(updates, state, params, layer_mask, extra_args):
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        steps = list(map(jnp.zeros_like, leaves))
        active = [i for i, flag in enumerate(jax.tree.leaves(layer_mask)) if flag]
        all_axes = norm.axes(updates, dimension_numbers)
        axes = [all_axes[i] for i in active]
        grads = [leaves[i].astype(np.promote_types(leaves[i].dtype, np.float32)) for i in active]
        by_path = isinstance(radius, Mapping)
        radii = leaf_radii(name, radius, updates) if by_path else [radius] * len(leaves)
        on = execution(updates)

        def directions(grads: list[jax.Array]) -> list[jax.Array]:
            return norm.directions(grads, axes, on.orthogonalize_all, limit)

        # In float32 until the end: a bfloat16 leaf is rounded once.
        found = on.call(directions, grads, named=updates, results_like=grads)
        for i, grad, direction in zip(active, grads, found, strict=True):

            def dual_norm(grad=grad, direction=direction, axes=all_axes[i]) -> jax.Array:
                product = grad * direction
                if axes.cut is None:
                    return sum_of_each(product, axes)
                # The axis that is cut may be an explicit one of a mesh.
                of_each = functools.partial(sum_of_each, axes=axes)
                return on.call(of_each, product, named=(), results_like=product)

            length, count = radii[i], state.count if is_scheduled else None
            if callable(length) or isinstance(length, AdaptiveRadius):
                length = step_length(name, length, count, dual_norm)
            length = jnp.asarray(length).astype(grad.dtype) * (dual_norm() if sharp else 1)
            steps[i] = (length * direction).astype(leaves[i].dtype)
        if is_scheduled:
            state = RadiusState(jnp.asarray(optax.safe_increment(state.count)))
        return treedef.unflatten(steps), state

    return masked_transformation(init, update)
