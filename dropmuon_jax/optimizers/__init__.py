"""Ready-made optimizers: compositions of the transformations of this package, no arithmetic."""

from dropmuon_jax.optimizers.checks import check_optimizer, scion_init
from dropmuon_jax.optimizers.composition import ROLE_NORMS
from dropmuon_jax.optimizers.muon import drop_muon, muon
from dropmuon_jax.optimizers.scion import (
    SCION_CNN_RADII,
    SCION_GPT_RADII,
    drop_gluon,
    drop_scion,
    gluon,
    scion,
)

__all__ = [
    "ROLE_NORMS",
    "SCION_CNN_RADII",
    "SCION_GPT_RADII",
    "check_optimizer",
    "drop_gluon",
    "drop_muon",
    "drop_scion",
    "gluon",
    "muon",
    "scion",
    "scion_init",
]
