"""LMOs and sharp operators of trees: each step is that of its norm, matrix by matrix."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm
from dropmuon_jax.algorithm import polar_factor

pytestmark = pytest.mark.usefixtures("strict_promotion")

KERNEL = dm.orthogonalize.newton_schulz(num_steps=2)
NORMS = {
    "spectral": dm.norms.spectral_norm("moonlight", orthogonalize=KERNEL),
    "svd": dm.norms.spectral_norm("scion"),
    "nuclear": dm.norms.nuclear_norm(),
    "sign": dm.norms.sign_norm(),
    "column": dm.norms.column_norm(),
    "row": dm.norms.row_norm(),
    "rms": dm.norms.rms_norm(),
    "euclidean": dm.norms.euclidean_norm(),
}
# The LMO, the sharp operator, and the norm whose they are.
TRANSFORMATIONS: dict[str, tuple[Any, Any, dm.norms.Norm]] = {
    name: (*(functools.partial(of, norm) for of in (dm.norm_lmo, dm.transforms.norm_sharp)), norm)
    for name, norm in NORMS.items()
}
TRANSFORMATIONS["newton_schulz"] = (
    functools.partial(dm.newton_schulz_lmo, shape_factor="moonlight", num_steps=2),
    *TRANSFORMATIONS["spectral"][1:],
)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def steps(tx: Any, tree: Any) -> Any:
    return tx.update(tree, tx.init(tree))[0]


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_step_of_a_tree_is_its_norms_of_each_matrix(name):
    make_lmo, make_sharp, norm = TRANSFORMATIONS[name]
    tree = {"dense": random(6, 4), "conv": random(3, 1, 2, 4)}
    numbers = None
    if norm.of != "matrices":
        tree["bias"] = random(4)
    if norm.of != "whole leaves":
        # A batch in the middle, of very different lengths; and a table (tokens, features), the
        # transposed output layer.
        tree["stack"] = random(6, 2, 4) * jnp.array([[[1e-2], [1.0]]])
        tree["table"] = random(5, 3)
        numbers = {"stack": MuonDimensionNumbers(0, 2), "table": MuonDimensionNumbers(1, 0)}

    def of_leaf(step, key, leaf):
        if key == "stack":
            return jnp.stack([step(leaf[:, i]) for i in range(2)], axis=1)
        return step(leaf.T).T if key == "table" else step(leaf)

    @jax.jit
    def both(tree):
        ours = [
            steps(make(0.3, dimension_numbers=numbers), tree) for make in (make_lmo, make_sharp)
        ]
        of_norm = [
            {key: of_leaf(step, key, leaf) for key, leaf in tree.items()}
            for step in (lambda x: -norm.argmin(x, 0.3), lambda x: 0.3 * norm.sharp(x))
        ]
        return ours, of_norm

    ours, of_norm = both(tree)
    # Measured: at most 3e-7 of the largest entry.
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * np.abs(e).max()),
        ours,
        of_norm,
    )


# The shape of a leaf, its dimension numbers, the order of axes and the shape in which it is a stack
# of matrices (fan-in, fan-out), and Scion's shape factor of these.
AXES: dict[str, Any] = {
    "image": ((3, 2, 4, 5), "in_out", (0, 1, 2, 3), (1, 24, 5), (5 / 4) ** 0.5 / 6),
    "equinox": ((5, 4, 3, 2), "out_in", (2, 3, 1, 0), (1, 24, 5), (5 / 4) ** 0.5 / 6),
    "sound": ((3, 2, 5), "in_out", (0, 1, 2), (1, 6, 5), (5 / 2) ** 0.5 / 3),
    "video": ((2, 1, 3, 2, 5), "in_out", (0, 1, 2, 3, 4), (1, 12, 5), (5 / 2) ** 0.5 / 6),
    "batch": ((3, 2, 5), MuonDimensionNumbers(1, 2), (0, 1, 2), (3, 2, 5), (5 / 2) ** 0.5),
    "heads": ((6, 3, 4), MuonDimensionNumbers(0, (1, 2)), (0, 1, 2), (1, 6, 12), 2**0.5),
    "head_by_head": ((6, 3, 4), MuonDimensionNumbers(0, 2), (1, 0, 2), (3, 6, 4), (2 / 3) ** 0.5),
    "out": ((3, 4, 6), MuonDimensionNumbers(-1, (0, 1)), (2, 0, 1), (1, 6, 12), 2**0.5),
    "dense": ((4, 6), None, (0, 1), (1, 4, 6), (6 / 4) ** 0.5),
}


def test_dimension_numbers_say_by_path_what_the_matrices_of_a_leaf_are():
    tree = {name: random(*shape) for name, (shape, *_) in AXES.items()}
    numbers = {name: numbers for name, (_, numbers, *_) in AXES.items() if numbers}
    tx = dm.norm_lmo(dm.norms.spectral_norm("scion"), dimension_numbers=numbers)
    updates = jax.jit(functools.partial(steps, tx))(tree)
    for name, (_, _, order, stack, factor) in AXES.items():
        moved = np.asarray(tree[name], float).transpose(order)
        polar = np.stack([polar_factor(matrix) for matrix in moved.reshape(stack)])
        expected = factor * polar.reshape(moved.shape).transpose(np.argsort(order))
        np.testing.assert_allclose(updates[name], expected, atol=1e-5, err_msg=name)


def test_inactive_leaves_are_not_orthogonalized():
    tree = {"a": jnp.ones((8, 8)), "b": jnp.ones((9, 9))}
    tx = dm.newton_schulz_lmo()

    def products(mask):
        program = jax.jit(lambda t: tx.update(t, tx.init(t), layer_mask=mask)[0]).trace(tree)
        return program.lower(lowering_platforms=("cpu",)).as_text().count("dot_general")

    both = products({"a": True, "b": True})
    assert products({"a": False, "b": True}) == both // 2 > 0
    assert products({"a": False, "b": False}) == 0


def test_a_kernel_of_ones_own_sees_each_shape_once_and_wide_and_keeps_the_dtype():
    seen = []

    def double(x):
        seen.append(x.shape)
        return 2 * x

    tree = {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 3)), "c": jnp.ones((2, 2), jnp.bfloat16)}
    tx = dm.norm_lmo(dm.norms.spectral_norm(orthogonalize=double), radius=3.0)
    updates = steps(tx, tree)
    assert sorted(seen) == [(1, 2, 2), (2, 3, 5)]
    for name, leaf in tree.items():
        assert updates[name].dtype == leaf.dtype
        np.testing.assert_array_equal(updates[name], 6 * leaf)
    changing = dm.norms.spectral_norm(orthogonalize=lambda x: x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="shape and dtype must stay"):
        steps(dm.norm_lmo(changing), tree)
