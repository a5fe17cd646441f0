"""The spectral norm's steps, exact or by any kernel."""

from typing import Any

import optax

from dropmuon_jax._checks import describe
from dropmuon_jax._lmo._norm_lmo import norm_lmo, norm_sharp
from dropmuon_jax._matrices import DimensionNumbers
from dropmuon_jax._norms import spectral_norm
from dropmuon_jax._orthogonalize import Orthogonalize, svd_polar_factor
from dropmuon_jax._radii import Radius


def spectral_lmo(
    orthogonalize: Orthogonalize,
    radius: Radius = 1.0,
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
        A transformation, as :func:`newton_schulz_lmo`.

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
    _check_kernel(orthogonalize)
    norm = spectral_norm(shape_factor, orthogonalize=orthogonalize)
    return norm_lmo(norm, radius, dimension_numbers=dimension_numbers, memory_limit=memory_limit)


def spectral_sharp(
    orthogonalize: Orthogonalize,
    step_size: Radius = 1.0,
    *,
    shape_factor: str = "spectral",
    dimension_numbers: DimensionNumbers | None = None,
    memory_limit: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the updates of active layers by ‖M‖* times what a kernel of yours makes of them.

    The sharp form of :func:`spectral_lmo`.

    Args:
        orthogonalize: As in :func:`spectral_lmo`.
        step_size: As in :func:`norm_sharp`.
        shape_factor: As in :func:`newton_schulz_lmo`.
        dimension_numbers: Likewise.
        memory_limit: As in :func:`spectral_lmo`.

    Returns:
        A transformation, as :func:`newton_schulz_lmo`.

    Raises:
        TypeError: As :func:`spectral_lmo` and :func:`norm_sharp`.
        ValueError: As :func:`spectral_lmo`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.spectral_sharp(dm.newton_schulz(num_steps=8), step_size=0.1)
        >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([5.0, 1.0]))}, tx.init({}))
        >>> print(np.round(updates["kernel"].diagonal(), 3))
        [0.6 0.6]
    """
    _check_kernel(orthogonalize)
    norm = spectral_norm(shape_factor, orthogonalize=orthogonalize)
    return norm_sharp(
        norm, step_size, dimension_numbers=dimension_numbers, memory_limit=memory_limit
    )


def svd_sharp(
    step_size: Radius = 1.0,
    *,
    shape_factor: str = "spectral",
    dimension_numbers: DimensionNumbers | None = None,
    memory_limit: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the updates of active layers by ‖M‖* times their exact scaled polar factors.

    The sharp form of :func:`svd_lmo`, a reference for :func:`newton_schulz_sharp`.

    Args:
        step_size: As in :func:`norm_sharp`.
        shape_factor: As in :func:`newton_schulz_lmo`.
        dimension_numbers: Likewise.
        memory_limit: As in :func:`svd_lmo`.

    Returns:
        A transformation, as :func:`newton_schulz_lmo`.

    Raises:
        TypeError: As :func:`norm_sharp`.
        ValueError: As :func:`newton_schulz_lmo`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.svd_sharp()
        >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([5.0, -0.5, 0.0]))}, tx.init({}))
        >>> print(updates["kernel"].diagonal())
        [ 5.5 -5.5  0. ]
    """
    return spectral_sharp(
        svd_polar_factor,
        step_size,
        shape_factor=shape_factor,
        dimension_numbers=dimension_numbers,
        memory_limit=memory_limit,
    )


def _check_kernel(orthogonalize: Any) -> None:
    if not callable(orthogonalize):
        raise TypeError(
            "orthogonalize must be a function from matrices to their polar factors, such as "
            f"dm.newton_schulz() with its parentheses, got {describe(orthogonalize)}."
        )


def svd_lmo(
    radius: Radius = 1.0,
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
        A transformation, as :func:`newton_schulz_lmo`.

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
