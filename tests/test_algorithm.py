"""Trajectories against Algorithm 1 in float64, `dropmuon_jax.algorithm`; Muon as a special case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm
import reference
from dropmuon_jax.algorithm import polar_factor

# Compiling is most of the time. XLA rewrites and fuses as ever: only LLVM optimizes less.
pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("stem", "mid", "head")
LEARNING_RATE = 0.05
DECAY = 0.8


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"stem": (3, 3, 2, 5), "mid": (5, 7), "head": (7, 3)}
    return {name: jnp.asarray(rng.normal(size=shapes[name]) / 3, dtype) for name in NAMES}


def loss_fn(params, batch):
    x, y = batch
    hidden = jax.lax.conv_general_dilated(
        x, params["stem"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    hidden = jnp.tanh(jnp.mean(hidden, axis=(1, 2)))
    return jnp.mean((jnp.tanh(hidden @ params["mid"]) @ params["head"] - y) ** 2)


gradient = jax.jit(jax.grad(loss_fn))


def batches(count, dtype):
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield (
            jnp.asarray(rng.normal(size=(6, 4, 4, 2)), dtype),
            jnp.asarray(rng.normal(size=(6, 3)), dtype),
        )


def make_step(tx, layers):
    @functools.partial(jax.jit, static_argnames="active")
    def step(params, state, batch, active):
        mask = layers.subset(active)
        _, grads = dm.masked_value_and_grad(loss_fn)(params, batch, layer_mask=mask)
        updates, state = tx.update(grads, state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), state

    return step


def as_matrix(kernel):
    """A kernel (*window, in, out) as the matrix (window · in, out), in float64."""
    return np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])


def algorithm_1(params, gradients, active, decay, factor=polar_factor):
    """The layers before each step, and after the last: Muon's radius and steps along `factor`.

    `gradients` is a function of a tree like `params` and the number of the step.
    """
    before = []

    def direction(matrix):
        fan_in, fan_out = matrix.shape
        return max(1, np.sqrt(fan_out / fan_in)) * factor(matrix)

    def of_matrices(x, step):
        before.append(list(x))
        tree = {n: jnp.asarray(m).reshape(params[n].shape) for n, m in zip(NAMES, x, strict=True)}
        grads = gradients(tree, step)
        return [as_matrix(grads[name]) for name in NAMES]

    last = dm.algorithm.drop_muon(
        [as_matrix(params[name]) for name in NAMES],
        of_matrices,
        [np.flatnonzero(of_step) for of_step in active],
        radius=LEARNING_RATE,
        decay=decay,
        direction=direction,
    )
    return [*before, last]


def assert_ten_steps_equal_algorithm_1(params, tx, sampler, factor=polar_factor):
    batch = list(batches(10, jnp.float64))
    active = [sampler.active(k) for k in range(10)]
    theirs = algorithm_1(params, lambda x, k: gradient(x, batch[k]), active, DECAY, factor)
    state, step = tx.init(params), make_step(tx, sampler.layers)
    for k in range(10):
        params, state = step(params, state, batch[k], active[k])
        for name, matrix in zip(NAMES, theirs[k + 1], strict=True):
            assert np.max(np.abs(as_matrix(params[name]) - matrix)) < 1e-9


DISTRIBUTIONS = {
    "full": dm.full_depth(),
    "uniform": dm.uniform_depth(),
    "fixed": dm.fixed_depth([0.2, 0.3, 0.5]),
    "epoch_shift": dm.epoch_shift_depth(num_steps=10),
    "independent": dm.sampling.independent_layers([0.3, 0.6, 0.8]),
    "pairs": dm.sampling.fixed_size_subsets(2),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_ten_steps_with_an_exact_lmo_equal_algorithm_1(name):
    with jax.enable_x64(True):
        params = make_params(jnp.float64)
        layers = dm.layers_by_path(params, NAMES)
        sampler = dm.DepthSampler(layers, DISTRIBUTIONS[name], seed=3)
        tx = dm.drop_muon(
            LEARNING_RATE,
            layers,
            momentum=DECAY,
            orthogonalize=dm.orthogonalize.svd_polar_factor,
        )
        assert_ten_steps_equal_algorithm_1(params, tx, sampler)


@pytest.mark.parametrize("coefficients", reference.COEFFICIENTS)
def test_ten_steps_with_the_iteration_equal_its_own_polynomials(coefficients):
    steps, start = reference.published_rows(coefficients), reference.COEFFICIENTS[coefficients][1]
    with jax.enable_x64(True):
        params = make_params(jnp.float64)
        layers = dm.layers_by_path(params, NAMES)
        sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=5)
        tx = dm.drop_muon(
            LEARNING_RATE,
            layers,
            momentum=DECAY,
            orthogonalize=dm.orthogonalize.newton_schulz(coefficients),
        )
        assert_ten_steps_equal_algorithm_1(
            params, tx, sampler, lambda m: reference.polynomial_polar_factor(m, steps, start)
        )


def test_ten_float32_steps_are_each_within_the_stated_band_of_algorithm_1():
    params = make_params()
    layers = dm.layers_by_path(params, NAMES)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    tx = dm.drop_muon(LEARNING_RATE, layers)
    step, state = make_step(tx, layers), tx.init(params)
    ours, grads, active = [params], [], [sampler.active(k) for k in range(10)]
    for k, batch in enumerate(batches(10, jnp.float32)):
        grads.append(gradient(params, batch))
        params, state = step(params, state, batch, active[k])
        ours.append(params)
    # At our parameters: the band is that of a step, and steps add up.
    theirs = algorithm_1(ours[0], lambda _, k: grads[k], active, 0.9)
    num_steps = 0
    for k in range(10):
        for i, name in enumerate(NAMES):
            if not active[k][i]:
                continue
            exact_step = theirs[k + 1][i] - theirs[k][i]
            our_step = as_matrix(ours[k + 1][name]) - as_matrix(ours[k][name])
            # The band [0.84, 1.13] of singular values in [1e-3, 1], where these are.
            radius = np.linalg.norm(exact_step, 2)
            assert np.linalg.norm(our_step - exact_step, 2) / radius < 0.16 + 1e-3
            num_steps += 1
    assert num_steps > 10


def test_with_full_sampling_drop_muon_equals_muon():
    params = {**make_params(), "bias": jnp.zeros(3)}
    layers = dm.layers_by_path(params, ["stem", "mid", ("head", "bias")])
    options = {"weight_decay": 0.1, "momentum": dm.momentum(0.9, nesterov=True)}
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    sampler = dm.DepthSampler(layers, dm.full_depth(), seed=0)
    drop = dm.drop_muon(schedule, layers, **options)
    full = dm.muon(schedule, **options)
    drop_params = full_params = params
    drop_state, full_state = drop.init(params), full.init(params)
    drop_update = jax.jit(functools.partial(drop.update, layer_mask=layers.mask(0)))
    full_update = jax.jit(full.update)
    rng = np.random.default_rng(4)
    for k in range(5):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        assert sampler.depth(k) == 0
        updates, drop_state = drop_update(grads, drop_state, drop_params)
        drop_params = optax.apply_updates(drop_params, updates)
        updates, full_state = full_update(grads, full_state, full_params)
        full_params = optax.apply_updates(full_params, updates)
    for name in params:
        np.testing.assert_array_equal(drop_params[name], full_params[name])


@pytest.mark.parametrize("nesterov", [False, True])
def test_with_its_settings_our_muon_steps_like_optax_muon(nesterov):
    # optax corrects the momentum's bias before Nesterov's form, so its first steps weigh the new
    # gradient otherwise; without Nesterov only the scale differs, which the LMO does not see.
    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.normal(size=(6, 11)), jnp.float32)}
    ours = dm.muon(
        0.1,
        momentum=dm.momentum(0.9, nesterov=nesterov),
        orthogonalize=dm.orthogonalize.newton_schulz("muon"),
    )
    theirs = optax.contrib.muon(0.1, beta=0.9, nesterov=nesterov)
    our_state, their_state = ours.init(params), theirs.init(params)
    our_update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    for k in range(80 if nesterov else 10):
        grads = {"w": jnp.asarray(rng.normal(size=(6, 11)), jnp.float32)}
        our_updates, our_state = our_update(grads, our_state, params)
        their_updates, their_state = their_update(grads, their_state, params)
        if k >= 70 or not nesterov:  # 0.9^70 < 1e-3: the bias correction is over
            difference = jnp.abs(our_updates["w"] - their_updates["w"])
            assert float(jnp.max(difference)) < (2e-3 if nesterov else 2e-5)
