"""What is compared: functions that orthogonalize a list of matrices, and optimizers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm
from orthogonalization.subjects import Shape

REFERENCE = "optax_muon"  # whom time and error are against
DEFAULT = "newton_schulz"  # this package as it comes
FASTEST = "nonic"
OtherName = Literal[
    "nonic", "four_steps", "seven_steps", "turbo_muon", "muon", "dion", "bfloat16", "svd"
]
METHODS: tuple[str, ...] = (REFERENCE, DEFAULT, *get_args(OtherName))
# Where there are not 5.
NUM_STEPS: dict[str, int | None] = {
    FASTEST: 3,
    "four_steps": 4,
    "seven_steps": 7,
    "turbo_muon": 4,
    "svd": None,
    "adamw": None,
}
DEGREES = {FASTEST: 9}  # the others have 5
_ARGUMENTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    # On none of the matrices measured here is its error larger than optax.contrib.muon's.
    FASTEST: {"coefficients": "nonic"},
    "four_steps": {
        "coefficients": dm.orthogonalize.polar_express_coefficients(4, smallest=3.5e-3),
        "preconditioning": "schatten",
    },
    "seven_steps": {"num_steps": 7},
    "turbo_muon": {"coefficients": "turbo_muon"},
    "muon": {"coefficients": "muon"},
    "dion": {"coefficients": "dion"},
    "bfloat16": {"dtype": jnp.bfloat16},
}


def orthogonalizer(method: str, shapes: Sequence[Shape]) -> Callable[[list[jax.Array]], Any]:
    """A function from matrices of these shapes to their polar factors."""
    if method == REFERENCE:
        # Without momentum, and without the factor that depends on the shape. For matrices as well
        # it has to be told the axes: by default it fails on every tree but a single array.
        axes = [_axes(len(shape)) for shape in shapes]
        tx = optax.contrib.scale_by_muon(beta=0, nesterov=False, weight_dimension_numbers=axes)
    else:
        norm = dm.norms.spectral_norm(orthogonalize=_polar_factor(method))
        tx = dm.norm_lmo(norm, dimension_numbers={"*": "in_out"})  # all are Flax kernels
    # The state is made inside, where XLA sees that it is zero: with a decay of 0 the momentum of
    # optax.contrib.muon is folded away to nothing, and its coefficients become constants.
    return lambda matrices: tx.update(matrices, tx.init(matrices))[0]


def optimizer(method: str) -> optax.GradientTransformation:
    """A whole optimizer as it comes: kernels are matrices, and everything else goes to Adam."""
    if method == "adamw":
        return optax.adamw(1e-3)
    if method == REFERENCE:
        return optax.contrib.muon(1e-3, muon_weight_dimension_numbers=_axes_of_kernels)
    return dm.muon(1e-3, orthogonalize=_polar_factor(method))


def _polar_factor(method: str) -> dm.orthogonalize.Orthogonalize:
    if method == "svd":
        return dm.orthogonalize.svd_polar_factor
    return dm.orthogonalize.newton_schulz(**_ARGUMENTS[method])


def _axes(ndim: int) -> MuonDimensionNumbers:
    return MuonDimensionNumbers(tuple(range(ndim - 1)), ndim - 1)


def _axes_of_kernels(params: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, leaf: _axes(leaf.ndim) if path[-1].key == "kernel" else None, params
    )
