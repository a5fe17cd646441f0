"""Layers stacked on a leading axis: a scan whose backward pass ends at a depth."""

from dropmuon_jax._stacked._scan_layers import scan_layers

__all__ = ["scan_layers"]
