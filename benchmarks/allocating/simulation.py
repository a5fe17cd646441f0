"""Simulated workers: what iterations take with shares that somebody chooses, and with none."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import dropmuon_jax as dm

allocation = dm.contrib.allocation
# Of an exponential of mean 1, less its mean: E exp(|X - 1| / c) = 2.
ORLICZ_NORM = 1.53
SHAPES = 5  # of a mixture of distributions


class Workers(NamedTuple):
    """How long tasks take."""

    means: np.ndarray
    eta: float
    """The largest Orlicz norm relative to the mean."""
    draw: Callable[[PRNGKeyArray, int], Float[Array, "workers tasks"]]
    """The times of so many tasks of each worker, if it did them."""

    @property
    def alpha(self) -> float:
        """The largest Orlicz norm."""
        return self.eta * float(self.means.max())


def make_workers(kind: str, count: int) -> Workers:
    """Of times 29√i + Exp(29√i), 29 i + Exp(29 i), or of five distributions by turns."""
    index = np.arange(1, count + 1)
    means = 58.0 * (index if kind == "linear" else np.sqrt(index))
    scale = jnp.asarray(means, jnp.float32)[:, None]

    def shifted(key: PRNGKeyArray, tasks: int) -> Array:
        return scale / 2 * (1 + jax.random.exponential(key, (count, tasks)))

    def mixed(key: PRNGKeyArray, tasks: int) -> Array:
        keys, shape = jax.random.split(key, SHAPES), (count, tasks)
        normal = jax.random.normal(keys[2], shape)
        drawn = jnp.stack(  # each of mean 1
            [
                jax.random.exponential(keys[0], shape),
                2 * jax.random.uniform(keys[1], shape),
                jnp.abs(normal) * np.sqrt(np.pi / 2),
                jnp.exp(0.5 * jax.random.normal(keys[3], shape) - 0.125),
                jax.random.gamma(keys[4], 2.0, shape) / 2,
            ]
        )
        return scale * jnp.take_along_axis(drawn, (index % SHAPES)[None, :, None], 0)[0]

    # The mixture has log-normal times, which have no Orlicz norm; that of its exponential is used.
    return Workers(
        means, *((ORLICZ_NORM, mixed) if kind == "mixture" else (ORLICZ_NORM / 2, shifted))
    )


def simulate(
    method: str, workers: Workers, num_tasks: int, num_iterations: int, seeds: Any, width: float
) -> dict[str, np.ndarray]:
    """Time, worker time and regret after each iteration, (seeds, iterations).

    The greedy method keeps all workers busy until so many results are in; what the others have
    begun is thrown away, and they begin anew.
    """
    count = len(workers.means)
    means = jnp.asarray(workers.means, jnp.float32)
    best = allocation.recursive_allocation(means, num_tasks)
    lowest = jnp.max(best * means)
    fixed = {"best": best, "uniform": allocation.uniform_allocation(count, num_tasks)}
    allocator = {
        "ATA": functools.partial(allocation.ata, alpha=workers.alpha, width=width),
        "ATA-Empirical": functools.partial(allocation.ata_empirical, eta=workers.eta, width=width),
    }.get(method, functools.partial(allocation.ata_empirical))(count, num_tasks)

    def iteration(carry: Any, key: PRNGKeyArray) -> Any:
        record, total = carry
        ends = jnp.cumsum(workers.draw(key, num_tasks), 1)
        if method == "greedy":
            time = -jax.lax.top_k(-ends.ravel(), num_tasks)[0][-1]
            now = jnp.stack([time, count * time, 0.0])
        else:
            shares = fixed.get(method)
            shares = allocator.allocate(record) if shares is None else shares
            last = jnp.maximum(shares - 1, 0)[:, None]
            times = jnp.where(shares > 0, jnp.take_along_axis(ends, last, 1)[:, 0], 0)
            record = allocator.update(record, shares, times)
            now = jnp.stack([times.max(), times.sum(), jnp.max(shares * means) - lowest])
        return (record, total + now), total + now

    def run(seed: Array) -> Array:
        keys = jax.random.split(jax.random.key(seed), num_iterations)
        return jax.lax.scan(iteration, (allocator.init(), jnp.zeros(3)), keys)[1]

    found = np.asarray(jax.jit(jax.vmap(run))(jnp.asarray(seeds, jnp.uint32)), np.float64)
    return dict(zip(("time", "worker_time", "regret"), np.moveaxis(found, -1, 0), strict=True))
