"""Layers: what the parameters are, in which order, and which of them are active."""

from dropmuon_jax.layers.by_path import StackedPatterns, layers_by_path, stacked
from dropmuon_jax.layers.by_trace import trace_layers
from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.matrices import MatrixAxes, MatrixShape
from dropmuon_jax.layers.roles import ROLES, Roles, matrix_labels
from dropmuon_jax.layers.rows import Leaf, StackedLeaves
from dropmuon_jax.layers.sites import DimensionNumbers, Grouped, LeafNumbers

__all__ = [
    "ROLES",
    "DimensionNumbers",
    "Grouped",
    "Layers",
    "Leaf",
    "LeafNumbers",
    "MatrixAxes",
    "MatrixShape",
    "Roles",
    "StackedLeaves",
    "StackedPatterns",
    "layers_by_path",
    "matrix_labels",
    "stacked",
    "trace_layers",
]
