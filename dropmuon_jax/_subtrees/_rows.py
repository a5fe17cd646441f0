"""The layers of a stack, one by one: a loop over the rows that are active."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dropmuon_jax._mesh import mesh_axes
from dropmuon_jax._room import room_for_rows
from dropmuon_jax._subtrees._rows_on_mesh import Rows, check_dtypes, update_rows_on_mesh


def update_rows(
    update: Callable[..., tuple[Any, Any]],
    arguments: Any,
    state: Any,
    active: Rows,
    *,
    tells: bool,
) -> tuple[Any, Any]:
    """The updates and the new state of a stack; of inactive rows zero, and the old one.

    Args:
        update: From a row of arguments and of state, and the keyword `awake`, to a row of updates
            and of state.
        arguments: A tree of arrays with a leading axis of rows.
        state: Likewise.
        active: Which rows are; of NumPy they are known now, of JAX the loop's length is not.
        tells: Whether `update` is called for the others too, with `awake` False, for what in their
            state goes on all the same: counts.
    """
    old, treedef = jax.tree.flatten(state)
    rested = [None] * len(old)
    if tells and not (isinstance(active, np.ndarray) and active.all()):
        rested = _rest(update, arguments, state)
    updates = room_for_rows(
        lambda *row: update(*row, awake=True)[0], len(active), *_row((arguments, state), 0)
    )
    if mesh_axes():
        return update_rows_on_mesh(update, arguments, state, rested, updates, active)
    if isinstance(active, np.ndarray):
        order, count = jnp.asarray(np.flatnonzero(active), jnp.int32), int(active.sum())
    else:
        order, count = jnp.nonzero(active, size=len(active))[0], jnp.sum(active)

    start = [o if r is None else r for o, r in zip(old, rested, strict=True)]
    if isinstance(count, int) and count == 0:
        return updates, treedef.unflatten(start)

    # What a turn computes is written at the beginning of the next. So the stack is read only after
    # it is written, and XLA does both in place; the other way round it may copy the whole stack in
    # every turn, as it cannot see that no row is read again.
    def turn(j: Array, carry: tuple[Any, list[Array], list[Array], Array]) -> Any:
        updates, new, pending, last = carry
        new = _write(new, pending, last)
        i = order[j]
        before = [_row(n if r is None else o, i) for n, r, o in zip(new, rested, old, strict=True)]
        row, after = update(_row(arguments, i), treedef.unflatten(before), awake=True)
        check_dtypes(state, after)
        return _write(updates, row, i), new, jax.tree.leaves(after), i

    pending = _row(start, order[0])  # as it is, for the first turn
    updates, new, pending, last = jax.lax.fori_loop(
        0, count, turn, (updates, start, pending, order[0])
    )
    return updates, treedef.unflatten(_write(new, pending, last))


def _rest(update: Callable[..., tuple[Any, Any]], arguments: Any, state: Any) -> list[Any]:
    """The leaves of the state that change in rows at rest; None for the others."""
    changed: list[bool] = []

    def rest(arguments: Any, state: Any) -> list[Array]:
        old, new = jax.tree.leaves(state), jax.tree.leaves(update(arguments, state, awake=False)[1])
        changed[:] = [n is not o for n, o in zip(new, old, strict=True)]
        return [n for n, is_new in zip(new, changed, strict=True) if is_new]

    moved = iter(jax.vmap(rest)(arguments, state))
    return [next(moved) if is_new else None for is_new in changed]


def _row(tree: Any, i: Array | int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _write(tree: Any, row: Any, i: Array) -> Any:
    return jax.tree.map(
        lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, i, axis=0), tree, row
    )
