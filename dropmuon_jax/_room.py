"""Room for what a loop over the rows of a stack computes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def room_for_rows(function: Callable[..., Any], num_rows: int, *row: Any) -> Any:
    """Zeros for the results of `function` of each row.

    Args:
        function: From `row` to a tree of arrays.
        num_rows: How many there will be.
        *row: Trees of arrays, of one row.

    Returns:
        The tree, with a leading axis of `num_rows`.
    """
    # Where types have shardings or varying axes, zeros get them from results that are not computed.
    # Elsewhere not even callbacks of the function, which XLA keeps, run once more than they should.
    has_placement = any(map(_has_placement, jax.tree.leaves(row)))
    results = function(*row) if has_placement else jax.eval_shape(function, *row)

    def zeros(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jnp.zeros((num_rows, *x.shape), x.dtype)
        return jnp.broadcast_to(jnp.zeros_like(x), (num_rows, *x.shape))

    return jax.tree.map(zeros, results)


def _has_placement(x: Any) -> bool:
    """Whether an array's type says where it is: on explicit axes of a mesh, or in `shard_map`."""
    kinds = jax.typeof(x).sharding.mesh.axis_types or ()
    return any(kind != jax.sharding.AxisType.Auto for kind in kinds)
