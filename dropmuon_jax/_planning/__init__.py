"""What a step at each depth costs, and which distribution over depths the theory calls best."""

from dropmuon_jax._planning._costs import depth_cost
from dropmuon_jax._planning._optimal import optimal_depth, predicted_speed_up

__all__ = ["depth_cost", "optimal_depth", "predicted_speed_up"]
