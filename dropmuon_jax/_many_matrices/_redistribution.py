"""A stack of matrices brought into a layout, and back.

XLA is told the result only, and from a stack whose matrices are sharded over two axes to one that
is sharded over both along its first dimension it knows no way but to replicate it on every device.
One axis after another, it takes an all-to-all each. Where it is known which axes shard the
matrices, their parts are brought to one dimension first, and all axes take one.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from dropmuon_jax._many_matrices._layouts import Layout

Sides = tuple[tuple[str, ...], ...]
"""The axes that shard each axis of a matrix, or of what will be one."""

_ANY = PartitionSpec.UNCONSTRAINED


def to_layout(stack: Array, layout: Layout, at_rest: int = 0) -> Array:
    """The stack in the layout; both sizes that it shards must be divisible.

    `at_rest` is how many of the axes that share out matrices do so already.
    """
    for placed in _stages(layout, stack.ndim, at_rest):
        stack = _constrain(stack, placed)
    return _constrain(stack, _placed(layout, stack.ndim))


def from_layout(stack: Array, layout: Layout, at_rest: int = 0) -> Array:
    """The stack on its way back: its first axis is still shared out."""
    stack = _constrain(stack, _placed(layout, stack.ndim))
    for placed in reversed(_stages(layout, stack.ndim, at_rest)):
        stack = _constrain(stack, placed)
    return stack


def to_owners(stack: Array, sides: Sides, axes: Mapping[str, int]) -> Array:
    """The stack, shared out along its first axis by all axes that shard its matrices."""
    parts = _with_parts_first(stack, sides, axes)
    parts = _constrain(parts, (None, sum(sides, ()), *(None,) * len(sides)))
    return _without_parts(parts, sides, axes, owners=sum(sides, ()))


def from_owners(stack: Array, sides: Sides, axes: Mapping[str, int]) -> Array:
    """The way back of :func:`to_owners`."""
    stack = _constrain(stack, (sum(sides, ()), *(None,) * len(sides)))
    parts = _with_parts_first(stack, sides, axes, owners=sum(sides, ()))
    parts = _constrain(parts, (sum(sides, ()), None, *(None,) * len(sides)))
    return _without_parts(parts, sides, axes)


def _with_parts_first(
    stack: Array, sides: Sides, axes: Mapping[str, int], *, owners: tuple[str, ...] = ()
) -> Array:
    """From (matrices, *sizes) to (parts, matrices, *sizes of a part), where everything is."""
    counts = [math.prod(axes[name] for name in names) for names in sides]
    count, *sizes = stack.shape
    split = [n for k, size in zip(counts, sizes, strict=True) for n in (k, size // k)]
    stack = stack.reshape(count, *split)
    placed = [entry for names in sides for entry in (() if owners else names, ())]
    stack = _constrain(stack, (owners or None, *(names or None for names in placed)))
    ndim = len(sides)
    order = (*range(1, 2 * ndim, 2), 0, *range(2, 2 * ndim + 1, 2))
    parts = stack.transpose(order).reshape(-1, count, *split[1::2])
    return _constrain(parts, (None if owners else sum(sides, ()), owners or None, *(None,) * ndim))


def _without_parts(
    parts: Array, sides: Sides, axes: Mapping[str, int], *, owners: tuple[str, ...] = ()
) -> Array:
    """The way back of :func:`_with_parts_first`."""
    counts = [math.prod(axes[name] for name in names) for names in sides]
    _, count, *sizes = parts.shape
    ndim = len(sides)
    order = (*range(1, 2 * ndim, 2), 0, *range(2, 2 * ndim + 1, 2))
    stack = parts.reshape(*counts, count, *sizes).transpose(np.argsort(order))
    stack = stack.reshape(count, *(k * n for k, n in zip(counts, sizes, strict=True)))
    return _constrain(
        stack, (owners or None, *(None if owners else names or None for names in sides))
    )


def joined_here(members: list[Array], placement: tuple | None) -> Array:
    """Arrays (batch, …) as one, each device with the parts that it has.

    Where the batch is sharded, and of one size, matrices of one index stay together, so that none
    moves. Where nothing is said, it is taken not to be.
    """
    if placement is None or not placement[0]:
        return _constrain(jnp.concatenate(members), _at_rest(placement))
    joined = _constrain(jnp.stack(members, axis=1), _at_rest(placement, after_batch=(None,)))
    return joined.reshape(-1, *joined.shape[2:])


def with_all_matrices_here(joined: Array) -> Array:
    """The joined arrays, of every matrix a part on each device."""
    return _constrain(joined, (None,))


def with_whole_rows_here(joined: Array) -> Array:
    """The joined arrays, whose last axis has a length that leaves cannot be sharded by."""
    return _constrain(joined, (*(_ANY,) * (joined.ndim - 1), None))


def taken_apart(joined: Array, batches: list[int], placement: tuple | None) -> list[Array]:
    """The arrays of :func:`joined_here`, each device with the parts that it had."""
    if placement is None or not placement[0]:
        joined = _constrain(joined, _at_rest(placement))
        return jnp.split(joined, np.cumsum(batches)[:-1])
    apart = joined.reshape(batches[0], len(batches), *joined.shape[1:])
    apart = _constrain(apart, _at_rest(placement, after_batch=(None,)))
    return [apart[:, i] for i in range(len(batches))]


def _at_rest(placement: tuple | None, after_batch: tuple = ()) -> tuple:
    """What shards each axis, and those that were put in after the first."""
    if placement is None:
        return (None, *after_batch)
    batch, *sides = placement
    return (batch or None, *after_batch, *(side or None for side in sides))


def _placed(layout: Layout, ndim: int) -> tuple:
    """What shards each axis in the layout."""
    return (layout.whole or None, *(None,) * (ndim - 2), layout.sides or None)


def _stages(layout: Layout, ndim: int, at_rest: int) -> list[tuple]:
    """What is placed after each exchange."""
    whole, sides = layout.whole, layout.sides
    stages: list[tuple] = [(whole[: i + 1],) for i in range(max(0, at_rest - 1), len(whole))]
    between = (_ANY,) * (ndim - 2)
    return stages + [(whole or None, *between, sides[: i + 1]) for i in range(len(sides))]


def _constrain(stack: Array, placed: tuple) -> Array:
    """With these axes placed, and the rest where XLA finds it."""
    rest = (_ANY,) * (stack.ndim - len(placed))
    return jax.lax.with_sharding_constraint(stack, PartitionSpec(*placed, *rest))
