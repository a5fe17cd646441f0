"""Private distributed training: α-NormEC, Clip21, DP-SGD, and what they guarantee."""

from dropmuon_jax.privacy.guarantees import PrivacyPlan, safe_step
from dropmuon_jax.privacy.norm_ec import NormECState, bounded_mean, clip21, norm_ec

__all__ = ["NormECState", "PrivacyPlan", "bounded_mean", "clip21", "norm_ec", "safe_step"]
