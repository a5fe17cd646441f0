"""The spectral norm's steps by polynomials: what Muon does."""

from typing import Any

import jax
import optax

from dropmuon_jax._lmo._spectral import spectral_lmo, spectral_sharp
from dropmuon_jax._matrices import DimensionNumbers
from dropmuon_jax._orthogonalize import Coefficients, newton_schulz
from dropmuon_jax._radii import Radius


def newton_schulz_lmo(
    radius: Radius = 1.0,
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
    matrix. It is :func:`norm_lmo` of `spectral_norm(shape_factor, orthogonalize=newton_schulz(…))`.

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
        radius: Size of the ball: a positive number or scalar array, a schedule,
            :func:`adaptive_radius`, or a mapping from path patterns to these, as in
            :func:`norm_lmo`.
        shape_factor: How the radius grows with the shape: "spectral" (1), "muon"
            (max(1, fan-out/fan-in)^½), "moonlight" (0.2 · max(fan-in, fan-out)^½), "rms_to_rms"
            ((fan-out/fan-in)^½) or "scion" (the same, and for convolutions
            (out/in)^½ / window). The table is in :func:`spectral_norm`.
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
        dimension_numbers: Which axes are fan-in and which fan-out, as in :func:`norm_lmo`; Flax
            kernels (in, out) and (height, width, in, out) need none.
        memory_limit: Working memory of the iteration in bytes, static; by default 256 MiB, or what
            one matrix needs where that is more. Beyond it the matrices of a shape pass in slices,
            in a loop. The stack of these matrices, in float32, comes on top; of leaves in half
            precision XLA keeps two.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). Updates keep shape and dtype; an inactive leaf has update zero. It is stateless
        unless a radius is a schedule.

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
    kernel = newton_schulz(
        coefficients, num_steps=num_steps, start=start, dtype=dtype, precision=precision
    )
    return spectral_lmo(
        kernel,
        radius,
        shape_factor=shape_factor,
        dimension_numbers=dimension_numbers,
        memory_limit=memory_limit,
    )


def newton_schulz_sharp(
    step_size: Radius = 1.0,
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
    r"""Replaces the updates of active layers by ‖M‖* times their scaled polar factors.

    The sharp form of :func:`newton_schulz_lmo`,

    .. math::
        \text{step size} \cdot \|M\|_* \cdot c\, UV^\top, \qquad
        \|M\|_* = \langle M, c\, UV^\top \rangle = c \textstyle\sum_j \sigma_j

    with the shape factor c. The dual norm has the band of UVᵀ, so the step has its square.

    Args:
        step_size: γ, which multiplies the dual norm: as in :func:`norm_sharp`.
        shape_factor: As in :func:`newton_schulz_lmo`.
        coefficients: Likewise.
        num_steps: Likewise.
        start: Likewise.
        dtype: Likewise.
        precision: Likewise.
        dimension_numbers: Likewise.
        memory_limit: Likewise.

    Returns:
        A transformation, as :func:`newton_schulz_lmo`.

    Raises:
        TypeError: As :func:`norm_sharp`.
        ValueError: As :func:`newton_schulz_lmo`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.newton_schulz_sharp(num_steps=7)
        >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([5.0, -0.5]))}, tx.init({}))
        >>> print(updates["kernel"].round(2))
        [[ 5.5 0. ]
         [ 0. -5.5]]
    """
    kernel = newton_schulz(
        coefficients, num_steps=num_steps, start=start, dtype=dtype, precision=precision
    )
    return spectral_sharp(
        kernel,
        step_size,
        shape_factor=shape_factor,
        dimension_numbers=dimension_numbers,
        memory_limit=memory_limit,
    )
