"""The truncated backward pass: right values, and work that is counted, not timed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm

NUM_LAYERS = 4
KEYS = jax.random.split(jax.random.key(0), NUM_LAYERS + 1)
PARAMS = [jax.random.normal(key, (32, 32)) / 32**0.5 for key in KEYS[1:]]
LAYERS = dm.layers_by_path(PARAMS, [str(i) for i in range(NUM_LAYERS)])
X = jax.random.normal(KEYS[0], (8, 32))


def loss_fn(params, x, scale=1.0):
    for weight in params:
        x = jnp.tanh(x @ weight)
    return scale * jnp.mean(x**2)


ACTIVE = {
    "all": (True, True, True, True),
    "from a depth": (False, False, True, True),
    "the last": (False, False, False, True),
    "any": (True, False, True, False),
    "none": (False, False, False, False),
}


@pytest.mark.parametrize("active", ACTIVE.values(), ids=ACTIVE)
def test_active_gradients_are_those_of_jax_and_the_others_zero(active):
    mask = LAYERS.subset(active)
    value, grads = dm.masked_value_and_grad(loss_fn)(PARAMS, X, layer_mask=mask)
    expected_value, expected = jax.value_and_grad(loss_fn)(PARAMS, X)
    assert value == expected_value
    for grad, target, on in zip(grads, expected, active, strict=True):
        np.testing.assert_allclose(grad, target * on, rtol=1e-5, atol=1e-8)


def test_arguments_auxiliary_data_and_mixed_dtypes_pass_as_in_jax():
    params = {"a": jnp.ones((3, 3), jnp.bfloat16), "b": jnp.ones((3, 2), jnp.float32)}
    layers = dm.layers_by_path(params, ["a", "b"])

    def with_aux(params, x, scale):
        return scale * jnp.sum(x @ params["a"].astype(jnp.float32) @ params["b"]), {"x": x}

    x = jnp.arange(3.0)
    expected = jax.value_and_grad(with_aux, has_aux=True)(params, x, scale=3.0)
    for depth in (0, 1):
        result = dm.masked_value_and_grad(with_aux, has_aux=True)(
            params, x, scale=3.0, layer_mask=layers.mask(depth)
        )
        chex.assert_trees_all_equal(result[0], expected[0])
        chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)


def test_a_gradient_of_the_masked_gradient_can_be_taken():
    params = {"a": jnp.array(2.0), "b": jnp.array(3.0)}
    mask = dm.layers_by_path(params, ["a", "b"]).mask(1)

    def outer(x):
        gradient = dm.masked_value_and_grad(lambda p, x: p["a"] * p["b"] ** 2 * x)
        return gradient(params, x, layer_mask=mask)[1]["b"]

    assert float(jax.grad(outer)(1.0)) == 12.0


@pytest.mark.parametrize("depth", range(NUM_LAYERS))
def test_flops_and_memory_are_those_of_a_network_with_constants_below(depth):
    mask = LAYERS.mask(depth)

    def masked(params, x):
        value, grads = dm.masked_value_and_grad(loss_fn)(params, x, layer_mask=mask)
        return value, [grad for grad, on in zip(grads, mask, strict=True) if on]

    def by_hand(params, x):
        frozen, trained = params[:depth], params[depth:]
        return jax.value_and_grad(lambda trained: loss_fn(frozen + trained, x))(trained)

    compiled = [jax.jit(function).lower(PARAMS, X).compile() for function in (masked, by_hand)]
    costs = [
        (of.cost_analysis()["flops"], of.memory_analysis().temp_size_in_bytes) for of in compiled
    ]
    assert costs[0] == costs[1]


def test_a_run_on_the_device_repeats_the_run_from_the_host():
    """With a branch for each subset that can be drawn."""
    sampler = dm.DepthSampler(LAYERS, dm.sampling.fixed_size_subsets(3), seed=4)
    tx, seen = dm.drop_muon(0.02, LAYERS, roles={"*": "hidden"}), []

    def step(params, state, layer_mask):
        seen.append(tuple(layer_mask))
        loss, grads = dm.masked_value_and_grad(loss_fn)(params, X, layer_mask=layer_mask)
        updates, state = tx.update(grads, state, params, layer_mask=layer_mask)
        return (optax.apply_updates(params, updates), state), loss

    switched = dm.switch_depth(step, sampler)

    @jax.jit
    def run(params, state):
        def body(carry, count):
            return switched(sampler.sample(count), *carry)

        return jax.lax.scan(body, (params, state), jnp.arange(8))

    (params, _), losses = run(PARAMS, tx.init(PARAMS))
    assert set(seen) == {tuple(row.tolist()) for row in sampler.subsets}
    on_host = jax.jit(lambda active, *carry: step(*carry, LAYERS.subset(active)), static_argnums=0)
    carry, expected = (PARAMS, tx.init(PARAMS)), []
    for count in range(8):
        carry, loss = on_host(sampler.active(count), *carry)
        expected.append(loss)
    np.testing.assert_allclose(losses, jnp.stack(expected), rtol=1e-5)
    chex.assert_trees_all_close(params, carry[0], rtol=1e-5, atol=1e-6)
