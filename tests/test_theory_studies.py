"""The studies of theory have problems with the constants they claim, and measure what they say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import convergence_rates
import dropmuon_jax as dm
import estimator_error
from analysis.descent import descend, ratios
from analysis.network import sample_smoothness, smoothness_of_layers
from analysis.race import race
from analysis.search import full_is_optimal, search
from analysis.smooth_problems import coupled, huber, hyperbolic, separable
from convergence_rates import SHAPE, horizons, late_average, nonconvex, slopes, star_convex


@pytest.mark.parametrize("make", [separable, coupled, hyperbolic, huber])
def test_expectations_over_all_sequences_of_depths_obey_the_bounds(make):
    # b = 3 depths and K = 4 steps: 81 runs, each with its probability.
    depths = np.array(list(itertools.product(range(3), repeat=4)))
    with jax.enable_x64(True):
        problem = make([0.3, 4.0, 1.0], 0)
        descent = descend(problem)
        for chances in ([1.0, 0.0, 0.0], [0.1, 0.2, 0.7], [0.075, 0.925, 0.0]):  # the best by max
            weights = np.array(chances)[depths].prod(1)
            found = ratios(problem, descent, np.array(chances), depths, weights)
            assert 0.05 < found.one_step <= 1 + 1e-9  # not by constants far too large
            assert 0.001 < found.many_steps <= 1 + 1e-9
            assert 0 < found.gradient <= 1
            if make is separable:  # a quadratic with these constants: nothing is given away
                assert found.one_step == pytest.approx(1)


@pytest.mark.parametrize("criterion", ["max", "sum"])
def test_searches_and_conditions_agree(criterion):
    found = search(criterion, 40, 300, seed=0)
    assert 0 < found["full_optimal"] == found["condition_holds"] < 40
    assert found["contradictions"] == 0
    assert found["beaten_by"] < 1e-6


def test_the_condition_by_sum_compares_shares_of_smoothness_with_savings():
    costs = np.array([10.0, 6.0, 5.0])  # of which depth 1 saves 40 % and depth 2 half
    assert full_is_optimal(np.array([4.0, 1.0, 5.0]), costs, "sum")
    assert not full_is_optimal(np.array([3.9, 2.1, 4.0]), costs, "sum")
    assert not full_is_optimal(np.array([4.0, 0.9, 5.1]), costs, "sum")


def test_a_slow_race_comes_out_as_predicted_by_the_largest_wait():
    uniform, best, *_ = race("Huber", np.array([2.0, 1.0]), 2, 1000, seed=0)
    assert uniform["measured"] == pytest.approx([uniform["predicted"]] * 2, rel=0.1)
    assert best["measured"] == [1.0, 1.0]
    assert best["predicted"] == 1


@pytest.mark.parametrize("problem", [nonconvex(1), star_convex(4.0, 1)], ids=["nonconvex", "star"])
def test_the_noise_of_a_gradient_has_mean_zero_and_moves_with_the_parameters(problem):
    samples = jax.random.normal(jax.random.key(0), (8000, 2, *SHAPE))
    gradient = jax.jit(jax.vmap(jax.grad(problem.loss), (None, 0)))
    full = jax.jit(jax.grad(problem.value))
    start = jnp.asarray(problem.start, jnp.float32)
    near = start + 0.1
    here, there = gradient(start, samples), gradient(near, samples)
    np.testing.assert_allclose(here.mean(0), full(start), atol=0.06)
    noise = np.linalg.norm(here - full(start), axis=(1, 2))
    moved = np.linalg.norm(here - there - full(start) + full(near), axis=(1, 2))
    assert 0 < moved.mean() < 0.3 * 0.1 * noise.mean()


def test_the_minima_are_zero_and_the_star_convex_one_lies_in_the_ball():
    for problem in (nonconvex(0), star_convex(8.0, 0)):
        assert problem.value(problem.minimum) == 0
        assert problem.value(problem.start) > 0.05
        assert np.linalg.norm(problem.minimum, 2) < 0.51 * convergence_rates.BALL


def test_late_averages_of_a_power_keep_its_exponent_and_forget_the_start():
    at = horizons(100_000)
    steps = np.arange(1, 100_001)
    power = steps**-0.25 * np.array([[1.0], [3.0]])
    far = power + 1000 * (steps < 100)
    np.testing.assert_allclose(slopes(at, late_average(far)[:, at - 1]), [-0.25] * 2, atol=1e-3)
    np.testing.assert_allclose(late_average(np.arange(1.0, 6)), [1, 2, 2.5, 3.5, 4])


def test_variance_reduction_follows_moving_iterates_where_an_average_lags(tmp_path):
    settings = estimator_error.Errors(
        output_dir=tmp_path, num_steps=200, radii=(0.1,), decays=(0.95,), num_seeds=2
    )
    errors = estimator_error.measure(settings, "quadratic")
    assert max(errors["MVR-1"][0][0]) < 0.7 * min(errors["average"][0][0])


def test_two_gradients_of_the_same_batch_show_its_smoothness_and_different_ones_the_noise():
    def loss(params, scale):
        return scale * sum(jnp.sum(x**2) for x in params.values()) / 2

    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tracker = dm.planning.track_smoothness(dm.norms.euclidean_norm())
    scales = [1.0, 2.0, 1.0, 2.0]
    samples = sample_smoothness(loss, optax.sgd(0.1), tracker, params, scales)
    for path in params:
        np.testing.assert_allclose(samples["same batch"][path].smoothness, scales[1:], rtol=1e-5)
        assert (samples["different batches"][path].smoothness > 3).all()
    constant = sample_smoothness(loss, optax.sgd(0.1), tracker, params, [3.0] * 4)
    for of_kind in constant.values():
        of_layers = smoothness_of_layers(of_kind, dm.layers_by_path(params, [("a", "b")]))
        np.testing.assert_allclose([of_layers["max"], of_layers["sum"]], [[3.0], [6.0]], rtol=1e-5)
