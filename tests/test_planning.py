"""Costs of depths are those of the compiled steps; the best distributions have closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropmuon_jax as dm

over_criteria = pytest.mark.parametrize("criterion", ["max", "sum"])
COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILATIONS.append(name) if "backend_compile" in name else None
)


# --- The optimal distribution; in test_theory_studies.py no search beats it -----------------------


def optimal(smoothness, costs, criterion):
    distribution = dm.planning.optimal_depth(smoothness, costs, criterion=criterion)
    return np.asarray(distribution.probabilities(0, len(costs)), float)


def test_the_optima_have_their_closed_forms():
    # By max the running largest smoothness, whatever the costs.
    for costs in ([9, 5, 2, 1], [4.0, 3.9, 3.8, 0.1]):
        included = np.cumsum(optimal([2, 1, 8, 4], costs, "max"))
        np.testing.assert_allclose(included, [0.25, 0.25, 1, 1])
    # By sum, of two layers, π² = (costs_1 / (costs_0 - costs_1)) (L_0 / L_1).
    np.testing.assert_allclose(np.cumsum(optimal([1, 8], [5, 3], "sum")), [(3 / 16) ** 0.5, 1])


@over_criteria
def test_units_do_not_matter_and_depths_that_save_nothing_are_never_drawn(criterion):
    smoothness, costs = np.array([1.0, 2.0, 0.5, 30.0]), np.array([8.0, 6.0, 6.0, 2.0])
    plain = optimal(smoothness, costs, criterion)
    assert plain[2] == 0
    assert optimal([3.0], [2.0], criterion) == [1.0]
    scaled = optimal(1e-20 * smoothness, 1e12 * costs, criterion)
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


@over_criteria
def test_costs_that_noise_made_rise_with_depth_are_pooled(criterion):
    smoothness, noisy, pooled = [1.0, 5.0, 2.0, 30.0], [9.0, 4.0, 6.0, 2.0], [9.0, 5.0, 5.0, 2.0]
    speed_up = functools.partial(
        dm.planning.predicted_speed_up, dm.uniform_depth(), smoothness, criterion=criterion
    )
    assert speed_up(noisy) == speed_up(pooled)
    of_noisy, of_pooled = (optimal(smoothness, costs, criterion) for costs in (noisy, pooled))
    np.testing.assert_array_equal(of_noisy, of_pooled)


@over_criteria
def test_the_predicted_speed_up_is_the_ratio_of_the_bounds(criterion):
    """Of E cost · max L/π or E cost · Σ L/π, with full steps and with the distribution."""
    smoothness, costs, chances = [2.0, 1.0, 4.0], [6.0, 4.0, 3.0], [0.2, 0.3, 0.5]
    speed_up = functools.partial(dm.planning.predicted_speed_up, criterion=criterion)
    waits = np.divide(smoothness, np.cumsum(chances))
    full, with_chances = (6 * 4.0, waits.max()) if criterion == "max" else (6 * 7.0, waits.sum())
    predicted = speed_up(dm.fixed_depth(chances), smoothness, costs)
    assert predicted == pytest.approx(full / (np.dot(chances, costs) * with_chances), rel=1e-5)
    assert speed_up(dm.full_depth(), smoothness, costs) == 1
    # A layer that is never active is waited for forever.
    assert speed_up(dm.fixed_depth([0, 1]), [1, 1], [2, 1]) == 0


def test_a_changing_distribution_is_predicted_at_the_step_asked_for():
    moving, numbers = dm.epoch_shift_depth(10, alpha=2.0), ([1.0, 2.0, 4.0], [6.0, 4.0, 3.0])
    for step in (5, 10):
        fixed = dm.fixed_depth(moving.probabilities(step, 3))
        expected = dm.planning.predicted_speed_up(fixed, *numbers)
        assert dm.planning.predicted_speed_up(moving, *numbers, step=step) == expected


# --- Costs ----------------------------------------------------------------------------------------


def loss_fn(params, batch):
    x, y = batch
    for name in ("stem", "mid", "head"):
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x - y) ** 2)


PARAMS = {name: np.full((16, 16), 0.1, np.float32) for name in ("stem", "mid", "head")}
LAYERS = dm.layers_by_path(PARAMS, ["stem", "mid", "head"])
BATCH = np.ones((4, 16), np.float32), np.zeros((4, 16), np.float32)


def plain_step(params, key, batch, depth):
    mask = LAYERS.mask(depth)
    loss, grads = dm.masked_value_and_grad(loss_fn)(params, batch, layer_mask=mask)
    rate = 0.1 * jax.random.uniform(key)
    params = jax.tree.map(lambda p, g, m: p - rate * g if m else p, params, grads, mask)
    return params, loss


@pytest.mark.parametrize(("measure", "name"), [("flops", "flops"), ("bytes", "bytes accessed")])
def test_counted_costs_are_those_of_the_compiled_steps_and_fall_with_depth(measure, name):
    step, key = jax.jit(plain_step, static_argnames="depth"), jax.random.key(0)
    abstract = jax.eval_shape(lambda: {"params": PARAMS, "key": key, "batch": BATCH})
    costs = dm.planning.depth_cost(
        step, LAYERS, abstract.pop("params"), **abstract, measure=measure
    )
    assert costs.shape == (3,)
    assert costs.dtype == np.float64
    assert (np.diff(costs) < 0).all()
    compiled = step.lower(PARAMS, key, BATCH, depth=1).compile()
    assert costs[1] == compiled.cost_analysis()[name]


def test_the_costs_of_a_training_step_are_counted_at_its_static_depths():
    optimizer = dm.drop_muon(0.1, LAYERS, orthogonalize=lambda x: x)
    sampler = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=0)
    step_fn = dm.train_step(loss_fn, optimizer, sampler)
    abstract = jax.eval_shape(lambda: (PARAMS, optimizer.init(PARAMS), BATCH))
    costs = dm.planning.depth_cost(step_fn, LAYERS, *abstract)
    assert (np.diff(costs) < 0).all()
    compiled = step_fn.trace_depth(1, *abstract).lower().compile()
    assert costs[1] == compiled.cost_analysis()["flops"]


def test_timed_costs_consume_no_argument_and_leave_the_step_compiled():
    step = jax.jit(plain_step, static_argnums=3, donate_argnums=(0, 1))
    args = jax.device_put((PARAMS, jax.random.key(0), BATCH))
    seconds = dm.planning.depth_cost(step, LAYERS, *args, measure="seconds", repetitions=2)
    assert seconds.shape == (3,)
    assert (seconds > 0).all()
    np.testing.assert_array_equal(args[0]["stem"], PARAMS["stem"])
    assert not args[1].is_deleted()
    COMPILATIONS.clear()
    params, key, batch = args
    for depth in range(3):
        params, _ = step(params, jnp.copy(key), batch, depth=depth)
    assert args[0]["head"].is_deleted()
    assert not COMPILATIONS


# --- Errors ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="depth")
def double(x, depth):
    return 2 * x


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (plain_step, {}, "step must be a jitted function, jax.jit"),
        (jax.jit(lambda x, level: x), {}, "argument `depth`: .* are x, level"),
        (jax.jit(lambda x, depth: x * depth), {}, "`depth` of step is traced"),
        (double, {"measure": "flop"}, "measure must be one of .* Did you mean 'flops'"),
        (double, {"repetitions": 0}, "repetitions must be at least 1"),
        (double, {"measure": "seconds"}, "needs arrays, got a ShapeDtypeStruct"),
    ],
)
def test_what_has_no_cost_for_each_depth_is_refused(step, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dm.planning.depth_cost(step, LAYERS, jax.ShapeDtypeStruct((), np.float32), **options)


def test_a_backend_that_does_not_count_is_named(monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", lambda self: None)
    with pytest.raises(ValueError, match=r"'cpu' does not count flops: take measure='seconds'"):
        dm.planning.depth_cost(double, LAYERS, 1.0)


@pytest.mark.parametrize(
    ("distribution", "numbers", "message"),
    [
        (dm.full_depth(), ([1, 0], [2, 1]), "smoothness must be positive and finite numbers"),
        (dm.full_depth(), ([1, 1], [2, np.inf]), "depth_costs must be positive and finite"),
        (dm.full_depth(), ([1, 1], [[2, 1]]), "depth_costs must be .* one for each layer"),
        (dm.full_depth(), ([1, 1, 1], [2, 1]), "smoothness is of 3 layers and depth_costs of 2"),
        ([0.5, 0.5], ([1, 1], [2, 1]), "distribution must be a LayerDistribution"),
        (dm.sampling.fixed_size_subsets(1), ([1, 1], [2, 1]), "draws arbitrary subsets, and cos"),
        (dm.fixed_depth([0.5, 0.2, 0.3]), ([1, 1], [2, 1]), "gives 3 probabilities, and smooth"),
    ],
)
def test_what_predicts_no_speed_up_is_refused_by_name(distribution, numbers, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dm.planning.predicted_speed_up(distribution, *numbers)
    if distribution == dm.full_depth():
        with pytest.raises(ValueError, match=message):
            dm.planning.optimal_depth(*numbers)
    with pytest.raises(ValueError, match=r"criterion must be one of \['max', 'sum'\]"):
        dm.planning.optimal_depth([1, 1], [2, 1], criterion="mean")
