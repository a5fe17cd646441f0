"""The study of smoothness runs, fits what it measured, and compares what it says."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import dropmuon_jax as dm
import smoothness
from images import load_images
from smoothness_study.comparison import Sweep
from smoothness_study.report import noise_by_leaf, verdict
from smoothness_study.settings import Settings, check_settings
from smoothness_study.training import Result, Study

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = [
    *("--max-train", "30", "--batch-size", "10", "--channels", "2", "--num-steps", "4"),
    *("--multipliers", "0.5", "1", "--constant-radii", "0.01", "0.1", "1000", "--seeds", "1", "2"),
]
LEAVES = ["Conv_0/bias", "Conv_0/kernel", "Dense_0/bias", "Dense_0/kernel"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    smoothness.main([*TINY, "--output-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def record(results) -> dict:
    return json.loads((results / "smoothness.json").read_text())


def test_study_records_samples_and_the_fit_to_them(record):
    assert list(record["samples"]) == list(record["fits"]) == ["exact", "minibatch", "same batch"]
    for kind, by_leaf in record["samples"].items():
        assert list(by_leaf) == LEAVES
        samples = {
            path: dm.planning.SmoothnessSamples(**of_leaf) for path, of_leaf in by_leaf.items()
        }
        assert samples["Conv_0/kernel"].steps == [1, 2, 3]
        for path, leaf in dm.planning.fit_smoothness(samples).leaves.items():
            assert leaf.l0 == record["fits"][kind][path]["l0"]
            assert leaf.l1 == record["fits"][kind][path]["l1"]


def test_study_records_every_sweep_with_a_run_for_each_seed(record):
    sweeps = {(sweep["gradients"], sweep["fit"]): sweep for sweep in record["sweeps"]}
    assert list(sweeps) == [
        ("exact", "exact"),
        ("exact", None),
        ("minibatch", "minibatch"),
        ("minibatch", "same batch"),
        ("minibatch", None),
    ]
    for (gradients, fit), sweep in sweeps.items():
        assert sweep["values"] == ([0.5, 1.0] if fit else [0.01, 0.1, 1000.0])
        assert all(len(of_value) == 2 for of_value in sweep["results"])
        assert sweep["best"] == sweep["values"][int(np.argmin(sweep["losses"]))]
        assert (sweep["uphill"][0] is None) == (gradients == "minibatch")
    constant = sweeps["exact", None]
    assert constant["losses"][2] > constant["losses"][0]
    assert constant["uphill"][0] == 0
    assert constant["uphill"][2] > 0


def test_study_leaves_plots_and_no_path(results, record):
    text = (results / "smoothness.json").read_text()
    assert str(results) not in text
    assert "data_dir" not in text
    assert {"python", "packages", "jax_platform"} < set(record["environment"])
    plots = sorted(path.stem for path in results.glob("*.png"))
    kinds = ("exact", "minibatch", "same_batch")
    assert plots == [*(f"smoothness_{kind}" for kind in kinds), "step_sizes"]
    for plot in results.glob("*.png"):
        assert plot.stat().st_size > 10_000


def test_the_same_batch_without_momentum_is_the_exact_gradient_if_it_is_all_images():
    settings = Settings(Path(), max_train=20, batch_size=20, channels=(2,), num_steps=4, decay=0.0)
    study = Study(settings, load_images("mnist5k", max_train=20))
    exact, minibatch = study.measure("exact"), study.measure("minibatch")
    for kind in ("minibatch", "same batch"):
        for path, of_leaf in minibatch[kind].items():
            np.testing.assert_allclose(
                of_leaf.smoothness, exact["exact"][path].smoothness, rtol=2e-2
            )


def test_noise_compares_samples_of_the_same_steps():
    def samples(steps, smoothness):
        return {
            "w": dm.planning.SmoothnessSamples(
                np.array(steps), np.ones(len(steps)), np.array(smoothness)
            )
        }

    noisy = samples([1, 2, 3, 4, 5], [2.0, 6.0, 99.0, 8.0, 12.0])
    clean = samples([1, 2, 4, 5], [1.0, 2.0, 2.0, 2.0])
    assert noise_by_leaf({"minibatch": noisy, "same batch": clean}) == {"w": (2.5, 5.0)}


def sweep(fit, values, losses):
    results = [(Result(loss, 0.5, None),) for loss in losses]
    return Sweep("minibatch", fit, values, tuple(results))


def test_the_verdict_tells_the_best_the_edge_and_who_beats_the_prediction():
    constant = sweep(None, (0.1, 0.2, 0.4), (0.5, 0.2, math.nan))
    predicted = sweep("minibatch", (0.5, 1.0, 2.0), (0.9, 0.3, 0.1))
    assert constant.losses == [0.5, 0.2, math.inf]
    assert (
        verdict(constant, [constant]) == "minibatch gradients, one radius: best at 0.2, loss 0.2."
    )
    assert verdict(predicted, [predicted, constant]) == (
        "minibatch gradients, fit: minibatch: best at 2 × the predicted radii (the edge of the "
        "grid), loss 0.1; as predicted 0.3, which 1 of 3 constant radii beat."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": ()}, "--channels needs at least one value"),
        ({"channels": (8, 0)}, "--channels must be positive"),
        ({"seeds": ()}, "--seeds needs at least one value"),
        ({"seeds": (-1,)}, "--seeds must not be negative"),
        ({"fit_seed": -1}, "--fit-seed must not be negative"),
        ({"multipliers": ()}, "--multipliers needs at least one value"),
        ({"multipliers": (0.0,)}, "--multipliers must be positive"),
        ({"constant_radii": (-1.0,)}, "--constant-radii must be positive"),
        ({"fit_radius": 0.0}, "--fit-radius must be positive"),
        ({"num_steps": 2}, "--num-steps must be at least 3, got 2"),
        ({"max_train": 0}, "--max-train must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"batch_size": 300}, "--batch-size is 300, and there are only 256 training images"),
        ({"decay": 1.0}, r"--decay must lie in \[0, 1\), got 1.0"),
        ({"hinge": -1.0}, "--hinge must not be negative"),
        ({"output_dir": Path(__file__)}, "--output-dir must be a folder"),
    ],
)
def test_bad_argument_of_the_study_ends_in_a_sentence_that_names_it(arguments, message):
    with pytest.raises(SystemExit, match=message):
        check_settings(Settings(**{"output_dir": Path(), **arguments}))
