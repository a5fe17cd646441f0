"""Numbers of any size brought to where their squares are in range."""

import jax.numpy as jnp
from jaxtyping import Array


def to_unit_entries(x: Array, axes: int | tuple[int, ...] = (-2, -1)) -> tuple[Array, Array]:
    """The numbers times 2⁻ᵉ, exactly, the largest along the axes in [1/2, 1), and the integers e.

    The squares of 1e-30 and of 1e30 are then in range. The axes of e have length 1.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0))
    return jnp.ldexp(x, -exponent), exponent
