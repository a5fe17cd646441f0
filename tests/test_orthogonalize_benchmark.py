"""The comparison of orthogonalizations runs, counts what it says, and judges without flattery."""

import contextlib
import io
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import orthogonalize
from dropmuon_jax.orthogonalize.batches import DEFAULT_MEMORY_LIMIT
from orthogonalization.compiled_programs import Program, compile_program, without_source
from orthogonalization.list_timing import ListTimings, Timing, quartiles, svd_cost
from orthogonalization.matrix_products import ProductRates, necessary_flops, product_flops
from orthogonalization.orthogonalizers import METHODS, make_orthogonalizer
from orthogonalization.plot import shown_condition
from orthogonalization.polar_errors import (
    Accuracy,
    Decomposition,
    compare,
    ill_conditioned,
    largest_error_ratio,
    median_error,
)
from orthogonalization.report import print_tables
from orthogonalization.shape_lists import SHAPE_LISTS, make_leaves, matrix_shape, parse_shape
from orthogonalization.verdicts import MEMORY_LIMIT, Measurements, ProgramSize, judge, summarise
from reference import polar_factor

TINY = [
    *("--shapes", "6x4x2", "3x5", "--repetitions", "3", "--rate-sizes", "16"),
    *("--program-shapes", "3x5", "--leaf-counts", "1", "3"),
    *("--accuracy-shapes", "4x6", "--conditions", "10", "100", "--seeds", "0"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a tiny comparison."""
    folder, output = tmp_path_factory.mktemp("results"), io.StringIO()
    methods = ["--methods", "optax_muon", "newton_schulz", "svd"]
    with contextlib.redirect_stdout(output):
        orthogonalize.main([*TINY, *methods, "--output-dir", str(folder)])
    return folder, output.getvalue()


@pytest.fixture(scope="module")
def record(run) -> dict:
    return json.loads((run[0] / "orthogonalize.json").read_text())


def test_run_records_every_round_and_its_ratios(record):
    (custom,) = record["lists"]
    assert custom["list"] == "custom"
    assert custom["matrices"] == {"6x4": 2, "3x5": 1}
    rows = {row["method"]: row for row in custom["methods"]}
    assert list(rows) == ["optax_muon", "newton_schulz", "svd"]
    assert rows["optax_muon"]["speed_ups"] == [1, 1, 1]
    for row in rows.values():
        assert len(row["seconds"]) == 3
        for own, reference, speed_up in zip(
            row["seconds"], rows["optax_muon"]["seconds"], row["speed_ups"], strict=True
        ):
            assert speed_up == pytest.approx(reference / own)
    share = rows["optax_muon"]["share_of_product_rate"]
    assert sorted(rows["optax_muon"]["shares_of_product_rate"])[1] == share > 0
    assert rows["svd"]["share_of_product_rate"] is None


def test_run_records_programs_accuracy_and_targets(record):
    sizes = {(size["method"], size["leaves"]): size for size in record["program_size"]}
    assert set(sizes) == {
        (method, leaves) for method in ("optax_muon", "newton_schulz") for leaves in (1, 3)
    }
    assert sizes["optax_muon", 3]["products"] == 3 * sizes["optax_muon", 1]["products"] == 45
    cases = {(a["method"], a["condition"]) for a in record["accuracy"]}
    assert len(cases) == len(record["accuracy"]) == 6
    assert all(a["error"] < 1e-4 for a in record["accuracy"] if a["method"] == "svd")
    assert len(record["targets"]) == 6
    assert {"environment", "arguments", "over_lists"} < set(record)


def test_run_leaves_a_picture_and_no_path(run):
    folder, _ = run
    picture = folder / "orthogonalize.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    text = (folder / "orthogonalize.json").read_text()
    assert str(folder) not in text
    assert str(Path.home()) not in text


def test_table_says_why_a_method_is_missing():
    console = Console(file=io.StringIO(), width=80)
    print_tables(console, GOOD, num_steps=5)
    assert "svd is not timed: too much" in console.file.getvalue()


@pytest.mark.skipif("COLUMNS" in os.environ, reason="the width is not ours")
def test_tables_fit_into_80_columns_with_the_targets_last(run):
    _, output = run
    written, targets = output.split("Written to ")
    assert "…" not in written
    assert max(map(len, written.splitlines())) <= 80
    assert targets.count("met: ") + targets.count("not judged: ") == 6
    assert "not judged: ≥ 80%" in targets


def test_networks_have_the_published_numbers_of_weights():
    sizes = {name: sum(map(math.prod, shapes)) for name, shapes in SHAPE_LISTS.items()}
    # GPT-2 small: 12 · 12 · 768². ResNet-18: 11,689,512 without batch norm and the last layer.
    assert sizes["gpt2"] == 144 * 768**2
    assert sizes["resnet18"] == 11_689_512 - 9_600 - 513_000
    assert len(SHAPE_LISTS["resnet18"]) == 20
    assert SHAPE_LISTS["cnn_cifar"] == [(3, 3, 3, 128), (3, 3, 128, 256), (3, 3, 256, 512)]
    assert [matrix_shape(leaf) for leaf in SHAPE_LISTS["cnn_mnist"]] == [
        (9, 64),
        (576, 128),
        (1152, 256),
    ]


def test_shape_is_parsed_with_and_without_a_count():
    assert parse_shape("768x3072") == [(768, 3072)]
    assert parse_shape("64x32x3") == [(64, 32)] * 3


@pytest.mark.parametrize("text", ["64", "64x", "0x4", "4x4x0", "4x4x4x4", "-1x4", "axb", ""])
def test_no_shape_is_refused(text):
    with pytest.raises(ValueError, match="is not ROWSxCOLS or ROWSxCOLSxCOUNT"):
        parse_shape(text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leaves_are_the_same_at_every_call(dtype):
    first, second = make_leaves([(3, 4), (1, 2, 3, 4)], dtype), make_leaves([(3, 4)], dtype)
    assert [leaf.shape for leaf in first] == [(3, 4), (1, 2, 3, 4)]
    assert first[0].dtype == dtype
    np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize("method", METHODS)
def test_method_keeps_shapes_and_takes_a_convolution_as_a_matrix(method):
    convolution, matrix = make_leaves([(2, 3, 4, 5), (7, 3)], "float32")
    shapes = [convolution.shape, matrix.shape]
    results = make_orthogonalizer(method, shapes)([convolution, matrix])
    assert [result.shape for result in results] == shapes
    (flat,) = make_orthogonalizer(method, [(24, 5)])([convolution.reshape(24, 5)])
    np.testing.assert_allclose(results[0].reshape(24, 5), flat, atol=0.02)  # bf16's rounding


def test_optax_muon_is_its_polynomial_and_nothing_else():
    shapes = ((5, 8), (7, 3))
    leaves = make_leaves(shapes, "float32")
    program = compile_program("optax_muon", shapes, "float32", None)
    for leaf, result in zip(leaves, program.compiled(leaves), strict=True):
        x = np.asarray(leaf, np.float64) / np.linalg.norm(leaf)
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        np.testing.assert_allclose(result, x, atol=1e-5)
    plain = sum(5 * (4 * n * n * m + 2 * n**3) for n, m in ((5, 8), (3, 7)))
    assert program.product_flops == {"float32": plain}


def test_svd_gives_the_polar_factor():
    (leaf,) = make_leaves([(7, 4)], "float32")
    (result,) = make_orthogonalizer("svd", [(7, 4)])([leaf])
    np.testing.assert_allclose(result, polar_factor(np.asarray(leaf, np.float64)), atol=1e-5)


def test_num_steps_leaves_methods_alone_that_have_their_own():
    def count(method, num_steps):
        program = compile_program(method, ((4, 4),), "float32", num_steps)
        return sum(program.product_flops.values())

    for method in ("optax_muon", "newton_schulz"):
        assert count(method, 2) < count(method, None)
    for method in ("turbo_muon", "polar_express_7"):
        assert count(method, 2) == count(method, None)


def _flops(function, *shapes, dtype="float32"):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
    return product_flops(jax.make_jaxpr(function)(*arguments))


def test_products_are_counted_as_xla_counts_them():
    def function(x, y):
        return jax.vmap(jnp.dot)(x, y) @ jnp.swapaxes(y, 1, 2)

    shapes = [(3, 4, 5), (3, 5, 6)]
    counted = _flops(function, *shapes)
    assert counted == {"float32": 3 * (2 * 4 * 5 * 6 + 2 * 4 * 6 * 5)}
    structs = [jax.ShapeDtypeStruct(shape, np.dtype("float32")) for shape in shapes]
    assert jax.jit(function).lower(*structs).cost_analysis()["flops"] == counted["float32"]


def test_products_in_a_loop_are_counted_as_often_as_it_runs():
    def by_scan(x):
        return jax.lax.scan(lambda y, _: (y @ x, None), x, length=7)[0]

    def by_for(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jax.jit(jnp.dot)(y, x), x)

    def by_map(x):
        return jax.lax.map(lambda row: row @ x, jnp.zeros((7, 1, 4)))

    assert _flops(by_scan, (4, 4)) == {"float32": 7 * 128}
    assert _flops(by_for, (4, 4)) == {"float32": 7 * 128}
    assert _flops(by_map, (4, 4)) == {"float32": 7 * 32}
    assert _flops(by_scan, (4, 4), dtype="bfloat16") == {"bfloat16": 7 * 128}


def test_of_a_conditional_the_most_expensive_branch_is_counted():
    def function(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x @ x, x)

    assert _flops(function, (4, 4)) == {"float32": 256}


@pytest.mark.parametrize("dependent", ["cpu", "tpu"])
def test_of_what_depends_on_the_platform_the_branch_of_this_one_is_counted(dependent):
    def function(x):
        branches = {dependent: lambda x: x @ x}
        return jax.lax.platform_dependent(x, **branches, default=lambda x: x @ x @ x)

    expected = 128 if jax.default_backend() == dependent else 256
    assert _flops(function, (4, 4)) == {"float32": expected}


@pytest.mark.parametrize("method", METHODS[:-1])
def test_xla_finds_hardly_more_operations_than_those_of_the_counted_products(method):
    # At 128 × 256 little is element-wise. One matrix: nothing is in a loop.
    program = compile_program(method, ((128, 256),), "float32", None)
    assert program.loops == 0
    assert 1 <= program.xla_flops / program.total_product_flops < 1.1


def test_products_that_cannot_be_counted_are_not_a_number():
    def forever(x):
        return jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ x, x)

    assert math.isnan(_flops(forever, (4, 4))["float32"])
    assert math.isnan(_flops(lambda x: jnp.linalg.svd(x)[0], (4, 4))["float32"])
    assert _flops(lambda x: jax.lax.while_loop(lambda y: y[0] < 1, jnp.sin, x), (4,)) == {}


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_necessary_products_are_those_of_the_cheaper_form(num_steps):
    def plain(x):
        for _ in range(num_steps):
            gram = x @ x.T
            x = x + (gram + gram @ gram) @ x
        return x

    def gram_form(x):
        gram = x @ x.T
        for step in range(num_steps):
            z = gram + gram @ gram
            q = z if step == 0 else q @ z  # noqa: F821 — set in the first step
            if step < num_steps - 1:
                gram = z @ gram @ z
        return q @ x

    for shape in ((6, 6), (6, 9), (6, 60)):
        cheaper = min(_flops(form, shape)["float32"] for form in (plain, gram_form))
        assert necessary_flops([shape], num_steps) == cheaper
        assert necessary_flops([shape[::-1], shape], num_steps) == 2 * cheaper
    assert necessary_flops([(1, 2, 3, 60)], num_steps) == necessary_flops([(6, 60)], num_steps)


def test_rate_is_positive_in_both_dtypes():
    rates = ProductRates([8, 16])
    assert rates.measure("float32", 0.01) > 0
    assert rates.measure("bfloat16", 0.0) > 0


def test_program_text_is_the_same_wherever_the_source_lies():
    text = without_source(
        'HloModule jit_f\n\nFileNames\n1 "/home/me/a.py"\n\nFunctionNames\n1 "f"\n\n\n%f {\n'
        '  %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_name="a}b" stack_frame_id=3}, x={1}\n}\n'
    )
    assert "/home" not in text
    assert "FunctionNames" not in text
    assert "  %dot.1 = f32[2]{0} dot(%a, %b), x={1}\n" in text
    compiled = compile_program("optax_muon", ((3, 5),), "float32", None).compiled
    assert ".py" not in without_source(compiled.as_text())


def test_ill_conditioned_matrices_have_the_spectrum_they_should():
    for rows, cols in ((6, 6), (4, 9), (9, 4)):
        matrix = ill_conditioned(rows, cols, 1e4, seed=1)
        expected = np.geomspace(1, 1e-4, min(rows, cols))
        singular_values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(singular_values, expected, rtol=1e-9)
    assert not np.allclose(matrix, ill_conditioned(9, 4, 1e4, seed=2))


def test_result_is_compared_with_the_polar_factor():
    u, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 3)))
    v, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    matrix = Decomposition(u, np.array([1, 0.1, 1e-5]), v.T)
    assert compare(matrix, u @ v.T)["error"] == pytest.approx(0, abs=1e-12)
    found = compare(matrix, (u * [1.1, 0.9, 0.2]) @ v.T)
    assert found["error"] == pytest.approx(math.sqrt((0.1**2 + 0.1**2 + 0.8**2) / 3))
    assert (found["smallest"], found["largest"]) == pytest.approx((0.2, 1.1))
    # The third singular value is below 1e-3 of the norm.
    assert (found["smallest_gain"], found["largest_gain"]) == pytest.approx((0.9, 1.1))
    assert all(map(math.isnan, compare(matrix, np.full((7, 3), np.nan)).values()))


def _accuracy(method, error, *, condition=1e3, seed=0, gains=(0.9, 1.1)) -> Accuracy:
    return Accuracy(method, 4, 6, condition, seed, error, 0.1, 1.2, *gains)


def test_errors_are_compared_on_the_same_matrix():
    accuracies = [
        _accuracy("optax_muon", 0.4),
        _accuracy("optax_muon", 0.2, seed=1),
        _accuracy("newton_schulz", 0.1),
        _accuracy("newton_schulz", 0.3, seed=1),
    ]
    assert median_error(accuracies, "newton_schulz", 1e3) == pytest.approx(0.2)
    ratio = largest_error_ratio(accuracies, "newton_schulz", "optax_muon")
    assert ratio == pytest.approx(1.5)
    accuracies[2] = _accuracy("newton_schulz", math.nan)
    assert math.isnan(median_error(accuracies, "newton_schulz", 1e3))
    assert math.isnan(largest_error_ratio(accuracies, "newton_schulz", "optax_muon"))


def test_picture_shows_the_largest_condition_at_which_the_band_is_judged():
    assert shown_condition([_accuracy("svd", 0, condition=c) for c in (10, 1e3, 1e5)]) == 1e3
    assert shown_condition([_accuracy("svd", 0, condition=c) for c in (1e4, 1e5)]) == 1e4


def test_quartiles_of_few_rounds():
    assert quartiles([2.0]) == (2.0, 2.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def test_svd_costs_as_much_as_the_matrix_of_a_convolution():
    assert svd_cost([(3, 3, 2, 5), (4, 8)]) == 18 * 5 * 5 + 4 * 8 * 4


def _program(*, hlo_bytes=100, temporary_bytes=10) -> Program:
    return Program(None, {}, 0.0, 0, 0.0, 0.0, hlo_bytes, 1, 1, temporary_bytes)


def _list(name, speed_up, *, share=0.9, temporary_bytes=10) -> ListTimings:
    program = _program(temporary_bytes=temporary_bytes)
    timings = [
        Timing("optax_muon", program, [1.0], [1.0], [0.5]),
        Timing("newton_schulz", program, [1 / speed_up], [speed_up], [share]),
    ]
    return ListTimings(name, ((4, 4),), timings, {"svd": "too much"})


def _sizes(growth) -> list[ProgramSize]:
    return [
        ProgramSize((4, 4), leaves, method, _program(hlo_bytes=size))
        for method in ("optax_muon", "newton_schulz")
        for leaves, size in ((1, 100), (48, round(100 * growth)))
    ]


GOOD = Measurements(
    [_list("gpt2", 4.0), _list("stack", 1.0)],
    _sizes(1.2),
    [_accuracy("optax_muon", 0.3), _accuracy("newton_schulz", 0.3)],
)


def test_memory_is_held_against_the_default_of_the_package():
    assert MEMORY_LIMIT == DEFAULT_MEMORY_LIMIT


def test_targets_are_met_by_what_just_meets_them():
    targets = judge(GOOD)
    assert [target.met for target in targets] == [True] * 6
    assert "2.00 × in the geometric mean" in targets[0].found
    assert "1.00 × on stack" in targets[1].found


@pytest.mark.parametrize(
    ("missed", "change"),
    [
        ({0, 1}, {"lists": [_list("gpt2", 3.9), _list("stack", 0.99)]}),
        ({0}, {"accuracies": [_accuracy("optax_muon", 0.3), _accuracy("newton_schulz", 0.31)]}),
        ({2}, {"lists": [_list("gpt2", 4.0, share=0.79), _list("stack", 1.0)]}),
        ({3}, {"sizes": _sizes(1.21)}),
        ({4}, {"lists": [_list("gpt2", 4.0, temporary_bytes=2**31), _list("stack", 1.0)]}),
        (
            {5},
            {
                "accuracies": [
                    _accuracy("optax_muon", 0.3),
                    _accuracy("newton_schulz", 0.3, gains=(0.84, 1.1)),
                ]
            },
        ),
        (
            {0, 5},
            {"accuracies": [_accuracy("optax_muon", 0.3), _accuracy("newton_schulz", math.nan)]},
        ),
    ],
)
def test_missed_target_is_said_to_be_missed(missed, change):
    targets = judge(GOOD._replace(**change))
    assert {i for i, target in enumerate(targets) if target.met is False} == missed


def test_targets_without_a_measurement_are_not_judged():
    accuracies = [_accuracy(m, 0.3, condition=1e4) for m in ("optax_muon", "newton_schulz")]
    targets = judge(GOOD._replace(lists=[_list("custom", 2.0)], accuracies=accuracies))
    assert [target.met for target in targets] == [True, True, None, True, True, None]
    one_large_list = judge(GOOD._replace(lists=[_list("gpt2", 2.0)]))
    assert one_large_list[2].met is None
    too_slow = judge(GOOD._replace(lists=[_list("gpt2", 2.0, share=0.7)]))
    assert too_slow[2].met is False


def test_summary_leaves_out_lists_on_which_a_method_was_not_timed():
    summary = summarise(GOOD.lists, "newton_schulz")
    assert summary is not None
    assert (summary.num_lists, summary.slowest_list, summary.slowest) == (2, "stack", 1.0)
    assert summarise(GOOD.lists, "svd") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lists"], "--lists needs at least one value, or --shapes"),
        (["--lists", "small", "small"], "--lists names a value twice"),
        (["--methods"], "--methods needs at least one value"),
        (["--methods", "newton_schulz"], "--methods must name optax_muon"),
        (["--methods", "optax_muon", "svd"], "--methods must name newton_schulz"),
        (["--shapes", "64"], "--shapes: '64' is not ROWSxCOLS or ROWSxCOLSxCOUNT"),
        (["--program-shapes", "4x4x2"], "--program-shapes takes ROWSxCOLS without a count"),
        (["--accuracy-shapes", "1x4"], "--accuracy-shapes needs two rows and columns"),
        (["--leaf-counts", "0"], "--leaf-counts must be at least 1"),
        (["--rate-sizes", "0"], "--rate-sizes must be at least 1"),
        (["--conditions", "0.5"], "--conditions must be at least 1"),
        (["--conditions", "nan"], "--conditions must be at least 1"),
        (["--conditions", "inf"], "--conditions must be at least 1 and finite"),
        (["--conditions"], "--conditions needs at least one value"),
        (["--seeds", "-1"], "--seeds must not be negative"),
        (["--seeds", "1", "1"], "--seeds names a value twice"),
        (["--repetitions", "0"], "--repetitions must be at least 1"),
        (["--num-steps", "0"], "--num-steps must be at least 1"),
        (["--seconds-per-list", "-1"], "--seconds-per-list must not be negative"),
        (["--svd-limit", "nan"], "--svd-limit must not be negative"),
        (["--output-dir", __file__], "--output-dir must be a folder"),
    ],
)
def test_bad_argument_ends_in_a_sentence_that_names_it(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        orthogonalize.main(["--output-dir", str(tmp_path / "results"), *arguments])
    assert not (tmp_path / "results").exists()


def test_what_is_not_timed_is_said_with_the_reason():
    def left_out(name, **arguments):
        settings = orthogonalize.Settings(Path(), **arguments)
        return list(orthogonalize.not_timed(settings, name, SHAPE_LISTS[name]))

    assert left_out("stack") == ["newton_schulz_muon", "newton_schulz_dion", "svd"]
    assert left_out("stack", methods=METHODS, svd_limit=1e12) == []
    assert left_out("stack", methods=("optax_muon", "newton_schulz")) == []
    assert left_out("resnet18") == ["svd"]
    assert left_out("cnn_cifar") == left_out("small") == []


def test_own_shapes_are_timed_alone_unless_lists_are_named():
    def names(**arguments):
        return list(orthogonalize.leaves_by_list(orthogonalize.Settings(Path(), **arguments)))

    assert names() == list(SHAPE_LISTS)
    assert names(shapes=("2x3",)) == ["custom"]
    assert names(shapes=("2x3",), lists=("small",)) == ["small", "custom"]
