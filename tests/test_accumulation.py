"""Accumulation: the micro-batches of a step share a depth, whatever is skipped."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dropmuon_jax as dm
from dropmuon_jax.transforms.accumulation import accumulate
from dropmuon_jax.transforms.masked import freeze

PARAMS = {"a": jnp.eye(3, 4) + 0.1, "b": jnp.eye(4) - 0.2, "c": jnp.ones((4, 2))}
STACKED = {"s": jnp.stack([jnp.eye(4), jnp.ones((4, 4)), -jnp.eye(4)]), "c": jnp.ones((4, 2))}
LAYERS = dm.layers_by_path(PARAMS, [*"abc"])
ROWS = dm.layers_by_path(STACKED, [dm.stacked("s"), "c"])
FINITE = {"should_skip_update_fn": optax.skip_not_finite}


def make_sampler(micro_batches, layers=LAYERS, seed=0):
    return dm.DepthSampler(layers, dm.uniform_depth(), seed=seed, steps_per_draw=micro_batches)


def loss_fn(params, x):
    return jnp.sum(jnp.tanh(x @ params["a"] @ params["b"]) @ params["c"]) ** 2


def gradients(number, params, bad=False):
    keys = jax.random.split(jax.random.key(number), len(params))
    leaves = zip(keys, jax.tree.leaves(params), strict=True)
    grads = [jax.random.normal(key, p.shape, p.dtype) for key, p in leaves]
    grads = [g.at[..., -1].set(jnp.nan) if bad else g for g in grads]
    return jax.tree.unflatten(jax.tree.structure(params), grads)


def mean(trees, params):
    """The mean in float32, in the dtypes of the parameters."""
    wide = [jax.tree.map(lambda g: g.astype(jnp.float32), tree) for tree in trees]
    return jax.tree.map(lambda p, *g: (sum(g) / len(g)).astype(p.dtype), params, *wide)


GLUON = {"roles": dm.Roles(has_head=False)}
OPTIMIZERS = {
    "drop_muon": lambda of: dm.drop_muon(optax.linear_schedule(0.1, 0, 9), of, weight_decay=0.1),
    "clipped": lambda of: optax.chain(
        optax.clip_by_global_norm(1.0), dm.drop_gluon(1, of, **GLUON)
    ),
    "mvr": lambda of: dm.drop_gluon(0.1, of, momentum=dm.mvr_momentum(), **GLUON),
    "finite": lambda of: optax.apply_if_finite(dm.drop_muon(0.1, of), 3),
}


DEEP = functools.partial(pytest.param, marks=pytest.mark.deep)


@pytest.mark.parametrize(
    ("name", "layers", "dtype"),
    [("mvr", LAYERS, jnp.float32), ("drop_muon", ROWS, jnp.bfloat16)]
    + [DEEP(name, of, jnp.float32) for name in OPTIMIZERS for of in (LAYERS, ROWS)]
    + [DEEP(name, LAYERS, jnp.bfloat16) for name in OPTIMIZERS],
)
def test_a_step_is_that_of_the_mean_of_the_micro_batches_that_count(name, layers, dtype):
    skipped, size = {1, 5, 6, 9, 10, 11}, 3  # in the middle, the last, the first, all of a step
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS if layers is LAYERS else STACKED)
    plain = OPTIMIZERS[name](layers)
    tx = accumulate(plain, make_sampler(size, layers), **FINITE)
    update, whole = (jax.jit(of.update, static_argnames="depth") for of in (tx, plain))
    state, expected = tx.init(params), plain.init(params)
    for step in range(5):
        depth, seen, before = step % 2 * 2, [], params
        for call in range(size * step, size * (step + 1)):
            chex.assert_trees_all_equal(params, before)
            pair = [gradients(call + i, params, call in skipped) for i in (0, 100)]
            seen += [] if call in skipped else [pair]
            second = {"prev_params_grads": pair[1]} if name == "mvr" else {}
            updates, state = update(pair[0], state, params, depth=depth, **second)
            params = optax.apply_updates(params, updates)
        if not seen:
            chex.assert_trees_all_equal(params, before)
            continue
        means = (mean(trees, params) for trees in zip(*seen, strict=True))
        grads, prev_grads = (freeze(layers.mask(depth), grads) for grads in means)
        second = {"prev_params_grads": prev_grads} if name == "mvr" else {}
        of_mean, expected = whole(grads, expected, before, depth=depth, **second)
        chex.assert_trees_all_close(updates, of_mean, rtol=2e-2, atol=1e-4)
        chex.assert_trees_all_close(state.inner_state, expected, rtol=2e-2, atol=1e-4)
        chex.assert_trees_all_equal_dtypes((updates, state.inner_state), (of_mean, expected))
    assert state.count == 15


@functools.cache
def stepper(micro_batches):
    sampler = make_sampler(micro_batches)
    tx = accumulate(optax.sgd(0.1), sampler, **FINITE)
    return sampler, tx, dm.train_step(loss_fn, tx, sampler, donate=False)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.sets(st.integers(0, 11)))
@example(2, {3})
def test_a_step_has_one_depth_whatever_is_skipped(micro_batches, skipped):
    sampler, tx, step_fn = stepper(micro_batches)
    params, state = PARAMS, tx.init(PARAMS)
    for call in range(12):
        before = params
        x = jnp.full((2, 3), jnp.nan if call in skipped else 0.1)
        params, state, _ = step_fn(call, params, state, x)
        this = range(call - call % micro_batches, call + 1)
        expected = np.zeros((micro_batches, 3), bool)
        expected[[k % micro_batches for k in this if k not in skipped]] = sampler.active(call)
        np.testing.assert_array_equal(state.counted, expected)
        moves = len(this) == micro_batches and expected.any(axis=0)
        moved = [not np.array_equal(params[k], before[k]) for k in "abc"]
        assert moved == (np.ones(3, bool) & moves).tolist()


@pytest.mark.parametrize("traced", [False, True])
def test_where_the_depth_changes_within_a_step_a_layer_has_the_mean_of_its_own(traced):
    """By hand and against the recipe: no layer steps by a sum that lacks some gradients."""
    tx = accumulate(optax.scale(-1.0), make_sampler(3, ROWS))
    update = jax.jit(
        lambda grads, state, depth: tx.update(grads, state, layer_mask=ROWS.mask(depth)),
        static_argnums=() if traced else 2,
    )
    state = tx.init(STACKED)
    for depths in ([0, 3, 2], [1, 0, 0], [3, 3, 1]):
        for number, depth in enumerate(depths):
            updates, state = update(gradients(number, STACKED), state, depth)
        for layer, update_of_layer in enumerate([*updates["s"], updates["c"]]):
            grads = [gradients(n, STACKED) for n, depth in enumerate(depths) if layer >= depth]
            seen = [[*tree["s"], tree["c"]][layer] for tree in grads]
            due = -sum(seen) / len(seen) if layer >= depths[-1] else 0 * update_of_layer
            np.testing.assert_allclose(update_of_layer, due, rtol=1e-5, atol=1e-6)


def around(steps):
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


SKIPPING = optax.MultiSteps(dm.drop_muon(0.1, LAYERS), 2, **FINITE)
TIME_AWARE = dm.DepthSampler(LAYERS, dm.time_aware_depth([3.0, 2.0, 1.0]), seed=0)
WRONG = {
    "another number": (accumulate(dm.drop_muon(0.1, LAYERS), make_sampler(2)), make_sampler(3)),
    "forgotten": (accumulate(dm.drop_muon(0.1, LAYERS), make_sampler(2)), make_sampler(1)),
    "time-aware": (
        accumulate(dm.record_gains(dm.drop_muon(0.1, LAYERS), TIME_AWARE), make_sampler(2)),
        TIME_AWARE,
    ),
    "skips": (around(SKIPPING), make_sampler(2)),
    "in a chain": (optax.chain(optax.identity(), around(SKIPPING)), make_sampler(2)),
} | {
    f"MultiSteps {n}": (around(optax.MultiSteps(optax.sgd(0.1), 2)), make_sampler(n))
    for n in (1, 3, 4)
}


@pytest.mark.parametrize("name", WRONG)
def test_what_could_mix_depths_is_an_error_of_train_step(name):
    tx, sampler = WRONG[name]
    step_fn, state = dm.train_step(loss_fn, tx, sampler), tx.init(PARAMS)
    match = "jax.lax.scan" if name == "time-aware" else r"dm\.accumulate"
    for run in (functools.partial(step_fn, 0), step_fn.compile):
        with pytest.raises(ValueError, match=match):
            run(PARAMS, state, jnp.ones((2, 3)))


def test_gathered_gradients_are_no_gains():
    tx = dm.record_gains(accumulate(dm.drop_muon(0.1, LAYERS), make_sampler(2)), TIME_AWARE)
    with pytest.raises(TypeError, match=r"inner accumulates, by .* or dm\.accumulate: gather"):
        tx.init(PARAMS)


def test_a_layer_of_which_nothing_counts_does_not_move_by_its_momentum():
    tx = accumulate(dm.drop_muon(0.1, LAYERS), make_sampler(2), **FINITE)
    ones, bad = (jax.tree.map(lambda p, x=x: np.full(p.shape, x, "f"), PARAMS) for x in (1, np.nan))
    update, state, updates = jax.jit(tx.update, static_argnames="depth"), tx.init(PARAMS), None
    for grads, depth in ((ones, 0), (ones, 0), (ones, 1), (bad, 0)):
        updates, state = update(grads, state, PARAMS, depth=depth)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


def test_a_run_goes_on_in_the_call_in_which_it_stopped():
    sampler = make_sampler(3)
    tx = accumulate(dm.drop_muon(0.1, LAYERS), sampler)
    make = functools.partial(dm.train_step, loss_fn, tx, sampler, donate=False)
    params, state, x = PARAMS, tx.init(PARAMS), jnp.ones((2, 3))
    step_fn, seen = make(), []
    for call in range(6):
        seen.append((params, state))
        params, state, _ = step_fn(call, params, state, x)
    again, restored = seen[4]
    resumed = make()
    for call in (4, 5):
        again, restored, _ = resumed(call, again, restored, x)
    chex.assert_trees_all_equal((again, restored), (params, state))
    with pytest.raises(ValueError, match=r"gathered 6 micro-batches.*Go on with step=6"):
        step_fn(1, params, state, x)  # as in an epoch that has counted anew
    for wrong in (0, 3, 5):
        with pytest.raises(ValueError, match=r"gathered 4 micro-batches.*Go on with step=4"):
            make()(wrong, *seen[4], x)


def test_check_optimizer_takes_whole_steps_of_an_accumulation():
    sampler = make_sampler(3)
    for name, second in {"drop_muon": {}, "mvr": {"prev_params_grads": True}}.items():
        tx = accumulate(OPTIMIZERS[name](LAYERS), sampler, **FINITE)
        dm.check_optimizer(tx, PARAMS, LAYERS, **second)
    climbs = dm.drop_muon(0.1, LAYERS, roles={"c": "adam"}, auxiliary=optax.adam(0.1))
    with pytest.raises(ValueError, match="'c' moves along its gradient"):
        dm.check_optimizer(accumulate(climbs, sampler), PARAMS, LAYERS)
    with pytest.raises(ValueError, match="'a' moves in a step in which its layer is not active"):
        dm.check_optimizer(accumulate(optax.adam(0.1), sampler), PARAMS, LAYERS)
    with pytest.raises(ValueError, match=r"dm\.accumulate\(optimizer, sampler\)"):
        dm.check_optimizer(around(SKIPPING), PARAMS, LAYERS)
    with pytest.raises(TypeError, match="layers must be made by layers_by_path"):
        dm.check_optimizer(dm.drop_muon(0.1, LAYERS), PARAMS, layers=["a", "b"])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: accumulate(optax.sgd(0.1), 4), "steps_per_draw=num_micro_batches"),
        (lambda: accumulate(optax.sgd(0.1), TIME_AWARE), r"jax\.lax\.scan over micro-batches"),
        (lambda: accumulate(SKIPPING, make_sampler(2)), "must be an optax.GradientTransformation"),
        (
            lambda: accumulate(around(SKIPPING), make_sampler(2)).init(PARAMS),
            "accumulates already: leave one of the two out",
        ),
    ],
)
def test_wrong_arguments_are_errors_with_the_way_out(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


def test_a_step_takes_arrays_that_are_there_twice_though_it_overwrites_them():
    shared = jnp.eye(4)
    params = {"a": jnp.eye(3, 4), "b": shared, "c": shared}
    tx = dm.drop_muon(0.1, LAYERS)
    step_fn = dm.train_step(loss_fn, tx, make_sampler(1))
    new, _, _ = step_fn(0, params, tx.init(params), jnp.ones((2, 3)))
    assert len({x.unsafe_buffer_pointer() for x in jax.tree.leaves(new)}) == 3


def test_patterns_come_from_any_iterable_and_steps_are_no_truth_values():
    assert dm.layers_by_path(PARAMS, iter("abc")) == LAYERS
    for sampler in (make_sampler(2), TIME_AWARE):
        state = dm.record_gains(optax.sgd(0.1), TIME_AWARE).init(PARAMS)
        with pytest.raises(TypeError, match="step must be a Python integer, got a truth value"):
            sampler.check_processes(True, state)
