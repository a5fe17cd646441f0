"""What a step at each depth costs, and which distribution over depths the theory calls best."""

from dropmuon_jax.planning.checks import DepthReport, DepthWarning, check_depths
from dropmuon_jax.planning.costs import depth_cost, optimal_depth, predicted_speed_up
from dropmuon_jax.planning.fitting import (
    LeafSmoothness,
    SmoothnessFit,
    SmoothnessRecord,
    SmoothnessSamples,
    fit_smoothness,
)
from dropmuon_jax.planning.tracking import SmoothnessState, track_smoothness

__all__ = [
    "DepthReport",
    "DepthWarning",
    "LeafSmoothness",
    "SmoothnessFit",
    "SmoothnessRecord",
    "SmoothnessSamples",
    "SmoothnessState",
    "check_depths",
    "depth_cost",
    "fit_smoothness",
    "optimal_depth",
    "predicted_speed_up",
    "track_smoothness",
]
