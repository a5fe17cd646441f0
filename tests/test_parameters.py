"""What is no trainable floating-point array is an error at every entrance, and says the cure."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dropmuon_jax as dm

PARAMS = {"stem": jnp.eye(3), "head": jnp.eye(3)}
LAYERS = dm.layers_by_path(PARAMS, ["stem", "head"])
RADII = {"hidden": 1.0, "head": 1.0}
SAMPLER = dm.DepthSampler(LAYERS, dm.time_aware_depth([2.0, 1.0]), seed=0)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


# Everywhere parameters enter: functions of a tree.
ENTRANCES = {
    "layers_by_path": lambda tree: dm.layers_by_path(tree, ["stem", "head"]),
    "trace_layers": lambda tree: dm.trace_layers(lambda p: 0.0, tree),
    "scion_init": lambda tree: dm.optimizers.scion_init(jax.random.key(0), tree, RADII),
    "check_optimizer": lambda tree: dm.check_optimizer(optax.sgd(0.1), tree),
} | {
    name: tx.init
    for name, tx in {
        "muon": dm.muon(0.1),
        "drop_muon": dm.drop_muon(0.1, LAYERS),
        "scion": dm.scion(0.1, RADII),
        "drop_scion": dm.drop_scion(0.1, LAYERS, RADII),
        "gluon": dm.gluon(0.1),
        "drop_gluon": dm.drop_gluon(0.1, LAYERS),
        "momentum": dm.momentum(0.9),
        "mvr_momentum": dm.mvr_momentum(0.9),
        "mars_momentum": dm.transforms.mars_momentum(0.9),
        "newton_schulz_lmo": dm.newton_schulz_lmo(),
        "norm_lmo": dm.norm_lmo(dm.norms.sign_norm()),
        "norm_sharp": dm.transforms.norm_sharp(dm.norms.sign_norm()),
        "keep_prev_params": dm.transforms.keep_prev_params(),
        "chain_subtrees": dm.chain_subtrees({"all": optax.adam(0.1)}, lambda p: "all"),
        "per_layer": dm.per_layer(optax.adam(0.1), LAYERS),
        "layer_mask_sampler": dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=0),
        "track_smoothness": dm.planning.track_smoothness(dm.norms.sign_norm()),
        "record_gains": dm.record_gains(optax.sgd(0.1), SAMPLER),
    }.items()
}

STATE = "keep them beside the parameters"
EQUINOX = "eqx.filter(model, eqx.is_inexact_array)"
NNX = "nnx.state(module, nnx.Param)"

# What may be in the place of `stem`, what the message calls it, and the cure it names.
LEAVES: dict[str, tuple[Any, str, str]] = {
    "an integer table": (jnp.arange(3), "'stem' is an array of int32", STATE),
    "a NumPy mask": (np.ones(3, bool), "'stem' is an array of bool", STATE),
    "a count": (7, "'stem' is 7", STATE),
    "a key": (jax.random.key(0), "'stem' is an array of key<fry>", STATE),
    "a raw key": (jax.random.PRNGKey(0), "'stem' is an array of uint32", STATE),
    "a Python float": (1.5, "'stem' is 1.5", "Make it an array, jnp.asarray(1.5)"),
    "complex weights": (jnp.ones(2, jnp.complex64), "is an array of complex64", "real and imagin"),
    "a function": (jax.nn.relu, "'stem' is a", EQUINOX),
    "a name": ("gelu", "'stem' is 'gelu'", STATE),
}


def check(entrance, tree, *words):
    with pytest.raises(TypeError, match="(?s)params.*" + ".*".join(map(re.escape, words))):
        ENTRANCES[entrance](tree)


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_leaf_that_is_not_trained_is_named_with_its_cure(entrance):
    for leaf, kind, cure in LEAVES.values():
        check(entrance, {"stem": leaf, "head": jnp.eye(3)}, kind, cure)


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_module_or_its_whole_state_in_the_place_of_its_parameters_is_named(entrance):
    net = Net(nnx.Rngs(0))
    check(entrance, net, "holds the nnx.Module Net", NNX)
    check(entrance, {"net": net}, "holds the nnx.Module Net", NNX)
    whole = nnx.state(net)
    statistics = nnx.state(net, (nnx.Param, nnx.BatchStat))
    check(entrance, whole, "'drop/rngs/count' is an nnx.RngCount, no parameter", NNX)
    check(entrance, statistics, "'norm/mean' is an nnx.BatchStat, no parameter", NNX)


def test_a_tree_like_an_equinox_model_is_named_with_its_filter():
    # An Equinox module is a pytree whose leaves are arrays, functions and numbers.
    model = [{"weight": jnp.ones((3, 4)), "bias": None}, jax.nn.relu, {"weight": jnp.ones((1, 3))}]
    for call in (
        lambda: dm.layers_by_path(model, ["0", "1", "2"]),
        lambda: dm.muon(0.1, dimension_numbers="out_in").init(model),
    ):
        with pytest.raises(TypeError, match=r"leaf '1' is a .*eqx\.filter\(model, eqx\.is_inexact"):
            call()
    # What the filter leaves has None in their places, which are no leaves.
    filtered = [model[0], None, model[2]]
    assert dm.layers_by_path(filtered, ["0", "2"]).num_layers == 2
    dm.muon(0.1, dimension_numbers="out_in").init(filtered)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_floating_point_arrays_of_every_kind_are_parameters(dtype):
    for make in (jnp.ones, np.ones, jax.ShapeDtypeStruct):
        assert dm.layers_by_path({"w": make((2, 2), dtype)}, ["w"]).num_layers == 1


def test_parameters_of_nnx_are_parameters_alone():
    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    layers = dm.layers_by_path(params, ["stem", "norm"])
    state = dm.drop_muon(0.1, layers).init(params)
    assert optax.tree.get(state, "momentum")["stem"]["kernel"].shape == (3, 3)
