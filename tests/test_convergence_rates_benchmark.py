"""The study of rates recovers known slopes, and runs what it says."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convergence_rates
from rates_study.problems import BALL, SHAPE, nonconvex, star_convex
from rates_study.report import chosen, fit
from rates_study.runs import NONCONVEX, STAR_CONVEX, gap, gradient_norm, run
from rates_study.settings import Settings, check_settings
from rates_study.slopes import fit_slope, horizons, late_average, running_average

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = [
    *("--horizon", "40", "--measure-every", "4", "--num-seeds", "2", "--decades", "1"),
    *("--radii", "0.3", "--powers", "4"),
]
METHODS = {name: NONCONVEX[name] for name in ("EMA", "MVR-2")}  # the others compile as long


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence_rates, "NONCONVEX", METHODS)
        convergence_rates.main([*TINY, "--output-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def record(results) -> dict:
    return json.loads((results / "convergence_rates.json").read_text())


@pytest.mark.parametrize("exponent", [-0.25, -1 / 3, -0.5])
def test_a_known_slope_is_recovered_and_lies_in_its_interval(exponent):
    at = horizons(10_000, 10, decades=1.5)
    factors = np.random.default_rng(0).lognormal(sigma=0.2, size=(40, 1))
    noise = np.random.default_rng(1).lognormal(sigma=0.1, size=(40, len(at)))
    slope = fit_slope(at, 7 * at**exponent * factors * noise)
    assert slope.value == pytest.approx(exponent, abs=0.02)
    assert slope.low < exponent < slope.high
    assert 0 < slope.high - slope.low < 0.06
    exact = fit_slope(at, 7 * at**exponent * factors)
    np.testing.assert_allclose([exact.value, exact.low, exact.high], exponent)


def test_averages_of_a_power_keep_its_exponent_and_the_late_one_forgets_the_start():
    steps = np.arange(1, 100_001)
    at = horizons(100_000, 1, decades=1)
    power = (steps**-0.25)[None]
    for average in (running_average, late_average):
        assert fit_slope(at, average(power)[:, at - 1]).value == pytest.approx(-0.25, abs=1e-3)
    far = power + 1000 * (steps < 100)
    assert fit_slope(at, running_average(far)[:, at - 1]).value < -0.5
    assert fit_slope(at, late_average(far)[:, at - 1]).value == pytest.approx(-0.25, abs=1e-3)
    np.testing.assert_allclose(late_average(np.arange(1.0, 6)), [1, 2, 2.5, 3.5, 4])


def test_horizons_are_steps_that_were_measured():
    at = horizons(30_000, 10, decades=1.5)
    assert at[-1] == 30_000
    assert at[0] == pytest.approx(30_000 / 10**1.5, rel=0.02)
    assert len(at) == 16
    assert not np.any(at % 10)


@pytest.mark.parametrize(
    "problem", [nonconvex(0.5, 0.3, 1), star_convex(4.0, 0.5, 0.3, 1)], ids=["nonconvex", "star"]
)
def test_the_noise_of_a_gradient_has_mean_zero_and_moves_with_the_parameters(problem):
    samples = jax.vmap(problem.sample)(jax.random.split(jax.random.key(0), 4000))
    gradient = jax.jit(jax.vmap(jax.grad(problem.loss), (None, 0)))
    full = jax.jit(jax.grad(problem.value))
    near = problem.start + 0.1 * jnp.ones(SHAPE)
    here, there = gradient(problem.start, samples), gradient(near, samples)
    np.testing.assert_allclose(here.mean(0), full(problem.start), atol=0.04)
    noise = np.linalg.norm(here - full(problem.start), axis=(1, 2))
    moved = np.linalg.norm(here - there - full(problem.start) + full(near), axis=(1, 2))
    assert 0 < moved.mean() < 0.3 * 0.1 * noise.mean()


def test_the_minima_are_zero_and_the_star_convex_one_lies_in_the_ball():
    for problem in (nonconvex(1.0, 0.3, 0), star_convex(8.0, 1.0, 0.3, 0)):
        assert problem.value(problem.minimum) == 0
        assert problem.value(problem.start) > 0.05
        assert gradient_norm(problem, problem.minimum) == 0
        assert np.linalg.norm(problem.minimum, 2) < 0.51 * BALL


def test_gradient_norm_is_the_sum_of_the_singular_values():
    problem = nonconvex(1.0, 0.3, 0)
    expected = np.linalg.svd(jax.grad(problem.value)(problem.start))[1].sum()
    assert gradient_norm(problem, problem.start) == pytest.approx(expected, rel=1e-5)


def test_variance_reduction_without_noise_finds_the_minimum_and_seeds_agree():
    settings = Settings(Path(), horizon=200, noise=0.0, num_seeds=2)
    problem = star_convex(2.0, 0.0, 0.3, 0)
    (measured,) = run(settings, problem, STAR_CONVEX["MVR-1"], (BALL,), gap)
    np.testing.assert_array_equal(measured[0], measured[1])
    assert measured[0, -1] < 0.02 * measured[0, 0]


def test_the_radius_that_is_best_in_the_middle_is_chosen():
    settings = Settings(Path(), horizon=80)
    ones = np.ones((2, 8))
    fits = [
        fit(settings, ones * value, problem="p", method=method, radius=radius, bound=-0.5)
        for method, radius, value in (("a", 1.0, 3.0), ("a", 2.0, 2.0), ("b", 1.0, 1.0))
    ]
    assert [of.radius for of in chosen(fits).values()] == [2.0, 1.0]


def test_study_records_every_run_with_its_slopes(record):
    runs = [(of["problem"], of["method"], of["radius"]) for of in record["fits"]]
    assert runs == [
        *(("non-convex", name, 0.3) for name in METHODS),
        *(("star-convex, p = 4", name, BALL) for name in STAR_CONVEX),
    ]
    assert sum(of["chosen"] for of in record["fits"]) == len(METHODS) + len(STAR_CONVEX)
    for of in record["fits"]:
        for name, means in of["means"].items():
            expected = np.polyfit(np.log(of["horizons"]), np.log(means), 1)[0]
            slope = of["slopes"][name]
            assert slope["value"] == pytest.approx(expected)
            assert slope["low"] <= slope["high"]
    assert record["fits"][-1]["predicted"] == pytest.approx(-2 / 3)


def test_study_leaves_a_plot_and_no_path(results, record):
    assert str(results) not in (results / "convergence_rates.json").read_text()
    assert "output_dir" not in record["arguments"]
    assert {"python", "packages", "jax_platform"} < set(record["environment"])
    assert (results / "convergence_rates.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radii": ()}, "--radii needs at least one value"),
        ({"powers": (2.0, 2.0)}, "--powers names a value twice"),
        ({"radii": (0.0,)}, "--radii must be positive"),
        ({"powers": (1.5,)}, "--powers must be at least 2"),
        ({"measure_every": 0}, "--measure-every must be at least 1"),
        ({"num_seeds": 1}, "--num-seeds must be at least 2"),
        ({"decades": 0.0}, "--decades must be positive"),
        ({"seed": -1}, "--seed must not be negative"),
        ({"noise_slope": -1.0}, "--noise-slope must not be negative"),
        ({"mvr_decay": 1.0}, r"--mvr-decay must lie in \[0, 1\)"),
        ({"horizon": 79}, "--horizon must be at least 8 × --measure-every = 80, got 79"),
        ({"output_dir": Path(__file__)}, "--output-dir must be a folder"),
    ],
)
def test_bad_argument_of_the_study_ends_in_a_sentence_that_names_it(arguments, message):
    with pytest.raises(SystemExit, match=message):
        check_settings(Settings(**{"output_dir": Path(), **arguments}))
