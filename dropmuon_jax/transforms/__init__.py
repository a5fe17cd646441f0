"""Transformations that are chained: momentum, variance reduction, LMOs, masks and subtrees."""

from dropmuon_jax.transforms.accumulation import AccumulatedState, accumulate
from dropmuon_jax.transforms.lmo import RadiusState, newton_schulz_lmo, norm_lmo, norm_sharp
from dropmuon_jax.transforms.masked import (
    LayerMaskSampler,
    LayerMaskSamplerState,
    chain_subtrees,
    layer_mask_sampler,
)
from dropmuon_jax.transforms.momentum import (
    CorrectedMomentumState,
    MarsMomentumState,
    MomentumState,
    mars_momentum,
    momentum,
)
from dropmuon_jax.transforms.mvr import MVRMomentumState, mvr_momentum
from dropmuon_jax.transforms.per_layer import PerLayerState, per_layer
from dropmuon_jax.transforms.prev_params import PrevParamsState, keep_prev_params, prev_params

__all__ = [
    "AccumulatedState",
    "CorrectedMomentumState",
    "LayerMaskSampler",
    "LayerMaskSamplerState",
    "MVRMomentumState",
    "MarsMomentumState",
    "MomentumState",
    "PerLayerState",
    "PrevParamsState",
    "RadiusState",
    "accumulate",
    "chain_subtrees",
    "keep_prev_params",
    "layer_mask_sampler",
    "mars_momentum",
    "momentum",
    "mvr_momentum",
    "newton_schulz_lmo",
    "norm_lmo",
    "norm_sharp",
    "per_layer",
    "prev_params",
]
