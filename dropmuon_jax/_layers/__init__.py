"""Layers: groups of leaves, ordered from the input to the output."""

from dropmuon_jax._layers._by_path import layers_by_path, stacked
from dropmuon_jax._layers._by_trace import trace_layers
from dropmuon_jax._layers._layers import Layers, Stack, check_layers
from dropmuon_jax._layers._paths import (
    CUT_TO_THE_SUBTREE,
    leaf_keys,
    leaf_paths,
    masked_paths,
    restructure_like,
)
from dropmuon_jax._layers._patterns import match_leaves

__all__ = [
    "CUT_TO_THE_SUBTREE",
    "Layers",
    "Stack",
    "check_layers",
    "layers_by_path",
    "leaf_keys",
    "leaf_paths",
    "masked_paths",
    "match_leaves",
    "restructure_like",
    "stacked",
    "trace_layers",
]
