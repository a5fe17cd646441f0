"""MVR and MARS: trajectories, identities, the recursion of their error, and dropped layers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm
import reference

# Compiling is most of the time. XLA rewrites and fuses as ever: only LLVM optimizes less.
pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {"stem": (4, 6), "mid": (6, 5), "head": (5, 3)}
NAMES = tuple(SHAPES)
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
    return {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}


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


def mvr(**arguments):
    """Without q for variant 1, which has none."""
    if arguments.get("variant", 1) == 1:
        arguments.pop("q", None)
    return dm.mvr_momentum(**arguments)


# --- Trajectories ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["gradient", "zero"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_equal_the_formulas(variant, start, x64):
    params = random_tree(0)
    momentum = mvr(decay=decay_at, variant=variant, q=q_at, start=start)
    tx = optax.chain(
        momentum, dm.norm_lmo(dm.norms.spectral_norm()), optax.scale_by_learning_rate(0.05)
    )
    theirs = reference.DropMVR(params, variant, on_reactivate="correct", start=start)
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(10):
        gradient = functools.partial(noisy_gradient, k)
        prev_grads = gradient(dm.prev_params(state, params))
        theirs.step(k, NAMES, gradient, lr=0.05, decay=decay_at(k), q=q_at(k))
        updates, state = update(gradient(params), state, params, prev_params_grads=prev_grads)
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
        for name in NAMES:
            np.testing.assert_allclose(params[name], theirs.params[name], rtol=0, atol=1e-10)


def test_mars_with_dropped_layers_takes_the_last_gradient_of_each_layers_own_step(x64):
    params = random_tree(0)
    tx = dm.transforms.mars_momentum(0.95, gamma=0.3)
    state = tx.init(params)
    m, last = {name: np.zeros(SHAPES[name]) for name in NAMES}, {}
    for k, active in enumerate(ACTIVE):
        grads = jax.tree.map(lambda g: 0.1 * g, noisy_gradient(k, params))
        updates, state = tx.update(grads, state, layer_mask=mask_of(active))
        for name in NAMES:
            if name not in active:
                assert not np.any(updates[name])
                continue
            g_last = last.get(name, grads[name])
            m[name] = reference.mars_average(grads[name], g_last, m[name], decay=0.95, gamma=0.3)
            last[name] = grads[name]
            np.testing.assert_allclose(updates[name], m[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("on_reactivate", "start"),
    [("correct", "gradient"), ("decay", "gradient"), ("restart", "gradient"), ("decay", "zero")],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_with_dropped_layers_equal_the_formulas(variant, on_reactivate, start, x64):
    params = random_tree(0)
    momentum = mvr(
        decay=decay_at, variant=variant, q=q_at, on_reactivate=on_reactivate, start=start
    )
    tx = optax.chain(
        momentum, dm.norm_lmo(dm.norms.spectral_norm()), optax.scale_by_learning_rate(0.05)
    )
    theirs = reference.DropMVR(params, variant, on_reactivate=on_reactivate, start=start)
    state = tx.init(params)
    for k, active in enumerate(ACTIVE):
        gradient, mask = functools.partial(noisy_gradient, k), mask_of(active)
        kept = dm.prev_params(state, params)
        point = {name: kept[name] if mask[name] else params[name] for name in NAMES}
        theirs.step(k, active, gradient, lr=0.05, decay=decay_at(k), q=q_at(k))
        updates, state = tx.update(
            gradient(params), state, params, layer_mask=mask, prev_params_grads=gradient(point)
        )
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
        for name in NAMES:
            np.testing.assert_allclose(params[name], theirs.params[name], rtol=0, atol=1e-10)


def test_the_waking_rules_differ():
    """So that the test before this one compares three rules, not one."""
    ends = set()
    for on_reactivate in ("correct", "decay", "restart"):
        theirs = reference.DropMVR(random_tree(0), 1, on_reactivate=on_reactivate, start="gradient")
        for k, active in enumerate(ACTIVE):
            gradient = functools.partial(noisy_gradient, k)
            theirs.step(k, active, gradient, lr=0.05, decay=0.8, q=0.3)
        ends.add(float(theirs.params["stem"].sum()))
    assert len(ends) == 3


def test_ten_steps_of_mars_equal_the_formulas(x64):
    params = random_tree(0)
    tx = dm.transforms.mars_momentum(0.95, gamma=0.025)
    state, update = tx.init(params), jax.jit(tx.update)
    m, last = {name: np.zeros(SHAPES[name]) for name in NAMES}, None
    for k in range(10):
        # Short and long ones: some are clipped.
        grads = jax.tree.map(lambda g, k=k: g * 0.05 * (1 + k % 4), noisy_gradient(k, params))
        last = grads if last is None else last
        m = {
            name: reference.mars_average(grads[name], last[name], m[name], decay=0.95, gamma=0.025)
            for name in NAMES
        }
        updates, state = update(grads, state)
        last = grads
        for name in NAMES:
            np.testing.assert_allclose(updates[name], m[name], rtol=0, atol=1e-12)


def test_mars_without_correction_and_limit_is_momentum():
    plain, mars = dm.momentum(0.8), dm.transforms.mars_momentum(0.8, gamma=0.0, max_norm=None)
    grads = [jax.tree.map(jnp.asarray, random_tree(seed)) for seed in range(4)]
    states = plain.init(grads[0]), mars.init(grads[0])
    for g in grads:
        expected, plain_state = plain.update(g, states[0])
        actual, mars_state = mars.update(g, states[1])
        states = plain_state, mars_state
        for name in NAMES:
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-6)


def test_mars_limits_the_norm_of_gradients_of_any_size():
    tx = dm.transforms.mars_momentum(0.5, gamma=0.0, max_norm=2.0)
    for scale in (1e-30, 1e-3, 1.0, 1e30, 3e38):
        grads = {"w": jnp.full((3, 3), scale, jnp.float32)}
        updates, _ = tx.update(grads, tx.init(grads))
        length = np.linalg.norm(np.asarray(updates["w"], np.float64))
        assert length == pytest.approx(0.5 * min(2.0, 3 * scale), rel=1e-5)


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
    )
    state, update, m = tx.init(params), jax.jit(tx.update), {}
    rows = reference.published_rows("polar_express")
    for k in range(10):
        beta = 2 / (k + 2)
        g, g_prev = noisy_gradient(k, x), noisy_gradient(k, x_prev)
        updates, state = update(g, state, params, prev_params_grads=g_prev)
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
        m = {n: g[n] + (1 - beta) * (m[n] - g_prev[n]) if k else g[n] for n in NAMES}
        polar = {n: reference.polynomial_polar_factor(m[n], rows, "schatten") for n in NAMES}
        x_prev, x = x, {n: (1 - beta) * x[n] - beta * radius * polar[n] for n in NAMES}
        kept = dm.prev_params(state, params)
        for name in NAMES:
            np.testing.assert_allclose(params[name], x[name], rtol=0, atol=1e-9)
            np.testing.assert_allclose(kept[name], x_prev[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gluon_mvr_has_the_schedules_of_the_theory(variant, x64):
    params = random_tree(0)
    radii = {"hidden": 2.0, "head": 3.0}
    q = None if variant == 1 else dm.schedules.mvr_q()
    decay = dm.schedules.mvr_decay() if variant == 1 else 0.9
    momentum = dm.mvr_momentum(decay, variant=variant, q=q)
    tx = dm.gluon(dm.schedules.mvr_radius(0.1), radii, momentum=momentum)
    state, update = tx.init(params), jax.jit(tx.update)
    averages = {name: None for name in NAMES}
    previous = params
    for k in range(6):
        g, g_prev = noisy_gradient(k, params), noisy_gradient(k, previous)
        weight = (k + 1) ** (-2 / 3)
        decay = 1 - weight if variant == 1 else 0.9
        for name in NAMES:
            averages[name] = (
                (g[name], g[name])
                if k == 0
                else reference.mvr_average(
                    variant, g[name], g_prev[name], *averages[name], decay=decay, q=weight
                )
            )
        updates, state = update(
            g, state, params, prev_params_grads=noisy_gradient(k, dm.prev_params(state, params))
        )
        expected = -0.1 * weight * 3.0 * np.sign(averages["head"][0]) / SHAPES["head"][0]
        np.testing.assert_allclose(updates["head"], expected, rtol=1e-10)
        for name in ("stem", "mid"):  # within the band of five steps of the iteration
            factor = (SHAPES[name][1] / SHAPES[name][0]) ** 0.5
            expected = -0.1 * weight * 2.0 * factor * reference.polar_factor(averages[name][0])
            distance = np.linalg.norm(updates[name] - expected, 2)
            assert distance < 0.14 * np.linalg.norm(expected, 2)
        previous = params
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))


# --- Identities -----------------------------------------------------------------------------------


def run(tx, num_steps=8):
    """The momenta of some steps along one path, and the differences of gradients of each batch."""
    points = [random_tree(k, 0.3) for k in range(num_steps)]
    state, momenta, differences = tx.init(points[0]), [], []
    for k, point in enumerate(points):
        g, g_prev = noisy_gradient(k, point), noisy_gradient(k, points[max(k - 1, 0)])
        updates, state = tx.update(g, state, point, prev_params_grads=g_prev)
        momenta.append(jax.tree.map(np.asarray, updates))
        differences.append({name: g[name] - g_prev[name] for name in NAMES})
    return momenta, differences


def assert_same_runs(first, second):
    for a, b in zip(run(first)[0], run(second)[0], strict=True):
        for name in NAMES:
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.98])
def test_variant_3_with_q_1_is_variant_1(decay, x64):
    assert_same_runs(dm.mvr_momentum(decay, variant=3, q=1.0), dm.mvr_momentum(decay))


@pytest.mark.parametrize("variant", [2, 3])
@pytest.mark.parametrize("q", [0.1, 0.5, 1.0])
def test_without_decay_variants_2_and_3_are_variant_1_of_decay_1_minus_q(variant, q, x64):
    assert_same_runs(dm.mvr_momentum(0.0, variant=variant, q=q), dm.mvr_momentum(1 - q))


def test_variant_2_is_variant_3_without_its_correction(x64):
    decay = 0.8
    second, differences = run(dm.mvr_momentum(decay, variant=2, q=0.3))
    third, _ = run(dm.mvr_momentum(decay, variant=3, q=0.3))
    # M³ - M² obeys D ← decay · (D + g - g'), from 0.
    for name in NAMES:
        gap = np.zeros(SHAPES[name])
        for k in range(1, len(second)):
            gap = decay * (gap + differences[k][name])
            np.testing.assert_allclose(third[k][name] - second[k][name], gap, atol=1e-12)
            assert np.abs(gap).max() > 0.01


def test_with_the_last_steps_gradient_variant_1_is_the_raw_gradient(x64):
    """Why `prev_params_grads` must be of this batch."""
    tx = dm.mvr_momentum(0.9)
    points = [random_tree(k, 0.3) for k in range(5)]
    state, last = tx.init(points[0]), None
    for k, point in enumerate(points):
        g = noisy_gradient(k, point)
        updates, state = tx.update(g, state, point, prev_params_grads=last or g)
        last = g
        for name in NAMES:
            np.testing.assert_allclose(updates[name], g[name], atol=1e-12)


# --- The error M - ∇f -----------------------------------------------------------------------------

H = np.diag([3.0, 1.0, 0.5, 0.1]) + 0.2


def errors(tx, *, noise, num_steps=12):
    """M - ∇f of ½⟨X, HX⟩ along a path, with additive noise of the given size in the gradients."""
    rng = np.random.default_rng(0)
    points = [0.9**k * rng.normal(size=(4, 2)) for k in range(num_steps)]
    noises = [noise * rng.normal(size=(4, 2)) for _ in points]
    state, found = tx.init(points[0]), []
    for k, (x, xi) in enumerate(zip(points, noises, strict=True)):
        before = points[max(k - 1, 0)]
        updates, state = tx.update(H @ x + xi, state, x, prev_params_grads=H @ before + xi)
        found.append(np.asarray(updates) - H @ x)
    return found, points, noises


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_error_of_variant_1_shrinks_by_the_decay_and_takes_in_new_noise(noise, x64):
    """No lag: however far X moves, e ← decay · e + (1 - decay) · noise."""
    found, _, noises = errors(dm.mvr_momentum(0.7, start="zero"), noise=noise)
    e = -H @ errors(dm.momentum(0.0), noise=0.0)[1][0]  # M = 0 before the first step
    for actual, xi in zip(found, noises, strict=True):
        e = 0.7 * e + 0.3 * xi
        np.testing.assert_allclose(actual, e, atol=1e-12)


@pytest.mark.parametrize("variant", [2, 3])
def test_the_errors_of_variants_2_and_3_obey_their_recursions(variant, x64):
    decay, q = 0.7, 0.2
    tx = dm.mvr_momentum(decay, variant=variant, q=q, start="zero")
    found, points, noises = errors(tx, noise=0.5)
    e = r = -H @ points[0]
    for k, (actual, xi) in enumerate(zip(found, noises, strict=True)):
        r = (1 - q) * r + q * xi
        moved = H @ (points[k] - points[max(k - 1, 0)])
        e = decay * (e if variant == 3 else e - moved) + (1 - decay) * r
        np.testing.assert_allclose(actual, e, atol=1e-12)


def test_without_noise_variants_1_and_3_are_the_gradient_and_averages_lag(x64):
    for variant in (1, 3):
        found, _, _ = errors(dm.mvr_momentum(0.9, variant=variant), noise=0.0)
        assert max(np.abs(e).max() for e in found) < 1e-12
    lag, _, _ = errors(dm.momentum(0.9), noise=0.0)
    assert np.abs(lag[-1]).max() > 0.1


# --- Previous parameters --------------------------------------------------------------------------


def test_previous_parameters_are_those_of_a_leafs_own_last_step():
    tx = optax.chain(dm.mvr_momentum(), optax.scale(-0.1))
    params = jax.tree.map(jnp.asarray, random_tree(0))
    state, before = tx.init(params), dict(params)
    for active in ACTIVE:
        kept = dm.prev_params(state, params)
        for name in NAMES:
            np.testing.assert_array_equal(kept[name], before[name])
        updates, state = tx.update(
            params, state, params, layer_mask=mask_of(active), prev_params_grads=params
        )
        before |= {name: params[name] for name in active}
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("wrap", ["apply_if_finite", "inject_hyperparams"])
def test_previous_parameters_are_found_inside_wrappers(wrap):
    wrapped = {
        "apply_if_finite": lambda: optax.apply_if_finite(dm.mvr_momentum(), 3),
        "inject_hyperparams": lambda: optax.inject_hyperparams(
            dm.mvr_momentum, static_args="variant"
        )(decay=0.9),
    }[wrap]()
    params = jax.tree.map(jnp.float32, random_tree(0))
    state = wrapped.init(params)
    updates, state = wrapped.update(params, state, params, prev_params_grads=params)
    kept = dm.prev_params(state, optax.apply_updates(params, updates))
    for name in NAMES:
        np.testing.assert_array_equal(kept[name], params[name])


def test_previous_parameters_have_a_dtype_of_their_own_and_come_back_in_the_parameters():
    tx = dm.mvr_momentum(dtype=jnp.bfloat16, prev_params_dtype=jnp.float16)
    params = {"w": jnp.float32([1 + 2**-11])}
    _, state = tx.update(params, tx.init(params), params, prev_params_grads=params)
    assert state.momentum["w"].dtype == jnp.bfloat16
    assert state.prev_params.params["w"].dtype == jnp.float16
    kept = dm.prev_params(state, params)["w"]
    assert kept.dtype == jnp.float32
    assert float(kept[0]) in (1.0, 1 + 2**-10)


def test_muon_keeps_the_previous_parameters_of_everything_if_its_momentum_does():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    with_mvr = dm.muon(0.1, momentum=dm.mvr_momentum())
    kept = dm.prev_params(with_mvr.init(params), params)
    np.testing.assert_array_equal(kept["bias"], params["bias"])
    without = dm.muon(0.1, momentum=dm.transforms.mars_momentum())
    assert len(jax.tree.leaves(without.init(params))) < len(jax.tree.leaves(with_mvr.init(params)))


# --- Two gradients --------------------------------------------------------------------------------

NUM_LAYERS, WIDTH = 4, 16


def make_network():
    keys = jax.random.split(jax.random.key(0), NUM_LAYERS)
    params = [jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5 for key in keys]
    prev_params = [0.9 * w for w in params]
    x = jax.random.normal(jax.random.key(1), (64, WIDTH))
    return params, prev_params, x, dm.layers_by_path(params, [str(i) for i in range(NUM_LAYERS)])


def loss_fn(params, x, key=None):
    for i, w in enumerate(params):
        x = jnp.tanh(x @ w)
        if key is not None:
            x = x * jax.random.bernoulli(jax.random.fold_in(key, i), 0.8, x.shape)
    return jnp.mean(x**2)


@pytest.mark.parametrize("depth", [0, 2, NUM_LAYERS - 1])
def test_a_pair_is_the_gradients_at_both_points_with_the_same_randomness(depth):
    params, prev_params, x, layers = make_network()
    mask, key = layers.mask(depth), jax.random.key(2)
    pair = jax.jit(functools.partial(dm.masked_value_and_grad_pair(loss_fn), layer_mask=mask))
    value, (grads, prev_grads) = pair(params, prev_params, x, key=key)
    previous = params[:depth] + prev_params[depth:]
    for point, actual in ((params, grads), (previous, prev_grads)):
        expected = jax.grad(loss_fn)(point, x, key)
        for layer, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b if layer >= depth else 0 * b, atol=1e-7)
    assert float(value) == pytest.approx(float(loss_fn(params, x, key)), rel=1e-6)
    assert float(value) != pytest.approx(float(loss_fn(params, x)), rel=1e-3)


def test_a_pair_returns_the_auxiliary_data_of_the_parameters():
    params, prev_params, x, _ = make_network()
    pair = dm.masked_value_and_grad_pair(
        lambda p, x: (loss_fn(p, x), {"sum": p[0].sum(), "x": x}), has_aux=True
    )
    (value, aux), (grads, _) = pair(params, prev_params, x, layer_mask=None)
    assert float(value) == pytest.approx(float(loss_fn(params, x)), rel=1e-6)
    assert float(aux["sum"]) == pytest.approx(float(params[0].sum()), rel=1e-5)
    assert aux["x"].shape == x.shape
    assert len(grads) == NUM_LAYERS


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def test_a_pair_costs_at_most_twice_the_truncated_gradient():
    params, prev_params, x, layers = make_network()
    for depth in range(NUM_LAYERS):
        mask = layers.mask(depth)
        one = compiled(
            functools.partial(dm.masked_value_and_grad(loss_fn), layer_mask=mask), params, x
        )
        two = compiled(
            functools.partial(dm.masked_value_and_grad_pair(loss_fn), layer_mask=mask),
            *(params, prev_params, x),
        )
        ratio = two.cost_analysis()["flops"] / one.cost_analysis()["flops"]
        assert ratio <= 2.02, depth


@pytest.mark.parametrize("depth", range(NUM_LAYERS))
def test_the_forward_pass_below_the_depth_is_in_the_program_once(depth):
    params, prev_params, x, layers = make_network()
    pair = functools.partial(dm.masked_value_and_grad_pair(loss_fn), layer_mask=layers.mask(depth))
    text = compiled(pair, params, prev_params, x).as_text()
    active = NUM_LAYERS - depth
    # The lowest active layer's input needs no gradient; the last value at the old point is unused,
    # but its product is not.
    assert text.count(" dot(") == depth + 2 * (active + 2 * active - 1)


def test_a_training_step_with_mvr_compiles_once_for_each_depth_and_donates_everything():
    params, _, x, layers = make_network()
    tx = dm.drop_muon(0.05, layers, momentum=dm.mvr_momentum(variant=3))
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)

    @functools.partial(jax.jit, static_argnames="depth", donate_argnums=(0, 1))
    def step(params, state, depth):
        mask = layers.mask(depth)
        loss, (grads, prev_grads) = dm.masked_value_and_grad_pair(loss_fn)(
            params, dm.prev_params(state, params), x, layer_mask=mask
        )
        updates, state = tx.update(
            grads, state, params, layer_mask=mask, prev_params_grads=prev_grads
        )
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    donated = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.size]
    for k in range(25):
        params, state, loss = step(params, state, depth=sampler.depth(k))
        losses.append(float(loss))
        if k == 0:
            assert all(leaf.is_deleted() for leaf in donated)
    assert step._cache_size() == NUM_LAYERS == len({sampler.depth(k) for k in range(25)})
    assert losses[-1] < 0.5 * losses[0]


def test_schedules_fall_as_the_theory_says():
    for k, schedule in itertools.product((0, 1, 7, 999), ("decay", "q", "radius")):
        weight = (k + 1) ** (-2 / 3)
        actual, expected = {
            "decay": (dm.schedules.mvr_decay()(k), 1 - weight),
            "q": (dm.schedules.mvr_q()(jnp.int32(k)), weight),
            "radius": (dm.schedules.mvr_radius(0.3)(k), 0.3 * weight),
        }[schedule]
        assert float(actual) == pytest.approx(expected, abs=1e-6)
    assert [float(dm.schedules.star_convex_rate()(k)) for k in (0, 2, 18)] == pytest.approx(
        [1, 0.5, 0.1]
    )


def test_an_optimizer_of_every_layer_takes_the_mask_of_every_layer():
    params = jax.tree.map(jnp.float32, random_tree(0))
    tx = dm.gluon(0.1, momentum=dm.mvr_momentum())
    state = tx.init(params)
    with_none, _ = tx.update(params, state, params, prev_params_grads=params, layer_mask=None)
    without, _ = tx.update(params, state, params, prev_params_grads=params)
    for name in NAMES:
        np.testing.assert_array_equal(with_none[name], without[name])


def test_a_pair_with_nothing_active_is_zero():
    params, prev_params, x, layers = make_network()
    mask = layers.subset([False] * NUM_LAYERS)
    pair = dm.masked_value_and_grad_pair(loss_fn)
    _, (grads, prev_grads) = pair(params, prev_params, x, layer_mask=mask)
    assert not any(leaf.any() for leaf in jax.tree.leaves((grads, prev_grads)))


def test_a_pair_has_the_dtypes_of_the_parameters():
    params, prev_params, x, _ = make_network()
    low = [w.astype(jnp.bfloat16) for w in params]
    pair = dm.masked_value_and_grad_pair(loss_fn)
    value, gradients = pair(low, prev_params, x.astype(jnp.bfloat16), layer_mask=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}
    assert value.dtype == jnp.bfloat16
