"""Flax's own objects: NNX optimizers, pure states, attention kernels and their labels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(3, 5, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.stem(x)))


def test_nnx_optimizer_takes_the_same_steps_as_optax():
    model = Net(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    layers = dm.layers_by_path(params, ["stem", "head"])
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=1)
    tx = dm.drop_muon(0.1, layers)
    optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(params)
    rng = np.random.default_rng(0)
    for step in range(6):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        mask = layers.mask(sampler.depth(step))
        updates, state = tx.update(grads, state, params, layer_mask=mask)
        params = optax.apply_updates(params, updates)
        optimizer.update(model, grads, layer_mask=mask)
    for ours, theirs in zip(
        jax.tree.leaves(params), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_masks_of_nnx_variables_fit_their_pure_states():
    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    layers = dm.layers_by_path(params, ["stem", "head"])
    pure = nnx.to_pure_dict(params)

    def loss_fn(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    _, grads = dm.masked_value_and_grad(loss_fn)(pure, layer_mask=layers.mask(1))
    assert jax.tree.structure(grads) == jax.tree.structure(pure)
    assert not grads["stem"]["kernel"].any()
    assert grads["head"]["kernel"].any()


class Attention(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        position = self.param("pos_embedding", nn.initializers.normal(), (4, 8))
        x = nn.Embed(11, 8)(tokens) + position
        return nn.Dense(3)(nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x)))


def test_stacked_vectors_and_tables_are_no_matrices():
    params = Attention().init(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    labels = dm.matrix_labels(params)
    matrices = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, label in jax.tree_util.tree_leaves_with_path(labels)
        if label == "matrix"
    }
    attention = "MultiHeadDotProductAttention_0"
    heads = {f"{attention}/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert matrices == heads | {"Dense_0/kernel"}


def test_attention_kernels_are_named_by_patterns():
    params = Attention().init(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    numbers = {f"{name}/kernel": MuonDimensionNumbers(0, (1, 2)) for name in ("query", "key")}
    numbers["value/kernel"] = MuonDimensionNumbers(0, 2)  # head by head
    numbers["out/kernel"] = MuonDimensionNumbers((0, 1), 2)
    kernel = dm.orthogonalize.newton_schulz(num_steps=12)
    tx = dm.muon(1.0, orthogonalize=kernel, dimension_numbers=numbers)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    attention = updates["MultiHeadDotProductAttention_0"]
    for kernel in (
        attention["query"]["kernel"].reshape(8, 8),
        attention["out"]["kernel"].reshape(8, 8),
        *jnp.moveaxis(attention["value"]["kernel"], 1, 0),
    ):
        values = np.linalg.svd(np.asarray(kernel), compute_uv=False)
        np.testing.assert_allclose(values, 1, atol=1e-4)
