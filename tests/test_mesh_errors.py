"""Bad input about meshes: named, with the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dropmuon_jax as dm

PARAMS = {"stem": jnp.ones((4, 3)), "head": jnp.ones((3, 2))}
LAYERS = dm.layers_by_path(PARAMS, ["stem", "head"])
MESH = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
OTHER = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
LMO = dm.newton_schulz_lmo()


def placed(**specs: P) -> dict[str, NamedSharding]:
    return {name: NamedSharding(MESH, spec) for name, spec in specs.items()}


BOTH = placed(stem=P(), head=P())
ERRORS = {
    "no transformation": (
        lambda: dm.on_mesh(0.1, MESH),
        TypeError,
        "transformation",
    ),
    "an unknown layout": (
        lambda: dm.on_mesh(LMO, MESH, layout="owners"),
        ValueError,
        r"layout.*owners.*Did you mean 'owner'",
    ),
    "no flops": (
        lambda: dm.on_mesh(LMO, MESH, flops_per_byte=0.0),
        ValueError,
        "flops_per_byte must be positive",
    ),
    "a mesh by name": (
        lambda: dm.on_mesh(LMO, "fsdp"),
        TypeError,
        r"mesh must be a jax.sharding.Mesh, got 'fsdp'.*shardings=",
    ),
    "shardings in the place of the mesh": (
        lambda: dm.on_mesh(LMO, BOTH),
        TypeError,
        "mesh must be a jax.sharding.Mesh, got a dict.*shardings=",
    ),
    "shardings on another mesh": (
        lambda: dm.on_mesh(LMO, OTHER, shardings=BOTH),
        ValueError,
        r"on one mesh, \{'tensor': 1\}, and 'head' is on \{'fsdp': 1\}",
    ),
    "specs without a mesh": (
        lambda: dm.on_mesh(LMO, shardings={"stem": P("fsdp"), "head": P()}),
        TypeError,
        r"NamedSharding.*at 'stem'|NamedSharding.*at 'head'",
    ),
    "an empty tree": (lambda: dm.on_mesh(LMO, shardings={}), TypeError, "got no leaf"),
    "shardings on two meshes": (
        lambda: dm.on_mesh(LMO, shardings={"a": BOTH["stem"], "b": NamedSharding(OTHER, P())}),
        ValueError,
        r"one mesh.*'fsdp'.*'b' is on .*'tensor'",
    ),
    "a leaf without a sharding": (
        lambda: dm.on_mesh(LMO, shardings=placed(stem=P())).init(PARAMS),
        ValueError,
        r"no sharding for leaf 'head': it knows stem.*jax.tree.map\(lambda x: x.sharding",
    ),
    "a sharding without a leaf": (
        lambda: dm.on_mesh(LMO, shardings=BOTH | placed(tail=P())).init(PARAMS),
        ValueError,
        "sharding for 'tail', and the parameters have no such leaf",
    ),
    "a sharding of more axes than the leaf": (
        lambda: dm.on_mesh(LMO, shardings=placed(stem=P(None, None, "fsdp"), head=P())).init(
            PARAMS
        ),
        ValueError,
        r"'fsdp'.* for leaf 'stem', of shape \(4, 3\)",
    ),
    "parameters that are on no mesh": (
        lambda: dm.state_shardings(dm.momentum(0.9), PARAMS),
        TypeError,
        r"The sharding of 'head' must be a NamedSharding.*jax.device_put\(params, shardings\)",
    ),
    "parameters that are shapes": (
        lambda: dm.state_shardings(dm.momentum(0.9), jax.eval_shape(lambda: PARAMS)),
        TypeError,
        "give shardings",
    ),
    "shardings of another tree": (
        lambda: dm.state_shardings(dm.momentum(0.9), PARAMS, placed(stem=P())),
        ValueError,
        r"shardings has 1 leaves and the parameters 2; they differ in \['head'\]",
    ),
    "a sharding that is missing": (
        lambda: dm.state_shardings(dm.momentum(0.9), PARAMS, BOTH | {"head": None}),
        ValueError,
        r"they differ in \['head'\]",
    ),
    "state of no transformation": (
        lambda: dm.state_shardings(0.1, PARAMS, BOTH),
        TypeError,
        "transformation",
    ),
    "a plan without a mesh": (
        lambda: dm.sharding.plan_layouts(PARAMS),
        TypeError,
        "mesh must be a jax.sharding.Mesh.*give mesh or shardings",
    ),
    "a plan with shardings in the place of the mesh": (
        lambda: dm.sharding.plan_layouts(PARAMS, BOTH),
        TypeError,
        "mesh must be a jax.sharding.Mesh, got a dict.*shardings=",
    ),
    "a plan of stacks without layers": (
        lambda: dm.sharding.plan_layouts({"blocks": jnp.ones((3, 4, 4))}, MESH),
        ValueError,
        r"'blocks', of shape \(3, 4, 4\)",
    ),
    "a plan with another mask": (
        lambda: dm.sharding.plan_layouts(PARAMS, MESH, layer_mask={"stem": True}),
        ValueError,
        "'head' is missing from the mask",
    ),
    "processes by a traced step": (
        lambda: dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=0).check_processes(jnp.int32(3)),
        TypeError,
        "step",
    ),
}


@pytest.mark.parametrize(("function", "exception", "words"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_named_with_the_way_out(function, exception, words):
    with pytest.raises(exception, match=words):
        function()


def test_part_of_a_tree_may_know_the_shardings_of_the_whole():
    """Inside chain_subtrees a transformation sees some leaves, and the shardings are of all."""
    tx = dm.chain_subtrees(
        {"matrix": dm.on_mesh(LMO, shardings=BOTH), "other": optax.identity()},
        {"stem": "matrix", "head": "other"},
    )
    updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS))
    np.testing.assert_array_equal(updates["head"], PARAMS["head"])


def test_a_mesh_of_any_size_can_be_planned_for():
    (plan, _) = dm.sharding.plan_layouts(PARAMS, AbstractMesh((1024,), ("fsdp",)))
    assert plan.num_matrices == 1
