"""How often to update each layer: the inclusion probabilities under which layers wait least."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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

    That is Σ w_i n_i^-ρ after the n_i = n π_i steps of layer i for which a given time is enough. In
    the logarithms of π it is convex, so what satisfies its first-order conditions is optimal.
    With costs and waits of the optimum fixed they are those of an isotonic regression: layers
    are pooled into blocks B until r = (Σ_B w / Σ_B c)^{1/(1+ρ)} does not fall with depth, and
    π = min(1, λ r). In a pooled block Σ_B c r = Σ_B w r^-ρ, so that λ^{1+ρ} is the cost that is
    always paid over the weight that never waits, C0 and layers with π = 1 alike. Which those are is
    tried for every number of them; the best is the optimum.

    Exact, without iterations, in O(b²) memory and time; pure, and can be traced.

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
    weights, layer_costs, base_cost = map(jnp.asarray, (weights, layer_costs, base_cost))
    dtype = jnp.result_type(weights, layer_costs, base_cost, jnp.float32)
    # In any units: only ratios matter.
    weights = _over_largest(weights.astype(dtype))
    paid = jnp.append(layer_costs[:-1], base_cost + layer_costs[-1]).astype(dtype)
    paid = _over_largest(paid)
    w, c, tail, base = weights[:-1], paid[:-1], weights[-1], paid[-1]
    ratio = _isotonic_ratio(w, c)
    # Row m: the m deepest of the avoidable layers are in every step as well.
    size = len(w)
    clipped = jnp.arange(size) >= size - jnp.arange(size + 1)[:, None]
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
    numerators: Float[Array, " size"], denominators: Float[Array, " size"]
) -> Float[Array, " size"]:
    """Σ numerators / Σ denominators of blocks, pooled until it does not fall; ∞ over 0.

    By the min-max formula of isotonic regression: entry i is the largest over j ≤ i of the smallest
    over k ≥ i of the ratio of the sums from j to k. Sums start anew at every j: differences of
    running sums would lose the digits of small entries behind large ones.
    """
    size = len(numerators)
    within = jnp.arange(size)[:, None] <= jnp.arange(size)
    above, below = (jnp.cumsum(jnp.where(within, x, 0), axis=1) for x in (numerators, denominators))
    ratios = jnp.where(within & (below > 0), above / jnp.where(below > 0, below, 1), jnp.inf)
    smallest = jax.lax.cummin(ratios, axis=1, reverse=True)
    return jnp.max(jnp.where(within, smallest, 0), axis=0, initial=0)


def _over_largest(x: Array) -> Array:
    return x / jnp.max(x)
