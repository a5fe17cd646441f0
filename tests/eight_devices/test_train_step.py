"""`train_step` on eight devices: one program for each depth, and what one device computes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_close, make_mesh, normal, on, shardings

import dropmuon_jax as dm

STEPS, NUM_ROWS, WIDTH = 8, 4, 16
SHAPES = {
    "blocks": {"up": (NUM_ROWS, WIDTH, 2 * WIDTH), "down": (NUM_ROWS, 2 * WIDTH, WIDTH)},
    "stem": {"kernel": (8, WIDTH), "bias": (WIDTH,)},
    "mid": {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)},
    "head": {"kernel": (WIDTH, 8), "bias": (8,)},
}
SPECS = {
    "blocks": {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")},
    "stem": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
    "mid": {"kernel": P("tensor", "fsdp"), "bias": P()},
    "head": {"kernel": P(("fsdp", "tensor")), "bias": P()},
}
BATCH = normal((16, 8), seed=1).astype(float)
PATTERNS = {"flat": ["stem", "mid", "head"], "stacked": ["stem", dm.stacked("blocks"), "head"]}


@pytest.fixture(autouse=True)
def float64():
    """So that another order of sums, which orthogonalizing magnifies, does not show."""
    with jax.enable_x64(True):
        yield


class Compilations:
    """Counts how many programs of a training step XLA compiles."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, name: str, *_: Any, fun_name: str = "", **__: Any) -> None:
        is_compilation = name == "/jax/core/compile/backend_compile_duration"
        self.count += is_compilation and fun_name == "jit(_train_step)"


COMPILATIONS = Compilations()


class Parts:
    """What a training step is made of, on one device or on a mesh."""

    def __init__(self, network: str, momentum: str) -> None:
        names = ("stem", "blocks" if network == "stacked" else "mid", "head")
        shapes = {name: SHAPES[name] for name in names}
        self.params = jax.tree.map(lambda x: x.astype(float) / 4, normal(shapes))
        self.specs = {name: SPECS[name] for name in names}
        self.layers = dm.layers_by_path(self.params, PATTERNS[network])
        self.sampler = dm.DepthSampler(self.layers, dm.uniform_depth(), seed=2)
        momenta = {"ema": dm.momentum(0.9), "mvr": dm.mvr_momentum(0.9)}
        self.optimizer = dm.drop_muon(0.05, self.layers, momentum=momenta[momentum])
        self.depths = [self.sampler.depth(step) for step in range(STEPS)]

    def loss(self, params: Any, batch: Any, depth: Any = 0) -> jax.Array:
        # On explicit axes JAX asks how a product of sharded factors is to be sharded.
        kinds = jax.typeof(params["head"]["kernel"]).sharding.mesh.axis_types or ()
        is_explicit = AxisType.Explicit in kinds
        product = functools.partial(jnp.matmul, out_sharding=P() if is_explicit else None)

        def block(x: jax.Array, row: Any) -> tuple[jax.Array, None]:
            return x + product(jnp.tanh(product(x, row["up"])), row["down"]), None

        x = product(batch, params["stem"]["kernel"]) + params["stem"]["bias"]
        if "blocks" in params:
            depth = self.layers.stack_depth(depth)
            x, _ = dm.scan_layers(block, jnp.tanh(x), params["blocks"], depth=depth)
        else:
            x = product(jnp.tanh(x), params["mid"]["kernel"]) + params["mid"]["bias"]
        x = product(jnp.tanh(x), params["head"]["kernel"]) + params["head"]["bias"]
        return jnp.mean((x - jnp.sin(batch)) ** 2)


def train(step_fn: Any, params: Any, opt_state: Any, batch: Any) -> Any:
    """Parameters, state and losses after all steps."""
    losses = []
    for step in range(STEPS):
        params, opt_state, loss = step_fn(step, params, opt_state, batch)
        losses.append(loss)
    return params, opt_state, losses


@functools.cache
def on_one_device(network: str, momentum: str) -> Any:
    parts = Parts(network, momentum)
    step_fn = dm.train_step(parts.loss, parts.optimizer, parts.sampler)
    return train(step_fn, parts.params, parts.optimizer.init(parts.params), BATCH)


CASES = {
    "shardings known": ("flat", "mvr", False, False),
    "mesh set": ("flat", "ema", None, True),
    "explicit axes": ("flat", "ema", True, True),
    "stacked": ("stacked", "ema", False, False),
    "stacked, compiled before": ("stacked", "ema", False, True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_depth_is_compiled_once_keeps_its_shardings_and_equals_one_device(case):
    network, momentum, explicit, is_compiled_before = case
    parts, mesh = Parts(network, momentum), make_mesh(bool(explicit), fsdp=4, tensor=2)
    placed = shardings(mesh, parts.specs)
    optimizer = parts.optimizer
    if explicit is False:
        optimizer = dm.on_mesh(optimizer, shardings=placed)
    of_state = dm.state_shardings(optimizer, parts.params, placed)
    with on(None if explicit is False else mesh):
        batch = jax.device_put(BATCH, NamedSharding(mesh, P() if explicit else P("fsdp")))
        step_fn = dm.train_step(
            parts.loss, optimizer, parts.sampler, out_shardings=(placed, of_state)
        )
        params = jax.tree.map(jax.device_put, parts.params, placed)
        opt_state = jax.jit(optimizer.init, out_shardings=of_state)(params)
        before = COMPILATIONS.count
        if is_compiled_before:
            step_fn.compile(*jax.tree.map(as_shape, (params, opt_state)), batch)
        num_compiled = COMPILATIONS.count - before
        first = jax.tree.leaves((params, opt_state))
        result = train(step_fn, params, opt_state, batch)
        jax.block_until_ready(result)
    num_programs = 1 if network == "stacked" else 3
    assert len(set(parts.depths)) >= 3
    assert num_compiled == (num_programs if is_compiled_before else 0)
    assert COMPILATIONS.count - before == num_programs
    assert all(x.is_deleted() for x in first)  # their memory holds the new ones
    for x, sharding in zip(
        jax.tree.leaves(result[:2]), jax.tree.leaves((placed, of_state)), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert_close(result, on_one_device(network, momentum), rounding=1e-11)


def as_shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def test_arrays_of_the_host_are_put_where_the_shardings_say():
    parts, mesh = Parts("flat", "ema"), make_mesh(fsdp=4, tensor=2)
    placed = shardings(mesh, parts.specs)
    of_state = dm.state_shardings(parts.optimizer, parts.params, placed)
    optimizer = dm.on_mesh(parts.optimizer, shardings=placed)
    step_fn = dm.train_step(parts.loss, optimizer, parts.sampler, out_shardings=(placed, of_state))
    opt_state = optimizer.init(parts.params)
    before = COMPILATIONS.count
    result = train(step_fn, parts.params, opt_state, BATCH)
    assert COMPILATIONS.count - before == 3
    assert_close(result, on_one_device("flat", "ema"), rounding=1e-11)
