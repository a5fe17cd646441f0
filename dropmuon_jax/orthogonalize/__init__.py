"""Polar factors UVᵀ of matrices UΣVᵀ: polynomials, the iteration, and many matrices at once."""

from dropmuon_jax.orthogonalize.batches import Orthogonalize, svd_polar_factor
from dropmuon_jax.orthogonalize.coefficients import Coefficients, polar_express_coefficients
from dropmuon_jax.orthogonalize.newton_schulz import NewtonSchulz, newton_schulz
from dropmuon_jax.orthogonalize.polynomials import Polynomials

__all__ = [
    "Coefficients",
    "NewtonSchulz",
    "Orthogonalize",
    "Polynomials",
    "newton_schulz",
    "polar_express_coefficients",
    "svd_polar_factor",
]
