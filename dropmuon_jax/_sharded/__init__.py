"""Optimizers on a mesh: told of it, their state placed on it, and their layouts explained."""

from dropmuon_jax._sharded._layout_table import layout_table
from dropmuon_jax._sharded._on_mesh import on_mesh
from dropmuon_jax._sharded._state_shardings import state_shardings

__all__ = ["layout_table", "on_mesh", "state_shardings"]
