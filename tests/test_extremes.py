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

# The bands of newton_schulz_lmo's docstring: where five steps take the singular values of M/‖M‖_F.
BANDS = {
    ("polar_express", 1e-3): (0.84, 1.13),
    ("polar_express", 1e-2): (0.87, 1.13),
    ("dion", 1e-3): (0.47, 1.15),
    ("dion", 1e-2): (0.97, 1.04),
    ("muon", 1e-3): (0.47, 1.21),
    ("muon", 1e-2): (0.68, 1.14),
}
LOW, HIGH = BANDS["polar_express", 1e-3]
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
    np.testing.assert_allclose(lmo(10.0**exponent * matrix), lmo(matrix), atol=2e-4)


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
    np.testing.assert_allclose(lmo(left @ matrix @ right), left @ lmo(matrix) @ right, atol=2e-4)


@laws
@given(matrices())
def test_transposition_passes_through(matrix):
    """The iteration runs on the shorter side, so a tall matrix and its wide transpose agree."""
    # Measured: at most 2e-5.
    np.testing.assert_allclose(lmo(matrix.T), lmo(matrix).T, atol=2e-4)


@laws
@given(st.sampled_from(SHAPES), st.integers(0, 2**16))
def test_a_batch_equals_a_loop(shape, seed):
    stack = np.random.default_rng(seed).normal(size=(3, *shape))
    batch = lmo(stack, dimension_numbers=MuonDimensionNumbers(reduction_axis=1, output_axis=2))
    np.testing.assert_allclose(batch, [lmo(matrix) for matrix in stack], atol=1e-5)


@pytest.mark.parametrize(("name", "smallest"), BANDS)
def test_five_steps_take_the_singular_values_to_the_stated_band(name, smallest):
    """A dense grid: diag(x, √(1 - x²)) has the singular values x and √(1 - x²), and norm one."""
    x = np.geomspace(smallest, np.sqrt(0.5), 4000)
    stack = np.zeros((x.size, 2, 2))
    stack[:, 0, 0], stack[:, 1, 1] = x, np.sqrt(1 - x**2)
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    gains = lmo(stack, coefficients=name, dimension_numbers=numbers)[:, [0, 1], [0, 1]]
    low, high = BANDS[name, smallest]
    assert low < gains.min() < low + 0.02  # the band holds, and is not wider than it need be
    assert high - 0.02 < gains.max() < high


def test_eight_steps_of_polar_express_are_exact_to_four_digits():
    matrix = matrix_with(np.geomspace(2.1e-3, 1, 4), (4, 6), 0)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(lmo(matrix, num_steps=8), left @ right, atol=1e-4)


# The rows as published, in float64: Muon (Jordan et al., 2024), Dion (You, 2025), Polar Express
# (Amsel et al., 2025), whose rows but the last are eased: a/1.01, b/1.01³, c/1.01⁵.
PUBLISHED = {
    "muon": [(3.4445, -4.7750, 2.0315)],
    "dion": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ],
}


def published_direction(matrix: np.ndarray, name: str, num_steps: int) -> np.ndarray:
    rows, ease = PUBLISHED[name], 1.01 if name == "polar_express" else 1.0
    x = matrix / (np.linalg.norm(matrix) * ease)
    for step in range(num_steps):
        a, b, c = rows[min(step, len(rows) - 1)]
        if step < len(rows) - 1:
            a, b, c = a / ease, b / ease**3, c / ease**5
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


@pytest.mark.parametrize("num_steps", [5, 10])
@pytest.mark.parametrize("name", PUBLISHED)
def test_named_coefficients_are_the_published_ones(name, num_steps):
    with jax.enable_x64(True):
        for shape in ((3, 5), (5, 3)):
            matrix = matrix_with([1.0, 0.1, 3e-3], shape, 0)
            np.testing.assert_allclose(
                lmo(matrix, jnp.float64, coefficients=name, num_steps=num_steps),
                published_direction(matrix, name, num_steps),
                atol=1e-12,
            )


def test_own_rows_are_run_in_their_order():
    rows = ((3.0, -3.0, 1.0), (1.5, -0.5, 0.0))
    matrix = matrix_with([1.0, 0.5, 0.2], (3, 5), 0)
    x = matrix / np.linalg.norm(matrix)
    for a, b, c in rows:
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    np.testing.assert_allclose(lmo(matrix, coefficients=rows), x, atol=1e-5)


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
    "drop_muon": dm.drop_muon(
        0.1, LAYERS, dm.uniform_depth(), seed=0, momentum=dm.momentum(nesterov=True)
    ),
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
