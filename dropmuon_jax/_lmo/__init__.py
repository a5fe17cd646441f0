"""Linear minimization oracles (LMOs) as transformations, and the sharp form of each."""

from dropmuon_jax._lmo._by_leaf import euclidean_lmo, euclidean_sharp, rms_lmo, rms_sharp
from dropmuon_jax._lmo._by_vector import (
    column_lmo,
    column_sharp,
    row_lmo,
    row_sharp,
    sign_lmo,
    sign_sharp,
)
from dropmuon_jax._lmo._newton_schulz import newton_schulz_lmo, newton_schulz_sharp
from dropmuon_jax._lmo._norm_lmo import RadiusState, norm_lmo, norm_sharp
from dropmuon_jax._lmo._spectral import spectral_lmo, spectral_sharp, svd_lmo, svd_sharp

__all__ = [
    "RadiusState",
    "column_lmo",
    "column_sharp",
    "euclidean_lmo",
    "euclidean_sharp",
    "newton_schulz_lmo",
    "newton_schulz_sharp",
    "norm_lmo",
    "norm_sharp",
    "rms_lmo",
    "rms_sharp",
    "row_lmo",
    "row_sharp",
    "sign_lmo",
    "sign_sharp",
    "spectral_lmo",
    "spectral_sharp",
    "svd_lmo",
    "svd_sharp",
]
