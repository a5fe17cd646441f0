"""The study of the theory records what it checked, searched and raced."""

import json
from pathlib import Path

import numpy as np
import pytest

import dropmuon_jax as dm
import theory
from theory_study import bounds, search
from theory_study import race as races
from theory_study.report import deviations
from theory_study.settings import Settings, check_settings

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = [
    *("--bound-steps", "4", "--bound-runs", "16", "--problems", "40", "--candidates", "200"),
    *("--race-layers", "2", "--race-ratio", "2", "--race-runs", "2", "--race-steps", "100"),
    *("--channels", "2", "--max-train", "20", "--batch-size", "10", "--num-steps", "4"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "PROBLEMS", bounds.PROBLEMS[2:3])  # the others compile as long
        patch.setattr(search, "NUM_LAYERS", (2, 3))
        patch.setitem(races.PROBLEMS, "Huber", races.PROBLEMS["coupled"])  # which ends early
        patch.setattr(races, "CHUNK", 50)
        patch.setattr(
            races, "profiles", lambda settings: {"rising": np.array([1.0, settings.race_ratio])}
        )
        theory.main([*TINY, "--output-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def record(results) -> dict:
    return json.loads((results / "theory.json").read_text())


def test_every_bound_holds_with_every_distribution(record):
    rows = [(of["problem"], of["distribution"]) for of in record["bounds"]]
    assert rows == [("cosh", name) for name in bounds.PROBABILITIES]
    for of in record["bounds"]:
        for ratio in ("one_step", "many_steps", "gradient"):
            assert 0 < of[ratio] <= 1


def test_searches_and_conditions_agree(record):
    assert [of["criterion"] for of in record["searches"]] == ["max", "sum"]
    for of in record["searches"]:
        assert of["problems"] == 40
        assert 0 < of["full_optimal"] == of["condition_holds"] < 40
        assert of["contradictions"] == 0
        assert of["beaten_by"] < 1e-6


def test_the_condition_by_sum_compares_shares_of_smoothness_with_savings():
    costs = np.array([10.0, 6.0, 5.0])  # of which depth 1 saves 40 % and depth 2 half
    assert search.full_is_optimal(np.array([4.0, 1.0, 5.0]), costs, "sum")
    assert not search.full_is_optimal(np.array([3.9, 2.1, 4.0]), costs, "sum")
    assert not search.full_is_optimal(np.array([4.0, 0.9, 5.1]), costs, "sum")


def test_races_record_prediction_beside_measurement(record):
    assert len(record["races"]) == 2 * 2 * 4
    for of in record["races"]:
        smoothness, costs = [1.0, 2.0], races.race_costs(2)
        predicted = dm.planning.predicted_speed_up(
            dm.fixed_depth(of["probabilities"]), smoothness, costs, criterion=of["criterion"]
        )
        assert of["predicted"] == pytest.approx(predicted, rel=1e-5)
        assert of["measured"] > 0
        if of["distribution"] == "full":
            assert of["predicted"] == of["measured"] == 1


def test_the_network_is_planned_from_its_own_numbers(record):
    network = record["network"]
    assert network["layers"] == ["Conv_0", "Dense_0"]
    assert list(network["fit"]) == ["Conv_0/kernel", "Dense_0/kernel"]
    assert network["flops"][0] > network["flops"][1] > 0
    for criterion in ("max", "sum"):
        name, smoothness = f"best by {criterion}", network["smoothness"][criterion]
        best = dm.planning.optimal_depth(smoothness, network["flops"], criterion=criterion)
        probabilities = network["probabilities"][name]
        np.testing.assert_allclose(probabilities, best.probabilities(0, 2), rtol=1e-6)
        assert network["predicted_speed_ups"][name][criterion] >= 1


def test_study_leaves_a_plot_and_no_path(results, record):
    assert str(results) not in (results / "theory.json").read_text()
    assert {"python", "packages", "jax_platform"} < set(record["environment"])
    assert (results / "theory.png").stat().st_size > 10_000


def test_deviations_tell_the_worst_factor_and_who_is_right():
    def outcome(predicted, measured):
        return races.Outcome("Huber", "flat", "max", "uniform", [0.5, 0.5], predicted, measured)

    first, *_ = deviations([outcome(1.2, 1.1), outcome(1.5, 0.5), outcome(0.5, 0.9)])
    assert first == (
        "Huber, max: measured and predicted speed-ups differ by up to 3.00×, and agree in 2 of 3 "
        "on whether full steps win."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"problems": 0}, "--problems must be at least 1, got 0"),
        ({"race_layers": 1}, "--race-layers must be at least 2"),
        ({"race_ratio": 1.0}, "--race-ratio must exceed 1"),
        ({"num_steps": 2}, "--num-steps must be at least 3"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"tolerance": 1.0}, r"--tolerance must lie in \(0, 1\)"),
        ({"learning_rate": 0.0}, "--learning-rate must be positive"),
        ({"channels": ()}, "--channels needs at least one value"),
        ({"channels": (0,)}, "--channels must be positive"),
        ({"batch_size": 2000}, "--batch-size exceeds the 1000 training images"),
        ({"output_dir": Path(__file__)}, "--output-dir must be a folder"),
    ],
)
def test_bad_argument_of_the_study_ends_in_a_sentence_that_names_it(arguments, message):
    with pytest.raises(SystemExit, match=message):
        check_settings(Settings(**{"output_dir": Path(), **arguments}))
