"""Norms: the laws that tie norm, dual norm and steps, and the papers' formulas in their layout."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dropmuon_jax as dm
from dropmuon_jax.layers.matrices import MatrixShape

NORMS: dict[str, dm.norms.Norm] = {
    "scion": dm.norms.spectral_norm("scion"),
    "nuclear": dm.norms.nuclear_norm(),
    "sign": dm.norms.sign_norm(),
    "column": dm.norms.column_norm(),
    "row": dm.norms.row_norm(),
    "rms": dm.norms.rms_norm(),
    "euclidean": dm.norms.euclidean_norm(),
}
# With an iteration, and where it takes singular values of at least 1e-3, by newton_schulz_lmo's
# docstring.
BANDS = {"5_steps": (0.86, 1.14), "7_steps": (1 - 1e-4, 1 + 1e-4)}
ITERATED = {
    f"{num_steps}_steps": dm.norms.spectral_norm(
        "muon", orthogonalize=dm.orthogonalize.newton_schulz(num_steps=num_steps)
    )
    for num_steps in (5, 7)
}
ALL_NORMS = NORMS | ITERATED
SHAPES = {
    "wide": (4, 6),
    "tall": (6, 4),
    "one_row": (1, 6),
    "one_column": (6, 1),
    "convolution": (2, 3, 1, 4),
    "vector": (7,),
}
# Relative to what is compared. Measured in float64: at most 2e-15, between programs 6e-14.
RTOL = 1e-9


def takes(name: str, shape: str) -> bool:
    if name in ITERATED:
        return shape in ("tall", "one_row")
    return shape != "vector" or NORMS[name].of != "matrices"


def over(names: Any) -> Any:
    cases = [(name, shape) for shape in SHAPES for name in names if takes(name, shape)]
    return pytest.mark.parametrize(("name", "shape"), cases)


over_all_norms = pytest.mark.parametrize("name", ALL_NORMS)


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    """Float64, and nothing promoted silently; for the module, whose tests share their results."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


def spectra(shape: tuple[int, ...]) -> np.ndarray:
    """A random gradient and some of every rank down to zero, with singular values in [2.1e-3, 1].

    The Frobenius norm of these is at most 2, so that they are above 1e-3 of it.
    """
    rng = np.random.default_rng(sum(shape))
    rows, cols = int(np.prod(shape[:-1])), shape[-1]
    batch = [rng.normal(size=shape) / 5]
    for rank in range(min(rows, cols), -1, -1):
        left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0][:, :rank] for n in (rows, cols))
        batch.append((left * 10 ** rng.uniform(np.log10(2.1e-3), 0, rank) @ right.T).reshape(shape))
    return np.stack(batch)


# The gradients of `extremes`, in their order. Of the largest, the reciprocal is no normal number.
SCALES = np.array([1, 2.0**-100, 2.0**100, 2.0**126])
STRANGE = ("nan", "inf", "-inf")


def extremes(shape: tuple[int, ...]) -> np.ndarray:
    """One gradient, which bfloat16 can hold, at several scales, and with a strange entry."""
    plain = np.random.default_rng(sum(shape)).normal(size=shape)
    plain = np.asarray(jnp.asarray(1.9 * plain / np.abs(plain).max(), jnp.bfloat16), float)
    strange = np.stack([plain] * len(STRANGE))
    strange[:, 1, 2] = np.nan, np.inf, -np.inf
    return np.concatenate([[scale * plain for scale in SCALES], strange])


def steps(norm: dm.norms.Norm, gradient: Any, radius: Any) -> dict[str, jax.Array]:
    return {
        "direction": norm.direction(gradient),
        "lmo": norm.argmin(gradient, radius),
        "sharp": norm.sharp(gradient),
    }


@functools.cache
def said_of(shape: str, dtype: str = "float64") -> dict[str, Any]:
    """What each norm says of a batch: of `spectra` in float64, of `extremes` in other dtypes.

    By name, after the batch and radii: the steps, and by what they are of, the norms and dual
    norms. One program for all steps and one for all lengths compile faster than one for both.
    """
    norms = {name: norm for name, norm in ALL_NORMS.items() if takes(name, shape)}
    x = (spectra if dtype == "float64" else extremes)(SHAPES[shape]).astype(dtype)
    radii = np.geomspace(1e-3, 1e3, len(x)).astype(dtype)

    def steps_of(x, radii):
        return {
            name: jax.vmap(functools.partial(steps, norm))(x, radii) for name, norm in norms.items()
        }

    def lengths_of(points):
        return {
            name: [jax.vmap(length)(points[name]) for length in (norm.norm, norm.dual_norm)]
            for name, norm in norms.items()
        }

    said = jax.tree.map(np.asarray, jax.jit(steps_of)(x, radii))
    points = {name: {"x": x} | of_norm for name, of_norm in said.items()}
    stacked = {name: np.concatenate(list(of.values())) for name, of in points.items()}
    for name, lengths in jax.jit(lengths_of)(stacked).items():
        said[name] |= {"x": x, "radius": radii}
        for kind, of in zip(("norm", "dual_norm"), lengths, strict=True):
            said[name][kind] = dict(zip(points[name], np.split(np.asarray(of), 4), strict=True))
    return jax.tree.map(lambda leaf: leaf.astype(float), said)


def inner(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The inner product of each pair of a batch."""
    return np.sum(x * y, axis=tuple(range(1, x.ndim)))


def assert_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=RTOL * np.abs(expected).max())


# --- The definitions of LMO and sharp operator ----------------------------------------------------


@over(ALL_NORMS)
def test_steps_attain_the_dual_norm_in_the_ball_and_its_square(name, shape):
    """⟨G, lmo⟩ = -radius ‖G‖* with ‖lmo‖ ≤ radius, and ⟨G, G♯⟩ = ‖G♯‖² = ‖G‖*²."""
    said, (low, high) = said_of(shape)[name], BANDS.get(name, (1 - RTOL, 1 + RTOL))
    dual, radius = said["dual_norm"]["x"], said["radius"]
    np.testing.assert_allclose(inner(said["x"], said["lmo"]), -radius * dual, rtol=RTOL)
    np.testing.assert_allclose(inner(said["x"], said["sharp"]), dual**2, rtol=RTOL)
    assert (said["norm"]["lmo"] <= radius * high).all()
    assert (low * dual <= said["norm"]["sharp"]).all()
    assert (said["norm"]["sharp"] <= high * dual).all()


@over(ALL_NORMS)
def test_only_zero_has_norm_zero_and_its_direction_is_zero(name, shape):
    said = said_of(shape)[name]
    is_zero = ~said["x"].any(axis=tuple(range(1, said["x"].ndim)))
    assert is_zero.tolist() == [False] * (len(is_zero) - 1) + [True]
    for of_x in (said["norm"]["x"], said["dual_norm"]["x"]):
        np.testing.assert_array_equal(of_x == 0, is_zero)
    for step in ("direction", "lmo", "sharp"):
        np.testing.assert_array_equal(said[step][-1], said["x"][-1])


@over(ITERATED)
def test_an_iterated_dual_norm_is_exact_within_its_band(name, shape):
    said, (low, high) = said_of(shape)[name], BANDS[name]
    factor = max(1, SHAPES[shape][1] / SHAPES[shape][0]) ** 0.5
    exact = factor * np.linalg.svd(said["x"]).S.sum(-1)
    assert (low * exact <= said["dual_norm"]["x"]).all()
    assert (said["dual_norm"]["x"] <= high * exact).all()


# --- The papers' formulas -------------------------------------------------------------------------


class Paper(NamedTuple):
    """A norm as its paper has it: of a PyTorch weight (out, in, *window), in NumPy.

    The dual norm is then ‖G♯‖, by the law above.
    """

    norm: Callable[[np.ndarray], Any]
    direction: Callable[[np.ndarray], np.ndarray]


def svd(w: np.ndarray) -> Any:
    return np.linalg.svd(w.reshape(len(w), -1), full_matrices=False)


def scion_factor(w: np.ndarray) -> float:
    return (w.shape[0] / w.shape[1]) ** 0.5 / np.prod(w.shape[2:])


def axis_lengths(w: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt((w**2).sum(axis=axis, keepdims=True))


# Of matrices; a convolution is the matrix of its patches.
MATRIX_PAPERS = {
    # Scion's "Sign": sign(g)/d_in.
    "sign": Paper(
        lambda w: w.shape[1] * np.abs(w).max(),
        lambda w: np.sign(w) / w.shape[1],
    ),
    # Scion's "ColNorm": each column over its length / √d_out.
    "column": Paper(
        lambda w: axis_lengths(w, 0).max() / w.shape[0] ** 0.5,
        lambda w: w / (axis_lengths(w, 0) / w.shape[0] ** 0.5),
    ),
    # Scion's "RowNorm": each row over its length · √d_in.
    "row": Paper(
        lambda w: axis_lengths(w, 1).max() * w.shape[1] ** 0.5,
        lambda w: w / (axis_lengths(w, 1) * w.shape[1] ** 0.5),
    ),
}
LEAF_PAPERS = {
    # Scion's "Spectral", and "SpectralConv": √(C_out/C_in)/k².
    "scion": Paper(
        lambda w: svd(w).S[0] / scion_factor(w),
        lambda w: (svd(w).U @ svd(w).Vh).reshape(w.shape) * scion_factor(w),
    ),
    "nuclear": Paper(
        lambda w: svd(w).S.sum(),
        lambda w: np.outer(svd(w).U[:, 0], svd(w).Vh[0]).reshape(w.shape),
    ),
    # Scion's "BiasRMS": g/√mean(g²).
    "rms": Paper(lambda w: np.mean(w**2) ** 0.5, lambda w: w / np.mean(w**2) ** 0.5),
    "euclidean": Paper(np.linalg.norm, lambda w: w / np.linalg.norm(w)),
}


def patches(kernel: np.ndarray) -> np.ndarray:
    """As a weight (out, in); a vector has fan-in 1."""
    return np.atleast_2d(kernel).reshape(-1, kernel.shape[-1]).T


def in_pytorch(kernel: np.ndarray) -> np.ndarray:
    """A Flax kernel (*window, in, out) as a weight (out, in, *window)."""
    return kernel if kernel.ndim == 1 else np.moveaxis(kernel, (-1, -2), (0, 1))


@over(NORMS)
def test_a_leaf_has_the_papers_norm_and_direction(name, shape):
    said, paper = said_of(shape)[name], (MATRIX_PAPERS | LEAF_PAPERS)[name]
    layout = patches if name in MATRIX_PAPERS else in_pytorch
    weight = layout(said["x"][0])
    assert_close(said["norm"]["x"][0], paper.norm(weight))
    assert_close(layout(said["direction"][0]), paper.direction(weight))


# The papers' own formulas, for a PyTorch weight of shape (out, channels, *window).
SHAPE_FACTORS = {
    "spectral": lambda out, channels, window: 1.0,
    # Jordan et al., 2024: max(1, rows/cols)^½; Scion's code: max(1, √(d_out/d_in)).
    "muon": lambda out, channels, window: max(1, out / (channels * window)) ** 0.5,
    # Liu et al., 2025: 0.2 √max(rows, cols).
    "moonlight": lambda out, channels, window: 0.2 * max(out, channels * window) ** 0.5,
    # Bernstein and Newhouse, 2024: √(d_out/d_in).
    "rms_to_rms": lambda out, channels, window: (out / (channels * window)) ** 0.5,
    # Scion's SpectralConv, in one dimension /k, in three /k³.
    "scion": lambda out, channels, window: (out / channels) ** 0.5 / window,
}


@pytest.mark.parametrize("shape", [(4, 9, 1), (9, 4, 1), (5, 2, 3), (7, 1, 4)])
@pytest.mark.parametrize("name", SHAPE_FACTORS)
def test_shape_factors_are_the_papers(name, shape):
    out, channels, window = shape
    factor = dm.norms.spectral_norm(name).factor(MatrixShape(channels * window, out, window))
    assert factor == pytest.approx(SHAPE_FACTORS[name](*shape), rel=1e-12)


# --- Scales, dtypes, degenerate gradients, initialisation -----------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@over_all_norms
def test_gradients_of_any_size_have_the_same_direction_and_lengths_in_float32(name, dtype):
    said, single = said_of("tall", dtype)[name], said_of("tall", "float32")[name]
    for direction in said["direction"][1 : len(SCALES)]:
        np.testing.assert_allclose(direction, said["direction"][0], atol=1e-5)
    for kind in ("norm", "dual_norm"):
        expected = SCALES[:3] * single[kind]["x"][0]
        np.testing.assert_allclose(said[kind]["x"][:3], expected, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_arrays_keep_their_dtype_and_lengths_are_float32_at_least(dtype):
    def everything(gradient, radius, key):
        arrays, scalars = [], []
        for norm in ALL_NORMS.values():
            arrays += steps(norm, gradient, radius).values()
            arrays += [norm.init(key, (6, 4), dtype)]
            arrays += [norm.initializer(np.float64(2))(key, (6, 4), dtype)]
            scalars += [norm.norm(gradient), norm.dual_norm(gradient)]
        return arrays, scalars

    gradient, radius = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((6, 4), ()))
    arrays, scalars = jax.eval_shape(everything, gradient, radius, jax.random.key(0))
    assert {(array.shape, array.dtype.name) for array in arrays} == {((6, 4), dtype)}
    wide = np.promote_types(dtype, np.float32)
    assert {(scalar.shape, scalar.dtype) for scalar in scalars} == {((), wide)}


@pytest.mark.parametrize(
    ("name", "strange"),
    # The SVD of an infinity does not return on a CPU.
    [*((name, "nan") for name in ALL_NORMS), ("scion", "inf"), ("nuclear", "-inf")],
)
def test_a_nan_is_not_lost_and_an_svd_of_infinity_gives_one(name, strange):
    said, i = said_of("tall", "float32")[name], len(SCALES) + STRANGE.index(strange)
    for array in (*map(said.get, ("direction", "lmo", "sharp")), said["norm"]["x"]):
        assert np.isnan(array[i]).any()
    assert np.isnan(said["dual_norm"]["x"][i])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_empty_matrix_stays_empty(shape):
    def everything(empty):
        return [steps(norm, empty, jnp.ones(())) for norm in ALL_NORMS.values()]

    found = jax.tree.leaves(jax.jit(everything)(jnp.zeros(shape)))
    assert {step.shape for step in found} == {shape}


@pytest.mark.parametrize(
    ("name", "expected"), [("scion", [(4 / 6) ** 0.5] * 2 + [0, 0]), ("nuclear", [1, 0, 0, 0])]
)
def test_a_matrix_of_low_rank_gets_no_direction_that_it_has_not(name, expected):
    of_rank_2 = said_of("tall")[name]["direction"][-3]
    np.testing.assert_allclose(np.linalg.svd(of_rank_2).S, expected, atol=RTOL)


@pytest.mark.parametrize("shape", ["convolution", "vector"])
def test_random_arrays_have_norm_one_times_the_radius_and_differ_from_key_to_key(shape):
    norms = {name: norm for name, norm in NORMS.items() if takes(name, shape)}

    @jax.jit
    @jax.vmap
    def draw(key):
        drawn = {name: norm.init(key, SHAPES[shape], float) for name, norm in norms.items()}
        at_8 = norms["sign"].initializer(8.0)(key, SHAPES[shape], float)
        return drawn, {name: norm.norm(drawn[name]) for name, norm in norms.items()}, at_8

    drawn, of_norm, at_8 = draw(jax.random.split(jax.random.key(0)))
    for name, (first, second) in drawn.items():
        assert first.shape == SHAPES[shape]
        np.testing.assert_allclose(of_norm[name], float(name != "rms"), rtol=RTOL)
        assert (first != second).any() == (name != "rms")
    np.testing.assert_array_equal(at_8, 8 * drawn["sign"])


def test_linen_and_nnx_take_an_initializer():
    initializer = NORMS["scion"].initializer(3.0)
    conv = nn.Conv(4, (3, 1), kernel_init=initializer)
    variables = jax.jit(conv.init)(jax.random.key(0), np.ones((1, 4, 4, 2), np.float32))
    kernel = variables["params"]["kernel"]
    linear = nnx.Linear(6, 4, kernel_init=initializer, rngs=nnx.Rngs(0))
    for array in (kernel, linear.kernel[...]):
        assert NORMS["scion"].norm(array) == pytest.approx(3, rel=2e-6)
