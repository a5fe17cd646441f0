"""The mathematics of benchmarks/orthogonalize.py: what is compared, counted and computed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_products import product_flops
from orthogonalization.measuring import ill_conditioned, measure_errors
from orthogonalization.methods import DEFAULT, REFERENCE, optimizer, orthogonalizer
from orthogonalization.show import timing
from orthogonalization.subjects import NETWORKS, make_arrays, needed_flops, tree_of


def flops(function, *shapes):
    return product_flops(jax.jit(function).trace(*make_arrays(list(shapes), "float32")))


def muons_polynomial(x):
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


@pytest.mark.parametrize(("name", "published"), [("gpt2", 124_439_808), ("resnet18", 11_176_512)])
def test_networks_have_the_published_numbers_of_weights(name, published):
    shapes = [shape for layer in tree_of(name).values() for shape in layer.values()]
    assert sum(map(math.prod, shapes)) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("method", [REFERENCE, DEFAULT])
def test_an_optimizer_orthogonalizes_kernels_and_gives_everything_else_to_adam(method):
    gradients, tx = make_arrays(tree_of("4x9"), "float32")["Dense_0"], optimizer(method)
    updates, _ = tx.update(gradients, tx.init(gradients), gradients)
    values = np.linalg.svd(updates["kernel"] / (1e-3 * math.sqrt(9 / 4)), compute_uv=False)
    assert 0.6 < values.min() <= values.max() < 1.3
    for name in ("bias", "scale"):
        sizes = updates[name] / -np.sign(gradients[name])
        np.testing.assert_allclose(sizes, sizes.max(), rtol=1e-3)


@pytest.mark.parametrize("network", ["resnet18", "cnn_mnist"])
def test_every_matrix_of_a_network_is_taken(network):
    """The first convolutions too, whose shapes alone do not say what they are."""
    shapes = list(dict.fromkeys(NETWORKS[network]))
    leaves = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    of_results = jax.eval_shape(orthogonalizer(DEFAULT, shapes), leaves)
    assert [leaf.shape for leaf in of_results] == shapes


def test_the_reference_is_the_polynomial_of_optaxs_muon_and_nothing_else():
    function, kernel = orthogonalizer(REFERENCE, [(2, 4, 5)]), make_arrays((2, 4, 5), "float32")
    expected = muons_polynomial(np.reshape(kernel, (8, 5)) / np.linalg.norm(kernel))
    np.testing.assert_allclose(function([kernel])[0].reshape(8, 5), expected, atol=1e-5)
    assert flops(lambda x: function([x]), (2, 4, 5)) == {"float32": 5 * (4 * 5 * 5 * 8 + 2 * 5**3)}


@pytest.mark.parametrize("shape", [(48, 480), (480, 48)])
def test_needed_are_the_products_of_the_default_with_symmetric_ones_in_half(shape):
    (count,) = flops(lambda x: orthogonalizer(DEFAULT, [shape])([x]), shape).values()
    last = 2 * 48 * 48 * 480  # the only one that is not symmetric
    assert needed_flops([shape, shape], 5) == 2 * ((count - last) / 2 + last)


def test_products_are_counted_in_a_loop_as_often_as_it_runs_if_that_is_known():
    looped = flops(lambda x: jax.lax.fori_loop(0, 7, lambda _, y: y @ x, x), (4, 4))
    assert looped == {"float32": 7 * 2 * 4**3}
    forever = flops(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ x, x), (4, 4))
    assert math.isnan(forever["float32"])
    assert math.isnan(flops(lambda x: jnp.linalg.svd(x)[0], (4, 4))["float32"])


def test_errors_are_those_on_matrices_of_the_condition_that_is_said():
    spectrum = np.geomspace(1, 1e-2, 4)
    found = np.linalg.svd(ill_conditioned(4, 9, 1e2, seed=1), compute_uv=False)
    np.testing.assert_allclose(found, spectrum, rtol=1e-9)
    (case,) = measure_errors([REFERENCE, "svd"], (4, 9), [(1e2, 1)], "float32", lambda _: None)
    gains = np.diag(muons_polynomial(np.diag(spectrum / np.linalg.norm(spectrum))))
    expected = math.sqrt(np.mean((gains - 1) ** 2))
    assert case["errors"] == pytest.approx({REFERENCE: expected, "svd": 0}, abs=1e-3)


def test_speed_ups_are_medians_of_ratios_within_pairs():
    pairs = [{DEFAULT: pair} for pair in ([8.0, 2.0], [9.0, 9.0], [4.0, 2.0])]
    program = {"product_flops": {"float32": 6.0}, "needed_flops": 3.0}
    rounds = [{"rates": {"float32": 4.0}, "pairs": pair} for pair in pairs]
    found = timing({"programs": {DEFAULT: program}, "rounds": rounds}, DEFAULT)
    assert found == ((1.5, 2.0, 3.0), 1.5 / 2, 8 / 0.75)
