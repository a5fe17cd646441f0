"""What steps carry on: parameters and state, in the types and places in which they are returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_returned(carried: Any, others: Any, shardings: Any) -> Any:
    """What steps carry on, in the types and places in which they return it.

    So the first step is compiled for all: arrays are strongly typed, and lie where `shardings` say
    or on the device on which another argument has been put. No array is there twice, as tied and
    cloned ones are, since it cannot be donated twice.
    """
    leaves = jax.tree.leaves(carried)
    if any(getattr(x, "weak_type", False) for x in leaves):
        carried = jax.tree.map(_strong, carried)
    if len({*map(id, leaves)}) < len(leaves):
        carried = jax.tree.map(_once(set()), carried)
    if all(map(_is_put, leaves)):
        return carried
    if shardings is not None:
        *parts, rest = carried
        return *map(_put, parts, shardings), rest
    put = list(filter(_is_put, [*leaves, *jax.tree.leaves(others)]))
    devices = set().union(*(x.sharding.device_set for x in put))
    if len(devices) != 1:  # with arrays on several, JAX says what does not fit
        return carried
    return _put(carried, jax.device_put(np.int32(0), *devices).sharding)


def _once(seen: set[int]) -> Callable[[Any], Any]:
    """A function of arrays one by one, which copies those that it has seen."""

    def copy_if_seen(x: Any) -> Any:
        if id(x) in seen and isinstance(x, jax.Array):
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return copy_if_seen


def _is_put(x: Any) -> bool:
    return getattr(x, "committed", False)


def _put(tree: Any, shardings: Any) -> Any:
    """The arrays of a tree in other places, if shardings are given, for all or for each."""

    def put(x: Any, sharding: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x.update(sharding=sharding)
        return jax.device_put(x, sharding)

    if shardings is None:
        return tree
    return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


def _strong(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(weak_type=False)
    return jnp.asarray(x, x.dtype)
