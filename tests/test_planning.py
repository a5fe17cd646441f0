"""Costs of depths are those of the compiled steps, and no distribution beats the optimal ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropmuon_jax as dm
from theory_study.bounds import ratios
from theory_study.descent import descend
from theory_study.problems import coupled, hyperbolic, separable

pytestmark = pytest.mark.usefixtures("quick_compilation")

CRITERIA = ("max", "sum")
COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILATIONS.append(name) if "backend_compile" in name else None
)


def time_bound(probabilities, smoothness, costs, criterion):
    # E cost · max L/π or E cost · Σ L/π, of one distribution or of many
    included = np.cumsum(probabilities, axis=-1)
    with np.errstate(divide="ignore"):
        waits = smoothness / included
    return (probabilities @ costs) * (waits.max(-1) if criterion == "max" else waits.sum(-1))


def random_problem(seed):
    rng = np.random.default_rng(seed)
    num_layers = 2 + seed % 5
    smoothness = np.exp(1.5 * rng.normal(size=num_layers))
    layer_costs = np.exp(rng.normal(size=num_layers))
    return smoothness, np.cumsum(layer_costs[::-1])[::-1] + np.exp(rng.normal())


def search(smoothness, costs, criterion, start, rng):
    """The best of random distributions and of ever smaller random moves from it and `start`."""
    num_layers = len(costs)
    best = start
    sparsity = np.exp(rng.uniform(-3, 1, (3000, 1)))
    tried = rng.gamma(np.broadcast_to(sparsity, (3000, num_layers))) + 1e-12
    for size in (None, *np.logspace(-0.5, -6, 12)):
        if size is not None:
            moves = (
                size * rng.normal(size=(500, num_layers)) * (rng.random((500, num_layers)) < 0.5)
            )
            tried = np.clip(best + moves, 0, None) + 1e-15
        tried = tried / tried.sum(1, keepdims=True)
        of_tried = time_bound(tried, smoothness, costs, criterion)
        if of_tried.min() < time_bound(best, smoothness, costs, criterion):
            best = tried[of_tried.argmin()]
    return best


def optimal(smoothness, costs, criterion):
    distribution = dm.planning.optimal_depth(smoothness, costs, criterion=criterion)
    return np.asarray(distribution.probabilities(0, len(costs)), float)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_distribution_that_a_search_finds_beats_the_optimal_one(criterion):
    rng = np.random.default_rng(0)
    for seed in range(25):
        smoothness, costs = random_problem(seed)
        best = optimal(smoothness, costs, criterion)
        of_best = time_bound(best, smoothness, costs, criterion)
        full = np.eye(len(costs))[0]
        for start in (best, full):
            found = search(smoothness, costs, criterion, start, rng)
            assert time_bound(found, smoothness, costs, criterion) >= of_best * (1 - 1e-6)
        # … and the search is worth its name: from full steps it comes near
        assert time_bound(found, smoothness, costs, criterion) <= of_best * 1.02


def test_full_steps_are_optimal_by_max_if_and_only_if_no_layer_is_less_smooth_than_the_first():
    rng, seen = np.random.default_rng(1), set()
    for seed in range(25):
        smoothness, costs = random_problem(seed)
        if seed % 2:
            smoothness[0] = smoothness.max()
        claimed = smoothness[0] == smoothness.max()
        full = np.eye(len(costs))[0]
        found = time_bound(search(smoothness, costs, "max", full, rng), smoothness, costs, "max")
        assert (found >= costs[0] * smoothness.max() * (1 - 1e-12)) == claimed
        np.testing.assert_array_equal((optimal(smoothness, costs, "max") == full).all(), claimed)
        seen.add(bool(claimed))
    assert seen == {True, False}


def test_full_steps_are_optimal_by_sum_if_and_only_if_shallow_shares_of_smoothness_exceed_savings():
    # Σ_{i<s} L_i / Σ L ≥ (costs_0 - costs_s) / costs_0 for every depth s
    rng, seen = np.random.default_rng(2), set()
    for seed in range(40):
        smoothness, costs = random_problem(seed)
        if seed % 2:
            smoothness[0] *= 10
        shares = np.cumsum(smoothness)[:-1] / smoothness.sum()
        claimed = (shares >= 1 - costs[1:] / costs[0]).all()
        full = np.eye(len(costs))[0]
        found = time_bound(search(smoothness, costs, "sum", full, rng), smoothness, costs, "sum")
        assert (found >= costs[0] * smoothness.sum() * (1 - 1e-12)) == claimed
        assert (optimal(smoothness, costs, "sum")[0] > 1 - 1e-6) == claimed
        seen.add(bool(claimed))
    assert seen == {True, False}


def test_the_optimum_by_max_is_the_running_largest_smoothness_whatever_the_costs():
    for costs in ([9, 5, 2, 1], [4.0, 3.9, 3.8, 0.1]):
        included = np.cumsum(optimal([2, 1, 8, 4], costs, "max"))
        np.testing.assert_allclose(included, [0.25, 0.25, 1, 1])


def test_the_optimum_by_sum_of_two_layers_is_the_root_of_what_is_saved_and_waited_for():
    # π² = (costs_1 / (costs_0 - costs_1)) (L_0 / L_1)
    np.testing.assert_allclose(np.cumsum(optimal([1, 8], [5, 3], "sum")), [(3 / 16) ** 0.5, 1])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_units_do_not_matter_and_depths_that_save_nothing_are_never_drawn(criterion):
    smoothness, costs = np.array([1.0, 2.0, 0.5, 30.0]), np.array([8.0, 6.0, 6.0, 2.0])
    reference = optimal(smoothness, costs, criterion)
    assert reference[2] == 0
    scaled = optimal(1e-20 * smoothness, 1e12 * costs, criterion)
    np.testing.assert_allclose(scaled, reference, atol=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_costs_that_noise_made_rise_with_depth_are_pooled(criterion):
    smoothness = [1.0, 5.0, 2.0, 30.0]
    noisy, pooled = [9.0, 4.0, 6.0, 2.0], [9.0, 5.0, 5.0, 2.0]
    np.testing.assert_array_equal(
        optimal(smoothness, noisy, criterion), optimal(smoothness, pooled, criterion)
    )
    distribution = dm.uniform_depth()
    assert dm.planning.predicted_speed_up(
        distribution, smoothness, noisy, criterion=criterion
    ) == dm.planning.predicted_speed_up(distribution, smoothness, pooled, criterion=criterion)


def test_a_single_layer_is_always_active():
    for criterion in CRITERIA:
        assert optimal([3.0], [2.0], criterion) == [1.0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_predicted_speed_up_is_the_ratio_of_the_bounds(criterion):
    smoothness, costs = random_problem(3)
    chances = np.random.default_rng(4).dirichlet(np.ones(len(costs)))
    predicted = dm.planning.predicted_speed_up(
        dm.fixed_depth(chances), smoothness, costs, criterion=criterion
    )
    full = time_bound(np.eye(len(costs))[0], smoothness, costs, criterion)
    expected = full / time_bound(chances, smoothness, costs, criterion)
    assert predicted == pytest.approx(expected, rel=1e-5)
    assert (
        dm.planning.predicted_speed_up(dm.full_depth(), smoothness, costs, criterion=criterion) == 1
    )


def test_a_changing_distribution_is_predicted_at_the_step_asked_for():
    args = dm.epoch_shift_depth(10, alpha=2.0), [1.0, 2.0, 4.0], [6.0, 4.0, 3.0]
    middle = dm.planning.predicted_speed_up(*args, step=5)
    assert middle == pytest.approx(dm.planning.predicted_speed_up(dm.uniform_depth(), *args[1:]))
    late = dm.fixed_depth(args[0].probabilities(10, 3))
    assert dm.planning.predicted_speed_up(*args, step=10) == dm.planning.predicted_speed_up(
        late, *args[1:]
    )


def test_a_layer_that_is_never_active_is_waited_for_forever():
    assert dm.planning.predicted_speed_up(dm.fixed_depth([0, 1]), [1, 1], [2, 1]) == 0


DISTRIBUTIONS = {
    "full": [1.0, 0.0, 0.0],
    "mostly deep": [0.1, 0.2, 0.7],
    **{f"best by {of}": optimal([0.3, 4.0, 1.0], [9, 5, 2], of) for of in CRITERIA},
}


@pytest.mark.parametrize("make", [separable, coupled, hyperbolic])
def test_expectations_over_all_sequences_of_depths_obey_the_bounds(make):
    # b = 3 depths and K = 4 steps: 81 runs, each with its probability.
    depths = np.array(list(itertools.product(range(3), repeat=4)))
    with jax.enable_x64(True):
        problem = make([0.3, 4.0, 1.0], 0)
        descent = descend(problem)
        for name, probabilities in DISTRIBUTIONS.items():
            chances = np.asarray(probabilities) / np.sum(probabilities)
            weights = chances[depths].prod(1)
            found = ratios(problem, descent, name, chances, depths, weights)
            assert 0.05 < found.one_step <= 1 + 1e-9  # not by constants far too large
            assert 0.01 < found.many_steps <= 1 + 1e-9
            assert 0 < found.gradient <= 1
            if make is separable:  # a quadratic with these constants: nothing is given away
                assert found.one_step == pytest.approx(1)


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
    step = jax.jit(plain_step, static_argnames="depth")
    abstract = jax.eval_shape(lambda: (PARAMS, jax.random.key(0), BATCH))
    costs = dm.planning.depth_cost(step, LAYERS, *abstract, measure=measure)
    assert costs.shape == (3,)
    assert costs.dtype == np.float64
    assert (np.diff(costs) < 0).all()
    compiled = step.lower(PARAMS, jax.random.key(0), BATCH, depth=1).compile()
    assert costs[1] == compiled.cost_analysis()[name]


def test_the_costs_of_a_training_step_are_counted_at_its_static_depths():
    optimizer = dm.drop_muon(0.1, LAYERS)
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


def test_keyword_arguments_reach_the_step():
    step = jax.jit(plain_step, static_argnames="depth")
    key = jax.random.key(0)
    by_keyword = dm.planning.depth_cost(step, LAYERS, PARAMS, batch=BATCH, key=key)
    np.testing.assert_array_equal(
        by_keyword, dm.planning.depth_cost(step, LAYERS, PARAMS, key, BATCH)
    )


@functools.partial(jax.jit, static_argnames="depth")
def double(x, depth):
    return 2 * x


@pytest.mark.parametrize(
    ("step", "arguments", "error", "message"),
    [
        (plain_step, {}, TypeError, "step must be a jitted function, jax.jit"),
        (jax.jit(lambda x, level: x), {}, TypeError, "argument `depth`: .* are x, level"),
        (jax.jit(lambda x, depth: x * depth), {}, TypeError, "`depth` of step is traced"),
        (
            jax.jit(lambda x, depth: LAYERS.mask(depth)["stem"] * x),
            {},
            TypeError,
            "depth must be a Python integer, got an array. Make it static",
        ),
        (double, {"measure": "flop"}, ValueError, "measure must be one of .* Did you mean 'flops'"),
        (double, {"repetitions": 0}, ValueError, "repetitions must be at least 1"),
        (double, {"layers": 3}, TypeError, "layers must be made by"),
        (double, {"measure": "seconds"}, TypeError, "needs arrays, got a ShapeDtypeStruct"),
    ],
)
def test_what_has_no_cost_for_each_depth_is_refused(step, arguments, error, message):
    arguments = {"layers": LAYERS} | arguments
    with pytest.raises(error, match=message):
        dm.planning.depth_cost(
            step, arguments.pop("layers"), jax.ShapeDtypeStruct((), jnp.float32), **arguments
        )


def test_a_backend_that_does_not_count_is_named():
    class Uncounted:
        args_info = ((), {})

        def __call__(self, x, depth):
            raise NotImplementedError

        def trace(self, *args, **kwargs):
            return self

        def lower(self):
            return self

        def compile(self):
            return self

        def cost_analysis(self):
            return None

    with pytest.raises(ValueError, match=r"'cpu' does not count flops: take measure='seconds'"):
        dm.planning.depth_cost(Uncounted(), LAYERS, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 0], [2, 1]), "smoothness must be positive and finite numbers"),
        (([1, np.inf], [2, 1]), "smoothness must be positive and finite"),
        (([1, 1], [2, 0]), "depth_costs must be positive and finite"),
        (([1, 1], [[2, 1]]), "depth_costs must be positive and finite numbers, one for each layer"),
        (([1, 1, 1], [2, 1]), "smoothness is of 3 layers and depth_costs of 2"),
        (([], []), "smoothness must be positive"),
    ],
)
def test_bad_numbers_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        dm.planning.optimal_depth(*arguments)
    with pytest.raises(ValueError, match=message):
        dm.planning.predicted_speed_up(dm.full_depth(), *arguments)


def test_bad_distributions_and_criteria_are_refused():
    numbers = [1.0, 1.0], [2.0, 1.0]
    with pytest.raises(ValueError, match=r"criterion must be one of \['max', 'sum'\]"):
        dm.planning.optimal_depth(*numbers, criterion="mean")
    with pytest.raises(ValueError, match="criterion must be one of"):
        dm.planning.predicted_speed_up(dm.full_depth(), *numbers, criterion="mean")
    with pytest.raises(TypeError, match="distribution must be a LayerDistribution"):
        dm.planning.predicted_speed_up([0.5, 0.5], *numbers)
    with pytest.raises(TypeError, match="draws arbitrary subsets, and costs are those of depths"):
        dm.planning.predicted_speed_up(dm.sampling.fixed_size_subsets(1), *numbers)
    with pytest.raises(
        ValueError, match="gives 3 probabilities, and smoothness and depth_costs are of 2"
    ):
        dm.planning.predicted_speed_up(dm.fixed_depth([0.5, 0.2, 0.3]), *numbers)
    with pytest.raises(TypeError, match="step must be a Python integer"):
        dm.planning.predicted_speed_up(dm.full_depth(), *numbers, step=jnp.array(1))
