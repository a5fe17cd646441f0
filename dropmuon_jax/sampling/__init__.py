"""Which layers a step updates: distributions, and the samplers that draw from them."""

from dropmuon_jax.sampling.adaptive import AdaptiveDistribution, time_aware_depth
from dropmuon_jax.sampling.distributions import (
    LayerDistribution,
    depth_subsets,
    epoch_shift_depth,
    fixed_depth,
    fixed_size_subsets,
    full_depth,
    independent_layers,
    uniform_depth,
)
from dropmuon_jax.sampling.reading import PlanReader
from dropmuon_jax.sampling.record import DrawnBy, LayerGainsState, record_gains
from dropmuon_jax.sampling.sampler import DepthSampler

__all__ = [
    "AdaptiveDistribution",
    "DepthSampler",
    "DrawnBy",
    "LayerDistribution",
    "LayerGainsState",
    "PlanReader",
    "depth_subsets",
    "epoch_shift_depth",
    "fixed_depth",
    "fixed_size_subsets",
    "full_depth",
    "independent_layers",
    "record_gains",
    "time_aware_depth",
    "uniform_depth",
]
