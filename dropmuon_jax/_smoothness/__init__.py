"""Smoothness along a run: measured, recorded, fitted and drawn, a leaf at a time."""

from dropmuon_jax._smoothness._fitting import LeafSmoothness, SmoothnessFit, fit_smoothness
from dropmuon_jax._smoothness._plot import plot_smoothness
from dropmuon_jax._smoothness._record import SmoothnessRecord, SmoothnessSamples
from dropmuon_jax._smoothness._tracking import SmoothnessState, track_smoothness

__all__ = [
    "LeafSmoothness",
    "SmoothnessFit",
    "SmoothnessRecord",
    "SmoothnessSamples",
    "SmoothnessState",
    "fit_smoothness",
    "plot_smoothness",
    "track_smoothness",
]
