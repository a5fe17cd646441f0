"""`train_step` on eight devices: each depth is compiled once, and is what one device computes."""

import functools
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dropmuon_jax as dm
from meshes import (
    COMPILED_STEPS,
    Network,
    assert_close,
    assert_placed,
    graded,
    make_mesh,
    on,
    shardings,
)

STEPS = 8
TWO_AXES = {"fsdp": 4, "tensor": 2}
MOMENTA = {"ema": dm.momentum(0.9), "mvr": dm.mvr_momentum(0.9)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make_parts(network: str, momentum: str) -> Any:
    """A network, its optimizer and the sampler of its layers."""
    network = Network(is_stacked=network != "flat", axis=int(network == "stacked, axis 1"))
    optimizer = dm.drop_muon(
        0.05,
        network.layers,
        momentum=MOMENTA[momentum],
        orthogonalize=dm.orthogonalize.newton_schulz(num_steps=3),
    )
    return network, optimizer, dm.DepthSampler(network.layers, dm.uniform_depth(), seed=2)


def train(step_fn: Any, params: Any, opt_state: Any, batch: Any) -> Any:
    """Parameters, state and losses after all steps."""
    losses = []
    for step in range(STEPS):
        params, opt_state, loss = step_fn(step, params, opt_state, batch)
        losses.append(loss)
    return params, opt_state, losses


@functools.cache
def on_one_device(network: str, momentum: str) -> Any:
    parts, optimizer, sampler = make_parts(network, momentum)
    step_fn = dm.train_step(parts.loss, optimizer, sampler)
    return train(step_fn, parts.params, optimizer.init(parts.params), parts.batch())


CASES = {
    "shardings known": ("flat", "mvr", False, "arrays"),
    "mesh set": ("flat", "ema", None, "compiled before"),
    "explicit axes": ("flat", "ema", True, "compiled before"),
    "arrays of the host": ("flat", "ema", False, "of the host"),
    "stacked": ("stacked", "mvr", False, "arrays"),
    "stacked, mesh set": ("stacked", "ema", None, "compiled before"),
    "stacked, explicit axes": ("stacked", "ema", True, "arrays"),
    "stacked along axis 1": ("stacked, axis 1", "mvr", False, "arrays"),
    "stacked along axis 1, mesh set": ("stacked, axis 1", "ema", None, "arrays"),
    "stacked along axis 1, explicit axes": ("stacked, axis 1", "ema", True, "arrays"),
}


@pytest.mark.parametrize(
    ("network", "momentum", "explicit", "given"), graded(CASES, "explicit axes", "stacked")
)
def test_each_depth_is_compiled_once_keeps_its_shardings_and_equals_one_device(
    network, momentum, explicit, given
):
    parts, optimizer, sampler = make_parts(network, momentum)
    mesh = make_mesh(bool(explicit), **TWO_AXES)
    placed = shardings(mesh, parts.specs)
    of_state = dm.state_shardings(optimizer, parts.params, placed)
    tx = dm.on_mesh(optimizer, shardings=placed) if explicit is False else optimizer
    num_programs = 3 if network == "flat" else 1
    assert len({sampler.depth(step) for step in range(STEPS)}) >= 3
    with on(None if explicit is False else mesh):
        step_fn = dm.train_step(parts.loss, tx, sampler, out_shardings=(placed, of_state))
        params, opt_state, batch = parts.params, tx.init(parts.params), parts.batch()
        if given != "of the host":
            batch = jax.device_put(batch, NamedSharding(mesh, P() if explicit else P("fsdp")))
            params, opt_state = jax.device_put(params, placed), jax.device_put(opt_state, of_state)
        before = len(COMPILED_STEPS)
        if given == "compiled before":
            step_fn.compile(*jax.tree.map(as_shape, (params, opt_state)), batch)
            assert len(COMPILED_STEPS) - before == num_programs
        first = jax.tree.leaves((params, opt_state))
        result = train(step_fn, params, opt_state, batch)
        jax.block_until_ready(result)
    assert len(COMPILED_STEPS) - before == num_programs
    if given != "of the host":
        # Their memory holds the new ones, but for what no step has changed.
        kept = set(map(id, jax.tree.leaves(result[:2])))
        assert all(x.is_deleted() or id(x) in kept for x in first)
    assert_placed(result[:2], (placed, of_state))
    assert_close(result, on_one_device(network, momentum), rounding=1e-9)


def as_shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
