"""The moving average: its equation, Nesterov's form, and where it is rounded."""

import jax.numpy as jnp
import numpy as np
import pytest

import dropmuon_jax as dm

pytestmark = pytest.mark.usefixtures("strict_promotion")


def gradients(count, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [
        {name: rng.normal(size=(3, 5)).astype(dtype) for name in ("stem", "head")}
        for _ in range(count)
    ]


@pytest.mark.parametrize("decay", [0.7, 0.0, dm.schedules.gluon_decay()])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_the_update_is_the_average_of_the_past_and_an_inactive_leaf_goes_on_with_its_own(
    nesterov, bias_correction, decay
):
    tx = dm.momentum(decay, nesterov=nesterov, bias_correction=bias_correction)
    history = gradients(5)
    state, average = tx.init(history[0]), dict.fromkeys(history[0], np.zeros((3, 5)))
    of_zero = dict.fromkeys(history[0], 1.0)
    for step, grads in enumerate(history):
        weight = 1 - (step + 1) ** -0.5 if callable(decay) else decay  # of all steps
        mask = {"stem": step not in (1, 3), "head": True}
        updates, state = tx.update(grads, state, layer_mask=mask)
        for name, g in grads.items():
            if mask[name]:
                average[name] = weight * average[name] + (1 - weight) * g
                of_zero[name] *= weight
            m = average[name]
            if bias_correction and mask[name]:
                m = m / (1 - of_zero[name] * (weight if nesterov else 1))
                g = g / (1 - of_zero[name])
            ahead = weight * m + (1 - weight) * g if nesterov else m
            np.testing.assert_allclose(updates[name], mask[name] * ahead, atol=2e-6)
            np.testing.assert_allclose(state.momentum[name], average[name], atol=1e-6)
    assert state.count == 5


def test_a_corrected_average_of_equal_gradients_is_that_gradient_from_the_first_step_on():
    tx, (grads,) = dm.momentum(0.9, bias_correction=True), gradients(1)
    state = tx.init(grads)
    for _ in range(3):
        updates, state = tx.update(grads, state)
        np.testing.assert_allclose(updates["stem"], grads["stem"], rtol=2e-6)


def test_a_half_precision_average_is_rounded_once_a_step_and_updates_keep_their_dtype():
    # Taken in bfloat16, 0.9 M + 0.1 G would lose up to three roundings a step.
    tx = dm.momentum(0.9, dtype=jnp.bfloat16)
    grads = {"w": jnp.full((1, 1), 1.0, jnp.float32)}
    state = tx.init(grads)
    for _ in range(3):
        previous = np.float32(state.momentum["w"])
        updates, state = tx.update(grads, state)
        exact = np.float32(0.9) * previous + np.float32(1 - 0.9)
        assert state.momentum["w"] == jnp.asarray(exact, jnp.bfloat16)
        assert state.momentum["w"].dtype == jnp.bfloat16
        assert updates["w"].dtype == jnp.float32
