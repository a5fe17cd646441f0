"""Parts of the parameters: a chain for each, and each layer by itself."""

from dropmuon_jax._subtrees._chain import chain_subtrees
from dropmuon_jax._subtrees._per_layer import PerLayerState, per_layer

__all__ = ["PerLayerState", "chain_subtrees", "per_layer"]
