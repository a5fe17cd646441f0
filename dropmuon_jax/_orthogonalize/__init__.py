"""The polar factor UVᵀ of a matrix UΣVᵀ: polynomials, the iteration, many leaves at once."""

from dropmuon_jax._orthogonalize._buckets import Kind, plan_buckets
from dropmuon_jax._orthogonalize._layouts import (
    Bucket,
    axes_size,
    choose_layout,
    layout_cost,
)
from dropmuon_jax._orthogonalize._many import map_matrices
from dropmuon_jax._orthogonalize._newton_schulz import Orthogonalize, newton_schulz
from dropmuon_jax._orthogonalize._polynomials import Coefficients, polar_express_coefficients
from dropmuon_jax._orthogonalize._scaling import to_unit_entries
from dropmuon_jax._orthogonalize._slices import DEFAULT_MEMORY_LIMIT, working_bytes
from dropmuon_jax._orthogonalize._svd import finite_or_nan, svd_polar_factor

__all__ = [
    "DEFAULT_MEMORY_LIMIT",
    "Bucket",
    "Coefficients",
    "Kind",
    "Orthogonalize",
    "axes_size",
    "choose_layout",
    "finite_or_nan",
    "layout_cost",
    "map_matrices",
    "newton_schulz",
    "plan_buckets",
    "polar_express_coefficients",
    "svd_polar_factor",
    "to_unit_entries",
    "working_bytes",
]
