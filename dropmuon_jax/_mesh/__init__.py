"""Which mesh a computation runs on, and how its leaves are sharded, where that is known."""

from dropmuon_jax._mesh._explicit import on_auto_axes
from dropmuon_jax._mesh._scope import (
    LAYOUTS,
    LeafSharding,
    as_one_row,
    axis_names,
    current_scope,
    known_shardings,
    mesh_axes,
    scope,
    within_rows,
)

__all__ = [
    "LAYOUTS",
    "LeafSharding",
    "as_one_row",
    "axis_names",
    "current_scope",
    "known_shardings",
    "mesh_axes",
    "on_auto_axes",
    "scope",
    "within_rows",
]
