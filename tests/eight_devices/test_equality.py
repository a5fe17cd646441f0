"""On every mesh, in every layout and behind every wrapper: what one device computes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm
from meshes import Network, assert_close, graded, make_mesh, normal, shardings

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
TREE, KERNELS = normal(SHAPES), normal({f"w{i}": (16, 32) for i in range(3)})
LAYERS = dm.layers_by_path(TREE, list(SHAPES))
LABELS = dm.matrix_labels(TREE)
FSDP, TWO_AXES = P("fsdp"), {"fsdp": 4, "tensor": 2}


def steps_of(tx: Any, *, has_second: bool = False, **extra_args: Any) -> Callable[..., Any]:
    """Updates and state after two steps by the same gradients."""
    tx = optax.with_extra_args_support(tx)

    def run(grads: Any) -> Any:
        others = {"prev_params_grads": jax.tree.map(jnp.cos, grads)} if has_second else {}
        _, state = tx.update(grads, tx.init(grads), grads, **extra_args, **others)
        return tx.update(grads, state, grads, **extra_args, **others)

    return run


ITERATED, EXACT = (
    dm.norms.spectral_norm(orthogonalize=of)
    for of in (dm.orthogonalize.newton_schulz(num_steps=3), dm.orthogonalize.svd_polar_factor)
)
LMO = dm.newton_schulz_lmo(0.3, num_steps=3)
PART_OF_LEAF = optax.stateless(lambda updates, _: ITERATED.direction(updates[:3]))
SMOOTHNESS = dm.planning.track_smoothness(EXACT, dimension_numbers="in_out")


def of_matrices(lmo: Any) -> Any:
    return dm.chain_subtrees({"matrix": lmo, "other": dm.norm_lmo(dm.norms.sign_norm())}, LABELS)


def accumulated(tx: Any) -> Any:
    steps = optax.MultiSteps(tx, 2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def injected(make: Any) -> Any:
    return optax.inject_hyperparams(make)(value=0.1)


def of_all_norms(value: Any) -> Any:
    sign_lmo = dm.norm_lmo(dm.norms.sign_norm(), value)
    lmo = dm.newton_schulz_lmo(value, num_steps=3)
    return optax.chain(sign_lmo, lmo, dm.transforms.norm_sharp(ITERATED, value))


def derivatives(x: Any) -> Any:
    loss = lambda x: jnp.sum(LMO.update(x, LMO.init(x))[0] ** 3)  # noqa: E731
    return jax.grad(loss)(x), jax.jacfwd(loss)(x)


DROP_MUON = dm.drop_muon(0.1, LAYERS, weight_decay=0.1)
EUCLIDEAN = dm.norm_lmo(dm.norms.euclidean_norm(), dm.schedules.adaptive_radius(2.0, 0.5))
TRANSFORMATIONS: dict[str, Any] = {
    "momentum": dm.momentum(0.8, nesterov=True),
    "mars_momentum": dm.transforms.mars_momentum(0.8),
    "newton_schulz_lmo": of_matrices(LMO),
    "newton_schulz_sharp": of_matrices(dm.transforms.norm_sharp(ITERATED, 0.3)),
    "svd_lmo": of_matrices(dm.norm_lmo(EXACT)),
    "row_sharp": of_matrices(dm.transforms.norm_sharp(dm.norms.row_norm())),
    "euclidean_lmo": of_matrices(EUCLIDEAN),
    "track_smoothness": of_matrices(optax.chain(SMOOTHNESS, LMO)),
    "per_layer": dm.per_layer(optax.adamw(0.1), LAYERS),
    "drop_muon": DROP_MUON,
    "drop_scion": dm.drop_scion(0.1, LAYERS, {"hidden": 2.0, "head": 3.0, "bias": 0.5}),
    "drop_gluon": dm.drop_gluon(0.1, LAYERS),
    "accumulated": accumulated(DROP_MUON),
    "injected": injected(lambda value: DROP_MUON),
}
# Parts of an axis, which the mesh shards in "fused" and "rows", not in "heads" and "gated".
FUSED = {"fused": (16, 48), "rows": (48, 16), "heads": (16, 6, 8), "gated": (16, 64)}
FUSED_SPECS = {
    "fused": P("fsdp", "tensor"),
    "rows": P(("fsdp", "tensor"), None),
    "heads": P("fsdp", None, "tensor"),
    "gated": P(("fsdp", "tensor")),
}
FUSED_NUMBERS: dict[str, Any] = {
    "fused": dm.layers.Parts(1, (23, 12, 13)),
    "rows": dm.layers.Parts(0, (8, 2, 2), "out_in", groups=4),
    "heads": dm.layers.Parts(1, (4, 1, 1), MuonDimensionNumbers(0, (1, 2))),
    "gated": dm.layers.Parts(1, (32, 32)),
}
STACKS = {path: (8, *shape) for path, shape in FUSED.items()}
FUSED_LAYERS = dm.layers_by_path(normal(STACKS), [dm.stacked(*STACKS)])
OF_FUSED = {
    "roles": dm.Roles(has_head=False),
    "orthogonalize": dm.orthogonalize.newton_schulz(num_steps=3),
    "dimension_numbers": FUSED_NUMBERS,
}
MASK, DEPTH = {"layer_mask": LAYERS.mask(1)}, {"depth": 1}
IN_SLICES = dm.newton_schulz_lmo(num_steps=3, memory_limit=12_000)
# Functions of gradients, made with what configures a transformation for a mesh.
CASES: dict[str, Callable[..., Any]] = {
    name: lambda on_mesh, tx=tx: steps_of(on_mesh(tx), **MASK)
    for name, tx in TRANSFORMATIONS.items()
} | {
    "mvr_momentum": lambda on_mesh: steps_of(
        on_mesh(dm.mvr_momentum(0.8, variant=3)), has_second=True, **MASK
    ),
    "accumulated outside": lambda on_mesh: steps_of(accumulated(on_mesh(DROP_MUON)), **DEPTH),
    "injected outside": lambda on_mesh: steps_of(
        injected(lambda value: on_mesh(DROP_MUON)), **DEPTH
    ),
    "inside an optimizer": lambda on_mesh: steps_of(optax.chain(dm.momentum(0.9), on_mesh(LMO))),
    "injected radii": lambda _: steps_of(injected(of_all_norms)),
    "half precision in slices of memory": lambda on_mesh: steps_of(on_mesh(IN_SLICES)),
    "empty leaves": lambda _: steps_of(LMO),
    "seeds side by side": lambda _: jax.vmap(steps_of(LMO)),
    "derivatives": lambda _: derivatives,
    "one leaf": lambda on_mesh: steps_of(on_mesh(LMO)),
    "a part of one leaf": lambda on_mesh: steps_of(on_mesh(PART_OF_LEAF)),
    "parts of an axis": lambda on_mesh: steps_of(
        on_mesh(
            optax.chain(
                dm.planning.track_smoothness(EXACT, dimension_numbers=FUSED_NUMBERS),
                dm.norm_lmo(
                    ITERATED,
                    dm.schedules.adaptive_radius(2.0, 0.5),
                    dimension_numbers=FUSED_NUMBERS,
                ),
            )
        )
    ),
    "parts in stacks": lambda on_mesh: steps_of(
        on_mesh(dm.drop_muon(0.1, FUSED_LAYERS, **OF_FUSED)), depth=3
    ),
}
# Where they are not those of all kinds of layers.
GRADS: dict[str, tuple[Any, Any]] = {
    "inside an optimizer": (KERNELS, FSDP),
    "injected radii": (KERNELS, FSDP),
    "half precision in slices of memory": (
        {f"w{i}": normal((16, 32), i).astype(jnp.bfloat16) for i in range(17)},
        FSDP,
    ),
    "empty leaves": (KERNELS | normal({"none": (0, 8), "no_batch": (1, 4, 0)}), P()),
    "seeds side by side": (normal({"a": (3, 16, 32), "b": (3, 24, 32)}), P(None, "fsdp")),
    "derivatives": (normal((8, 12)), FSDP),
    "one leaf": (normal((16, 32)), FSDP),
    "a part of one leaf": (normal((16, 32)), FSDP),
    "parts of an axis": (normal(FUSED), FUSED_SPECS),
    "parts in stacks": (
        normal(STACKS),
        {path: P(None, *spec) for path, spec in FUSED_SPECS.items()},
    ),
}
EIGHT = [{"fsdp": 1}, {"fsdp": 2}, {"tensor": 4}, {"fsdp": 8}, {"data": 8}]
ON_MESHES = {
    **{f"{name}, explicit": (name, TWO_AXES, True, "owner") for name in CASES},
    **{name: (name, TWO_AXES, False, "owner") for name in [*GRADS, "svd_lmo", "drop_scion"]},
    **{str(axes): ("drop_muon", axes, False, "owner") for axes in EIGHT},
    "2x2x2": ("drop_muon", {"data": 2, "fsdp": 2, "tensor": 2}, False, "owner"),
    "one device, explicit": ("drop_muon", {"fsdp": 1}, True, "owner"),
    **{of: ("drop_muon", TWO_AXES, False, of) for of in ("owner", "rows", "replicated", "auto")},
}
del ON_MESHES["a part of one leaf, explicit"]  # JAX cuts no part that explicit axes do not divide


@pytest.mark.parametrize(
    ("name", "axes", "explicit", "layout"), graded(ON_MESHES, "drop_muon, explicit", "2x2x2")
)
def test_updates_and_state_are_those_of_one_device(name, axes, explicit, layout):
    make, (grads, specs) = CASES[name], GRADS.get(name, (TREE, SPECS))
    specs = jax.tree.map(lambda _: specs, grads) if isinstance(specs, P) else specs
    expected = jax.jit(make(lambda tx: tx))(grads)
    mesh = make_mesh(explicit, **axes)
    placed = shardings(mesh, specs)
    known = {} if explicit else {"shardings": placed}
    with jax.set_mesh(mesh):
        run = jax.jit(make(lambda tx: dm.on_mesh(tx, **known, layout=layout)))
        result = run(jax.device_put(grads, placed))
    assert_close(result, expected, rounding=1e-2 if "half" in name else 1e-4)


# --- Where a user has axes of the mesh ------------------------------------------------------------


@pytest.mark.deep
@pytest.mark.parametrize("is_known", [False, True])
def test_leaves_that_vary_over_an_axis_of_shard_map(is_known):
    """The other axis of the mesh shares out matrices."""
    mesh, grads = make_mesh(data=2, fsdp=4), normal({f"w{i}": (2, 16, 32) for i in range(3)})
    placed = dict.fromkeys(grads, NamedSharding(mesh, P(("data", "fsdp"))))
    tx = dm.on_mesh(LMO, shardings=placed) if is_known else LMO

    def of_row(grads: Any) -> Any:
        updates, _ = steps_of(tx)(jax.tree.map(lambda x: x[0], grads))
        return jax.tree.map(lambda x: x[None], updates)

    with jax.set_mesh(mesh):
        spec = P("data")
        mapped = jax.shard_map(of_row, in_specs=spec, out_specs=spec, axis_names={"data"})
        result = jax.jit(mapped)(grads)
    assert_close(result, jax.vmap(steps_of(LMO))(grads)[0], rounding=1e-5)


@pytest.mark.deep
def test_one_axis_in_shard_map_and_the_other_explicit():
    kinds = (AxisType.Auto, AxisType.Explicit)
    run = steps_of(LMO)
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=kinds)):
        mapped = jax.shard_map(run, in_specs=P(), out_specs=P(), axis_names={"data"})
        result = jax.jit(mapped)(KERNELS)
    assert_close(result, jax.jit(run)(KERNELS), rounding=1e-5)


@pytest.mark.deep
def test_data_parallelism_by_hand_in_shard_map():
    """A step of a network with stacked layers: gradients averaged, parameters replicated."""
    network = Network(is_stacked=True)
    optimizer, params = dm.drop_muon(0.1, network.layers), network.params

    def step(params: Any, batch: Any, depth: Any) -> Any:
        mask = network.layers.mask(depth)
        gradient = dm.masked_value_and_grad(network.loss)
        _, grads = gradient(params, batch, depth, layer_mask=mask)
        grads = jax.lax.pmean(grads, "data")
        return optimizer.update(grads, optimizer.init(params), params, layer_mask=mask)[0]

    def of_devices(num_devices: int) -> Any:
        mesh = make_mesh(data=num_devices)
        specs = P(), P("data"), P()
        mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        return jax.jit(mapped)(params, network.batch(), jnp.int32(4))

    with jax.enable_x64(True):
        assert_close(of_devices(8), of_devices(1), rounding=1e-9)
