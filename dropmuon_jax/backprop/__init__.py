"""The backward pass of the active layers: gradients, scans to a depth, and training steps."""

from dropmuon_jax.backprop.gradients import masked_value_and_grad, masked_value_and_grad_pair
from dropmuon_jax.backprop.scan_layers import scan_layers
from dropmuon_jax.backprop.traced_depth import switch_depth
from dropmuon_jax.backprop.train_step import TrainStep, train_step

__all__ = [
    "TrainStep",
    "masked_value_and_grad",
    "masked_value_and_grad_pair",
    "scan_layers",
    "switch_depth",
    "train_step",
]
