"""How users run on a mesh: set, given, explicit, inside shard_map; where state lies."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_close, collectives, make_mesh, normal, shardings

import dropmuon_jax as dm

SHAPES = {"stem": {"kernel": (16, 32), "bias": (32,)}, "head": {"kernel": (32, 16), "bias": (16,)}}
SPECS = {
    "stem": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
    "head": {"kernel": P("tensor", "fsdp"), "bias": P()},
}
PARAMS = normal(SHAPES)
LAYERS = dm.layers_by_path(PARAMS, ["stem", "head"])
OPTIMIZERS = {
    "drop_muon": lambda: dm.drop_muon(0.1, LAYERS),
    "mvr": lambda: dm.drop_muon(0.1, LAYERS, momentum=dm.mvr_momentum(0.9)),
    "adafactor": lambda: dm.per_layer(optax.adafactor(0.1, min_dim_size_to_factor=8), LAYERS),
}


def placed_params(mesh: Any) -> Any:
    return jax.tree.map(jax.device_put, PARAMS, shardings(mesh, SPECS))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_lies_with_its_parameters(name):
    mesh, tx = make_mesh(fsdp=4, tensor=2), OPTIMIZERS[name]()
    params = placed_params(mesh)
    placed = dm.state_shardings(tx, params)
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(placed) == jax.tree.structure(shapes)
    expected = {}
    for (path, param), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(shardings(mesh, SPECS)),
        strict=True,
    ):
        expected[jax.tree_util.keystr(path), param.shape] = sharding.spec
    matched = 0
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(placed), strict=True
    ):
        name_of_leaf = jax.tree_util.keystr(path)
        specs = [
            spec
            for (end, shape), spec in expected.items()
            if name_of_leaf.endswith(end) and leaf.shape == shape
        ]
        assert sharding.spec == (specs[0] if specs else P()), name_of_leaf
        matched += bool(specs)
    assert matched >= 2  # of Adafactor the biases, whose second moments are whole
    state = jax.jit(tx.init, out_shardings=placed)(params)
    assert all(
        leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    )


def test_shapes_with_shardings_do_as_well_as_parameters():
    mesh, tx = make_mesh(fsdp=4, tensor=2), OPTIMIZERS["drop_muon"]()
    shapes = jax.eval_shape(lambda: PARAMS)
    assert dm.state_shardings(tx, shapes, shardings(mesh, SPECS)) == dm.state_shardings(
        tx, placed_params(mesh)
    )


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_donated_steps_keep_shardings_and_compile_once(explicit):
    mesh, tx = make_mesh(explicit, fsdp=4, tensor=2), OPTIMIZERS["drop_muon"]()
    params, traces = placed_params(mesh), []
    placed = jax.tree.map(lambda x: x.sharding, params), dm.state_shardings(tx, params)

    def step(params: Any, state: Any, depth: int) -> Any:
        traces.append(depth)
        updates, state = tx.update(params, state, params, layer_mask=LAYERS.mask(depth))
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, static_argnums=2, donate_argnums=(0, 1), out_shardings=placed)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=placed[1])(params)
        for depth in (0, 1, 0, 1):
            params, state = jitted(params, state, depth)
    assert traces == [0, 1]
    assert all(
        x.sharding.is_equivalent_to(y, x.ndim)
        for x, y in zip(jax.tree.leaves((params, state)), jax.tree.leaves(placed), strict=True)
    )


@pytest.mark.parametrize("given", ["mesh", "abstract mesh", "shardings", "both"])
def test_the_mesh_may_be_an_argument(given):
    mesh, inner = make_mesh(fsdp=4, tensor=2), dm.newton_schulz_lmo()
    kernels = {"stem": PARAMS["stem"]["kernel"], "head": PARAMS["head"]["kernel"].T}
    placed = shardings(mesh, {"stem": P("fsdp", "tensor"), "head": P("fsdp", "tensor")})
    arguments: dict[str, dict[str, Any]] = {
        "mesh": {"mesh": mesh},
        "abstract mesh": {"mesh": mesh.abstract_mesh},
        "shardings": {"shardings": placed},
        "both": {"mesh": mesh, "shardings": placed},
    }
    tx = dm.on_mesh(inner, **arguments[given], layout="owner")
    expected, _ = jax.jit(inner.update)(kernels, inner.init(kernels))
    kernels = jax.tree.map(jax.device_put, kernels, placed)
    compiled = jax.jit(tx.update, out_shardings=(placed, None)).lower(kernels, tx.init(kernels))
    compiled = compiled.compile()
    assert collectives(compiled)["all-to-all"]
    assert_close(compiled(kernels, tx.init(kernels))[0], expected, rounding=1e-5)
    assert_close(tx.update(kernels, tx.init(kernels))[0], expected, rounding=1e-5)  # eagerly


def test_inside_shard_map_axes_are_the_users():
    """Data parallelism by hand: gradients averaged, parameters replicated."""
    mesh, tx = make_mesh(data=8), OPTIMIZERS["drop_muon"]()
    mask = LAYERS.mask(0)

    def step(params: Any, batch: Any) -> Any:
        grads = jax.tree.map(lambda p: p * jnp.mean(batch), params)
        grads = jax.lax.pmean(grads, "data")
        updates, _ = tx.update(grads, tx.init(params), params, layer_mask=mask)
        return optax.apply_updates(params, updates)

    batch = np.arange(16.0, dtype=np.float32)
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    grads = jax.tree.map(lambda p: p * np.mean(batch), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, layer_mask=mask)
    expected = optax.apply_updates(PARAMS, updates)
    assert_close(jax.jit(mapped)(PARAMS, batch), expected, rounding=1e-5)


def test_seeds_side_by_side_under_vmap():
    mesh, tx = make_mesh(fsdp=8), dm.newton_schulz_lmo()
    kernels = {"a": normal((3, 16, 32)), "b": normal((3, 32, 16), seed=1)}
    update = jax.vmap(lambda g: tx.update(g, tx.init(g))[0])
    expected = jax.jit(update)(kernels)
    placed = shardings(mesh, {"a": P(None, "fsdp"), "b": P(None, None, "fsdp")})
    with jax.set_mesh(mesh):
        result = jax.jit(update)(jax.tree.map(jax.device_put, kernels, placed))
    assert_close(result, expected, rounding=1e-5)


def test_another_mesh_than_the_one_that_is_set_is_an_error():
    tx = dm.on_mesh(dm.newton_schulz_lmo(), make_mesh(fsdp=8))
    kernel = PARAMS["stem"]["kernel"]
    with (
        jax.set_mesh(make_mesh(fsdp=4, tensor=2)),
        pytest.raises(ValueError, match=r"given the mesh \{'fsdp': 8\}.*'tensor': 2"),
    ):
        jax.jit(tx.update)(kernel, tx.init(kernel))


def test_the_host_draws_under_a_mesh_too():
    sampler = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=3)
    expected = [sampler.depth(step) for step in range(5)]
    for explicit in (False, True):
        sampler = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=3)  # remembers no draws
        with jax.set_mesh(make_mesh(explicit, fsdp=8)):
            assert [sampler.depth(step) for step in range(5)] == expected
            assert [int(jax.jit(sampler.sample)(step)) for step in range(5)] == expected
            sampler.check_processes(0)


def test_the_example_of_the_readme_shards_and_learns():
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"^### On a mesh.*?^```python\n(.+?)^```", readme, re.M | re.S)
    namespace: dict[str, Any] = {}
    exec(compile(code, "README.md, On a mesh", "exec"), namespace)
    assert namespace["losses"][-1] < 0.7 * namespace["losses"][0]
    assert namespace["mesh"].size == jax.device_count() == 8
    kept = zip(
        jax.tree.leaves((namespace["params"], namespace["opt_state"])),
        jax.tree.leaves((namespace["shardings"], namespace["placed"])),
        strict=True,
    )
    assert all(x.sharding.is_equivalent_to(placed, x.ndim) for x, placed in kept)
    assert namespace["params"]["up"].sharding.spec == P("fsdp", None)
    (momentum,) = optax.tree.get_all_with_path(namespace["opt_state"], "MomentumState")
    assert momentum[1].momentum["down"].sharding.spec == P(None, "fsdp")


@pytest.mark.parametrize("on_devices", [False, True])
def test_none_in_the_place_of_a_leaf_has_no_sharding(on_devices):
    """As in modules whose activation function is a leaf that has been taken out."""
    mesh, tx = make_mesh(fsdp=4, tensor=2), dm.momentum(0.9)
    params = {"layer": {"w": PARAMS["stem"]["kernel"], "activation": None}, "n": None}
    placed = {"layer": {"w": NamedSharding(mesh, P("fsdp")), "activation": None}, "n": None}
    on = jax.tree.map(jax.device_put, params, placed)
    of_state = dm.state_shardings(tx, on) if on_devices else dm.state_shardings(tx, params, placed)
    assert of_state.momentum["layer"]["w"].spec == P("fsdp")
    assert jax.tree.structure(of_state) == jax.tree.structure(jax.eval_shape(tx.init, params))
    jax.jit(tx.init, out_shardings=of_state)(on)
    lmo = dm.newton_schulz_lmo()
    owned = dm.on_mesh(lmo, shardings=placed, layout="owner")
    (updates, expected) = (jax.jit(of.update)(on, of.init(on))[0] for of in (owned, lmo))
    assert_close(updates, expected, rounding=1e-5)
    assert len(dm.sharding.plan_layouts(params, shardings=placed)) == 1


def test_a_replicated_leaf_says_where_it_is():
    mesh = make_mesh(fsdp=8)
    params = jax.device_put({"w": PARAMS["stem"]["kernel"]}, NamedSharding(mesh, P()))
    placed = dm.state_shardings(dm.momentum(0.9), params)
    assert placed.momentum["w"].spec == P()
