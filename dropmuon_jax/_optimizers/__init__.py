"""Ready-made optimizers: compositions of the transformations of this package, no arithmetic."""

from dropmuon_jax._optimizers._composition import ROLE_NORMS
from dropmuon_jax._optimizers._gluon import drop_gluon, gluon
from dropmuon_jax._optimizers._muon import drop_muon, muon
from dropmuon_jax._optimizers._scion import (
    SCION_CNN_RADII,
    SCION_GPT_RADII,
    drop_scion,
    scion,
    scion_init,
)
from dropmuon_jax._optimizers._variance_reduced import gluon_mvr, muon_mvr

__all__ = [
    "ROLE_NORMS",
    "SCION_CNN_RADII",
    "SCION_GPT_RADII",
    "drop_gluon",
    "drop_muon",
    "drop_scion",
    "gluon",
    "gluon_mvr",
    "muon",
    "muon_mvr",
    "scion",
    "scion_init",
]
