"""Samplers that follow the run: what they record, how they plan, what the host reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm
from dropmuon_jax._sampling import _recorded_draws
from dropmuon_jax._waiting import minimise_waiting

pytestmark = pytest.mark.usefixtures("quick_compilation")

COSTS = [1.0, 0.5, 0.1]
NAMES = ["stem", "mid", "head"]


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(4, 6), (6, 6), (6, 2)]
    kernels = (jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True))
    return {name: {"kernel": kernel} for name, kernel in zip(NAMES, kernels, strict=True)}


X = jax.random.normal(jax.random.key(1), (16, 4))
Y = jax.random.normal(jax.random.key(2), (16, 2))


def loss_fn(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["kernel"])
    return jnp.mean((x - Y) ** 2)


def make_tx(*, seed=0, steps_per_plan=4, steps_per_draw=1, rate=0.5):
    layers = dm.layers_by_path(make_params(), NAMES)
    distribution = dm.time_aware_depth(COSTS, steps_per_plan=steps_per_plan, rate=rate)
    return dm.drop_muon(0.05, layers, distribution, seed=seed, steps_per_draw=steps_per_draw)


@functools.cache
def shared_train_step():
    """Of every optimizer with four steps a plan, whatever its seed and draws."""
    tx = make_tx()

    @functools.partial(jax.jit, static_argnames="depth", donate_argnums=(0, 1))
    def train_step(params, opt_state, depth):
        mask = tx.layers.mask(depth)
        _, grads = dm.masked_value_and_grad(loss_fn)(params, X, layer_mask=mask)
        updates, opt_state = tx.update(grads, opt_state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), opt_state

    return train_step


def train(tx, num_steps, params=None, opt_state=None, first=0, *, samples=True):
    """Depths, and what is left after the steps."""
    params = jax.tree.map(jnp.array, make_params() if params is None else params)
    opt_state = tx.init(params) if opt_state is None else jax.tree.map(jnp.array, opt_state)
    train_step = shared_train_step()
    depths = []
    for step in range(first, first + num_steps):
        depths.append(tx.depth(step, opt_state))
        assert not samples or depths[-1] == tx.sample(step, opt_state)
        params, opt_state = train_step(params, opt_state, depth=depths[-1])
    return depths, params, opt_state


@pytest.mark.parametrize("steps_per_draw", [1, 2])
def test_the_host_draws_what_the_device_draws(steps_per_draw):
    tx = make_tx(steps_per_draw=steps_per_draw)
    depths, *_ = train(tx, 48)
    assert set(depths) == {0, 1, 2}
    assert shared_train_step()._cache_size() == 3
    draws = np.reshape(depths, (-1, steps_per_draw))
    assert (draws == draws[:, :1]).all()


def test_a_restart_from_any_step_repeats_the_run():
    whole, *_ = train(make_tx(), 40)
    for stop in (3, 12, 22):
        before, params, opt_state = train(make_tx(), stop)
        after, *_ = train(make_tx(), 40 - stop, params, opt_state, first=stop)
        assert before + after == whole, stop


def test_gains_are_first_order_decreases_averaged_over_active_steps():
    tx = make_tx()
    params = make_params()
    state = tx.init(params)
    expected, seen = np.zeros(3), np.zeros(3)

    @functools.partial(jax.jit, static_argnames="depth")
    def update(params, state, depth, scale=1.0):
        grads = jax.grad(loss_fn)(params, X)
        grads["mid"]["kernel"] *= scale
        return grads, *tx.update(grads, state, params, layer_mask=tx.layers.mask(depth))

    for depth in (0, 1, 2, 1):
        grads, updates, state = update(params, state, depth=depth)
        for i in range(depth, 3):
            gain = -np.sum(np.array(grads[NAMES[i]]["kernel"]) * updates[NAMES[i]]["kernel"])
            seen[i] += 1
            expected[i] += max(0.1, 1 / seen[i]) * (gain - expected[i])
        params = optax.apply_updates(params, updates)
        record = optax.tree.get(state, "gains")
        np.testing.assert_allclose(record, expected, rtol=1e-5)
    assert state.num_active_steps.tolist() == [1, 3, 4]
    # Two periods of four steps have uniform depths; the second plan is of these gains.
    np.testing.assert_allclose(state.probabilities, np.full(3, 1 / 3), rtol=1e-6)
    plan = tx.distribution.plan(jnp.asarray(expected, jnp.float32))
    np.testing.assert_allclose(state.next_probabilities, plan, rtol=1e-4)

    # A step that overflowed has shown nothing.
    *_, after = update(params, state, depth=1, scale=np.nan)
    assert after.gains[1] == state.gains[1]
    assert after.num_active_steps.tolist() == [1, 3, 5]
    assert state.count == 4


def test_plans_are_read_once_a_period_and_a_period_ahead(monkeypatch):
    begun = []

    def start_reading(opt_state):
        begun.append(int(opt_state.count))
        return start(opt_state)

    start = _recorded_draws._start_reading
    monkeypatch.setattr(_recorded_draws, "_start_reading", start_reading)
    train(make_tx(), 18)
    assert begun == [0, 4, 8, 12, 16]


def test_a_chain_around_it_keeps_the_one_record():
    inner = make_tx()
    tx = inner.attach_to(optax.chain(optax.clip_by_global_norm(1e9), inner))
    sampler = dm.layer_mask_sampler(inner.layers, inner.distribution, seed=0)
    lmo = dm.newton_schulz_lmo(shape_factor="muon")
    chain = optax.chain(dm.momentum(0.9), lmo, optax.scale_by_learning_rate(0.05), sampler)
    own = sampler.attach_to(chain)
    params = make_params()
    gains = []
    for it in (inner, tx, own):
        state = it.init(params)
        assert it.depth(0, state) == inner.sample(0, inner.init(params))
        update = jax.jit(functools.partial(it.update, layer_mask=it.layers.mask(1)))
        gains.append(optax.tree.get(update(params, state, params)[1], "gains"))
    np.testing.assert_allclose(gains[1], gains[0], rtol=1e-6)
    np.testing.assert_allclose(gains[2], gains[0], rtol=1e-6)

    with pytest.raises(ValueError, match=r"no record.*sampler\.attach_to"):
        sampler.depth(0, chain.init(params))
    twice = sampler.attach_to(optax.chain(optax.identity(), own))
    with pytest.raises(ValueError, match=r"several records.*Attach the sampler once"):
        twice.depth(0, twice.init(params))


def test_rows_of_a_stack_gain_like_layers_of_their_own():
    width, rows = 4, 3
    kernels = jax.random.normal(jax.random.key(3), (rows, width, width))
    x = jax.random.normal(jax.random.key(4), (8, width))

    def stacked_loss(params, x, depth):
        def block(carry, kernel):
            return jnp.tanh(carry @ kernel), None

        return jnp.sum(dm.scan_layers(block, x, params["blocks"], depth=depth)[0] ** 2)

    params = {"blocks": kernels}
    layers = dm.layers_by_path(params, [dm.stacked("blocks")])
    distribution = dm.time_aware_depth(COSTS, steps_per_plan=2)
    tx = dm.drop_muon(0.005, layers, distribution, seed=0)

    @jax.jit
    def run(params, state):
        def step(carry, count):
            params, state = carry
            depth = tx.sample(count, state)
            mask = layers.mask(depth)
            _, grads = dm.masked_value_and_grad(stacked_loss)(
                params, x, layers.stack_depth(depth), layer_mask=mask
            )
            updates, state = tx.update(grads, state, params, layer_mask=mask)
            return (optax.apply_updates(params, updates), state), (depth, state.gains)

        return jax.lax.scan(step, (params, state), jnp.arange(16))

    _, (depths, gains) = run(params, tx.init(params))

    def loss(params, x):
        for row in range(rows):
            x = jnp.tanh(x @ params[str(row)])
        return jnp.sum(x**2)

    separate = {str(row): kernels[row] for row in range(rows)}
    layers = dm.layers_by_path(separate, ["0", "1", "2"])
    tx = dm.drop_muon(0.005, layers, distribution, seed=0)
    state = tx.init(separate)

    @functools.partial(jax.jit, static_argnames="depth")
    def train_step(params, state, depth):
        mask = layers.mask(depth)
        _, grads = dm.masked_value_and_grad(loss)(params, x, layer_mask=mask)
        updates, state = tx.update(grads, state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), state

    for count in range(16):
        depth = tx.depth(count, state)
        assert depth == depths[count]
        separate, state = train_step(separate, state, depth=depth)
        np.testing.assert_allclose(state.gains, gains[count], rtol=5e-3)


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_nothing_beats_the_plan(rate):
    generator = np.random.default_rng(0)
    minimise = jax.jit(minimise_waiting, static_argnames="rate")
    for size in [2, 3, 5] * 5:
        weights = generator.lognormal(0, 1.5, size)
        costs, base = generator.lognormal(0, 1.5, size), generator.lognormal(-1, 1)

        def objective(included, weights=weights, costs=costs, base=base):
            cost = base + included @ costs
            return cost**rate * np.sum(weights * included**-rate, axis=-1)

        best = np.asarray(minimise(weights, costs, base, rate=rate), np.float64)
        assert best[-1] == 1
        assert (np.diff(best) >= -1e-6).all()
        steps = generator.dirichlet(np.full(size, 0.5), 4000).cumsum(axis=1)
        near = np.sort(np.clip(best + generator.normal(0, 0.03, (4000, size)), 1e-4, 1), axis=1)
        near[:, -1] = 1
        others = np.concatenate([np.maximum(steps, 1e-4), near])
        assert objective(best) <= objective(others).min() * (1 + 1e-5)


def test_plans_of_gains():
    distribution = dm.time_aware_depth(COSTS, floor=0.1)
    in_proportion = distribution.plan(jnp.array([0.5, 0.4, 0.1]))
    np.testing.assert_allclose(in_proportion, [1, 0, 0], atol=1e-6)
    useless_first = np.cumsum(distribution.plan(jnp.array([1e-9, 0.4, 0.1])))
    np.testing.assert_allclose(useless_first[0], 0.1, rtol=1e-5)
    # Only ratios count, of gains and of costs.
    gains = jnp.array([0.1, 0.4, 0.3])
    scaled = dm.time_aware_depth(7 * np.array(COSTS), floor=0.1)
    np.testing.assert_allclose(distribution.plan(gains), scaled.plan(1e-3 * gains), rtol=1e-5)
    # Noise may make a deeper step dearer.
    noisy = dm.time_aware_depth([1.0, 0.4, 0.6]).plan(gains)
    pooled = dm.time_aware_depth([1.0, 0.5, 0.5]).plan(gains)
    np.testing.assert_allclose(noisy, pooled, rtol=1e-5)
    assert dm.time_aware_depth([2.0]).plan(jnp.ones(1)) == 1
    # A step uphill, and no step at all, are distributions too.
    for strange in ([-1.0, 0.2, 0.1], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]):
        plan = distribution.plan(jnp.array(strange))
        assert (plan >= 0).all()
        np.testing.assert_allclose(plan.sum(), 1, rtol=1e-6)


def test_steps_that_a_wrapper_leaves_out_do_not_end_the_run():
    inner = make_tx()
    tx = inner.attach_to(optax.apply_if_finite(inner, max_consecutive_errors=3))
    update = jax.jit(
        lambda grads, state, depth: tx.update(grads, state, layer_mask=tx.layers.mask(depth)),
        static_argnames="depth",
    )
    params = make_params()
    state, depths = tx.init(params), []
    for step in range(20):
        depths += [tx.depth(step, state), tx.depth(step, state)]
        grads = jax.tree.map(lambda x, step=step: x * (np.nan if step == 5 else 1.0), params)
        _, state = update(grads, state, depth=depths[-1])
    assert optax.tree.get(state, "LayerGainsState").count == 19
    assert depths[::2] == depths[1::2]


def test_two_runs_on_one_sampler_are_found_out():
    tx = make_tx()
    _, first, first_state = train(tx, 20)
    other = jax.tree.map(lambda x: 3 * x[::-1], make_params())
    _, second, second_state = train(tx, 20, other, tx.init(other))
    assert not np.array_equal(first_state.probabilities, second_state.probabilities)

    def take_turns():
        nonlocal first, first_state, second, second_state
        for step in range(20, 44, 8):
            # Each begins where the other has ended, as if it were the same.
            _, second, second_state = train(tx, 8, second, second_state, step, samples=False)
            _, first, first_state = train(tx, 8, first, first_state, step, samples=False)

    with pytest.raises(ValueError, match="A sampler follows one run"):
        take_turns()


def test_two_runs_step_by_step_on_one_sampler_are_found_out():
    tx = make_tx()
    states = [tx.init(make_params()) for _ in range(2)]
    other = states[1].next_probabilities[::-1] * np.array([0.5, 1.0, 1.5], np.float32)
    states[1] = states[1]._replace(next_probabilities=other)

    def take_turns():
        for step in range(8):
            for state in states:
                tx.depth(step, state._replace(count=jnp.int32(step)))

    with pytest.raises(ValueError, match="A sampler follows one run"):
        take_turns()


def test_an_optimizer_with_injected_rates_keeps_its_record():
    params, layers = make_params(), make_tx().layers
    inject = optax.inject_hyperparams(dm.drop_muon, static_args=("seed", "layers"))
    for distribution in (dm.uniform_depth(), dm.time_aware_depth(COSTS)):
        state = inject(0.1, layers, distribution, seed=0).init(params)
        sampler = dm.drop_muon(0.1, layers, distribution, seed=0)
        assert sampler.depth(0, state) in (0, 1, 2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda tx, state: tx.depth(0), TypeError, r"sampler\.depth\(step, opt_state\)"),
        (lambda tx, state: tx.sample(0), TypeError, "follows the run"),
        (
            lambda tx, state: tx.depth(0, state._replace(count=state.count + 5)),
            ValueError,
            "taken 5 steps.*step 0.*after a restart count on",
        ),
        (lambda tx, state: tx.depth(-1, state), ValueError, "step must be at least 0"),
        (
            lambda tx, state: jax.jit(lambda state: tx.depth(0, state))(state),
            TypeError,
            r"draw with sampler\.sample",
        ),
    ],
)
def test_errors_of_draws(call, error, match):
    tx = make_tx()
    with pytest.raises(error, match=match):
        call(tx, tx.init(make_params()))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: dm.time_aware_depth([1.0, -1.0]), "must be positive"),
        (lambda: dm.time_aware_depth([]), "one number for each depth"),
        (lambda: dm.time_aware_depth([1.0], floor=2.0), r"floor must lie in \[0, 1\]"),
        (lambda: dm.time_aware_depth([1.0], rate=0.0), "rate must be positive"),
        (lambda: dm.time_aware_depth([1.0], decay=1.0), "decay must lie"),
        (lambda: dm.time_aware_depth([1.0], steps_per_plan=0), "steps_per_plan must be at least"),
        (lambda: make_tx(steps_per_plan=4, steps_per_draw=3), "must divide the distribution's"),
        (lambda: make_tx(steps_per_draw=0), "steps_per_draw must be at least 1"),
        (
            lambda: dm.layer_mask_sampler(
                dm.layers_by_path(make_params(), NAMES), dm.time_aware_depth([1.0, 0.5]), seed=0
            ),
            "depth_costs are 2, and there are 3 layers",
        ),
    ],
)
def test_errors_at_construction(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_fixed_rule_draws_once_for_several_steps():
    layers = dm.layers_by_path(make_params(), NAMES)
    sampler = dm.layer_mask_sampler(layers, dm.uniform_depth(), seed=0, steps_per_draw=4)
    single = dm.layer_mask_sampler(layers, dm.uniform_depth(), seed=0)
    depths = [sampler.depth(step) for step in range(40)]
    assert depths == [single.depth(step // 4) for step in range(40)]
    assert depths == [int(sampler.sample(step)) for step in range(40)]
    # The state is ignored by rules that do not need it, so that a loop serves all.
    assert sampler.depth(3, opt_state=None) == sampler.depth(3, sampler.init(make_params()))


def test_a_sampler_may_be_made_while_a_step_is_traced():
    params = make_params()
    chosen = jax.jit(lambda state: make_tx().sample(0, state))(make_tx().init(params))
    assert chosen == make_tx().sample(0, make_tx().init(params))
