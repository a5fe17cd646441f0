"""Norms of one array: dual norms, steepest steps and sharp operators, as functions."""

from dropmuon_jax.norms.named import (
    column_norm,
    euclidean_norm,
    nuclear_norm,
    rms_norm,
    row_norm,
    sign_norm,
    spectral_norm,
)
from dropmuon_jax.norms.norm import Geometry, Norm

__all__ = [
    "Geometry",
    "Norm",
    "column_norm",
    "euclidean_norm",
    "nuclear_norm",
    "rms_norm",
    "row_norm",
    "sign_norm",
    "spectral_norm",
]
