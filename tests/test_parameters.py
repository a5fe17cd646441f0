"""What is no trainable floating-point array is an error at every entrance, and says the cure."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

import dropmuon_jax as dm

PARAMS = {"stem": jnp.eye(3), "head": jnp.eye(3)}
LAYERS = dm.layers_by_path(PARAMS, ["stem", "head"])
WITHOUT_HEAD = dm.Roles(has_head=False)
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
    "matrix_labels": dm.matrix_labels,
    "table": WITHOUT_HEAD.table,
    "plan_layouts": lambda tree: dm.sharding.plan_layouts(tree, AbstractMesh((2,), ("x",))),
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
NNX = "nnx.state(module, nnx.Param)"

NET = Net(nnx.Rngs(0))
PURE = nnx.to_pure_dict(nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0))))  # which has lost its types
STATISTICS = {"BatchNorm_0": {"mean": jnp.ones(3), "var": jnp.ones(3)}}
VARIABLES = {"params": PARAMS, "batch_stats": STATISTICS}
EQUINOX = eqx.filter(eqx.nn.BatchNorm(3, "batch", mode="batch"), eqx.is_inexact_array)

# What may be in the place of `stem`, what the message calls it, and the cure it names.
BAD_LEAVES: list[tuple[Any, str, str]] = [
    (jnp.arange(3), "'stem' is an array of int32", STATE),
    (np.ones(3, bool), "'stem' is an array of bool", STATE),
    (7, "'stem' is 7", STATE),
    (jax.random.key(0), "'stem' is an array of key<fry>", STATE),
    (jax.random.PRNGKey(0), "'stem' is an array of uint32", STATE),
    (1.5, "'stem' is 1.5", "Make it an array, jnp.asarray(1.5)"),
    (jnp.ones(2, jnp.complex64), "'stem' is an array of complex64", "real and imaginary part"),
    (jax.nn.relu, "'stem' is a", "eqx.filter(model, eqx.is_inexact_array)"),
    ("gelu", "'stem' is 'gelu'", STATE),
    (NET, "holds the nnx.Module Net", NNX),
]
# The same of what may be in the place of the whole tree.
BAD_TREES: list[tuple[Any, str, str]] = [
    (NET, "holds the nnx.Module Net", NNX),
    (nnx.state(NET), "'drop/rngs/count' is an nnx.RngCount, no parameter", NNX),
    (nnx.state(NET, (nnx.Param, nnx.BatchStat)), "'norm/mean' is an nnx.BatchStat", NNX),
    (
        {"params": PARAMS, "batch_stats": {"mean": jnp.zeros(3)}},
        *("holds 'batch_stats' beside 'params'", "variables['params']"),
    ),
    # The same below the root, and statistics that nothing but their names tells.
    ([VARIABLES], "holds 'batch_stats' beside 'params'", "variables['params']"),
    ({"encoder": VARIABLES}, "holds 'batch_stats' beside 'params'", "variables['params']"),
    (PURE, "'mean' is a running statistic", NNX),
    ((PARAMS, STATISTICS), "'1/BatchNorm_0/mean' is a running", "['params']"),
    ({"batch_stats": {"norm": {"mean": jnp.ones(3)}}}, "'batch_stats/norm/mean'", "['params']"),
    (
        {"bn/moving_mean": jnp.ones(3), **PARAMS},
        "'bn/moving_mean' is a running",
        "trainable_variables",
    ),
    ({"norm": EQUINOX}, "'norm/batch_state_index' is a running", "eqx.nn.make_with_state"),
]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_what_is_not_trained_is_named_with_its_cure(entrance):
    trees = [({"stem": leaf, "head": jnp.eye(3)}, *words) for leaf, *words in BAD_LEAVES]
    for tree, kind, cure in trees + BAD_TREES:
        words = ".*".join(map(re.escape, (kind, cure)))
        with pytest.raises(TypeError, match=f"(?s)params.*{words}"):
            ENTRANCES[entrance](tree)


def test_what_is_called_as_statistics_are_but_is_trained_passes():
    gaussian = {"mean": {"kernel": jnp.eye(3)}, "var": jnp.ones(3), "prior": {"mean": jnp.ones(3)}}
    dm.muon(0.1).init({"actor": {"params": gaussian}, "critic": {"params": PARAMS}})
    delivered = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")[0]
    dm.muon(0.1).init(eqx.filter({"norm": delivered, **PARAMS}, eqx.is_inexact_array))


def test_none_in_the_place_of_what_a_filter_takes_out_is_no_leaf():
    filtered = [{"weight": jnp.ones((3, 4)), "bias": None}, None, {"weight": jnp.ones((1, 3))}]
    assert dm.layers_by_path(filtered, ["0", "2"]).num_layers == 2
    dm.muon(0.1, dimension_numbers="out_in").init(filtered)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_floating_point_arrays_of_every_kind_are_parameters(dtype):
    for make in (jnp.ones, np.ones, jax.ShapeDtypeStruct):
        assert dm.layers_by_path({"w": make((2, 2), dtype)}, ["w"]).num_layers == 1


# --- The way out for complex leaves ---------------------------------------------------------------

KEYS = jax.random.split(jax.random.key(0))
COMPLEX = {
    "stem": {"kernel": jax.random.normal(KEYS[0], (3, 4), jnp.complex64), "bias": 1j * np.ones(4)},
    "mid": {"kernel": jnp.eye(4)},
    "head": {"kernel": jax.random.normal(KEYS[1], (4, 2), jnp.complex64)},
}
SPLIT = dm.layers.split_complex(COMPLEX)
OF_COMPLEX = dm.layers_by_path(SPLIT, [*COMPLEX])


def distance(params, x):
    of = dm.layers.join_complex(params)
    hidden = jnp.tanh(x @ of["stem"]["kernel"] + of["stem"]["bias"]) @ of["mid"]["kernel"]
    return jnp.mean(jnp.abs(hidden @ of["head"]["kernel"] - (1 - 2j)) ** 2)


@pytest.mark.parametrize(
    "optimizer",
    [
        dm.drop_muon(0.05, OF_COMPLEX),
        dm.drop_muon(0.05, OF_COMPLEX, momentum=dm.mvr_momentum(0.9)),
        dm.drop_scion(0.03, OF_COMPLEX, dict.fromkeys(dm.layers.ROLES, 3.0), constrained=False),
        dm.drop_gluon(0.03, OF_COMPLEX, dict.fromkeys(dm.layers.ROLES, 3.0)),
        dm.per_layer(optax.adam(0.05), OF_COMPLEX),
    ],
    ids=["drop_muon", "mvr", "drop_scion", "drop_gluon", "per_layer"],
)
def test_complex_leaves_train_by_their_parts(optimizer):
    params, x = SPLIT, jnp.eye(3)
    sampler = dm.DepthSampler(OF_COMPLEX, dm.uniform_depth(), seed=0)
    step_fn = dm.train_step(distance, optimizer, sampler, donate=False)
    state, losses = optimizer.init(params), []
    for step in range(40):
        params, state, loss = step_fn(step, params, state, x)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    dm.check_state(optimizer, params, state, OF_COMPLEX)
    assert dm.trace_layers(distance, params, x, level=1).names == OF_COMPLEX.names
    joined = dm.layers.join_complex(params)
    assert jax.tree.structure(joined) == jax.tree.structure(COMPLEX)
    assert joined["stem"]["bias"].dtype == jnp.complex64


CONV = nnx.Conv(2, 3, (3, 3), param_dtype=jnp.complex64, rngs=nnx.Rngs(0))
CELL = eqx.nn.LSTMCell(2, 3, key=KEYS[0], dtype=jnp.complex64)
ATTENTION = {"query": {"kernel": np.ones((4, 2, 2)), "bias": np.ones((2, 2))}, "scale": np.eye(2)}


@pytest.mark.parametrize(
    "tree",
    [
        nnx.state(CONV, nnx.Param),
        eqx.filter(CELL, eqx.is_inexact_array),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.complex64), ATTENTION),
        {"wte": {"w": 1j * np.ones((9, 4))}, "Conv_0": {"kernel": 1j * np.ones((3, 3, 2, 4))}},
    ],
    ids=["nnx", "equinox", "shapes", "words"],
)
def test_both_parts_of_a_complex_leaf_have_its_role(tree):
    real = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)
    roles = jax.tree.leaves(WITHOUT_HEAD.labels(real))
    of_parts = jax.tree.leaves(WITHOUT_HEAD.labels(dm.layers.split_complex(tree)))
    assert of_parts == [role for role in roles for _ in ("real", "imaginary")]


def test_a_wrapper_that_splits_and_loses_the_mask_says_so():
    split = optax.contrib.split_real_and_imaginary
    with pytest.raises(TypeError, match=r"'head/kernel' was split by.*dm\.layers\.split_complex"):
        split(dm.drop_muon(0.1, OF_COMPLEX)).init(COMPLEX)
    optimizer = split(dm.muon(0.1))
    updates, _ = optimizer.update(COMPLEX, optimizer.init(COMPLEX), COMPLEX)
    assert updates["head"]["kernel"].dtype == jnp.complex64
    with pytest.raises(TypeError, match=r"'head/kernel' is an array of complex64.*split_complex"):
        dm.masked_value_and_grad(distance)(COMPLEX, jnp.eye(3), layer_mask=None)
