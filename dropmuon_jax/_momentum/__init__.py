"""Momentum: what is averaged over the steps before an LMO looks at it."""

from dropmuon_jax._momentum._ema import MomentumState, momentum
from dropmuon_jax._momentum._mars import MarsMomentumState, mars_momentum
from dropmuon_jax._momentum._mvr import MVRMomentumState, mvr_momentum
from dropmuon_jax._momentum._prev_params import (
    PrevParamsState,
    keep_prev_params,
    keeps_prev_params,
    prev_params,
)
from dropmuon_jax._momentum._schedules import check_decay_or_schedule, gluon_decay, mvr_decay, mvr_q

__all__ = [
    "MVRMomentumState",
    "MarsMomentumState",
    "MomentumState",
    "PrevParamsState",
    "check_decay_or_schedule",
    "gluon_decay",
    "keep_prev_params",
    "keeps_prev_params",
    "mars_momentum",
    "momentum",
    "mvr_decay",
    "mvr_momentum",
    "mvr_q",
    "prev_params",
]
