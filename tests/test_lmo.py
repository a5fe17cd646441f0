"""`newton_schulz_lmo`: axes, shape factors, radius, and the LMO's defining equation."""

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


def test_a_convolution_is_the_matrix_of_its_patches():
    x = random(3, 2, 4, 5)
    expected = reference.polar_factor(x.reshape(-1, 5)).reshape(x.shape)
    np.testing.assert_allclose(direction(x), expected, atol=1e-4)


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


# The papers' own formulas, for a PyTorch weight of shape (out, in).
PAPERS = {
    "spectral": lambda out, fan_in: 1.0,
    "muon": lambda out, fan_in: max(1, out / fan_in) ** 0.5,
    "moonlight": lambda out, fan_in: 0.2 * max(out, fan_in) ** 0.5,
    "rms_to_rms": lambda out, fan_in: (out / fan_in) ** 0.5,
}


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (3, 3, 2, 5)])
@pytest.mark.parametrize("name", PAPERS)
def test_shape_factors_are_the_papers_in_the_layout_of_flax(name, shape):
    x = random(*shape)
    fan_in, out = x.reshape(-1, shape[-1]).shape
    ratio = direction(x, shape_factor=name) / direction(x)
    np.testing.assert_allclose(ratio, PAPERS[name](out, fan_in), rtol=1e-4)


def test_inactive_leaves_are_not_orthogonalized():
    tree = {"a": jnp.ones((8, 8)), "b": jnp.ones((9, 9))}
    tx = dm.newton_schulz_lmo()

    def products(mask):
        program = jax.jit(lambda t: tx.update(t, tx.init(t), layer_mask=mask)[0]).lower(tree)
        return program.compile().as_text().count(" dot(")

    both = products({"a": True, "b": True})
    assert products({"a": False, "b": True}) == both // 2 > 0
    assert products({"a": False, "b": False}) == 0
