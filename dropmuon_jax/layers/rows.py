"""The layers of a stack: where they lie, reading one, writing one, and zeros where none is known.

The functions take `axes`, along which the layers of each leaf lie: a tree of integers, or of a
prefix of it, such as 0 for all leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dropmuon_jax.layers.trees import is_static, leaf_keys


class Leaf(NamedTuple):
    """A parameter leaf and its place in the order of layers."""

    key: str
    path: str
    size: int
    layers: tuple[int, ...]  # of each row if layers are stacked, else the one it belongs to
    row_axis: int | None = None  # along which layers are stacked, counted from the first axis
    depths: tuple[int, ...] = ()  # all at which the network uses it, if they are known


@dataclasses.dataclass(frozen=True)
class StackedLeaves:
    """Leaves along whose axis layers are stacked; or, as one row, an unstacked layer."""

    name: str
    leaves: tuple[int, ...]  # indices among the leaves of the tree
    layers: tuple[int, ...]  # of each row, shallow to deep
    axis: int = 0  # of every leaf, counted from its last axis if negative


class RowAxes(NamedTuple):
    """The `axes` of what a step of a stack takes and gives."""

    arguments: Any = 0
    state: Any = 0
    updates: Any = 0

    def of(self, arguments: dict[str, Any]) -> RowAxes:
        """The axes of arguments, each of which is a tree like the updates."""
        return self._replace(arguments=dict.fromkeys(arguments, self.updates))


def row_axes(init: Callable[[Any], Any], rows: Any, axes: Sequence[int | None]) -> RowAxes:
    """The axes of a stack, of which one layer has the parameters `rows` and the state `init(rows)`.

    What has the path and the shape of a parameter in the state lies along the axis of that one.
    """
    if not any(axes):
        return RowAxes()
    found = zip(leaf_keys(rows), jax.tree.leaves(rows), axes, strict=True)
    known = sorted(found, key=lambda of: -len(of[0]))  # the longest path first
    leaves, treedef = jax.tree.flatten(state := jax.eval_shape(init, rows))
    of_state = [
        next((axis for of, row, axis in known if key.endswith(of) and row.shape == x.shape), 0)
        for key, x in zip(leaf_keys(state), leaves, strict=True)
    ]
    of_params = jax.tree.structure(rows).unflatten(axes)
    return RowAxes(of_params, treedef.unflatten(of_state), of_params)


def row_shape(shape: Iterable[Any], axis: int | None) -> tuple[Any, ...]:
    """The shape that a leaf has in one layer."""
    return tuple(n for i, n in enumerate(shape) if i != axis)


def map_rows(function: Callable[..., Any], axes: Any, tree: Any, *rest: Any) -> Any:
    """A tree of `function(axis, leaf, …)`."""
    return jax.tree.map(function, jax.tree.broadcast(axes, tree), tree, *rest)


def take_row(tree: Any, i: Array | int, axes: Any = 0) -> Any:
    """Layer i of every leaf of a stack, without the axis of layers."""

    def take(axis: int, x: Any) -> Array:
        return jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)

    return map_rows(take, axes, tree)


def write_row(tree: Any, row: Any, i: Array, axes: Any = 0) -> Any:
    """The stack with another layer i."""

    def write(axis: int, stack: Any, x: Any) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stack, x, i, axis)

    return map_rows(write, axes, tree, row)


def zeros_for_rows(function: Callable[..., Any], num_rows: int, *row: Any, axes: Any = 0) -> Any:
    """Zeros for the results of `function(*row)` of each layer of a stack."""
    # Where types say how an array is placed, zeros take that from results that are not computed.
    # Elsewhere not even callbacks of the function, which XLA keeps, run once more than they should.
    is_placed = any(map(_is_placed, jax.tree.leaves(row)))
    results = function(*row) if is_placed else jax.eval_shape(function, *row)

    def zeros(axis: int, x: Any) -> Array:
        shape = (*x.shape[:axis], num_rows, *x.shape[axis:])
        if isinstance(x, jax.ShapeDtypeStruct):
            return jnp.zeros(shape, x.dtype)
        others = [i for i in range(len(shape)) if i != axis]
        return jax.lax.broadcast_in_dim(jnp.zeros_like(x), shape, others)

    return map_rows(zeros, axes, results)


def flags_along(axis: int | None, active: Any) -> Any:
    """The flags of layers in a shape that says along which axis of a leaf they lie."""
    return active.reshape((1,) * axis + active.shape) if axis else active


def one_by_one(
    step: Callable[[Any, Any], tuple[Any, Any]],
    arguments: Any,
    state: Any,
    updates: Any,
    active: Any,
    axes: RowAxes,
) -> tuple[Any, Any]:
    """The updates and the state of a stack after a step of its active layers.

    Arguments and state have an axis of layers; `updates` are zeros, to write into.
    """
    if isinstance(active, np.ndarray):
        order, count = jnp.asarray(np.flatnonzero(active), jnp.int32), int(active.sum())
        if count == 0:
            return updates, state
    else:
        order, count = jnp.nonzero(active, size=len(active))[0], jnp.sum(active)

    # What a turn computes is written at the beginning of the next. So the stack is read only after
    # it is written, and XLA does both in place; the other way round it may copy the whole stack in
    # every turn, as it cannot see that no layer is read again.
    def turn(j: Array, carry: tuple[Any, Any, Any, Array]) -> tuple[Any, Any, Any, Array]:
        updates, state, pending, last = carry
        state = write_row(state, pending, last, axes.state)
        i = order[j]
        of_layer, pending = step(*take_row((arguments, state), i, axes[:2]))
        return write_row(updates, of_layer, i, axes.updates), state, pending, i

    first = take_row(state, order[0], axes.state)  # the first turn writes no change
    start = updates, state, first, order[0]
    updates, state, pending, last = jax.lax.fori_loop(0, count, turn, start)
    return updates, write_row(state, pending, last, axes.state)


def _is_placed(x: Any) -> bool:
    """Whether an array's type says where it is, as explicit axes and `jax.shard_map` do."""
    return any(kind.name != "Auto" for kind in jax.typeof(x).sharding.mesh.axis_types or ())


def active_layers(
    num_layers: int, places: Sequence[tuple[int, ...]], mask: Any
) -> Bool[Array | np.ndarray, " num_layers"]:
    """An entry for each layer, from the layers of each leaf; NumPy's where the mask is static."""
    flags: list[Any] = [False] * num_layers
    for flag, of_leaf in zip(jax.tree.leaves(mask), places, strict=True):
        rows = flag.ravel() if np.ndim(flag) else [flag] * len(of_leaf)
        for layer, row in zip(of_leaf, rows, strict=True):
            flags[layer] = row
    if all(map(is_static, flags)):
        return np.array(flags, bool)
    return jnp.stack([jnp.asarray(flag, bool) for flag in flags])
