"""What a run has shown of its layers: the record in the optimizer state that adaptive draws use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from dropmuon_jax._layers import Layers
from dropmuon_jax._masks import is_static, resolve_mask
from dropmuon_jax._sampling._adaptive import AdaptiveDistribution


class LayerGainsState(NamedTuple):
    """State of a transformation that an adaptive sampler is attached to."""

    inner_state: optax.OptState
    """That of the transformation."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of steps taken, a scalar int32."""
    gains: Float[Array, " num_layers"]
    """First-order decrease of the loss, −⟨gradient, update⟩, of each layer in a step in which it is
    active: an exponential moving average over these steps, in the loss's unit."""
    num_active_steps: Int[Array, " num_layers"]
    """How many there were."""
    probabilities: Float[Array, " num_subsets"]
    """Of each subset, in the period under way."""
    next_probabilities: Float[Array, " num_subsets"]
    """In the next period; known one period ahead, so that the host never waits for it."""


def record_gains(
    transformation: optax.GradientTransformation,
    layers: Layers,
    distribution: AdaptiveDistribution,
) -> optax.GradientTransformationExtraArgs:
    """The transformation with a :class:`LayerGainsState` around its state."""
    inner = optax.with_extra_args_support(transformation)

    def init_fn(params: optax.Params) -> LayerGainsState:
        num_subsets = len(distribution.subsets(layers.num_layers))
        uniform = jnp.full(num_subsets, 1 / num_subsets, jnp.float32)
        return LayerGainsState(
            transformation.init(params),
            jnp.zeros((), jnp.int32),
            jnp.zeros(layers.num_layers, jnp.float32),
            jnp.zeros(layers.num_layers, jnp.int32),
            uniform,
            uniform.copy(),
        )

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        grads = updates
        updates, inner_state = inner.update(
            grads, state.inner_state, params, layer_mask=layer_mask, **extra_args
        )
        mask = resolve_mask(layer_mask, grads, extra_args, takes_rows=bool(layers.stacks))
        rows_of_leaf = layers.rows_of(grads)
        gains, num_active_steps = _average(
            state,
            _gains(layers, rows_of_leaf, mask, grads, updates),
            _active_layers(layers, rows_of_leaf, mask),
            distribution.decay,
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        ends_period = count % distribution.steps_per_plan == 0
        # What nobody has seen may be worth as much as the best.
        hoped = jnp.where(num_active_steps > 0, gains, jnp.max(gains))
        plan = jnp.asarray(distribution.plan(hoped), jnp.float32)
        return updates, LayerGainsState(
            inner_state,
            count,
            gains,
            num_active_steps,
            jnp.where(ends_period, state.next_probabilities, state.probabilities),
            jnp.where(ends_period, plan, state.next_probabilities),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def find_record(opt_state: Any) -> LayerGainsState:
    """The one in the state of an optimizer.

    Raises:
        ValueError: If there is none, or one inside another.
    """
    found = _records(opt_state)
    if not found:
        raise ValueError(
            "opt_state has no record of the layers' gains, which this distribution draws by. Is it "
            "the state of the optimizer that the sampler is attached to? A chain of your own "
            "becomes one by tx = sampler.attach_to(optax.chain(…, sampler))."
        )
    if len(found) > 1 or _records(found[0].inner_state):
        raise ValueError(
            "opt_state has several records of the layers' gains. Attach the sampler once, to the "
            "whole chain; what goes around it keeps the draws by tx.attach_to(optax.chain(…, tx)). "
            "(drop_muon and the like keep it themselves: around optax.inject_hyperparams attach "
            "nothing, and draw with another one's depth(step, opt_state).)"
        )
    return found[0]


def _records(opt_state: Any) -> list[LayerGainsState]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LayerGainsState))
    return [node for node in nodes if isinstance(node, LayerGainsState)]


def _average(
    state: LayerGainsState,
    gains: Float[Array, " num_layers"],
    active: Bool[Array, " num_layers"] | np.ndarray,
    decay: float,
) -> tuple[Array, Array]:
    """The moving averages, and the numbers of steps in them; the first step counts whole."""
    # A step that overflowed has shown nothing.
    heard = active & jnp.isfinite(gains)
    num_active_steps = state.num_active_steps + heard
    weight = jnp.maximum(1 - decay, 1 / jnp.maximum(num_active_steps, 1)).astype(jnp.float32)
    averages = state.gains + weight * (gains - state.gains)
    return jnp.where(heard, averages, state.gains), num_active_steps


def _active_layers(
    layers: Layers, rows_of_leaf: Sequence[tuple[int, ...]], mask: Any
) -> Bool[Array, " num_layers"] | np.ndarray:
    """An entry for each layer; NumPy's where the mask is static."""
    flags: list[Any] = [False] * layers.num_layers
    for flag, rows in zip(jax.tree.leaves(mask), rows_of_leaf, strict=True):
        for row, layer in enumerate(rows):
            flags[layer] = flag[row] if np.ndim(flag) else flag
    if all(map(is_static, flags)):
        return np.array(flags, bool)
    return jnp.stack([jnp.asarray(flag, bool) for flag in flags])


def _gains(
    layers: Layers, rows_of_leaf: Sequence[tuple[int, ...]], mask: Any, grads: Any, updates: Any
) -> Float[Array, " num_layers"]:
    """−⟨gradient, update⟩ of each layer."""
    total = jnp.zeros(layers.num_layers, jnp.float32)
    trees = [jax.tree.leaves(tree) for tree in (mask, grads, updates)]
    for rows, flag, grad, update in zip(rows_of_leaf, *trees, strict=True):
        if is_static(flag) and not flag:
            continue
        products = grad.astype(jnp.float32) * update.astype(jnp.float32)
        of_rows = jnp.sum(products, axis=tuple(range(1, products.ndim)) if len(rows) > 1 else None)
        # A sum, not a scatter, which explicit axes would want to know more of.
        is_of_layer = np.arange(layers.num_layers)[:, None] == np.array(rows)
        total -= jnp.sum(jnp.where(is_of_layer, of_rows, 0), axis=1)
    return total
