"""The polar factor UVᵀ of a matrix UΣVᵀ: polynomials, the iteration, many leaves at once."""

from dropmuon_jax._orthogonalize._newton_schulz import Orthogonalize, newton_schulz
from dropmuon_jax._orthogonalize._polynomials import Coefficients, polar_express_coefficients
from dropmuon_jax._orthogonalize._scaling import to_unit_entries
from dropmuon_jax._orthogonalize._stacks import DEFAULT_MEMORY_LIMIT, map_stacks, working_bytes
from dropmuon_jax._orthogonalize._svd import finite_or_nan, svd_polar_factor

__all__ = [
    "DEFAULT_MEMORY_LIMIT",
    "Coefficients",
    "Orthogonalize",
    "finite_or_nan",
    "map_stacks",
    "newton_schulz",
    "polar_express_coefficients",
    "svd_polar_factor",
    "to_unit_entries",
    "working_bytes",
]
