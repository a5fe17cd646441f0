"""The study of stacked layers counts what it says, and one program takes every depth."""

import dataclasses
import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

import depth_cost
import stacked_cost
from by_hand import logits_by_hand
from gpt import GPT
from stacked_study.counts import compilations
from stacked_study.flops import matmul_flops
from stacked_study.programs import Problem
from stacked_study.settings import Settings, check_settings
from stacked_study.timing import ALLOWED, line_through
from stacked_study.verdicts import ALLOWED_MEMORY
from steps_by_depth import DepthSettings, Step, make_subject, step_by_hand, step_of_package

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = [
    *("--num-blocks", "2", "--width", "32", "--num-heads", "2", "--vocabulary", "5"),
    *("--context", "16", "--batch-size", "4", "--compile-blocks", "2", "--compile-width", "4"),
]
TINY = Settings(Path(), num_blocks=2, width=8, num_heads=2, vocabulary=5, context=4, batch_size=2)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder of a tiny study."""
    folder = tmp_path_factory.mktemp("results")
    arguments = [*SIZES, "--policies", "inputs", "--repetitions", "1", "--gradient-only"]
    stacked_cost.main([*arguments, "--output-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def record(results) -> dict:
    return json.loads((results / "stacked_cost.json").read_text())


@pytest.fixture(scope="module")
def tiny() -> Problem:
    return Problem(TINY)


def test_study_records_every_program_at_every_depth(record):
    depths: dict = {}
    for row in record["programs"]:
        depths.setdefault((row["part"], row["form"]), []).append(row["depth"])
        assert row["seconds"] >= row["best_seconds"] > 0
    assert depths == {
        ("gradient", "dynamic"): [1, 2, 3],
        ("gradient", "static"): [1, 2],
        ("gradient", "lax.scan"): [1],
    }


def test_one_program_takes_the_gradient_at_every_depth(record):
    programs = {
        row["form"]: row["num_programs_of_all_depths"]
        for row in record["programs"]
        if "num_programs_of_all_depths" in row
    }
    assert programs == {"dynamic": 1, "static": 2, "lax.scan": 1}
    found = {row["form"]: row for row in record["compilations"]}
    assert found["dynamic"]["num_programs"] == 1
    assert found["static"]["num_programs"] == found["static"]["num_depths"] == 3
    assert found["static"]["characters"] > 1.5 * found["dynamic"]["characters"]


def test_gradient_needs_no_more_memory_than_a_rematerialized_scan(record):
    memory = {row["form"]: row.get("temporary_bytes") for row in record["programs"][::-1]}
    assert memory["dynamic"] <= ALLOWED_MEMORY * memory["lax.scan"]


def test_matrix_products_of_the_gradient_lie_on_the_line(record):
    [line] = [line for line in record["lines"] if line["statistic"] == "flops"]
    assert line["b"] > 0
    assert list(line["deviations"]) == ["1", "2", "3"]
    for deviation in line["deviations"].values():
        assert deviation == pytest.approx(0, abs=1e-12)
    assert any("the same FLOPs" in sentence for sentence in record["verdicts"])


def test_study_leaves_its_verdicts_and_a_plot_without_paths(record, results):
    for words in ("Gradient that saves inputs", "temporary memory", "Gradient with static depth"):
        assert any(words in sentence for sentence in record["verdicts"])
    assert str(results) not in json.dumps(record)
    assert (results / "stacked_cost.png").stat().st_size > 10_000


def test_one_program_takes_the_step_at_every_depth(tiny):
    steps = tiny.by_depth("step", "dynamic", "inputs", range(4))
    with compilations() as compiled:
        for program in steps.values():
            program.run()
    assert len(compiled) == 1


@pytest.mark.parametrize(("part", "policy"), [("gradient", "everything"), ("step", "inputs")])
def test_matrix_products_are_those_of_a_static_depth(tiny, part, policy):
    traced, static = (
        {case.depth: program.flops() for case, program in programs.items()}
        for programs in (tiny.by_depth(part, f, policy, (1, 2, 3)) for f in ("dynamic", "static"))
    )
    assert traced == static
    assert traced[1] > traced[2] > traced[3]


def test_update_of_all_layers_has_the_matrix_products_of_the_update_by_hand(tiny):
    flops = {(case.form, case.depth): p.flops() for case, p in tiny.of_update().items()}
    assert flops["dynamic", 0] == flops["all active", 0] == flops["by hand", 0]
    assert flops["dynamic", 0] > flops["dynamic", 2] > flops["dynamic", 3] > 0


def test_logits_by_hand_are_those_of_the_model():
    model = GPT(vocabulary=5, width=8, num_heads=2, num_blocks=3, max_length=6, tied=True)
    tokens = jnp.array([[0, 3, 1], [4, 2, 2]])
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    rows = [
        jax.tree.map(lambda leaf, s=s: leaf[s], params["blocks"]) for s in (slice(1), slice(1, 3))
    ]
    expected = jax.jit(model.apply)({"params": params}, tokens)
    by_hand = jax.jit(functools.partial(logits_by_hand, model))(params, rows, tokens)
    chex.assert_trees_all_close(by_hand, expected, rtol=1e-5)


def test_matrix_products_count_at_every_turn_of_a_loop():
    matrix = jnp.ones((2, 3))

    @jax.jit
    def function(x, depth):
        x = jax.lax.fori_loop(0, 4, lambda _, x: x @ matrix @ matrix.T, x)
        x, _ = jax.lax.scan(lambda x, _: (x @ matrix @ matrix.T, None), x, length=5)
        x = jax.lax.fori_loop(depth, 7, lambda _, x: x @ matrix @ matrix.T, x)
        return jax.lax.cond(depth > 2, lambda x: x @ matrix, lambda x: jnp.zeros((8, 3)), x)

    product = 2 * 8 * 2 * 3
    for depth, turns in ((jnp.int32(2), 5), (jnp.int32(4), 3)):
        arguments = jnp.ones((8, 2)), depth
        flops = matmul_flops(function.trace(*arguments), arguments)
        assert flops == product * (2 * (4 + 5 + turns) + (depth > 2))


def test_line_passes_through_the_first_block_and_the_last_one():
    line = line_through({0: 99.0, 1: 7.0, 2: 5.5, 3: 3.0, 4: 1.0})  # three blocks and a head
    assert (line.a, line.b) == (1.0, 2.0)
    assert line.deviations == pytest.approx({0: 99 / 7 - 1, 1: 0.0, 2: 0.1, 3: 0.0, 4: 0.0})
    assert line.worst_depth == 2
    assert not line.holds
    assert ALLOWED < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ()}, "--policies needs at least one value"),
        ({"compile_blocks": (4, 4)}, "--compile-blocks names a value twice"),
        ({"num_blocks": 1}, "--num-blocks must be at least 2"),
        ({"context": 0}, "--context must be at least 1"),
        ({"num_heads": 3}, "--num-heads must divide the width 8"),
        ({"compile_width": 7}, "--compile-width must be even"),
        ({"repetitions": -1}, "--repetitions must not be negative"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(SystemExit, match=message):
        check_settings(dataclasses.replace(TINY, **changes))


@pytest.fixture(scope="module")
def steps_of_gpt() -> tuple[Step, Step]:
    """Of the package and by hand, from the second of two blocks on."""
    subject = make_subject("gpt", DepthSettings(Path(), batch_size=4, gpt_width=16, gpt_blocks=2))
    return step_of_package(subject, 2), step_by_hand(subject, 2)


def test_step_from_a_row_of_the_stack_costs_what_it_would_if_only_that_were_trainable(steps_of_gpt):
    package, by_hand = steps_of_gpt
    assert package.flops() == pytest.approx(by_hand.flops(), rel=0.02)


def test_step_by_hand_trains_rows_of_the_stack_as_the_package_does(steps_of_gpt):
    package, by_hand = steps_of_gpt
    frozen = jax.tree.map(lambda leaf: jnp.array(leaf[0]), package.arguments[0]["blocks"])
    for _ in range(3):
        package, by_hand = package.run(), by_hand.run()
    params, trained = package.arguments[0], by_hand.arguments[0]
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], params["blocks"]), frozen)
    params = {"blocks": jax.tree.map(lambda leaf: leaf[1:], params.pop("blocks")), **params}
    for tree in (params, trained):
        # Its gradient is 0 but for rounding, which Adam scales to full size: softmax does not see
        # what is added to every key.
        del tree["blocks"]["attention"]["key"]["bias"]
    ours = {name: params[name] for name in trained}
    # A step moves a parameter by some 1e-3.
    chex.assert_trees_all_close(ours, trained, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpt-width", "30"], "--gpt-width must be a multiple of 4"),
        (["--gpt-blocks", "0"], "--gpt-blocks must be at least 1"),
    ],
)
def test_bad_stacks_are_refused_by_depth_cost(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        depth_cost.main([*arguments, "--output-dir", str(tmp_path)])
