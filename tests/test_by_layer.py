"""Steps whose updates are programs of layers: the same steps, and fewer programs to compile."""

import collections
import gc
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm
from dropmuon_jax.backprop.by_layer import _identity

NAMES = ("stem", "one", "two", "three", "head")  # of which "one" to "three" are alike
SIZES = dict(zip(NAMES, [(6, 8), (8, 8), (8, 8), (8, 8), (8, 2)], strict=True))
LAYERS = dm.layers_by_path(
    {name: {"kernel": np.zeros(of), "bias": np.zeros(of[1])} for name, of in SIZES.items()}, NAMES
)
DRAWS = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=1)
KERNEL = dm.orthogonalize.newton_schulz(num_steps=2)
RATE = optax.linear_schedule(0.05, 0.0, 60)
COMPILED: list[str] = []


@jax.monitoring.register_event_duration_secs_listener
def _listen(name: str, *_, fun_name: str = "", **__) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(fun_name)


def make_params():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {name: {"kernel": normal(*of), "bias": normal(of[1])} for name, of in SIZES.items()}


def loss_fn(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return jnp.mean((x - 0.5) ** 2)


def batch(step):
    return jnp.asarray(np.random.default_rng(step).normal(size=(16, 6)), jnp.float32)


def drop_muon(momentum=0.9, **options):
    return dm.drop_muon(RATE, LAYERS, momentum=momentum, orthogonalize=KERNEL, **options)


CORRECTED = dm.momentum(0.9, nesterov=True, bias_correction=True)
LINK = dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=0)
TIME_AWARE = dm.DepthSampler(LAYERS, dm.time_aware_depth([5.0, 4.0, 3.0, 2.0, 1.0]), seed=1)
# And the number of different updates: of the stem, of those between, of the head, and of a record
# of all at each depth.
OPTIMIZERS = {
    "plain": (drop_muon(weight_decay=0.1), 3),
    "a number of each leaf in one vector": (drop_muon(CORRECTED), 3),
    "two gradients": (drop_muon(dm.mvr_momentum(0.9)), 3),
    "a record of gains": (dm.record_gains(drop_muon(), TIME_AWARE), 8),
    "whose state frozen layers change": (optax.chain(optax.adamw(0.1), LINK), 5),
}
REFUSED = pytest.mark.xfail(
    jax.__version_info__ >= (0, 11),
    reason="the bias correction of optax.adamw stays one inner program of all leaves",
    raises=ValueError,
    strict=True,
)
CASES = [
    pytest.param(*case, id=name, marks=[REFUSED] * name.startswith("whose"))
    for name, case in OPTIMIZERS.items()
]


@pytest.mark.parametrize(("optimizer", "num_updates"), CASES)
def test_steps_are_those_of_one_program_and_equal_layers_share_theirs(optimizer, num_updates):
    steps = [dm.train_step(loss_fn, optimizer, DRAWS, update_by_layer=on) for on in (True, False)]
    ours, theirs = ((make_params(), optimizer.init(make_params())) for _ in steps)
    before = len(COMPILED)
    steps[0].compile(*jax.eval_shape(lambda: ours), batch(0))
    new = collections.Counter(COMPILED[before:])
    assert (new["jit(step_gradient)"], new["jit(update_layer)"]) == (5, num_updates)
    for step in range(12):
        inputs, num_compiled = jax.tree.leaves(ours), len(COMPILED)
        (*ours, loss), frozen = steps[0](step, *ours, batch(step)), DRAWS.depth(step)
        assert len(COMPILED) == num_compiled
        is_same = [x is y for x, y in zip(inputs, jax.tree.leaves(ours), strict=True)]
        assert is_same[: 2 * len(NAMES)] == [not on for on in jax.tree.leaves(LAYERS.mask(frozen))]
        *theirs, expected = steps[1](step, *theirs, batch(step))
        chex.assert_trees_all_close((ours, loss), (theirs, expected), rtol=1e-4, atol=2e-5)
    assert gc.isenabled()


def test_what_a_layer_joins_within_a_memory_limit_does_not_depend_on_others():
    params = {name: {of: jnp.eye(8) for of in ("in", "out")} for name in ("stem", "head")}
    layers = dm.layers_by_path(params, ["stem", "head"])
    optimizer = dm.newton_schulz_lmo(num_steps=2, memory_limit=7 * 8 * 8 * 4)
    draws = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    step = dm.train_step(optax.tree.sum, optimizer, draws, update_by_layer=True)
    before = len(COMPILED)
    step.compile(params, optimizer.init(params))
    assert COMPILED[before:].count("jit(update_layer)") == 1


def test_functions_of_the_host_are_those_of_their_layers():
    def times(number):
        host = lambda g: np.asarray(number * g, np.float32)  # noqa: E731
        return optax.stateless_with_tree_map(lambda g, _: jax.pure_callback(host, g, g))

    params = {"stem": jnp.ones(2), "head": jnp.ones(2)}
    layers = dm.layers_by_path(params, ["stem", "head"])
    labels = {name: name for name in params}
    optimizer = optax.partition({"stem": times(1.0), "head": times(2.0)}, labels)
    draws = dm.DepthSampler(layers, dm.sampling.fixed_size_subsets(2), seed=0)
    total = lambda params: jnp.sum(params["stem"] + params["head"])  # noqa: E731
    step = dm.train_step(total, optimizer, draws, update_by_layer=True)
    after, *_ = step(0, params, optimizer.init(params))
    np.testing.assert_array_equal(after["stem"], 2.0)
    np.testing.assert_array_equal(after["head"], 3.0)


def scaled_by(array):
    return lambda x, y: x * array + y


def scaled_by_drawn(key):
    return lambda x, y: x * jax.random.uniform(key) + y


PROGRAMS = {
    "x - y": lambda x, y: x - y,
    "y - x": lambda x, y: y - x,
    "x * 0": lambda x, y: x * 0.0 + y,
    "x * -0": lambda x, y: x * -0.0 + y,
    "a constant": scaled_by(np.ones(3, np.float32)),
    "another one": scaled_by(np.arange(3, dtype=np.float32)),
    "a key": scaled_by_drawn(jax.random.key(0)),
    "another key": scaled_by_drawn(jax.random.key(1)),
    "a dtype": lambda x, y: x.astype(jnp.float16).astype(x.dtype) + y,
    "an inner program": lambda x, y: jax.jit(lambda x: x * 2)(x) + y,
    "another program": lambda x, y: jax.jit(lambda x: x * 3)(x) + y,
    "a branch": lambda x, y: jax.lax.cond(y[0] > 0, jnp.sin, jnp.cos, x),
    "other branches": lambda x, y: jax.lax.cond(y[0] > 0, jnp.cos, jnp.sin, x),
}


def test_programs_are_equal_that_compute_the_same():
    x = jnp.ones(3)
    once, again = (
        [_identity(traced.jaxpr, traced.consts) for traced in programs]
        for programs in (
            [jax.make_jaxpr(lambda *args, f=f: f(*args))(x, x) for f in PROGRAMS.values()]
            for _ in range(2)
        )
    )
    assert once == again
    assert len(set(once)) == len(PROGRAMS)
    wider = jax.make_jaxpr(PROGRAMS["x - y"])(jnp.ones(4), jnp.ones(4))
    assert _identity(wider.jaxpr) != once[0]


def test_changed_leaves_are_overwritten_or_kept():
    for donate in (True, False):
        params = make_params()
        optimizer = drop_muon()
        step_fn = dm.train_step(loss_fn, optimizer, DRAWS, donate=donate, update_by_layer=True)
        state = optimizer.init(params)
        step_fn(0, params, state, batch(0))
        active = jax.tree.leaves(LAYERS.mask(DRAWS.depth(0)))
        deleted = [x.is_deleted() for x in jax.tree.leaves(params)]
        assert deleted == [on and donate for on in active]


def compile_with(optimizer, sampler=DRAWS, **options):
    step_fn = dm.train_step(loss_fn, optimizer, sampler, update_by_layer=True, **options)
    step_fn.compile(make_params(), optimizer.init(make_params()), batch(0))


def of_stack():
    layers = dm.layers_by_path({"w": jnp.ones((2, 3, 3))}, [dm.stacked("w")])
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    dm.train_step(lambda params, depth: 0.0, drop_muon(), sampler, update_by_layer=True)


ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
REFUSED = {
    "a norm of all": lambda: compile_with(optax.chain(optax.clip_by_global_norm(0.1), drop_muon())),
    "micro-batches": lambda: compile_with(dm.accumulate(drop_muon(), DRAWS)),
    "a stack": of_stack,
    "shardings": lambda: compile_with(drop_muon(), out_shardings=(ONE_DEVICE, ONE_DEVICE)),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_needs_several_layers_at_once_is_refused(make):
    with pytest.raises(ValueError, match="update_by_layer"):
        make()


SECOND_START = """
import jax, test_by_layer as t, dropmuon_jax as dm
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name.split("/")[-1]))
params, optimizer = t.make_params(), t.drop_muon()
for by_layer in (True, False):
    step_fn = dm.train_step(t.loss_fn, optimizer, t.DRAWS, update_by_layer=by_layer)
    found.clear()
    step_fn.compile(params, optimizer.init(params), t.batch(0))
    print(found.count("cache_hits"), found.count("cache_misses"))
print(jax.config.jax_persistent_cache_min_compile_time_secs)
"""


@pytest.mark.deep
def test_a_second_start_finds_every_program_in_the_cache(tmp_path):
    """Of quick programs too, and whatever order sets of strings have."""

    def start(seed):
        known = {name: of for name, of in os.environ.items() if not name.startswith("JAX_")}
        own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": seed}
        path = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", SECOND_START],
            env=known | own | {"PYTHONPATH": path},
            check=True,
            capture_output=True,
            text=True,
        )
        *counts, seconds = done.stdout.splitlines()
        assert float(seconds) == 1.0
        return [tuple(map(int, line.split())) for line in counts]

    # One line each: by layer with 5 gradients and 3 updates, and 5 whole steps.
    first, second = start("1"), start("2")
    assert [misses for _, misses in first] == [8, 5]
    assert [(hits, misses) for hits, misses in second] == [(8, 0), (5, 0)]
