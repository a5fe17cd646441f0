"""Depth distributions and the sampler: laws of the draws, on the host and on the device."""

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


DISTRIBUTIONS = {
    "full": dm.full_depth(),
    "uniform": dm.uniform_depth(),
    "fixed": dm.fixed_depth([0.4, 0.0, 0.1, 0.5]),
    "epoch_shift": dm.epoch_shift_depth(num_steps=5000, alpha=0.7),
    "independent": dm.independent_layers([0.2, 1.0, 0.5, 0.9]),
    "pairs": dm.fixed_size_subsets(2),
}


def make_sampler(name, seed=0):
    return dm.layer_mask_sampler(make_layers(), DISTRIBUTIONS[name], seed=seed)


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
    distribution = dm.LayerDistribution(dm.depth_subsets, lambda step, b: [0.0, 0.0, 0.0, 1.0])
    sampler = dm.layer_mask_sampler(make_layers(), distribution, seed=0)
    assert [sampler.depth(step) for step in range(20)] == [3] * 20


def test_a_wrapped_optimizer_gets_its_draws_back():
    sampler = make_sampler("uniform")
    chained = sampler.attach_to(optax.chain(optax.clip(1.0), sampler))
    assert [chained.depth(k) for k in range(20)] == draw("uniform", range(20))
    updates = [jnp.full(i + 1, 5.0) for i in range(NUM_LAYERS)]
    clipped, _ = chained.update(
        updates, chained.init(updates), layer_mask=sampler.layers.mask(NUM_LAYERS - 1)
    )
    assert [float(u[0]) for u in clipped] == [0, 0, 0, 1]


def test_another_process_draws_the_same():
    program = (
        "import jax.numpy as jnp, dropmuon_jax as dm\n"
        "layers = dm.layers_by_path([jnp.zeros(i + 1) for i in range(4)], list('0123'))\n"
        "sampler = dm.layer_mask_sampler(layers, dm.uniform_depth(), seed=11)\n"
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

    distribution = dm.LayerDistribution(dm.depth_subsets, probabilities)
    sampler = dm.layer_mask_sampler(make_layers(), distribution, seed=0)
    calls = 0
    for step in range(4000):
        sampler.depth(step)
    assert calls <= 2  # traced once for all blocks: for the draw, and to check it


def test_the_host_draws_inside_a_trace():
    sampler = make_sampler("uniform")

    @jax.jit
    def traced(x):
        return x * sampler.depth(3)

    assert int(traced(jnp.int32(1))) == make_sampler("uniform").depth(3)


def test_depths_can_differ_between_traced_seeds():
    def sample(seed):
        sampler = dm.layer_mask_sampler(make_layers(), dm.uniform_depth(), seed=seed)
        return jax.vmap(sampler.sample)(jnp.arange(50))

    drawn = jax.vmap(sample)(jnp.arange(3))
    assert len({tuple(row) for row in np.asarray(drawn).tolist()}) == 3
    assert np.asarray(drawn[2]).tolist() == draw("uniform", range(50), seed=2)


def test_the_state_counts_the_steps():
    sampler, updates = make_sampler("uniform"), [jnp.ones(i + 1) for i in range(NUM_LAYERS)]
    state = sampler.init(updates)
    for step in range(3):
        assert int(state.count) == step
        _, state = sampler.update(updates, state, layer_mask=sampler.layers.mask(2))
    assert int(state.count) == 3
