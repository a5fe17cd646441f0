"""Where states lie on a mesh, and how users name it: as an argument, and in the README."""

import pathlib
import re
from typing import Any

import jax
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dropmuon_jax as dm
from meshes import (
    Network,
    assert_close,
    assert_placed,
    graded,
    make_mesh,
    shardings,
)

NETWORK = Network(is_stacked=False)
PARAMS, LAYERS = NETWORK.params, NETWORK.layers
KERNELS = {name: PARAMS[name]["kernel"] for name in ("stem", "mid")}
TWO_AXES = {"fsdp": 4, "tensor": 2}
OPTIMIZERS = {
    "drop_muon": (dm.drop_muon(0.1, LAYERS), 9),
    "mvr": (dm.drop_muon(0.1, LAYERS, momentum=dm.mvr_momentum(0.9)), 15),
    # Its second moments of matrices are sums of rows and of columns.
    "adafactor": (dm.per_layer(optax.adafactor(0.1, min_dim_size_to_factor=8), LAYERS), 3),
}


@pytest.mark.parametrize(("tx", "num_like_parameters"), graded(OPTIMIZERS, "mvr"))
def test_the_state_lies_with_its_parameters(tx, num_like_parameters):
    placed = shardings(make_mesh(**TWO_AXES), NETWORK.specs)
    params, of_state = jax.device_put(PARAMS, placed), dm.state_shardings(tx, PARAMS, placed)
    assert of_state == dm.state_shardings(tx, params)  # whose own shardings they are
    shapes = jax.eval_shape(tx.init, params)
    num_found = 0
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(of_state), strict=True
    ):
        *_, layer, name = (getattr(key, "key", None) for key in (None, *path))
        like = layer in PARAMS and PARAMS[layer][name].shape == leaf.shape
        assert sharding.spec == (placed[layer][name].spec if like else P()), path
        num_found += like
    assert num_found == num_like_parameters
    assert_placed(jax.jit(tx.init, out_shardings=of_state)(params), of_state)


def test_leaves_of_one_shape_and_the_same_last_name_lie_as_their_own_parameters():
    mesh, kernel = make_mesh(**TWO_AXES), KERNELS["mid"]
    params = {"w": kernel, "inner": {"w": kernel}, "stack": {"inner": {"w": kernel}}}
    specs = {"w": P("fsdp"), "inner": {"w": P("tensor")}, "stack": {"inner": {"w": P()}}}
    placed = shardings(mesh, specs)
    assert dm.state_shardings(dm.momentum(0.9), params, placed).momentum == placed


@pytest.mark.deep
def test_none_in_the_place_of_a_leaf_has_no_sharding():
    """As in modules whose activation function is a leaf that has been taken out."""
    mesh, tx = make_mesh(**TWO_AXES), dm.momentum(0.9)
    params = {"layer": {"w": KERNELS["stem"], "activation": None}, "copied": KERNELS["mid"]}
    placed = {"layer": {"w": NamedSharding(mesh, P("fsdp")), "activation": None}}
    placed["copied"] = NamedSharding(mesh, P())
    on_devices = jax.device_put(params, placed)
    of_state = dm.state_shardings(tx, params, placed)
    assert of_state == dm.state_shardings(tx, on_devices)
    assert [sharding.spec for sharding in jax.tree.leaves(of_state.momentum)] == [P(), P("fsdp")]
    assert_placed(jax.jit(tx.init, out_shardings=of_state)(on_devices), of_state)
    lmo = dm.newton_schulz_lmo()
    owned = dm.on_mesh(lmo, shardings=placed, layout="owner")
    updates, expected = (jax.jit(of.update)(on_devices, of.init(params))[0] for of in (owned, lmo))
    assert_close(updates, expected, rounding=1e-5)
    assert len(dm.sharding.plan_layouts(params, shardings=placed)) == 2


def test_another_mesh_than_the_one_that_is_set_is_an_error():
    tx = dm.on_mesh(dm.newton_schulz_lmo(), make_mesh(fsdp=8))
    with (
        jax.set_mesh(make_mesh(**TWO_AXES)),
        pytest.raises(ValueError, match=r"given the mesh \{'fsdp': 8\}.*'tensor': 2"),
    ):
        jax.jit(tx.update)(KERNELS, tx.init(KERNELS))


@pytest.mark.deep
def test_the_example_of_the_documentation_shards_and_learns():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "meshes_and_pods.md").read_text()
    code = re.findall(r"^```python\n(.+?)^```", page, re.M | re.S)[0]
    names: dict[str, Any] = {}
    exec(compile(code, "meshes_and_pods.md", "exec"), names)
    assert names["losses"][-1] < 0.7 * names["losses"][0]
    assert names["mesh"].size == jax.device_count() == 8
    assert_placed((names["params"], names["opt_state"]), (names["shardings"], names["placed"]))
    assert names["params"]["up"].sharding.spec == P("fsdp", None)
    (_, momentum), *_ = optax.tree.get_all_with_path(names["opt_state"], "MomentumState")
    assert momentum.momentum["down"].sharding.spec == P(None, "fsdp")
