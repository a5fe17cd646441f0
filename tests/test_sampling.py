"""Depth distributions and the sampler: laws of the draws, on the host and on the device."""

import copy
import dataclasses
import functools
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import dropmuon_jax as dm
import reference

NUM_LAYERS = 4


def make_layers(num_layers=NUM_LAYERS):
    params = [jnp.zeros(i + 1) for i in range(num_layers)]
    return dm.layers_by_path(params, [str(i) for i in range(num_layers)])


def make_distributions():
    return {
        "full": dm.full_depth(),
        "uniform": dm.uniform_depth(),
        "fixed": dm.fixed_depth([0.4, 0.0, 0.1, 0.5]),
        "epoch_shift": dm.epoch_shift_depth(num_steps=5000, alpha=0.7),
        "independent": dm.sampling.independent_layers([0.2, 1.0, 0.5, 0.9]),
        "pairs": dm.sampling.fixed_size_subsets(2),
    }


DISTRIBUTIONS = make_distributions()


def make_sampler(name, seed=0):
    return dm.DepthSampler(make_layers(), DISTRIBUTIONS[name], seed=seed)


def draw(name, steps, seed=0):
    sampler = make_sampler(name, seed)
    return [sampler.depth(step) for step in steps]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_probabilities_sum_to_one_at_every_step(name):
    sampler = make_sampler(name)
    for step in (0, 1, 2500, 5000, 10**6):
        assert float(jnp.sum(sampler.probabilities(step))) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_inclusion_probabilities_equal_their_enumeration(name):
    sampler = make_sampler(name)
    probabilities = np.asarray(sampler.probabilities(17), np.float64)
    expected = [
        sum(p for p, row in zip(probabilities, sampler.subsets, strict=True) if row[layer])
        for layer in range(NUM_LAYERS)
    ]
    np.testing.assert_allclose(sampler.inclusion_probabilities(17), expected, atol=1e-6)


def test_inclusion_probabilities_of_a_depth_are_cumulative_and_end_at_one():
    sampler = make_sampler("fixed")
    np.testing.assert_allclose(sampler.inclusion_probabilities(0), [0.4, 0.4, 0.5, 1], atol=1e-6)


def test_inclusion_probabilities_of_independent_layers_are_the_given_ones():
    sampler = make_sampler("independent")
    np.testing.assert_allclose(sampler.inclusion_probabilities(0), [0.2, 1, 0.5, 0.9], atol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 1234, 2500, 5000, 9999])
def test_epoch_shift_is_its_formula(step):
    expected = reference.epoch_shift(step, 5000, NUM_LAYERS, 0.7)
    np.testing.assert_allclose(make_sampler("epoch_shift").probabilities(step), expected, atol=1e-6)


def test_epoch_shift_makes_shallow_layers_ever_rarer():
    sampler = make_sampler("epoch_shift")
    shallow = [float(sampler.inclusion_probabilities(k)[0]) for k in (0, 2500, 5000)]
    assert shallow[0] > shallow[1] > shallow[2]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_host_draws_what_the_device_draws(name):
    sampler = make_sampler(name, seed=7)
    num_steps = 3000
    _, on_device = jax.lax.scan(
        lambda count, _: (count + 1, sampler.sample(count)), jnp.int32(0), length=num_steps
    )
    on_host = [sampler.active(step) for step in range(num_steps)]
    assert on_host == [tuple(sampler.subsets[i].tolist()) for i in np.asarray(on_device)]


@pytest.mark.parametrize("name", ["uniform", "fixed", "independent", "pairs"])
def test_draws_follow_their_probabilities(name):
    sampler = make_sampler(name, seed=1)
    steps = jnp.arange(100_000)
    counts = np.bincount(jax.vmap(sampler.sample)(steps), minlength=len(sampler.subsets))
    expected = np.asarray(sampler.probabilities(0), np.float64)
    assert (counts[expected == 0] == 0).all()
    drawn = expected > 0
    expected = expected[drawn] / expected[drawn].sum() * counts.sum()
    assert stats.chisquare(counts[drawn], expected).pvalue > 1e-4


def test_draws_follow_a_distribution_that_moves_with_the_step():
    sampler = make_sampler("epoch_shift", seed=2)
    steps = jnp.arange(5000)
    drawn = jax.nn.one_hot(jax.vmap(sampler.sample)(steps), NUM_LAYERS)
    expected = jax.vmap(sampler.probabilities)(steps)
    # The sum of independent indicators, in units of its standard deviation, for early and late.
    for part in (slice(0, 2500), slice(2500, 5000)):
        deviation = jnp.sqrt(jnp.sum(expected[part] * (1 - expected[part]), axis=0))
        score = (jnp.sum(drawn[part], axis=0) - jnp.sum(expected[part], axis=0)) / deviation
        assert float(jnp.max(jnp.abs(score))) < 4.5


def test_successive_draws_are_independent():
    sampler = make_sampler("uniform", seed=3)
    drawn = np.asarray(jax.vmap(sampler.sample)(jnp.arange(50_000)))
    table = np.zeros((NUM_LAYERS, NUM_LAYERS))
    np.add.at(table, (drawn[:-1], drawn[1:]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_seeds_differ_and_repeat():
    assert draw("uniform", range(64), seed=0) == draw("uniform", range(64), seed=0)
    assert draw("uniform", range(64), seed=0) != draw("uniform", range(64), seed=1)


def test_draws_do_not_depend_on_the_order_of_asking():
    steps = range(0, 5000, 7)
    assert draw("uniform", reversed(steps))[::-1] == draw("uniform", steps)


def test_draws_do_not_depend_on_the_configuration_of_jax():
    expected = draw("epoch_shift", range(200))
    with jax.enable_x64(True):
        assert draw("epoch_shift", range(200)) == expected
    with jax.default_prng_impl("rbg"):
        assert draw("epoch_shift", range(200)) == expected
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        assert draw("epoch_shift", range(200)) == expected


def test_seeds_of_more_than_32_bits_are_all_different_under_every_configuration():
    seeds = (5, 2**32 + 5, 2**40 + 5, 2**64 - 1)
    drawn = [draw("uniform", range(64), seed=seed) for seed in seeds]
    assert len({tuple(depths) for depths in drawn}) == len(seeds)
    with jax.enable_x64(True):
        assert [draw("uniform", range(64), seed=seed) for seed in seeds] == drawn


def test_small_seeds_are_keys_of_jax():
    sampler = make_sampler("uniform", seed=7)
    key = jax.random.fold_in(jax.random.key(7, impl="threefry2x32"), 3)
    uniform = int(jax.random.key_data(key)[0]) / 2**32
    assert sampler.depth(3) == int(uniform * NUM_LAYERS)


def test_the_host_draws_under_a_transfer_guard():
    sampler, expected = make_sampler("uniform"), draw("uniform", range(5))
    with jax.transfer_guard("disallow"):
        assert [sampler.depth(step) for step in range(5)] == expected


def test_probabilities_may_be_a_list():
    last = [0.0, 0.0, 0.0, 1.0]
    distribution = dm.LayerDistribution(dm.sampling.depth_subsets, lambda step, num_layers: last)
    sampler = dm.DepthSampler(make_layers(), distribution, seed=0)
    assert [sampler.depth(step) for step in range(20)] == [3] * 20


def test_the_link_of_a_chain_draws_as_a_sampler_with_the_same_arguments():
    draws = dm.DepthSampler(make_layers(), dm.uniform_depth(), seed=5, steps_per_draw=2)
    link = dm.layer_mask_sampler(make_layers(), dm.uniform_depth(), seed=5, steps_per_draw=2)
    assert link.draws == draws
    for step in range(20):
        assert link.depth(step) == draws.depth(step) == link.sample(step)
        assert link.active(step) == draws.active(step)
    # A chain has no draws, and lets the active layers through.
    chained = optax.chain(optax.clip(1.0), link)
    updates = [jnp.full(i + 1, 5.0) for i in range(NUM_LAYERS)]
    clipped, _ = chained.update(
        updates, chained.init(updates), layer_mask=draws.layers.mask(NUM_LAYERS - 1)
    )
    assert [float(u[0]) for u in clipped] == [0, 0, 0, 1]


def test_another_process_draws_the_same():
    program = (
        "import jax.numpy as jnp, dropmuon_jax as dm\n"
        "layers = dm.layers_by_path([jnp.zeros(i + 1) for i in range(4)], list('0123'))\n"
        "sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=11)\n"
        "print([sampler.depth(k) for k in range(2000, 2030)])\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert answer.strip() == str(draw("uniform", range(2000, 2030), seed=11))


def test_the_host_draws_a_block_with_one_compilation_and_few_calls():
    calls = 0

    def probabilities(step, num_layers):
        nonlocal calls
        calls += 1
        return jnp.full(num_layers, 1 / num_layers)

    distribution = dm.LayerDistribution(dm.sampling.depth_subsets, probabilities)
    sampler = dm.DepthSampler(make_layers(), distribution, seed=0)
    calls = 0
    for step in range(4000):
        sampler.depth(step)
    assert calls == 1  # traced once for all blocks


def test_the_host_draws_inside_a_trace():
    sampler = make_sampler("uniform")

    @jax.jit
    def traced(x):
        return x * sampler.depth(3)

    assert int(traced(jnp.int32(1))) == make_sampler("uniform").depth(3)


def test_depths_can_differ_between_traced_seeds():
    def sample(seed):
        return jax.vmap(make_sampler("uniform", seed).sample)(jnp.arange(50))

    drawn = jax.vmap(sample)(jnp.arange(3))
    assert len({tuple(row) for row in np.asarray(drawn).tolist()}) == 3
    assert np.asarray(drawn[2]).tolist() == draw("uniform", range(50), seed=2)
    keys = jax.random.split(jax.random.key(9), 3)
    of_keys = np.asarray(jax.vmap(sample)(keys)).tolist()
    assert of_keys == [draw("uniform", range(50), seed=key) for key in keys]


def test_the_state_counts_the_steps():
    sampler = dm.layer_mask_sampler(make_layers(), dm.uniform_depth(), seed=0)
    updates = [jnp.ones(i + 1) for i in range(NUM_LAYERS)]
    state = sampler.init(updates)
    for step in range(3):
        assert int(state.count) == step
        _, state = sampler.update(updates, state, layer_mask=sampler.draws.layers.mask(2))
    assert int(state.count) == 3


# The indices that version 0.1 drew in the first 40 steps, with a seed of more than 32 bits.
OLD_SEED, OLD_DRAWS = (
    2**40 + 5,
    {
        "uniform": "0020103201220313133201300003323310013002",
        "fixed": "0030203300330303033302300003333300023003",
        "independent": "1131317311331717155312511105733711126113",
        "pairs": "1031205311341525254402501105544520025013",
    },
)


@pytest.mark.parametrize("name", OLD_DRAWS)
def test_a_run_that_was_begun_by_an_earlier_version_goes_on_with_its_draws(name):
    sampler = make_sampler(name, OLD_SEED)
    assert "".join(str(sampler.index(step)) for step in range(40)) == OLD_DRAWS[name]


# --- Draws are values -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samplers_are_equal_and_hash_alike_by_value(name):
    sampler, other = make_sampler(name), make_distributions()[name]
    same = dm.DepthSampler(make_layers(), other, seed=0)
    assert other == DISTRIBUTIONS[name]
    assert same == sampler
    assert hash(same) == hash(sampler)
    sampler.active(3)  # what has been drawn is no part of the value
    assert same == sampler
    assert hash(same) == hash(sampler)
    others = [make_sampler(other) for other in DISTRIBUTIONS if other != name]
    others += [
        make_sampler(name, seed=1),
        dm.DepthSampler(make_layers(), other, seed=0, steps_per_draw=2),
        dataclasses.replace(sampler, layers=make_layers().group(NUM_LAYERS - 1))
        if name in ("full", "uniform", "epoch_shift", "pairs")
        else make_sampler(name, seed=2),
    ]
    assert sampler not in others
    assert len({sampler, same, *others}) == 1 + len(others)


def test_distributions_of_other_arguments_differ():
    assert dm.fixed_depth([0.5, 0.5]) != dm.fixed_depth([0.25, 0.75])
    assert dm.fixed_depth((0.5, 0.5)) == dm.fixed_depth(np.array([1.0, 1.0]) / 2)
    assert dm.epoch_shift_depth(10) != dm.epoch_shift_depth(11)
    assert dm.epoch_shift_depth(10) == dm.epoch_shift_depth(10, alpha=0.5)
    assert dm.time_aware_depth([2, 1]) == dm.time_aware_depth([4.0, 2.0])  # only ratios count
    assert dm.time_aware_depth([2, 1]) != dm.time_aware_depth([3, 1])
    assert dm.time_aware_depth([2, 1]) != dm.time_aware_depth([2, 1], steps_per_plan=5)
    assert len({dm.time_aware_depth([2, 1]), dm.time_aware_depth([4.0, 2.0])}) == 1


def test_a_sampler_cannot_be_changed():
    sampler = make_sampler("uniform")
    for field in ("layers", "distribution", "seed", "steps_per_draw"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(sampler, field, 1)
    later = dataclasses.replace(sampler, seed=1)
    assert [later.depth(k) for k in range(64)] == draw("uniform", range(64), seed=1)
    assert sampler == make_sampler("uniform")


def test_a_sampler_is_copied_by_value():
    sampler = make_sampler("epoch_shift", seed=3)
    depths = [sampler.depth(k) for k in range(20)]
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert twin == sampler
        assert [twin.depth(k) for k in range(20)] == depths


def test_several_runs_may_draw_from_one_sampler_in_turns():
    sampler = make_sampler("uniform", seed=4)
    expected = draw("uniform", range(3000), seed=4)
    # Each at a step of its own, forth and back, over the borders of blocks.
    runs = [list(range(0, 3000, 7)), list(range(2999, 0, -11)), [0] * 50]
    for steps in zip(*runs, strict=False):
        assert [sampler.depth(step) for step in steps] == [expected[step] for step in steps]


def test_a_sampler_is_a_static_argument_of_jit():
    traced = 0

    @functools.partial(jax.jit, static_argnums=0)
    def sample(sampler, count):
        nonlocal traced
        traced += 1
        return sampler.sample(count)

    for step in range(5):
        assert sample(make_sampler("uniform", 6), step) == make_sampler("uniform", 6).depth(step)
    assert traced == 1  # equal samplers share one executable
    sample(make_sampler("uniform", 7), 0)
    assert traced == 2


# --- Seeds ----------------------------------------------------------------------------------------


def test_a_key_is_the_seed_that_it_was_made_of():
    expected = draw("uniform", range(64), seed=3)
    seeds = [
        jax.random.key(3),
        jax.random.key(3, impl="threefry2x32"),
        jax.random.PRNGKey(3),
        np.asarray(jax.random.PRNGKey(3)),
        np.int64(3),
    ]
    for seed in seeds:
        assert make_sampler("uniform", seed) == make_sampler("uniform", 3)
        assert draw("uniform", range(64), seed=seed) == expected
    with jax.default_prng_impl("rbg"), jax.enable_x64(True):
        assert draw("uniform", range(64), seed=3) == expected
    words = np.array([5, 7], np.uint32)
    assert make_sampler("uniform", words).seed == (5 << 32) + 7


def test_a_key_that_was_split_off_draws_as_jax_folds_it():
    key = jax.random.split(jax.random.key(3, impl="threefry2x32"))[1]
    bits = jax.vmap(lambda k: jax.random.key_data(jax.random.fold_in(key, k))[0])(jnp.arange(64))
    expected = (np.asarray(bits, np.float64) / 2**32 * NUM_LAYERS).astype(int).tolist()
    assert draw("uniform", range(64), seed=key) == expected
    assert draw("uniform", range(64), seed=jax.random.key_data(key)) == expected


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_other_generators_are_seeds_of_their_own(impl):
    keys = [jax.random.key(seed, impl=impl) for seed in (0, 1)]
    drawn = [draw("uniform", range(64), seed=key) for key in keys]
    assert drawn == [draw("uniform", range(64), seed=key) for key in keys]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("seed", "error", "match"),
    [
        (None, TypeError, "seed must be a Python integer, got None"),
        (1.5, TypeError, r"got 1\.5.*or a key such as jax\.random\.key\(0\)"),
        ("0", TypeError, "got '0'"),
        (True, TypeError, "got a truth value"),
        (-1, ValueError, "seed must be at least 0"),
        (2**64, ValueError, r"seed must be below 2\^64"),
        (jnp.float32(3), TypeError, "got an array"),
        (jnp.arange(3), TypeError, r"seed must be one integer, got an array of int32\[3\]"),
        (np.arange(3), TypeError, "seed must be a Python integer"),
        (np.zeros(3, np.uint32), TypeError, "seed must be a Python integer"),
        (jax.random.split(jax.random.key(0)), TypeError, "got an array"),
    ],
)
def test_a_bad_seed_is_an_error_at_construction(seed, error, match):
    for make in (dm.DepthSampler, dm.layer_mask_sampler):
        with pytest.raises(error, match=match):
            make(make_layers(), dm.uniform_depth(), seed=seed)


def test_a_seed_is_required_by_its_name():
    with pytest.raises(TypeError, match="seed"):
        dm.DepthSampler(make_layers(), dm.uniform_depth())
    with pytest.raises(TypeError, match="positional"):
        dm.DepthSampler(make_layers(), dm.uniform_depth(), 0)


def test_an_array_as_a_seed_is_for_the_device():
    sampler = make_sampler("uniform", jnp.int32(3))
    assert [int(sampler.sample(k)) for k in range(20)] == draw("uniform", range(20), seed=3)
    with pytest.raises(TypeError, match=r"seed is an array.*sampler\.sample"):
        sampler.depth(0)
