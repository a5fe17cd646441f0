"""The benchmarks run, measure what they say, and refuse what they cannot do."""

import importlib.util
import json
import statistics
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import dropmuon_jax as dm
import race
from images import load_images
from methods import make_step
from models import CNN
from plots import STYLES
from racing import Race, Run
from settings import LEARNING_RATES, METHODS, Settings, check_settings, learning_rate
from targets import NEVER, first_reached, median_and_spread, summarise

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
    it = Race(settings, CNN((2, 3)), load_images("mnist5k", max_train=60))
    it.measured_costs += [3.0, 2.0, 1.0]  # without measuring them
    return it


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


@pytest.fixture(scope="module")
def scion_and_gluon(tmp_path_factory) -> dict:
    """The record of a tiny race without Muon."""
    folder = tmp_path_factory.mktemp("scion_and_gluon")
    tiny = [*TINY, "--seeds", "0"]
    tiny += ["--methods", "scion", "gluon", "drop_scion", "drop_muon_with_mvr"]
    race.main([*tiny, "--output-dir", str(folder)])
    assert sorted(path.stem for path in folder.glob("*.png")) == PLOTS
    return json.loads((folder / "race.json").read_text())


def test_scion_and_gluon_race_whole_and_with_dropped_layers(scion_and_gluon):
    depths = {curve["method"]: curve["depths"] for curve in scion_and_gluon["curves"]}
    assert depths["scion"] == depths["gluon"] == [0] * 6
    assert depths["drop_scion"] == depths["drop_muon_with_mvr"]
    assert set(depths["drop_scion"]) == {0, 1}
    drawing = ["drop_scion", "drop_muon_with_mvr"]
    assert list(scion_and_gluon["probability_of_depth_by_epoch"]) == drawing
    for curve in scion_and_gluon["curves"]:
        assert curve["train_loss"][-1] != curve["train_loss"][0]


def test_methods_that_draw_uniform_depths_draw_the_same(tiny_race):
    names = ("drop_muon_uniform", "drop_scion", "drop_gluon", "drop_muon_with_mvr")
    methods = [tiny_race.method(name, 3) for name in names]
    drawn = [[method.depth(step, None) for step in range(20)] for method in methods]
    assert drawn == [drawn[0]] * len(names)
    assert set(drawn[0]) == {0, 1, 2}


def test_make_demo_races_the_muons_and_adamw():
    assert Settings(Path()).methods == (
        *("muon", "muon_short", "drop_muon_uniform", "drop_muon_epoch_shift"),
        *("drop_muon_time_aware", "optax_muon", "adamw"),
    )


def test_methods_can_be_told_apart_in_the_plots():
    assert len({colour for colour, _ in STYLES.values()}) == len(METHODS)


def test_a_method_with_mvr_keeps_the_parameters_before_its_last_step(tiny_race):
    method = tiny_race.method("muon_with_mvr", 0)
    step = jax.jit(make_step(tiny_race.model, method, 0))
    params = tiny_race.init_params(0)
    opt_state = method.tx.init(params)
    batches, data = tiny_race.batches(0), tiny_race.data
    for index in range(2):
        kept = params
        arguments = (data.train_images, data.train_labels, batches, index)
        params, opt_state = step(params, opt_state, *arguments)
        chex.assert_trees_all_equal(dm.prev_params(opt_state, params), kept)


def test_every_method_gets_the_same_parameters_and_batches(tiny_race):
    runners = {name: tiny_race.start(name, 5) for name in METHODS}
    for name, runner in runners.items():
        np.testing.assert_array_equal(runner.batches, runners["muon"].batches)
        if name != "scion_constrained":
            chex.assert_trees_all_equal(runner.params, runners["muon"].params)
    other_seed = tiny_race.start("muon", 6)
    assert not np.array_equal(other_seed.batches, runners["muon"].batches)


def test_constrained_scion_starts_on_the_boundary_of_its_balls(tiny_race):
    params = tiny_race.start("scion_constrained", 5).params
    spectral, sign = dm.norms.spectral_norm("scion"), dm.norms.sign_norm()
    for layer in ("Conv_0", "Conv_1"):
        assert spectral.norm(params[layer]["kernel"]) == pytest.approx(8, rel=1e-4)
    assert sign.norm(params["Dense_0"]["kernel"]) == pytest.approx(128, rel=1e-4)


def test_the_learning_rate_of_the_settings_reaches_each_method(tiny_race):
    params = tiny_race.init_params(0)
    grads = jax.tree.map(lambda leaf: jax.numpy.cos(9 * leaf), params)

    @jax.jit
    def first_updates(rate):
        updates = {}
        for name in METHODS:
            settings = Settings(Path(), **{LEARNING_RATES[name][0]: rate})
            method = tiny_race.with_settings(settings).method(name, 0)
            extra = {} if method.layers is None else {"layer_mask": method.layers.mask(0)}
            if method.two_gradients:
                extra["prev_params_grads"] = grads
            update, _ = method.tx.update(grads, method.tx.init(params), params, **extra)
            updates[name] = update["Dense_0"]["kernel"]
        return updates

    once, twice = first_updates(0.03), first_updates(0.06)
    for name in METHODS:
        assert np.abs(once[name]).max() > 0
        np.testing.assert_allclose(twice[name], 2 * once[name], rtol=1e-5, err_msg=name)


def test_a_method_with_dropped_layers_takes_the_rate_of_the_whole_one_unless_it_has_its_own():
    settings = Settings(Path(), learning_rate=0.3, gluon_learning_rate=0.4)
    for name in ("muon", "drop_muon_uniform", "optax_muon"):
        assert learning_rate(settings, name) == 0.3
    assert learning_rate(settings, "drop_gluon") == 0.4
    settings = Settings(Path(), learning_rate=0.3, drop_muon_learning_rate=0.2)
    assert learning_rate(settings, "muon") == 0.3
    assert learning_rate(settings, "drop_muon_epoch_shift") == 0.2


def test_roles_name_the_first_kernel_and_the_head_of_any_number_of_convolutions():
    for channels in ((4,), (4, 5, 6, 7)):
        assert CNN(channels).roles() == {"Conv_0/kernel": "hidden", "Dense_0/kernel": "head"}


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
        ({"drop_gluon_learning_rate": 0.0}, "--drop-gluon-learning-rate must be positive"),
        (
            {"scion_constrained_learning_rate": 1.5},
            "--scion-constrained-learning-rate must be at most 1, got 1.5",
        ),
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
