"""The tuning of the race judges by images that are held out, and says where its grid ends."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import tune
from images import Images
from racing import Run
from tune import Grid, Tuning, candidates, check_tuning, hold_out, print_grids

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = [
    *("--max-train", "40", "--num-validation", "20", "--batch-size", "20", "--channels", "2"),
    *("--epochs", "2", "--num-rates", "3", "--methods", "adamw", "--seeds", "7", "8"),
    *("--adamw-learning-rate", "0.01"),
]


def _images(num_train: int) -> Images:
    """Each image tells its row by its value; there is no test image to look at."""
    rows = np.arange(num_train, dtype=np.float32)
    images = np.broadcast_to(rows[:, None, None, None], (num_train, 4, 4, 1))
    return Images(images, np.arange(num_train) % 10, images[:0], np.arange(0))


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    """That of a tiny tuning, which cannot look at test images, as there are none."""
    folder = tmp_path_factory.mktemp("tune")
    limits = []

    def load_images(name, *, data_dir, download, max_train):
        limits.append(max_train)
        return _images(max_train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "load_images", load_images)
        tune.main([*TINY, "--output-dir", str(folder)])
    assert limits == [60]
    text = (folder / "tune.json").read_text()
    assert str(folder) not in text
    assert "data_dir" not in text
    return json.loads(text)


def test_tuning_trains_at_every_rate_with_every_seed(record):
    keys = [(curve["learning_rate"], curve["seed"]) for curve in record["curves"]]
    assert keys == [(rate, seed) for rate in (0.005, 0.01, 0.02) for seed in (7, 8)]
    for curve in record["curves"]:
        assert (curve["method"], curve["depths"]) == ("adamw", [0] * 4)
    losses = [curve["train_loss"][-1] for curve in record["curves"]]
    assert len(set(losses)) == 6


def test_tuning_records_the_mean_over_seeds_and_the_best_rate(record):
    (grid,) = record["grids"]
    assert (grid["method"], grid["argument"]) == ("adamw", "adamw_learning_rate")
    for rate, accuracy in zip(grid["learning_rates"], grid["validation_accuracy"], strict=True):
        curves = [curve for curve in record["curves"] if curve["learning_rate"] == rate]
        assert accuracy == pytest.approx(np.mean([c["validation_accuracy"][-1] for c in curves]))
    best = grid["learning_rates"].index(grid["best_learning_rate"])
    assert grid["validation_accuracy"][best] == max(grid["validation_accuracy"])
    assert grid["best_is_at_edge"] == (best != 1)


def test_held_out_images_are_training_images_that_are_not_trained_on():
    images = hold_out(_images(50), 20)
    trained = set(images.train_images[:, 0, 0, 0].astype(int))
    held_out = set(images.test_images[:, 0, 0, 0].astype(int))
    assert len(trained) == 30
    assert len(held_out) == 20
    assert trained | held_out == set(range(50))
    np.testing.assert_array_equal(images.test_labels, images.test_images[:, 0, 0, 0] % 10)
    np.testing.assert_array_equal(images.train_labels, images.train_images[:, 0, 0, 0] % 10)
    np.testing.assert_array_equal(hold_out(_images(50), 20).test_labels, images.test_labels)


def test_grid_lies_geometrically_around_the_rate_of_the_settings():
    tuning = Tuning(Path(), scion_learning_rate=0.09, num_rates=5, factor=3.0)
    rates, settings = zip(*candidates(tuning, "drop_scion"), strict=True)
    assert rates == pytest.approx((0.01, 0.03, 0.09, 0.27, 0.81))
    assert [of_rate.drop_scion_learning_rate for of_rate in settings] == list(rates)
    assert {of_rate.scion_learning_rate for of_rate in settings} == {0.09}
    assert {of_rate.methods for of_rate in settings} == {("drop_scion",)}


def _grid(*accuracies: float) -> Grid:
    runs = [[Run("scion", 0, test_accuracy=[0.1, accuracy])] for accuracy in accuracies]
    return Grid("scion", [0.1, 0.2, 0.4], runs)


@pytest.mark.parametrize(
    ("accuracies", "best", "advice"),
    [
        ((0.5, 0.9, 0.8), "0.2", None),
        ((0.5, 0.8, 0.9), "0.4", "--methods scion --scion-learning-rate 0.4."),
        ((0.9, 0.9, 0.8), "0.1", "--methods scion --scion-learning-rate 0.1."),
    ],
)
def test_best_rate_at_the_edge_of_the_grid_is_said(accuracies, best, advice):
    shown = io.StringIO()
    console = Console(file=shown, width=80)
    print_grids(console, Tuning(Path(), num_rates=3), [_grid(*accuracies)])
    row = next(line for line in shown.getvalue().splitlines() if line.startswith(" Scion "))
    assert row.split() == ["Scion", "0.2", *(f"{100 * a:.1f}" for a in accuracies), best]
    assert ("at the edge of its grid" in shown.getvalue()) == (advice is not None)
    if advice is not None:
        assert advice in shown.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rates": 4}, "--num-rates must be an odd number from 3, got 4"),
        ({"num_rates": 1}, "--num-rates must be an odd number from 3, got 1"),
        ({"factor": 1.0}, "--factor must be more than 1, got 1.0"),
        ({"num_validation": 0}, "--num-validation must be at least 1, got 0"),
        ({"seeds": ()}, "--seeds needs at least one value"),
        (
            {"methods": ("scion_constrained",), "scion_constrained_learning_rate": 0.5},
            "--scion-constrained-learning-rate must be at most 1, got 2.0",
        ),
    ],
)
def test_bad_argument_of_the_tuning_ends_in_a_sentence_that_names_it(arguments, message):
    with pytest.raises(SystemExit, match=message):
        check_tuning(Tuning(Path(), **arguments))


def test_holding_out_everything_is_refused():
    with pytest.raises(SystemExit, match="--num-validation is 9, and there are only 9 training"):
        hold_out(_images(9), 9)
