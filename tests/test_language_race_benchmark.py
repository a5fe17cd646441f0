"""The race on text compiles each method once, gives all the same batches, and compares fairly."""

import collections
import io
import json
import math
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

import dropmuon_jax as dm
import language_race
from language.contest import Contest
from language.methods import METHODS, drops_layers, make_method
from language.outcomes import loss_after, summarise, verdicts
from language.report import print_tables
from language.settings import Settings, check_settings
from language.training import Race, Run
from rate_grid import RateGrid
from text import load_text, split_text

pytestmark = pytest.mark.usefixtures("quick_compilation")

NETWORK = {"context": 8, "width": 8, "num_heads": 2, "num_blocks": 2, "batch_size": 3}
RACERS = ("muon", "drop_muon_epoch_shift")
TINY = [
    *("--methods", *RACERS, "--num-steps", "6", "--eval-every", "2"),
    *("--num-eval-windows", "4", "--seeds", "1", "2", "--learning-rates", "0.01", "0.02", "1e38"),
    *(f"--{name.replace('_', '-')}={value}" for name, value in NETWORK.items()),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Of a tiny race."""
    folder = tmp_path_factory.mktemp("results")
    counts, turn_function = collections.Counter(), Race._turn_function

    def counting(self, name):
        counts[name] += 1
        return turn_function(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Race, "_turn_function", counting)
        language_race.main([*TINY, "--output-dir", str(folder)])
    assert counts == dict.fromkeys(RACERS, 1)
    return folder


@pytest.fixture(scope="module")
def record(results) -> dict:
    return json.loads((results / "language_race.json").read_text())


@pytest.fixture(scope="module")
def race() -> Race:
    settings = Settings(Path(), num_steps=6, eval_every=2, num_eval_windows=4, tied=True, **NETWORK)
    return Race(settings, load_text())


def test_each_method_is_compiled_once_for_all_rates_seeds_and_depths(record):
    assert list(record["compilation"]) == list(RACERS)
    for compilation in record["compilation"].values():
        assert compilation["num_compilations"] == 1
        assert compilation["seconds"] > 0
    drawn = {d for curve in record["curves"] for d in curve["depths"]}
    assert len(drawn) > 2


def test_curves_start_alike_and_fall(record):
    curves = {(curve["method"], curve["seed"]): curve for curve in record["curves"]}
    assert list(curves) == [(method, seed) for seed in (1, 2) for method in RACERS]
    for (_, seed), curve in curves.items():
        assert curve["steps"] == [0, 2, 4, 6]
        assert curve["seconds"] == sorted(curve["seconds"])
        assert curve["seconds"][0] == 0 < curve["seconds"][1]
        for losses in (curve["validation_loss"], curve["test_loss"]):
            assert len(losses) == 4
            assert losses[-1] < losses[0]
        assert curve["test_loss"][0] == curves["muon", seed]["test_loss"][0]
        assert len(curve["depths"]) == 6


def test_depths_drawn_in_the_scan_are_those_of_the_seed(record, race):
    for curve in record["curves"]:
        if drops_layers(curve["method"]):
            sampler = race.method(curve["method"], 0.1, curve["seed"]).sampler
            assert curve["depths"] == [sampler.depth(step) for step in range(6)]
        else:
            assert set(curve["depths"]) == {0}


def test_methods_race_at_the_rate_of_least_validation_loss_though_a_run_diverged(record):
    assert [grid["method"] for grid in record["tuning"]] == list(RACERS)
    for grid in record["tuning"]:
        assert grid["learning_rates"] == [0.01, 0.02, 1e38]
        losses = grid["validation_losses"]
        assert losses[2] is None
        best = int(losses[1] < losses[0])
        assert grid["best_learning_rate"] == grid["learning_rates"][best]
        assert grid["best_is_at_edge"] == (best == 0)
        for curve in record["curves"]:
            if curve["method"] == grid["method"]:
                assert curve["learning_rate"] == grid["best_learning_rate"]


def test_targets_are_losses_of_muons_own_run(record):
    curves = {c["seed"]: c for c in record["curves"] if c["method"] == "muon"}
    targets = [target for target in record["targets"] if target["method"] == "muon"]
    assert [target["part_of_muons_run"] for target in targets] == [0.2, 0.5, 0.8, 1.0]
    last = [curves[seed]["validation_loss"][-1] for seed in (1, 2)]
    assert targets[-1]["validation_losses"] == pytest.approx(last)
    for target in targets:
        assert target["speed_up_in_steps"] == target["speed_up_in_seconds"] == 1
        assert target["num_seeds_reached"] == 2


def test_race_leaves_plots_the_text_and_no_path(results, record):
    assert str(results) not in (results / "language_race.json").read_text()
    assert {"python", "packages", "jax_platform"} < set(record["environment"])
    assert record["text"] == load_text().record()
    assert record["network"]["num_layers"] == 4
    assert record["verdicts"][0].startswith("Drop-Muon, epoch-shift ends at a test loss of ")
    plots = {path.stem for path in results.glob("*.png")}
    assert plots == {"language_race", "speed_up", "learning_rates"}
    for plot in results.glob("*.png"):
        assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "steps"), [("optax_muon", 2), ("drop_muon_long", 3), ("drop_muon_time_aware", 2)]
)
def test_a_turn_of_a_tied_network_keeps_what_it_carries(race, name, steps, monkeypatch):
    monkeypatch.setattr(race, "measured_costs", [4.0, 3.0, 2.0, 1.0])
    assert race.layers.names[-1] == "final_norm"
    runner = race.start(name, 0.02, seed=0)
    *carry, depths = jax.eval_shape(race._turn_function(name), *runner.arguments())
    assert set(carry[0]) == {"tokens", "positions", "blocks", "final_norm"}
    chex.assert_trees_all_equal_shapes_and_dtypes(tuple(carry), (runner.params, runner.opt_state))
    assert depths.shape == (steps,)


def test_every_method_goes_through_the_same_batches(race):
    starts = {method: race.starts(method, seed=5) for method in METHODS}
    assert starts["muon"].shape == (6, 3)
    for own in starts.values():
        shared = min(len(own), 6)
        np.testing.assert_array_equal(own[:shared], starts["muon"][:shared])
    assert [len(starts[name]) for name in ("muon_short", "drop_muon_long")] == [3, 9]  # in 3 turns
    assert not np.array_equal(race.starts("muon", seed=6), starts["muon"])


def test_a_turn_takes_the_batches_and_the_count_of_its_steps(race):
    runner = race.start("muon", 0.02, seed=7)
    for first in (0, 2, 4):
        runner.num_steps = first
        *_, starts, count, rate, seed = runner.arguments()
        np.testing.assert_array_equal(starts, race.starts("muon", 7)[first : first + 2])
        assert (count, rate, seed) == (first, np.float32(0.02), 7)


def test_distributions_are_those_of_the_names(race):
    chances = {
        name: [race.method(name, 0.1, 0).sampler.probabilities(step) for step in (0, 6)]
        for name in METHODS
        if name not in ("optax_muon", "drop_muon_time_aware")
    }
    for name in ("muon", "muon_short"):
        np.testing.assert_array_equal(chances[name], [[1, 0, 0, 0]] * 2)
    for name in ("drop_muon_uniform", "drop_muon_long"):
        np.testing.assert_array_equal(chances[name], [[0.25] * 4] * 2)
    first, last = chances["drop_muon_epoch_shift"]
    np.testing.assert_allclose(first / first[3], np.exp([1.5, 1, 0.5, 0]), rtol=1e-6)
    np.testing.assert_allclose(last, first[::-1], rtol=1e-6)


@pytest.mark.parametrize("name", ["muon", "optax_muon"])
def test_both_muons_orthogonalize_each_row_of_a_stack_and_no_table(name):
    generator = np.random.default_rng(0)
    shapes = {"tokens": {"embedding": (7, 3)}, "blocks": {"kernel": (2, 3, 5)}}
    params, grads = (
        jax.tree.map(
            lambda shape: generator.normal(size=shape).astype(np.float32),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        for _ in range(2)
    )
    layers = dm.layers_by_path(params, ["tokens", dm.stacked("blocks")])
    numbers = {"learning_rate": 0.1, "auxiliary_learning_rate": 0.01, "num_steps": 10, "seed": 0}
    tx, *_ = make_method(name, layers, decay=0.9, alpha=0.5, depth_costs=list, **numbers)
    updates, _ = tx.update(grads, tx.init(params), params, layer_mask=layers.mask(0))
    np.testing.assert_allclose(
        updates["tokens"]["embedding"], -0.01 * np.sign(grads["tokens"]["embedding"]), rtol=1e-3
    )
    lengths = np.linalg.svd(updates["blocks"]["kernel"])[1] / (0.1 * math.sqrt(5 / 3))
    assert lengths.shape == (2, 3)
    # Muon's polynomial, that of optax, leaves singular values between 0.68 and 1.13.
    assert 0.65 < lengths.min() <= lengths.max() < 1.15


def test_text_too_short_for_a_window_is_refused():
    with pytest.raises(SystemExit, match="--context is 64, and there are only 8 characters"):
        Race(Settings(Path()), split_text("0123456789"))


def run(method, losses, *, seed=0, steps=10, seconds=1.0, final=None):
    """A run of an evaluation every so many steps and seconds, and a test loss at its end."""
    count = len(losses)
    return Run(
        *(
            method,
            0.1,
            seed,
            [steps * i for i in range(count)],
            [seconds * i for i in range(count)],
        ),
        validation_loss=losses,
        test_loss=[*losses[:-1], losses[-1] if final is None else final],
        depths=[0, 2],
    )


def outcomes(*runs, targets=(0.25, 1.0)):
    grids = {run.method: RateGrid((0.1, 0.2), (1.0, 2.0)) for run in runs}
    settings = Settings(Path(), targets=targets)
    return {o.method: o for o in summarise(settings, Contest(grids, list(runs)))}


def test_a_target_lies_on_the_line_between_evaluations_of_muon():
    muon = run("muon", [4.0, 3.0, 2.5])
    assert [loss_after(muon, part) for part in (0.25, 0.5, 0.75, 1.0)] == [3.5, 3.0, 2.75, 2.5]


def test_a_speed_up_is_the_median_of_ratios_with_muon_of_the_same_seed():
    muons = [run("muon", [4.0, 3.0, 2.0], seed=seed, seconds=1.0 + seed) for seed in range(3)]
    drops = [
        run("drop_muon_uniform", [4.0, 2.0, 1.0], seed=0, seconds=0.5),
        run("drop_muon_uniform", [4.0, 3.0, 2.0], seed=1, seconds=0.5),
        run("drop_muon_uniform", [4.0, 3.5, 3.0], seed=2, seconds=0.5),
    ]
    quarter, whole = outcomes(*muons, *drops)["drop_muon_uniform"].attainments
    assert quarter.losses == [3.5, 3.5, 3.5]
    assert quarter.reached == {"steps": [2.5, 5, 10], "seconds": [0.125, 0.25, 0.5]}
    assert quarter.speed_ups == {"steps": [2, 1, 0.5], "seconds": [4, 4, 3]}
    assert (quarter.speed_up("steps"), quarter.speed_up("seconds")) == (1, 4)
    assert whole.reached["steps"] == [10, 20, math.inf]
    assert whole.speed_ups == {"steps": [2, 1, 0], "seconds": [4, 4, 0]}
    assert (whole.speed_up("steps"), whole.num_reached) == (1, 2)
    muon = outcomes(*muons, *drops)["muon"]
    assert all(a.speed_up("seconds") == 1 for a in muon.attainments)


def test_a_speed_up_is_none_where_a_seed_of_the_middle_did_not_get_there():
    muons = [run("muon", [4.0, 2.0], seed=seed) for seed in (0, 1)]
    drops = [run("drop_muon_uniform", [4.0, end], seed=s) for s, end in enumerate((1.0, 3.0))]
    quarter, whole = outcomes(*muons, *drops)["drop_muon_uniform"].attainments
    assert quarter.speed_up("steps") == pytest.approx((1.5 + 0.5) / 2)
    assert whole.speed_up("steps") is None
    diverged = outcomes(*muons, *(run("optax_muon", [4.0, math.inf], seed=s) for s in (0, 1)))
    assert [a.speed_up("steps") for a in diverged["optax_muon"].attainments] == [None, None]
    rising = outcomes(run("muon", [4.0, 5.0]), run("optax_muon", [4.0, 4.5]))
    assert [a.speed_up("steps") for a in rising["optax_muon"].attainments] == [1, 1]


@pytest.mark.parametrize(
    ("finals", "seconds", "standing"),
    [
        ((1.5, 1.9), 0.9, "ahead of"),
        ((1.5, 1.9), 1.04, "ahead of"),
        ((1.5, 1.9), 1.2, "neither ahead of nor behind"),
        ((1.5, 2.1), 0.9, "neither ahead of nor behind"),
        ((2.1, 2.2), 0.9, "neither ahead of nor behind"),
        ((2.1, 2.2), 0.96, "behind"),
        ((math.inf, math.inf), 1.2, "behind"),
    ],
)
def test_a_method_is_ahead_with_lower_loss_for_every_seed_in_no_more_time(
    finals, seconds, standing
):
    runs = [run("muon", [4.0, 3.0], seed=seed, final=2.0) for seed in (0, 1)]
    runs += [
        run("drop_muon_uniform", [4.0, 3.0], seed=seed, seconds=seconds, final=final)
        for seed, final in enumerate(finals)
    ]
    (verdict,) = verdicts(list(outcomes(*runs).values()))
    assert f": {standing} Muon (2.0000)" in verdict


def test_the_verdict_compares_with_muon_and_with_its_shorter_run():
    runs = [
        run("muon", [4.0, 1.0]),
        run("muon_short", [4.0, 2.0], seconds=0.5),
        run("drop_muon_uniform", [4.0, 1.5], seconds=0.5),
    ]
    assert verdicts(list(outcomes(*runs).values())) == [
        "Drop-Muon, uniform ends at a test loss of 1.5000: neither ahead of nor behind Muon "
        "(1.0000), lower with 0 of 1 seeds in 0.50 × the seconds; ahead of Muon, shorter run "
        "(2.0000), lower with 1 of 1 seeds in 1.00 × the seconds."
    ]


def test_tables_say_what_was_never_reached_what_diverged_and_what_lies_at_an_edge():
    runs = [run("muon", [4.0, 1.0 + 0.2 * seed], seed=seed) for seed in (0, 1)]
    runs += [run("optax_muon", [4.0, 3.0], seed=seed) for seed in (0, 1)]
    runs += [run("drop_muon_uniform", [4.0, math.inf], seed=seed) for seed in (0, 1)]
    shown = io.StringIO()
    settings = Settings(Path(), seeds=(0, 1), targets=(0.25, 1.0))
    print_tables(Console(file=shown, width=80), settings, list(outcomes(*runs).values()))
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    assert "Muon 0.1* 1.1000 ± 0.1000 1.1000 ± 0.1000 10 1.0" in lines
    assert "Drop-Muon, uniform 0.1* diverged diverged 10 1.0" in lines
    assert "Muon in steps 1.00× 1.00×" in lines
    assert "optax.contrib.muon in steps 0.35× —" in lines
    assert "Drop-Muon, uniform in steps — —" in lines
    assert "whose edge is the best of Muon; optax.contrib.muon; Drop" in shown.getvalue()
    tables = shown.getvalue().split("Drop-Muon, uniform ends")[0].splitlines()
    assert max(len(line) for line in tables if not line.startswith("Better")) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ("muon_short",)}, "--methods must name muon, with which the others are"),
        ({"methods": ("muon", "muon")}, "--methods names a value twice"),
        ({"learning_rates": ()}, "--learning-rates needs at least one value"),
        ({"learning_rates": (0.0, 0.1)}, "--learning-rates must be positive"),
        ({"learning_rates": (0.2, 0.1)}, "--learning-rates must ascend"),
        ({"auxiliary_learning_rate": 0.0}, "--auxiliary-learning-rate must be positive"),
        ({"short_run": 0.0}, "--short-run must be positive, got 0.0"),
        ({"long_run": -1.0}, "--long-run must be positive, got -1.0"),
        ({"decay": 1.0}, r"--decay must lie in \[0, 1\), got 1.0"),
        ({"alpha": -0.5}, "--alpha must not be negative, got -0.5"),
        ({"seeds": ()}, "--seeds needs at least one value"),
        ({"seeds": (-1,)}, "--seeds must not be negative"),
        ({"tuning_seed": 2}, "--tuning-seed is 2, one of the seeds that are reported"),
        ({"targets": ()}, "--targets needs at least one value"),
        ({"targets": (0.5, 1.5)}, r"--targets must lie in \(0, 1\], got 1.5"),
        ({"num_steps": 0}, "--num-steps must be at least 1, got 0"),
        ({"eval_every": 7}, "--eval-every is 7, and must divide num_steps, 240"),
        ({"num_blocks": 0}, "--num-blocks must be at least 1, got 0"),
        ({"num_heads": 5}, "--num-heads must divide the width 96, got 5"),
        ({"output_dir": Path(__file__)}, "--output-dir must be a folder"),
    ],
)
def test_bad_argument_of_the_race_ends_in_a_sentence_that_names_it(arguments, message):
    with pytest.raises(SystemExit, match=message):
        check_settings(Settings(**{"output_dir": Path(), **arguments}))
