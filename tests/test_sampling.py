"""Depth distributions and the sampler: laws of the draws, on the host and on the device."""

import copy
import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import dropmuon_jax as dm
import reference

NUM_LAYERS = 4


def make_layers():
    params = [np.zeros(i + 1, np.float32) for i in range(NUM_LAYERS)]
    return dm.layers_by_path(params, [str(i) for i in range(NUM_LAYERS)])


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
over_distributions = pytest.mark.parametrize("name", DISTRIBUTIONS)


def make_sampler(name, seed=0, **options):
    return dm.DepthSampler(make_layers(), DISTRIBUTIONS[name], seed=seed, **options)


def draw(name, steps, seed=0):
    sampler = make_sampler(name, seed)
    return [sampler.depth(step) for step in steps]


# --- Probabilities --------------------------------------------------------------------------------


@over_distributions
def test_probabilities_sum_to_one_and_inclusion_probabilities_are_their_enumeration(name):
    sampler = make_sampler(name)
    for step in (0, 2500, 10**6):
        probabilities = np.asarray(sampler.probabilities(step), np.float64)
        assert probabilities.sum() == pytest.approx(1, abs=1e-6)
        expected = probabilities @ sampler.subsets
        np.testing.assert_allclose(sampler.inclusion_probabilities(step), expected, atol=1e-6)


def test_epoch_shift_is_its_formula():
    steps = np.array([0, 1, 1234, 2500, 5000, 9999])
    found = jax.vmap(make_sampler("epoch_shift").probabilities)(steps)
    expected = [reference.epoch_shift(step, 5000, NUM_LAYERS, 0.7) for step in steps]
    np.testing.assert_allclose(found, expected, atol=1e-6)


# --- Draws ----------------------------------------------------------------------------------------


@functools.cache
def device_draws(name):
    """The indices of 100,000 steps."""
    return np.asarray(jax.jit(jax.vmap(make_sampler(name).sample))(np.arange(100_000)))


@over_distributions
def test_the_host_draws_what_the_device_draws_in_whatever_order_it_is_asked(name):
    sampler, indices = make_sampler(name), device_draws(name)
    for step in np.random.default_rng(0).permutation(3000).tolist():  # over ends of blocks
        assert sampler.active(step) == tuple(sampler.subsets[indices[step]].tolist())


@over_distributions
def test_a_draw_on_the_device_is_of_few_programs_so_that_a_loop_can_be_ahead_of_it(name):
    """JAX lets 32 of them wait for a device; then the host waits."""
    assert len(jax.make_jaxpr(make_sampler(name).sample)(jnp.int32(7)).eqns) <= 12


@pytest.mark.parametrize("name", ["uniform", "fixed", "independent", "pairs"])
def test_draws_follow_their_probabilities(name):
    sampler = make_sampler(name)
    counts = np.bincount(device_draws(name), minlength=len(sampler.subsets))
    expected = np.asarray(sampler.probabilities(0), np.float64)
    assert (counts[expected == 0] == 0).all()
    drawn = expected > 0
    expected = expected[drawn] / expected[drawn].sum() * counts.sum()
    assert stats.chisquare(counts[drawn], expected).pvalue > 1e-4


@pytest.mark.parametrize("part", [slice(0, 2500), slice(2500, 5000)], ids=["early", "late"])
def test_draws_follow_a_distribution_that_moves_with_the_step(part):
    drawn = np.eye(NUM_LAYERS)[device_draws("epoch_shift")[part]]
    expected = np.stack(
        [reference.epoch_shift(step, 5000, NUM_LAYERS, 0.7) for step in range(5000)[part]]
    )
    # The sum of independent indicators, in units of its standard deviation.
    deviation = np.sqrt(np.sum(expected * (1 - expected), axis=0))
    score = (drawn.sum(axis=0) - expected.sum(axis=0)) / deviation
    assert np.abs(score).max() < 4.5


def test_successive_draws_are_independent():
    drawn = device_draws("uniform")
    table = np.zeros((NUM_LAYERS, NUM_LAYERS))
    np.add.at(table, (drawn[:-1], drawn[1:]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_steps_of_one_draw_share_it_and_a_fixed_rule_needs_no_state():
    sampler, single = make_sampler("uniform", steps_per_draw=4), device_draws("uniform")
    depths = [sampler.depth(step) for step in range(40)]
    assert depths == [single[step // 4] for step in range(40)]
    assert depths == jax.vmap(sampler.sample)(np.arange(40)).tolist()
    # A state is ignored, so that one loop serves all samplers.
    assert sampler.depth(5, opt_state="any") == depths[5]
    moving = make_sampler("epoch_shift", steps_per_draw=1000)
    for step in (999, 1000, 1999):
        expected = reference.epoch_shift(step // 1000 * 1000, 5000, NUM_LAYERS, 0.7)
        np.testing.assert_allclose(moving.probabilities(step), expected, atol=1e-6)


def test_the_link_of_a_chain_draws_as_a_sampler_with_the_same_arguments():
    draws = make_sampler("uniform", seed=5, steps_per_draw=2)
    link = dm.layer_mask_sampler(make_layers(), dm.uniform_depth(), seed=5, steps_per_draw=2)
    assert link.draws == draws
    assert link.depth(9) == draws.depth(9) == link.sample(9)
    assert link.active(9) == draws.active(9)


# The indices that version 0.1 drew in the first 40 steps, with a seed of more than 32 bits.
OLD_SEED = 2**40 + 5
OLD_DRAWS = {
    "uniform": "0020103201220313133201300003323310013002",
    "fixed": "0030203300330303033302300003333300023003",
    "independent": "1131317311331717155312511105733711126113",
    "pairs": "1031205311341525254402501105544520025013",
}


@pytest.mark.parametrize("name", OLD_DRAWS)
def test_a_run_that_was_begun_by_another_process_or_version_goes_on_with_its_draws(name):
    sampler = make_sampler(name, OLD_SEED)
    assert "".join(str(sampler.index(step)) for step in range(40)) == OLD_DRAWS[name]


CONFIGURATIONS = {
    "x64": lambda: jax.enable_x64(True),
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "partitionable": lambda: jax.threefry_partitionable(
        not jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    ),
}


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_draws_do_not_depend_on_the_configuration_of_jax(configuration):
    expected = device_draws("epoch_shift")[:200].tolist()
    with configuration():
        assert draw("epoch_shift", range(200)) == expected
        of_old_seed = draw("uniform", range(40), seed=OLD_SEED)
    assert "".join(map(str, of_old_seed)) == OLD_DRAWS["uniform"]


# --- Where and how often --------------------------------------------------------------------------


def test_the_host_draws_under_a_transfer_guard_and_inside_a_trace():
    sampler, expected = make_sampler("uniform"), device_draws("uniform")
    with jax.transfer_guard("disallow"):
        assert [sampler.depth(step) for step in range(5)] == expected[:5].tolist()
    fresh = make_sampler("uniform")
    assert jax.jit(lambda x: x * fresh.depth(3))(1) == expected[3]


def test_the_host_draws_a_block_with_one_compilation_and_probabilities_may_be_a_list():
    calls = 0

    def probabilities(step, num_layers):
        nonlocal calls
        calls += 1
        return [0.0, 0.0, 0.0, 1.0]

    distribution = dm.LayerDistribution(dm.sampling.depth_subsets, probabilities)
    sampler = dm.DepthSampler(make_layers(), distribution, seed=0)
    calls = 0
    assert [sampler.depth(step) for step in range(4000)] == [3] * 4000
    assert calls == 1  # traced once for all blocks


# --- Draws are values -----------------------------------------------------------------------------


def test_samplers_are_equal_and_hash_alike_by_value_whatever_they_have_drawn():
    samplers, twins = (
        [dm.DepthSampler(make_layers(), of, seed=0) for of in make_distributions().values()]
        for _ in range(2)
    )
    samplers[1].active(3)
    assert samplers == twins
    assert list(map(hash, samplers)) == list(map(hash, twins))
    others = [
        make_sampler("uniform", seed=1),
        make_sampler("uniform", steps_per_draw=2),
        dataclasses.replace(samplers[1], layers=make_layers().group(NUM_LAYERS - 1)),
    ]
    assert len({*samplers, *twins, *others}) == len(samplers) + len(others)


def test_distributions_of_other_arguments_differ():
    assert dm.fixed_depth([0.5, 0.5]) != dm.fixed_depth([0.25, 0.75])
    assert dm.fixed_depth((0.5, 0.5)) == dm.fixed_depth(np.array([1.0, 1.0]) / 2)
    assert dm.epoch_shift_depth(10) != dm.epoch_shift_depth(11)
    assert dm.epoch_shift_depth(10) == dm.epoch_shift_depth(10, alpha=0.5)
    assert dm.time_aware_depth([2, 1]) == dm.time_aware_depth([4.0, 2.0])  # only ratios count
    assert dm.time_aware_depth([2, 1]) != dm.time_aware_depth([3, 1])
    assert dm.time_aware_depth([2, 1]) != dm.time_aware_depth([2, 1], steps_per_plan=5)
    assert len({dm.time_aware_depth([2, 1]), dm.time_aware_depth([4.0, 2.0])}) == 1


def test_a_sampler_cannot_be_changed_and_is_copied_by_value():
    sampler = make_sampler("epoch_shift")
    for field in ("layers", "distribution", "seed", "steps_per_draw"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(sampler, field, 1)
    expected = device_draws("epoch_shift")[:20].tolist()
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert twin == sampler
        assert [twin.depth(k) for k in range(20)] == expected


# --- Seeds ----------------------------------------------------------------------------------------


def test_a_key_is_the_seed_that_it_was_made_of():
    old_key = jax.random.PRNGKey(3)
    for seed in (jax.random.key(3), old_key, np.asarray(old_key), np.int64(3)):
        assert make_sampler("uniform", seed) == make_sampler("uniform", 3)
    words = np.array([5, 7], np.uint32)
    assert make_sampler("uniform", words).seed == (5 << 32) + 7
    assert draw("uniform", range(64), seed=2**64 - 1) != draw("uniform", range(64), seed=2**32 - 1)


@pytest.mark.parametrize("is_split", [False, True])
def test_the_bits_of_a_draw_are_those_of_its_key_with_the_step_folded_in(is_split):
    key = jax.random.key(3, impl="threefry2x32")
    seed = key = jax.random.split(key)[1] if is_split else key
    bits = jax.vmap(lambda k: jax.random.key_data(jax.random.fold_in(key, k))[0])(np.arange(64))
    expected = (np.asarray(bits, np.float64) / 2**32 * NUM_LAYERS).astype(int).tolist()
    assert draw("uniform", range(64), seed=seed) == expected


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_other_generators_are_seeds_of_their_own(impl):
    first, second = (make_sampler("uniform", jax.random.key(seed, impl=impl)) for seed in (0, 1))
    assert first == make_sampler("uniform", jax.random.key(0, impl=impl))
    assert len({first.seed, second.seed, 0, 1}) == 4


def test_arrays_and_traced_keys_are_seeds_for_the_device_and_differ():
    def sample(seed):
        return jax.vmap(make_sampler("uniform", seed).sample)(jnp.arange(50))

    seeds, keys = np.arange(3), jax.random.split(jax.random.key(9), 3)
    of_seeds, of_keys = (np.asarray(jax.vmap(sample)(of)).tolist() for of in (seeds, keys))
    assert len({tuple(row) for row in of_seeds + of_keys}) == 6
    assert of_seeds[0] == device_draws("uniform")[:50].tolist()
    assert of_keys[1] == draw("uniform", range(50), seed=keys[1])
    with pytest.raises(TypeError, match=r"seed is traced.*sampler\.sample"):
        jax.vmap(lambda seed: make_sampler("uniform", seed).depth(0))(seeds)
    for dtype in (jnp.int32, jnp.uint8, np.int64):
        assert make_sampler("uniform", dtype(3)) == make_sampler("uniform", 3)
