"""Stacked layers on a mesh: training by static and by traced depths, as on one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import assert_close, collectives, make_mesh, normal, on, shardings

import dropmuon_jax as dm

NUM_ROWS, WIDTH = 8, 16
SHAPES = {
    "blocks": {
        "query": (NUM_ROWS, WIDTH, WIDTH),
        "out": (NUM_ROWS, WIDTH, WIDTH),
        "wide": (NUM_ROWS, WIDTH, 2 * WIDTH),
        "narrow": (NUM_ROWS, 2 * WIDTH, WIDTH),
        "scale": (NUM_ROWS, WIDTH),
    },
    "head": (WIDTH, 24),
}
SPECS = {
    "sides": {
        "blocks": {
            "query": P(None, "fsdp", "tensor"),
            "out": P(None, "tensor", "fsdp"),
            "wide": P(None, "fsdp", "tensor"),
            "narrow": P(None, "tensor", "fsdp"),
            "scale": P(),
        },
        "head": P("fsdp"),
    },
    "rows": {"blocks": dict.fromkeys(SHAPES["blocks"], P(("fsdp", "tensor"))), "head": P("fsdp")},
}
PARAMS = jax.tree.map(lambda x: x.astype(float) / 4, normal(SHAPES))
BATCH = normal((8, WIDTH), seed=1).astype(float)
LAYERS = dm.layers_by_path(PARAMS, [dm.stacked("blocks"), "head"])


@pytest.fixture(autouse=True)
def float64():
    """So that another order of sums, which orthogonalizing magnifies, does not show."""
    with jax.enable_x64(True):
        yield


def loss_fn(params: Any, batch: Any, depth: Any) -> jax.Array:
    # On explicit axes JAX asks how a product of sharded factors is to be sharded.
    is_explicit = AxisType.Explicit in (jax.typeof(params["head"]).sharding.mesh.axis_types or ())
    product = functools.partial(jnp.matmul, out_sharding=P() if is_explicit else None)

    def block(x: jax.Array, row: Any) -> tuple[jax.Array, None]:
        x = x + product(jnp.tanh(product(x, row["query"])), row["out"]) * row["scale"]
        return x + product(jnp.tanh(product(x, row["wide"])), row["narrow"]), None

    depth = LAYERS.stack_depth(depth)
    x, _ = dm.scan_layers(block, batch, params["blocks"], depth=depth)
    return jnp.mean(product(x, params["head"]) ** 2)


MOMENTA = {"momentum": dm.momentum, "mvr": dm.mvr_momentum}


def optimizer(momentum: str) -> Any:
    return dm.drop_muon(
        0.05,
        LAYERS,
        momentum=MOMENTA[momentum](decay=0.8),
        orthogonalize=dm.orthogonalize.newton_schulz(num_steps=3),
    )


def train(tx: Any, depths: list[int], mesh: Any, specs: Any, *, traced: bool, mvr: bool) -> Any:
    """The losses and the parameters after a step at each depth."""

    traces = []

    def step(params: Any, state: Any, batch: Any, depth: Any) -> Any:
        traces.append(depth)
        mask = LAYERS.mask(depth)
        loss, grads = dm.masked_value_and_grad(loss_fn)(params, batch, depth, layer_mask=mask)
        second = {}
        if mvr:
            second["prev_params_grads"] = dm.masked_value_and_grad(loss_fn)(
                dm.prev_params(state, params), batch, depth, layer_mask=mask
            )[1]
        updates, state = tx.update(grads, state, params, layer_mask=mask, **second)
        return optax.apply_updates(params, updates), state, loss

    with on(mesh):
        params, batch, out_shardings = PARAMS, BATCH, None
        if specs is not None:
            placed = shardings(mesh, specs)
            params = jax.tree.map(jax.device_put, params, placed)
            state_placed = dm.state_shardings(tx, params)
            out_shardings = (placed, state_placed, None)
        jitted = jax.jit(step, static_argnums=() if traced else 3, out_shardings=out_shardings)
        state, losses = tx.init(params), []
        for depth in depths:
            depth = jnp.asarray(depth) if traced else depth
            params, state, loss = jitted(params, state, batch, depth)
            losses.append(float(loss))
    assert len(traces) == (1 if traced else len(depths))
    return losses, params


@functools.cache
def on_one_device(momentum: str, depths: tuple[int, ...]) -> Any:
    mvr = momentum == "mvr"
    return train(optimizer(momentum), list(depths), None, None, traced=False, mvr=mvr)


CASES = {
    "static, configured": ("sides", False, False, "momentum"),
    "static, explicit": ("sides", False, True, "momentum"),
    "traced, configured": ("sides", True, False, "mvr"),
    "traced, mesh set": ("sides", True, None, "momentum"),
    "traced, explicit": ("sides", True, True, "momentum"),
    "rows, traced": ("rows", True, False, "mvr"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_gives_the_losses_and_parameters_of_one_device(case):
    specs, traced, explicit, momentum = case
    mesh = make_mesh(bool(explicit), fsdp=4, tensor=2)
    tx = optimizer(momentum)
    if explicit is False:
        tx = dm.on_mesh(tx, shardings=shardings(mesh, SPECS[specs]))
    # Rows 5, 6 and 7 are not a whole number of groups, and depth 8 is the head alone.
    depths = (5, 0, 8) if traced else (5, 0)
    result = train(tx, list(depths), mesh, SPECS[specs], traced=traced, mvr=momentum == "mvr")
    assert_close(result, on_one_device(momentum, depths), rounding=1e-11)


@pytest.mark.parametrize("explicit", [False, True, None])
def test_layers_that_are_not_stacked_have_a_traced_flag_too(explicit):
    """A momentum that is kept, and an update of zero, beside a stack and by themselves."""
    params = {"blocks": PARAMS["blocks"]["query"], "head": PARAMS["head"]}
    layers = dm.layers_by_path(params, [dm.stacked("blocks"), "head"])
    lmo = dm.newton_schulz_lmo(num_steps=3)
    tx = dm.per_layer(optax.chain(dm.momentum(0.9), lmo), layers, takes_mask=True)
    mesh = make_mesh(bool(explicit), fsdp=4, tensor=2)
    sides = P(None, "fsdp", "tensor")
    placed = shardings(mesh, {"blocks": sides, "head": P("fsdp", "tensor")})
    known = dm.on_mesh(tx, shardings=placed) if explicit is False else tx

    def update(tx: Any, params: Any, head: Any, stack: Any) -> Any:
        mask = {"blocks": stack, "head": head}
        return tx.update(params, tx.init(params), params, layer_mask=mask)

    flags = [
        (True, np.arange(NUM_ROWS) >= 5),
        (True, np.zeros(NUM_ROWS, bool)),
        (False, np.arange(NUM_ROWS) == 2),
    ]
    on_one = jax.jit(functools.partial(update, tx))
    on_eight = jax.jit(functools.partial(update, known))
    for head, stack in flags:
        head, stack = jnp.asarray(head), jnp.asarray(stack)
        expected = on_one(params, head, stack)
        with jax.set_mesh(mesh):
            result = on_eight(jax.tree.map(jax.device_put, params, placed), head, stack)
        assert_close(result, expected, rounding=1e-11)


def exchanges(specs: str, depth: int) -> Any:
    """The collectives of the blocks' update alone."""
    mesh = make_mesh(fsdp=4, tensor=2)
    params = {"blocks": PARAMS["blocks"]}
    layers = dm.layers_by_path(params, [dm.stacked("blocks")])
    placed = shardings(mesh, {"blocks": SPECS[specs]["blocks"]})
    lmo = dm.chain_subtrees(
        {"matrix": dm.newton_schulz_lmo(), "other": dm.norm_lmo(dm.norms.sign_norm())},
        dm.matrix_labels(layers.row_shapes(params)),
    )
    tx = dm.on_mesh(dm.per_layer(lmo, layers, takes_mask=True), shardings=placed)

    def step(params: Any) -> Any:
        updates, _ = tx.update(params, tx.init(params), params, layer_mask=layers.mask(depth))
        return updates

    params = jax.tree.map(jax.device_put, params, placed)
    return collectives(jax.jit(step, out_shardings=placed).lower(params).compile())


def test_rows_that_devices_have_are_not_moved():
    assert not exchanges("rows", 0)
    assert not exchanges("rows", 5)


def test_all_active_rows_of_a_shape_move_at_once():
    # Two shapes, there and back.
    assert exchanges("sides", 0) == exchanges("sides", 3) == {"all-to-all": 4}
