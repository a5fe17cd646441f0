"""Workers on devices: what they exchange is counted in the program, and is their payload."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dropmuon_jax as dm
from counting.collectives import read_traffic
from dropmuon_jax.compression import Identity, Natural, RandomDropout, RankK, ScaledSign, TopK
from meshes import assert_close, graded, make_mesh, normal

NUM_WORKERS = 4
SHAPES = {"stem": (12, 20), "blocks": (3, 16, 16), "head": (20, 10), "bias": (10,)}
PARAMS = normal(SHAPES)
LAYERS = dm.layers_by_path(PARAMS, ["stem", dm.stacked("blocks"), ("head", "bias")])
GRADS = normal({name: (NUM_WORKERS, *shape) for name, shape in SHAPES.items()}, seed=1)
COMPRESSORS = {
    "identity": Identity(),
    "natural": Natural(),
    "natural of 8 bits": Natural(8),
    "top_k": TopK(0.1),
    "top_k of natural": TopK(0.1, Natural()),
    "column_top_k": dm.compression.ColumnTopK(0.2),
    "rank_k": RankK(0.2),
    "rank_k warm": RankK(2, method="warm"),
    "rank_k of natural": RankK(0.2, Natural(8)),
    "scaled_sign": ScaledSign(),
    "damping": dm.compression.Damping(0.5),
    "random_dropout": RandomDropout(0.5, RankK(2)),
}
CORE = "rank_k of natural", "scaled_sign"


def optimizer(compressor: Any, workers: Any = NUM_WORKERS) -> Any:
    tx = dm.compression.drop_ef21_muon(0.1, LAYERS, compressor, seed=3)
    return dm.compression.on_workers(tx, workers)


def placed(mesh: Any, state: Any) -> Any:
    """The state where a run on the mesh has it: what is a worker's own on that worker."""
    specs = dm.compression.worker_specs(state)
    return jax.device_put(state, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def payload_bytes(compressor: Any, depth: int) -> int:
    mask = LAYERS.mask(depth)
    of = {"matrix": compressor, "other": Identity()}
    parts = {"matrix": ("stem", "blocks", "head"), "other": ("bias",)}
    bits = [
        dm.compression.payload_bits(
            of[label],
            {name: PARAMS[name] for name in names},
            {name: mask[name] for name in names},
            layers=LAYERS,
        )
        for label, names in parts.items()
    ]
    return sum(bits) // 8


@pytest.mark.parametrize("compressor", graded(COMPRESSORS, *CORE))
def test_a_step_exchanges_the_payloads_of_active_layers_and_nothing_else(compressor):
    """Counted in the program of each depth, whose steps are those of workers side by side."""
    mesh = make_mesh(workers=NUM_WORKERS)
    tx, beside = optimizer(compressor, mesh), optimizer(compressor)
    state, expected_state = placed(mesh, tx.init(PARAMS)), beside.init(PARAMS)
    grads = jax.device_put(GRADS, NamedSharding(mesh, P("workers")))
    for depth in (0, 2):
        step = jax.jit(functools.partial(tx.update, depth=depth))
        compiled = step.lower(grads, state, PARAMS).compile()
        numbers, received = read_traffic(compiled.as_text(), NUM_WORKERS)
        assert set(numbers) == {"all-gather"}
        assert received == (NUM_WORKERS - 1) * payload_bytes(compressor, depth)
        updates, state = compiled(grads, state, PARAMS)
        expected, expected_state = jax.jit(functools.partial(beside.update, depth=depth))(
            GRADS, expected_state, PARAMS
        )
        assert_close(updates, expected, rounding=2e-5)
        assert_close(state, expected_state, rounding=2e-5)


def loss(params: Any, batch: Any) -> Any:
    return sum(jnp.mean((batch @ params[n] - 1.0) ** 2) for n in ("wide", "tall"))


WEIGHTS = normal({"wide": (6, 20), "tall": (6, 5)})
BATCHES = normal((8, 5, 6), seed=4)


def test_in_a_shard_map_of_ones_own_weights_are_cast_to_varying_or_an_error_says_so():
    """Else the gradients arrive summed, by a dense exchange before anything is compressed."""
    mesh, tx = make_mesh(workers=8), dm.compression.ef21_muon(0.1, RankK(2), seed=3)

    def step(params, state, batch, is_cast):
        axis = "workers"
        local = jax.lax.pcast(params, axis, to="varying") if is_cast else params
        grads = jax.grad(loss)(local, batch[0])
        state = jax.tree.map(lambda x, spec: x[0] if spec == P(axis) else x, state, specs)
        updates, state = tx.update(grads, state, params)
        state = jax.tree.map(lambda x, spec: x[None] if spec == P(axis) else x, state, specs)
        return updates, state

    beside = dm.compression.on_workers(tx, 8)
    state = beside.init(WEIGHTS)
    specs = dm.compression.worker_specs(state)

    def on_mesh(is_cast: bool) -> Any:
        return jax.jit(
            jax.shard_map(
                functools.partial(step, is_cast=is_cast),
                mesh=mesh,
                in_specs=(P(), specs, P("workers")),
                out_specs=(P(), specs),
            )
        )

    with pytest.raises(ValueError, match=r"'tall' is the same for all 'workers'.*jax.lax.pcast"):
        on_mesh(is_cast=False)(WEIGHTS, state, BATCHES)
    compiled = on_mesh(is_cast=True).lower(WEIGHTS, placed(mesh, state), BATCHES).compile()
    numbers, received = read_traffic(compiled.as_text(), 8)
    assert set(numbers) == {"all-gather"}
    assert received == 7 * dm.compression.payload_bits(RankK(2), WEIGHTS) / 8
    updates, _ = compiled(
        WEIGHTS, placed(mesh, state), jax.device_put(BATCHES, NamedSharding(mesh, P("workers")))
    )
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(WEIGHTS, BATCHES)
    expected, _ = jax.jit(beside.update)(grads, state, WEIGHTS)
    assert_close(updates, expected, rounding=1e-4)


@pytest.mark.deep
def test_gradients_of_each_worker_by_vmap_are_taken_where_its_batch_is_without_an_exchange():
    mesh = make_mesh(workers=8)
    batches = jax.device_put(BATCHES, NamedSharding(mesh, P("workers")))
    weights = jax.device_put(WEIGHTS, NamedSharding(mesh, P()))
    grads_of = jax.jit(
        jax.vmap(jax.grad(loss), (None, 0)), out_shardings=NamedSharding(mesh, P("workers"))
    )
    compiled = grads_of.lower(weights, batches).compile()
    assert read_traffic(compiled.as_text(), 8)[0] == {}


@pytest.mark.deep
def test_narrow_numbers_are_widened_and_their_bits_are_not():
    """Why payloads travel as integers: what this backend makes of a collective of bfloat16."""
    mesh, x = make_mesh(workers=8), jnp.ones((8, 64), jnp.bfloat16)

    def received(function):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=P("workers"), out_specs=P("workers"))
        return read_traffic(jax.jit(mapped).lower(x).compile().as_text(), 8)[1]

    def of_bits(x):
        words = jax.lax.bitcast_convert_type(x[0], jnp.uint16)
        return jax.lax.all_gather(words, "workers")

    assert received(lambda x: jax.lax.all_gather(x[0], "workers")) == 7 * 64 * 4
    assert received(of_bits) == 7 * 64 * 2
    exchanged = jax.shard_map(
        lambda x: dm.compression.exchange.gather({"w": x[0]}, "workers")["w"],
        mesh=mesh,
        in_specs=P("workers"),
        out_specs=P(),
    )
    compiled = jax.jit(exchanged).lower(x).compile()
    assert read_traffic(compiled.as_text(), 8)[1] == 7 * 64 * 2
    assert compiled(jax.device_put(x, NamedSharding(mesh, P("workers")))).dtype == jnp.bfloat16


@pytest.mark.deep
def test_sums_of_narrow_integers_wrap_and_those_of_payloads_do_not():
    mesh, x = make_mesh(workers=8), jnp.full((8, 1), 100, jnp.int8)
    summed = jax.shard_map(
        lambda x: jax.lax.psum(x[0], "workers"), mesh=mesh, in_specs=P("workers"), out_specs=P()
    )
    assert jax.jit(summed)(x)[0] == 800 - 3 * 256
    tx = dm.compression.on_workers(dm.compression.ef21(Natural(8), momentum=0.0), mesh)
    params = {"w": jnp.zeros((1, 4))}
    grads = {"w": jnp.full((8, 1, 4), 128.0)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert (np.asarray(updates["w"]) == 128.0).all()


class LoudPlan(dm.privacy.PrivacyPlan):
    """Noise of standard deviation 1, whatever ε."""

    noise_multiplier = 1.0  # pyright: ignore[reportAssignmentType]


def test_every_worker_draws_noise_of_its_own_which_a_mean_reduces():
    """A replicated state alone would give all devices the same noise, which no mean reduces."""
    mesh, params = make_mesh(workers=8), {"w": jnp.zeros(4000)}
    plan = LoudPlan(8.0, 1e-5, rounds=2)
    tx = dm.privacy.norm_ec(1.0, 0.5, plan=plan, server_normalization=False, seed=1)
    tx = dm.compression.on_workers(tx, mesh)
    grads, update = {"w": jnp.zeros((8, 4000))}, jax.jit(tx.update)
    first, state = update(grads, tx.init(params), params)
    second, _ = update(grads, state, params)
    once, twice = np.asarray(first["w"]), np.asarray(second["w"])
    assert once.std() == pytest.approx(0.5 / np.sqrt(8), rel=0.05)
    assert twice.std() == pytest.approx(0.5 * np.sqrt(2 / 8), rel=0.05)
    assert not np.asarray(state.worker.estimate["w"]).any()  # what a client keeps has no noise


@pytest.mark.deep
def test_a_checkpoint_keeps_what_each_worker_has_of_its_own(tmp_path):
    mesh = make_mesh(workers=NUM_WORKERS)
    tx = optimizer(RankK(2, method="warm"), mesh)
    grads = jax.device_put(GRADS, NamedSharding(mesh, P("workers")))
    _, state = jax.jit(functools.partial(tx.update, depth=0))(
        grads, placed(mesh, tx.init(PARAMS)), PARAMS
    )
    own = [x for x in jax.tree.leaves(state) if "workers" in x.sharding.spec]
    assert own
    assert all(not np.array_equal(x[0], x[1]) for x in own if x.ndim > 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    assert_close(restored, state, rounding=0)


@pytest.mark.deep
def test_other_axes_of_the_mesh_are_left_to_xla():
    mesh = make_mesh(workers=2, tensor=2)
    tx = dm.compression.on_workers(dm.compression.ef21_muon(0.1, RankK(2), seed=3), mesh)
    beside = dm.compression.on_workers(dm.compression.ef21_muon(0.1, RankK(2), seed=3), 2)
    params = {"wide": PARAMS["stem"]}
    grads = {"wide": GRADS["stem"][:2]}
    spec = NamedSharding(mesh, P("workers", None, "tensor"))
    on_mesh = jax.jit(tx.update)(
        {"wide": jax.device_put(grads["wide"], spec)}, tx.init(params), params
    )
    expected = jax.jit(beside.update)(grads, beside.init(params), params)
    assert_close(on_mesh, expected, rounding=1e-4)


def test_whole_gradients_take_as_many_bytes_as_a_sum_of_a_collective():
    mesh, params = make_mesh(workers=8), {"w": jnp.zeros((16, 5))}
    tx = dm.compression.on_workers(dm.privacy.norm_ec(1.0, 0.5), mesh)
    grads = jax.device_put({"w": jnp.ones((8, 16, 5))}, NamedSharding(mesh, P("workers")))
    program = jax.jit(tx.update).lower(grads, placed(mesh, tx.init(params)), params).compile()
    numbers, received = read_traffic(program.as_text(), 8)
    assert numbers == {"all-to-all": 1, "all-gather": 1}
    assert received == 2 * 7 / 8 * 16 * 5 * 4


@pytest.mark.deep
def test_whole_gradients_may_be_sharded_over_other_axes_of_the_mesh():
    mesh = make_mesh(workers=2, tensor=2)
    exchanges = dm.privacy.norm_ec(1.0, 0.5, server_normalization=False)
    tx, beside = (dm.compression.on_workers(exchanges, of) for of in (mesh, 2))
    params, grads = {"wide": PARAMS["stem"]}, {"wide": GRADS["stem"][:2]}
    spec = NamedSharding(mesh, P("workers", None, "tensor"))
    sharded = {"wide": jax.device_put(grads["wide"], spec)}
    on_mesh = jax.jit(tx.update)(sharded, tx.init(params), params)
    expected = jax.jit(beside.update)(grads, beside.init(params), params)
    assert_close(on_mesh, expected, rounding=1e-6)


@pytest.mark.deep
def test_optax_chains_with_scion_run_on_a_mesh():
    mesh = make_mesh(workers=8)
    none = optax.with_extra_args_support(optax.identity())
    roles = {"wide": "hidden", "tall": "head"}
    scion = dm.scion(0.1, {"hidden": 2.0, "head": 3.0}, momentum=none, roles=roles)
    tx = optax.chain(dm.compression.ef21(TopK(0.3)), scion)
    grads = jax.vmap(jax.grad(loss), (None, 0))(WEIGHTS, BATCHES)
    results = []
    for workers in (mesh, 8):
        of_all = dm.compression.on_workers(tx, workers)
        results.append(jax.jit(of_all.update)(grads, of_all.init(WEIGHTS), WEIGHTS)[0])
    assert_close(*results, rounding=1e-4)
