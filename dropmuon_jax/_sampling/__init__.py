"""Which layers a step updates: distributions, and the sampler that draws from them."""

from dropmuon_jax._sampling._adaptive import AdaptiveDistribution, time_aware_depth
from dropmuon_jax._sampling._distributions import (
    LayerDistribution,
    depth_subsets,
    epoch_shift_depth,
    fixed_depth,
    fixed_size_subsets,
    full_depth,
    independent_layers,
    uniform_depth,
)
from dropmuon_jax._sampling._record import LayerGainsState
from dropmuon_jax._sampling._sampler import (
    LayerMaskSampler,
    LayerMaskSamplerState,
    layer_mask_sampler,
)

__all__ = [
    "AdaptiveDistribution",
    "LayerDistribution",
    "LayerGainsState",
    "LayerMaskSampler",
    "LayerMaskSamplerState",
    "depth_subsets",
    "epoch_shift_depth",
    "fixed_depth",
    "fixed_size_subsets",
    "full_depth",
    "independent_layers",
    "layer_mask_sampler",
    "time_aware_depth",
    "uniform_depth",
]
