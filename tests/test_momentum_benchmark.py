"""The study of momentum trains on text, compares by what was spent, and says who won."""

import collections
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import momentum
from momentum_study.contest import Contest, Grid
from momentum_study.methods import METHODS
from momentum_study.outcomes import first_reached, summarise, verdict
from momentum_study.report import print_tables
from momentum_study.settings import Settings, check_settings
from momentum_study.training import Run, Study
from text import Text, draw_starts, even_windows, load_text, split_text

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Without blocks there are a matrix and leaves of all other kinds, and a third of the compilation.
NETWORK = {"context": 8, "width": 8, "num_heads": 2, "num_blocks": 0}
TINY = [
    *("--methods", "mvr1", "ema", "ema_twice_the_steps", "ema_twice_the_batch"),
    *("--batch-sizes", "3", "--num-steps", "5", "--eval-every", "2", "--num-eval-windows", "4"),
    *("--learning-rates", "0.01", "0.02", "1e38", "--seeds", "1", "2"),
    *(f"--{name.replace('_', '-')}={value}" for name, value in NETWORK.items()),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Of a tiny study, which compiles each method's step once for all rates and seeds."""
    folder = tmp_path_factory.mktemp("results")
    counts, step_function = collections.Counter(), Study._step_function

    def counting(self, method):
        counts[method] += 1
        return step_function(self, method)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "_step_function", counting)
        momentum.main([*TINY, "--output-dir", str(folder)])
    assert counts == dict.fromkeys(("mvr1", "ema", "ema_twice_the_steps", "ema_twice_the_batch"), 1)
    return folder


@pytest.fixture(scope="module")
def record(results) -> dict:
    return json.loads((results / "momentum.json").read_text())


def test_study_counts_steps_and_gradients_of_each_method(record):
    curves = {(curve["method"], curve["seed"]): curve for curve in record["curves"]}
    methods = ("mvr1", "ema", "ema_twice_the_steps", "ema_twice_the_batch")
    assert list(curves) == [(method, seed) for seed in (1, 2) for method in methods]
    steps, doubled = [0, 2, 4, 5], [0, 4, 8, 10]
    for (method, _), curve in curves.items():
        assert curve["steps"] == (doubled if method == "ema_twice_the_steps" else steps)
        assert curve["evaluations"] == (steps if method == "ema" else doubled)
        assert curve["seconds"] == sorted(curve["seconds"])
        assert curve["seconds"][0] == 0 < curve["seconds"][1]
        assert curve["test_loss"][-1] < curve["test_loss"][0]
        start = curves["ema", curve["seed"]]
        assert curve["test_loss"][0] == start["test_loss"][0]
        assert (curve["test_loss"][-1] == start["test_loss"][-1]) == (method == "ema")


def test_study_races_at_the_rate_of_least_validation_loss_though_a_run_diverged(record):
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


def test_study_leaves_plots_the_text_and_no_path(results, record):
    assert str(results) not in (results / "momentum.json").read_text()
    assert {"python", "packages", "jax_platform"} < set(record["environment"])
    assert record["text"] == load_text().record()
    assert record["verdicts"][0].startswith("Batch 3: MVR-1, the best variant")
    assert {path.stem for path in results.glob("*.png")} == {"momentum_batch_3", "learning_rates"}
    for plot in results.glob("*.png"):
        assert plot.stat().st_size > 10_000


def one_window() -> Text:
    """Training text of a single window, so that every batch is the same."""
    text = split_text("the quick brown fox jumps over the lazy dog. " * 6)
    return Text(text.alphabet, text.train[:9], text.validation, text.test, text.sha256)


def test_mvr_of_equal_batches_is_the_gradient_itself():
    def losses(method, decay):
        settings = Settings(Path(), decay=decay, num_steps=4, num_eval_windows=2, **NETWORK)
        runner = Study(settings, one_window()).start(method, 2, 0.05, seed=0)
        for step in range(4):
            runner.train(step, step + 1)
            runner.evaluate(step + 1)
        return runner.run.test_loss

    mvr, ema = losses("mvr1", 0.9), losses("ema", 0.0)
    assert len(set(ema)) == 4
    np.testing.assert_allclose(mvr, ema, rtol=1e-4)


def test_a_step_takes_the_batch_of_its_number():
    study = Study(Settings(Path(), num_steps=2, num_eval_windows=2, **NETWORK), load_text())

    def first_step(number):
        runner = study.start("ema", 2, 0.05, seed=0)
        runner.train(number, number + 1)
        return study.evaluate(runner.params)

    assert first_step(0) == first_step(0)
    assert first_step(0) != first_step(1)


def test_every_method_goes_through_the_same_batches():
    study = Study(Settings(Path(), num_steps=6), load_text())
    starts = {method: study.starts(method, 3, seed=5) for method in METHODS}
    for method in ("mvr1", "mvr2", "mvr3", "mars"):
        np.testing.assert_array_equal(starts[method], starts["ema"])
    assert starts["ema"].shape == (6, 3)
    np.testing.assert_array_equal(starts["ema_twice_the_steps"][:6], starts["ema"])
    joined = starts["ema_twice_the_steps"].reshape(6, 6)
    np.testing.assert_array_equal(starts["ema_twice_the_batch"], joined)
    assert len(np.unique(starts["ema_twice_the_steps"])) == 36
    assert not np.array_equal(study.starts("ema", 3, seed=6), starts["ema"])


def test_every_window_may_be_drawn_and_none_beyond():
    starts = draw_starts(0, num_batches=50, batch_size=4, num_starts=3)
    assert set(starts.ravel()) == {0, 1, 2}


def test_text_is_split_into_blocks_in_their_order():
    written = "abc\n" * 25 + "ä"
    text = split_text(written)
    assert text.alphabet == "\nabcä"
    assert [len(block) for block in (text.train, text.validation, text.test)] == [80, 10, 11]
    tokens = np.concatenate([text.train, text.validation, text.test])
    assert "".join(text.alphabet[token] for token in tokens) == written
    assert text.record()["num_characters"] == 101


def test_windows_of_an_evaluation_lie_evenly_and_do_not_overlap():
    windows = even_windows("test", np.arange(31), 3, 8)
    np.testing.assert_array_equal(windows[:, 0], [0, 10, 20])
    assert len(np.unique(windows)) == windows.size == 24
    with pytest.raises(SystemExit, match="is 4, and the test block of 31 characters has only 3"):
        even_windows("test", np.arange(31), 4, 8)


def test_text_too_short_for_a_window_is_refused():
    with pytest.raises(SystemExit, match="--context is 64, and there are only 8 characters"):
        Study(Settings(Path(), context=64), split_text("0123456789"))


def run(method, losses, *, seed=0, factor=1, validation=1.0):
    steps = [10 * factor * i for i in range(len(losses))]
    spent = steps if method in ("ema", "mars", "ema_twice_the_steps") else [2 * s for s in steps]
    seconds = [0.1 * count for count in spent]
    return Run(
        *(method, 8, 0.1, seed, steps, spent, seconds),
        validation_loss=[validation] * len(losses),
        test_loss=losses,
    )


def outcomes(*runs):
    grids = [
        Grid((0.1, 0.2), (1.0, 2.0), method, 8) for method in dict.fromkeys(r.method for r in runs)
    ]
    return summarise(Contest(grids, list(runs)))


@pytest.mark.parametrize(
    ("losses", "target", "steps"),
    [
        ([3.0, 2.0, 1.0], 1.25, 17.5),
        ([3.0, 2.0, 1.0], 2.0, 10),
        ([3.0, 2.0, 1.0], 0.9, math.inf),
        ([3.0, 1.0, 2.0], 1.5, 7.5),
        ([1.0, 2.0], 1.5, 0),
        ([math.inf, 1.0], 1.5, 10),
        ([math.inf, math.inf], math.inf, math.inf),
    ],
)
def test_a_loss_is_reached_first_on_the_line_between_evaluations(losses, target, steps):
    assert first_reached(run("ema", losses), "steps", target) == steps


def test_ratios_are_those_of_the_same_seed_and_their_median():
    reference = [run("ema", [3.0, 2.0, 1.0 + 0.5 * s], seed=s) for s in range(3)]
    others = [run("mvr1", [3.0, 1.0, 0.9], seed=s) for s in range(2)]
    others.append(run("mvr1", [3.0, 3.0, 3.0], seed=2))
    ema, mvr = outcomes(*reference, *others)
    assert set(ema.ratios.values()) == {1.0}
    # 10 of 20 steps, 7.5 of 15, never of 10.
    assert mvr.ratios == pytest.approx({"steps": 0.5, "evaluations": 1.0, "seconds": 1.0})
    *_, diverged = outcomes(*reference, *(run("mars", [3.0, math.inf], seed=s) for s in range(3)))
    assert set(diverged.ratios.values()) == {math.inf}


def contest(mvr, steps, batch, ema=(1.0, 1.0)):
    """Final test losses with two seeds; MVR-3 has the best of them, and not on validation."""
    runs = []
    for seed in (0, 1):
        runs += [
            run("ema", [3.0, ema[seed]], seed=seed),
            run("mvr1", [3.0, mvr[seed]], seed=seed, validation=0.5),
            run("mvr3", [3.0, 0.0], seed=seed, validation=0.6),
            run("ema_twice_the_steps", [3.0, steps[seed]], seed=seed, factor=2),
            run("ema_twice_the_batch", [3.0, batch[seed]], seed=seed),
        ]
    return outcomes(*runs)


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        (((0.5, 0.6), (0.7, 0.7), (0.8, 0.8)), "so the second gradient paid."),
        (((0.5, 0.8), (0.7, 0.7), (0.9, 0.9)), "so it is not clear that the second gradient paid."),
        (((0.5, 0.6), (0.4, 0.5), (0.8, 0.8)), "so the second gradient did not pay."),
        (((0.5, 0.6), (0.7, 0.7), (0.4, 0.4)), "so the second gradient did not pay."),
        (((1.5, 1.6), (1.7, 1.7), (1.8, 1.8)), "so the second gradient did not pay."),
        (((math.inf,) * 2, (math.inf,) * 2, (0.1, 0.1)), "so the second gradient did not pay."),
    ],
)
def test_the_second_gradient_pays_if_mvr_beats_everyone_with_every_seed(losses, ends):
    assert verdict(8, contest(*losses)).endswith(ends)


def test_the_verdict_judges_the_variant_of_least_validation_loss_and_gives_numbers():
    assert verdict(8, contest((0.5, 0.6), (0.4, 0.7), (0.8, 0.8))) == (
        "Batch 8: MVR-1, the best variant by validation loss, ends at a test loss of 0.5500; after "
        "equal steps, in 2.00 × the seconds, it beats EMA (1.0000, lower with 2 of 2 seeds); after "
        "equal gradient evaluations it neither beats nor loses to EMA, twice the steps (0.5500, "
        "lower with 1 of 2 seeds) and beats EMA, twice the batch (0.8000, lower with 2 of 2 "
        "seeds); so it is not clear that the second gradient paid."
    )


def test_the_verdict_does_not_judge_without_controls_or_without_mvr():
    without = [o for o in contest((0.5, 0.6), (0.7, 0.7), (0.8, 0.8)) if "twice" not in o.method]
    assert verdict(8, without).endswith(
        "whether the second gradient paid is not known without both controls."
    )
    assert verdict(8, without[:1]) == "Batch 8: no MVR took part."


def test_tables_say_what_was_never_reached_what_diverged_and_what_lies_at_an_edge():
    summary = outcomes(
        *(run("ema", [3.0, 1.0 + 0.2 * seed], seed=seed) for seed in (0, 1)),
        *(run("mvr1", [3.0, 2.0], seed=seed) for seed in (0, 1)),
        *(run("mars", [3.0, math.inf], seed=seed) for seed in (0, 1)),
    )
    shown = io.StringIO()
    settings = Settings(Path(), batch_sizes=(8,), seeds=(0, 1))
    print_tables(Console(file=shown, width=80), settings, summary)
    lines = shown.getvalue().splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in reversed(lines) if line.strip()}
    assert rows["EMA"][:4] == ["0.1*", "1.1000", "±", "0.1000"]
    assert rows["EMA"][4:] == ["1.00", "1.00", "1.00", "100"]
    assert rows["MVR-1"] == ["0.1*", "2.0000", "±", "0.0000", "—", "—", "—", "200"]
    assert rows["MARS"] == ["0.1*", "diverged", "—", "—", "—", "100"]
    assert "whose edge is the best of EMA; MVR-1; MARS." in shown.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ("mvr1",)}, "--methods must name ema, with which the others are compared"),
        ({"methods": ("ema", "ema")}, "--methods names a value twice"),
        ({"batch_sizes": ()}, "--batch-sizes needs at least one value"),
        ({"batch_sizes": (8, 0)}, "--batch-sizes must be at least 1"),
        ({"learning_rates": ()}, "--learning-rates needs at least one value"),
        ({"learning_rates": (0.0, 0.1)}, "--learning-rates must be positive"),
        ({"learning_rates": (0.2, 0.1)}, "--learning-rates must ascend"),
        ({"auxiliary_learning_rate": 0.0}, "--auxiliary-learning-rate must be positive"),
        ({"decay": 1.0}, r"--decay must lie in \[0, 1\), got 1.0"),
        ({"q": 0.0}, r"--q must lie in \(0, 1\], got 0.0"),
        ({"seeds": ()}, "--seeds needs at least one value"),
        ({"seeds": (-1,)}, "--seeds must not be negative"),
        ({"tuning_seed": -1}, "--tuning-seed must not be negative"),
        ({"tuning_seed": 2}, "--tuning-seed is 2, one of the seeds that are reported"),
        ({"num_steps": 0}, "--num-steps must be at least 1, got 0"),
        (
            {"eval_every": 301, "num_steps": 300},
            "--eval-every is 301, and there are only 300 steps",
        ),
        ({"num_eval_windows": 0}, "--num-eval-windows must be at least 1"),
        ({"context": 0}, "--context must be at least 1"),
        ({"num_blocks": -1}, "--num-blocks must not be negative, got -1"),
        ({"num_heads": 3}, "--num-heads must divide the width 64, got 3"),
        ({"output_dir": Path(__file__)}, "--output-dir must be a folder"),
    ],
)
def test_bad_argument_of_the_study_ends_in_a_sentence_that_names_it(arguments, message):
    with pytest.raises(SystemExit, match=message):
        check_settings(Settings(**{"output_dir": Path(), **arguments}))
