"""Momentum: what is averaged over the steps before an LMO looks at it."""

from dropmuon_jax._momentum._ema import MomentumState, gluon_decay, momentum

__all__ = ["MomentumState", "gluon_decay", "momentum"]
