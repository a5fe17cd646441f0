"""Optimizers on a mesh: told of it, their state placed on it, and their layouts explained."""

from dropmuon_jax._sharded._on_mesh import on_mesh
from dropmuon_jax._sharded._plan_layouts import LayoutPlan, ShapeLayout, plan_layouts
from dropmuon_jax._sharded._state_shardings import state_shardings

__all__ = ["LayoutPlan", "ShapeLayout", "on_mesh", "plan_layouts", "state_shardings"]
