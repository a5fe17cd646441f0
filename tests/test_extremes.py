"""Extreme input: no NaN that was not there before, and the right direction at every scale."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Where five steps take singular values of at least 1e-3, by newton_schulz_lmo's docstring.
LOW, HIGH = 0.86, 1.14
# Steps after which only rounding remains.
EXACT = 7
# The largest entry outside the singular basis. Rounding to the dtype, and in float32 the iteration,
# which magnifies small singular values and their rounding a thousandfold: measured 4e-3, 4e-4,
# 6e-6 and 4e-14.
OFF_DIAGONAL = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4, "float64": 1e-12}
# Wide, tall, square, one row, one column.
SHAPES = ((2, 5), (5, 2), (4, 4), (1, 6), (6, 1))
# Scales whose entries, down to a thousandth of the largest, are normal numbers of the dtype.
SCALES = {
    "bfloat16": (1e-30, 1.0, 1e30),
    "float16": (1e-1, 1.0, 1e4),
    "float32": (1e-30, 1.0, 1e30),
    "float64": (1e-250, 1.0, 1e250),
}


@functools.cache
def compiled(**kwargs: Any) -> Any:
    tx: Any = dm.newton_schulz_lmo(**kwargs)

    def direction(matrix):
        return tx.update({"w": matrix}, tx.init({"w": matrix}))[0]["w"]

    return jax.jit(direction)


def lmo(matrix: Any, dtype: Any = jnp.float32, **kwargs: Any) -> np.ndarray:
    """The direction of one array, computed in a dtype and returned in float64."""
    result = compiled(**kwargs)(jnp.asarray(matrix, dtype))
    assert result.dtype == dtype
    return np.asarray(result, np.float64)


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def matrix_with(spectrum: Any, shape: tuple[int, int], seed: int) -> np.ndarray:
    """A matrix with these singular values in random directions."""
    rank = min(shape)
    left = rotation(shape[0], seed)[:, :rank]
    right = rotation(shape[1], seed + 1)[:, :rank]
    return (left * np.asarray(spectrum)[:rank]) @ right.T


def assert_polar(
    direction: np.ndarray, matrix: Any, band: tuple[float, float] = (LOW, HIGH), off: float = 1e-4
) -> None:
    """The direction has the singular vectors of the matrix, and singular values inside the band."""
    left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    rank = int((values > 1e-3 * np.linalg.norm(values)).sum())
    left, right = left[:, :rank], right[:rank]
    core = left.T @ direction @ right.T
    gains = np.diag(core)
    assert gains.min() > band[0] - off
    assert gains.max() < band[1] + off
    assert np.abs(direction - (left * gains) @ right).max() < off


# --- The laws of the LMO, for random matrices -----------------------------------------------------


@st.composite
def matrices(draw: Any) -> np.ndarray:
    """Spectra in [1e-3, 1] of the Frobenius norm, in random directions, of every kind of shape."""
    shape = draw(st.sampled_from(SHAPES))
    rank = min(shape)
    # The Frobenius norm of four values up to one is at most two, hence 2e-3 before division.
    exponents = draw(st.lists(st.floats(np.log10(2.1e-3), 0), min_size=rank, max_size=rank))
    return matrix_with(10.0 ** np.array(exponents), shape, draw(st.integers(0, 2**16)))


laws = settings(max_examples=40, deadline=None, derandomize=True)


@laws
@given(matrices())
def test_the_direction_is_the_polar_factor_within_the_stated_band(matrix):
    assert_polar(lmo(matrix), matrix)


@laws
@given(matrices())
def test_the_inner_product_is_the_dual_norm_within_the_stated_band(matrix):
    """⟨M, lmo(M)⟩ = ‖M‖_*, with the gradient's sign."""
    nuclear = np.linalg.svd(matrix, compute_uv=False).sum()
    assert LOW * nuclear < np.sum(matrix * lmo(matrix)) < HIGH * nuclear


@laws
@given(matrices(), st.floats(-30, 30))
def test_the_scale_does_not_matter(matrix, exponent):
    # Measured: at most 3e-5.
    scaled = lmo(10.0**exponent * matrix, num_steps=EXACT)
    np.testing.assert_allclose(scaled, lmo(matrix, num_steps=EXACT), atol=2e-4)


@laws
@given(matrices(), st.integers(-90, 90))
def test_a_power_of_two_changes_no_bit(matrix, exponent):
    np.testing.assert_array_equal(lmo(2.0**exponent * matrix), lmo(matrix))


@laws
@given(matrices())
def test_the_sign_comes_out_exactly(matrix):
    np.testing.assert_array_equal(lmo(-matrix), -lmo(matrix))


@laws
@given(matrices(), st.integers(0, 2**16))
def test_rotations_pass_through(matrix, seed):
    """lmo(QMR) = Q lmo(M) R."""
    left, right = rotation(matrix.shape[0], seed), rotation(matrix.shape[1], seed + 1)
    # Measured: at most 2e-5.
    rotated = lmo(left @ matrix @ right, num_steps=EXACT)
    expected = left @ lmo(matrix, num_steps=EXACT) @ right
    np.testing.assert_allclose(rotated, expected, atol=2e-4)


@laws
@given(matrices())
def test_transposition_passes_through(matrix):
    """The iteration runs on the shorter side, so a tall matrix and its wide transpose agree."""
    # Measured: at most 2e-5.
    transposed = lmo(matrix.T, num_steps=EXACT)
    np.testing.assert_allclose(transposed, lmo(matrix, num_steps=EXACT).T, atol=2e-4)


@laws
@given(st.sampled_from(SHAPES), st.integers(0, 2**16))
def test_a_batch_equals_a_loop(shape, seed):
    stack = np.random.default_rng(seed).normal(size=(3, *shape))
    batch = lmo(stack, dimension_numbers=MuonDimensionNumbers(reduction_axis=1, output_axis=2))
    np.testing.assert_allclose(batch, [lmo(matrix) for matrix in stack], atol=1e-5)


# --- Scales, dtypes, degenerate matrices ----------------------------------------------------------

DTYPE_AND_SCALE = [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]


@pytest.mark.parametrize(("dtype", "scale"), DTYPE_AND_SCALE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_direction_is_right_at_every_scale_and_dtype(shape, dtype, scale):
    with jax.enable_x64(dtype == "float64"):
        matrix = jnp.asarray(scale * matrix_with([1.0, 0.5, 0.2, 0.1], shape, 3), dtype)
        direction = lmo(matrix, jnp.dtype(dtype))
        assert_polar(direction, np.asarray(matrix, np.float64) / scale, off=OFF_DIAGONAL[dtype])


# Division by the largest entry is compiled as a product with its reciprocal, which is subnormal,
# hence zero, above 2**126 = 8.5e37.
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_direction_is_right_up_to_the_largest_number(dtype):
    matrix = matrix_with([1.0, 0.5, 0.2, 0.1], (4, 4), 3)
    matrix = jnp.asarray(3e38 * matrix / np.abs(matrix).max(), dtype)
    direction = lmo(matrix, jnp.dtype(dtype))
    assert_polar(direction, np.asarray(matrix, np.float64) / 3e38, off=OFF_DIAGONAL[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38])
def test_subnormal_numbers_give_no_nan(value, dtype):
    direction = lmo(jnp.full((3, 4), value, dtype), jnp.dtype(dtype))
    assert np.isfinite(direction).all()
    assert np.linalg.norm(direction, 2) < HIGH


@pytest.mark.parametrize("dtype", OFF_DIAGONAL)
@pytest.mark.parametrize("factory", [dm.momentum, dm.newton_schulz_lmo])
@pytest.mark.usefixtures("strict_promotion")
def test_strict_promotion_is_no_obstacle(factory, dtype):
    with jax.enable_x64(dtype == "float64"):
        gradients, tx = {"w": jnp.ones((2, 3), dtype)}, factory()
        updates, _ = tx.update(gradients, tx.init(gradients))
        assert updates["w"].dtype == dtype


@pytest.mark.parametrize("dtype", OFF_DIAGONAL)
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_stays_zero(shape, dtype):
    with jax.enable_x64(dtype == "float64"):
        assert not lmo(np.zeros(shape), jnp.dtype(dtype)).any()


@pytest.mark.parametrize("dtype", OFF_DIAGONAL)
def test_a_matrix_of_rank_one_gives_its_direction_and_no_other(dtype):
    with jax.enable_x64(dtype == "float64"):
        matrix = jnp.asarray(np.outer([1.0, -2.0, 0.5], [4.0, 1.0, 0.25, -0.5]), dtype)
        direction = lmo(matrix, jnp.dtype(dtype))
        assert_polar(direction, matrix, off=OFF_DIAGONAL[dtype])


@pytest.mark.parametrize("shape", [(1, 7), (7, 1)])
def test_a_single_row_or_column_is_normalized(shape):
    vector = np.random.default_rng(0).normal(size=shape)
    expected = vector / np.linalg.norm(vector)
    np.testing.assert_allclose(lmo(vector, num_steps=8), expected, atol=1e-5)


def test_a_matrix_of_equal_singular_values_is_only_scaled():
    np.testing.assert_allclose(lmo(7 * rotation(4, 0), num_steps=8), rotation(4, 0), atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_matrix_of_a_batch_keeps_its_nan_to_itself(value):
    stack = np.random.default_rng(0).normal(size=(3, 4, 5))
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    clean = lmo(stack, dimension_numbers=numbers)
    stack[1, 2, 3] = value
    dirty = lmo(stack, dimension_numbers=numbers)
    assert np.isnan(dirty[1]).any()
    np.testing.assert_array_equal(dirty[[0, 2]], clean[[0, 2]])


# --- Whole optimizers -----------------------------------------------------------------------------


def network(seed: int, dtype: Any = jnp.float32) -> dict[str, dict[str, jax.Array]]:
    rng = np.random.default_rng(seed)
    shapes = {"stem": (6, 5), "mid": (5, 7), "head": (7, 3)}
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape), dtype),
            "bias": jnp.asarray(rng.normal(size=shape[1:]), dtype),
        }
        for name, shape in shapes.items()
    }


LAYERS = dm.layers_by_path(network(0), ["stem", "mid", "head"])
OPTIMIZERS: dict[str, Any] = {
    "drop_muon": dm.drop_muon(0.1, LAYERS, momentum=dm.momentum(nesterov=True)),
    "muon": dm.muon(0.1),
}
over_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


@functools.cache
def optimizer(name: str, guarded: bool = False) -> tuple[Any, Any]:
    """`init` and the compiled `update` of full steps."""
    tx = OPTIMIZERS[name]
    if guarded:
        tx = optax.apply_if_finite(tx, max_consecutive_errors=2)
    tx = optax.with_extra_args_support(tx)
    mask = {"layer_mask": LAYERS.mask(0)} if name == "drop_muon" else {}
    return tx.init, jax.jit(functools.partial(tx.update, **mask))


def run(name: str, gradients: list[Any], *, guarded: bool = False) -> Any:
    """The last updates of a run."""
    init, update = optimizer(name, guarded)
    params = jax.tree.map(jnp.ones_like, gradients[0])
    state, updates = init(params), None
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return updates


def scaled(tree: Any, scale: float) -> Any:
    return jax.tree.map(lambda leaf: leaf * scale, tree)


@over_optimizers
def test_zero_gradients_move_nothing(name):
    zero = scaled(network(0), 0.0)
    assert all(not leaf.any() for leaf in jax.tree.leaves(run(name, [zero, zero])))


@pytest.mark.parametrize(("dtype", "scale"), DTYPE_AND_SCALE)
def test_scales_and_dtypes_give_finite_updates_of_the_right_dtype(dtype, scale):
    with jax.enable_x64(dtype == "float64"):
        gradients = [scaled(network(seed, dtype), scale) for seed in (1, 2)]
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        updates = run("drop_muon", gradients)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
        assert all(layer["kernel"].any() for layer in updates.values())


@pytest.mark.parametrize(("dtype", "scale"), DTYPE_AND_SCALE)
def test_momentum_is_right_at_every_scale_and_dtype(dtype, scale):
    with jax.enable_x64(dtype == "float64"):
        first, second = jnp.asarray([scale, -2 * scale], dtype), jnp.asarray([scale, scale], dtype)
        tx: Any = dm.momentum(decay=0.75)
        _, state = tx.update(first, tx.init(first))
        updates, _ = tx.update(second, state)
        assert updates.dtype == dtype
        expected = np.array([0.75 * 0.25 + 0.25, 0.75 * -0.5 + 0.25])
        # The stored M is rounded once, and the result once.
        np.testing.assert_allclose(
            np.asarray(updates, np.float64) / scale, expected, rtol=4 * float(jnp.finfo(dtype).eps)
        )


@pytest.mark.parametrize("kind", ["kernel", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@over_optimizers
def test_a_bad_leaf_does_not_touch_the_others(name, value, kind):
    good = network(1)
    bad = good | {"mid": good["mid"] | {kind: good["mid"][kind].at[1].set(value)}}
    clean, dirty = run(name, [good, good]), run(name, [bad, good])
    assert jnp.isnan(dirty["mid"].pop(kind)).any()
    clean["mid"].pop(kind)
    assert all(
        (a == b).all() for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True)
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@over_optimizers
def test_apply_if_finite_makes_a_bad_step_as_if_it_had_not_been(name, value):
    good = network(1)
    bad = good | {"mid": good["mid"] | {"kernel": good["mid"]["kernel"].at[1, 1].set(value)}}
    updates = run(name, [good, bad, good], guarded=True)
    expected = run(name, [good, good], guarded=True)
    assert all(
        (a == b).all()
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True)
    )


# --- The gradient ---------------------------------------------------------------------------------


def nan_below(params: Any) -> jax.Array:
    """Finite, but √ at zero: its derivative is infinite, and times zero NaN."""
    hidden = jnp.sqrt(jnp.sum(params["stem"]["kernel"] ** 2))
    side = jnp.sqrt(jnp.sum(params["mid"]["kernel"] ** 2))
    return jnp.sum(params["head"]["kernel"] ** 2) * (1.0 + hidden + side)


NAN_PARAMS = {
    "stem": {"kernel": jnp.zeros((2, 3))},
    "mid": {"kernel": jnp.zeros((3, 4))},
    "head": {"kernel": jnp.full((4, 2), 0.5)},
}
NAN_LAYERS = dm.layers_by_path(NAN_PARAMS, ["stem", "mid", "head"])


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("active", [(True, True, True), (False, True, True), (False, False, True)])
def test_a_nan_in_an_inactive_branch_does_not_poison_the_gradient(active, jit):
    gradient = functools.partial(
        dm.masked_value_and_grad(nan_below), layer_mask=NAN_LAYERS.subset(active)
    )
    value, grads = (jax.jit(gradient) if jit else gradient)(NAN_PARAMS)
    assert value == 2.0
    for on, layer in zip(active[:2], ("stem", "mid"), strict=True):
        assert jnp.isnan(grads[layer]["kernel"]).all() if on else not grads[layer]["kernel"].any()
    np.testing.assert_array_equal(grads["head"]["kernel"], np.ones((4, 2)))


def test_an_empty_matrix_stays_empty():
    tree = {"empty": jnp.zeros((0, 2)), "w": jnp.eye(2)}
    tx = dm.newton_schulz_lmo()
    updates, _ = tx.update(tree, tx.init(tree))
    assert updates["empty"].shape == (0, 2)
    assert bool(jnp.isfinite(updates["w"]).all())
