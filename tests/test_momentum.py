"""The moving average: its equation, Nesterov's form, and where it is rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropmuon_jax as dm

pytestmark = pytest.mark.usefixtures("strict_promotion")


def gradients(count, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [{"w": jnp.asarray(rng.normal(size=(3, 5)), dtype)} for _ in range(count)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_update_is_the_average_of_the_past(nesterov):
    decay, history = 0.7, gradients(6)
    tx = dm.momentum(decay, nesterov=nesterov)
    state = tx.init(history[0])
    average = np.zeros((3, 5))
    for grads in history:
        updates, state = tx.update(grads, state)
        g = np.asarray(grads["w"], np.float64)
        average = decay * average + (1 - decay) * g
        expected = decay * average + (1 - decay) * g if nesterov else average
        np.testing.assert_allclose(updates["w"], expected, atol=1e-6)
        np.testing.assert_allclose(state.momentum["w"], average, atol=1e-6)


def test_no_decay_is_the_gradient_itself():
    grads = gradients(1)[0]
    tx = dm.momentum(0.0)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["w"], grads["w"])


def test_an_inactive_leaf_keeps_its_average_and_goes_on_with_it():
    first, _, third = gradients(3)
    tx = dm.momentum(0.5)
    _, state = tx.update(first, tx.init(first))
    updates, frozen = tx.update(first, state, layer_mask={"w": False})
    np.testing.assert_array_equal(updates["w"], jnp.zeros((3, 5)))
    np.testing.assert_array_equal(frozen.momentum["w"], state.momentum["w"])
    updates, _ = tx.update(third, frozen, layer_mask={"w": True})
    np.testing.assert_allclose(updates["w"], 0.25 * first["w"] + 0.5 * third["w"], atol=1e-6)


def test_the_momentum_has_its_own_dtype_and_the_update_the_gradients():
    grads = gradients(1)[0]
    tx = dm.momentum(0.9, dtype=jnp.bfloat16)
    state = tx.init(grads)
    updates, new_state = tx.update(grads, state)
    assert state.momentum["w"].dtype == new_state.momentum["w"].dtype == jnp.bfloat16
    assert updates["w"].dtype == jnp.float32


def test_a_half_precision_average_is_rounded_once_a_step():
    # Taken in bfloat16, 0.9 M + 0.1 G would lose up to three roundings a step.
    tx = dm.momentum(0.9, dtype=jnp.bfloat16)
    grads = {"w": jnp.full((1, 1), 1.0, jnp.bfloat16)}
    state = tx.init(grads)
    for _ in range(3):
        previous = np.float32(state.momentum["w"][0, 0])
        _, state = tx.update(grads, state)
        exact = np.float32(0.9) * previous + np.float32(1 - 0.9)
        assert state.momentum["w"][0, 0] == jnp.asarray(exact, jnp.bfloat16)


def test_the_decay_may_be_traced():
    grads = gradients(1)[0]

    def first_update(decay):
        tx = dm.momentum(decay)
        return tx.update(grads, tx.init(grads))[0]["w"]

    expected = jnp.stack([(1 - d) * grads["w"] for d in (0.1, 0.6)])
    decays = jnp.array([0.1, 0.6])
    np.testing.assert_allclose(jax.vmap(first_update)(decays), expected, atol=1e-6)


def test_weakly_typed_parameters_get_a_momentum_of_constant_type():
    params = {"w": jnp.full((3,), 0.1)}
    assert params["w"].weak_type
    tx = dm.momentum()
    state = tx.init(params)
    _, new_state = tx.update({"w": jnp.ones(3, jnp.float32)}, state)
    assert not state.momentum["w"].weak_type
    assert not new_state.momentum["w"].weak_type
