"""What few do on a mesh, and what a reviewer found broken there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_close, collectives, make_mesh, normal, shardings
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm


def sign_lmo(radius):
    return dm.norm_lmo(dm.norms.sign_norm(), radius)


def newton_schulz_sharp(step_size):
    norm = dm.norms.spectral_norm(orthogonalize=dm.orthogonalize.newton_schulz(num_steps=3))
    return dm.transforms.norm_sharp(norm, step_size)


LMO = dm.newton_schulz_lmo(num_steps=3)
KERNELS = normal({f"w{i}": (16, 32) for i in range(3)})
PLACED = jax.tree.map(lambda _: P("fsdp"), KERNELS)


def direction(tx: optax.GradientTransformation, grads: Any) -> Any:
    return jax.jit(lambda g: tx.update(g, tx.init(g), g)[0])(grads)


def on_explicit_axes(tx: optax.GradientTransformation) -> Any:
    mesh = make_mesh(explicit=True, fsdp=8)
    with jax.set_mesh(mesh):
        return direction(tx, jax.tree.map(jax.device_put, KERNELS, shardings(mesh, PLACED)))


@pytest.mark.parametrize("make", [dm.newton_schulz_lmo, sign_lmo, newton_schulz_sharp])
def test_injected_radii_on_explicit_axes(make):
    name = "step_size" if make is newton_schulz_sharp else "radius"
    static = {"num_steps": 3} if make is dm.newton_schulz_lmo else {}
    tx = optax.inject_hyperparams(make, static_args=tuple(static))(**{name: 0.5}, **static)
    assert_close(on_explicit_axes(tx), direction(tx, KERNELS), rounding=1e-5)


def test_empty_leaves_stay_empty():
    grads = KERNELS | normal({"none": (0, 8), "no_batch": (1, 4, 0)})
    with jax.set_mesh(make_mesh(fsdp=8)):
        result = direction(LMO, grads)
    assert_close(result, direction(LMO, grads), rounding=1e-5)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_layout_inside_an_optimizer(explicit):
    mesh = make_mesh(fsdp=8)
    expected = direction(optax.chain(dm.momentum(0.9), LMO, optax.scale(-0.1)), KERNELS)
    with jax.set_mesh(make_mesh(explicit, fsdp=8)):
        lmo = dm.on_mesh(LMO, None if explicit else mesh, layout="owner")
        tx = optax.chain(dm.momentum(0.9), lmo, optax.scale(-0.1))
        assert_close(direction(tx, KERNELS), expected, rounding=1e-5)


def test_the_user_has_one_axis_in_shard_map_and_the_other_is_explicit():
    kinds = (AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=kinds)

    def update(grads: Any) -> Any:
        return LMO.update(grads, LMO.init(grads))[0]

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(update, in_specs=P(), out_specs=P(), axis_names={"data"})
        result = jax.jit(mapped)(KERNELS)
    assert_close(result, direction(LMO, KERNELS), rounding=1e-5)


def test_leaves_that_vary_over_the_users_axis():
    mesh, grads = make_mesh(data=2, fsdp=4), normal({f"w{i}": (2, 16, 32) for i in range(3)})

    expected = jax.vmap(lambda g: LMO.update(g, LMO.init(g))[0])(grads)
    known = dm.on_mesh(LMO, shardings=shardings(mesh, {k: P(("data", "fsdp")) for k in grads}))
    for tx in (LMO, known):
        with jax.set_mesh(mesh):
            mapped = jax.shard_map(
                lambda grads, tx=tx: jax.tree.map(
                    lambda x: x[None],
                    tx.update(jax.tree.map(lambda x: x[0], grads), optax.EmptyState())[0],
                ),
                in_specs=P("data"),
                out_specs=P("data"),
                axis_names={"data"},
            )
            assert_close(jax.jit(mapped)(grads), expected, rounding=1e-5)


def test_derivatives_go_through():
    def loss(x: Any) -> Any:
        return jnp.sum(LMO.update(x, LMO.init(x))[0] ** 3)

    kernel = normal((8, 12))
    expected = jax.grad(loss)(kernel), jax.jit(jax.jacfwd(loss))(kernel)
    with jax.set_mesh(make_mesh(fsdp=4)):
        result = jax.jit(jax.grad(loss))(kernel), jax.jit(jax.jacfwd(loss))(kernel)
    assert_close(result, expected, rounding=1e-4)


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_stay_on_their_devices(stacked):
    """Matrices whose batch axis is sharded, behind one that is not."""
    mesh, grads = make_mesh(expert=8), {"moe": normal((2, 8, 16, 32))}
    numbers = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    tx: Any = dm.newton_schulz_lmo(num_steps=3, dimension_numbers=numbers)
    if stacked:
        tx = dm.per_layer(tx, dm.layers_by_path(grads, [dm.stacked("moe")]), takes_mask=True)
    placed = {"moe": NamedSharding(mesh, P(None, "expert"))}
    expected = direction(tx, grads)
    known = dm.on_mesh(tx, shardings=placed)
    grads = jax.tree.map(jax.device_put, grads, placed)
    update = jax.jit(lambda g: known.update(g, known.init(g), g)[0], out_shardings=placed)
    assert not collectives(update.lower(grads).compile())
    assert_close(update(grads), expected, rounding=1e-5)


def test_batches_of_any_size_are_exchanged_together():
    mesh = make_mesh(fsdp=8)
    grads = {f"w{n}": normal((n, 16, 32), n) for n in (1, 2, 5)}
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    tx = dm.newton_schulz_lmo(num_steps=3, dimension_numbers=numbers)
    expected = direction(tx, grads)
    placed = {name: NamedSharding(mesh, P(None, "fsdp")) for name in grads}
    grads = jax.tree.map(jax.device_put, grads, placed)
    with jax.set_mesh(mesh):
        update = jax.jit(lambda g: tx.update(g, tx.init(g))[0], out_shardings=placed)
        assert collectives(update.lower(grads).compile()) == {"all-to-all": 2}
        assert_close(update(grads), expected, rounding=1e-5)


def test_half_precision_and_slices_of_memory():
    grads = normal({f"w{i}": (16, 32) for i in range(17)})
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), grads)
    tx = dm.newton_schulz_lmo(num_steps=3, memory_limit=12_000)
    expected = direction(tx, grads)
    with jax.set_mesh(make_mesh(fsdp=2)):
        result = direction(tx, grads)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(result))
    to_f32 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)  # noqa: E731
    assert_close(to_f32(result), to_f32(expected), rounding=1e-2)


@pytest.mark.parametrize(
    ("numbers", "of_convolution"), [("in_out", P(None, None, None, "fsdp")), ("out_in", P("fsdp"))]
)
def test_kernels_that_keep_fan_out_last_or_first(numbers, of_convolution):
    shape = (3, 3, 8, 16) if numbers == "in_out" else (16, 8, 3, 3)
    grads, mesh = KERNELS | normal({"conv": shape}), make_mesh(fsdp=8)
    tx = dm.newton_schulz_lmo(num_steps=3, shape_factor="muon", dimension_numbers=numbers)
    expected = direction(tx, grads)
    placed = shardings(mesh, PLACED | {"conv": of_convolution})
    owned = dm.on_mesh(tx, shardings=placed, layout="owner")
    grads = jax.tree.map(jax.device_put, grads, placed)
    update = jax.jit(lambda g: owned.update(g, owned.init(g))[0], out_shardings=placed)
    assert collectives(update.lower(grads).compile()) == {"all-to-all": 4}  # of two shapes
    assert_close(update(grads), expected, rounding=1e-5)


@pytest.mark.parametrize("sliced", [False, True])
def test_parameters_may_be_one_leaf(sliced):
    """Its path is empty; so is that of a part of it that a norm inside is given."""
    mesh, grads = make_mesh(fsdp=8), normal((16, 32))
    norm = dm.norms.spectral_norm(orthogonalize=dm.orthogonalize.newton_schulz(num_steps=3))
    of_part = optax.stateless(lambda updates, _: norm.direction(updates[:3]))
    tx = optax.chain(LMO, of_part) if sliced else LMO
    placed = NamedSharding(mesh, P("fsdp"))
    known = dm.on_mesh(tx, shardings=placed, layout="owner")
    result = direction(known, jax.device_put(grads, placed))
    assert_close(result, direction(tx, grads), rounding=1e-5)


LAYERS = dm.layers_by_path(KERNELS, list(KERNELS))
WRAPPERS: dict[str, Any] = {
    "accumulated inside": lambda tx, on_mesh: on_mesh(accumulated(tx)),
    "accumulated outside": lambda tx, on_mesh: accumulated(on_mesh(tx)),
    "injected inside": lambda tx, on_mesh: on_mesh(injected(lambda lr: tx)),
    "injected outside": lambda tx, on_mesh: injected(lambda lr: on_mesh(tx)),
}


def accumulated(tx: Any) -> Any:
    steps = optax.MultiSteps(tx, 2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def injected(make: Any) -> Any:
    return optax.inject_hyperparams(make)(lr=0.1)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "active", [{"layer_mask": LAYERS.mask(1)}, {"depth": 1}], ids=["mask", "depth"]
)
def test_wrappers_of_optax_and_the_active_layers_go_through(wrapper, active):
    placed = shardings(make_mesh(fsdp=8), PLACED)

    def second_step(tx: Any, params: Any) -> Any:
        step = jax.jit(lambda p, state: tx.update(p, state, p, **active))
        return step(params, step(params, tx.init(params))[1])[0]

    wrap, tx = WRAPPERS[wrapper], dm.drop_muon(0.1, LAYERS)
    expected = second_step(wrap(tx, lambda tx: tx), KERNELS)
    assert not np.any(expected["w0"])
    assert np.all(np.any(expected["w1"], axis=1))
    known = wrap(tx, lambda tx: dm.on_mesh(tx, shardings=placed))
    result = second_step(known, jax.tree.map(jax.device_put, KERNELS, placed))
    assert_close(result, expected, rounding=1e-5)


def test_explicit_axes_of_one_device_take_the_way_of_one_device():
    mesh, params = (
        make_mesh(explicit=True, fsdp=1),
        normal({"blocks": (4, 16, 16), "head": (16, 24)}),
    )
    layers = dm.layers_by_path(params, [dm.stacked("blocks"), "head"])
    tx = dm.per_layer(LMO, layers, takes_mask=True)

    def update(params: Any, depth: Any) -> Any:
        return tx.update(params, tx.init(params), params, layer_mask=layers.mask(depth))[0]

    expected = jax.jit(update)(params, 1)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        assert_close(jax.jit(update)(params, jnp.int32(1)), expected, rounding=1e-6)
        assert_close(jax.jit(update, static_argnums=1)(params, 1), expected, rounding=1e-6)
        # No layers are put together, as several devices would need.
        assert "custom_vmap" not in str(jax.make_jaxpr(lambda params: update(params, 1))(params))
