"""LMOs and sharp operators of trees: axes, shape factors, radius, and their defining equation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm
import reference

pytestmark = pytest.mark.usefixtures("strict_promotion")
EXACT = 12  # steps of Polar Express after which the iteration is the SVD to float32's rounding


def direction(x, **options):
    tx = dm.newton_schulz_lmo(num_steps=EXACT, **options)
    tree = {"w": jnp.asarray(x, jnp.float32)}
    return np.asarray(tx.update(tree, tx.init(tree))[0]["w"])


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 7), (7, 1)])
def test_the_update_attains_the_dual_norm_inside_the_ball(shape):
    x, radius = random(*shape), 3.0
    update = direction(x, radius=radius)
    nuclear_norm = np.linalg.svd(x, compute_uv=False).sum()
    assert np.sum(x * update) == pytest.approx(radius * nuclear_norm, rel=1e-4)
    assert np.linalg.norm(update, 2) <= radius * (1 + 1e-4)


def test_a_leaf_of_four_axes_is_the_convolution_of_an_image():
    x = random(3, 2, 4, 5)
    np.testing.assert_array_equal(direction(x), direction(x, dimension_numbers="in_out"))


def test_axes_in_neither_list_are_batch_axes():
    x = random(3, 4, 6)
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    expected = np.stack([reference.polar_factor(matrix) for matrix in x])
    np.testing.assert_allclose(direction(x, dimension_numbers=numbers), expected, atol=1e-4)


def test_heads_can_be_merged_into_an_axis_or_kept_apart():
    x = random(6, 3, 4)  # an attention kernel (in, heads, head size)
    merged = direction(x, dimension_numbers=MuonDimensionNumbers(0, (1, 2)))
    expected = reference.polar_factor(x.reshape(6, 12)).reshape(x.shape)
    np.testing.assert_allclose(merged, expected, atol=1e-4)
    apart = direction(x, dimension_numbers=MuonDimensionNumbers(0, 2))
    expected = np.stack([reference.polar_factor(x[:, h]) for h in range(3)], axis=1)
    np.testing.assert_allclose(apart, expected, atol=1e-4)


def test_axes_can_be_given_by_path_and_reversed():
    tree = {"out": jnp.asarray(random(3, 4, 6), jnp.float32), "w": jnp.eye(3, dtype=jnp.float32)}
    numbers = {"out": MuonDimensionNumbers(reduction_axis=-1, output_axis=(0, 1))}
    tx = dm.newton_schulz_lmo(num_steps=EXACT, dimension_numbers=numbers)
    updates, _ = tx.update(tree, tx.init(tree))
    matrix = np.asarray(tree["out"], np.float64).transpose(2, 0, 1).reshape(6, 12)
    expected = reference.polar_factor(matrix).reshape(6, 3, 4).transpose(1, 2, 0)
    np.testing.assert_allclose(updates["out"], expected, atol=1e-4)
    np.testing.assert_allclose(updates["w"], np.eye(3), atol=1e-4)


# --- Convolutions, and the papers' shape factors --------------------------------------------------

CONVOLUTIONS = {"1d": (3, 2, 5), "2d": (3, 2, 2, 5), "3d": (2, 1, 3, 2, 5)}


@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_of_any_dimension_is_the_matrix_of_its_patches(shape):
    x = random(*shape)
    expected = reference.polar_factor(x.reshape(-1, 5)).reshape(shape)
    np.testing.assert_allclose(direction(x, dimension_numbers="in_out"), expected, atol=1e-4)


def test_only_the_leaves_of_a_pattern_are_convolutions():
    tree = {"conv": jnp.asarray(random(3, 2, 4), jnp.float32)}
    tree["heads"] = tree["conv"]
    numbers = {"conv": "in_out", "heads": MuonDimensionNumbers(1, 2)}
    tx = dm.norm_lmo(dm.norms.spectral_norm("scion"), dimension_numbers=numbers)
    updates, _ = tx.update(tree, tx.init(tree))
    x = np.asarray(tree["conv"], np.float64)
    patches = reference.polar_factor(x.reshape(6, 4)).reshape(x.shape)
    np.testing.assert_allclose(updates["conv"], 2**0.5 / 3 * patches, atol=1e-5)
    heads = np.stack([reference.polar_factor(matrix) for matrix in x])
    np.testing.assert_allclose(updates["heads"], 2**0.5 * heads, atol=1e-5)


# The papers' own formulas, for a PyTorch weight of shape (out, channels, *window).
PAPERS = {
    "spectral": lambda out, channels, window: 1.0,
    "muon": lambda out, channels, window: max(1, out / (channels * window)) ** 0.5,
    "moonlight": lambda out, channels, window: 0.2 * max(out, channels * window) ** 0.5,
    "rms_to_rms": lambda out, channels, window: (out / (channels * window)) ** 0.5,
    "scion": lambda out, channels, window: (out / channels) ** 0.5 / window,
}


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), *CONVOLUTIONS.values()])
@pytest.mark.parametrize("name", PAPERS)
def test_shape_factors_are_the_papers_in_the_layout_of_flax(name, shape):
    *window, channels, out = shape
    tree = {"w": jnp.asarray(random(*shape), jnp.float32)}
    tx = dm.norm_lmo(dm.norms.spectral_norm(name), dimension_numbers="in_out")
    scaled = np.asarray(tx.update(tree, tx.init(tree))[0]["w"]).reshape(-1, out)
    expected = PAPERS[name](out, channels, np.prod(window, dtype=int))
    np.testing.assert_allclose(
        np.linalg.svd(scaled, compute_uv=False), np.full(min(scaled.shape), expected), rtol=1e-5
    )


# --- Every transformation is its norm, leaf by leaf -----------------------------------------------

KERNEL = dm.orthogonalize.newton_schulz(num_steps=2)
NORMS = {
    "spectral": dm.norms.spectral_norm("moonlight", orthogonalize=KERNEL),
    "svd": dm.norms.spectral_norm("scion"),
    "nuclear": dm.norms.nuclear_norm(),
    "sign": dm.norms.sign_norm(),
    "sign_not_normalized": dm.norms.sign_norm(normalized=False),
    "column": dm.norms.column_norm(),
    "row": dm.norms.row_norm(),
    "rms": dm.norms.rms_norm(),
    "euclidean": dm.norms.euclidean_norm(),
}
# The LMO, the sharp operator, and the norm whose they are.
TRANSFORMATIONS: dict[str, tuple[Any, Any, dm.norms.Norm]] = {
    name: (
        functools.partial(dm.norm_lmo, norm),
        functools.partial(dm.transforms.norm_sharp, norm),
        norm,
    )
    for name, norm in NORMS.items()
}
NEWTON_SCHULZ = dm.norms.spectral_norm("muon", orthogonalize=KERNEL)
TRANSFORMATIONS["newton_schulz"] = (
    functools.partial(dm.newton_schulz_lmo, shape_factor="muon", num_steps=2),
    functools.partial(dm.transforms.norm_sharp, NEWTON_SCHULZ),
    NEWTON_SCHULZ,
)
OF_VECTORS = ("sign", "sign_not_normalized", "rms", "euclidean")
OF_MATRICES = [name for name in TRANSFORMATIONS if name not in ("rms", "euclidean")]
over_transformations = pytest.mark.parametrize("name", TRANSFORMATIONS)
over_matrix_transformations = pytest.mark.parametrize("name", OF_MATRICES)


def gradients(name: str) -> Any:
    """A matrix, a convolution, and a vector for those that take it."""
    tree = {"dense": random(6, 4), "conv": random(3, 1, 2, 4)}
    if name in OF_VECTORS:
        tree["bias"] = random(4)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def steps(tx: Any, tree: Any) -> Any:
    return tx.update(tree, tx.init(tree))[0]


def assert_close(actual: Any, expected: Any) -> None:
    # Measured: at most 3e-7 of the largest entry.
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * np.abs(e).max()),
        actual,
        expected,
    )


@over_transformations
def test_an_lmo_of_a_tree_is_minus_its_norms_lmo_of_each_leaf(name):
    make, _, norm = TRANSFORMATIONS[name]
    tree = gradients(name)
    expected = jax.tree.map(lambda leaf: -norm.argmin(leaf, 0.3), tree)
    assert_close(steps(make(0.3), tree), expected)


@over_transformations
def test_a_sharp_operator_of_a_tree_is_its_norms_of_each_leaf(name):
    _, make, norm = TRANSFORMATIONS[name]
    tree = gradients(name)
    expected = jax.tree.map(lambda leaf: 0.3 * norm.sharp(leaf), tree)
    assert_close(steps(make(0.3), tree), expected)


@over_matrix_transformations
def test_each_matrix_of_a_batch_has_a_step_of_its_own(name):
    lmo, sharp, norm = TRANSFORMATIONS[name]
    # Of very different lengths, and with the batch in the middle.
    stack = jnp.asarray(random(6, 2, 4), jnp.float32) * jnp.array([[[1e-2], [1.0]]])
    numbers = MuonDimensionNumbers(reduction_axis=0, output_axis=2)
    for make, step in ((lmo, lambda x: -norm.argmin(x)), (sharp, norm.sharp)):
        actual = steps(make(dimension_numbers=numbers), {"w": stack})["w"]
        for i in range(2):
            assert_close(actual[:, i], step(stack[:, i]))


@over_matrix_transformations
def test_a_tied_embedding_is_the_output_layer_that_it_transposes(name):
    lmo, sharp, _ = TRANSFORMATIONS[name]
    table = jnp.asarray(random(6, 4), jnp.float32)  # (tokens, features)
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    for make in (lmo, sharp):
        tied = steps(make(dimension_numbers=numbers), {"embedding": table})["embedding"]
        assert_close(tied.T, steps(make(), {"kernel": table.T})["kernel"])


def test_the_sign_of_a_tied_embedding_is_divided_by_its_features():
    table = jnp.asarray(random(6, 4), jnp.float32)
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    update = steps(
        dm.norm_lmo(dm.norms.sign_norm(), dimension_numbers=numbers), {"embedding": table}
    )["embedding"]
    np.testing.assert_array_equal(update, np.sign(table) / 4)


@pytest.mark.parametrize("name", ["rms", "euclidean"])
def test_a_norm_of_whole_leaves_sees_one_vector_in_any_shape(name):
    make = TRANSFORMATIONS[name][0]
    x = jnp.asarray(random(2, 3, 1, 2, 4), jnp.float32)
    assert_close(steps(make(), {"w": x})["w"].ravel(), steps(make(), {"w": x.ravel()})["w"])


@over_transformations
def test_sharp_and_lmo_agree_where_the_radius_is_step_size_times_dual_norm(name):
    lmo, sharp, norm = TRANSFORMATIONS[name]
    tree, step_size = gradients(name), 0.3
    radius = {path: step_size * norm.dual_norm(leaf) for path, leaf in tree.items()}
    assert_close(steps(lmo(radius), tree), steps(sharp(step_size), tree))


@over_transformations
def test_zero_gradients_give_zero_steps(name):
    tree = jax.tree.map(jnp.zeros_like, gradients(name))
    for make in TRANSFORMATIONS[name][:2]:
        jax.tree.map(np.testing.assert_array_equal, steps(make(), tree), tree)


def test_column_norms_leave_absent_tokens_where_they_are():
    gradient = jnp.asarray(random(6, 4), jnp.float32).at[2].set(0.0)
    for make in TRANSFORMATIONS["column"][:2]:
        tx = make()
        update = np.asarray(steps(tx, {"embedding": gradient})["embedding"])
        np.testing.assert_array_equal(update.any(axis=1), [True, True, False, True, True, True])


# --- What is not computed -------------------------------------------------------------------------


def test_inactive_leaves_are_not_orthogonalized():
    tree = {"a": jnp.ones((8, 8)), "b": jnp.ones((9, 9))}
    tx = dm.newton_schulz_lmo()

    def products(mask):
        program = jax.jit(lambda t: tx.update(t, tx.init(t), layer_mask=mask)[0]).lower(tree)
        return program.compile().as_text().count(" dot(")

    both = products({"a": True, "b": True})
    assert products({"a": False, "b": True}) == both // 2 > 0
    assert products({"a": False, "b": False}) == 0
