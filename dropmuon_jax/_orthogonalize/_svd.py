"""The exact polar factor."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def svd_polar_factor(
    x: Float[Array, "*batch rows cols"],
) -> Float[Array, "*batch rows cols"]:
    """UVᵀ over the singular values that are not zero to rounding; of UΣVᵀ, by its SVD."""
    dtype = np.promote_types(x.dtype, np.float32)
    u, s, vt = jnp.linalg.svd(finite_or_nan(x.astype(dtype)), full_matrices=False)
    # NumPy's rule for the rank of a matrix.
    threshold = s[..., :1] * (max(x.shape[-2:]) * jnp.finfo(dtype).eps)
    # Comparing with "not smaller or equal" keeps the NaN of a matrix with NaN.
    return jnp.matmul(u * jnp.where(s <= threshold, 0, 1)[..., None, :], vt).astype(x.dtype)


def finite_or_nan(x: Array) -> Array:
    """NaN for infinities, with which an SVD on a CPU never returns."""
    return jnp.where(jnp.isinf(x), jnp.nan, x)
