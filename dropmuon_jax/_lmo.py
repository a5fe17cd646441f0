"""Linear minimization oracles (LMOs) as transformations: the steepest step in a norm's ball."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from dropmuon_jax._checks import check_choice, check_positive
from dropmuon_jax._masks import map_active, resolve_mask
from dropmuon_jax._matrices import DimensionNumbers, matrix_axes, to_matrices
from dropmuon_jax._orthogonalize import Coefficients, orthogonalize, resolve_polynomials

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
        matrix_axes(params, dimension_numbers)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        del params
        layer_mask = resolve_mask(layer_mask, updates, extra_args)

        def direction(g, axes):
            matrices, restore = to_matrices(g, axes)
            factor = SHAPE_FACTORS[shape_factor](*matrices.shape[-2:])
            # In the iteration's dtype until the end: a bf16 leaf is rounded once.
            wide = matrices.astype(np.promote_types(g.dtype, np.float32))
            scale = jnp.asarray(radius, wide.dtype) * factor
            return restore(scale * orthogonalize(wide, polynomials)).astype(g.dtype)

        axes = matrix_axes(updates, dimension_numbers)
        return map_active(direction, layer_mask, updates, axes), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
