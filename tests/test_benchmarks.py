"""The benchmarks run, measure what they say, and refuse what they cannot do."""

import importlib.util
import json
import statistics
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import depth_cost
import race
from images import load_images
from models import CNN
from racing import Race, Run
from settings import METHODS, Settings, check_settings
from steps_by_depth import make_subject, step_by_hand, step_of_package
from targets import NEVER, first_reached, median_and_spread, summarise

TINY = ["--max-train", "60", "--batch-size", "20", "--channels", "2", "--epochs", "2"]
PLOTS = ["accuracy_by_seconds", "accuracy_by_steps", "sampling", "step_time_by_depth"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder of a tiny race between a method that drops layers and two that do not."""
    folder = tmp_path_factory.mktemp("results")
    methods = ["--methods", "muon", "drop_muon_epoch_shift", "optax_muon"]
    race.main([*TINY, *methods, "--output-dir", str(folder), "--seeds", "0", "1"])
    return folder


@pytest.fixture(scope="module")
def record(results) -> dict:
    return json.loads((results / "race.json").read_text())


@pytest.fixture(scope="module")
def tiny_race() -> Race:
    settings = Settings(Path(), max_train=60, batch_size=20, channels=(2, 3), epochs=2)
    return Race(settings, CNN((2, 3)), load_images("mnist5k", max_train=60))


def test_race_records_a_curve_for_each_method_and_seed(record):
    curves = {(curve["method"], curve["seed"]): curve for curve in record["curves"]}
    assert len(curves) == len(record["curves"]) == 6
    for curve in curves.values():
        # Two epochs of three steps, an evaluation before them and one after each.
        assert curve["steps"] == [0, 1, 2, 3, 4, 5, 6]
        assert len(curve["depths"]) == 6
        assert curve["seconds"] == sorted(curve["seconds"])
        for name in ("train_accuracy", "test_accuracy", "train_loss"):
            assert len(curve[name]) == 7
    assert set(curves["muon", 0]["depths"]) == {0}
    assert set(curves["drop_muon_epoch_shift", 0]["depths"]) == {0, 1}


def test_methods_start_from_the_same_point_of_their_seed(record):
    for seed in (0, 1):
        starts = [
            (curve["train_accuracy"][0], curve["test_accuracy"][0], curve["train_loss"][0])
            for curve in record["curves"]
            if curve["seed"] == seed
        ]
        assert len(set(starts)) == 1


def test_race_records_what_it_was_measured_with(record):
    assert {"python", "packages", "jax_platform", "device_kind", "cpu_count", "git_commit"} < set(
        record["environment"]
    )
    assert record["arguments"]["batch_size"] == 20
    for name in ("compile_seconds_by_depth", "step_seconds_by_depth"):
        lengths = {method: len(seconds) for method, seconds in record[name].items()}
        assert lengths == {"muon": 1, "drop_muon_epoch_shift": 2, "optax_muon": 1}


def test_race_records_the_sampling_distribution_of_each_epoch(record):
    table = record["probability_of_depth_by_epoch"]
    assert list(table) == ["drop_muon_epoch_shift"]
    first, second = table["drop_muon_epoch_shift"]
    assert sum(first) == pytest.approx(1)
    assert first[0] > second[0]


def test_race_leaves_plots_and_no_path(results):
    text = (results / "race.json").read_text()
    assert str(results) not in text
    assert str(Path.home()) not in text
    assert "data_dir" not in text
    assert sorted(path.stem for path in results.glob("*.png")) == PLOTS
    for plot in results.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert plot.stat().st_size > 10_000


def test_every_method_gets_the_same_parameters_and_batches(tiny_race):
    runners = [tiny_race.start(name, 5) for name in METHODS]
    for runner in runners[1:]:
        chex.assert_trees_all_equal(runner.params, runners[0].params)
        np.testing.assert_array_equal(runner.batches, runners[0].batches)
    other_seed = tiny_race.start("muon", 6)
    assert not np.array_equal(other_seed.batches, runners[0].batches)


def test_an_epoch_is_a_permutation_of_the_training_images(tiny_race):
    batches = tiny_race.batches(0)
    assert batches.shape == (6, 20)
    for epoch in (batches[:3], batches[3:]):
        np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(60))


def test_evaluation_counts_every_image_once(tiny_race, monkeypatch):
    monkeypatch.setattr("racing.EVALUATION_BATCH", 25)
    params, data = tiny_race.init_params(0), tiny_race.data
    accuracy, loss = tiny_race.evaluate(params, data.train_images, data.train_labels)
    logits = tiny_race.model.apply({"params": params}, data.train_images)
    assert accuracy == pytest.approx(float((logits.argmax(-1) == data.train_labels).mean()))
    likelihood = jax.nn.log_softmax(logits)[np.arange(60), data.train_labels]
    assert loss == pytest.approx(float(-likelihood.mean()), rel=1e-5)


def test_mnist5k_is_split_by_class():
    images = load_images("mnist5k")
    assert images.train_images.shape == (4000, 28, 28, 1)
    assert images.test_images.shape == (1000, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(images.train_labels), [400] * 10)
    np.testing.assert_array_equal(np.bincount(images.test_labels), [100] * 10)
    assert images.train_images.mean() == pytest.approx(0, abs=1e-4)
    assert images.train_images.std() == pytest.approx(1, abs=1e-4)


def _run(method, seed, seconds, test_accuracy) -> Run:
    steps = list(range(0, 10 * len(seconds), 10))
    return Run(method, seed, steps, seconds, [0.0] * len(seconds), test_accuracy)


def test_first_reached_is_the_first_evaluation_at_or_above_the_target():
    run = _run("muon", 0, [0.0, 1.5, 2.5, 4.0], [0.1, 0.8, 0.7, 0.9])
    assert first_reached(run, "test", 0.8) == (1.5, 10)
    assert first_reached(run, "test", 0.75) == (1.5, 10)
    assert first_reached(run, "test", 0.81) == (4.0, 30)
    assert first_reached(run, "test", 0.95) == (NEVER, NEVER)


def test_speed_up_pairs_seeds_and_leaves_out_those_who_never_arrived():
    runs = [
        _run("muon", 0, [0.0, 4.0, 8.0], [0.1, 0.8, 1.0]),
        _run("muon", 1, [0.0, 6.0, 9.0], [0.1, 0.8, 0.9]),
        _run("adamw", 0, [0.0, 2.0, 3.0], [0.1, 0.7, 0.8]),
        _run("adamw", 1, [0.0, 2.0, 3.0], [0.1, 0.8, 0.8]),
    ]
    settings = Settings(
        Path(), methods=("muon", "adamw"), seeds=(0, 1), targets=(0.8,), targets_of_best=(1.0,)
    )
    summaries = {(s.method, s.target.split, s.target.label): s for s in summarise(settings, runs)}
    absolute = summaries["adamw", "test", "80 %"]
    assert absolute.seconds == [3.0, 2.0]
    assert absolute.speed_ups == [4.0 / 3.0, 3.0]
    relative = summaries["adamw", "test", "100 % of Muon's best"]
    assert relative.target.accuracy == {0: 1.0, 1: 0.9}
    assert relative.num_reached == 0
    assert relative.speed_ups == []
    assert median_and_spread(relative.seconds) == "not reached"


def test_spread_shows_the_seeds_that_never_arrived():
    assert median_and_spread([1.0, 3.0, 2.0]) == "2.0 (1.0–3.0)"
    assert median_and_spread([1.0, NEVER, 2.0]) == "2.0 (1.0–never)"
    assert median_and_spread([1.0, NEVER, NEVER]) == "1 of 3 seeds"
    assert median_and_spread([1.0, NEVER]) == "1 of 2 seeds"
    assert statistics.median([1.0, NEVER]) == NEVER


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="an extra of the benchmarks"
)
@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_data_set_that_is_not_there_ends_in_advice(dataset, tmp_path):
    arguments = ["--dataset", dataset, "--data-dir", str(tmp_path), "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=rf"{dataset} is not prepared .* --data-dir, .*--download"):
        race.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": ()}, "--seeds needs at least one value"),
        ({"seeds": (1, 1)}, "--seeds names a value twice"),
        ({"seeds": (-1,)}, "--seeds must not be negative"),
        ({"methods": ()}, "--methods needs at least one value"),
        ({"channels": ()}, "--channels needs at least one value"),
        ({"channels": (8, 0)}, "--channels must be positive"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"eval_every": 0}, "--eval-every must be at least 1"),
        ({"max_train": 0}, "--max-train must be at least 1"),
        ({"learning_rate": -0.1}, "--learning-rate must be positive"),
        ({"adamw_learning_rate": 0.0}, "--adamw-learning-rate must be positive"),
        ({"decay": 1.0}, r"--decay must lie in \[0, 1\), got 1.0"),
        ({"targets": (0.9, 1.5)}, r"--targets must lie in \(0, 1\], got 1.5"),
        ({"targets_of_best": (0.0,)}, r"--targets-of-best must lie in \(0, 1\]"),
        ({"output_dir": Path(__file__)}, "--output-dir must be a folder"),
    ],
)
def test_bad_argument_ends_in_a_sentence_that_names_it(arguments, message):
    with pytest.raises(SystemExit, match=message):
        check_settings(Settings(**{"output_dir": Path(), **arguments}))


def test_batch_larger_than_the_training_set_is_refused(tmp_path):
    arguments = ["--max-train", "60", "--batch-size", "61", "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="--batch-size is 61, and there are only 60"):
        race.main(arguments)


def test_unknown_method_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        race.main(["--methods", "adagrad", "--output-dir", str(tmp_path)])
    shown = capsys.readouterr().err
    assert "--methods" in shown
    assert "adagrad" in shown


@pytest.mark.parametrize(
    ("name", "depths"), [("cnn", (1, 2)), ("mlp", (0, 1)), ("transformer", (4, 5))]
)
def test_step_costs_what_it_would_if_only_the_active_layers_were_trainable(name, depths):
    subject = make_subject(name, batch_size=4, channels=(4, 8), widths=(16,), transformer_width=16)
    flops = []
    for depth in depths:
        package, by_hand = step_of_package(subject, depth), step_by_hand(subject, depth)
        flops.append(package.flops())
        assert package.flops() == pytest.approx(by_hand.flops(), rel=0.02)
        assert package.temporary_bytes() == pytest.approx(by_hand.temporary_bytes(), rel=0.02)
        assert package.bytes_accessed() == pytest.approx(by_hand.bytes_accessed(), rel=0.02)
    assert flops[0] > flops[1]


def test_step_by_hand_trains_as_the_package_does():
    subject = make_subject("mlp", batch_size=4, channels=(), widths=(8,), transformer_width=4)
    package, by_hand = step_of_package(subject, 1), step_by_hand(subject, 1)
    for _ in range(3):
        package, by_hand = package.run(), by_hand.run()
    params, trained = package.arguments[0], by_hand.arguments[0]
    chex.assert_trees_all_close({name: params[name] for name in trained}, trained, rtol=1e-5)


def test_depth_cost_leaves_every_gap_and_a_plot(tmp_path):
    arguments = ["--models", "mlp", "--widths", "8", "--batch-size", "2", "--repetitions", "2"]
    depth_cost.main([*arguments, "--output-dir", str(tmp_path)])
    text = (tmp_path / "depth_cost.json").read_text()
    costs = json.loads(text)["costs"]
    assert [cost["depth"] for cost in costs] == [0, 1]
    for cost in costs:
        assert cost["flops_gap"] == pytest.approx(cost["flops"] / cost["flops_by_hand"] - 1)
        for name in ("flops_gap", "memory_gap", "traffic_gap"):
            assert abs(cost[name]) <= depth_cost.ALLOWED_GAP
        assert cost["seconds"] > 0
    assert str(tmp_path) not in text
    assert (tmp_path / "depth_cost.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models"], "--models needs at least one value"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--repetitions", "-1"], "--repetitions must not be negative"),
        (["--transformer-width", "30"], "--transformer-width must be a multiple of 4"),
    ],
)
def test_depth_cost_refuses_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        depth_cost.main([*arguments, "--output-dir", str(tmp_path)])
