"""Matrix products of a dtype on a platform: how they are made, and how they round."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Product = Callable[[Float[Array, "*batch n k"], Float[Array, "*batch k m"]], Array]

# Unit roundoffs of products of float32 at JAX's default precision: on a GPU and on a TPU.
TF32, BFLOAT16 = 2.0**-11, 2.0**-8
# From this size on two parts of a symmetric product are faster than the whole on a CPU: measured
# 1.10× at 768 and 1.19× at 1536 rows, and 0.96× at 512.
_SYMMETRIC_FROM = 768


class Products(NamedTuple):
    """How to multiply."""

    roundoff: float
    """Unit roundoff of the factors; sums are in float32 at least."""
    product: Product
    """AB."""
    symmetric_product: Product
    """AB, where it is known to be symmetric."""


def cpu_products(dtype: Any) -> Products:
    """On a CPU float32 is multiplied in full, whatever precision is asked for."""
    accumulator, info = np.promote_types(dtype, np.float32), jnp.finfo(dtype)

    def product(a: Array, b: Array) -> Array:
        # XLA's CPU backend sums products of bfloat16 in float32 for some shapes only, and has none
        # for the others (jax 0.10): round, then multiply in float32, for the same result.
        if dtype != accumulator:
            a, b = (jax.lax.reduce_precision(x, info.nexp, info.nmant) for x in (a, b))
        return jnp.matmul(a.astype(accumulator), b.astype(accumulator))

    def symmetric_product(a: Array, b: Array) -> Array:
        if a.shape[-1] == a.shape[-2] >= _SYMMETRIC_FROM:
            return _in_parts(a, b, product)
        return product(a, b)

    return Products(_roundoff(dtype), product, symmetric_product)


def accelerator_products(
    dtype: Any, precision: jax.lax.Precision | None, float32_roundoff: float
) -> Products:
    """On a GPU or TPU float32 is rounded, unless the precision is the highest."""
    accumulator = np.promote_types(dtype, np.float32)

    def product(a: Array, b: Array) -> Array:
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.matmul(a, b, precision=precision, preferred_element_type=accumulator)

    rounded = dtype == jnp.float32 and precision is not jax.lax.Precision.HIGHEST
    return Products(float32_roundoff if rounded else _roundoff(dtype), product, product)


def _roundoff(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def _in_parts(a: Array, b: Array, product: Product) -> Array:
    """The rows of the upper half, and the lower right quarter: three quarters of the operations."""
    half = a.shape[-2] // 2
    top = product(a[..., :half, :], b)
    corner = product(a[..., half:, :], b[..., half:])
    bottom = jnp.concatenate([top[..., half:].mT, corner], axis=-1)
    return jnp.concatenate([top, bottom], axis=-2)
