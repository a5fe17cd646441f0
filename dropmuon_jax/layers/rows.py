"""The layers of a stack: reading one, writing one, and zeros where none has been computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def take_row(tree: Any, i: Array | int) -> Any:
    """Layer i of every leaf of a stack, without the leading axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def write_row(tree: Any, row: Any, i: Array) -> Any:
    """The stack with another layer i."""
    return jax.tree.map(
        lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, i, axis=0), tree, row
    )


def zeros_for_rows(function: Callable[..., Any], num_rows: int, *row: Any) -> Any:
    """Zeros for the results of `function(*row)` of each layer of a stack, layers first."""
    # Where types say how an array is placed, zeros take that from results that are not computed.
    # Elsewhere not even callbacks of the function, which XLA keeps, run once more than they should.
    is_placed = any(map(_is_placed, jax.tree.leaves(row)))
    results = function(*row) if is_placed else jax.eval_shape(function, *row)

    def zeros(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jnp.zeros((num_rows, *x.shape), x.dtype)
        return jnp.broadcast_to(jnp.zeros_like(x), (num_rows, *x.shape))

    return jax.tree.map(zeros, results)


def _is_placed(x: Any) -> bool:
    """Whether an array's type says where it is, as explicit axes and `jax.shard_map` do."""
    return any(kind.name != "Auto" for kind in jax.typeof(x).sharding.mesh.axis_types or ())
