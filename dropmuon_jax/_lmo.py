"""Linear minimization oracles (LMOs) as transformations: the steepest step in a norm's ball."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from dropmuon_jax._checks import check_choice, check_positive, describe, static_int
from dropmuon_jax._masks import resolve_mask
from dropmuon_jax._matrices import DimensionNumbers, matrix_axes, matrix_shape, to_matrices
from dropmuon_jax._orthogonalize import (
    DEFAULT_MEMORY_LIMIT,
    Coefficients,
    map_stacks,
    newton_schulz,
    svd_polar_factor,
    working_bytes,
)

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
    start: str | None = None,
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
    approximated by odd polynomials; a zero matrix gives zero. All active matrices of one shape, or
    one transposed, pass through one program; a rectangular one is iterated on its smaller Gram
    matrix.

    **Accuracy.** Singular values of M that are at least 1e-3 or 1e-2 of ‖M‖_F become

    =======================  ================  ================
    coefficients, num_steps  from [1e-3, 1]    from [1e-2, 1]
    =======================  ================  ================
    "polar_express", 5       [0.86, 1.14]      [0.87, 1.13]
    "polar_express", 6       1 ± 2e-3          1 ± 2e-3
    "polar_express", 7       1 ± 1e-4          1 ± 1e-4
    "dion", 5                [0.47, 1.15]      [0.97, 1.04]
    "muon", 5                [0.46, 1.21]      [0.68, 1.14]
    "turbo_muon", 4          —                 [0.78, 1.06]
    "polar_express", 5, f16  [0.77, 1.13]      [0.86, 1.13]
    "polar_express", 5, bf16 [0.00, 1.14]      [0.82, 1.14]
    =======================  ================  ================

    and smaller ones less. These bound what `tests/test_orthogonalize.py` measures on a CPU over 5
    shapes from 8×8 to 100×130 and 5 spectra, and for the first row over one large singular value
    among equal small ones up to 128×512, the worst case found: there rounding of MMᵀ in float32
    adds up to 0.014. It rotates the singular vectors of the smallest by up to 0.02 with 5 or 6
    steps, 1e-4 with 7 and 0.9 in bfloat16; "turbo_muon" those of all by up to 0.5. On a GPU or TPU,
    which round products of float32 to TF32 or bfloat16 unless `precision` says otherwise, expect
    the rows for f16 or bf16; unmeasured.

    Args:
        radius: Size of the ball, positive, a number or a scalar array.
        shape_factor: How the radius grows with the shape: "spectral" (1), "muon"
            (max(1, fan-out/fan-in)^½), "moonlight" (0.2 · max(fan-in, fan-out)^½) or "rms_to_rms"
            ((fan-out/fan-in)^½).
        coefficients: "polar_express", "dion", "muon", "turbo_muon", or rows (a, b, c), each one
            step X ← aX + b(XXᵀ)X + c(XXᵀ)²X, such as those of :func:`polar_express_coefficients`.
            Static.
        num_steps: Number of steps, static; by default 4 for "turbo_muon", 5 for the other names,
            and the number of own rows. A named set is cut off, or its last row repeated; only
            "polar_express" comes nearer to 1 with every step.
        start: What M is divided by first, to bring its singular values into [0, 1]: "frobenius",
            ‖M‖_F; "schatten", ‖MMᵀ‖_F^½, which is smaller by up to fan^¼, so that small singular
            values start higher; or "aol", row by row, which changes the singular vectors. By
            default "schatten" for "polar_express", "aol" for "turbo_muon", else "frobenius".
        dtype: Of the factors of the matrix products: float32, bfloat16 or float16; sums are in
            float32 at least. By default float32, and float64 for float64 leaves.
        precision: `jax.lax.Precision` of the products on a GPU or TPU, or its name, by default
            JAX's; on a CPU products of float32 are exact to float32.
        dimension_numbers: Which axes are fan-in and which fan-out; all others are batch axes. One
            `optax.contrib.MuonDimensionNumbers` for every leaf, or a mapping from path patterns, as
            in :func:`layers_by_path`, to one each. Leaves without any are taken as Flax kernels:
            (in, out), or (height, width, in, out) with fan-in height · width · in.
        memory_limit: Working memory of the iteration in bytes, static; by default 256 MiB, or what
            one matrix needs where that is more. Beyond it the matrices of a shape pass in slices,
            in a loop. The stack of these matrices, in float32, comes on top; of leaves in half
            precision XLA keeps two.

    Returns:
        A stateless transformation whose `update` takes the extra argument `layer_mask` (by default
        all active). Updates keep shape and dtype; an inactive leaf has update zero.

    Raises:
        ValueError: At construction, if `radius` is a Python number that is not positive,
            `shape_factor`, `coefficients`, `start` or `dtype` are unknown, `num_steps` is below 1,
            or own rows or start="aol" overflow in float16. At `init`, with the path, for a leaf
            that is no matrix: one with fewer than two axes, or with three or more than four axes
            and no dimension numbers (a stack of matrices and a 1-D convolution look the same); and
            for a matrix that needs more than `memory_limit`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.newton_schulz_lmo(radius=2.0, num_steps=7)
        >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([5.0, -0.1]))}, tx.init({}))
        >>> print(updates["kernel"].round(3))
        [[ 2.  0.]
         [ 0. -2.]]

    References:
        Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024.
        Pethick et al., *Training Deep Learning Models with Norm-Constrained LMOs*, 2025,
        arXiv:2502.07529.
        Amsel et al., *The Polar Express*, 2025, arXiv:2505.16932.
        Ahn et al., *Dion*, 2025, arXiv:2504.05295, whose repository has You's coefficients.
        Boissin et al., *Turbo-Muon*, 2025, arXiv:2512.04632: "turbo_muon" and "aol".
        Grishina et al., *Accelerating Newton-Schulz Iteration*, 2025, arXiv:2506.10935:
        "schatten".
    """
    return spectral_lmo(
        newton_schulz(
            coefficients, num_steps=num_steps, start=start, dtype=dtype, precision=precision
        ),
        radius,
        shape_factor=shape_factor,
        dimension_numbers=dimension_numbers,
        memory_limit=memory_limit,
    )


def svd_lmo(
    radius: float | jax.Array = 1.0,
    *,
    shape_factor: str = "spectral",
    dimension_numbers: DimensionNumbers | None = None,
    memory_limit: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the updates of active layers by their exact polar factors, scaled to the radius.

    As :func:`newton_schulz_lmo`, by a singular value decomposition, which is slower by far: a
    reference. Singular values that are zero to rounding stay zero.

    Args:
        radius: As in :func:`newton_schulz_lmo`.
        shape_factor: Likewise.
        dimension_numbers: Likewise.
        memory_limit: Likewise; the memory of the decomposition is not counted, but that of the
            iteration.

    Returns:
        A stateless transformation, as :func:`newton_schulz_lmo`.

    Raises:
        ValueError: As :func:`newton_schulz_lmo`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.svd_lmo()
        >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([5.0, -1e-4, 0.0]))}, tx.init({}))
        >>> print(updates["kernel"].diagonal())
        [ 1. -1.  0.]
    """
    return spectral_lmo(
        svd_polar_factor,
        radius,
        shape_factor=shape_factor,
        dimension_numbers=dimension_numbers,
        memory_limit=memory_limit,
    )


def spectral_lmo(
    orthogonalize: Callable[[jax.Array], jax.Array],
    radius: float | jax.Array = 1.0,
    *,
    shape_factor: str = "spectral",
    dimension_numbers: DimensionNumbers | None = None,
    memory_limit: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the updates of active layers by what a kernel of yours makes of their matrices.

    What :func:`newton_schulz_lmo` and :func:`svd_lmo` are made of: axes, shape factor, radius,
    layer mask and stacking, around any function that orthogonalizes.

    Args:
        orthogonalize: From an array (batch, rows, cols), rows ≤ cols, in float32 or float64, to one
            of the same shape and dtype with the polar factor UVᵀ of each matrix UΣVᵀ. It is called
            once for each shape of the tree, under `jax.jit`, and in a loop over slices where
            `memory_limit` asks for them; no matrix may depend on the others of its batch. Some
            are zero, where the slices are padded.
            :func:`newton_schulz` makes such functions.
        radius: As in :func:`newton_schulz_lmo`.
        shape_factor: Likewise.
        dimension_numbers: Likewise.
        memory_limit: Likewise; the function is taken to need as much as the iteration does.

    Returns:
        A stateless transformation, as :func:`newton_schulz_lmo`.

    Raises:
        TypeError: If `orthogonalize` cannot be called.
        ValueError: As :func:`newton_schulz_lmo`, and at `update` if the function returns another
            shape or dtype than it was given.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> def by_eigenvalues(x):  # (XXᵀ)^-½ X
        ...     eigenvalues, q = jnp.linalg.eigh(x @ x.mT)
        ...     return (q / jnp.sqrt(eigenvalues)[..., None, :]) @ q.mT @ x
        >>> tx = dm.spectral_lmo(by_eigenvalues, radius=2.0)
        >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([5.0, -0.1]))}, tx.init({}))
        >>> print(updates["kernel"].round(3))
        [[ 2.  0.]
         [ 0. -2.]]
    """
    if not callable(orthogonalize) or orthogonalize is newton_schulz:
        raise TypeError(
            "orthogonalize must be a function from matrices to their polar factors, such as "
            f"dm.newton_schulz() with its parentheses, got {describe(orthogonalize)}."
        )
    check_positive("radius", radius)
    check_choice("shape_factor", shape_factor, SHAPE_FACTORS)
    if memory_limit is not None:
        memory_limit = static_int(
            "memory_limit",
            memory_limit,
            minimum=1,
            hint="It is in bytes, and static: under optax.inject_hyperparams name it in "
            "static_args.",
        )
    if not isinstance(dimension_numbers, MuonDimensionNumbers | Mapping | None):
        raise TypeError(
            "dimension_numbers must be an optax.contrib.MuonDimensionNumbers or a mapping from "
            f"path patterns to them, got {dimension_numbers!r}."
        )

    def init_fn(params: optax.Params) -> optax.EmptyState:
        leaves = jax.tree.leaves(params)
        for leaf, axes in zip(leaves, matrix_axes(params, dimension_numbers), strict=True):
            shape = matrix_shape(leaf, axes)
            needed = working_bytes(shape, _at_least_f32(leaf))
            if memory_limit is not None and needed > memory_limit:
                raise ValueError(
                    f"memory_limit is {memory_limit:,} bytes, and the iteration of one matrix of "
                    f"leaf '{axes.path}', {shape[0]}×{shape[1]}, needs {needed:,}: give at least "
                    "that."
                )
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        del params
        layer_mask = resolve_mask(layer_mask, updates, extra_args)
        leaves, treedef = jax.tree.flatten(updates)
        directions = [jnp.zeros_like(leaf) for leaf in leaves]
        active, stacks, ways_back = [], [], []
        mask = jax.tree.leaves(layer_mask)
        for i, axes in enumerate(matrix_axes(updates, dimension_numbers)):
            if mask[i]:
                stack, restore = to_matrices(leaves[i], axes)
                active.append(i)
                stacks.append(stack.astype(_at_least_f32(stack)))
                ways_back.append(restore)
        results = map_stacks(orthogonalize, stacks, memory_limit or DEFAULT_MEMORY_LIMIT)
        for i, stack, restore in zip(active, results, ways_back, strict=True):
            # In float32 until the end: a bfloat16 leaf is rounded once.
            factor = SHAPE_FACTORS[shape_factor](*stack.shape[1:])
            scaled = jnp.asarray(radius, stack.dtype) * factor * stack
            directions[i] = restore(scaled).astype(leaves[i].dtype)
        return treedef.unflatten(directions), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _at_least_f32(leaf: jax.Array) -> np.dtype:
    return np.promote_types(leaf.dtype, np.float32)
