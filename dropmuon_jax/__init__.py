"""Muon-like optimizers that skip layers and their backward pass, as Optax transformations."""

from dropmuon_jax._backprop import masked_value_and_grad, switch_depth
from dropmuon_jax._layers import Layers, layers_by_path, trace_layers
from dropmuon_jax._lmo import newton_schulz_lmo, spectral_lmo, svd_lmo
from dropmuon_jax._momentum import MomentumState, momentum
from dropmuon_jax._optimizers import drop_muon, muon
from dropmuon_jax._orthogonalize import newton_schulz, polar_express_coefficients
from dropmuon_jax._sampling import (
    LayerDistribution,
    LayerMaskSampler,
    LayerMaskSamplerState,
    depth_subsets,
    epoch_shift_depth,
    fixed_depth,
    fixed_size_subsets,
    full_depth,
    independent_layers,
    layer_mask_sampler,
    uniform_depth,
)
from dropmuon_jax._subtrees import PerLayerState, chain_subtrees, matrix_labels, per_layer

__all__ = [
    "LayerDistribution",
    "LayerMaskSampler",
    "LayerMaskSamplerState",
    "Layers",
    "MomentumState",
    "PerLayerState",
    "chain_subtrees",
    "depth_subsets",
    "drop_muon",
    "epoch_shift_depth",
    "fixed_depth",
    "fixed_size_subsets",
    "full_depth",
    "independent_layers",
    "layer_mask_sampler",
    "layers_by_path",
    "masked_value_and_grad",
    "matrix_labels",
    "momentum",
    "muon",
    "newton_schulz",
    "newton_schulz_lmo",
    "per_layer",
    "polar_express_coefficients",
    "spectral_lmo",
    "svd_lmo",
    "switch_depth",
    "trace_layers",
    "uniform_depth",
]
