"""Matrices brought into a layout and back, and the owners that share them out.

XLA is told the result only, and from a stack whose matrices are sharded over two axes to one that
is sharded over both along its first dimension it knows no way but to replicate it on every device.
One axis after another, it takes an all-to-all each. Where it is known which axes shard the
matrices, their parts are brought to one dimension first, and all axes take one all-to-all.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Int

from dropmuon_jax.layers.matrices import MatrixAxes
from dropmuon_jax.sharding.layouts import (
    BlockSharding,
    Kind,
    Layout,
    LeafSharding,
    axes_size,
    axis_names,
)

Sides = tuple[tuple[str, ...], ...]
"""The axes of a mesh that shard each axis of a matrix, whose fan-in may have several."""

_ANY = PartitionSpec.UNCONSTRAINED


def to_blocks(
    leaf: jax.Array, axes: MatrixAxes, sharding: LeafSharding | None = None
) -> tuple[jax.Array, Kind, Callable[[jax.Array], jax.Array]]:
    """The matrices of a leaf before their axes are merged, so that axes are still sharded.

    Args:
        leaf: The leaf.
        axes: Its fan-in and fan-out.
        sharding: Its sharding, or None where it is not known.

    Returns:
        The array (batch, *fan_in, *fan_out), its kind, and the way back from such an array.
    """
    batch = _batch_axes(axes, leaf.ndim, sharding.spec if sharding else PartitionSpec())
    order = batch + axes.fan_in + axes.fan_out
    moved = leaf.transpose(order)
    size = math.prod(leaf.shape[axis] for axis in batch)
    kind = Kind(len(axes.fan_in))
    if sharding is not None:
        kind = Kind(kind.num_in, block_sharding(axes, sharding.spec), sharding.stack_axes)

    def restore(array: jax.Array) -> jax.Array:
        return array.reshape(moved.shape).transpose(np.argsort(order))

    return moved.reshape(size, *moved.shape[len(batch) :]), kind, restore


def block_sharding(axes: MatrixAxes, spec: PartitionSpec) -> BlockSharding:
    """The axes of a mesh that shard each axis of the blocks of a leaf with this sharding."""
    matrix = axes.fan_in + axes.fan_out
    ndim = max(len(spec), *(axis + 1 for axis in matrix))
    entries = [axis_names(entry) for entry in (*spec, *(None,) * ndim)]
    batch = _batch_axes(axes, ndim, spec)
    return entries[batch[0]] if batch else (), *(entries[axis] for axis in matrix)


def _batch_axes(axes: MatrixAxes, ndim: int, spec: PartitionSpec) -> tuple[int, ...]:
    """The batch axes, a sharded one first: once they are merged, it alone is still sharded."""
    batch = [axis for axis in range(ndim) if axis not in axes.fan_in + axes.fan_out]
    return tuple(sorted(batch, key=lambda axis: not (axis < len(spec) and spec[axis])))


class Owners:
    """Shares out buckets of matrices, one after another, to the devices with the least work so far.

    It is the longest-processing-time rule of scheduling if the largest matrices come first.
    """

    def __init__(self, axes: Mapping[str, int]):
        self._names = list(axes)
        self._work = np.zeros(tuple(axes.values()))

    def share_out(
        self, count: int, cost: float, names: tuple[str, ...]
    ) -> tuple[Int[np.ndarray, "owners places"], Bool[np.ndarray, " owners"]]:
        """The matrices of each owner, and which owners have their last place filled.

        Args:
            count: The number of matrices, all of one shape.
            cost: The cost of one of them, in any unit.
            names: The axes whose devices are owners, the major one first.

        Returns:
            Indices of matrices: each occurs once, and an empty place has some index besides. And
            whether the last place of each owner is filled; all other places are.
        """
        others = [i for i, name in enumerate(self._names) if name not in names]
        order = [self._names.index(name) for name in names] + others
        work = self._work.transpose(order)  # a view
        sizes = work.shape[: len(names)]
        owners = math.prod(sizes)
        each, left = divmod(count, owners)
        places = each + (left > 0)
        busy = work.reshape(owners, -1).max(axis=1)
        filled = np.full(owners, left == 0)
        filled[np.argsort(busy, kind="stable")[:left]] = True
        counts = np.where(filled, places, places - 1)
        work += (counts * cost).reshape(*sizes, *(1,) * len(others))
        starts = np.cumsum(counts) - counts
        matrices = np.minimum(starts[:, None] + np.arange(places), count - 1)
        return matrices, filled


def in_layout(
    function: Callable[[Array], Array],
    joined: Array,
    layout: Layout,
    axes: Mapping[str, int],
    owners: Owners,
    cost: float,
    sharding: BlockSharding | None,
) -> Array:
    """`function` of the matrices, each where the layout has it."""
    count, num_cols = len(joined), joined.shape[-1]
    matrices, filled = owners.share_out(count, cost, layout.owner_axes)
    places = matrices.shape[1]
    at_rest, sides = 0, None
    if sharding is not None:
        of_batch, *of_sides = sharding
        at_rest = len(of_batch) if layout.owner_axes[: len(of_batch)] == of_batch else 0
        is_exchange = not of_batch and layout.owner_axes == sum(of_sides, ())
        sides = tuple(of_sides) if is_exchange else None
    if not filled.all():
        joined, at_rest = joined[matrices.reshape(-1)], 0
    # Columns of zeros change neither XXᵀ nor the others.
    padding = -num_cols % axes_size(axes, layout.row_axes)
    if padding:
        joined = jnp.pad(joined, [(0, 0)] * (joined.ndim - 1) + [(0, padding)])

    def of_one_owner(stack: Array) -> Array:
        if filled.all():
            return function(stack)
        has_last = jnp.asarray(filled)[jax.lax.axis_index(layout.owner_axes)]
        last = jax.lax.cond(has_last, function, lambda x: x, stack[-1:])
        return jnp.concatenate([function(stack[:-1]), last]) if places > 1 else last

    placed = _to_owners(joined, sides, axes) if sides else _to_layout(joined, layout, at_rest)
    if layout.owner_axes:
        of_owner = PartitionSpec(layout.owner_axes)
        placed = jax.shard_map(
            of_one_owner,
            in_specs=of_owner,
            out_specs=of_owner,
            axis_names=set(layout.owner_axes),
            # Inside a user's own, which may check how values vary, this one has to say it too.
            check_vma=AxisType.Manual in (jax.sharding.get_abstract_mesh().axis_types or ()),
        )(placed)
    else:
        placed = function(placed)
    result = _from_owners(placed, sides, axes) if sides else _from_layout(placed, layout, at_rest)
    if padding:
        result = _with_whole_rows_here(result)[..., :num_cols]
    if filled.all():
        return result
    result = _with_all_matrices_here(result)
    place_of = np.zeros(count, int)
    taken = np.arange(places) < np.where(filled, places, places - 1)[:, None]
    place_of[matrices[taken]] = np.flatnonzero(taken)
    return result[place_of]


def _to_layout(stack: Array, layout: Layout, at_rest: int = 0) -> Array:
    """The stack in the layout; both sizes that it shards must be divisible.

    Args:
        stack: The stack.
        layout: The layout.
        at_rest: How many of the axes that share out matrices in the layout do so already.
    """
    for placed in _stages(layout, stack.ndim, at_rest):
        stack = _constrain(stack, placed)
    return _constrain(stack, _placed(layout, stack.ndim))


def _from_layout(stack: Array, layout: Layout, at_rest: int = 0) -> Array:
    """The way back of :func:`_to_layout`, on which the first axis is still shared out."""
    stack = _constrain(stack, _placed(layout, stack.ndim))
    for placed in reversed(_stages(layout, stack.ndim, at_rest)):
        stack = _constrain(stack, placed)
    return stack


def _to_owners(stack: Array, sides: Sides, axes: Mapping[str, int]) -> Array:
    """The stack, shared out along its first axis by all axes that shard its matrices."""
    parts = _with_parts_first(stack, sides, axes)
    parts = _constrain(parts, (None, sum(sides, ()), *(None,) * len(sides)))
    return _without_parts(parts, sides, axes, owners=sum(sides, ()))


def _from_owners(stack: Array, sides: Sides, axes: Mapping[str, int]) -> Array:
    """The way back of :func:`_to_owners`."""
    stack = _constrain(stack, (sum(sides, ()), *(None,) * len(sides)))
    parts = _with_parts_first(stack, sides, axes, owners=sum(sides, ()))
    parts = _constrain(parts, (sum(sides, ()), None, *(None,) * len(sides)))
    return _without_parts(parts, sides, axes)


def _with_parts_first(
    stack: Array, sides: Sides, axes: Mapping[str, int], *, owners: tuple[str, ...] = ()
) -> Array:
    """From (matrices, *sizes) to (parts, matrices, *sizes of a part), without an exchange."""
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


def joined_here(members: list[Array], sharding: BlockSharding | None) -> Array:
    """Arrays (batch, …) as one, each device with the parts that it has.

    Where the batch is sharded, and of one size, matrices of one index stay together, so that no
    matrix is exchanged. Where the sharding is not known, the batch is taken not to be sharded.
    """
    if sharding is None or not sharding[0]:
        return _constrain(jnp.concatenate(members), _at_rest(sharding))
    joined = _constrain(jnp.stack(members, axis=1), _at_rest(sharding, after_batch=(None,)))
    return joined.reshape(-1, *joined.shape[2:])


def taken_apart(joined: Array, batches: list[int], sharding: BlockSharding | None) -> list[Array]:
    """The arrays of :func:`joined_here`, each device with the parts that it had."""
    if sharding is None or not sharding[0]:
        joined = _constrain(joined, _at_rest(sharding))
        return jnp.split(joined, np.cumsum(batches)[:-1])
    apart = joined.reshape(batches[0], len(batches), *joined.shape[1:])
    apart = _constrain(apart, _at_rest(sharding, after_batch=(None,)))
    return [apart[:, i] for i in range(len(batches))]


def _with_all_matrices_here(joined: Array) -> Array:
    """The joined arrays, of every matrix a part on each device."""
    return _constrain(joined, (None,))


def _with_whole_rows_here(joined: Array) -> Array:
    """The joined arrays, whose last axis has a length that leaves cannot be sharded by."""
    return _constrain(joined, (*(_ANY,) * (joined.ndim - 1), None))


def _at_rest(sharding: BlockSharding | None, after_batch: tuple = ()) -> tuple:
    """The axes that shard each axis of the blocks, and those of axes inserted after the first."""
    if sharding is None:
        return (None, *after_batch)
    batch, *sides = sharding
    return (batch or None, *after_batch, *(side or None for side in sides))


def _placed(layout: Layout, ndim: int) -> tuple:
    """The axes that shard each axis of a stack in the layout."""
    return (layout.owner_axes or None, *(None,) * (ndim - 2), layout.row_axes or None)


def _stages(layout: Layout, ndim: int, at_rest: int) -> list[tuple]:
    """The axes that shard each axis of a stack after each exchange."""
    owners, rows = layout.owner_axes, layout.row_axes
    stages: list[tuple] = [(owners[: i + 1],) for i in range(max(0, at_rest - 1), len(owners))]
    between = (_ANY,) * (ndim - 2)
    return stages + [(owners or None, *between, rows[: i + 1]) for i in range(len(rows))]


def _constrain(stack: Array, placed: tuple) -> Array:
    """The stack with its first axes sharded like this, and the rest as XLA finds it."""
    rest = (_ANY,) * (stack.ndim - len(placed))
    return jax.lax.with_sharding_constraint(stack, PartitionSpec(*placed, *rest))
