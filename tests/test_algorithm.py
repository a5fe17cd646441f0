"""Trajectories against Algorithm 1 in float64, `dropmuon_jax.algorithm`, and Optax's Muon."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm
import reference
from dropmuon_jax.algorithm import polar_factor

SHAPES = {"stem": (4, 5), "mid": (5, 7), "head": (7, 3)}
LEARNING_RATE = 0.05


def random_tree(seed, dtype):
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=shape) / 2).astype(dtype) for name, shape in SHAPES.items()}


LAYERS = dm.layers_by_path(random_tree(0, np.float32), list(SHAPES))


def loss_fn(params, batch):
    x, y = batch
    for name in SHAPES:
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x - y) ** 2)


def algorithm_1(params, gradients, active, decay, factor):
    """The layers before each step, and after the last: Muon's radius and steps along `factor`."""
    before = []

    def direction(matrix):
        fan_in, fan_out = matrix.shape
        return max(1, np.sqrt(fan_out / fan_in)) * factor(matrix)

    def of_matrices(x, step):
        before.append(list(x))
        grads = gradients(dict(zip(SHAPES, x, strict=True)), step)
        return [np.asarray(grads[name]) for name in SHAPES]

    last = dm.algorithm.drop_muon(
        [*params.values()],
        of_matrices,
        [np.flatnonzero(of_step) for of_step in active],
        radius=LEARNING_RATE,
        decay=decay,
        direction=direction,
    )
    return [*before, last]


def polar_express(matrix):
    rows = reference.published_rows("polar_express")
    return reference.polynomial_polar_factor(matrix, rows, "schatten")


EXACT = {"orthogonalize": dm.orthogonalize.svd_polar_factor}


@pytest.mark.parametrize(
    ("distribution", "decay", "factor", "options"),
    [
        (dm.uniform_depth(), 0.8, polar_factor, EXACT | {"momentum": 0.8}),
        (dm.sampling.fixed_size_subsets(2), 0.8, polar_factor, EXACT | {"momentum": 0.8}),
        (dm.uniform_depth(), 0.9, polar_express, {}),
    ],
    ids=["exact", "arbitrary_subsets", "by_default"],
)
def test_ten_steps_equal_algorithm_1(distribution, decay, factor, options):
    with jax.enable_x64(True):
        params, rng = random_tree(0, np.float64), np.random.default_rng(1)
        batches = [(rng.normal(size=(6, 4)), rng.normal(size=(6, 3))) for _ in range(10)]
        sampler = dm.DepthSampler(LAYERS, distribution, seed=3)
        active = [sampler.active(k) for k in range(10)]
        assert len(set(active)) == 3
        gradient = jax.jit(jax.grad(loss_fn))
        theirs = algorithm_1(params, lambda x, k: gradient(x, batches[k]), active, decay, factor)
        tx = dm.drop_muon(LEARNING_RATE, LAYERS, **options)

        @functools.partial(jax.jit, static_argnames="active")
        def step(params, state, batch, active):
            mask = LAYERS.subset(active)
            _, grads = dm.masked_value_and_grad(loss_fn)(params, batch, layer_mask=mask)
            updates, state = tx.update(grads, state, params, layer_mask=mask)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for k in range(10):
            params, state = step(params, state, batches[k], active[k])
            for name, matrix in zip(SHAPES, theirs[k + 1], strict=True):
                np.testing.assert_allclose(params[name], matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("nesterov", [False, True])
def test_with_its_settings_our_muon_steps_like_optax_muon(nesterov):
    # optax corrects the momentum's bias before Nesterov's form, so its first steps weigh the new
    # gradient otherwise; without Nesterov only the scale differs, which the LMO does not see.
    rng = np.random.default_rng(2)
    params = {"w": np.float32(rng.normal(size=(6, 11)))}
    ours = dm.muon(
        0.1,
        momentum=dm.momentum(0.9, nesterov=nesterov),
        orthogonalize=dm.orthogonalize.newton_schulz("muon"),
    )
    theirs = optax.contrib.muon(0.1, beta=0.9, nesterov=nesterov)
    our_state, their_state = ours.init(params), theirs.init(params)
    our_update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    for k in range(80 if nesterov else 10):
        grads = {"w": np.float32(rng.normal(size=(6, 11)))}
        our_updates, our_state = our_update(grads, our_state, params)
        their_updates, their_state = their_update(grads, their_state, params)
        if k >= 70 or not nesterov:  # 0.9^70 < 1e-3: the bias correction is over
            difference = np.abs(our_updates["w"] - their_updates["w"])
            assert difference.max() < (2e-3 if nesterov else 2e-5)
