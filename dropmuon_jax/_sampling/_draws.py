"""One draw: a pure function of seed and step, in integers, so the same wherever it is computed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BITS = 24  # of a float32's mantissa: probabilities are rounded to multiples of 2^-24


def draw_index(
    seed: int | jax.Array, count: Int[Array, ""] | int, probabilities: Float[Array, " outcomes"]
) -> Int[Array, ""]:
    """An index with the given probabilities, as a scalar int32."""
    key = jax.random.fold_in(_key(seed), count)
    # The folded key is itself 64 random bits, the same under every JAX configuration.
    bits = jax.random.key_data(key)[0] >> (32 - _BITS)
    # A sum of integers is exact, in whatever order a backend takes it. What rounding has lost or
    # added goes to the likeliest index, so that one of probability zero is never drawn.
    total = 1 << _BITS
    shares = jnp.round(probabilities * total).astype(jnp.int32)
    missing = total - jnp.sum(shares, dtype=jnp.int32)
    shares = shares.at[jnp.argmax(shares)].add(missing)
    thresholds = jnp.cumsum(shares, dtype=jnp.int32)[:-1]
    return jnp.sum(bits.astype(jnp.int32) >= thresholds, dtype=jnp.int32)


def _key(seed: int | jax.Array) -> jax.Array:
    """The threefry key of a seed; JAX's own depends on its configuration from 2^32 on."""
    if isinstance(seed, int):
        words = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    else:
        words = jnp.stack([jnp.zeros((), jnp.uint32), seed.astype(jnp.uint32)])
    return jax.random.wrap_key_data(words, impl="threefry2x32")
