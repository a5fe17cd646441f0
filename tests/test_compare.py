"""The comparison of optimizers: equal budgets, equal starts, and what its records say."""

import itertools

import jax
import numpy as np
import pytest
from rich.console import Console

from comparing.methods import Method
from comparing.outcomes import first_reached, reached, saved, show_saved
from comparing.racing import best_rate
from comparing.settings import METHODS, CompareSettings
from comparing.tasks import make_task
from comparing.training import Run, Track
from images import load_images
from study import Work
from text import even_windows, load_text

TINY = {"num_validation": 50, "batch_size": 20, "channels": (4,), "max_train": 60}
TEXT = {"task": "text", "num_validation": 2, "batch_size": 2, "context": 8, "width": 8}


@pytest.fixture(scope="module")
def tiny():
    settings = CompareSettings(output_dir="unused", methods=METHODS, **TINY)
    return settings, make_task(settings)


@pytest.fixture(scope="module")
def text():
    settings = CompareSettings(output_dir="unused", num_heads=2, num_blocks=2, **TEXT)
    return settings, make_task(settings)


def track_of(subject, tmp_path, costs, **changes):
    """With steps that take the given seconds by depth, the full one 1."""
    settings, task = subject
    settings = settings.model_copy(update=changes)
    track = Track(settings, task, Work(Console(quiet=True), tmp_path, {}))
    by_depth = list(itertools.islice(itertools.cycle(costs), task.layers.num_layers))
    track.step_seconds = {name: by_depth for name in settings.methods}
    return track


def run(track, name, budget, rate=0.02, seed=3):
    return Run(track, track.methods[name], budget, rate, seed).go()


def test_a_run_ends_when_its_seconds_are_spent(tiny, tmp_path):
    track = track_of(tiny, tmp_path, (1.0, 0.25), unit="seconds", num_evaluations=2)
    found = run(track, "drop_muon_uniform", 6)
    full, last = found["depths"]
    assert full + 0.25 * last == pytest.approx(found["spent"][-1])
    assert 6 <= found["spent"][-1] < 7
    assert found["steps"][-1] == full + last > 6


def test_variance_reduction_takes_half_the_steps_of_equal_gradients(tiny, tmp_path):
    track = track_of(tiny, tmp_path, (1.0,), unit="gradients", num_evaluations=1)
    plain, reduced = run(track, "muon", 4), run(track, "muon_mvr1", 4)
    assert (plain["steps"][-1], reduced["steps"][-1]) == (4, 2)
    assert plain["gradients"][-1] == reduced["gradients"][-1] == 4


def test_all_start_alike_but_scion_in_its_ball(tiny):
    settings, task = tiny
    starts = {name: Method(name, task, settings).initial(3) for name in METHODS}
    for name, params in starts.items():
        same = jax.tree.map(np.array_equal, params, starts["muon"])
        assert all(jax.tree.leaves(same)) == (name != "scion_constrained")


@pytest.mark.parametrize("subject", ["tiny", pytest.param("text", marks=pytest.mark.deep)])
def test_drop_muon_at_depth_0_steps_as_muon(subject, request, tmp_path):
    subject = request.getfixturevalue(subject)
    track = track_of(subject, tmp_path, (1.0,), unit="steps", num_evaluations=1)
    full, dropped = (
        Run(track, track.methods[name], 4, 0.02, 3) for name in ("muon", "drop_muon_uniform")
    )
    for run in (full, dropped):
        run.step(0)
    for ours, theirs in zip(*map(jax.tree.leaves, (dropped.params, full.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_batches_are_those_of_the_seed_and_each_epoch_a_permutation(tiny):
    _, task = tiny
    first, again = (list(itertools.islice(task.batches(5), 6)) for _ in range(2))
    assert np.array_equal(first, again)
    assert sorted(np.concatenate(first[:3])) == sorted(np.concatenate(first[3:])) == [*range(60)]


def test_held_out_images_are_not_trained_on(tiny):
    settings, task = tiny
    images = load_images("mnist5k", max_train=110)
    kept = {image.tobytes() for image in np.asarray(task.data[0])}
    left = {image.tobytes() for image in images.train_images} - kept
    assert len(kept) == 60
    assert len(left) == settings.num_validation


def test_windows_of_an_evaluation_do_not_overlap():
    text = load_text()
    found = even_windows("test", text.test, 5, 9)
    assert found.shape == (5, 9)
    assert len({window.tobytes() for window in found}) == 5
    with pytest.raises(SystemExit, match="do not overlap"):
        even_windows("test", text.test, len(text.test), 9)


def test_the_best_rate_is_the_smallest_of_the_best_though_a_run_diverged():
    tuned = {"rates": [0.1, 0.2, 0.3, 0.4], "validation": [0.5, 0.3, 0.3, None]}
    assert best_rate(tuned) == 0.2


def test_a_value_is_reached_on_the_line_between_evaluations():
    assert first_reached([0, 10, 20], [1.0, 0.5, 0.3], 0.4) == pytest.approx(15)
    assert first_reached([0, 10, 20], [None, 0.5, 0.3], 0.5) == 10
    assert first_reached([0, 10, 20], [1.0, 0.5, None], 0.4) is None


def make_record(ends):
    """Of two budgets and one seed, with the test measure at the end of each."""
    runs = [
        {"method": method, "budget": budget, "spent": [0, budget], "test": [1.0, end]}
        for method, by_budget in ends.items()
        for budget, end in zip((10, 40), by_budget, strict=True)
    ]
    return {"settings": {"budgets": [10, 40], "methods": list(ends)}, "runs": runs}


def test_what_is_saved_is_the_budget_that_muon_needs_over_ones_own():
    record = make_record({"muon": [0.4, 0.2], "adamw": [0.3, 0.1]})
    assert saved(record, "adamw", 10) == pytest.approx([2.0])  # 20, half-way in the logarithm
    assert saved(record, "muon", 10) == pytest.approx([1.0])
    assert show_saved(record, "adamw", 40) == "≥ 1.00×"
    assert (
        show_saved(make_record({"muon": [0.4, 0.2], "adamw": [0.5, None]}), "adamw", 10)[0] == "≤"
    )


def test_sooner_is_where_muon_is_after_a_part_of_its_run():
    record = make_record({"muon": [0.4, 0.2], "adamw": [0.3, 0.1]})
    assert reached(record, "adamw", 1.0) == pytest.approx([0.9 / 0.8])
