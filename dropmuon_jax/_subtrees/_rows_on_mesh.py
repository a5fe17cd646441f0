"""The layers of a stack on a mesh: many rows at once, so that every device has a matrix."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dropmuon_jax._layers import leaf_paths
from dropmuon_jax._masks import where_active
from dropmuon_jax._mesh import known_shardings, mesh_axes, within_rows

Rows = Bool[np.ndarray, " rows"] | Bool[Array, " rows"]

# A group of rows that are not known before the step runs takes at most this part of the stack.
# Places that it has left travel and are iterated for nothing, and more groups take more exchanges.
_PART_OF_STACK = 4


def update_rows_on_mesh(
    update: Callable[..., tuple[Any, Any]],
    arguments: Any,
    state: Any,
    rested: list[Any],
    updates: Any,
    active: Rows,
) -> tuple[Any, Any]:
    """The updates and the new state of a stack: the active rows together, or in groups.

    Args:
        update: As in :func:`update_rows`.
        arguments: A tree of arrays with a leading axis of rows, `updates` among them.
        state: Likewise.
        rested: The leaves of the state after the step in rows that are not active, None where that
            changes nothing.
        updates: Zeros, to write the updates into.
        active: Which rows are. Of NumPy they are known now, and pass all at once; of JAX only how
            many groups pass is decided by the device.
    """
    old, treedef = jax.tree.flatten(state)
    start = [o if r is None else r for o, r in zip(old, rested, strict=True)]

    def step(rows: Any, new: list[Array]) -> tuple[Any, list[Array]]:
        # From the new state where that is the old one, so that the loop carries no second copy.
        before = [n if r is None else o for n, r, o in zip(new, rested, old, strict=True)]
        of_rows = _take((arguments, treedef.unflatten(before)), rows)
        with within_rows(arguments["updates"]):
            of_updates, after = jax.vmap(functools.partial(update, awake=True))(*of_rows)
        check_dtypes(state, after)
        return of_updates, jax.tree.leaves(after)

    if isinstance(active, np.ndarray) and not active.any():
        return updates, treedef.unflatten(start)
    if any(known and known.leading for known in known_shardings(arguments["updates"])):
        # Each device has rows of its own and works on them at the same time as the others: it is
        # done no sooner with fewer, and to share out fewer, rows would have to move.
        all_rows = step(slice(0, len(active)), start)
        select = functools.partial(where_active, active)
        updates, new = jax.tree.map(select, all_rows, (updates, start))
        return updates, treedef.unflatten(new)
    if isinstance(active, np.ndarray):
        rows = _at_once(np.flatnonzero(active))
        updates, new = _write((updates, start), rows, step(rows, start))
        return updates, treedef.unflatten(new)

    num_rows = len(active)
    size = _group_size(arguments["updates"], num_rows)
    num_groups = -(-num_rows // size)
    # What is left of the last group has the number of no row, and is not written.
    order = jnp.nonzero(active, size=num_groups * size, fill_value=num_rows)[0]

    # Written a turn later, for the reason given in `update_rows`.
    def turn(j: Array, carry: tuple[Any, Any, Array]) -> Any:
        whole, pending, last = carry
        whole = _write(whole, last, pending)
        rows = jax.lax.dynamic_slice_in_dim(order, j * size, size)
        return whole, step(rows, whole[1]), rows

    pending = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), (updates, start))
    nowhere = jnp.full(size, num_rows, order.dtype)
    whole, pending, last = jax.lax.fori_loop(
        0, -(-jnp.sum(active) // size), turn, ((updates, start), pending, nowhere)
    )
    updates, new = _write(whole, last, pending)
    return updates, treedef.unflatten(new)


def _group_size(updates: Any, num_rows: int) -> int:
    """As many rows as give every device a matrix."""
    shapes = collections.Counter(
        tuple(sorted(leaf.shape[1:])) for leaf in jax.tree.leaves(updates) if leaf.ndim > 2
    )
    in_a_row = max(shapes.values(), default=1)
    num_devices = int(np.prod(list(mesh_axes().values())))
    return min(-(-num_devices // in_a_row), -(-num_rows // _PART_OF_STACK))


def _at_once(rows: Int[np.ndarray, " active"]) -> slice | np.ndarray:
    """The rows as a slice, if they are neighbours: a whole stack is then not moved."""
    first, past = int(rows[0]), int(rows[-1]) + 1
    return slice(first, past) if past - first == len(rows) else rows


def _take(tree: Any, rows: Any) -> Any:
    if isinstance(rows, jax.Array):
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), tree)
    return jax.tree.map(lambda x: x[rows], tree)


def _write(whole: Any, rows: Any, part: Any) -> Any:
    def write(x: Array, new: Array) -> Array:
        if isinstance(rows, slice):
            return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), rows.start, axis=0)
        return x.at[rows].set(new.astype(x.dtype), mode="drop")

    return jax.tree.map(write, whole, part)


def check_dtypes(old: Any, new: Any) -> None:
    """Error for a state whose dtypes a loop could not carry."""
    leaves = zip(leaf_paths(old), *map(jax.tree.leaves, (old, new)), strict=True)
    for path, before, after in leaves:
        if before.dtype != after.dtype:
            raise TypeError(
                f"inner changes the dtype of its state '{path}' from {before.dtype.name} to "
                f"{after.dtype.name}, which a loop over stacked layers cannot carry. Give "
                "gradients the dtype of the parameters, or the transformation one of its own, such "
                "as optax.scale_by_adam(mu_dtype=…), in drop_muon as auxiliary."
            )
