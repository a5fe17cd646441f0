"""Distributions that follow the run: which layers to update, from what the steps have shown."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dropmuon_jax._checks import check_positive, static_int
from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.sampling.distributions import (
    LayerDistribution,
    check_probabilities,
    depth_subsets,
)

_SMALLEST_GAIN = 0.01  # of a layer, in the largest: what has shown nothing yet is looked at again


@dataclasses.dataclass(frozen=True)
class AdaptiveDistribution:
    """A distribution over subsets of the layers that is planned anew every few steps.

    The plan is made on the device, inside `update`, from the gains of the layers that
    :func:`record_gains` records; it is a part of the optimizer state, a :class:`LayerGainsState`.
    So draws are a function of seed, step and state: the same on every host, and after a restart
    from a checkpoint, whatever costs are measured then. A plan takes effect one period after it was
    made, so that the host may read it a period ahead. In the first two periods it is that of equal
    gains, as nothing is known.

    Attributes:
        subsets: From the number of layers b to the subsets that can be drawn, NumPy booleans of
            shape (num_subsets, b), as in :class:`LayerDistribution`.
        plan: From the gains, a float32 array of shape (num_layers,), to the probability of each
            subset, of shape (num_subsets,); in `jax.numpy`. The gain of a layer is what the loss
            falls to first order, −⟨gradient, update⟩, in a step of unit length in which the layer
            is active. A plan with an attribute `layer_costs`, one number for each layer, takes such
            costs as a second argument: those of the script that began the run, which the state
            keeps.
        steps_per_plan: The length of a period.
        decay: Weight of the past in the moving average of a layer's gain, over the steps in which
            it is active.
    """

    subsets: Callable[[int], Bool[np.ndarray, "num_subsets num_layers"]]
    plan: Callable[..., Float[Array, " num_subsets"]]
    steps_per_plan: int = 4
    decay: float = 0.9

    def __post_init__(self) -> None:
        static_int("steps_per_plan", self.steps_per_plan, minimum=1)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}.")

    @property
    def layer_costs(self) -> Float[np.ndarray, " num_layers"] | None:
        """The costs that the plan was made with, float32; None for a plan that takes none."""
        costs = getattr(self.plan, "layer_costs", None)
        return None if costs is None else np.asarray(costs, np.float32)

    def plan_with(
        self, gains: Float[Array, " num_layers"], layer_costs: Any
    ) -> Float[Array, " num_subsets"]:
        """The plan for given gains, and given costs if it takes any."""
        return self.plan(gains) if self.layer_costs is None else self.plan(gains, layer_costs)


def time_aware_depth(
    depth_costs: Sequence[float] | Float[np.ndarray, " num_layers"],
    *,
    rate: float = 1.0,
    floor: float = 0.05,
    steps_per_plan: int = 4,
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
    of a step of unit length, −⟨gradient, update⟩, that the run has shown; c_i = costs[i] − costs[i
    + 1] is what the layer adds to the cost of a step, and C0 what no depth avoids. A gain counts
    for at least 1 % of the largest, and is an average over the layer's own steps. Where gains are
    in proportion to costs, as in a transformer of equal blocks, the plan is full updates.

    Args:
        depth_costs: What a step costs at each depth, shallow to deep, in any unit, as
            :func:`~dropmuon_jax.planning.depth_cost` measures; positive. Where they rise with
            depth, as noise has it, the nearest in least squares that do not are taken. A run that
            is restarted goes on with those of its state, and warns of others.
        rate: ρ, the speed of convergence that is assumed. A smaller one drops more, which is ahead
            in very short runs and falls behind sooner.
        floor: The least probability with which a plan updates each layer, in [0, 1].
        steps_per_plan: Steps of a period. In the first two, layers gain as much as one another.
        decay: Weight of the past in the gains, over the steps in which a layer is active.

    Returns:
        An :class:`AdaptiveDistribution` over depths. Its samplers need the optimizer state,
        `sampler.depth(step, opt_state)`, and the optimizer :func:`record_gains` around it.

    Examples:
        A first layer of a third of the cost, whose gain is small; gains in proportion to costs.

        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> distribution = dm.time_aware_depth([1.0, 0.65, 0.3, 0.1])
        >>> included = distribution.plan(jnp.array([0.01, 0.03, 0.04, 0.04])).cumsum()
        >>> print(f"{included[0]:.2f} {included[1]:.2f} {included[2]:.2f}")
        0.27 0.46 0.71
        >>> print(distribution.plan(jnp.array([0.35, 0.35, 0.2, 0.1])))
        [1. 0. 0. 0.]

    References:
        Ours: Drop-Muon, arXiv:2510.02239, draws from fixed rules. With ρ = 1 and w = L it is the
        bound of :func:`~dropmuon_jax.planning.optimal_depth` with the criterion "sum".
    """
    if hasattr(depth_costs, "flops"):
        raise TypeError("depth_costs must be numbers: of a report of check_depths give its .flops.")
    costs = np.asarray(depth_costs, np.float64)
    if costs.ndim != 1 or not costs.size:
        raise ValueError(f"depth_costs must be one number for each depth, got {depth_costs!r}.")
    if not (np.isfinite(costs) & (costs > 0)).all():
        raise ValueError(f"depth_costs must be positive, got {costs.tolist()}.")
    check_positive("rate", rate)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], got {floor}.")
    layer_costs = -np.diff(not_rising(costs / costs[0]), append=0.0)
    plan = _TimeAwarePlan(tuple(layer_costs.tolist()), float(rate), float(floor))
    return AdaptiveDistribution(depth_subsets, plan, steps_per_plan, decay)


@dataclasses.dataclass(frozen=True)
class _TimeAwarePlan:
    layer_costs: tuple[float, ...]  # what each layer adds; of the last one, what no depth avoids
    rate: float
    floor: float

    def __call__(
        self, gains: Float[Array, " num_layers"], layer_costs: Any = None
    ) -> Float[Array, " num_layers"]:
        costs = jnp.asarray(self.layer_costs if layer_costs is None else layer_costs, jnp.float32)
        largest = jnp.maximum(jnp.max(gains), jnp.finfo(jnp.float32).tiny)
        weights = jnp.maximum(gains / largest, _SMALLEST_GAIN)
        included = minimise_waiting(weights, costs, rate=self.rate)
        return jnp.diff(jnp.maximum(included, self.floor), prepend=0.0)


def minimise_waiting(
    weights: Float[Array | np.ndarray, " num_layers"],
    layer_costs: Float[Array | np.ndarray, " num_layers"],
    base_cost: float | Float[Array, ""] = 0.0,
    *,
    rate: float = 1.0,
) -> Float[Array, " num_layers"]:
    r"""The π that minimises the cost of a step times the weighted wait for each layer.

    .. math::
        \min_{0 \le \pi_0 \le \dots \le \pi_{b-1} = 1}
        \Big(C_0 + \sum_i c_i \pi_i\Big)^{\rho} \sum_i \frac{w_i}{\pi_i^{\rho}}

    In the logarithms of π it is convex, so what satisfies its first-order conditions is optimal.
    With costs and waits of the optimum fixed they are those of an isotonic regression: layers
    are pooled into blocks B until r = (Σ_B w / Σ_B c)^{1/(1+ρ)} does not fall with depth, and
    π = min(1, λ r). In a pooled block Σ_B c r = Σ_B w r^-ρ, so that λ^{1+ρ} is the cost that is
    always paid over the weight that never waits, C0 and layers with π = 1 alike. Which those are is
    tried for every number of them; the best is the optimum. It is exact, in O(b²) memory and time.

    Args:
        weights: w, at least 0, the last of them positive. Of a layer with weight 0 and only such
            before it, π is 0.
        layer_costs: c, at least 0. The last layer is active in every step, so its cost is always
            paid.
        base_cost: C0, at least 0; with the last layer's cost it must be positive.
        rate: ρ > 0, static.

    Returns:
        π, not falling, the last one 1, in float32 at least.
    """
    arrays = [jnp.asarray(x) for x in (weights, layer_costs, base_cost)]
    is_double = any(x.dtype == jnp.float64 and not x.weak_type for x in arrays)
    dtype = jnp.float64 if is_double else jnp.float32
    weights, layer_costs, base_cost = (x.astype(dtype) for x in arrays)
    # In any units: only ratios matter.
    weights = weights / jnp.max(weights)
    paid = jnp.append(layer_costs[:-1], base_cost + layer_costs[-1])
    paid = paid / jnp.max(paid)
    w, c, tail, base = weights[None, :-1], paid[None, :-1], weights[-1], paid[-1]
    ratio = _isotonic_ratio(w, c)
    # In line m, the m deepest of the avoidable layers are in every step as well.
    size = w.size
    clipped = np.arange(size) >= size - np.arange(size + 1)[:, None]
    always_paid = base + jnp.sum(jnp.where(clipped, c, 0), axis=1)
    never_waits = tail + jnp.sum(jnp.where(clipped, w, 0), axis=1)
    scale = (always_paid / jnp.maximum(never_waits, jnp.finfo(dtype).tiny))[:, None]
    ideal = jnp.where(jnp.isinf(ratio), 1, scale * ratio)
    included = jnp.minimum(1, ideal) ** (1 / (1 + rate))
    cost = base + jnp.sum(c * included, axis=1)
    waits = jnp.where(w > 0, w * jnp.where(included > 0, included, 1) ** -rate, 0)
    waiting = tail + jnp.sum(waits, axis=1)
    best = included[jnp.argmin(cost**rate * waiting)]
    return jnp.append(best, jnp.ones((), dtype))


def not_rising(costs: Float[np.ndarray, " num_layers"]) -> Float[np.ndarray, " num_layers"]:
    """The nearest costs that do not rise with depth, neighbours that do pooled to their mean."""
    blocks: list[list[float]] = []
    for cost in costs.tolist():
        blocks.append([cost])
        while len(blocks) > 1 and np.mean(blocks[-1]) > np.mean(blocks[-2]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])


def _isotonic_ratio(
    numerators: Float[Array, "1 size"], denominators: Float[Array, "1 size"]
) -> Float[Array, "1 size"]:
    """Σ numerators / Σ denominators of blocks, pooled until it does not fall; ∞ over 0.

    By the min-max formula of isotonic regression: entry i is the largest over j ≤ i of the smallest
    over k ≥ i of the ratio of the sums from j to k. Sums start anew at every j: differences of
    running sums would lose the digits of small entries behind large ones.
    """
    size = numerators.size
    within = np.arange(size)[:, None] <= np.arange(size)
    above, below = (jnp.cumsum(jnp.where(within, x, 0), axis=1) for x in (numerators, denominators))
    ratios = jnp.where(within & (below > 0), above / jnp.where(below > 0, below, 1), jnp.inf)
    smallest = jax.lax.cummin(ratios, axis=1, reverse=True)
    return jnp.max(jnp.where(within, smallest, 0), axis=0, initial=0, keepdims=True)


def check_distribution(
    distribution: LayerDistribution | AdaptiveDistribution, layers: Layers, steps_per_draw: int
) -> None:
    """Error unless subsets and probabilities fit the layers, and can be traced.

    Of an adaptive distribution the plan is checked for gains that are all alike.
    """
    num_layers, names = layers.num_layers, ", ".join(layers.names)
    subsets = np.asarray(distribution.subsets(num_layers))
    if subsets.dtype != bool:
        raise TypeError(f"subsets of the distribution must be booleans, got {subsets.dtype}.")
    if subsets.ndim != 2 or subsets.shape[1] != num_layers:
        raise ValueError(
            f"The distribution is over subsets of shape {subsets.shape}, and there are "
            f"{num_layers} layers: {names}."
        )
    is_adaptive, costs = isinstance(distribution, AdaptiveDistribution), None
    if isinstance(distribution, AdaptiveDistribution):
        costs = distribution.layer_costs
        if distribution.steps_per_plan % steps_per_draw:
            raise ValueError(
                f"steps_per_draw is {steps_per_draw}, and must divide the distribution's "
                f"steps_per_plan, {distribution.steps_per_plan}."
            )
        if costs is not None and costs.shape != (num_layers,):
            raise ValueError(
                f"The distribution has the costs of {costs.size} depths, and there are "
                f"{num_layers} layers, each with a depth."
            )

    def probabilities_of(argument: Any) -> Any:
        if isinstance(distribution, AdaptiveDistribution):
            return distribution.plan_with(*map(jnp.asarray, argument))
        return distribution.probabilities(argument, num_layers)

    ones = np.ones(num_layers, np.float32)
    example = (ones, ones if costs is None else costs) if is_adaptive else np.int32(0)
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        probabilities = np.asarray(probabilities_of(example))
    if probabilities.shape != (len(subsets),):
        raise ValueError(
            f"The distribution gives {probabilities.size} probabilities, and {num_layers} layers "
            f"need {len(subsets)}: {names}."
        )
    check_probabilities(probabilities, 0)
    try:
        jax.eval_shape(probabilities_of, jax.tree.map(jax.typeof, example))
    except jax.errors.ConcretizationTypeError as error:
        name, traced = ("plan", "array of gains") if is_adaptive else ("probabilities", "step")
        raise TypeError(
            f"{name} of the distribution must be a function of a traced {traced}: write "
            "jnp.where(step < n, …) in place of a Python `if`."
        ) from error
