"""On every mesh, what one device computes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
import pytest
from jax.sharding import PartitionSpec as P
from meshes import assert_close, make_mesh, normal, on, shardings

import dropmuon_jax as dm

SHAPES = {
    "mid": {"kernel": (32, 16), "bias": (16,)},  # not active in what follows
    "conv": {"kernel": (3, 3, 8, 16), "bias": (16,)},
    "stem": {"kernel": (16, 32), "bias": (32,)},
    "square": {"kernel": (16, 16), "bias": (16,)},
    "transposed": {"kernel": (16, 16), "bias": (16,)},
    "head": {"kernel": (16, 24), "bias": (24,)},
}
SPECS = {
    "mid": {"kernel": P("tensor", "fsdp"), "bias": P()},
    "conv": {"kernel": P(None, None, "fsdp", "tensor"), "bias": P("tensor")},
    "stem": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
    "square": {"kernel": P("fsdp", "tensor"), "bias": P(("fsdp", "tensor"))},
    "transposed": {"kernel": P("tensor", "fsdp"), "bias": P("fsdp")},
    "head": {"kernel": P(("fsdp", "tensor"), None), "bias": P()},
}
PARAMS, GRADS, OTHER_GRADS = (normal(SHAPES, seed) for seed in range(3))
LAYERS = dm.layers_by_path(PARAMS, list(SHAPES))
RADII = {"hidden": 2.0, "head": 3.0, "bias": 0.5}

MESHES = {
    "one": {"fsdp": 1},
    "two": {"fsdp": 2},
    "four": {"tensor": 4},
    "eight": {"fsdp": 8},
    "replicated": {"data": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}

LMO = dm.newton_schulz_lmo(0.3, shape_factor="muon", num_steps=3)
ITERATED, EXACT = (
    dm.norms.spectral_norm(orthogonalize=of)
    for of in (dm.orthogonalize.newton_schulz(num_steps=3), dm.orthogonalize.svd_polar_factor)
)


def of_matrices(lmo: optax.GradientTransformation) -> optax.GradientTransformation:
    labels = dm.matrix_labels(PARAMS)
    return dm.chain_subtrees({"matrix": lmo, "other": dm.norm_lmo(dm.norms.sign_norm())}, labels)


TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "momentum": lambda: dm.momentum(0.8, nesterov=True),
    "mvr_momentum": lambda: dm.mvr_momentum(0.8, variant=3),
    "mars_momentum": lambda: dm.transforms.mars_momentum(0.8),
    "newton_schulz_lmo": lambda: of_matrices(LMO),
    "newton_schulz_sharp": lambda: of_matrices(dm.transforms.norm_sharp(ITERATED, 0.3)),
    "svd_lmo": lambda: of_matrices(dm.norm_lmo(EXACT)),
    "spectral_norm": lambda: of_matrices(dm.norm_lmo(dm.norms.spectral_norm())),
    "row_sharp": lambda: of_matrices(dm.transforms.norm_sharp(dm.norms.row_norm())),
    "euclidean_lmo": lambda: of_matrices(
        dm.norm_lmo(dm.norms.euclidean_norm(), dm.schedules.adaptive_radius(2.0, 0.5))
    ),
    "per_layer": lambda: dm.per_layer(optax.adamw(0.1), LAYERS),
    "track_smoothness": lambda: of_matrices(
        optax.chain(
            dm.planning.track_smoothness(dm.norms.spectral_norm(), dimension_numbers="in_out"), LMO
        )
    ),
    "drop_muon": lambda: dm.drop_muon(0.1, LAYERS, weight_decay=0.1),
    "drop_scion": lambda: dm.drop_scion(0.1, LAYERS, RADII),
    "drop_gluon": lambda: dm.drop_gluon(0.1, LAYERS),
}
TWO_GRADIENTS = {"mvr_momentum"}


def run(tx: optax.GradientTransformation, mesh: Any = None, *, two: bool = False) -> Any:
    """Two steps without the first layer: parameters, updates and state."""
    extended = optax.with_extra_args_support(tx)
    extra_args = {"prev_params_grads": OTHER_GRADS} if two else {}
    mask = LAYERS.mask(1)

    @jax.jit
    def step(params: Any, grads: Any, state: Any, extra_args: Any) -> Any:
        updates, state = extended.update(grads, state, params, layer_mask=mask, **extra_args)
        return optax.apply_updates(params, updates), updates, state

    with on(mesh):
        params, grads = PARAMS, GRADS
        if mesh is not None:
            placed = shardings(mesh, SPECS)
            params, grads = (jax.tree.map(jax.device_put, t, placed) for t in (params, grads))
            extra_args = {k: jax.tree.map(jax.device_put, v, placed) for k, v in extra_args.items()}
        params, _, state = step(params, grads, tx.init(params), extra_args)
        return step(params, grads, state, extra_args)


@functools.cache
def on_one_device(name: str) -> Any:
    return run(TRANSFORMATIONS[name](), two=name in TWO_GRADIENTS)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_every_transformation_on_two_explicit_axes(name):
    mesh = make_mesh(explicit=True, fsdp=4, tensor=2)
    result = run(TRANSFORMATIONS[name](), mesh, two=name in TWO_GRADIENTS)
    assert_close(result, on_one_device(name), rounding=1e-5)


# Explicit axes are made automatic where matrices are shared out: what follows is the same program.
@pytest.mark.parametrize("name", ["svd_lmo", "drop_scion"])
def test_transformations_on_two_automatic_axes(name):
    result = run(TRANSFORMATIONS[name](), make_mesh(fsdp=4, tensor=2), two=name in TWO_GRADIENTS)
    assert_close(result, on_one_device(name), rounding=1e-5)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_every_mesh(sizes):
    result = run(TRANSFORMATIONS["drop_muon"](), make_mesh(**sizes))
    assert_close(result, on_one_device("drop_muon"), rounding=1e-5)


@pytest.mark.parametrize("layout", ["owner", "rows", "replicated"])
def test_every_layout_with_what_is_known_of_the_shardings(layout):
    mesh = make_mesh(fsdp=4, tensor=2)
    tx = dm.on_mesh(TRANSFORMATIONS["drop_muon"](), shardings=shardings(mesh, SPECS), layout=layout)
    assert_close(run(tx, mesh), on_one_device("drop_muon"), rounding=1e-5)
