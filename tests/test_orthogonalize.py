"""The orthogonalization kernel: accuracy, counted cost, many leaves at once."""

import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm
import reference
from dropmuon_jax.orthogonalize.newton_schulz import TF32, _iterate, accelerator_products
from dropmuon_jax.orthogonalize.polynomials import (
    choose_segments,
    count_products,
    resolve_polynomials,
)

# --- Accuracy: the table of newton_schulz_lmo's docstring ----------------------------------------

SHAPES = ((8, 8), (8, 32), (48, 48), (100, 130), (128, 32))
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
]


def spectra(rank: int, smallest: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Singular values of Frobenius norm 1 and at least `smallest`."""
    half = rank // 2
    kinds = [
        np.geomspace(smallest, 1, rank),
        np.r_[1.0, np.full(rank - 1, smallest)],
        np.r_[np.ones(half), np.full(rank - half, smallest)],
        rng.uniform(smallest, 1, rank),
        10 ** rng.uniform(np.log10(smallest), 0, rank),
    ]
    for _ in range(60):
        kinds = [np.maximum(s, smallest * np.linalg.norm(s)) for s in kinds]
    return [s / np.linalg.norm(s) for s in kinds]


@functools.cache
def compiled_iteration(coefficients: str, num_steps: int, dtype: str) -> Any:
    """One program for each shape, for every smallest singular value."""
    return jax.jit(dm.orthogonalize.newton_schulz(coefficients, num_steps=num_steps, dtype=dtype))


def bases(shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    rank = min(shape)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0][:, :rank] for size in shape)
    return left, right.T


@pytest.mark.parametrize(
    ("coefficients", "num_steps", "dtype", "smallest", "band", "rotation"), BANDS
)
def test_singular_values_end_in_the_stated_band(
    coefficients, num_steps, dtype, smallest, band, rotation
):
    orthogonalize = compiled_iteration(coefficients, num_steps, dtype)
    for shape in SHAPES:
        rng = np.random.default_rng(sum(shape))
        kinds = [s for _ in range(2) for s in spectra(min(shape), smallest, rng)]
        pairs = [bases(shape, rng) for _ in kinds]
        stack = [(left * s) @ right for s, (left, right) in zip(kinds, pairs, strict=True)]
        results = np.asarray(orthogonalize(jnp.asarray(np.stack(stack), jnp.float32)), np.float64)
        for result, (left, right) in zip(results, pairs, strict=True):
            values = np.linalg.svd(result, compute_uv=False)
            gains = np.diag(left.T @ result @ right.T)
            assert band[0] <= values.min()
            assert values.max() <= band[1]
            assert np.linalg.norm(result - (left * gains) @ right, 2) <= rotation


@pytest.mark.parametrize("shape", [(64, 256), (128, 512), (256, 64)])
def test_one_large_singular_value_is_the_worst_case_and_in_the_band(shape):
    """Rounding of XXᵀ is relative to the largest; measured [0.869, 1.138] and 0.019."""
    rng = np.random.default_rng(0)
    orthogonalize = jax.jit(dm.orthogonalize.newton_schulz())
    rank = min(shape)
    for small in (1.05e-3, 1.5e-3, 2e-3, 3e-3, 5e-3):
        left, right = bases(shape, rng)
        spectrum = np.r_[1.0, np.full(rank - 1, small)]
        spectrum /= np.linalg.norm(spectrum)
        matrix = jnp.asarray((left * spectrum) @ right, jnp.float32)
        result = np.asarray(orthogonalize(matrix), np.float64)
        values = np.linalg.svd(result, compute_uv=False)
        assert values.min() >= 0.86
        assert values.max() <= 1.14
        gains = np.diag(left.T @ result @ right.T)
        assert np.linalg.norm(result - (left * gains) @ right, 2) <= 0.03


@pytest.mark.parametrize("name", reference.COEFFICIENTS)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 7), (2, 5, 7)])
@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_every_coefficient_set_equals_float64_numpy(name, shape, num_steps):
    x = np.random.default_rng(0).normal(size=shape)
    rows, start = reference.published_rows(name, num_steps), reference.COEFFICIENTS[name][1]
    with jax.enable_x64(True):
        ours = dm.orthogonalize.newton_schulz(name, num_steps=num_steps)(jnp.asarray(x))
        matrices = x.reshape(-1, *shape[-2:])
        theirs = [reference.polynomial_polar_factor(matrix, rows, start) for matrix in matrices]
        np.testing.assert_allclose(ours.reshape(matrices.shape), theirs, atol=1e-11)


@pytest.mark.parametrize("start", ["frobenius", "schatten", "aol"])
def test_own_rows_are_run_in_their_order_from_any_start(start):
    rows = ((3.0, -3.0, 1.0), (1.5, -0.5, 0.0), (2.0, -1.5, 0.5))
    x = np.random.default_rng(1).normal(size=(3, 8))
    expected = reference.polynomial_polar_factor(x, rows, start)
    ours = dm.orthogonalize.newton_schulz(rows, preconditioning=start)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_result_has_the_dtype_of_the_array_whatever_the_iteration(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 24)), dtype)
    exact = reference.polar_factor(np.asarray(x, np.float64))
    for iteration in ("bfloat16", "float16", "float32"):
        ours = dm.orthogonalize.newton_schulz(num_steps=8, dtype=iteration)(x)
        assert ours.dtype == x.dtype
        # Two roundoffs of bfloat16 for each of the eight steps, at the worst.
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, atol=0.06)


# --- Polar Express's coefficients -----------------------------------------------------------------


def composed(rows: Any, x: np.ndarray) -> np.ndarray:
    for a, b, c in rows:
        x = a * x + b * x**3 + c * x**5
    return x


def test_remez_gives_the_published_rows_of_polar_express():
    ours = dm.orthogonalize.polar_express_coefficients(8)
    np.testing.assert_allclose(ours, reference.POLAR_EXPRESS, rtol=0, atol=5e-9)


@pytest.mark.parametrize("smallest", [0.5, 0.03, 1e-3])
def test_the_error_of_the_first_row_alternates_at_four_points(smallest):
    """Chebyshev's criterion: no odd quintic is nearer to 1 on the interval."""
    x = np.linspace(smallest, 1, 200_001)
    error = composed(dm.orthogonalize.polar_express_coefficients(1, smallest, cushion=0.0), x) - 1
    largest = np.abs(error).max()
    touches = np.sign(error[np.abs(error) > largest * (1 - 1e-7)])
    assert [sign for sign, _ in itertools.groupby(touches)] == [-1, 1, -1, 1]


@pytest.mark.parametrize("smallest", [0.1, 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("num_steps", [1, 3, 6])
def test_each_row_leaves_an_interval_around_one(smallest, num_steps):
    x = np.geomspace(smallest, 1, 50_001)
    for cushion in (0.0, 0.02407327424182761):
        rows = dm.orthogonalize.polar_express_coefficients(num_steps, smallest, cushion=cushion)
        y = composed(rows, x)
        low, high = y.min(), y.max()
        assert 0 < low <= 1 <= high < 2
        assert low + high == pytest.approx(2, abs=1e-6)


def test_five_rows_are_steep_at_the_end_of_their_interval():
    """Why X is divided by a little more than one before each step in float32 too."""
    rows, step = dm.orthogonalize.polar_express_coefficients(5), 1e-8
    slope = (composed(rows, 1 + step) - composed(rows, 1.0)) / step
    assert slope == pytest.approx(68_000, rel=0.02)


def test_easing_divides_before_each_step():
    plain, eased = (
        dm.orthogonalize.polar_express_coefficients(2, ease=ease) for ease in (1.0, 1.25)
    )
    x = 0.3
    expected = composed(plain[1:], composed(plain[:1], x / 1.25) / 1.25)
    assert composed(eased, x) == pytest.approx(expected, rel=1e-12)


# --- Cost, counted --------------------------------------------------------------------------------


def lower(shapes: Any, platform: str = "cpu", **options: Any) -> Any:
    tx = dm.newton_schulz_lmo(**options)
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    jitted = jax.jit(lambda tree: tx.update(tree, tx.init(tree))[0])
    return jitted.trace(leaves).lower(lowering_platforms=(platform,))


def count_dots(lowered: Any) -> int:
    """Matrix products in the program for its platform."""
    return len(re.findall(r"stablehlo\.dot_general", lowered.as_text()))


SQUARE, GRAM = 3 * 5, 1 + 5 + 4 + 8 + 1  # the products of five steps


@pytest.mark.parametrize(
    ("shape", "products"),
    [((32, 32), SQUARE), ((40, 32), SQUARE), ((64, 32), GRAM), ((32, 256), GRAM)],
)
def test_a_rectangular_matrix_is_iterated_on_its_gram_matrix_and_a_square_one_is_not(
    shape, products
):
    assert lower([shape]).compile().as_text().count(" dot(") == products


@pytest.mark.parametrize("shape", [(256, 256), (256, 350), (256, 450), (256, 1024)])
@pytest.mark.parametrize("num_steps", [5, 7])
def test_the_counted_cost_is_xlas(shape, num_steps):
    rows = dm.orthogonalize.polar_express_coefficients(num_steps)
    segments = choose_segments(rows, *shape, 2.0**-24)
    flops = lower([shape], num_steps=num_steps).compile().cost_analysis()["flops"]
    # The elementwise rest is of lower order.
    assert flops == pytest.approx(2 * count_products(segments, *shape), rel=0.1)


@pytest.mark.parametrize("cols", [64, 95, 97, 640])
def test_no_other_choice_of_segments_is_cheaper(cols):
    """Of all that rounding allows: those that refine the longest ones."""
    rows = dm.orthogonalize.polar_express_coefficients(6)
    longest = choose_segments(rows, 64, 100_000, 2.0**-24)
    cuts = set(itertools.accumulate(longest))
    chosen = count_products(choose_segments(rows, 64, cols, 2.0**-24), 64, cols)
    for inner in itertools.product([False, True], repeat=5):
        ends = [i + 1 for i in range(5) if inner[i] or i + 1 in cuts] + [6]
        segments = np.diff([0, *ends])
        assert chosen <= count_products(segments, 64, cols)


def test_the_iteration_starts_afresh_where_rounding_would_pass_the_polynomials_error():
    five, seven = (
        dm.orthogonalize.polar_express_coefficients(5),
        dm.orthogonalize.polar_express_coefficients(7),
    )
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


@pytest.mark.parametrize("name", ["polar_express", "muon", "dion"])
def test_half_precision_on_an_accelerator_gives_what_it_gives_on_a_cpu(name):
    """The accelerator's program, run here; the CPU's rounds by itself and multiplies in float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.diag([1.0, 0.3, 0.1, 1e-2]) @ rng.normal(size=(4, 16)), jnp.float32)
    x = x / jnp.abs(x).max()
    polynomials = resolve_polynomials(name, None, None)
    products = accelerator_products(jnp.float16, None, TF32)
    accelerator = _iterate(x, polynomials, products)
    cpu = dm.orthogonalize.newton_schulz(name, dtype="float16")(x)
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
    size = 768
    rows = [(1.5, -0.5, 0.0)] * 2
    cpu, gpu = (
        lower([(size, size)], platform, coefficients=rows, precision="highest")
        for platform in ("cpu", "cuda")
    )
    assert count_dots(gpu) == 4
    assert count_dots(cpu) == 6  # XXᵀ of each step in two parts
    whole = 2 * size**3
    assert cpu.cost_analysis()["flops"] == pytest.approx(whole * (2 + 2 * 0.75), rel=0.01)


def test_a_symmetric_product_in_halves_is_the_product():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(769, 770)), jnp.float32)
    halves, whole = (
        dm.orthogonalize.newton_schulz(num_steps=7)(x),
        reference.polar_factor(np.asarray(x, float)),
    )
    assert np.linalg.norm(halves - whole) / math.sqrt(769) < 1e-2  # square: condition 1e3 or more
    values = np.linalg.svd(halves, compute_uv=False)
    assert values.max() < 1 + 1e-4


# --- Many leaves at once --------------------------------------------------------------------------


def instructions(lowered: Any) -> str:
    return lowered.compile().as_text()


def test_leaves_of_one_shape_make_one_program():
    one, many = (instructions(lower([(24, 96)] * count)) for count in (1, 48))
    assert many.count(" dot(") == one.count(" dot(") == GRAM


def test_tall_wide_stacked_convolutional_and_head_leaves_share_a_bucket():
    heads = MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    stacked = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    shapes = {
        "wide": (18, 40),
        "tall": (40, 18),
        "conv": (3, 3, 2, 40),
        "heads": (18, 8, 5),
        "stack": (3, 40, 18),
    }
    options = {"dimension_numbers": {"heads": heads, "stack": stacked}, "num_steps": 7}
    rng = np.random.default_rng(0)
    tree = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    tx = dm.newton_schulz_lmo(**options)
    compiled = jax.jit(lambda t: tx.update(t, tx.init(t))[0]).lower(tree).compile()
    assert compiled.as_text().count(" dot(") == lower(
        [(18, 40)], num_steps=7
    ).compile().as_text().count(" dot(")
    updates = compiled(tree)
    for name, shape in shapes.items():
        matrices = np.asarray(tree[name], float).reshape(
            (3, 40, 18) if name == "stack" else (1, -1, shape[-1])
        )
        if name == "heads":
            matrices = np.asarray(tree[name], float).reshape(1, 18, 40)
        expected = np.stack([reference.polar_factor(m) for m in matrices]).reshape(shape)
        np.testing.assert_allclose(updates[name], expected, atol=1e-4)


# Slices of one matrix and of several, with and without a shorter last one, and one longer than all.
@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 3)), (5, (1, 2, 3)), (7, (3,))])
def test_slices_give_what_the_whole_gives(count, sizes):
    rng = np.random.default_rng(0)
    tree = [jnp.asarray(rng.normal(size=(6, 20)), jnp.float32) for _ in range(count)]
    one_matrix = (2 * 6 * 20 + 5 * 6 * 6) * 4
    whole = dm.newton_schulz_lmo()
    expected, _ = jax.jit(whole.update)(tree, whole.init(tree))
    for matrices in sizes:
        sliced = dm.newton_schulz_lmo(memory_limit=matrices * one_matrix)
        updates, _ = jax.jit(sliced.update)(tree, sliced.init(tree))
        for ours, theirs in zip(updates, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("shape", [(64, 256), (96, 96), (256, 64)])
def test_working_memory_stays_within_the_limit(shape):
    """On top of the stack of the leaves; the slices pass in a loop, in one program."""
    count, (short, long) = 24, sorted(shape)
    stack = count * short * long * 4
    unlimited = lower([shape] * count).compile()
    for matrices in (1, 4):
        limit = matrices * (2 * short * long + 5 * short**2) * 4
        compiled = lower([shape] * count, memory_limit=limit).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= stack + limit
        assert unlimited.memory_analysis().temp_size_in_bytes > stack + limit
        assert compiled.as_text().count(" dot(") == unlimited.as_text().count(" dot(")


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_leaves_stay_empty(shape):
    tree = [jnp.zeros(shape)]
    tx = dm.newton_schulz_lmo(dimension_numbers=MuonDimensionNumbers(1, 2))
    assert tx.update(tree, tx.init(tree))[0][0].shape == shape


@pytest.mark.parametrize("num_steps", [5, 12, 30])
def test_float16_takes_any_number_of_steps(num_steps):
    left, right = bases((40, 90), np.random.default_rng(0))
    matrix = jnp.asarray((left * np.geomspace(0.05, 1, 40)) @ right, jnp.float32)
    values = jnp.linalg.svd(
        dm.orthogonalize.newton_schulz(num_steps=num_steps, dtype=jnp.float16)(matrix),
        compute_uv=False,
    )
    assert 0.86 < values.min() < values.max() < 1.13


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("memory_limit", [None, 2000])
def test_a_bad_leaf_of_a_bucket_harms_no_other(value, memory_limit):
    rng = np.random.default_rng(0)
    tree = {name: jnp.asarray(rng.normal(size=(4, 9)), jnp.float32) for name in "abc"}
    tx = dm.newton_schulz_lmo(memory_limit=memory_limit)
    clean, _ = tx.update(tree, tx.init(tree))
    dirty, _ = tx.update(tree | {"b": jnp.full((4, 9), value)}, tx.init(tree))
    for name in "ac":
        np.testing.assert_array_equal(dirty[name], clean[name])
    assert np.isnan(dirty["b"]).any() == (value != 0)


def test_a_batch_under_vmap_is_a_loop():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 9)), jnp.float32)
    tx = dm.newton_schulz_lmo(memory_limit=1000)
    batched = jax.vmap(lambda g: tx.update([g, 2 * g], tx.init([g, g]))[0])(x)
    for i in range(3):
        expected, _ = tx.update([x[i], 2 * x[i]], tx.init([x[i]] * 2))
        for ours, theirs in zip(batched, expected, strict=True):
            np.testing.assert_allclose(ours[i], theirs, atol=1e-6)


# --- Other kernels --------------------------------------------------------------------------------


def test_a_kernel_of_ones_own_sees_each_shape_once_and_wide():
    seen = []

    def double(x):
        seen.append(x.shape)
        return 2 * x

    tree = {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 3)), "c": jnp.ones((2, 2), jnp.bfloat16)}
    tx = dm.norm_lmo(dm.norms.spectral_norm(orthogonalize=double), radius=3.0)
    updates, _ = tx.update(tree, tx.init(tree))
    assert sorted(seen) == [(1, 2, 2), (2, 3, 5)]
    for name, leaf in tree.items():
        assert updates[name].dtype == leaf.dtype
        np.testing.assert_array_equal(updates[name], 6 * leaf)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (3, 3, 2, 7)])
def test_svd_lmo_is_exact(shape):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=shape)
        tx = dm.norm_lmo(dm.norms.spectral_norm("muon"), radius=2.0)
        update, _ = tx.update([jnp.asarray(x)], tx.init([jnp.asarray(x)]))
        matrix = x.reshape(-1, shape[-1])
        factor = max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5
        expected = 2 * factor * reference.polar_factor(matrix).reshape(shape)
        np.testing.assert_allclose(update[0], expected, atol=1e-12)


def test_svd_lmo_leaves_directions_without_singular_value_at_zero():
    left, right = bases((5, 8), np.random.default_rng(0))
    matrix = (left * [3.0, 1.0, 0.1, 0.0, 0.0]) @ right
    tx = dm.norm_lmo(dm.norms.spectral_norm())
    update, _ = tx.update([jnp.asarray(matrix, jnp.float32)], tx.init([]))
    np.testing.assert_allclose(update[0], left[:, :3] @ right[:3], atol=1e-5)


def test_svd_lmo_shows_a_nan_in_its_own_leaf_only():
    rng = np.random.default_rng(0)
    tree = [jnp.asarray(rng.normal(size=(3, 5)), jnp.float32) for _ in range(2)]
    tx = dm.norm_lmo(dm.norms.spectral_norm())
    updates, _ = tx.update([tree[0].at[0, 0].set(jnp.nan), tree[1]], tx.init(tree))
    assert np.isnan(updates[0]).any()
    np.testing.assert_allclose(updates[1], reference.polar_factor(tree[1]), atol=1e-5)
