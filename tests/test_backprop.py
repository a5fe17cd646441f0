"""The truncated backward pass: right values, and work that is counted, not timed."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUM_LAYERS = 6


def make_params(width=32):
    keys = jax.random.split(jax.random.key(0), NUM_LAYERS)
    return [jax.random.normal(key, (width, width)) / width**0.5 for key in keys]


def loss_fn(params, x, scale=1.0):
    for weight in params:
        x = jnp.tanh(x @ weight)
    return scale * jnp.mean(x**2)


def make_layers(params):
    return dm.layers_by_path(params, [str(i) for i in range(NUM_LAYERS)])


X = jax.random.normal(jax.random.key(1), (8, 32))


@pytest.mark.parametrize("depth", range(NUM_LAYERS))
def test_active_gradients_are_those_of_jax_and_the_others_zero(depth):
    params = make_params()
    value, grads = dm.masked_value_and_grad(loss_fn)(
        params, X, layer_mask=make_layers(params).mask(depth)
    )
    expected_value, expected = jax.value_and_grad(loss_fn)(params, X)
    assert value == expected_value
    for layer in range(NUM_LAYERS):
        target = expected[layer] if layer >= depth else jnp.zeros_like(expected[layer])
        np.testing.assert_allclose(grads[layer], target, rtol=1e-5, atol=1e-8)


def test_any_subset_of_layers_can_be_differentiated():
    params = make_params()
    active = [False, True, False, False, True, False]
    _, grads = dm.masked_value_and_grad(loss_fn)(
        params, X, layer_mask=make_layers(params).subset(active)
    )
    expected = jax.grad(loss_fn)(params, X)
    for layer, on in enumerate(active):
        np.testing.assert_allclose(grads[layer], expected[layer] * on, rtol=1e-5, atol=1e-8)


def test_nothing_active_gives_the_value_and_zeros():
    params = make_params()
    mask = make_layers(params).subset([False] * NUM_LAYERS)
    value, grads = dm.masked_value_and_grad(loss_fn)(params, X, layer_mask=mask)
    assert value == loss_fn(params, X)
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, params))


def test_arguments_and_auxiliary_data_pass_as_in_jax():
    params = make_params()
    mask = make_layers(params).mask(2)

    def with_aux(params, x, scale):
        return loss_fn(params, x, scale), {"mean": jnp.mean(x)}

    got = dm.masked_value_and_grad(with_aux, has_aux=True)(params, X, scale=3.0, layer_mask=mask)
    (value, aux), _ = got
    (expected, expected_aux), _ = jax.value_and_grad(with_aux, has_aux=True)(params, X, 3.0)
    assert value == expected
    chex.assert_trees_all_equal(aux, expected_aux)


def test_gradients_keep_the_dtypes_of_mixed_parameters():
    params = {"a": jnp.ones((3, 3), jnp.bfloat16), "b": jnp.ones((3, 2), jnp.float32)}
    layers = dm.layers_by_path(params, ["a", "b"])

    def mixed(params):
        return jnp.sum(params["a"].astype(jnp.float32) @ params["b"])

    for depth in (0, 1):
        _, grads = dm.masked_value_and_grad(mixed)(params, layer_mask=layers.mask(depth))
        chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)


def count_dots(function, *args):
    """Matrix products in the optimized program, which has no dead code."""
    hlo = jax.jit(function).lower(*args).compile().as_text()
    return hlo.count(" dot(")


@pytest.mark.parametrize("depth", range(NUM_LAYERS))
def test_matrix_products_below_the_depth_are_never_computed(depth):
    params = make_params()
    mask = make_layers(params).mask(depth)

    def step(params, x):
        return dm.masked_value_and_grad(loss_fn)(params, x, layer_mask=mask)

    active = NUM_LAYERS - depth
    # One product a layer forward; backward two for each active one, but for the lowest, whose
    # input needs no gradient.
    assert count_dots(step, params, X) == NUM_LAYERS + 2 * active - 1


def test_flops_and_memory_are_those_of_a_network_with_constants_below():
    params = make_params(width=64)
    x = jax.random.normal(jax.random.key(2), (64, 64))
    layers = make_layers(params)
    for depth in range(NUM_LAYERS):
        mask = layers.mask(depth)

        def masked(params, x, mask=mask):
            value, grads = dm.masked_value_and_grad(loss_fn)(params, x, layer_mask=mask)
            return value, [g for g, on in zip(grads, mask, strict=True) if on]

        def by_hand(params, x, depth=depth):
            frozen, trained = params[:depth], params[depth:]
            return jax.value_and_grad(lambda t: loss_fn(frozen + t, x))(trained)

        costs = []
        for function in (masked, by_hand):
            compiled = jax.jit(function).lower(params, x).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes
            costs.append((compiled.cost_analysis()["flops"], memory))
        assert costs[0] == costs[1]


def make_step(tx, layers):
    @functools.partial(jax.jit, static_argnames="depth", donate_argnames=("params", "state"))
    @chex.assert_max_traces(NUM_LAYERS)
    def step(params, state, x, depth):
        mask = layers.mask(depth)
        loss, grads = dm.masked_value_and_grad(loss_fn)(params, x, layer_mask=mask)
        updates, state = tx.update(grads, state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), state, loss

    return step


def test_there_is_one_compilation_for_each_depth_and_none_after():
    chex.clear_trace_counter()
    params = make_params()
    layers = make_layers(params)
    tx = dm.drop_muon(0.02, layers)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    step, state, drawn = make_step(tx, layers), tx.init(params), set()
    for k in range(60):
        depth = sampler.depth(k)
        drawn.add(depth)
        params, state, _ = step(params, state, X, depth=depth)
        assert step._cache_size() == len(drawn)
    assert drawn == set(range(NUM_LAYERS))


def test_a_run_on_the_device_repeats_the_run_from_the_host():
    params = make_params()
    layers = make_layers(params)
    tx = dm.drop_muon(0.02, layers)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=4)

    def step(params, state, layer_mask):
        loss, grads = dm.masked_value_and_grad(loss_fn)(params, X, layer_mask=layer_mask)
        updates, state = tx.update(grads, state, params, layer_mask=layer_mask)
        return (optax.apply_updates(params, updates), state), loss

    switched = dm.switch_depth(step, sampler)

    @jax.jit
    def run(params, state):
        def body(carry, count):
            return switched(sampler.sample(count), *carry)

        return jax.lax.scan(body, (params, state), jnp.arange(12))

    (device_params, _), device_losses = run(params, tx.init(params))
    carry, host_losses = (params, tx.init(params)), []
    on_host = jax.jit(
        lambda params, state, active: step(params, state, layers.subset(active)),
        static_argnames="active",
    )
    for k in range(12):
        carry, loss = on_host(*carry, active=sampler.active(k))
        host_losses.append(loss)
    np.testing.assert_allclose(device_losses, jnp.stack(host_losses), rtol=1e-5)
    chex.assert_trees_all_close(device_params, carry[0], rtol=1e-5, atol=1e-6)


def test_switch_depth_has_a_branch_for_each_subset():
    params = make_params()
    layers = make_layers(params)
    sampler = dm.DepthSampler(layers, dm.sampling.fixed_size_subsets(2), seed=0)
    seen = []
    switched = dm.switch_depth(lambda layer_mask: seen.append(tuple(layer_mask)) or 0.0, sampler)
    jax.make_jaxpr(switched)(jnp.int32(0))
    assert sorted(seen) == sorted(tuple(row.tolist()) for row in sampler.subsets)


def test_a_gradient_of_the_masked_gradient_can_be_taken():
    params = {"a": jnp.array(2.0), "b": jnp.array(3.0)}
    layers = dm.layers_by_path(params, ["a", "b"])

    def outer(x):
        _, grads = dm.masked_value_and_grad(lambda p, x: p["a"] * p["b"] ** 2 * x)(
            params, x, layer_mask=layers.mask(1)
        )
        return grads["b"]

    assert float(jax.grad(outer)(1.0)) == 12.0
