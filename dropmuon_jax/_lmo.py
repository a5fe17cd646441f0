"""Linear minimization oracles (LMOs) as transformations: the steepest step in a norm's ball."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from dropmuon_jax._checks import check_choice, check_floating, check_positive, did_you_mean
from dropmuon_jax._layers import compile_pattern, leaf_paths
from dropmuon_jax._masks import map_active, resolve_mask
from dropmuon_jax._orthogonalize import Coefficients, orthogonalize, resolve_polynomials

DimensionNumbers = MuonDimensionNumbers | Mapping[str, MuonDimensionNumbers]

# How the radius of a matrix depends on its fan-in and fan-out.
SHAPE_FACTORS: dict[str, Callable[[int, int], float]] = {
    # The ball of the spectral norm itself.
    "spectral": lambda fan_in, fan_out: 1.0,
    # Jordan et al., 2024: max(1, rows / cols)^½ of a PyTorch (out, in) matrix; also Scion's "max".
    "muon": lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / fan_in)),
    # Liu et al., 2025 (Moonlight), arXiv:2502.16982: root mean square 0.2 of the entries, as AdamW.
    "moonlight": lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
    # Pethick et al., 2025 (Scion), arXiv:2502.07529: the ball of the RMS→RMS operator norm.
    "rms_to_rms": lambda fan_in, fan_out: math.sqrt(fan_out / fan_in),
}


def newton_schulz_lmo(
    radius: float | jax.Array = 1.0,
    *,
    shape_factor: str = "spectral",
    coefficients: Coefficients = "polar_express",
    num_steps: int | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the updates of active layers by their polar factors, scaled to the radius.

    For a matrix M = UΣVᵀ of shape (fan-in, fan-out) the update becomes

    .. math::
        \text{radius} \cdot \text{factor} \cdot UV^\top
        = -\operatorname{argmin}_{\|Z\|_{2 \to 2} \le \text{radius} \cdot \text{factor}}
          \langle M, Z \rangle

    It keeps the gradient's sign, so that `optax.scale_by_learning_rate` descends. UVᵀ is
    approximated by odd polynomials; a zero matrix gives zero.

    Five steps take singular values of M/‖M‖_F

    ================  ================  ================
    coefficients      from [1e-3, 1]    from [1e-2, 1]
    ================  ================  ================
    "polar_express"   to [0.84, 1.13]   to [0.87, 1.13]
    "dion"            to [0.47, 1.15]   to [0.97, 1.04]
    "muon"            to [0.47, 1.21]   to [0.68, 1.14]
    ================  ================  ================

    and smaller ones to less; eight steps of "polar_express" take [1e-3, 1] to 1 ± 1e-4. The
    iteration runs in float32, or float64 for float64 leaves, at JAX's default matrix-product
    precision. The figures hold in float32 on a CPU; on a GPU or TPU that rounds products to TF32 or
    bfloat16 they are unmeasured.

    Args:
        radius: Size of the ball, positive, a number or a scalar array.
        shape_factor: How the radius grows with the shape: "spectral" (1), "muon"
            (max(1, fan-out/fan-in)^½), "moonlight" (0.2 · max(fan-in, fan-out)^½) or "rms_to_rms"
            ((fan-out/fan-in)^½).
        coefficients: "polar_express", "dion", "muon", or rows (a, b, c), each one step
            X ← aX + b(XXᵀ)X + c(XXᵀ)²X.
        num_steps: Number of steps, static; by default 5, or the number of own rows.
        dimension_numbers: Which axes are fan-in and which fan-out; all others are batch axes. One
            `optax.contrib.MuonDimensionNumbers` for every leaf, or a mapping from path patterns, as
            in :func:`layers_by_path`, to one each. Leaves without any are taken as Flax kernels:
            (in, out), or (height, width, in, out) with fan-in height · width · in.

    Returns:
        A stateless transformation whose `update` takes the extra argument `layer_mask` (by default
        all active). Updates keep shape and dtype; an inactive leaf has update zero.

    Raises:
        ValueError: At construction, if `radius` is a Python number that is not positive,
            `shape_factor` or `coefficients` are unknown, or `num_steps` is below 1. At `init`, with
            the path, for a leaf that is no matrix: one with fewer than two axes, or with three or
            more than four axes and no dimension numbers (a stack of matrices and a 1-D convolution
            look the same).

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.newton_schulz_lmo(radius=2.0, num_steps=10)
        >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([5.0, -0.1]))}, tx.init({}))
        >>> print(updates["kernel"].round(3))
        [[ 2.  0.]
         [ 0. -2.]]

    References:
        Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024.
        Pethick et al., *Training Deep Learning Models with Norm-Constrained LMOs*, 2025,
        arXiv:2502.07529.
        Amsel et al., *The Polar Express*, 2025, arXiv:2505.16932.
    """
    check_positive("radius", radius)
    check_choice("shape_factor", shape_factor, SHAPE_FACTORS)
    polynomials = resolve_polynomials(coefficients, num_steps)
    if not isinstance(dimension_numbers, MuonDimensionNumbers | Mapping | None):
        raise TypeError(
            "dimension_numbers must be an optax.contrib.MuonDimensionNumbers or a mapping from "
            f"path patterns to them, got {dimension_numbers!r}."
        )

    def init_fn(params: optax.Params) -> optax.EmptyState:
        _matrix_axes(params, dimension_numbers)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        del params
        layer_mask = resolve_mask(layer_mask, updates, extra_args)

        def direction(g, axes):
            matrices, restore = _to_matrices(g, axes)
            factor = SHAPE_FACTORS[shape_factor](*matrices.shape[-2:])
            # In the iteration's dtype until the end: a bf16 leaf is rounded once.
            wide = matrices.astype(np.promote_types(g.dtype, np.float32))
            scale = jnp.asarray(radius, wide.dtype) * factor
            return restore(scale * orthogonalize(wide, polynomials)).astype(g.dtype)

        axes = _matrix_axes(updates, dimension_numbers)
        return map_active(direction, layer_mask, updates, axes), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Axes:
    """The fan-in and fan-out axes of one leaf; no pytree, so that a tree of them has leaves."""

    def __init__(self, fan_in: tuple[int, ...], fan_out: tuple[int, ...]):
        self.fan_in = fan_in
        self.fan_out = fan_out


def _matrix_axes(tree: Any, dimension_numbers: DimensionNumbers | None) -> Any:
    """The `_Axes` of each leaf.

    Raises:
        ValueError: For a leaf that is no matrix, naming its path, and for a pattern of the mapping
            that matches no leaf or a leaf that two patterns match.
    """
    leaves, treedef = jax.tree.flatten(tree)
    paths = leaf_paths(tree)
    numbers: list[MuonDimensionNumbers | None]
    if isinstance(dimension_numbers, Mapping):
        numbers = _match_patterns(paths, dimension_numbers)
    else:
        numbers = [dimension_numbers] * len(paths)
    return treedef.unflatten(
        _leaf_axes(path, leaf, spec)
        for path, leaf, spec in zip(paths, leaves, numbers, strict=True)
    )


def _match_patterns(
    paths: list[str], mapping: Mapping[str, MuonDimensionNumbers]
) -> list[MuonDimensionNumbers | None]:
    numbers: list[MuonDimensionNumbers | None] = [None] * len(paths)
    for pattern, spec in mapping.items():
        expression = compile_pattern(pattern)
        hits = [i for i, path in enumerate(paths) if expression.search(path)]
        if paths and not hits:
            raise ValueError(
                f"dimension_numbers: pattern '{pattern}' matches no leaf of {paths}."
                f"{did_you_mean(pattern, paths)}"
            )
        for i in hits:
            if numbers[i] is not None:
                raise ValueError(f"dimension_numbers: leaf '{paths[i]}' matches two patterns.")
            numbers[i] = spec
    return numbers


def _leaf_axes(path: str, leaf: Any, spec: MuonDimensionNumbers | None) -> _Axes:
    check_floating(f"leaf '{path}'", leaf.dtype)
    shape, ndim = leaf.shape, leaf.ndim
    if ndim < 2:
        raise ValueError(
            f"newton_schulz_lmo needs matrices, and leaf '{path}' has shape {shape}. Give vectors "
            "and scalars a chain of their own with dm.chain_subtrees."
        )
    if spec is None:
        if ndim not in (2, 4):
            raise ValueError(
                f"newton_schulz_lmo cannot tell which axes of leaf '{path}', of shape {shape}, are "
                f"fan-in and fan-out. Say it with dimension_numbers={{'{path}': "
                "optax.contrib.MuonDimensionNumbers(reduction_axis=…, output_axis=…)}, where a key "
                "may be a pattern such as 'query/kernel'; axes in neither are batch axes. In "
                "dm.drop_muon, give lmo=dm.newton_schulz_lmo(shape_factor='muon', …)."
            )
        return _Axes(tuple(range(ndim - 1)), (ndim - 1,))
    axes = []
    for named in (spec.reduction_axis, spec.output_axis):
        named = (named,) if isinstance(named, int) else tuple(named)
        if any(not -ndim <= axis < ndim for axis in named):
            raise ValueError(
                f"dimension_numbers name an axis of {named}, but leaf '{path}' has {ndim} axes."
            )
        axes.append(tuple(axis % ndim for axis in named))
    if len({*axes[0], *axes[1]}) < len(axes[0]) + len(axes[1]) or not (axes[0] and axes[1]):
        raise ValueError(
            "dimension_numbers must name at least one axis each for fan-in and fan-out, and none "
            f"twice; leaf '{path}' got reduction_axis={axes[0]}, output_axis={axes[1]}."
        )
    return _Axes(axes[0], axes[1])


def _to_matrices(x: jax.Array, axes: _Axes) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """A leaf as (*batch, fan-in, fan-out), and the way back."""
    batch = tuple(axis for axis in range(x.ndim) if axis not in axes.fan_in + axes.fan_out)
    order = batch + axes.fan_in + axes.fan_out
    moved = x.transpose(order)
    sizes = [math.prod(x.shape[axis] for axis in group) for group in (axes.fan_in, axes.fan_out)]
    matrices = moved.reshape(*(x.shape[axis] for axis in batch), *sizes)

    def restore(y: jax.Array) -> jax.Array:
        return y.reshape(moved.shape).transpose(np.argsort(order))

    return matrices, restore
