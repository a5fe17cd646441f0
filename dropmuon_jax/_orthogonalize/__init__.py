"""The polar factor UVᵀ of a matrix UΣVᵀ: polynomials, and the iteration."""

from dropmuon_jax._orthogonalize._newton_schulz import NewtonSchulz, Orthogonalize, newton_schulz
from dropmuon_jax._orthogonalize._polynomials import Coefficients, polar_express_coefficients
from dropmuon_jax._orthogonalize._scaling import to_unit_entries
from dropmuon_jax._orthogonalize._svd import finite_or_nan, svd_polar_factor

__all__ = [
    "Coefficients",
    "NewtonSchulz",
    "Orthogonalize",
    "finite_or_nan",
    "newton_schulz",
    "polar_express_coefficients",
    "svd_polar_factor",
    "to_unit_entries",
]
