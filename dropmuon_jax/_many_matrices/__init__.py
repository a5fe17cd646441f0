"""A function of all matrices of all leaves: by shape, within a limit of memory, and on a mesh."""

from dropmuon_jax._many_matrices._buckets import Kind, plan_buckets
from dropmuon_jax._many_matrices._layouts import Bucket, axes_size, choose_layout, layout_cost
from dropmuon_jax._many_matrices._map_matrices import map_matrices
from dropmuon_jax._many_matrices._slices import DEFAULT_MEMORY_LIMIT, working_bytes

__all__ = [
    "DEFAULT_MEMORY_LIMIT",
    "Bucket",
    "Kind",
    "axes_size",
    "choose_layout",
    "layout_cost",
    "map_matrices",
    "plan_buckets",
    "working_bytes",
]
