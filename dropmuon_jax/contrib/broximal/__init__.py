"""The broximal point method: a step goes to where the function is smallest in a ball."""

from dropmuon_jax.contrib.broximal.exact import brox_absolute, brox_linear, brox_quadratic
from dropmuon_jax.contrib.broximal.method import BroximalPointState, broximal_point
from dropmuon_jax.contrib.broximal.oracle import Brox, ball_envelope, brox

__all__ = [
    "Brox",
    "BroximalPointState",
    "ball_envelope",
    "brox",
    "brox_absolute",
    "brox_linear",
    "brox_quadratic",
    "broximal_point",
]
