"""The benchmarks of single steps at each depth count what they say."""

import json
from pathlib import Path

import chex
import pytest

import depth_cost
import two_gradients
from steps_by_depth import DepthSettings, make_subject, step_by_hand, step_of_package

# XLA rewrites and fuses as ever, so what it counts is the same: only LLVM optimizes less.
pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = DepthSettings(
    Path(), batch_size=4, channels=(4, 8), widths=(16,), transformer_width=16, repetitions=0
)
TINY_MLP = ["--models", "mlp", "--widths", "8", "--batch-size", "2", "--repetitions", "2"]


@pytest.mark.parametrize(
    ("name", "depths"), [("cnn", (1, 2)), ("mlp", (0, 1)), ("transformer", (4, 5))]
)
def test_step_costs_what_it_would_if_only_the_active_layers_were_trainable(name, depths):
    subject = make_subject(name, TINY)
    flops = []
    for depth in depths:
        package, by_hand = step_of_package(subject, depth), step_by_hand(subject, depth)
        flops.append(package.flops())
        assert package.flops() == pytest.approx(by_hand.flops(), rel=0.02)
        assert package.temporary_bytes() == pytest.approx(by_hand.temporary_bytes(), rel=0.02)
        assert package.bytes_accessed() == pytest.approx(by_hand.bytes_accessed(), rel=0.02)
    assert flops[0] > flops[1]


def test_step_by_hand_trains_as_the_package_does():
    subject = make_subject("mlp", TINY)
    package, by_hand = step_of_package(subject, 1), step_by_hand(subject, 1)
    for _ in range(3):
        package, by_hand = package.run(), by_hand.run()
    params, trained = package.arguments[0], by_hand.arguments[0]
    chex.assert_trees_all_close({name: params[name] for name in trained}, trained, rtol=1e-5)


def test_depth_cost_leaves_every_gap_and_a_plot(tmp_path):
    depth_cost.main([*TINY_MLP, "--output-dir", str(tmp_path)])
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
@pytest.mark.parametrize("benchmark", [depth_cost, two_gradients])
def test_bad_arguments_are_refused(benchmark, arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        benchmark.main([*arguments, "--output-dir", str(tmp_path)])


def test_two_gradients_leaves_every_ratio_and_a_plot(tmp_path):
    two_gradients.main([*TINY_MLP, "--output-dir", str(tmp_path)])
    text = (tmp_path / "two_gradients.json").read_text()
    costs = json.loads(text)["costs"]
    assert [(cost["depth"], cost["form"]) for cost in costs] == [
        (depth, form) for depth in (0, 1) for form in two_gradients.FORMS
    ]
    for cost in costs:
        assert 1 <= cost["flops"] <= two_gradients.ALLOWED
        assert cost["seconds"] > 0
    full, truncated = (cost["flops"] for cost in costs if cost["form"] == two_gradients.FORMS[0])
    assert full > truncated  # which shares its forward pass below
    assert str(tmp_path) not in text
    assert (tmp_path / "two_gradients.png").stat().st_size > 10_000
