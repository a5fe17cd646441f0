"""The study of estimators has exact full gradients, fair runs, and reports what it measured."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropmuon_jax as dm
import estimator_error
from estimator_study import all_layers, dropped_layers, problems, report
from estimator_study.dropped_layers import EMA, RULES, Rule, previous_point
from estimator_study.report import rank, rules_of, verdict, waking_by_noise
from estimator_study.settings import PROBLEMS, Settings, check_settings

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = [
    *("--problems", "quadratic", "--num-samples", "20", "--batch-size", "2", "--num-steps", "6"),
    *("--radii", "0.01", "--decays", "0.5", "0.9", "--num-seeds", "2", "--layer-steps", "12"),
    *("--layer-radii", "0.05", "--layer-noises", "0.3", "--couplings", "1"),
    *("--layer-decays", "0.9", "--layer-seeds", "2"),
]
ESTIMATORS = {name: all_layers.ESTIMATORS[name] for name in ("gradient", "EMA", "MVR-1")}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:  # a few, because each is a program to compile
        patch.setattr(dropped_layers, "RULES", (EMA, Rule(1), Rule(1, on_waking="restart")))
        patch.setattr(problems, "NUM_LAYERS", 2)
        patch.setattr(report, "VARIANTS", (1,))
        patch.setattr(all_layers, "ESTIMATORS", ESTIMATORS)
        estimator_error.main([*TINY, "--output-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def record(results) -> dict:
    return json.loads((results / "estimator_error.json").read_text())


@pytest.mark.parametrize("name", PROBLEMS)
def test_full_gradient_is_the_mean_of_the_samples(name):
    problem = problems.make_problem(name, 30, seed=1)
    of_samples = jax.jit(jax.vmap(jax.grad(problem.loss), (None, 0)))(
        problem.start, jnp.arange(problem.num_samples)[:, None]
    )
    np.testing.assert_allclose(
        problem.gradient(problem.start), of_samples.mean(0), rtol=1e-4, atol=1e-5
    )
    assert np.std(of_samples, axis=0).max() > 0.1


def test_full_gradient_of_the_layers_is_the_mean_of_the_samples():
    problem = problems.make_layered_quadratic(1)
    of_samples = jax.jit(jax.vmap(jax.grad(problem.loss), (None, 0, None, None)))(
        problem.start, jnp.arange(problem.num_samples), 0.7, 0.4
    )
    for name, of_leaf in problem.gradient(problem.start, 0.4).items():
        np.testing.assert_allclose(of_leaf, of_samples[name].mean(0), atol=1e-5)
        assert np.std(of_samples[name], axis=0).max() > 0.1


def test_coupling_is_what_connects_the_layers():
    problem = problems.make_layered_quadratic(1)
    moved = problem.start | {"layer_5": problem.start["layer_5"] + 1}
    changes = [
        float(
            jnp.abs(
                problem.gradient(moved, coupling)["layer_0"]
                - problem.gradient(problem.start, coupling)["layer_0"]
            ).max()
        )
        for coupling in (0.0, 0.5, 1.0)
    ]
    assert changes[0] == 0
    assert changes[1] == pytest.approx(changes[2] / 2, rel=1e-3)
    assert changes[2] > 0.05


def state_after(last_steps, count):
    params = {f"layer_{i}": jnp.full((2,), float(i)) for i in range(len(last_steps))}
    state = dm.mvr_momentum().init(params)
    kept = state.prev_params._replace(
        params=jax.tree.map(lambda leaf: leaf - 10, params),
        last_step=jnp.array(last_steps),
        count=jnp.array(count),
    )
    return params, state._replace(prev_params=kept)


@pytest.mark.parametrize(
    ("point", "old"),
    [
        ("own step", [False, True, True]),  # those that are active now
        ("last step", [False, False, True]),  # those that moved in the step before
        ("all own steps", [True, True, True]),
    ],
)
def test_previous_point_of_a_rule_has_these_layers_at_old_parameters(point, old):
    params, state = state_after([3, 4, 6], count=7)
    mask = {"layer_0": False, "layer_1": True, "layer_2": True}
    at = previous_point(point, state, params, mask)
    assert [bool((at[name] != params[name]).all()) for name in params] == old


def test_rules_do_not_differ_if_no_layer_sleeps():
    params, state = state_after([6, 6, 6], count=7)
    points = [
        previous_point(point, state, params, dict.fromkeys(params, True))
        for point in dropped_layers.POINTS
    ]
    for name in params:
        np.testing.assert_array_equal(points[0][name], points[1][name])
        np.testing.assert_array_equal(points[0][name], points[2][name])


def test_own_last_step_is_the_pair_of_the_package():
    problem = problems.make_layered_quadratic(0)
    layers = dm.layers_by_path(problem.start, sorted(problem.start))
    params, mask = problem.start, layers.mask(3)
    state = dm.mvr_momentum().init(jax.tree.map(lambda leaf: leaf + 1, params))
    args = (5, 0.3, 0.8)
    _, (_, expected) = dm.masked_value_and_grad_pair(problem.loss)(
        params, dm.prev_params(state, params), *args, layer_mask=mask
    )
    at = previous_point("own step", state, params, mask)
    _, actual = dm.masked_value_and_grad(problem.loss)(at, *args, layer_mask=mask)
    for name in params:
        np.testing.assert_array_equal(actual[name], expected[name])


@pytest.fixture(scope="module")
def common():
    settings = Settings(
        Path(), num_samples=50, num_steps=200, radii=(0.1,), decays=(0.95,), num_seeds=2
    )
    problem = problems.make_problem("quadratic", 50, seed=0)
    return all_layers.measure(problem, settings, "common", ESTIMATORS)


def test_variance_reduction_follows_moving_iterates_where_an_average_lags(common):
    of_gradient, of_average, of_mvr = (common[name].steady[0, 0] for name in ESTIMATORS)
    assert of_mvr < 0.7 * of_average < of_average < of_gradient


def test_first_error_of_mvr_is_that_of_its_minibatch(common):
    of_gradient, of_mvr = (common[name].of_steps[0, 0, :, 0] for name in ("gradient", "MVR-1"))
    np.testing.assert_allclose(of_gradient, of_mvr, rtol=1e-5)
    assert of_gradient[0] != of_gradient[1]  # of two seeds


def of_configurations(*errors):
    return dict.fromkeys(dropped_layers.Measured._fields, np.array([errors]))


def test_ranks_are_by_ratios_to_the_best_rule_and_ties_share_a_place():
    first, second = Rule(1), Rule(1, on_waking="restart")
    dropped = {
        EMA: of_configurations(4.0, 2.0, 2.0),
        first: of_configurations(1.0, 3.0, 2.0),
        second: of_configurations(2.0, 1.0, 2.0),
    }
    ranks = rank(rules_of(1, dropped), dropped, "active")
    assert [(r.rule, r.firsts, r.median, r.worst) for r in ranks] == [
        (first, 2, 1.0, 3.0),
        (second, 2, 1.0, 2.0),
    ]
    assert verdict(1, dropped) == (
        "MVR-1: 'own step, correct' has the smallest median ratio of its error to the best "
        "rule's, 1.000, and is best in 2 of 3 configurations; then comes 'own step, restart', "
        "1.000. The error of the EMA is 1.00 × its own in the median, and smaller in 1."
    )


def test_rules_of_waking_are_compared_at_equal_noise():
    settings = Settings(
        Path(), layer_radii=(0.1, 0.2), layer_noises=(1.0, 2.0), couplings=(1.0,), layer_decays=(0,)
    )
    dropped = {
        Rule(1): of_configurations(1.0, 1.0, 2.0, 1.0),
        Rule(1, on_waking="decay"): of_configurations(2.0, 3.0, 16.0, 3.0),
    }
    ratios = waking_by_noise(settings, dropped, Rule(1, on_waking="decay"), "active")
    assert ratios == pytest.approx({1.0: 4.0, 2.0: 3.0})


def test_rules_are_every_variant_point_and_rule_of_waking():
    assert len(RULES) == len(set(RULES)) == 1 + 2 * 3 * 3
    assert len({rule.name for rule in RULES}) == 1 + 3 * 3


def test_study_records_what_its_tables_say(record):
    rows = {(row["trajectory"], row["estimator"]): row for row in record["all_layers"]}
    assert list(rows) == [
        *(("common", name) for name in ("gradient", "EMA", "MVR-1")),
        *(("own", name) for name in ("EMA", "MVR-1")),
    ]
    assert np.array(rows["own", "EMA"]["steady"]).shape == (1, 2)
    assert record["configurations"] == [
        {"radius": 0.05, "noise": 0.3, "coupling": 1.0, "decay": 0.9}
    ]
    _, correct, restart = (np.mean(rule["active"]) for rule in record["dropped_layers"])
    assert correct != restart
    by_error = next(ranks for ranks in record["ranks"] if ranks["measure"] == "active")
    ratios = {of["rule"]["on_waking"]: of["median"] for of in by_error["rules"]}
    least = min(correct, restart)
    assert ratios == pytest.approx({"correct": correct / least, "restart": restart / least})
    assert list(ratios.values()) == sorted(ratios.values())


def test_study_leaves_plots_and_no_path(results, record):
    assert str(results) not in (results / "estimator_error.json").read_text()
    assert "output_dir" not in record["arguments"]
    assert {"python", "packages", "jax_platform"} < set(record["environment"])
    plots = sorted(path.stem for path in results.glob("*.png"))
    assert plots == ["dropped_layers", "estimator_error_quadratic"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"problems": ()}, "--problems needs at least one value"),
        ({"radii": (0.1, 0.1)}, "--radii names a value twice"),
        ({"radii": (0.0,)}, "--radii must be positive"),
        ({"layer_noises": (-1.0,)}, "--layer-noises must be positive"),
        ({"decays": (1.0,)}, r"--decays must lie in \[0, 1\), got"),
        ({"layer_decays": (-0.1,)}, r"--layer-decays must lie in \[0, 1\)"),
        ({"couplings": (1.5,)}, r"--couplings must lie in \[0, 1\]"),
        ({"num_steps": 1}, "--num-steps must be at least 2"),
        ({"layer_seeds": 0}, "--layer-seeds must be at least 1"),
        ({"seed": -1}, "--seed must not be negative"),
        ({"output_dir": Path(__file__)}, "--output-dir must be a folder"),
    ],
)
def test_bad_argument_of_the_study_ends_in_a_sentence_that_names_it(arguments, message):
    with pytest.raises(SystemExit, match=message):
        check_settings(Settings(**{"output_dir": Path(), **arguments}))
