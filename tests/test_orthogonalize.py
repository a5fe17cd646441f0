"""The orthogonalization kernel: accuracy, laws, counted cost, many leaves at once."""

import functools
import importlib
import re
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm
import reference
from dropmuon_jax.algorithm import polar_factor
from dropmuon_jax.orthogonalize.batches import _groups
from dropmuon_jax.orthogonalize.coefficients import POLYNOMIALS, resolve_polynomials
from dropmuon_jax.orthogonalize.newton_schulz import TF32, _iterate, accelerator_products
from dropmuon_jax.orthogonalize.polynomials import (
    choose_segments,
    count_products,
    evaluate,
    factors,
)

# --- Accuracy: the table of newton_schulz_lmo's docstring ----------------------------------------

# Coefficients, steps and dtype of the iteration; the smallest singular value; the band; and by how
# much singular vectors may be rotated. Measured over more shapes and seeds: see the docstring.
BANDS = [
    ("polar_express", 5, "float32", 1e-3, (0.86, 1.14), 0.03),
    ("polar_express", 5, "float32", 1e-2, (0.87, 1.13), 2e-3),
    ("polar_express", 6, "float32", 1e-3, (1 - 2e-3, 1 + 2e-3), 1e-3),
    ("polar_express", 7, "float32", 1e-3, (1 - 1e-4, 1 + 1e-4), 1e-4),
    ("polar_express", 5, "float16", 1e-3, (0.77, 1.13), 0.2),
    ("polar_express", 5, "float16", 1e-2, (0.86, 1.13), 0.1),
    ("polar_express", 5, "bfloat16", 1e-3, (0.0, 1.14), 1.0),
    ("polar_express", 5, "bfloat16", 1e-2, (0.82, 1.14), 0.3),
    ("dion", 5, "float32", 1e-3, (0.47, 1.15), 2e-3),
    ("dion", 5, "float32", 1e-2, (0.97, 1.04), 1e-3),
    ("muon", 5, "float32", 1e-3, (0.46, 1.21), 2e-3),
    ("muon", 5, "float32", 1e-2, (0.68, 1.14), 1e-3),
    ("turbo_muon", 4, "float32", 1e-2, (0.78, 1.06), 0.6),
    ("nonic", 3, "float32", 1e-3, (0.37, 1.17), 5e-3),
    ("nonic", 3, "float32", 1e-2, (0.83, 1.17), 2e-3),
    ("nonic", 4, "float32", 1e-2, (1 - 1e-3, 1 + 1e-3), 1e-3),
    ("nonic", 3, "float16", 1e-2, (0.77, 1.18), 0.1),
    # Many steps overflow nothing.
    ("polar_express", 30, "float16", 5e-2, (0.86, 1.13), 0.1),
]
deep = pytest.mark.deep
SHAPES = [
    (8, 32),
    (48, 48),
    *(pytest.param(shape, marks=deep) for shape in ((8, 8), (100, 130), (128, 32), (64, 256))),
]


def spectra(rank: int, smallest: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Singular values of Frobenius norm 1 and at least `smallest`."""
    half = rank // 2
    kinds = [
        np.geomspace(smallest, 1, rank),
        # The worst case: rounding of XXᵀ is relative to the largest.
        np.r_[1.0, np.full(rank - 1, smallest)],
        np.r_[np.ones(half), np.full(rank - half, smallest)],
        rng.uniform(smallest, 1, rank),
        10 ** rng.uniform(np.log10(smallest), 0, rank),
    ]
    for _ in range(60):
        kinds = [np.maximum(s, smallest * np.linalg.norm(s)) for s in kinds]
    return [s / np.linalg.norm(s) for s in kinds]


def rotation(size: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def bases(shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    left, right = (rotation(size, rng)[:, : min(shape)] for size in shape)
    return left, right.T


@functools.cache
def compiled_iteration(coefficients: str, num_steps: int, dtype: str) -> Any:
    """One program for each shape, for every smallest singular value."""
    return jax.jit(dm.orthogonalize.newton_schulz(coefficients, num_steps=num_steps, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("coefficients", "num_steps", "dtype", "smallest", "band", "rotated"), BANDS
)
def test_singular_values_end_in_the_stated_band(
    coefficients, num_steps, dtype, smallest, band, rotated, shape
):
    rng = np.random.default_rng(sum(shape))
    kinds = [s for _ in range(2) for s in spectra(min(shape), smallest, rng)]
    pairs = [bases(shape, rng) for _ in kinds]
    stack = [(left * s) @ right for s, (left, right) in zip(kinds, pairs, strict=True)]
    iteration = compiled_iteration(coefficients, num_steps, dtype)
    results = np.asarray(iteration(jnp.asarray(np.stack(stack), jnp.float32)), np.float64)
    for result, (left, right) in zip(results, pairs, strict=True):
        values = np.linalg.svd(result, compute_uv=False)
        gains = np.diag(left.T @ result @ right.T)
        assert band[0] <= values.min()
        assert values.max() <= band[1]
        assert np.linalg.norm(result - (left * gains) @ right, 2) <= rotated


@pytest.mark.parametrize(
    ("name", "shape", "num_steps"),
    [
        *((name, (2, 4, 9), 10) for name in reference.COEFFICIENTS),
        *((name, (6, 6), 4) for name in reference.COEFFICIENTS),
        ("polar_express", (9, 4), 1),
        ("muon", (1, 7), 1),
    ],
)
def test_every_coefficient_set_equals_float64_numpy(name, shape, num_steps):
    x = np.random.default_rng(0).normal(size=shape)
    rows, start = reference.published_rows(name, num_steps), reference.COEFFICIENTS[name][1]
    with jax.enable_x64(True):
        kernel = dm.orthogonalize.newton_schulz(name, num_steps=num_steps)
        ours = jax.jit(kernel)(jnp.asarray(x))
    matrices = x.reshape(-1, *shape[-2:])
    theirs = [reference.polynomial_polar_factor(matrix, rows, start) for matrix in matrices]
    np.testing.assert_allclose(ours.reshape(matrices.shape), theirs, atol=1e-11)


@pytest.mark.parametrize("start", ["frobenius", "schatten", "aol"])
def test_own_rows_are_run_in_their_order_from_any_start(start):
    rows = ((3.0, -3.0, 1.0), (1.5, -0.5, 0.0), (2.0, -1.5, 0.5))
    x = np.random.default_rng(1).normal(size=(3, 8))
    expected = reference.polynomial_polar_factor(x, rows, start)
    kernel = dm.orthogonalize.newton_schulz(rows, preconditioning=start)
    np.testing.assert_allclose(jax.jit(kernel)(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


@pytest.mark.parametrize("iteration", ["bfloat16", "float16", "float32"])
def test_the_result_has_the_dtype_of_the_array_whatever_the_iteration(iteration):
    kernel = dm.orthogonalize.newton_schulz(dtype=iteration)
    for dtype in ("bfloat16", "float16", "float32"):
        assert jax.eval_shape(kernel, jax.ShapeDtypeStruct((8, 24), dtype)).dtype == dtype


# --- The laws of the LMO --------------------------------------------------------------------------

AXES = MuonDimensionNumbers(reduction_axis=1, output_axis=2)


def compiled_lmo(**options: Any) -> Any:
    tx: Any = dm.newton_schulz_lmo(dimension_numbers=AXES, **options)
    return jax.jit(lambda stack: tx.update(stack, tx.init(stack))[0])


def test_signs_sizes_rotations_and_transposes_pass_through():
    rng, lmo = np.random.default_rng(0), compiled_lmo(num_steps=7)
    for spectrum in ([1.0, 0.3, 0.1, 2.1e-3], [1.0, 1.0, 1.0, 1.0]):
        left, right = bases((4, 9), rng)
        x = np.float32((left * spectrum) @ right)
        p, q = rotation(4, rng), rotation(9, rng)
        others = [-x, 2.0**-90 * x, 2.0**90 * x, 1e-30 * x, 1e30 * x, p @ x @ q]
        plain, minus, small, large, tiny, huge, rotated = np.asarray(
            lmo(jnp.asarray(np.stack([x, *others]), jnp.float32)), np.float64
        )
        np.testing.assert_allclose(plain, left @ right, atol=2e-4)
        for powers in (-minus, small, large):
            np.testing.assert_array_equal(powers, plain)
        # Measured: at most 3e-5.
        for sizes in (tiny, huge):
            np.testing.assert_allclose(sizes, plain, atol=2e-4)
        np.testing.assert_allclose(rotated, p @ plain @ q, atol=2e-4)
        np.testing.assert_allclose(lmo(x.T[None])[0], plain.T, atol=2e-4)


# Scales, for bfloat16 and float32 up to where a reciprocal is subnormal; and the distance from the
# polar factor. The iteration runs in float32 at least, so that only the result is rounded.
EXTREMES = {
    "bfloat16": ((1.0, 1e-30, 1e30, 3e38), 4e-3),
    "float16": ((1.0, 1e-1, 1e4), 5e-4),
    "float32": ((1.0, 1e-30, 1e30, 3e38), 1e-5),
    "float64": ((1.0, 1e-250, 1e250), 1e-12),
}


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(
    "shape", [(4, 4), (1, 6), *(pytest.param(s, marks=deep) for s in ((2, 5), (5, 2), (6, 1)))]
)
@pytest.mark.parametrize("dtype", EXTREMES)
def test_the_direction_is_right_at_every_scale_and_dtype(dtype, shape):
    (scales, atol), rng = EXTREMES[dtype], np.random.default_rng(3)
    left, right = bases(shape, rng)
    plain = (left * [1.0, 0.5, 0.2, 0.1][: min(shape)]) @ right
    plain /= np.abs(plain).max()
    # In numbers that every dtype has: no other singular value comes of rounding.
    rank_one = np.outer(*([1.0, -2.0, 0.5, 4.0, 0.25, -1.0][:size] for size in shape))
    subnormal = np.full(shape, {"float64": 0.0, "float16": 1e-7}.get(dtype, 1e-40))
    stack = np.stack([*(scale * plain for scale in scales), rank_one, 0 * plain, subnormal])
    with jax.enable_x64(dtype == "float64"):
        found = compiled_lmo(num_steps=8)(jnp.asarray(stack, dtype))
        assert found.dtype == dtype
        found, given = (np.asarray(x, float) for x in (found, jnp.asarray(stack, dtype)))
    for matrix, direction in zip(given[: len(scales)], found, strict=False):
        np.testing.assert_allclose(direction, polar_factor(matrix), atol=atol)
    expected = rank_one / np.linalg.norm(rank_one)
    np.testing.assert_allclose(found[-3], expected, atol=atol)
    assert not found[-2].any()
    assert np.linalg.norm(found[-1], 2) < 1.01


# --- Polar Express's coefficients -----------------------------------------------------------------


def composed(rows: Any, x: Any) -> Any:
    return functools.reduce(lambda x, row: evaluate(row, x), rows, x)


def test_remez_gives_the_published_rows_of_polar_express():
    ours = dm.orthogonalize.polar_express_coefficients(8)
    np.testing.assert_allclose(ours, POLYNOMIALS["polar_express"].coefficients, rtol=0, atol=5e-9)


def test_the_nonics_are_remezs():
    ours = dm.orthogonalize.polar_express_coefficients(4, 2.5e-3, degree=9, cushion=0)
    np.testing.assert_allclose(ours, POLYNOMIALS["nonic"].coefficients, rtol=0, atol=1e-9)


@pytest.mark.parametrize("degree", [5, 9])
@pytest.mark.parametrize("smallest", [1e-3, 0.03, 0.5, 0.9])
def test_errors_alternate_between_their_extremes(degree, smallest):
    """Chebyshev's condition, by which no odd polynomial of the degree is nearer to 1."""
    (step,) = dm.orthogonalize.polar_express_coefficients(1, smallest, degree=degree, cushion=0)
    error = evaluate(step, np.linspace(smallest, 1, 20001)) - 1
    largest = np.abs(error).max()
    signs = np.sign(error[np.abs(error) >= largest * (1 - 1e-3)])
    assert np.count_nonzero(np.diff(signs)) == (degree + 1) // 2
    assert largest < 1


@pytest.mark.parametrize(
    "polynomial", [(3.0, -2.0), (1.5, -0.5, 0.1, 0.2), (2.0, 1.0, -3.0, 0.5, -0.25), (1.0, 0, 0, 0)]
)
def test_factors_multiply_to_the_polynomial(polynomial):
    first, second = factors(polynomial)
    product = np.polynomial.polynomial.polymul(first, second or (1.0,))
    np.testing.assert_allclose(np.trim_zeros(polynomial, "b"), product, atol=1e-12)
    assert max(len(first), len(second or ())) <= 3


def test_three_nonics_are_no_further_from_the_polar_factor_than_optaxs_five_quintics():
    """By their polynomials, on the spectra that the benchmark measures and on normal numbers."""
    nonics = POLYNOMIALS["nonic"].coefficients[:3]
    for rank in (16, 128, 1024):
        normal = np.linalg.svd(
            np.random.default_rng(rank).normal(size=(rank, rank)), compute_uv=False
        )
        for spectrum in [*(np.geomspace(1, 10.0**-k, rank) for k in range(1, 6)), normal]:
            by_nonics = composed(nonics, spectrum / np.sum(spectrum**4) ** 0.25)
            by_quintics = composed(reference.MUON * 5, spectrum / np.linalg.norm(spectrum))
            assert np.linalg.norm(1 - by_nonics) <= np.linalg.norm(1 - by_quintics)


def test_easing_divides_before_each_step():
    plain = dm.orthogonalize.polar_express_coefficients(2)
    eased = dm.orthogonalize.polar_express_coefficients(2, ease=1.25)
    expected = composed(plain[1:], composed(plain[:1], 0.3 / 1.25) / 1.25)
    assert composed(eased, 0.3) == pytest.approx(expected, rel=1e-12)


# --- Cost, counted --------------------------------------------------------------------------------


def lower(shapes: Any, platform: str = "cpu", **options: Any) -> Any:
    tx = dm.newton_schulz_lmo(**options)
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    jitted = jax.jit(lambda tree: tx.update(tree, tx.init(tree))[0])
    return jitted.trace(leaves).lower(lowering_platforms=(platform,))


def count_dots(lowered: Any) -> int:
    """Matrix products in the program for its platform."""
    return len(re.findall(r"stablehlo\.dot_general", lowered.as_text()))


@pytest.mark.parametrize(
    ("shape", "name", "num_steps"),
    [
        ((256, 256), "polar_express", 5),
        ((256, 350), "polar_express", 5),
        ((256, 450), "polar_express", 7),
        ((256, 1024), "polar_express", 7),
        ((256, 256), "nonic", 3),
        ((256, 1024), "nonic", 3),
    ],
)
def test_the_counted_cost_is_xlas(shape, name, num_steps):
    options = {"coefficients": name, "num_steps": num_steps}
    kernel = dm.orthogonalize.newton_schulz(**options)
    rows = kernel.polynomials.eased(2.0**-24)
    products = count_products(rows, choose_segments(rows, *shape, 2.0**-24), *shape)
    flops = lower([shape], **options).cost_analysis()["flops"]
    # The elementwise rest is of lower order.
    assert flops == pytest.approx(2 * products, rel=0.1)
    assert sum(kernel.multiplications(*shape[::-1])) == products


def test_three_nonics_take_as_many_products_as_four_quintics():
    nonics, quintics = POLYNOMIALS["nonic"].coefficients[:3], reference.MUON * 4
    assert count_products(nonics, (1,) * 3, 1, 1) == count_products(quintics, (1,) * 4, 1, 1) == 12


def test_the_iteration_starts_afresh_where_rounding_would_pass_the_polynomials_error():
    five, seven = (dm.orthogonalize.polar_express_coefficients(n) for n in (5, 7))
    wide = (64, 6400)
    assert choose_segments(five, *wide, 2.0**-24) == (5,)  # float32
    assert choose_segments(seven, *wide, 2.0**-24) == (2, 2, 3)
    assert choose_segments(five, *wide, 2.0**-11) == (2, 2, 1)  # float16, TF32
    assert choose_segments(five, *wide, 2.0**-8) == (1, 1, 1, 1, 1)  # bfloat16
    # Between the two: the second R has eigenvalues up to 4, which its rounding is relative to.
    assert choose_segments(five, *wide, 2.0**-10) == (1, 1, 1, 1, 1)
    assert choose_segments([(9.0, 9.0, 9.0)] * 30, *wide, 2.0**-24)[0] <= 2  # diverging rows


@pytest.mark.parametrize(
    ("platform", "precision", "segments"),
    [
        ("cuda", None, (2, 2, 1)),  # TF32
        ("rocm", "default", (2, 2, 1)),
        ("tpu", None, (1, 1, 1, 1, 1)),  # bfloat16
        ("cuda", "highest", (5,)),
        ("tpu", jax.lax.Precision.HIGHEST, (5,)),
    ],
)
def test_accelerators_round_float32_unless_told_otherwise(platform, precision, segments):
    lowered = lower([(32, 256)], platform, precision=precision)
    products = sum(2 + 4 * length - 3 for length in segments)
    assert count_dots(lowered) == products
    assert ("HIGHEST" in lowered.as_text()) == (segments == (5,))


def test_half_precision_on_an_accelerator_gives_what_it_gives_on_a_cpu():
    """The accelerator's program, run here; the CPU's rounds by itself and multiplies in float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.diag([1.0, 0.3, 0.1, 1e-2]) @ rng.normal(size=(4, 16)), jnp.float32)
    x = x / jnp.abs(x).max()
    polynomials = resolve_polynomials("polar_express", None, None)
    products = accelerator_products(jnp.float16, None, TF32)
    accelerator = jax.jit(lambda x: _iterate(x, polynomials, products))(x)
    cpu = jax.jit(dm.orthogonalize.newton_schulz(dtype="float16"))(x)
    np.testing.assert_allclose(accelerator, cpu, atol=5e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_take_half_precision_and_sum_in_float32(dtype):
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    text = lower([(8, 24)], "cuda", dtype=dtype).as_text()
    products = re.findall(r"dot_general.*: (\(.*\)) -> (\S+)", text)
    assert len(products) >= 15
    for operands, result in products:
        assert operands.count(f"x{short}>") == 2
        assert result.endswith("xf32>")


def test_large_symmetric_products_save_a_quarter_on_a_cpu():
    size = 384
    rows = [(1.5, -0.5, 0.1)] * 2
    cpu, gpu = (
        lower([(size, size)], platform, coefficients=rows, precision="highest")
        for platform in ("cpu", "cuda")
    )
    assert count_dots(gpu) == 6
    assert count_dots(cpu) == 2 * (3 + 6 + 1)  # XXᵀ in 3 blocks, R² in 6 products, HX whole
    whole = 2 * size**3
    assert cpu.cost_analysis()["flops"] == pytest.approx(whole * (2 + 4 * 0.75), rel=0.02)


@pytest.mark.parametrize("start", ["frobenius", "schatten", "aol"])
@pytest.mark.parametrize("shape", [(6, 20), (7, 7), (2, 5, 40)])
def test_in_blocks_the_iteration_is_the_same(shape, start, monkeypatch):
    x = np.random.default_rng(0).normal(size=shape)
    rows = ((3.0, -3.0, 1.0), (2.0, -1.5, 0.5, 0.1, 0.02), (1.5, -0.5))
    matrices = x.reshape(-1, *shape[-2:])
    expected = [reference.polynomial_polar_factor(matrix, rows, start) for matrix in matrices]
    module = importlib.import_module(_iterate.__module__)
    monkeypatch.setattr(module, "_BLOCKS_FROM", 4)
    with jax.enable_x64(True):
        kernel = dm.orthogonalize.newton_schulz(rows, preconditioning=start)
        blocks = jax.jit(kernel)(jnp.asarray(x))
    np.testing.assert_allclose(blocks.reshape(matrices.shape), expected, atol=1e-11)


# --- Many leaves at once --------------------------------------------------------------------------


def test_leaves_of_one_shape_make_one_program():
    one, many = (count_dots(lower([(24, 96)] * count)) for count in (1, 8))
    assert many == one == 1 + 5 + 4 + 8 + 1  # of five steps on the Gram matrix


def test_tall_wide_stacked_convolutional_and_head_leaves_share_a_bucket():
    # Leaves, their dimension numbers, and the shape in which they are matrices.
    leaves: dict[str, Any] = {
        "wide": ((18, 40), "in_out", (1, 18, 40)),
        "tall": ((40, 18), "in_out", (1, 40, 18)),
        "conv": ((3, 3, 2, 40), "in_out", (1, 18, 40)),
        "heads": ((18, 8, 5), MuonDimensionNumbers(0, (1, 2)), (1, 18, 40)),
        "stack": ((3, 40, 18), MuonDimensionNumbers(1, 2), (3, 40, 18)),
    }
    rng = np.random.default_rng(0)
    tree = {name: np.float32(rng.normal(size=shape)) for name, (shape, *_) in leaves.items()}
    numbers = {name: numbers for name, (_, numbers, _) in leaves.items()}
    tx = dm.newton_schulz_lmo(num_steps=7, dimension_numbers=numbers)
    lowered = jax.jit(lambda t: tx.update(t, tx.init(t))[0]).lower(tree)
    assert count_dots(lowered) == count_dots(lower([(18, 40)], num_steps=7))
    updates = lowered.compile()(tree)
    for name, (shape, _, matrices) in leaves.items():
        polar = [polar_factor(m) for m in tree[name].reshape(matrices).astype(float)]
        np.testing.assert_allclose(updates[name], np.reshape(polar, shape), atol=1e-4)


# The size of a matrix's working memory.
def one_matrix(short: int, long: int) -> int:
    return (2 * short * long + 5 * short**2) * 4


def test_slices_give_what_the_whole_gives():
    """Of one matrix, of two with a shorter last one, and one longer than all."""
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.normal(size=(5, 6, 20)), jnp.float32)
    whole = compiled_lmo()(stack)
    for size in (1, 2, 7):
        sliced = compiled_lmo(memory_limit=size * one_matrix(6, 20))(stack)
        np.testing.assert_allclose(sliced, whole, atol=2e-5)


@pytest.mark.parametrize(
    "shape", [(64, 256), *(pytest.param(s, marks=deep) for s in ((96, 96), (256, 64)))]
)
@pytest.mark.parametrize("count", [16, pytest.param(24, marks=deep)])
def test_working_memory_stays_within_the_limit(shape, count):
    """With the joined stacks of the leaves, down to an eighth of them all; by a sixth at most."""
    short, long = sorted(shape)
    stack, one = count * short * long * 4, one_matrix(short, long)
    unlimited = lower([shape] * count).compile()
    for limit in (stack, stack // 2, 3 * stack // 8 + one):
        compiled = lower([shape] * count, memory_limit=limit).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 7 / 6 * limit
        assert unlimited.memory_analysis().temp_size_in_bytes > 7 / 6 * limit


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.lists(st.integers(1, 9), max_size=9),
    st.integers(1, 2000),
)
def test_leaves_are_in_eight_groups_at_most_which_fit_where_fewer_do(wide, tall, limit):
    """All are there once, in order; and where they need not wait all of a shape are joined."""
    sizes, shapes = [*wide, *tall], [(2, 4)] * len(wide) + [(3, 1)] * len(tall)
    stacks: list[Any] = [np.zeros((n, *of), np.int8) for n, of in zip(sizes, shapes, strict=True)]
    buckets = {"wide": [*range(len(wide))], "tall": [*range(len(wide), len(sizes))]}
    buckets = {name: of for name, of in buckets.items() if of}
    waits, groups = zip(*_groups(stacks, buckets, limit), strict=True)
    copied = [8 * n for n in wide] + [2 * 3 * n for n in tall]
    if sum(copied) <= limit // 2:
        assert (*waits, *groups) == (*[False] * len(buckets), *buckets.values())
        return
    assert [*chain(*groups)] == [*range(len(sizes))]
    assert waits == (False, *[True] * (len(groups) - 1))
    for of in buckets.values():
        own = [sum(copied[i] for i in group) for group in groups if group[0] in of]
        largest = max(copied[i] for i in of)
        assert len(own) <= 8
        assert max(own) <= max(limit // 3, largest + sum(own) / 8)


def test_leaves_of_several_shapes_are_joined_one_shape_after_the_other():
    shapes = [(64, 256)] * 8 + [(128, 64)] * 8 + [(32, 512)] * 8
    limit = 2 * one_matrix(64, 256)
    compiled = lower(shapes, memory_limit=limit).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= limit + 2**14
    rng = np.random.default_rng(0)
    tree = {f"{i}": jnp.asarray(rng.normal(size=s), jnp.float32) for i, s in enumerate(shapes)}
    tree["9"] = jnp.full(shapes[9], jnp.nan)  # which those that wait for it do not see
    txs = (dm.newton_schulz_lmo(memory_limit=of) for of in (limit, None))
    found, expected = (jax.jit(tx.update)(tree, tx.init(tree))[0] for tx in txs)
    for name in tree:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5)
        assert np.isnan(found[name]).any() == (name == "9")


@pytest.mark.parametrize("memory_limit", [None, 2000])
def test_a_bad_leaf_of_a_bucket_harms_no_other(memory_limit):
    rng, lmo = np.random.default_rng(0), compiled_lmo(memory_limit=memory_limit)
    tree = {name: jnp.asarray(rng.normal(size=(1, 4, 9)), jnp.float32) for name in "abc"}
    clean = lmo(tree)
    for value in (np.nan, np.inf, -np.inf, 0.0):
        dirty = lmo(tree | {"b": jnp.full((1, 4, 9), value)})
        for name in "ac":
            np.testing.assert_array_equal(dirty[name], clean[name])
        assert np.isnan(dirty["b"]).any() == (value != 0)
