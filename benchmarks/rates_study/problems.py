"""Smooth functions of a matrix with a known gradient, and noise that moves smoothly with X."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

SHAPE = (6, 4)
# Of the spectral norm, for the star-convex runs. With a ball of 1 |y| stays below ½, and the noise
# drowns the gradient of a high power: f - f* at K = 10,000 was then that of the start.
BALL = 3.0


@dataclasses.dataclass(frozen=True)
class Problem:
    r"""f(X) = Σ φ(Y) over the entries of Y = U(X - X*)V, U and V orthogonal, φ(0) = 0 its minimum.

    A sample adds noise · Σ (ξ Y + slope · ζ sin Y), ξ and ζ standard normal: the noise of a
    gradient has a constant part and one that moves with X, so that the noise of the difference of
    two gradients is at most noise · slope · ‖X - X'‖.
    """

    phi: Callable[[Array], Array]
    left: Float[Array, "rows rows"]
    right: Float[Array, "columns columns"]
    minimum: Float[Array, "rows columns"]
    start: Float[Array, "rows columns"]
    noise: float
    noise_slope: float

    def value(self, params: Array) -> Array:
        """The value f(X)."""
        return self.phi(self._rotated(params)).sum()

    def sample(self, key: PRNGKeyArray) -> Float[Array, "2 rows columns"]:
        """ξ and ζ."""
        return jax.random.normal(key, (2, *SHAPE))

    def loss(self, params: Array, sample: Float[Array, "2 rows columns"]) -> Array:
        """The value of a sample."""
        y = self._rotated(params)
        constant, moving = sample
        noise = jnp.sum(constant * y + self.noise_slope * moving * jnp.sin(y))
        return self.phi(y).sum() + self.noise * noise

    def _rotated(self, params: Array) -> Array:
        return self.left @ (params - self.minimum) @ self.right


def nonconvex(noise: float, noise_slope: float, seed: int) -> Problem:
    """φ(y) = y² / (1 + y²), concave beyond 0.58 and flat far away; Y starts standard normal."""
    generator = np.random.default_rng(seed)
    return Problem(
        lambda y: y**2 / (1 + y**2),
        **_rotations(generator),
        minimum=jnp.zeros(SHAPE),
        start=jnp.asarray(generator.standard_normal(SHAPE), jnp.float32),
        noise=noise,
        noise_slope=noise_slope,
    )


def star_convex(power: float, noise: float, noise_slope: float, seed: int) -> Problem:
    """φ(y) = |y|^p / p, convex, with X* of half the ball's spectral norm; starts at X = 0."""
    generator = np.random.default_rng(seed)
    minimum = generator.standard_normal(SHAPE)
    return Problem(
        lambda y: jnp.abs(y) ** power / power,
        **_rotations(generator),
        minimum=jnp.asarray(minimum / np.linalg.norm(minimum, 2) * BALL / 2, jnp.float32),
        start=jnp.zeros(SHAPE),
        noise=noise,
        noise_slope=noise_slope,
    )


def _rotations(generator: np.random.Generator) -> dict[str, Any]:
    left, right = (np.linalg.qr(generator.standard_normal((n, n)))[0] for n in SHAPE)
    return {"left": jnp.asarray(left, jnp.float32), "right": jnp.asarray(right, jnp.float32)}
