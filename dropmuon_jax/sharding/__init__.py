"""Optimizers on a mesh of devices: the only room that knows a mesh, a sharding or a layout.

Importing this room puts its way to orthogonalize all matrices in the place of the local one, for
arrays on a mesh.
"""

from dropmuon_jax.orthogonalize.batches import install
from dropmuon_jax.sharding.map_on_mesh import execution_on_mesh
from dropmuon_jax.sharding.on_mesh import is_on_mesh, on_mesh
from dropmuon_jax.sharding.placement import LayoutPlan, ShapeLayout, plan_layouts, state_shardings

__all__ = ["LayoutPlan", "ShapeLayout", "on_mesh", "plan_layouts", "state_shardings"]

install(is_on_mesh, execution_on_mesh)
