"""Samplers that follow the run: what they record, how they plan, what the host reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm
from dropmuon_jax.sampling import PlanReader
from dropmuon_jax.sampling.adaptive import minimise_waiting
from dropmuon_jax.sampling.record import Reading

pytestmark = pytest.mark.usefixtures("quick_compilation")

COSTS = [1.0, 0.5, 0.1]
UNIFORM = dm.uniform_depth()
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


LAYERS = dm.layers_by_path(make_params(), NAMES)


def make_sampler(*, seed=0, steps_per_plan=4, steps_per_draw=1, rate=0.5):
    distribution = dm.time_aware_depth(COSTS, steps_per_plan=steps_per_plan, rate=rate)
    return dm.DepthSampler(LAYERS, distribution, seed=seed, steps_per_draw=steps_per_draw)


def make_tx(sampler=None):
    return dm.record_gains(dm.drop_muon(0.05, LAYERS), sampler or make_sampler())


@functools.cache
def shared_train_step():
    """Of every sampler with four steps a plan, whatever its seed and draws."""
    tx = make_tx()

    @functools.partial(jax.jit, static_argnames="depth", donate_argnums=(0, 1))
    def train_step(params, opt_state, depth):
        mask = LAYERS.mask(depth)
        _, grads = dm.masked_value_and_grad(loss_fn)(params, X, layer_mask=mask)
        updates, opt_state = tx.update(grads, opt_state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), opt_state

    return train_step


def train(sampler, num_steps, params=None, opt_state=None, first=0, *, reader=None):
    """Depths, and what is left after the steps, drawn by a reader and compared with the sampler."""
    params = jax.tree.map(jnp.array, make_params() if params is None else params)
    opt_state = make_tx().init(params) if opt_state is None else jax.tree.map(jnp.array, opt_state)
    train_step, is_compared = shared_train_step(), reader is None
    reader = reader or PlanReader(sampler)
    depths = []
    for step in range(first, first + num_steps):
        depths.append(reader.depth(step, opt_state))
        if is_compared:
            assert depths[-1] == sampler.depth(step, opt_state) == sampler.sample(step, opt_state)
            active = (False,) * depths[-1] + (True,) * (3 - depths[-1])
            assert reader.active(step, opt_state) == sampler.active(step, opt_state) == active
        params, opt_state = train_step(params, opt_state, depth=depths[-1])
    return depths, params, opt_state


@pytest.mark.parametrize("steps_per_draw", [1, 2])
def test_the_host_draws_what_the_device_draws(steps_per_draw):
    depths, *_ = train(make_sampler(steps_per_draw=steps_per_draw), 48)
    assert set(depths) == {0, 1, 2}
    assert shared_train_step()._cache_size() == 3
    draws = np.reshape(depths, (-1, steps_per_draw))
    assert (draws == draws[:, :1]).all()


def test_a_restart_from_any_step_repeats_the_run():
    whole, *_ = train(make_sampler(), 40)
    for stop in (3, 12, 22):
        before, params, opt_state = train(make_sampler(), stop)
        after, *_ = train(make_sampler(), 40 - stop, params, opt_state, first=stop)
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
        return grads, *tx.update(grads, state, params, layer_mask=LAYERS.mask(depth))

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
    plan = make_sampler().distribution.plan(jnp.asarray(expected, jnp.float32))
    np.testing.assert_allclose(state.next_probabilities, plan, rtol=1e-4)

    # A step that overflowed has shown nothing.
    *_, after = update(params, state, depth=1, scale=np.nan)
    assert after.gains[1] == state.gains[1]
    assert after.num_active_steps.tolist() == [1, 3, 5]
    assert state.count == 4


def test_plans_are_read_once_a_period_and_a_period_ahead(monkeypatch):
    begun = []

    def begin(opt_state):
        begun.append(int(opt_state.count))
        return original(opt_state)

    original = Reading.begin
    monkeypatch.setattr(Reading, "begin", begin)
    sampler = make_sampler()
    train(sampler, 18, reader=PlanReader(sampler))
    assert begun == [0, 4, 8, 12, 16]


def test_a_chain_around_it_keeps_the_one_record():
    sampler, inner = make_sampler(), make_tx()
    outside = optax.chain(optax.clip_by_global_norm(1e9), inner)
    link = dm.layer_mask_sampler(LAYERS, sampler.distribution, seed=0)
    assert link.draws == sampler
    lmo = dm.newton_schulz_lmo(shape_factor="muon")
    chain = optax.chain(dm.momentum(0.9), lmo, optax.scale_by_learning_rate(0.05), link)
    params = make_params()
    gains = []
    for tx in (inner, outside, dm.record_gains(chain, sampler)):
        state = tx.init(params)
        draw = sampler.sample(0, inner.init(params))
        assert sampler.depth(0, state) == link.depth(0, state) == link.sample(0, state) == draw
        assert link.active(0, state) == sampler.active(0, state)
        update = jax.jit(functools.partial(tx.update, layer_mask=LAYERS.mask(1)))
        gains.append(optax.tree.get(update(params, state, params)[1], "gains"))
    np.testing.assert_allclose(gains[1], gains[0], rtol=1e-6)
    np.testing.assert_allclose(gains[2], gains[0], rtol=1e-6)

    with pytest.raises(ValueError, match=r"no record.*dm\.record_gains\(optimizer, sampler\)"):
        sampler.depth(0, chain.init(params))
    twice = dm.record_gains(optax.chain(optax.identity(), inner), sampler)
    with pytest.raises(ValueError, match=r"several records.*call dm\.record_gains once"):
        sampler.depth(0, twice.init(params))


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
    sampler = dm.DepthSampler(layers, distribution, seed=0)
    tx = dm.record_gains(dm.drop_muon(0.005, layers), sampler)

    @jax.jit
    def run(params, state):
        def step(carry, count):
            params, state = carry
            depth = sampler.sample(count, state)
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
    sampler = dm.DepthSampler(layers, distribution, seed=0)
    tx = dm.record_gains(dm.drop_muon(0.005, layers), sampler)
    state = tx.init(separate)

    @functools.partial(jax.jit, static_argnames="depth")
    def train_step(params, state, depth):
        mask = layers.mask(depth)
        _, grads = dm.masked_value_and_grad(loss)(params, x, layer_mask=mask)
        updates, state = tx.update(grads, state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), state

    for count in range(16):
        depth = sampler.depth(count, state)
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


def updates_of(tx):
    """A jitted step with gradients that are the parameters, or not finite."""

    @functools.partial(jax.jit, static_argnames="depth")
    def update(state, depth, scale):
        grads = jax.tree.map(lambda x: x * scale, make_params())
        return tx.update(grads, state, make_params(), layer_mask=LAYERS.mask(depth))[1]

    return update


def test_the_record_counts_the_steps_that_a_wrapper_inside_leaves_out():
    sampler = make_sampler()
    inner = optax.apply_if_finite(dm.drop_muon(0.05, LAYERS), max_consecutive_errors=3)
    tx = dm.record_gains(inner, sampler)
    update, reader, state = updates_of(tx), PlanReader(sampler), tx.init(make_params())
    for step in range(20):
        depth = reader.depth(step, state)
        assert depth == sampler.depth(step, state)
        before, state = state, update(state, depth, np.nan if step in (5, 9, 10) else 1.0)
        assert state.count == step + 1
        if step in (5, 9, 10):
            np.testing.assert_array_equal(state.gains, before.gains)
            np.testing.assert_array_equal(state.num_active_steps, before.num_active_steps)
    assert state.inner_state.total_notfinite == 3
    assert state.num_active_steps[-1] == 17


def test_a_wrapper_outside_that_leaves_a_step_out_is_found_out():
    sampler = make_sampler()
    tx = optax.apply_if_finite(make_tx(sampler), max_consecutive_errors=3)
    update, state, states = updates_of(tx), tx.init(make_params()), []
    for step in range(8):
        states.append(state)
        state = update(state, 0, np.nan if step == 5 else 1.0)
    way_out = r"has taken 5 steps.*step 6.*\(optax\.apply_if_finite\) goes inside"
    with pytest.raises(ValueError, match=way_out):
        sampler.depth(6, states[6])
    reader = PlanReader(sampler)
    for step in range(8):
        reader.depth(step, states[step])
    for step in range(8, 12):  # which begins to read a state of seven steps
        reader.depth(step, state)
    with pytest.raises(ValueError, match=r"has taken 7 steps.*step 8"):
        reader.depth(12, state)


def test_micro_batches_that_a_wrapper_outside_gathers_are_found_out():
    sampler = make_sampler()
    steps = optax.MultiSteps(make_tx(sampler), every_k_schedule=3)
    tx = optax.GradientTransformationExtraArgs(steps.init, steps.update)
    update, reader, state = updates_of(tx), PlanReader(sampler), tx.init(make_params())
    for step in range(8):
        reader.depth(step, state)
        state = update(state, 0, 1.0)
    message = r"has taken 2 steps.*step 8.*optax\.MultiSteps nowhere"
    with pytest.raises(ValueError, match=message):
        sampler.depth(8, state)
    # Where a period ends, the reader sees the state with which it began, of one step.
    with pytest.raises(ValueError, match=r"has taken 1 steps.*step 4.*optax\.MultiSteps nowhere"):
        reader.depth(8, state)


def test_micro_batches_that_a_wrapper_inside_gathers_are_an_error():
    steps = optax.MultiSteps(dm.drop_muon(0.1, LAYERS), every_k_schedule=3)
    inner = optax.GradientTransformationExtraArgs(steps.init, steps.update)
    with pytest.raises(TypeError, match=r"optax\.MultiSteps: gather gradients in the step itself"):
        dm.record_gains(inner, make_sampler()).init(make_params())


def test_a_step_that_is_drawn_again_is_the_same():
    sampler, update = make_sampler(), updates_of(make_tx())
    reader, state, depths = PlanReader(sampler), make_tx().init(make_params()), []
    for step in range(20):
        draws = [reader.depth(step, state) for _ in range(1 + step % 3)]
        assert set(draws) == {sampler.depth(step, state)}
        depths.append(draws[0])
        state = update(state, depths[-1], 1.0)
    assert len(set(depths)) > 1


# --- One reader for each run; any number of runs for one sampler ----------------------------------


def test_several_runs_may_draw_from_one_sampler():
    sampler = make_sampler()
    other = jax.tree.map(lambda x: 3 * x[::-1], make_params())
    alone = [train(sampler, 24)[0], train(sampler, 24, other, make_tx().init(other))[0]]
    runs = [jax.tree.map(jnp.array, (p, make_tx().init(p))) for p in (make_params(), other)]
    depths = [[], []]
    for step in range(24):
        for i, (params, state) in enumerate(runs):
            depths[i].append(sampler.depth(step, state))
            runs[i] = shared_train_step()(params, state, depth=depths[i][-1])
    assert depths == alone
    assert alone[0] != alone[1]


def test_two_runs_on_one_reader_are_found_out():
    sampler = make_sampler()
    reader = PlanReader(sampler)
    _, first, first_state = train(sampler, 20, reader=reader)
    other = jax.tree.map(lambda x: 3 * x[::-1], make_params())
    _, second, second_state = train(sampler, 20, other, make_tx().init(other))
    assert not np.array_equal(first_state.probabilities, second_state.probabilities)

    def take_turns():
        nonlocal first, first_state, second, second_state
        for step in range(20, 44, 8):
            # Each begins where the other has ended, as if it were the same.
            _, second, second_state = train(sampler, 8, second, second_state, step, reader=reader)
            _, first, first_state = train(sampler, 8, first, first_state, step, reader=reader)

    with pytest.raises(ValueError, match="A PlanReader follows one run"):
        take_turns()


def test_two_runs_step_by_step_on_one_reader_are_found_out():
    reader = PlanReader(make_sampler())
    states = [make_tx().init(make_params()) for _ in range(2)]
    other = states[1].next_probabilities[::-1] * np.array([0.5, 1.0, 1.5], np.float32)
    states[1] = states[1]._replace(next_probabilities=other)

    def take_turns():
        for step in range(8):
            for state in states:
                reader.depth(step, state._replace(count=jnp.int32(step)))

    with pytest.raises(ValueError, match="A PlanReader follows one run"):
        take_turns()


@pytest.mark.parametrize("first", [0, 2, 4])
def test_a_reader_finds_a_stale_state_when_a_period_ends_at_latest(first):
    _, _, state = train(make_sampler(), first)
    reader, given = PlanReader(make_sampler()), []

    def draw_from_the_same_state_for_ever():
        for step in range(first, first + 100):
            reader.depth(step, state)
            given.append(step)

    with pytest.raises(ValueError, match=rf"has taken {first} steps, and was given for step"):
        draw_from_the_same_state_for_ever()
    # What is read at the beginning of a period of four steps is compared at its end.
    assert len(given) <= 2 * 4
    # … and from the sampler itself, which waits, at once.
    with pytest.raises(ValueError, match=rf"has taken {first} steps.*step {first + 1}\. Give"):
        make_sampler().depth(first + 1, state)


def test_a_reader_that_jumps_reads_at_once():
    sampler = make_sampler()
    _, params, state = train(sampler, 13)
    reader = PlanReader(sampler)
    reader.depth(0, make_tx().init(make_params()))
    assert reader.depth(13, state) == sampler.depth(13, state)
    for step in (12, 20):
        with pytest.raises(ValueError, match=f"has taken 13 steps, and was given for step {step}"):
            PlanReader(sampler).depth(step, state)
        with pytest.raises(ValueError, match=f"has taken 13 steps, and was given for step {step}"):
            reader.depth(step, state)
    # An error leaves nothing behind: the run goes on with the right state.
    assert reader.depth(13, state) == sampler.depth(13, state)
    after, *_ = train(sampler, 12, params, state, first=13, reader=reader)
    assert after == train(sampler, 12, params, state, first=13)[0]


def test_a_reader_of_a_fixed_rule_draws_as_its_sampler_does():
    sampler = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=1)
    reader = PlanReader(sampler)
    for step in (5, 0, 1, 1, 900):
        assert reader.depth(step) == reader.depth(step, "any state") == sampler.depth(step)
        assert reader.active(step) == sampler.active(step)
    pairs = dm.DepthSampler(LAYERS, dm.sampling.fixed_size_subsets(2), seed=1)
    assert PlanReader(pairs).active(3) == pairs.active(3)
    for draws in (pairs, PlanReader(pairs)):
        with pytest.raises(TypeError, match=r"not depths.*sampler\.active\(step\)"):
            draws.depth(3)


def test_an_optimizer_with_injected_rates_keeps_its_record():
    params, sampler = make_params(), make_sampler()
    inject = optax.inject_hyperparams(dm.drop_muon, static_args="layers")
    inside = dm.record_gains(inject(0.1, LAYERS), sampler)

    def make(learning_rate):
        return dm.record_gains(dm.drop_muon(learning_rate, LAYERS), sampler)

    outside = optax.inject_hyperparams(make)(learning_rate=0.1)
    for tx in (inside, outside):
        state = tx.init(params)
        assert sampler.depth(0, state) in (0, 1, 2)
        _, state = tx.update(params, state, params, layer_mask=LAYERS.mask(0))
        assert sampler.depth(1, state) in (0, 1, 2)
    uniform = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=0)
    assert uniform.depth(0, state) == uniform.depth(0)


# --- Updates --------------------------------------------------------------------------------------


def test_a_depth_may_stand_in_the_place_of_its_mask():
    params, tx = make_params(), make_tx()
    by_mask = tx.update(params, tx.init(params), params, layer_mask=LAYERS.mask(1))
    by_depth = tx.update(params, tx.init(params), params, depth=1)
    jax.tree.map(np.testing.assert_array_equal, by_depth, by_mask)
    with pytest.raises(TypeError, match="both layer_mask and depth"):
        tx.update(params, tx.init(params), params, depth=1, layer_mask=LAYERS.mask(1))


def test_what_an_optimizer_without_masks_does_is_a_gain_of_every_layer():
    params = make_params()
    tx = dm.record_gains(optax.sgd(0.5), make_sampler())
    updates, state = tx.update(params, tx.init(params), params)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -0.5 * p), updates, params)
    expected = [0.5 * float(jnp.sum(params[name]["kernel"] ** 2)) for name in NAMES]
    np.testing.assert_allclose(state.gains, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda tx, params: tx.update(params, optax.sgd(0.1).init(params), params),
            TypeError,
            r"state must be one of dm\.record_gains, got a tuple.*restored onto that",
        ),
        (
            lambda tx, params: tx.init({**params, "tail": jnp.ones(2)}),
            ValueError,
            "'tail' is in no layer",
        ),
        (
            lambda tx, params: tx.update(params, tx.init(params), params, layer_masks=True),
            TypeError,
            "'layer_masks'. Did you mean 'layer_mask'",
        ),
        (
            lambda tx, params: dm.record_gains(tx, dm.DepthSampler(LAYERS, UNIFORM, seed=0)),
            TypeError,
            r"DepthSampler with an AdaptiveDistribution.*Other distributions need no record",
        ),
        (
            lambda tx, params: dm.record_gains(tx, dm.layer_mask_sampler),
            TypeError,
            "sampler must be a DepthSampler",
        ),
        (
            lambda tx, params: dm.record_gains(dm.drop_muon, make_sampler()),
            TypeError,
            "inner must be an optax.GradientTransformation",
        ),
    ],
)
def test_errors_of_records(call, error, match):
    params = make_params()
    with pytest.raises(error, match=match):
        call(dm.record_gains(optax.sgd(0.1), make_sampler()), params)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda sampler, state: sampler.depth(0), TypeError, r"sampler\.depth\(step, opt_state\)"),
        (lambda sampler, state: sampler.sample(0), TypeError, "follows the run"),
        (
            lambda sampler, state: sampler.depth(0, state._replace(count=state.count + 5)),
            ValueError,
            "taken 5 steps.*step 0.*after a restart count on",
        ),
        (lambda sampler, state: sampler.depth(-1, state), ValueError, "step must be at least 0"),
        (
            lambda sampler, state: jax.jit(lambda state: sampler.depth(0, state))(state),
            TypeError,
            r"draw with sampler\.sample",
        ),
    ],
)
def test_errors_of_draws(call, error, match):
    state = make_tx().init(make_params())
    for draws in (make_sampler(), PlanReader(make_sampler())):
        if hasattr(draws, "sample") or "sample" not in call.__code__.co_names:
            with pytest.raises(error, match=match):
                call(draws, state)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: dm.time_aware_depth([1.0, -1.0]), "must be positive"),
        (lambda: dm.time_aware_depth([]), "one number for each depth"),
        (lambda: dm.time_aware_depth([1.0], floor=2.0), r"floor must lie in \[0, 1\]"),
        (lambda: dm.time_aware_depth([1.0], rate=0.0), "rate must be positive"),
        (lambda: dm.time_aware_depth([1.0], decay=1.0), "decay must lie"),
        (lambda: dm.time_aware_depth([1.0], steps_per_plan=0), "steps_per_plan must be at least"),
        (
            lambda: make_sampler(steps_per_plan=4, steps_per_draw=3),
            "must divide the distribution's",
        ),
        (lambda: make_sampler(steps_per_draw=0), "steps_per_draw must be at least 1"),
        (
            lambda: dm.DepthSampler(LAYERS, dm.time_aware_depth([1.0, 0.5]), seed=0),
            "depth_costs are 2, and there are 3 layers",
        ),
    ],
)
def test_errors_at_construction(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_fixed_rule_draws_once_for_several_steps():
    sampler = dm.DepthSampler(LAYERS, UNIFORM, seed=0, steps_per_draw=4)
    single = dm.DepthSampler(LAYERS, UNIFORM, seed=0)
    depths = [sampler.depth(step) for step in range(40)]
    assert depths == [single.depth(step // 4) for step in range(40)]
    assert depths == [int(sampler.sample(step)) for step in range(40)]
    # The state is ignored by rules that do not need it, so that a loop serves all.
    state = dm.drop_muon(0.1, LAYERS).init(make_params())
    assert sampler.depth(3, opt_state=None) == sampler.depth(3, state)


def test_a_sampler_may_be_made_while_a_step_is_traced():
    state = make_tx().init(make_params())
    chosen = jax.jit(lambda state: make_sampler().sample(0, state))(state)
    assert chosen == make_sampler().sample(0, state)
