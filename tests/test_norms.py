"""Norms: the laws that tie norm, dual norm and steps, and the papers' formulas in their layout."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import dropmuon_jax as dm

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE_FACTORS = ("spectral", "muon", "moonlight", "rms_to_rms", "scion")
NORMS: dict[str, dm.norms.Norm] = {
    **{name: dm.norms.spectral_norm(name) for name in SHAPE_FACTORS},
    "nuclear": dm.norms.nuclear_norm(),
    "sign": dm.norms.sign_norm(),
    "sign_not_normalized": dm.norms.sign_norm(normalized=False),
    "column": dm.norms.column_norm(),
    "row": dm.norms.row_norm(),
    "rms": dm.norms.rms_norm(),
    "euclidean": dm.norms.euclidean_norm(),
}
OF_VECTORS = ("sign", "sign_not_normalized", "rms", "euclidean")
# Where these take singular values of at least 1e-3, by newton_schulz_lmo's docstring.
ITERATED = {
    "muon_5_steps": (
        dm.norms.spectral_norm("muon", orthogonalize=dm.orthogonalize.newton_schulz()),
        0.86,
        1.14,
    ),
    "muon_7_steps": (
        dm.norms.spectral_norm("muon", orthogonalize=dm.orthogonalize.newton_schulz(num_steps=7)),
        1 - 1e-4,
        1 + 1e-4,
    ),
}
ALL_NORMS = NORMS | {name: norm for name, (norm, *_) in ITERATED.items()}

# What differs in more than its shape factor.
FAMILIES = {
    "spectral": [NORMS[name] for name in SHAPE_FACTORS],
    "sign": [NORMS["sign"], NORMS["sign_not_normalized"]],
    **{name: [NORMS[name]] for name in ("nuclear", "column", "row", "rms", "euclidean")},
}
ONE_OF_EACH = {name: norms[-1] for name, norms in FAMILIES.items()} | {
    "newton_schulz": ITERATED["muon_5_steps"][0]
}

# Wide, tall, one row, one column; and convolutions of one, two and three dimensions, all of them
# the matrix 6×4, so that the programs are few.
MATRICES = ((4, 6), (6, 4), (1, 6), (6, 1))
CONVOLUTIONS = ((3, 2, 4), (2, 3, 1, 4), (1, 3, 1, 2, 4))
# Relative to what is compared. Measured in float64: at most 2e-15, between programs 6e-14.
RTOL = 1e-9


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    """Float64, and nothing promoted silently. For the module: Hypothesis wants no shorter ones."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


def over(cases: Any, argument: str = "norm"):
    return pytest.mark.parametrize(
        argument, [pytest.param(value, id=name) for name, value in cases.items()]
    )


def inner(x: Any, y: Any) -> float:
    return float(np.sum(np.asarray(x, np.float64) * np.asarray(y, np.float64)))


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).normal(size=shape))


def of_spectrum(spectrum: Any, shape: tuple[int, ...], seed: int) -> jax.Array:
    """An array whose matrix has these singular values in random directions."""
    rng = np.random.default_rng(seed)
    rows, cols = int(np.prod(shape[:-1])), shape[-1]
    left = np.linalg.qr(rng.normal(size=(rows, rows)))[0]
    right = np.linalg.qr(rng.normal(size=(cols, cols)))[0]
    rank = len(spectrum)
    return jnp.asarray((left[:, :rank] * spectrum @ right[:rank]).reshape(shape))


@st.composite
def gradients(draw: Any, shapes: Any = (*MATRICES, *CONVOLUTIONS)) -> jax.Array:
    """Matrices and convolutions of every rank, zero included; singular values in [2.1e-3, 1].

    The Frobenius norm is at most 2, so that they are above 1e-3 of it.
    """
    shape = draw(st.sampled_from(shapes))
    full = min(int(np.prod(shape[:-1])), shape[-1])
    exponents = draw(st.lists(st.floats(np.log10(2.1e-3), 0), min_size=0, max_size=full))
    return of_spectrum(10.0 ** np.array(exponents), shape, draw(st.integers(0, 2**16)))


radii = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
laws = settings(max_examples=20, deadline=None, derandomize=True)


# --- The definitions of LMO and sharp operator ----------------------------------------------------


over_families = over(FAMILIES, "family")


@over_families
@laws
@given(data=st.data(), gradient=gradients(), radius=radii)
def test_the_lmo_attains_minus_radius_times_the_dual_norm(family, data, gradient, radius):
    norm = data.draw(st.sampled_from(family))
    expected = -radius * float(norm.dual_norm(gradient))
    assert inner(gradient, norm.argmin(gradient, radius)) == pytest.approx(expected, rel=RTOL)


@over_families
@laws
@given(data=st.data(), gradient=gradients(), radius=radii)
def test_the_lmo_lies_in_the_ball(family, data, gradient, radius):
    norm = data.draw(st.sampled_from(family))
    assert norm.norm(norm.argmin(gradient, radius)) <= radius * (1 + RTOL)


@over_families
@laws
@given(data=st.data(), gradient=gradients())
def test_the_sharp_operator_attains_the_square_of_the_dual_norm(family, data, gradient):
    norm = data.draw(st.sampled_from(family))
    sharp, square = norm.sharp(gradient), float(norm.dual_norm(gradient)) ** 2
    assert inner(gradient, sharp) == pytest.approx(square, rel=RTOL)
    assert float(norm.norm(sharp)) ** 2 == pytest.approx(square, rel=RTOL)


@over_families
@laws
@given(data=st.data(), gradient=gradients(), radius=radii)
def test_lmo_and_sharp_are_multiples_of_the_direction(family, data, gradient, radius):
    norm = data.draw(st.sampled_from(family))
    direction = np.asarray(norm.direction(gradient))
    np.testing.assert_allclose(norm.argmin(gradient, radius), -radius * direction, rtol=RTOL)
    sharp = float(norm.dual_norm(gradient)) * direction
    np.testing.assert_allclose(norm.sharp(gradient), sharp, rtol=RTOL)


@over({name: NORMS[name] for name in OF_VECTORS})
def test_vectors_obey_the_same_laws(norm):
    gradient, radius = random(7), 3.0
    dual = float(norm.dual_norm(gradient))
    assert inner(gradient, norm.argmin(gradient, radius)) == pytest.approx(-radius * dual, rel=RTOL)
    assert norm.norm(norm.argmin(gradient, radius)) == pytest.approx(radius, rel=RTOL)
    assert inner(gradient, norm.sharp(gradient)) == pytest.approx(dual**2, rel=RTOL)
    assert float(norm.norm(norm.sharp(gradient))) == pytest.approx(dual, rel=RTOL)


@over(NORMS)
def test_float32_obeys_the_laws_to_its_rounding(norm):
    gradient = random(6, 4).astype(jnp.float32)
    dual, lmo, sharp = norm.dual_norm(gradient), norm.argmin(gradient, 2.0), norm.sharp(gradient)
    # Measured over 20 seeds: at most 1.3e-6.
    assert inner(gradient, lmo) == pytest.approx(-2 * float(dual), rel=5e-6)
    assert norm.norm(lmo) == pytest.approx(2, rel=5e-6)
    assert inner(gradient, sharp) == pytest.approx(float(dual) ** 2, rel=5e-6)
    assert norm.norm(sharp) == pytest.approx(float(dual), rel=5e-6)


@functools.cache
def iterated(name: str) -> Callable[..., Any]:
    """Everything that a norm by iteration says of one gradient, in one program."""
    norm = ITERATED[name][0]

    def evaluate(gradient, radius):
        lmo, sharp = norm.argmin(gradient, radius), norm.sharp(gradient)
        return norm.dual_norm(gradient), lmo, norm.norm(lmo), sharp, norm.norm(sharp)

    return jax.jit(evaluate)


over_iterated = pytest.mark.parametrize("name", ITERATED)
some_gradients = gradients([(6, 4), (1, 6)])


@over_iterated
@laws
@given(gradient=some_gradients, radius=radii)
def test_an_iterated_dual_norm_is_exact_within_its_band(name, gradient, radius):
    dual, *_ = iterated(name)(gradient, radius)
    _, low, high = ITERATED[name]
    exact = NORMS["muon"].dual_norm(gradient)
    assert low * exact <= dual <= high * exact


@over_iterated
@laws
@given(gradient=some_gradients, radius=radii)
def test_an_iterated_lmo_attains_its_own_dual_norm_in_the_ball_of_its_band(name, gradient, radius):
    dual, lmo, length, *_ = iterated(name)(gradient, radius)
    assert inner(gradient, lmo) == pytest.approx(-radius * float(dual), rel=RTOL)
    assert length <= radius * ITERATED[name][2]


@over_iterated
@laws
@given(gradient=some_gradients)
def test_an_iterated_sharp_operator_attains_the_square_of_its_own_dual_norm(name, gradient):
    dual, _, _, sharp, length = map(np.asarray, iterated(name)(gradient, 1.0))
    _, low, high = ITERATED[name]
    assert inner(gradient, sharp) == pytest.approx(float(dual) ** 2, rel=RTOL)
    assert low * dual <= length <= high * dual


# --- Duality, and what makes a norm ---------------------------------------------------------------


@over(NORMS)
def test_no_point_of_the_ball_beats_the_direction(norm):
    gradient = random(3, 2, 4)
    direction = np.asarray(norm.direction(gradient))
    # From next to the direction, where they come close, to anywhere.
    rng = np.random.default_rng(1)
    points = direction + 10 ** rng.uniform(-4, 1, (10_000, 1, 1, 1)) * rng.normal(
        size=(10_000, *gradient.shape)
    )
    lengths = np.asarray(jax.jit(jax.vmap(norm.norm))(jnp.asarray(points)))
    products = np.tensordot(points, np.asarray(gradient), gradient.ndim) / lengths
    dual = float(norm.dual_norm(gradient))
    assert 0.99 * dual < products.max() <= dual * (1 + RTOL)
    assert inner(gradient, direction) == pytest.approx(dual, rel=RTOL)
    assert norm.norm(direction) == pytest.approx(1, rel=RTOL)


@st.composite
def pairs(draw: Any) -> tuple[jax.Array, jax.Array]:
    first = draw(gradients([(4, 6), (6, 4), (3, 2, 4)]))
    return first, random(*first.shape, seed=draw(st.integers(0, 2**16)))


@over_families
@laws
@given(data=st.data(), pair=pairs())
def test_the_triangle_inequality_holds_for_norm_and_dual_norm(family, data, pair):
    norm, (x, y) = data.draw(st.sampled_from(family)), pair
    for length in (norm.norm, norm.dual_norm):
        assert length(x + y) <= (length(x) + length(y)) * (1 + RTOL)


@over_families
@laws
@given(
    data=st.data(),
    gradient=gradients([(4, 6), (6, 4), (3, 2, 4)]),
    factor=st.floats(-1e3, 1e3),
)
def test_norm_and_dual_norm_are_homogeneous(family, data, gradient, factor):
    norm = data.draw(st.sampled_from(family))
    for length in (norm.norm, norm.dual_norm):
        expected = abs(factor) * float(length(gradient))
        assert length(factor * gradient) == pytest.approx(expected, rel=RTOL, abs=1e-300)


@over(NORMS)
def test_only_zero_has_norm_zero(norm):
    for shape in (*MATRICES, *CONVOLUTIONS):
        assert norm.norm(jnp.zeros(shape)) == norm.dual_norm(jnp.zeros(shape)) == 0
        one_entry = jnp.zeros(shape).at[(-1,) * len(shape)].set(1e-3)
        assert norm.norm(one_entry) > 0
        assert norm.dual_norm(one_entry) > 0


# --- The papers' formulas -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Paper:
    """A norm as its paper has it: of a PyTorch weight (out, in, *window), in NumPy."""

    norm: Callable[[np.ndarray], Any]
    dual_norm: Callable[[np.ndarray], Any]
    direction: Callable[[np.ndarray], np.ndarray]


def singular_values(w: np.ndarray) -> np.ndarray:
    return np.linalg.svd(w.reshape(len(w), -1), compute_uv=False)


def polar_factor(w: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(w.reshape(len(w), -1), full_matrices=False)
    return (u @ vt).reshape(w.shape)


def first_singular_pair(w: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(w.reshape(len(w), -1))
    return np.outer(u[:, 0], vt[0]).reshape(w.shape)


def spectral(scale: Callable[[np.ndarray], float]) -> Paper:
    return Paper(
        lambda w: singular_values(w)[0] / scale(w),
        lambda w: singular_values(w).sum() * scale(w),
        lambda w: polar_factor(w) * scale(w),
    )


def lengths(w: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt((w**2).sum(axis=axis, keepdims=True))


MATRIX_PAPERS = {
    # Jordan et al., 2024: max(1, rows/cols)^½; Scion's code: max(1, √(d_out/d_in)).
    "muon": spectral(lambda w: max(1, w.shape[0] / w.shape[1]) ** 0.5),
    # Liu et al., 2025: 0.2 √max(rows, cols).
    "moonlight": spectral(lambda w: 0.2 * max(w.shape) ** 0.5),
    # Scion's "Spectral": √(d_out/d_in).
    "rms_to_rms": spectral(lambda w: (w.shape[0] / w.shape[1]) ** 0.5),
    "scion": spectral(lambda w: (w.shape[0] / w.shape[1]) ** 0.5),
    # Scion's "Sign": sign(g)/d_in.
    "sign": Paper(
        lambda w: w.shape[1] * np.abs(w).max(),
        lambda w: np.abs(w).sum() / w.shape[1],
        lambda w: np.sign(w) / w.shape[1],
    ),
    # Scion's "ColNorm": each column over its length / √d_out.
    "column": Paper(
        lambda w: lengths(w, 0).max() / w.shape[0] ** 0.5,
        lambda w: lengths(w, 0).sum() * w.shape[0] ** 0.5,
        lambda w: w / (lengths(w, 0) / w.shape[0] ** 0.5),
    ),
    # Scion's "RowNorm": each row over its length · √d_in.
    "row": Paper(
        lambda w: lengths(w, 1).max() * w.shape[1] ** 0.5,
        lambda w: lengths(w, 1).sum() / w.shape[1] ** 0.5,
        lambda w: w / (lengths(w, 1) * w.shape[1] ** 0.5),
    ),
}
# Scion's "SpectralConv": √(C_out/C_in)/k², in one dimension /k, in three /k³.
CONVOLUTION_PAPERS = {
    "scion": spectral(lambda w: (w.shape[0] / w.shape[1]) ** 0.5 / np.prod(w.shape[2:])),
}
WHOLE_LEAF_PAPERS = {
    "spectral": spectral(lambda w: 1.0),
    "nuclear": Paper(
        lambda w: singular_values(w).sum(), lambda w: singular_values(w)[0], first_singular_pair
    ),
    "sign_not_normalized": Paper(lambda w: np.abs(w).max(), lambda w: np.abs(w).sum(), np.sign),
    # Scion's "BiasRMS": g/√mean(g²).
    "rms": Paper(
        lambda w: np.mean(w**2) ** 0.5,
        lambda w: np.sqrt(w.size * np.sum(w**2)),
        lambda w: w / np.mean(w**2) ** 0.5,
    ),
    "euclidean": Paper(np.linalg.norm, np.linalg.norm, lambda w: w / np.linalg.norm(w)),
}


def in_pytorch(kernel: Any) -> np.ndarray:
    """A Flax kernel (*window, in, out) as a weight (out, in, *window)."""
    return np.moveaxis(np.asarray(kernel), (-1, -2), (0, 1))


def assert_is(
    norm: dm.norms.Norm, paper: Paper, kernel: jax.Array, layout: Any = in_pytorch
) -> None:
    weight = layout(kernel)
    assert norm.norm(kernel) == pytest.approx(paper.norm(weight), rel=RTOL)
    assert norm.dual_norm(kernel) == pytest.approx(paper.dual_norm(weight), rel=RTOL)
    direction = layout(norm.direction(kernel))
    np.testing.assert_allclose(direction, paper.direction(weight), rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("name", MATRIX_PAPERS | WHOLE_LEAF_PAPERS)
def test_a_matrix_has_the_papers_norm_dual_norm_and_direction(name, shape):
    paper = (MATRIX_PAPERS | WHOLE_LEAF_PAPERS)[name]
    assert_is(NORMS[name], paper, random(*shape))


@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("name", CONVOLUTION_PAPERS | WHOLE_LEAF_PAPERS)
def test_a_convolution_has_the_papers_norm_dual_norm_and_direction(name, shape):
    paper = (CONVOLUTION_PAPERS | WHOLE_LEAF_PAPERS)[name]
    assert_is(NORMS[name], paper, random(*shape))


@pytest.mark.parametrize("name", ["sign_not_normalized", "rms", "euclidean"])
def test_a_vector_has_the_papers_norm_dual_norm_and_direction(name):
    assert_is(NORMS[name], WHOLE_LEAF_PAPERS[name], random(7), layout=np.asarray)


@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("name", sorted(MATRIX_PAPERS.keys() - {"scion"}))
def test_elsewhere_a_convolution_is_the_matrix_of_its_patches(name, shape):
    kernel = random(*shape)

    def patches(x):
        return np.asarray(x).reshape(-1, shape[-1]).T

    assert_is(NORMS[name], MATRIX_PAPERS[name], kernel, layout=patches)


def test_rms_to_rms_bounds_the_root_mean_square_of_every_output():
    kernel = random(3, 5)
    inputs = np.random.default_rng(0).normal(size=(10_000, 3))
    outputs = inputs @ np.asarray(kernel)
    ratios = np.sqrt((outputs**2).mean(-1) / (inputs**2).mean(-1))
    assert 0.99 < ratios.max() / float(NORMS["rms_to_rms"].norm(kernel)) <= 1


# From the root mean square to the maximum, from the sum to the root mean square, and from the mean
# to the maximum; the last bounds every output of an input with entries up to 1.
@pytest.mark.parametrize(
    ("name", "input_norm", "output_norm"),
    [
        ("row", lambda x: np.sqrt((x**2).mean(-1)), lambda y: np.abs(y).max(-1)),
        ("column", lambda x: np.abs(x).sum(-1), lambda y: np.sqrt((y**2).mean(-1))),
        ("sign", lambda x: np.abs(x).mean(-1), lambda y: np.abs(y).max(-1)),
    ],
    ids=["row", "column", "sign"],
)
def test_a_norm_is_the_largest_output_of_a_unit_input(name, input_norm, output_norm):
    kernel = random(3, 4)
    # Anywhere, near one input alone, and along the vector of each output.
    rng = np.random.default_rng(0)
    inputs = np.concatenate([rng.normal(size=(10_000, 3)), np.eye(3), np.asarray(kernel).T])
    ratios = output_norm(inputs @ np.asarray(kernel)) / input_norm(inputs)
    assert ratios.max() == pytest.approx(float(NORMS[name].norm(kernel)), rel=RTOL)


# --- Scales, dtypes, degenerate gradients ---------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@over(ALL_NORMS)
def test_the_size_of_the_gradient_does_not_change_the_direction(norm, scale):
    gradient = random(6, 4).astype(jnp.float32)
    scaled = norm.direction(jnp.float32(scale) * gradient)
    # Measured: at most 4e-7, but 3e-5 with an iteration.
    np.testing.assert_allclose(scaled, norm.direction(gradient), atol=2e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@over(NORMS)
def test_norms_of_small_and_of_large_numbers_are_right(norm, scale):
    gradient = random(6, 4).astype(jnp.float32)
    for length in (norm.norm, norm.dual_norm):
        scaled = float(length(jnp.float32(scale) * gradient)) / scale
        assert scaled == pytest.approx(float(length(gradient)), rel=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@over(ONE_OF_EACH)
def test_the_direction_is_right_up_to_the_largest_numbers(norm, dtype):
    gradient = random(6, 4)
    gradient = (1.9 * gradient / jnp.max(jnp.abs(gradient))).astype(dtype)
    # The reciprocal of 1.9 · 2¹²⁶ is no normal number any more.
    direction = norm.direction(gradient * jnp.asarray(2.0**126, dtype))
    np.testing.assert_allclose(
        direction.astype(float), norm.direction(gradient).astype(float), atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@over(ALL_NORMS)
def test_steps_and_random_arrays_keep_their_dtype(norm, dtype):
    def arrays(gradient):
        key, shape = jax.random.key(0), gradient.shape
        drawn = norm.init(key, shape, dtype), norm.initializer(2.0)(key, shape, dtype)
        return norm.direction(gradient), norm.argmin(gradient, 2.0), norm.sharp(gradient), *drawn

    arrays = jax.eval_shape(arrays, jax.ShapeDtypeStruct((6, 4), dtype))
    assert [(array.shape, array.dtype) for array in arrays] == [((6, 4), dtype)] * 5


@over(ALL_NORMS)
def test_lengths_of_half_precision_are_taken_in_float32(norm):
    gradient = random(6, 4).astype(jnp.bfloat16)
    for length in (norm.norm, norm.dual_norm):
        assert length(gradient).dtype == jnp.float32
        assert length(gradient) == pytest.approx(
            float(length(gradient.astype(jnp.float32))), rel=1e-6
        )


@over(ALL_NORMS)
def test_zero_gives_zero(norm):
    zero = jnp.zeros((6, 4))
    for step in (norm.direction(zero), norm.argmin(zero, 3.0), norm.sharp(zero)):
        np.testing.assert_array_equal(step, zero)


@over(ALL_NORMS)
def test_a_nan_is_not_lost(norm):
    gradient = random(6, 4).at[1, 2].set(jnp.nan)
    for step in (norm.direction(gradient), norm.argmin(gradient), norm.sharp(gradient)):
        assert jnp.isnan(step).any()
    assert jnp.isnan(norm.dual_norm(gradient))
    assert jnp.isnan(norm.norm(gradient))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("name", ["spectral", "nuclear"])
def test_an_infinite_entry_gives_nan_and_comes_back(name, value):
    # The SVD of an infinity does not return on a CPU.
    norm = {"spectral": dm.norms.spectral_norm(), "nuclear": dm.norms.nuclear_norm()}[name]
    gradient = random(6, 4).at[1, 2].set(value)
    assert jnp.isnan(norm.direction(gradient)).any()
    assert jnp.isnan(norm.norm(gradient))
    assert jnp.isnan(norm.dual_norm(gradient))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@over(ALL_NORMS)
def test_an_empty_matrix_stays_empty(norm, shape):
    empty = jnp.zeros(shape)
    for step in (norm.direction(empty), norm.argmin(empty, 3.0), norm.sharp(empty)):
        assert step.shape == shape


def test_an_input_or_output_without_gradient_stays_where_it_is():
    gradient = random(6, 4).at[1].set(0.0).at[:, 2].set(0.0)
    assert not norm_of_axis(NORMS["column"].direction(gradient), 1)[1]
    assert not norm_of_axis(NORMS["row"].direction(gradient), 0)[2]


def norm_of_axis(x: jax.Array, axis: int) -> np.ndarray:
    return np.linalg.norm(np.asarray(x), axis=axis)


def test_a_matrix_of_low_rank_gets_no_direction_that_it_has_not():
    gradient = of_spectrum([3.0, 0.5], (6, 4), seed=0)
    for name, rank in (("spectral", 2), ("nuclear", 1)):
        values = np.linalg.svd(np.asarray(NORMS[name].direction(gradient)), compute_uv=False)
        np.testing.assert_allclose(values, [1.0] * rank + [0.0] * (4 - rank), atol=RTOL)


# --- The programs of JAX --------------------------------------------------------------------------


@over(ONE_OF_EACH)
def test_jit_and_vmap_equal_plain_calls(norm):
    def everything(gradient, radius):
        lengths = norm.norm(gradient), norm.dual_norm(gradient)
        return (
            *lengths,
            norm.direction(gradient),
            norm.argmin(gradient, radius),
            norm.sharp(gradient),
        )

    gradients, radii = random(3, 6, 4), jnp.array([0.3, 1.0, 2.0])
    vmapped = jax.jit(jax.vmap(everything))(gradients, radii)
    for i, pair in enumerate(zip(gradients, radii, strict=True)):
        for ours, theirs in zip(vmapped, everything(*pair), strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=RTOL, atol=RTOL)


# --- Initialisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), *CONVOLUTIONS])
@over(NORMS)
def test_a_random_array_has_norm_one(norm, shape):
    x = norm.init(jax.random.key(0), shape, jnp.float64)
    assert x.shape == shape
    assert norm.norm(x) == pytest.approx(0 if norm is NORMS["rms"] else 1, rel=RTOL)


@over({name: NORMS[name] for name in OF_VECTORS})
def test_a_random_vector_has_norm_one(norm):
    x = norm.init(jax.random.key(0), (7,), jnp.float64)
    assert norm.norm(x) == pytest.approx(0 if norm is NORMS["rms"] else 1, rel=RTOL)


@over({name: norm for name, norm in NORMS.items() if name != "rms"})
def test_other_keys_give_other_arrays(norm):
    first, second = (norm.init(jax.random.key(seed), (6, 4), float) for seed in (0, 1))
    assert (first != second).any()


@over(ALL_NORMS)
def test_an_initializer_gives_radius_times_the_random_array(norm):
    expected = 8.0 * norm.init(jax.random.key(0), (6, 4), float)
    np.testing.assert_array_equal(norm.initializer(8.0)(jax.random.key(0), (6, 4), float), expected)


@pytest.mark.parametrize("radius", [np.float64(2), np.float32(2)])
def test_a_radius_of_numpy_does_not_change_the_dtype(radius):
    initializer = NORMS["sign"].initializer(radius)
    assert initializer(jax.random.key(0), (6, 4), jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("sign", lambda init: nn.Dense(4, kernel_init=init), (1, 6)),
        ("scion", lambda init: nn.Conv(4, (3, 1), kernel_init=init), (1, 4, 4, 2)),
    ],
    ids=["dense", "conv"],
)
def test_linen_takes_an_initializer(name, module, shape):
    variables = module(NORMS[name].initializer(3.0)).init(
        jax.random.key(0), jnp.ones(shape, jnp.float32)
    )
    assert NORMS[name].norm(variables["params"]["kernel"]) == pytest.approx(3, rel=2e-6)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("rms_to_rms", lambda init, rngs: nnx.Linear(6, 4, kernel_init=init, rngs=rngs).kernel),
        ("scion", lambda init, rngs: nnx.Conv(2, 4, 3, kernel_init=init, rngs=rngs).kernel),
        ("column", lambda init, rngs: nnx.Embed(6, 4, embedding_init=init, rngs=rngs).embedding),
    ],
    ids=["linear", "conv", "embed"],
)
def test_nnx_takes_an_initializer(name, module):
    parameter = module(NORMS[name].initializer(3.0), nnx.Rngs(0))
    assert NORMS[name].norm(parameter[...]) == pytest.approx(3, rel=2e-6)
