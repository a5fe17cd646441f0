"""The paper's figures: presets, a race that goes on, and what is made of its curves."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import dropmuon_jax as dm
import paper
from images import Images
from paper_study import contest, presets
from paper_study.contest import Contest
from paper_study.outcomes import (
    geometric_interval,
    part_label,
    seconds_to,
    student_quantile,
    summarise,
    verdicts,
)
from paper_study.sampling import probabilities
from paper_study.settings import Settings
from paper_study.units import Units
from racing import Race, Run
from settings import Settings as RaceSettings

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = [
    *("averaged-curves", "--scale", "tiny", "--channels", "2", "--epochs", "1"),
    *("--max-train", "40", "--batch-size", "10", "--num-evaluations", "2", "--num-validation"),
    *("20", "--learning-rates", "0.02", "0.05", "--methods", "muon", "drop_muon_time_aware"),
]


@pytest.fixture(scope="module")
def few_images():
    generator = np.random.default_rng(0)

    def make(count):
        images = generator.normal(size=(count, 28, 28, 1)).astype(np.float32)
        return images, generator.integers(10, size=count).astype(np.int32)

    return Images(*make(60), *make(20))


@pytest.fixture
def digits(few_images, monkeypatch):
    """In the place of those that would have to be read."""
    monkeypatch.setattr(presets, "load_images", lambda name, **kwargs: few_images)


def test_a_figure_is_trained_and_recorded(tmp_path, digits):
    arguments = [*TINY, "--learning-rates", "0.05", "--seeds", "0"]
    paper.main([*arguments, "--output-dir", str(tmp_path)])
    record = json.loads((tmp_path / "averaged-curves.json").read_text())
    assert str(tmp_path) not in json.dumps(record)
    assert record["left_out"] == ["mnist", "fashion_mnist", "cifar10"]
    (of_digits,) = record["datasets"]
    curves = {curve["method"]: curve for curve in of_digits["curves"]}
    assert curves["muon"]["depths"] == [0] * 6
    assert set(curves["drop_muon_time_aware"]["depths"]) <= {0, 1}
    assert len(of_digits["depth_costs_in_seconds"]) == 2
    assert (tmp_path / "averaged-curves.png").stat().st_size > 10_000


def test_an_interrupted_study_goes_on(tmp_path, digits, monkeypatch):
    trained = []

    def run_all(race, report):
        settings = race.settings
        trained.append((settings.methods, settings.seeds))
        if len(trained) == 6:
            raise KeyboardInterrupt
        return [
            make_run(method, seed, [0.0, 1.0, 2.0], [0.1, 0.5, settings.learning_rate])
            for method in settings.methods
            for seed in settings.seeds
        ]

    monkeypatch.setattr(contest, "run_all", run_all)
    monkeypatch.setattr(Race, "depth_costs", lambda race: [2.0, 1.0])
    arguments = [*TINY, "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="the same command goes on"):
        paper.main([*arguments, "--seeds", "0", "1"])
    # Two methods at two rates, a race, and one that did not end.
    assert len(trained) == 6
    paper.main([*arguments, "--seeds", "0", "1"])
    assert trained[6:] == [(("muon", "drop_muon_time_aware"), (1,))]
    (of_digits,) = json.loads((tmp_path / "averaged-curves.json").read_text())["datasets"]
    assert [grid["method"] for grid in of_digits["tuning"]] == ["muon", "drop_muon_time_aware"]
    assert of_digits["learning_rates"]["muon"] == 0.05
    with pytest.raises(SystemExit, match=r"other arguments \(epochs was 1, is 2"):
        paper.main([*arguments, "--seeds", "0", "--epochs", "2"])


def test_units_say_what_differs_and_leave_nothing_half(tmp_path):
    units = Units(tmp_path / "runs")
    assert units.load("a", {"x": 1}) is None
    units.save("a", {"x": (1, 2)}, [0.5])
    assert units.load("a", {"x": (1, 2)}) == [0.5]
    with pytest.raises(SystemExit, match=r"x was \[1, 2\], is 3.*--output-dir"):
        units.load("a", {"x": 3})
    assert [path.name for path in units.folder.iterdir()] == ["a.json"]
    (units.folder / "a.json").write_text('{"identity"')
    with pytest.raises(SystemExit, match=r"a.json is no JSON: delete it"):
        units.load("a", {})


def make_run(method, seed, seconds, accuracy):
    steps = [10 * i for i in range(len(accuracy))]
    return Run(method, seed, steps, seconds, accuracy, accuracy, [1.0] * len(steps), [])


def test_targets_are_reached_on_straight_lines():
    run = make_run("muon", 0, [0.0, 10.0, 20.0, 30.0], [0.1, 0.5, 0.4, 0.8])
    assert seconds_to(run, "test", 0.3) == pytest.approx(5)
    assert seconds_to(run, "test", 0.5) == pytest.approx(10)
    assert seconds_to(run, "test", 0.6) == pytest.approx(25)
    assert seconds_to(run, "test", 0.05) == 0
    assert seconds_to(run, "test", 0.81) == math.inf


def test_speed_ups_are_paired_by_seed():
    settings = Settings("speed-up-mnist", Path(), seeds=(0, 1), parts=(0.5, 1.0), targets=(0.7,))
    methods = ("muon", "drop_muon_uniform")
    race = RaceSettings(Path(), methods=methods)
    curves = [0.0, 0.5, 0.8]
    runs = [
        make_run("muon", 0, [0.0, 10.0, 20.0], curves),
        make_run("muon", 1, [0.0, 20.0, 40.0], curves),
        make_run("drop_muon_uniform", 0, [0.0, 5.0, 10.0], curves),
        make_run("drop_muon_uniform", 1, [0.0, 5.0, 10.0], [0.0, 0.5, 0.6]),
    ]
    chosen = presets.Chosen(race, (0.1,), None, None)
    outcome = summarise(settings, Contest(chosen, {}, {}, runs, [], {}))
    half = outcome.find("drop_muon_uniform", "test", part_label(0.5))
    assert half.ratios == [2.0, 4.0]
    assert half.median == 3
    assert half.interval.mean == pytest.approx(math.sqrt(8))
    end = outcome.find("drop_muon_uniform", "test", part_label(1.0))
    assert (end.ratios, end.median, end.num_reached) == ([2.0, 0.0], None, 1)
    assert end.interval is None
    assert outcome.find("drop_muon_uniform", "test", "70 %").num_reached == 1
    assert outcome.find("muon", "train", part_label(1.0)).ratios == [1.0, 1.0]
    own = next(equal for equal in outcome.equal_time if equal.method == "drop_muon_uniform")
    np.testing.assert_allclose(own.difference_by_seed, [0, -0.2])
    assert own.seconds_by_seed == [0.5, 0.25]

    settings = dataclasses.replace(settings, parts=(0.2, 0.8))
    outcome = summarise(settings, Contest(chosen, {}, {}, runs, [], {}))
    (sentence,) = verdicts(settings, outcome, "mnist")
    assert "-20.00 points with the worst seed, NOT within Muon's spread of 0.00" in sentence
    runs[3] = make_run("drop_muon_uniform", 1, [0.0, 5.0, 10.0], curves)
    outcome = summarise(settings, Contest(chosen, {}, {}, runs, [], {}))
    (sentence,) = verdicts(settings, outcome, "mnist")
    assert "uniform: ≥ 1.4× to Muon's after 80 % against Muon (3.00×)" in sentence
    assert "NOT" not in sentence


def test_intervals_are_students():
    # From tables of Student's t.
    for degrees, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042)):
        assert student_quantile(degrees) == pytest.approx(quantile, abs=2e-3)
    interval = geometric_interval([1.0, math.e**2])
    assert interval.mean == pytest.approx(math.e)
    # The standard error of 0 and 2 is 1.
    assert interval.high == pytest.approx(math.exp(1 + 12.706), rel=1e-2)


def test_sampling_shows_the_distribution_in_the_middle_of_each_epoch(tmp_path, capsys):
    settings = Settings("sampling", tmp_path, epochs=3, channels=(4, 4), alphas=(0.0, 1.0))
    shown = probabilities(settings, 1.0)
    assert shown.shape == (3, 3)
    exact = dm.epoch_shift_depth(6000, alpha=1.0)
    for epoch in range(3):
        np.testing.assert_allclose(shown[epoch], exact.probabilities(1000 + 2000 * epoch, 3))
    paper.main(["sampling", "--output-dir", str(tmp_path), "--alphas", "0", "1"])
    record = json.loads((tmp_path / "sampling.json").read_text())
    (uniform, _) = record["probability_of_depth_by_epoch"]
    np.testing.assert_allclose(uniform["probabilities"], np.full((4, 4), 0.25), rtol=1e-6)
    assert "sampling.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--methods", "drop_muon_uniform"], "--methods must name muon"),
        (["--seeds", "100"], "--tuning-seed is 100, one of the seeds that race"),
        (["--learning-rates", "0.1", "0.05"], "--learning-rates must ascend"),
        (["--parts", "1.5"], r"--parts must lie in \(0, 1\]"),
        (["--epochs", "0"], "--epochs must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, match, tmp_path):
    with pytest.raises(SystemExit, match=match):
        paper.main(["uniform-mnist", "--output-dir", str(tmp_path), *arguments])


def test_presets_of_the_paper():
    assert presets.SCALES["paper"]["channels"] == (64, 128, 256)
    assert presets.SCALES["paper"]["batch_size"] == 8192
    settings = Settings("epoch-shift-cifar10", Path(), scale="paper")
    assert presets.datasets(settings) == ("cifar10",)
