"""Distributions that follow the run: which layers to update, from what the steps have shown."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dropmuon_jax._checks import check_positive, static_int
from dropmuon_jax._sampling._distributions import depth_subsets
from dropmuon_jax._waiting import minimise_waiting, not_rising

_SMALLEST_GAIN = 0.01  # of a layer, in the largest: what has shown nothing yet is looked at again


@dataclasses.dataclass(frozen=True)
class AdaptiveDistribution:
    """A distribution over subsets of the layers that is planned anew every few steps.

    The plan is made on the device, inside `update`, from the gains of the layers that are recorded
    there; it is a part of the optimizer state, a :class:`LayerGainsState`. So draws are a function
    of seed, step and state: the same on every host, and after a restart from a checkpoint (unless a
    wrapper such as `optax.apply_if_finite` has just left a step out). The host reads a plan one
    period after it was made, so that it may run a period ahead. In the first two periods every
    subset is as likely as any other.

    Attributes:
        subsets: As in :class:`LayerDistribution`.
        plan: From the gains, a float32 array of shape (num_layers,), to the probability of each
            subset, of shape (num_subsets,); in `jax.numpy`. The gain of a layer is what the loss
            falls to first order, −⟨gradient, update⟩, in a step in which the layer is active.
        steps_per_plan: The length of a period.
        decay: Weight of the past in the moving average of a layer's gain, over the steps in which
            it is active.

    Examples:
        The depth from which on layers gain most for their cost, three steps of four.

        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> costs = jnp.array([4.0, 2.0, 1.0])
        >>> def plan(gains):
        ...     of_depth = jnp.cumsum(gains[::-1])[::-1]
        ...     best = jax.nn.one_hot(jnp.argmax(of_depth / costs), 3)
        ...     return 0.75 * best + 0.25 * jnp.array([1.0, 0.0, 0.0])
        >>> print(dm.AdaptiveDistribution(dm.depth_subsets, plan).plan(jnp.array([1.0, 3.0, 1.0])))
        [0.25 0.75 0.  ]
    """

    subsets: Callable[[int], Bool[np.ndarray, "num_subsets num_layers"]]
    plan: Callable[[Float[Array, " num_layers"]], Float[Array, " num_subsets"]]
    steps_per_plan: int = 10
    decay: float = 0.9

    def __post_init__(self) -> None:
        static_int("steps_per_plan", self.steps_per_plan, minimum=1)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}.")


def time_aware_depth(
    depth_costs: Sequence[float] | Float[np.ndarray, " num_layers"],
    *,
    rate: float = 0.5,
    floor: float = 0.05,
    steps_per_plan: int = 10,
    decay: float = 0.9,
) -> AdaptiveDistribution:
    r"""Layers are updated as often as their gain is worth its time.

    Where a layer i that has been updated n_i times still has to gain something that falls like
    A_i n_i^-ρ, a given time is spent best with the inclusion probabilities

    .. math::
        \min_{\pi_0 \le \dots \le \pi_{b-1} = 1}
        \Big(C_0 + \sum_i c_i \pi_i\Big)^{\rho} \sum_i \frac{w_i}{\pi_i^{\rho}}
        \quad\Rightarrow\quad
        \pi_i \propto (w_i / c_i)^{1 / (1 + \rho)}

    before the order and π ≤ 1 are taken into account, which is done exactly. Here w_i is the gain
    of a step, −⟨gradient, update⟩, that the run has shown; c_i = costs[i] − costs[i + 1] is what
    the layer adds to the cost of a step, and C0 what no depth avoids. A gain counts for at least 1
    % of the largest, and is an average over the layer's own steps: under a falling learning rate
    that of a layer that is seldom drawn is of a somewhat larger rate. Where gains are in proportion
    to costs, as in a transformer of equal blocks, that is full updates.

    Args:
        depth_costs: What a step costs at each depth, shallow to deep, in any unit, as
            :func:`depth_cost` measures; positive. Where they rise with depth, as noise has it, the
            nearest in least squares that do not are taken.
        rate: ρ, the speed of convergence that is assumed: ½ is that of stochastic gradients, 1 of
            exact ones. A smaller one drops more.
        floor: The least probability with which a plan updates each layer, in [0, 1].
        steps_per_plan: Steps of a period; the first two have uniform depths.
        decay: Weight of the past in the gains, over the steps in which a layer is active.

    Returns:
        An :class:`AdaptiveDistribution` over depths. Its samplers need the optimizer state,
        `tx.depth(step, opt_state)`.

    Raises:
        ValueError: If costs are not positive, or a number is out of range; at construction of the
            sampler, if their number is not the number of layers.

    Examples:
        A first layer of a third of the cost, whose gain is small:

        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> distribution = dm.time_aware_depth([1.0, 0.65, 0.3, 0.1])
        >>> included = distribution.plan(jnp.array([0.01, 0.03, 0.04, 0.04])).cumsum()
        >>> print(f"{included[0]:.2f} {included[1]:.2f} {included[2]:.2f}")
        0.17 0.36 0.63

        Gains in proportion to costs:

        >>> print(distribution.plan(jnp.array([0.35, 0.35, 0.2, 0.1])))
        [1. 0. 0. 0.]

    References:
        Ours: Drop-Muon, arXiv:2510.02239, draws from fixed rules. With ρ = 1 and w = L it is the
        bound of :func:`optimal_depth` with the criterion "sum".
    """
    costs = np.asarray(depth_costs, np.float64)
    if costs.ndim != 1 or not costs.size:
        raise ValueError(f"depth_costs must be one number for each depth, got {depth_costs!r}.")
    if not (np.isfinite(costs) & (costs > 0)).all():
        raise ValueError(f"depth_costs must be positive, got {costs.tolist()}.")
    check_positive("rate", rate)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], got {floor}.")
    costs = not_rising(costs / costs[0])
    # NumPy's, so that a sampler may be made while a step is traced.
    layer_costs = np.append(-np.diff(costs), 0.0).astype(np.float32)
    base_cost = float(costs[-1])

    def subsets(num_layers: int) -> np.ndarray:
        if num_layers != len(costs):
            raise ValueError(f"depth_costs are {len(costs)}, and there are {num_layers} layers.")
        return depth_subsets(num_layers)

    def plan(gains: Float[Array, " num_layers"]) -> Float[Array, " num_layers"]:
        largest = jnp.maximum(jnp.max(gains), jnp.finfo(jnp.float32).tiny)
        weights = jnp.maximum(gains / largest, _SMALLEST_GAIN)
        included = minimise_waiting(weights, layer_costs, base_cost, rate=rate)
        return jnp.diff(jnp.maximum(included, floor), prepend=0.0)

    return AdaptiveDistribution(subsets, plan, steps_per_plan, decay)
