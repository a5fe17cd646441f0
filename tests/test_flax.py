"""Flax's own objects: NNX optimizers, pure states and attention kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(3, 5, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)


def test_an_nnx_optimizer_takes_the_steps_of_optax_on_the_pure_state():
    model = Net(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    layers, pure = dm.layers_by_path(state, ["stem", "head"]), nnx.to_pure_dict(state)
    tx = dm.drop_muon(0.1, layers)
    optimizer, opt_state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(pure)
    for depth in (1, 0, 1):
        mask = layers.mask(depth)  # made for NNX variables; it fits pure states too
        _, grads = dm.masked_value_and_grad(optax.tree.sum)(pure, layer_mask=mask)
        updates, opt_state = tx.update(grads, opt_state, pure, layer_mask=mask)
        pure = optax.apply_updates(pure, updates)
        _, grads = dm.masked_value_and_grad(optax.tree.sum)(state, layer_mask=mask)
        optimizer.update(model, grads, layer_mask=mask)
        for ours, theirs in zip(
            jax.tree.leaves(pure), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_attention_kernels_are_named_by_patterns():
    heads = {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}
    out = {"kernel": jnp.ones((2, 4, 8)), "bias": jnp.ones(8)}
    params = {"query": heads, "value": heads, "out": out, "Dense_0": {"kernel": jnp.ones((8, 3))}}
    numbers = {
        "query/kernel": MuonDimensionNumbers(0, (1, 2)),
        "value/kernel": MuonDimensionNumbers(0, 2),  # head by head
        "out/kernel": MuonDimensionNumbers((0, 1), 2),
    }
    kernel = dm.orthogonalize.newton_schulz(num_steps=12)
    tx = dm.muon(1.0, orthogonalize=kernel, dimension_numbers=numbers)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    for matrix in (
        updates["query"]["kernel"].reshape(8, 8),
        updates["out"]["kernel"].reshape(8, 8),
        *jnp.moveaxis(updates["value"]["kernel"], 1, 0),
    ):
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        np.testing.assert_allclose(values, 1, atol=1e-4)
