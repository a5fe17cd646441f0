"""Samplers that follow the run: what they record, how they plan, what the host reads."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import dropmuon_jax as dm
from dropmuon_jax.sampling import LayerGainsState, PlanReader, reading
from dropmuon_jax.sampling.adaptive import minimise_waiting
from dropmuon_jax.sampling.reading import Reading

COSTS = [1.0, 0.5, 0.1]
UNIFORM = dm.uniform_depth()
NAMES = ["stem", "mid", "head"]
SHAPES = {"stem": (4, 6), "mid": (6, 6), "head": (6, 2)}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: np.float32(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}


PARAMS = random_tree(0)
LAYERS = dm.layers_by_path(PARAMS, NAMES)


def make_sampler(
    costs=COSTS, *, steps_per_plan=4, steps_per_draw=1, seed=0, layers=LAYERS, **options
):
    distribution = dm.time_aware_depth(costs, steps_per_plan=steps_per_plan, **options)
    return dm.DepthSampler(layers, distribution, seed=seed, steps_per_draw=steps_per_draw)


SAMPLER = make_sampler()


def drop_muon(learning_rate=0.05, layers=LAYERS):
    """Without its iteration, which gains do not depend on, and which would have to be compiled."""
    return dm.drop_muon(learning_rate, layers, orthogonalize=lambda x: x)


def make_tx(sampler=None):
    return dm.record_gains(drop_muon(), sampler or make_sampler())


# --- What is recorded -----------------------------------------------------------------------------


def step_of(tx, donate=()):
    """A compiled step with given gradients."""

    @functools.partial(jax.jit, static_argnames="depth", donate_argnames=donate)
    def step(params, state, grads, depth):
        updates, state = tx.update(grads, state, params, layer_mask=LAYERS.mask(depth))
        return updates, optax.apply_updates(params, updates), state

    return step


def test_gains_are_first_order_decreases_averaged_over_active_steps():
    tx = make_tx()
    params, state, step = PARAMS, tx.init(PARAMS), step_of(tx)
    expected, seen = np.zeros(3), np.zeros(3)
    for count, depth in enumerate((1, 1, 2, 1)):
        grads = random_tree(count)
        updates, params, state = step(params, state, grads, depth)
        for i in range(depth, 3):
            gain = -np.sum(grads[NAMES[i]] * updates[NAMES[i]]) / np.abs(updates[NAMES[2]]).sum()
            seen[i] += 1
            expected[i] += max(0.1, 1 / seen[i]) * (gain - expected[i])
        np.testing.assert_allclose(state.gains, expected, rtol=1e-5)
    assert state.num_active_steps.tolist() == [0, 3, 4]
    # Two periods of four steps have the plan of equal gains; the second plan is of these gains, and
    # what was never active may be worth as much as the best.
    np.testing.assert_allclose(state.probabilities, plan_of(np.ones(3)), rtol=1e-6)
    optimistic = np.float32([expected.max(), *expected[1:]])
    plan = jax.jit(make_sampler().distribution.plan)(optimistic)
    np.testing.assert_allclose(state.next_probabilities, plan, rtol=1e-4)

    # A step that overflowed has shown nothing.
    grads = random_tree(9)
    *_, after = step(params, state, grads | {"mid": np.nan * grads["mid"]}, 1)
    assert after.gains[1] == state.gains[1]
    assert after.num_active_steps.tolist() == [0, 3, 5]
    assert after.count == 5


def test_gains_do_not_depend_on_how_the_learning_rate_changes():
    def run(rate):
        tx = dm.record_gains(drop_muon(rate), make_sampler())
        state = tx.init(PARAMS)
        for count, depth in enumerate((0, 2, 0, 1)):
            mask = LAYERS.mask(depth)
            _, state = tx.update(random_tree(count), state, PARAMS, layer_mask=mask)
        return state

    constant, changing = (run(rate) for rate in (0.1, lambda count: 3.0 / 10.0**count))
    np.testing.assert_allclose(constant.gains, changing.gains, rtol=1e-5)
    # A warm-up begins with a step of no length, of which nothing is known.
    warm = run(lambda count: 0.1 * count)
    assert (constant.num_active_steps - warm.num_active_steps).tolist() == [1, 1, 1]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_seed_may_be_an_argument_of_the_compiled_step(compiled):
    def step(grads, state, seed):
        return make_tx(make_sampler(seed=seed)).update(grads, state, PARAMS, depth=1)

    arguments = random_tree(1), make_tx().init(PARAMS), np.uint32(0)
    jitted = jax.jit(step)
    run = jitted.lower(*arguments).compile() if compiled else jitted
    expected = make_tx().update(*arguments[:2], PARAMS, depth=1)
    chex.assert_trees_all_close(run(*arguments), expected, rtol=1e-6)


def test_rows_of_a_stack_gain_like_layers_of_their_own():
    grads = [np.float32(np.random.default_rng(k).normal(size=(3, 4, 4))) for k in range(4)]

    def run(names, as_tree):
        params = as_tree(grads[0])
        layers = dm.layers_by_path(params, names)
        sampler = dm.DepthSampler(layers, dm.time_aware_depth(COSTS, steps_per_plan=2), seed=0)
        tx = dm.record_gains(drop_muon(layers=layers), sampler)
        state = tx.init(params)
        for depth, grad in zip((0, 2, 1, 0), grads, strict=True):
            mask = layers.mask(jnp.int32(depth) if layers.stacks else depth)
            _, state = tx.update(as_tree(grad), state, params, layer_mask=mask)
        return state[1:-1]

    of_stack = run([dm.stacked("blocks")], lambda rows: {"blocks": rows})
    of_layers = run(list("abc"), lambda rows: dict(zip("abc", rows, strict=True)))
    assert of_stack[3].tolist() == of_layers[3].tolist() == [2, 3, 4]
    for ours, theirs in zip(of_stack, of_layers, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_a_step_that_a_wrapper_inside_leaves_out_counts_and_shows_nothing():
    tx = dm.record_gains(optax.apply_if_finite(optax.sgd(0.5), 3), make_sampler())
    _, first = tx.update(PARAMS, tx.init(PARAMS), PARAMS)  # without a mask: of all layers
    expected = [np.sum(PARAMS[name] ** 2) / np.abs(PARAMS[NAMES[2]]).sum() for name in NAMES]
    np.testing.assert_allclose(first.gains, expected, rtol=1e-5)
    _, state = tx.update(random_tree(1, np.nan), first, PARAMS)
    assert (int(first.count), int(state.count), int(state.inner_state.total_notfinite)) == (1, 2, 1)
    np.testing.assert_array_equal(state.gains, first.gains)
    np.testing.assert_array_equal(state.num_active_steps, first.num_active_steps)


@pytest.mark.parametrize("active", [(1, 1, 1), (1, 1, 0), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("leaves_out", ["apply_if_finite", "conditionally_mask"])
def test_steps_that_are_left_out_change_no_gain_before_or_after(leaves_out, active):
    """One entry of one layer is NaN, or a condition does not hold: then no layer moves."""
    masks = {
        "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
        "conditionally_mask": lambda tx: optax.conditionally_mask(
            tx, lambda step, is_good, **_: is_good, forward_extra_args=True
        ),
    }
    sgd = optax.with_extra_args_support(optax.sgd(0.5))
    tx = dm.record_gains(masks[leaves_out](sgd), make_sampler())
    mask = {"layer_mask": LAYERS.subset([bool(flag) for flag in active])}
    damaged = {name: x.copy() for name, x in random_tree(2).items()}
    damaged[NAMES[1]].flat[0] = np.nan if leaves_out == "apply_if_finite" else 9.0

    def record(*, with_bad_ones):
        state = tx.init(PARAMS)
        for seed in range(3):
            _, state = tx.update(random_tree(seed), state, PARAMS, is_good=True, **mask)
            if with_bad_ones:
                _, state = tx.update(damaged, state, PARAMS, is_good=False, **mask)
            mask_of_all = {"layer_mask": LAYERS.mask(0)}
            _, state = tx.update(random_tree(9), state, PARAMS, is_good=True, **mask_of_all)
            if with_bad_ones:
                _, state = tx.update(damaged, state, PARAMS, is_good=False, **mask_of_all)
        return state

    plain, interrupted = record(with_bad_ones=False), record(with_bad_ones=True)
    assert (plain.count, interrupted.count) == (6, 12)
    for field in ("gains", "num_active_steps", "step_length"):
        np.testing.assert_array_equal(getattr(interrupted, field), getattr(plain, field))


def test_a_layer_without_gradient_gains_nothing_though_it_is_drawn_alone():
    tx = dm.record_gains(optax.sgd(0.5), make_sampler())
    _, first = tx.update(PARAMS, tx.init(PARAMS), PARAMS, layer_mask=LAYERS.mask(0))
    dead = PARAMS | {NAMES[0]: 0 * PARAMS[NAMES[0]]}
    only_first = LAYERS.subset([True, False, False])
    _, second = tx.update(dead, first, PARAMS, layer_mask=only_first)
    np.testing.assert_allclose(second.gains, first.gains * np.array([0.5, 1, 1]), rtol=1e-6)


def test_a_depth_may_stand_in_the_place_of_its_mask():
    tx = make_tx()
    state = tx.init(PARAMS)
    by_mask = tx.update(PARAMS, state, PARAMS, layer_mask=LAYERS.mask(1))
    by_depth = tx.update(PARAMS, state, PARAMS, depth=1)
    jax.tree.map(np.testing.assert_array_equal, by_depth, by_mask)
    with pytest.raises(TypeError, match="layer_mask or depth, and got both"):
        tx.update(PARAMS, state, PARAMS, depth=1, layer_mask=LAYERS.mask(1))


def test_a_chain_around_or_inside_keeps_the_one_record():
    sampler, inner = make_sampler(), make_tx()
    link = dm.layer_mask_sampler(LAYERS, sampler.distribution, seed=0)
    assert link.draws == sampler
    chain = optax.chain(dm.momentum(0.9), optax.scale(-0.05), link)
    outside = optax.chain(optax.clip_by_global_norm(1e9), inner)
    for tx in (outside, dm.record_gains(chain, sampler)):
        state = tx.init(PARAMS)
        draw = sampler.sample(0, inner.init(PARAMS))
        assert sampler.depth(0, state) == link.depth(0, state) == link.sample(0, state) == draw
        assert link.active(0, state) == sampler.active(0, state)
        _, state = tx.update(PARAMS, state, PARAMS, layer_mask=LAYERS.mask(1))
        assert (optax.tree.get(state, "gains") > 0).tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"no record.*dm\.record_gains\(optimizer, sampler\)"):
        sampler.depth(0, chain.init(PARAMS))
    twice = dm.record_gains(optax.chain(optax.identity(), inner), sampler)
    with pytest.raises(ValueError, match=r"several records.*call dm\.record_gains once"):
        sampler.depth(0, twice.init(PARAMS))


# --- Plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_nothing_beats_the_plan(rate):
    generator = np.random.default_rng(0)
    minimise = jax.jit(minimise_waiting, static_argnames="rate")
    for size in [2, 5] * 7:
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


def plan_of(gains, costs=COSTS, **options):
    distribution = dm.time_aware_depth(costs, **options)
    return np.asarray(jax.jit(distribution.plan)(np.float32(gains)))


def test_plans_follow_gains_in_proportion_to_costs_down_to_a_floor():
    np.testing.assert_allclose(plan_of([0.5, 0.4, 0.1]), [1, 0, 0], atol=1e-6)
    useless_first = plan_of([1e-9, 0.4, 0.1], floor=0.1)
    np.testing.assert_allclose(useless_first[0], 0.1, rtol=1e-5)
    gains = np.array([0.1, 0.4, 0.3])
    for one, other in (
        # Only ratios count, of gains and of costs; and noise may make a deeper step dearer.
        (plan_of(gains), plan_of(1e-3 * gains, 7 * np.array(COSTS))),
        (plan_of(gains, [1.0, 0.4, 0.6]), plan_of(gains, [1.0, 0.5, 0.5])),
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert plan_of([1.0], [2.0]) == 1
    # A step uphill, and no step at all, are distributions too.
    for strange in ([-1.0, 0.2, 0.1], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]):
        plan = plan_of(strange)
        assert (plan >= 0).all()
        np.testing.assert_allclose(plan.sum(), 1, rtol=1e-6)


# --- Draws, from the state or from a reader that does not wait ------------------------------------


def test_in_a_run_reader_sampler_and_device_draw_alike_and_begin_with_equal_gains():
    sampler = make_sampler(steps_per_draw=2)
    of_equal_gains = dm.fixed_depth(plan_of(np.ones(3)).tolist())
    at_first = dm.DepthSampler(LAYERS, of_equal_gains, seed=0, steps_per_draw=2)
    tx = make_tx(sampler)
    reader, sample, step = PlanReader(sampler), jax.jit(sampler.sample), step_of(tx, donate="state")
    params, state, depths = PARAMS, tx.init(PARAMS), []
    for count in range(32):
        depth = reader.depth(count, state)
        assert depth == sampler.depth(count, state) == sample(count, state)
        active = (False,) * depth + (True,) * (3 - depth)
        assert reader.active(count, state) == sampler.active(count, state) == active
        assert count >= 8 or depth == at_first.depth(count)
        depths.append(depth)
        _, params, state = step(params, state, random_tree(count), depth)
    assert set(depths) == {0, 1, 2}
    assert depths[::2] == depths[1::2]
    assert not np.allclose(state.probabilities, plan_of(np.ones(3)))


def states_of(seed, num_steps=48):
    """The records of a run: four steps to a plan, which is known a period ahead."""
    random = np.random.default_rng(seed).dirichlet(np.ones(3), num_steps)
    plans, nothing = [*np.full((2, 3), 1 / 3), *random], np.zeros(3, np.float32)
    return [
        LayerGainsState(
            (), np.int32(k), nothing, nothing[0], nothing, *np.float32(pair), SAMPLER.drawn_by
        )
        for k in range(num_steps)
        for pair in [plans[k // 4 : k // 4 + 2]]
    ]


def drawn(sampler, states):
    return [sampler.depth(int(state.count), state) for state in states]


def test_a_reader_reads_once_a_period_and_a_period_ahead(monkeypatch):
    begun, original = [], Reading.begin
    monkeypatch.setattr(
        Reading, "begin", lambda state: (begun.append(int(state.count)), original(state))[1]
    )
    drawn(PlanReader(make_sampler()), states_of(1, 18))
    assert begun == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("first", [0, 3, 12, 22])
def test_a_reader_goes_on_from_any_step_and_draws_a_step_again_as_often_as_is_asked(first):
    sampler, states = make_sampler(), states_of(1)[first:]
    reader = PlanReader(sampler)
    again = [{reader.depth(int(s.count), s) for _ in range(1 + s.count % 3)} for s in states]
    assert again == [{depth} for depth in drawn(sampler, states)]
    assert len(set(drawn(sampler, states))) == 3


@pytest.mark.parametrize("length", [1, 8])
def test_two_runs_on_one_reader_are_found_out(length):
    reader, (first, second) = PlanReader(make_sampler()), (states_of(1), states_of(2))

    def take_turns():
        drawn(reader, first[:16])
        for step in range(16, 48, length):
            # Each begins where the other stands or has ended, as if it were the same.
            drawn(reader, first[step : step + length])
            drawn(reader, second[step : step + length] if length == 1 else second[step + length :])

    with pytest.raises(ValueError, match="A PlanReader follows one run"):
        take_turns()


# The steps that a state has taken, as it is given for steps 0, 1, …; what is read at the beginning
# of a period of four steps is compared at its end.
@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ([0] * 9, (0, 1, 0, 4)),  # the same for ever
        ([0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11], (5, 6, 7, 8)),  # apply_if_finite around it
        ([0, 0, 0, 1, 1, 1, 2, 2, 2], (0, 1, 1, 4)),  # MultiSteps around it
    ],
    ids=["stale", "apply_if_finite", "multisteps"],
)
def test_a_state_that_lags_is_found_out_when_a_period_ends_at_latest(counts, found):
    states, reader = states_of(1), PlanReader(make_sampler())
    taken, step, taken_before, begun = found
    with pytest.raises(ValueError, match=rf"has taken {taken} steps, .* for step {step}\. Give"):
        make_sampler().depth(step, states[counts[step]])
    for step in range(begun + 4):
        reader.depth(step, states[counts[step]])
    message = (
        rf"has taken {taken_before} steps.* step {begun}.*\(optax\.apply_if_finite\) goes inside"
    )
    with pytest.raises(ValueError, match=message + r", optax\.MultiSteps nowhere"):
        reader.depth(begun + 4, states[counts[begun + 4]])


def test_a_reader_that_jumps_reads_at_once_and_an_error_leaves_nothing_behind():
    sampler, states = make_sampler(), states_of(1)
    reader = PlanReader(sampler)
    reader.depth(0, states[0])
    assert reader.depth(13, states[13]) == sampler.depth(13, states[13])
    for step in (12, 20):
        for draws in (PlanReader(sampler), reader):
            with pytest.raises(ValueError, match=f"has taken 13 steps, .* for step {step}"):
                draws.depth(step, states[13])
    assert drawn(reader, states[13:]) == drawn(sampler, states[13:])


def test_a_reader_of_a_fixed_rule_draws_as_its_sampler_does():
    sampler = dm.DepthSampler(LAYERS, UNIFORM, seed=1)
    reader = PlanReader(sampler)
    for step in (5, 0, 1, 1, 900):
        assert reader.depth(step) == reader.depth(step, "any state") == sampler.depth(step)
        assert reader.active(step) == sampler.active(step)
    pairs = dm.DepthSampler(LAYERS, dm.sampling.fixed_size_subsets(2), seed=1)
    assert PlanReader(pairs).active(3) == pairs.active(3)
    for draws in (pairs, PlanReader(pairs)):
        with pytest.raises(TypeError, match=r"not depths.*sampler\.active\(step\)"):
            draws.depth(3)


def test_a_sampler_may_be_made_while_a_step_is_traced():
    state = states_of(1)[9]
    chosen = jax.jit(lambda state: make_sampler().sample(9, state))(state)
    assert chosen == make_sampler().depth(9, state)


# --- What draws depend on is in the state ---------------------------------------------------------


def descent(gains):
    """A plan of one's own, which takes no costs."""
    return jax.nn.softmax(-gains)


PAIRS = dm.sampling.AdaptiveDistribution(dm.sampling.fixed_size_subsets(2).subsets, descent, 4)
RULES = {
    "time-aware": lambda costs: dm.time_aware_depth(costs, steps_per_plan=4),
    "pairs": lambda costs: PAIRS,
}


def sampler_of(rule, costs=COSTS, seed=0):
    return dm.DepthSampler(LAYERS, rule(costs), seed=seed, steps_per_draw=2)


def loss_fn(params, grads):
    return sum(jnp.vdot(params[name], grads[name]) for name in NAMES)


def drive(kind, sampler, steps, params, state):
    """Draws of some steps by a script that has just started, and what it ends with."""
    tx, drawn = dm.record_gains(drop_muon(), sampler), []
    step_fn = dm.train_step(loss_fn, tx, sampler, donate=False)
    draws, sample = PlanReader(sampler) if kind == "reader" else sampler, jax.jit(sampler.sample)

    @functools.partial(jax.jit, static_argnums=3)
    def step_of_own(params, state, grads, active):
        updates, state = tx.update(grads, state, params, layer_mask=LAYERS.subset(active))
        return optax.apply_updates(params, updates), state

    for step in steps:
        grads = random_tree(step)
        if kind == "device":
            drawn.append(tuple(sampler.subsets[int(sample(step, state))].tolist()))
        else:
            drawn.append(draws.active(step, state))
        if kind == "train_step":
            params, state, _ = step_fn(step, params, state, grads)
        else:
            params, state = step_of_own(params, state, grads, drawn[-1])
    return drawn, params, state


@functools.cache
def whole_run(rule):
    sampler = sampler_of(RULES[rule])
    return drive(
        "host", sampler, range(22), PARAMS, dm.record_gains(drop_muon(), sampler).init(PARAMS)
    )[0]


# In the middle of a period, at its end and at its beginning.
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("kind", "stop"), [("host", 5), ("reader", 13), ("train_step", 11), ("device", 8)]
)
def test_a_run_that_is_started_again_draws_on_whatever_costs_are_measured_then(
    kind, stop, rule, tmp_path
):
    sampler, others = sampler_of(RULES[rule]), sampler_of(RULES[rule], [1.0, 0.1, 0.05])
    target = PARAMS, dm.record_gains(drop_muon(), sampler).init(PARAMS)
    _, *carried = drive("host", sampler, range(stop), *target)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", tuple(carried))
        checkpointer.wait_until_finished()
        carried = checkpointer.restore(tmp_path / "saved", target)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        drawn, *_ = drive(kind, others, range(stop, 22), *carried)
    assert drawn == whole_run(rule)[stop:]
    is_told = rule == "time-aware" and kind != "device"
    assert ["layer costs" in str(of.message) for of in told] == [True] * is_told


def test_a_run_that_begins_with_other_costs_draws_otherwise():
    sampler = sampler_of(RULES["time-aware"], [1.0, 0.1, 0.05])
    state = dm.record_gains(drop_muon(), sampler).init(PARAMS)
    assert drive("host", sampler, range(22), PARAMS, state)[0] != whole_run("time-aware")


OTHERS = {
    "seed is 0, not 1": lambda: make_sampler(seed=1),
    "seed is 0, not 4294967296": lambda: make_sampler(seed=2**32),
    "steps_per_draw is 1, not 2": lambda: make_sampler(steps_per_draw=2),
    "steps_per_plan is 4, not 8": lambda: make_sampler(steps_per_plan=8),
    "decay is 0.9, not 0.5": lambda: make_sampler(decay=0.5),
    "order of layers is": lambda: make_sampler(layers=dm.layers_by_path(PARAMS, NAMES[::-1])),
    r"plan \(its rate": lambda: make_sampler(rate=0.6),
    r"plan \(its rate,": lambda: make_sampler(floor=0.06),
    "set of subsets": lambda: dm.DepthSampler(LAYERS, PAIRS, seed=0),
}


@pytest.mark.parametrize("match", OTHERS)
def test_a_state_of_another_sampler_is_refused_wherever_draws_are_known(match):
    other, state = OTHERS[match](), make_tx().init(PARAMS)
    tx = dm.record_gains(drop_muon(layers=other.layers), other)
    step_fn = dm.train_step(loss_fn, tx, other, donate=False)
    for call in (
        lambda: other.active(0, state),
        lambda: PlanReader(other).active(0, state),
        lambda: other.sample(0, state),
        lambda: other.inclusion_probabilities(0, state),
        lambda: other.check_processes(0, state),
        lambda: step_fn(0, PARAMS, state, PARAMS),
        lambda: dm.check_state(tx, PARAMS, state),
    ):
        with pytest.raises(ValueError, match=rf"not of this sampler: its {match}.*To go on with"):
            call()
    # The way out, and a recorder that is not the sampler's, which the next draw finds out.
    taken = optax.tree.set(state, drawn_by=optax.tree.get(tx.init(PARAMS), "drawn_by"))
    assert other.active(0, taken)
    _, mixed = tx.update(PARAMS, state, PARAMS, layer_mask=LAYERS.mask(0))
    with pytest.raises(ValueError, match="record is of two different samplers, not of one"):
        SAMPLER.depth(1, mixed)


def test_other_costs_are_told_once_and_taken_by_the_way_out_of_the_warning():
    state, other = make_tx().init(PARAMS), make_sampler([1.0, 0.1, 0.05])
    tx, one_unit = make_tx(other), make_sampler(7 * np.float32(COSTS))
    one_unit.depth(0, state)  # only ratios count
    with pytest.warns(UserWarning, match=r"to take them, opt_state = optax\.tree\.set"):
        other.depth(0, state)
    other.depth(0, state)
    with pytest.warns(UserWarning, match=r"\[0\.5, 0\.4, 0\.1\].*\[0\.9, 0\.05, 0\.05\]"):
        dm.check_state(tx, PARAMS, state)
    opt_state = optax.tree.set(state, layer_costs=optax.tree.get(tx.init(PARAMS), "layer_costs"))
    make_sampler([1.0, 0.1, 0.05]).depth(0, opt_state)
    dm.check_state(tx, PARAMS, opt_state)


def test_a_record_with_a_hole_is_refused_and_can_be_filled():
    opt_state = make_tx().init(PARAMS)
    old = opt_state._replace(drawn_by=None)
    with pytest.raises(ValueError, match=r"drawn_by, .*_replace\(drawn_by=tx\.init\(params\)"):
        SAMPLER.depth(0, old)
    with pytest.raises(ValueError, match=r"opt_state\.drawn_by"):
        make_tx().update(PARAMS, old, PARAMS)
    assert old._replace(drawn_by=make_tx().init(PARAMS).drawn_by).drawn_by is not None


# --- Errors ---------------------------------------------------------------------------------------

_STEPS = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=3)
MULTISTEPS = optax.GradientTransformationExtraArgs(_STEPS.init, _STEPS.update)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda draws, state: draws.depth(0), r"sampler\.depth\(step, opt_state\)"),
        (
            lambda draws, state: draws.depth(0, state._replace(count=state.count + 5)),
            "taken 5 steps.*step 0.*after a restart count on",
        ),
        (
            lambda draws, state: jax.jit(lambda state: draws.depth(0, state))(state),
            r"draw with sampler\.sample",
        ),
    ],
)
def test_a_state_that_cannot_be_drawn_by_is_refused(call, match):
    for draws in (make_sampler(), PlanReader(make_sampler())):
        with pytest.raises((TypeError, ValueError), match=match):
            call(draws, states_of(1)[0])


def test_draws_on_the_device_read_the_first_state_and_wait_for_no_other(monkeypatch):
    sampler, states, read = make_sampler(), states_of(3), []
    expected = drawn(make_sampler(), states)
    monkeypatch.setattr(reading, "to_host", lambda x: read.append(x) or np.asarray(x))
    for state, depth in zip(states, expected, strict=True):
        assert sampler.sample(state.count, state) == depth
        assert sampler.inclusion_probabilities(state.count, state)[-1] > 1 - 1e-5
        assert len(read) == len(jax.tree.leaves(state.drawn_by))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: make_tx().update(PARAMS, optax.sgd(0.1).init(PARAMS), PARAMS),
            r"has tuple where LayerGainsState belongs.*restore it onto that",
        ),
        (lambda: make_tx().init({**PARAMS, "tail": np.ones(2)}), "'tail' is in no layer"),
        (
            lambda: dm.record_gains(MULTISTEPS, make_sampler()).init(PARAMS),
            r"dm\.accumulate: gather gradients in the step itself",
        ),
        (lambda: dm.time_aware_depth([1.0, -1.0]), "must be positive"),
        (
            lambda: dm.time_aware_depth(dm.planning.DepthReport(("a",), *[np.ones(1)] * 2, ())),
            "give its .flops",
        ),
        (lambda: dm.time_aware_depth([1.0], floor=2.0), r"floor must lie in \[0, 1\]"),
        (lambda: make_sampler(steps_per_draw=3), "must divide the distribution's"),
        (
            lambda: dm.DepthSampler(LAYERS, dm.time_aware_depth([1.0, 0.5]), seed=0),
            "costs of 2 depths, and there are 3 layers",
        ),
    ],
)
def test_what_no_record_or_plan_can_be_made_of_is_refused(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call()
