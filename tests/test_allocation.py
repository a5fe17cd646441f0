"""Task allocation: exact shares, bounds that hold, records that every worker reads alike."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dropmuon_jax as dm
from allocating.simulation import ORLICZ_NORM, make_workers, simulate

allocation = dm.contrib.allocation
NUM_TASKS = 7
ALLOCATE = jax.jit(allocation.recursive_allocation, static_argnums=1)


def compositions(num_workers, num_tasks):
    for cuts in itertools.combinations_with_replacement(range(num_tasks + 1), num_workers - 1):
        ends = (0, *cuts, num_tasks)
        yield np.diff(ends)


ALL_SHARES = np.array(list(compositions(4, NUM_TASKS)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.7, 11.0]), min_size=4, max_size=4))
def test_shares_are_the_best_of_all(times):
    times = np.array(times, np.float32)
    shares = np.asarray(ALLOCATE(times, NUM_TASKS))
    assert shares.sum() == NUM_TASKS
    assert shares.min() >= 0
    assert (shares * times).max() == (ALL_SHARES * times).max(1).min()
    if times.min() > 0:
        assert (shares * times).max() >= NUM_TASKS / (1 / times).sum() * (1 - 1e-6)


def test_what_is_free_is_spread():
    np.testing.assert_array_equal(allocation.recursive_allocation(jnp.zeros(3), 7), [3, 2, 2])
    times = jnp.array([0.0, 1.0, 0.0])
    np.testing.assert_array_equal(allocation.recursive_allocation(times, 5), [3, 0, 2])


def run(allocator, speeds, num_iterations, record=None):
    record = allocator.init() if record is None else record
    allocate, update = jax.jit(allocator.allocate), jax.jit(allocator.update)
    shares = []
    for _ in range(num_iterations):
        shares.append(np.asarray(allocate(record)))
        record = update(record, shares[-1], shares[-1] * speeds)
    return np.array(shares), record


ALLOCATORS = {
    "ATA": lambda **options: allocation.ata(4, 12, alpha=0.1, **options),
    "ATA-Empirical": lambda **options: allocation.ata_empirical(4, 12, eta=0.1, **options),
}
SPEEDS = np.array([1.0, 2.0, 3.0, 4.0], np.float32)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_steady_workers_get_the_best_shares_soon(name):
    shares, record = run(ALLOCATORS[name](), SPEEDS, 40)
    best = allocation.recursive_allocation(jnp.asarray(SPEEDS), 12)
    assert (shares[:1] > 0).all()
    assert (shares.sum(1) == 12).all()
    np.testing.assert_array_equal((shares[-1] * SPEEDS).max(), (best * SPEEDS).max())
    assert record.count == 40
    np.testing.assert_allclose(record.num_tasks, shares.sum(0))
    np.testing.assert_allclose(record.total, shares.sum(0) * SPEEDS)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_worker_that_becomes_slow_is_found_out_where_the_past_counts_less(name):
    _, before = run(ALLOCATORS[name](), SPEEDS, 60)
    slow = np.array([8.0, 2.0, 3.0, 4.0], np.float32)
    kept, _ = run(ALLOCATORS[name](), slow, 12, before)
    _, before = run(ALLOCATORS[name](decay=0.7), SPEEDS, 60)
    found, _ = run(ALLOCATORS[name](decay=0.7), slow, 12, before)
    assert (found[-4:] * slow).max(1).mean() < 0.75 * (kept[-4:] * slow).max(1).mean()


def test_lower_bounds_hold():
    """That a mean lies below its bound in any iteration is as rare as promised: once in 2k²."""
    alpha, allocator = ORLICZ_NORM, allocation.ata(1, 3, alpha=ORLICZ_NORM)

    def deviations(key):
        def iteration(record, key):
            times = jax.random.exponential(key, (3,)).sum()[None]
            record = allocator.update(record, allocator.allocate(record), times)
            ratio = (jnp.log(2.0) + 2 * jnp.log(record.count + 1.0)) / record.num_tasks
            width = alpha * (jnp.sqrt(8 * ratio) + ratio)
            return record, (record.total / record.num_tasks - width)[0]

        return jax.lax.scan(iteration, allocator.init(), jax.random.split(key, 200))[1]

    bounds = jax.jit(jax.vmap(deviations))(jax.random.split(jax.random.key(0), 200))
    assert (bounds <= 1).all()
    assert bounds[:, -1].mean() > 0  # and says something


def test_what_is_not_known_is_tried_and_fast_workers_are_preferred():
    shares, _ = run(allocation.ata_empirical(9, 4, eta=0.1), np.arange(1.0, 10.0), 30)
    np.testing.assert_array_equal(shares[:3].sum(0)[3:], 1)  # one task each, not all of them
    assert shares[2, :3].sum() == 3
    assert shares[-10:, :3].sum() > shares[-10:, 3:].sum()


def test_every_worker_computes_the_same_from_a_record_that_was_saved():
    allocator = ALLOCATORS["ATA-Empirical"]()
    _, record = run(allocator, SPEEDS, 9)
    saved = jax.tree.map(np.asarray, record)
    restored = allocation.TaskTimes(*map(jnp.asarray, saved))
    for allocate in (allocator.allocate, jax.jit(allocator.allocate)):
        np.testing.assert_array_equal(allocate(restored), allocator.allocate(record))


def test_times_of_workers_without_tasks_do_not_count():
    allocator = ALLOCATORS["ATA"]()
    shares = jnp.array([12, 0, 0, 0])
    record = allocator.update(allocator.init(), shares, jnp.array([6.0, 9.0, jnp.nan, 1.0]))
    np.testing.assert_array_equal(record.total, [6, 0, 0, 0])


def test_simulated_workers_have_the_means_that_the_best_shares_know():
    for kind in ("sqrt", "linear", "mixture"):
        workers = make_workers(kind, 7)
        drawn = workers.draw(jax.random.key(0), 20_000)
        np.testing.assert_allclose(drawn.mean(1), workers.means, rtol=0.05)
        assert drawn.min() >= 0


def test_the_orlicz_norm_of_an_exponential():
    x, step = np.linspace(0, 60, 600_001, retstep=True)
    at_most_2 = (np.exp(np.abs(x - 1) / ORLICZ_NORM - x)).sum() * step
    assert at_most_2 == pytest.approx(2, abs=0.01)


def test_adaptive_shares_waste_less_than_greedy_ones_and_are_nearly_the_best():
    workers = make_workers("sqrt", 30)
    found = {
        method: simulate(method, workers, 5, 400, (0, 1), 0.1)
        for method in ("greedy", "uniform", "ATA-Empirical", "best")
    }
    time = {method: of["time"][:, -1].mean() for method, of in found.items()}
    spent = {method: of["worker_time"][:, -1].mean() for method, of in found.items()}
    assert time["greedy"] < time["best"] < time["ATA-Empirical"] < 1.5 * time["best"]
    assert spent["ATA-Empirical"] < 0.5 * spent["greedy"]
    np.testing.assert_allclose(spent["greedy"], 30 * time["greedy"], rtol=1e-4)
    assert (found["best"]["regret"] == 0).all()
    assert (np.diff(found["ATA-Empirical"]["regret"], axis=1) >= -1e-2).all()


def seen(num_workers, times):
    """The record after an iteration with two tasks each."""
    allocator = allocation.ata_empirical(num_workers, 4)
    return allocator.update(allocator.init(), jnp.full(num_workers, 2), times)


def test_a_time_of_a_worker_without_tasks_does_not_count_whatever_it_is():
    allocator = allocation.ata_empirical(2, 4)
    record = allocator.update(allocator.init(), jnp.array([4, 0]), jnp.array([2.0, jnp.nan]))
    np.testing.assert_array_equal(record.total, [2.0, 0.0])


ERRORS = {
    "num_workers must be at least 1": lambda: allocation.uniform_allocation(0, 3),
    "num_tasks must be a Python integer": lambda: allocation.recursive_allocation(jnp.ones(2), 1.5),
    "task_times must be a vector": lambda: allocation.recursive_allocation(jnp.ones((2, 2)), 3),
    "alpha must be positive": lambda: allocation.ata(2, 3, alpha=0.0),
    "eta must be positive": lambda: allocation.ata_empirical(2, 3, eta=-1.0),
    "width must be positive": lambda: allocation.ata_empirical(2, 3, width=0.0),
    "decay is the weight of older times": lambda: allocation.ata_empirical(2, 3, decay=0.0),
    "task_times must be at least 0, got nan of worker 1": lambda: allocation.recursive_allocation(
        jnp.array([1.0, jnp.nan]), 3
    ),
    "times must be at least 0, got -1.0 of worker 0": lambda: seen(2, [-1.0, 2.0]),
    r"times must be of 2 workers, got shape \(\)": lambda: seen(2, 3.0),
    r"record must be of 3 workers, got shape \(2,\)": lambda: allocation.ata(
        3, 4, alpha=1.0
    ).allocate(allocation.ata(2, 4, alpha=1.0).init()),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_makes_no_sense_is_refused_by_name(message):
    with pytest.raises((TypeError, ValueError), match=message):
        ERRORS[message]()
