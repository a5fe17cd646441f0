"""The methods that are compared: each orthogonalizes a whole list of updates, without momentum."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm
from orthogonalization.shape_lists import Shape

Orthogonalizer = Callable[[list[jax.Array]], list[jax.Array]]
MethodName = Literal[
    "optax_muon",
    "newton_schulz",
    "newton_schulz_muon",
    "newton_schulz_dion",
    "newton_schulz_bf16",
    "turbo_muon",
    "polar_express_7",
    "svd",
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
REFERENCE: MethodName = "optax_muon"  # whom time and error are against
DEFAULT: MethodName = "newton_schulz"  # this package as it comes: the targets are its
# They multiply the same matrices as the default, whatever they multiply them with.
AS_FAST_AS_DEFAULT: tuple[MethodName, ...] = ("newton_schulz_muon", "newton_schulz_dion")
USUAL_NUM_STEPS = 5  # of optax.contrib.muon, and of newton_schulz_lmo for most coefficients

# The arguments of newton_schulz_lmo that make a method of this package.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "newton_schulz": {},
    "newton_schulz_muon": {"coefficients": "muon"},
    "newton_schulz_dion": {"coefficients": "dion"},
    "newton_schulz_bf16": {"dtype": jnp.bfloat16},
    "turbo_muon": {"coefficients": "turbo_muon"},
    "polar_express_7": {"coefficients": "polar_express", "num_steps": 7},
}
_OWN_NUM_STEPS = ("turbo_muon", "polar_express_7")  # part of what the method is


def make_orthogonalizer(
    method: MethodName, shapes: Sequence[Shape], num_steps: int | None = None
) -> Orthogonalizer:
    """A method for leaves of these shapes.

    Args:
        method: Its name.
        shapes: Of the leaves, Flax kernels.
        num_steps: Steps of the iteration, by default what each method does by itself; turbo_muon
            and polar_express_7 have their own number, and svd none.
    """
    if method == "svd":
        return lambda updates: [_polar_factor(update) for update in updates]
    if method == "optax_muon":
        tx = _optax_muon(shapes, USUAL_NUM_STEPS if num_steps is None else num_steps)
    else:
        arguments = dict(_ARGUMENTS[method])
        if num_steps is not None and method not in _OWN_NUM_STEPS:
            arguments["num_steps"] = num_steps
        tx = dm.newton_schulz_lmo(**arguments)

    # The state is made inside, where XLA sees that it is zero. optax.contrib.muon needs one, and
    # with a decay of 0 its momentum is folded away to nothing: what is compiled are the same
    # instructions as from its orthogonalization alone, which has no public name. Its coefficients
    # become constants, which in a training step are read from the state. Both are in its favour.
    def orthogonalize(updates: list[jax.Array]) -> list[jax.Array]:
        directions, _ = tx.update(updates, tx.init(updates))
        return jax.tree.leaves(directions)

    return orthogonalize


def _optax_muon(shapes: Sequence[Shape], num_steps: int) -> optax.GradientTransformation:
    """The orthogonalization of optax.contrib.muon, without the factor that depends on the shape."""
    # Needed for matrices as well: its default, None, fails on every tree but a single array.
    dimension_numbers = [
        MuonDimensionNumbers(tuple(range(len(shape) - 1)), len(shape) - 1) for shape in shapes
    ]
    return optax.contrib.scale_by_muon(
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers=dimension_numbers,
        ns_steps=num_steps,
    )


def _polar_factor(update: jax.Array) -> jax.Array:
    """UVᵀ, by a singular value decomposition in at least float32."""
    matrix = update.reshape(-1, update.shape[-1]).astype(jnp.promote_types(update.dtype, "float32"))
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return (u @ vt).reshape(update.shape).astype(update.dtype)
