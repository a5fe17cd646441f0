"""Task allocation: how many micro-batches each worker gets, where speeds are unequal and unknown.

B tasks are shared out in each iteration, which ends when the last worker is done with its own. An
allocator looks at the times that were seen so far: pure functions of a small record, from which
every worker computes the same allocation.

    Maranjyan, El Mehdi Saad, Richtárik, Orabona, *ATA: Adaptive Task Allocation for Efficient
    Resource Management in Distributed Machine Learning*, 2025, arXiv:2502.00775.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from dropmuon_jax._checks import check_positive, is_python_number, static_int

Shares = Int[Array, " workers"]
"""How many tasks each worker gets."""


class TaskTimes(NamedTuple):
    """What is known of the workers; it goes into checkpoints."""

    num_tasks: Float[Array, " workers"]
    """How many times were seen of each, the older ones with less weight if `decay` is below 1."""
    total: Float[Array, " workers"]
    """Their sum, in the unit of what was given, with the same weights."""
    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of iterations."""


class Allocator(NamedTuple):
    """Three pure functions, which can be jitted and scanned."""

    init: Callable[[], TaskTimes]
    """The record before the first iteration."""
    allocate: Callable[[TaskTimes], Shares]
    """The shares of the next iteration, which sum to the number of tasks."""
    update: Callable[[TaskTimes, Shares, Float[Array, " workers"]], TaskTimes]
    """The record after an iteration, from the shares and the time that each worker took for all of
    its own; of a worker without tasks it does not count. An error for other shapes, and outside of
    `jax.jit` for times that are negative or NaN."""


def recursive_allocation(task_times: Float[Array, " workers"], num_tasks: int) -> Shares:
    r"""Shares a with :math:`\sum_i a_i = B` and the smallest :math:`\max_i a_i s_i`.

    One task after the other goes to the worker that would be done with it first, which is exact;
    of equal ones to that with the fewest, so that workers of time 0 share what is free.

    Args:
        task_times: s, the time that a task takes each worker, at least 0.
        num_tasks: B. Static.

    Returns:
        The shares.

    Raises:
        TypeError: If `num_tasks` is no Python integer.
        ValueError: Without tasks or without workers, and outside of `jax.jit` for a negative time
            or NaN.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> times = jnp.array([1.0, 2.0, 4.0])
        >>> print(dm.contrib.allocation.recursive_allocation(times, 7))
        [4 2 1]

    References:
        Maranjyan et al., 2025, arXiv:2502.00775, whose Recursive Allocation Selection is as exact
        and has a cost of n ln min(B, n) + min(B, n)², as a secondary source tells; this one costs
        nB, in vector operations. The rule for equal ones is ours.
    """
    static_int("num_tasks", num_tasks, minimum=1)
    task_times = jnp.asarray(task_times)
    if task_times.ndim != 1 or not task_times.size:
        raise ValueError(
            f"task_times must be a vector, of one worker at least, got shape {task_times.shape}."
        )
    _check_times("task_times", task_times)
    return _share(task_times, num_tasks, jnp.zeros(task_times.shape, bool))


def _share(
    task_times: Float[Array, " workers"], num_tasks: int, is_new: Bool[Array, " workers"]
) -> Shares:
    """One task after the other to who would be done with it first; the first of the new is free."""

    def give(_: int, shares: Shares) -> Shares:
        done = (shares + 1).astype(task_times.dtype) * task_times
        done = jnp.where(is_new & (shares == 0), 0, done)
        fewest = jnp.where(done == done.min(), shares, num_tasks)
        return shares.at[jnp.argmin(fewest)].add(1)

    return jax.lax.fori_loop(0, num_tasks, give, jnp.zeros(task_times.shape, jnp.int32))


def uniform_allocation(num_workers: int, num_tasks: int) -> Shares:
    """Equal shares; of a rest one more for the first ones.

    Examples:
        >>> import dropmuon_jax as dm
        >>> print(dm.contrib.allocation.uniform_allocation(3, 7))
        [3 2 2]
    """
    return recursive_allocation(jnp.ones(_num_workers(num_workers)), num_tasks)


def ata(
    num_workers: int, num_tasks: int, *, alpha: float, width: float = 1.0, decay: float = 1.0
) -> Allocator:
    r"""Allocates by lower bounds of the mean times, from an absolute bound of their spread.

    .. math::
        s_i = \Bigl(\hat\mu_i - \alpha \Bigl(\sqrt{8 L / K_i} + L / K_i\Bigr)\Bigr)_+, \qquad
        L = \ln 2k^2

    in iteration k, with the mean of the K_i times seen of worker i; the shares are
    :func:`recursive_allocation` of s. A worker that is not known well counts as fast, and so
    becomes known. One of which no time was seen is free for one task, and as slow as the slowest
    for more: as free for all, a slow one would get every task of an iteration.

    Args:
        num_workers: How many there are. Static.
        num_tasks: B, how many tasks an iteration has. Static.
        alpha: The largest Orlicz norm of the times, inf {c: E exp(\|X - μ\| / c) ≤ 2}; of an
            exponential of mean m about 1.53 m. In the unit of the times.
        width: What the interval is multiplied with. Below 1 it explores less, without guarantee.
        decay: The weight of older times, each iteration, in (0, 1]. Below 1, workers whose speed
            changes are found out, and all are tried again and again.

    Returns:
        An :class:`Allocator`.

    Raises:
        TypeError: If a count is no Python integer.
        ValueError: For numbers out of range.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> allocator = dm.contrib.allocation.ata(3, 6, alpha=0.1)
        >>> record, speeds = allocator.init(), jnp.array([1.0, 2.0, 9.0])
        >>> for _ in range(20):
        ...     shares = allocator.allocate(record)
        ...     record = allocator.update(record, shares, shares.astype(float) * speeds)
        >>> print(shares)
        [4 2 0]

    References:
        Maranjyan et al., 2025, arXiv:2502.00775, as secondary sources tell: the lower bounds, and
        that the total time is at most (1 + 4η ln B) times that of the best fixed shares, and a
        logarithm of the iterations. The constants of the interval are derived here, from E\|Y\|^m ≤
        2 m! α^m and Bernstein's inequality; what new workers get, `width` and `decay` are ours.
    """
    check_positive("alpha", alpha)

    def lower_bound(mean: Array, interval: Array) -> Array:
        return jnp.maximum(mean - alpha * interval, 0)

    return _allocator(num_workers, num_tasks, lower_bound, width, decay)


def ata_empirical(
    num_workers: int,
    num_tasks: int,
    *,
    eta: float = 1.0,
    width: float = 1.0,
    decay: float = 1.0,
) -> Allocator:
    r"""The same from a relative bound of the spread: worker by worker, without a unit.

    .. math::
        s_i = \frac{\hat\mu_i}{1 + \eta w_i}, \qquad w_i = \sqrt{8 L / K_i} + L / K_i

    Slow workers, whose times spread most, do not make the intervals of fast ones wide.

    Args:
        num_workers: How many there are. Static.
        num_tasks: B, how many tasks an iteration has. Static.
        eta: The largest α_i / μ_i; about 1 for times that spread like their means, and the smaller
            the steadier they are.
        width: What w is multiplied with, as in :func:`ata`.
        decay: The weight of older times, as in :func:`ata`.

    Returns:
        An :class:`Allocator`.

    Raises:
        TypeError: If a count is no Python integer.
        ValueError: For numbers out of range.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> allocator = dm.contrib.allocation.ata_empirical(3, 6, eta=0.1)
        >>> print(allocator.allocate(allocator.init()))  # nothing is known
        [2 2 2]

    References:
        ATA-Empirical of Maranjyan et al., 2025, arXiv:2502.00775, of which the exact interval was
        not seen: this one follows from \|μ̂ - μ\| ≤ η μ w.
    """
    check_positive("eta", eta)

    def lower_bound(mean: Array, interval: Array) -> Array:
        return mean / (1 + eta * interval)

    return _allocator(num_workers, num_tasks, lower_bound, width, decay)


def _allocator(
    num_workers: int,
    num_tasks: int,
    lower_bound: Callable[[Array, Array], Array],
    width: float,
    decay: float,
) -> Allocator:
    _num_workers(num_workers)
    static_int("num_tasks", num_tasks, minimum=1)
    check_positive("width", width)
    if not is_python_number(decay) or not 0 < decay <= 1:
        raise ValueError(
            f"decay is the weight of older times, in (0, 1], got {decay}. For 0, that of the last "
            "iteration alone, there would be no times of workers without tasks."
        )

    def check_sizes(**arrays: Array) -> None:
        for name, x in arrays.items():
            if x.shape != (num_workers,):
                raise ValueError(f"{name} must be of {num_workers} workers, got shape {x.shape}.")

    def init() -> TaskTimes:
        nothing = jnp.zeros(num_workers)
        return TaskTimes(nothing, nothing, jnp.zeros((), jnp.int32))

    def allocate(record: TaskTimes) -> Shares:
        check_sizes(record=record.total)
        seen, dtype = record.num_tasks > 0, record.total.dtype
        num_tasks_seen = jnp.where(seen, record.num_tasks, 1)
        iteration = (record.count + 1).astype(dtype)
        logarithm = float(np.log(2)) + 2 * jnp.log(iteration)
        ratio = logarithm / num_tasks_seen
        interval = width * (jnp.sqrt(8 * ratio) + ratio)
        bound = lower_bound(record.total / num_tasks_seen, interval)
        slowest = jnp.max(jnp.where(seen, bound, 0))
        return _share(jnp.where(seen, bound, slowest), num_tasks, ~seen)

    def update(record: TaskTimes, shares: Shares, times: Array) -> TaskTimes:
        dtype = record.total.dtype
        shares, times = jnp.asarray(shares), jnp.asarray(times)
        check_sizes(record=record.total, shares=shares, times=times)
        times = jnp.where(shares > 0, times.astype(dtype), 0)
        _check_times("times", times)
        return TaskTimes(
            decay * record.num_tasks + shares.astype(dtype),
            decay * record.total + times,
            record.count + 1,
        )

    return Allocator(init, allocate, update)


def _check_times(name: str, times: Array) -> None:
    """Error for times that are known to be negative or NaN: their worker would get every task."""
    if isinstance(times, Tracer) or not times.is_fully_addressable:
        return
    if bad := np.flatnonzero(~(np.asarray(times) >= 0)).tolist():
        raise ValueError(
            f"{name} must be at least 0, got {times[bad[0]]} of worker {bad[0]}. Infinity is a "
            "worker that is gone."
        )


def _num_workers(num_workers: int) -> int:
    return static_int("num_workers", num_workers, minimum=1)
