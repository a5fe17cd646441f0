"""Layers: what the parameters are, in which order, and which of them are active."""

from dropmuon_jax.layers.by_path import StackedPatterns, layers_by_path, stacked
from dropmuon_jax.layers.by_trace import trace_layers
from dropmuon_jax.layers.complex_leaves import ComplexParts, join_complex, split_complex
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers, Grouped, LeafNumbers, Parts
from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.matrices import MatrixAxes, MatrixShape
from dropmuon_jax.layers.roles import ROLES, Roles, matrix_labels
from dropmuon_jax.layers.rows import Leaf, StackedLeaves

__all__ = [
    "ROLES",
    "ComplexParts",
    "DimensionNumbers",
    "Grouped",
    "Layers",
    "Leaf",
    "LeafNumbers",
    "MatrixAxes",
    "MatrixShape",
    "Parts",
    "Roles",
    "StackedLeaves",
    "StackedPatterns",
    "join_complex",
    "layers_by_path",
    "matrix_labels",
    "split_complex",
    "stacked",
    "trace_layers",
]
