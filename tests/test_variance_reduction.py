"""MVR and MARS: trajectories with dropped layers, and the two gradients of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm
import reference
from dropmuon_jax.algorithm import polar_factor

NAMES, SHAPE = ("stem", "mid", "head"), (4, 6)
VARIANTS = (1, 2, 3)
# Each layer sleeps once for one step and once for more, and no two in the same steps.
ACTIVE = (
    ("mid", "head"),
    ("stem", "mid", "head"),
    ("head",),
    ("stem", "mid", "head"),
    ("mid", "head"),
    ("stem",),
    ("stem",),
    ("head",),
    ("mid",),
    ("stem", "mid", "head"),
)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: scale * rng.normal(size=SHAPE) for name in NAMES}


def noisy_gradient(k, params):
    """Of batch k at any parameters: not linear, and every layer's depends on the others."""
    shift, slope = random_tree(100 + k), random_tree(200 + k)
    total = sum(x.sum() for x in params.values())
    return {
        name: params[name] + slope[name] * np.sin(params[name] + 0.1 * total) + shift[name]
        for name in NAMES
    }


def decay_at(k):
    return 1 - 0.9 / (1 + k)


def q_at(k):
    return 0.8 / (1 + 0.5 * k)


def mask_of(active):
    return {name: name in active for name in NAMES}


def assert_close(actual, expected, atol=1e-10):
    for name in NAMES:
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=atol, err_msg=name)


# --- Trajectories ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_reactivate", "start"),
    [("correct", "gradient"), ("decay", "gradient"), ("restart", "gradient"), ("decay", "zero")],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_with_dropped_layers_equal_the_formulas(variant, on_reactivate, start, x64):
    params, q = random_tree(0), {} if variant == 1 else {"q": q_at}
    rules = {"on_reactivate": on_reactivate, "start": start}
    momentum = dm.mvr_momentum(decay_at, variant=variant, **q, **rules)
    tx = optax.chain(momentum, optax.scale(-0.05))
    theirs = reference.DropMVR(params, variant, **rules)
    state = tx.init(params)
    for k, active in enumerate(ACTIVE):
        gradient, mask = functools.partial(noisy_gradient, k), mask_of(active)
        # Of each leaf before its own last step.
        kept = dm.prev_params(state, params)
        assert_close(kept, theirs.before)
        point = {name: kept[name] if mask[name] else params[name] for name in NAMES}
        theirs.step(k, active, gradient, lr=0.05, decay=decay_at(k), q=q_at(k))
        updates, state = tx.update(
            gradient(params), state, params, layer_mask=mask, prev_params_grads=gradient(point)
        )
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
        assert_close(params, theirs.params)


def test_mars_takes_the_last_gradient_of_each_layers_own_step_and_clips_long_ones(x64):
    params, last = random_tree(0), {}
    tx = dm.transforms.mars_momentum(0.95, gamma=0.3)
    state, m = tx.init(params), dict.fromkeys(NAMES, np.zeros(SHAPE))
    for k, active in enumerate(ACTIVE):
        # Short and long ones: some are clipped.
        scale = 0.05 * (1 + k % 4)
        grads = {name: scale * g for name, g in noisy_gradient(k, params).items()}
        updates, state = tx.update(grads, state, layer_mask=mask_of(active))
        for name in active:
            g_last = last.get(name, grads[name])
            m[name] = reference.mars_average(grads[name], g_last, m[name], decay=0.95, gamma=0.3)
            last[name] = grads[name]
        assert_close(updates, {name: (name in active) * m[name] for name in NAMES}, atol=1e-12)


def test_mars_limits_the_norm_of_gradients_of_any_size():
    tx = dm.transforms.mars_momentum(0.5, gamma=0.0, max_norm=2.0)
    for scale in (1e-30, 1e-3, 1.0, 1e30, 3e38):
        grads = {"w": np.full((3, 3), scale, np.float32)}
        updates, _ = tx.update(grads, tx.init(grads))
        length = np.linalg.norm(np.asarray(updates["w"], np.float64))
        assert length == pytest.approx(0.5 * min(2.0, 3 * scale), rel=1e-5)
    unlimited = dm.transforms.mars_momentum(0.5, gamma=0.0, max_norm=None)
    updates, _ = unlimited.update(grads, unlimited.init(grads))
    np.testing.assert_allclose(updates["w"], 0.5 * grads["w"])


def test_ten_steps_of_muon_mvr_equal_the_formulas(x64):
    """X ← (1 - β)X - η UVᵀ(M), M by MVR-1 with weight α = β on the new gradient."""
    radius, params = 7.0, random_tree(0)
    x = x_prev = params
    rate = dm.schedules.star_convex_rate()
    tx = dm.muon(
        lambda count: radius * rate(count),
        shape_factor="spectral",
        weight_decay=1 / radius,
        momentum=dm.mvr_momentum(lambda count: 1 - rate(count)),
        orthogonalize=dm.orthogonalize.svd_polar_factor,
    )
    state, update, m = tx.init(params), jax.jit(tx.update), {}
    for k in range(10):
        beta = 2 / (k + 2)
        g, g_prev = noisy_gradient(k, x), noisy_gradient(k, x_prev)
        updates, state = update(g, state, params, prev_params_grads=g_prev)
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
        m = {n: g[n] + (1 - beta) * (m[n] - g_prev[n]) if k else g[n] for n in NAMES}
        step = {n: polar_factor(m[n]) for n in NAMES}
        x_prev, x = x, {n: (1 - beta) * x[n] - beta * radius * step[n] for n in NAMES}
        assert_close(params, x, atol=1e-9)
        assert_close(dm.prev_params(state, params), x_prev, atol=1e-9)


def test_schedules_fall_as_the_theory_says():
    for k in (0, 1, 7, 999):
        weight = (k + 1) ** (-2 / 3)
        for actual, expected in (
            (dm.schedules.mvr_decay()(k), 1 - weight),
            (dm.schedules.mvr_q()(np.int32(k)), weight),
            (dm.schedules.mvr_radius(0.3)(k), 0.3 * weight),
            (dm.schedules.star_convex_rate()(k), 2 / (k + 2)),
        ):
            assert float(actual) == pytest.approx(expected, abs=1e-6)


# --- Previous parameters --------------------------------------------------------------------------


def test_previous_parameters_have_a_dtype_of_their_own_and_come_back_in_the_parameters():
    tx = dm.mvr_momentum(dtype=jnp.bfloat16, prev_params_dtype=jnp.float16)
    params = {"w": jnp.float32([1 + 2**-11])}
    _, state = tx.update(params, tx.init(params), params, prev_params_grads=params)
    assert state.momentum["w"].dtype == jnp.bfloat16
    assert state.prev_params.params["w"].dtype == jnp.float16
    kept = dm.prev_params(state, params)["w"]
    assert kept.dtype == jnp.float32
    assert float(kept[0]) in (1.0, 1 + 2**-10)


def test_parameters_and_a_fresh_state_can_be_donated_together():
    tx, params = dm.mvr_momentum(), jax.tree.map(jnp.float32, random_tree(0))

    def step(params, state):
        second = dm.prev_params(state, params)
        return tx.update(params, state, params, prev_params_grads=second)

    updates, _ = jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
    assert_close(updates, random_tree(0), atol=1e-6)


def test_muon_keeps_the_previous_parameters_of_everything_if_its_momentum_does():
    params = {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}
    with_mvr = dm.muon(0.1, momentum=dm.mvr_momentum())
    kept = dm.prev_params(with_mvr.init(params), params)
    np.testing.assert_array_equal(kept["bias"], params["bias"])
    without = dm.muon(0.1, momentum=dm.transforms.mars_momentum())
    assert len(jax.tree.leaves(without.init(params))) < len(jax.tree.leaves(with_mvr.init(params)))


# --- Two gradients --------------------------------------------------------------------------------

NUM_LAYERS, WIDTH = 4, 16


def make_network():
    rng = np.random.default_rng(0)
    params = [np.float32(rng.normal(size=(WIDTH, WIDTH)) / 4) for _ in range(NUM_LAYERS)]
    x = np.float32(rng.normal(size=(64, WIDTH)))
    return params, [np.float32(0.9) * w for w in params], x


LAYERS = dm.layers_by_path(make_network()[0], [str(i) for i in range(NUM_LAYERS)])


def loss_fn(params, x, key=None):
    for i, w in enumerate(params):
        x = jnp.tanh(x @ w)
        if key is not None:
            x = x * jax.random.bernoulli(jax.random.fold_in(key, i), 0.8, x.shape)
    return jnp.mean(x**2)


@pytest.mark.parametrize("depth", [0, 2, NUM_LAYERS])
def test_a_pair_is_the_gradients_at_both_points_with_the_same_randomness(depth):
    (params, prev_params, x), key = make_network(), jax.random.key(2)
    mask = LAYERS.subset([i >= depth for i in range(NUM_LAYERS)])
    pair = jax.jit(functools.partial(dm.masked_value_and_grad_pair(loss_fn), layer_mask=mask))
    value, (grads, prev_grads) = pair(params, prev_params, x, key=key)
    previous = params[:depth] + prev_params[depth:]
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    for point, actual in ((params, grads), (previous, prev_grads)):
        _, expected = value_and_grad(point, x, key)
        for layer, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b if layer >= depth else 0 * b, atol=1e-7)
    assert float(value) == pytest.approx(float(value_and_grad(params, x, key)[0]), rel=1e-6)
    assert float(value) != pytest.approx(float(loss_fn(params, x)), rel=1e-3)


def test_a_pair_returns_the_auxiliary_data_and_the_dtypes_of_the_parameters():
    params, prev_params, x = make_network()
    pair = dm.masked_value_and_grad_pair(
        lambda p, x: (loss_fn(p, x), {"sum": p[0].sum(), "x": x}), has_aux=True
    )
    low = [w.astype(jnp.bfloat16) for w in params]
    (value, aux), gradients = pair(low, prev_params, x.astype(jnp.bfloat16), layer_mask=None)
    assert float(aux["sum"]) == pytest.approx(float(np.float32(low[0]).sum()), rel=1e-2)
    assert aux["x"].shape == x.shape
    assert {leaf.dtype for leaf in jax.tree.leaves((value, gradients))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_a_pair_costs_two_gradients_at_most_and_its_forward_pass_below_the_depth_once(depth):
    params, prev_params, x = make_network()
    mask = {"layer_mask": LAYERS.mask(depth)}
    one = functools.partial(dm.masked_value_and_grad(loss_fn), **mask)
    two = functools.partial(dm.masked_value_and_grad_pair(loss_fn), **mask)
    one, two = (
        jax.jit(gradient).lower(*arguments).compile()
        for gradient, arguments in ((one, (params, x)), (two, (params, prev_params, x)))
    )
    assert two.cost_analysis()["flops"] <= 2.02 * one.cost_analysis()["flops"]
    active = NUM_LAYERS - depth
    # The lowest active layer's input needs no gradient; the last value at the old point is unused,
    # but its product is not.
    assert two.as_text().count(" dot(") == depth + 2 * (active + 2 * active - 1)


@pytest.mark.parametrize("active", [(True, True, True), (False, True, True), (False, False, True)])
def test_a_nan_in_an_inactive_branch_does_not_poison_the_gradient(active):
    def nan_below(params):
        """Finite, but √ at zero: its derivative is infinite, and times zero NaN."""
        stem, mid, head = (jnp.sum(params[name] ** 2) for name in NAMES)
        return head * (1.0 + jnp.sqrt(stem) + jnp.sqrt(mid))

    params = {"stem": np.zeros((2, 3)), "mid": np.zeros((3, 4)), "head": np.full((4, 2), 0.5)}
    params = jax.tree.map(np.float32, params)
    mask = dm.layers_by_path(params, NAMES).subset(active)
    value, both = dm.masked_value_and_grad_pair(nan_below)(params, params, layer_mask=mask)
    assert value == 2.0
    for grads in both:
        for on, name in zip(active[:2], NAMES, strict=False):
            assert jnp.isnan(grads[name]).all() if on else not grads[name].any()
        np.testing.assert_array_equal(grads["head"], np.ones((4, 2)))
