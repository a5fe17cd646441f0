"""Norms of one array: dual norm, linear minimization oracle and sharp operator, as functions."""

from dropmuon_jax._norms._geometries import Geometry, inner
from dropmuon_jax._norms._named import (
    column_norm,
    euclidean_norm,
    nuclear_norm,
    rms_norm,
    row_norm,
    sign_norm,
    spectral_norm,
)
from dropmuon_jax._norms._norm import Norm

__all__ = [
    "Geometry",
    "Norm",
    "column_norm",
    "euclidean_norm",
    "inner",
    "nuclear_norm",
    "rms_norm",
    "row_norm",
    "sign_norm",
    "spectral_norm",
]
