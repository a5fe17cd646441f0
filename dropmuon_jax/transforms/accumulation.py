"""Accumulation: one step for the gradients of several micro-batches, all of one depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from dropmuon_jax._checks import check_parameters, check_transformation, describe
from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.prefixes import given_mask
from dropmuon_jax.layers.rows import active_layers
from dropmuon_jax.layers.states import checked_transformation, state_like
from dropmuon_jax.layers.trees import is_static, resolve_whole_mask, where_active
from dropmuon_jax.sampling.adaptive import AdaptiveDistribution
from dropmuon_jax.sampling.reading import to_host
from dropmuon_jax.sampling.sampler import DepthSampler
from dropmuon_jax.transforms.masked import with_second_gradient
from dropmuon_jax.transforms.momentum import wide_dtype
from dropmuon_jax.transforms.prev_params import keeps_prev_params

ShouldSkip = Callable[[optax.Updates, Any, Any], tuple[Any, Any]]

_ACCUMULATE = (
    "Take dm.accumulate(optimizer, sampler) in place of optax.MultiSteps, and steps_per_draw of as "
    "many micro-batches in the sampler."
)
_IN_THE_LOSS = (
    "A distribution that follows the run counts every call as a step: gather the gradients within "
    "the loss, by a jax.lax.scan over micro-batches, and leave dm.accumulate out."
)


class AccumulatedState(NamedTuple):
    """State of :func:`accumulate`."""

    inner_state: optax.OptState
    """The state of the optimizer, which has seen whole steps only."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of all micro-batches, skipped ones included: the call to resume from."""
    counted: Bool[Array, "micro_batches layers"]
    """Which micro-batches of the latest step count, and for which layers."""
    sums: optax.Updates
    """The sums of their gradients, in float32 at least."""
    prev_params_sums: optax.Updates
    """The sums of their gradients at the previous parameters; empty without variance reduction."""


@names_counterparts
def accumulate(
    optimizer: optax.GradientTransformation,
    sampler: DepthSampler,
    *,
    should_skip_update_fn: ShouldSkip | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps by the mean gradient of n micro-batches, n being the sampler's `steps_per_draw`.

    .. math::
        \bar G = \sum_j w_j G_j \Big/ \sum_j w_j, \qquad w_j \in \{0, 1\}

    over the micro-batches j of a step, where w is 0 for a skipped one. Call k of `update` belongs
    to step k // n, **whether it is skipped or not**, and the sampler draws one depth for just these
    calls. So the gradients of two depths cannot be mixed, and nothing has to be read back from the
    device. The optimizer runs in the last call of a step alone; the updates of the others are zeros
    that keep every bit of a parameter. If all micro-batches of a step are skipped, so is the step.

    This differs from `optax.MultiSteps` in: 1. A skipped micro-batch counts as a call; there it
    does not, and from then on a step would have micro-batches of two draws. 2. The optimizer, with
    its Newton-Schulz iterations, runs once a step; there it runs in every call. 3. The second
    gradient of variance reduction, `prev_params_grads`, is averaged too. 4. Weights are by layer:
    where the depth does change within a step, each layer has the mean of the micro-batches in which
    it was active, and a layer that is not in the last one does not move.

    Args:
        optimizer: The whole optimizer, clipping included, which is given the mean gradient.
        sampler: The sampler of the layers, whose `steps_per_draw` is the number of micro-batches.
        should_skip_update_fn: Which micro-batches are left out, as in `optax.MultiSteps`: a
            function of gradients, step and parameters to (whether, anything), such as
            `optax.skip_not_finite`. Gradients of inactive layers are 0.

    Returns:
        A transformation for the whole parameters, to be given every micro-batch. Its extra
        arguments, such as `layer_mask` or `depth`, are passed on. The state is an
        :class:`AccumulatedState`.

    Raises:
        TypeError: At construction, for other arguments; at `init`, around another accumulation.
        ValueError: At construction, for a distribution that follows the run, whose record counts
            steps.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": jnp.ones(1), "head": jnp.ones(1)}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0, steps_per_draw=3)
        >>> tx = dm.accumulate(
        ...     optax.scale(-1.0), sampler, should_skip_update_fn=optax.skip_not_finite
        ... )
        >>> state, mask = tx.init(params), layers.mask(sampler.depth(0))
        >>> for size in (2.0, jnp.inf, 4.0):
        ...     grads = {"stem": jnp.array([size]), "head": jnp.array([size])}
        ...     updates, state = tx.update(grads, state, params, layer_mask=mask)
        >>> print(updates["head"], state.counted[:, 1])
        [-3.] [ True False True]
    """
    check_transformation("optimizer", optimizer)
    if not isinstance(sampler, DepthSampler):
        raise TypeError(
            f"sampler must be a DepthSampler, got {describe(sampler)}. The number of micro-batches "
            "is its steps_per_draw: dm.DepthSampler(layers, dm.uniform_depth(), seed=0, "
            "steps_per_draw=num_micro_batches)."
        )
    if isinstance(sampler.distribution, AdaptiveDistribution):
        raise ValueError(_IN_THE_LOSS)
    layers, num_calls = sampler.layers, sampler.steps_per_draw
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: optax.Params) -> AccumulatedState:
        check_parameters(params)
        layers.units_of(params)  # an error if a leaf is in no layer
        inner_state = inner.init(params)
        if accumulations(inner_state):
            raise TypeError("optimizer accumulates already: leave one of the two out.")

        def zeros() -> optax.Updates:
            return jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), wide_dtype(p)), params)

        return AccumulatedState(
            inner_state,
            jnp.zeros((), jnp.int32),
            jnp.zeros((num_calls, layers.num_layers), bool),
            zeros(),
            zeros() if keeps_prev_params(inner_state) else (),
        )

    def update_fn(updates, state, params=None, *, layer_mask=None, depth=None, **extra_args):
        if depth is not None:
            layer_mask = given_mask(layers, updates, layer_mask, depth)
            layer_mask = resolve_whole_mask(layer_mask, updates)
        mask = jax.tree.map(lambda _: True, updates) if layer_mask is None else layer_mask
        extra_args |= {} if layer_mask is None else {"layer_mask": mask}
        extra_args = with_second_gradient(extra_args, updates)

        call = state.count % num_calls
        sums, grads = {"updates": state.sums}, {"updates": updates}
        if jax.tree.leaves(state.prev_params_sums) and "prev_params_grads" in extra_args:
            sums["prev_params_grads"] = state.prev_params_sums
            grads["prev_params_grads"] = extra_args["prev_params_grads"]
        grads = {name: jax.tree.map(_if_active, mask, tree) for name, tree in grads.items()}
        counts = jnp.array(True)
        if should_skip_update_fn is not None:
            for tree in grads.values():
                skips, _ = should_skip_update_fn(tree, state.count // num_calls, params)
                counts &= ~jnp.asarray(skips, bool)

        before = state.counted & (call > 0)
        is_this = np.arange(num_calls)[:, None] == call
        active = jnp.asarray(active_layers(layers.num_layers, layers.rows_of(mask), mask))
        counted = jnp.where(is_this, (counts & active)[None], before)
        weight_before, weight = (_by_leaf(layers, rows, updates) for rows in (before, counted))

        def add(flag: Any, total: Array, grad: Array, old: Array) -> Array:
            if is_static(flag) and not flag:
                return total
            new = jnp.where(old > 0, total, 0) + jnp.where(counts, grad, 0).astype(total.dtype)
            return new if is_static(flag) else where_active(flag, new, total)

        def mean(flag: Any, total: Array, grad: Array, count: Array) -> Array:
            average = jnp.where(count > 0, total / jnp.maximum(count, 1).astype(total.dtype), 0)
            return _if_active(flag, average.astype(grad.dtype))

        sums = {n: jax.tree.map(add, mask, sums[n], grads[n], weight_before) for n in grads}

        def step() -> tuple[Any, Any]:
            means = {n: jax.tree.map(mean, mask, sums[n], grads[n], weight) for n in grads}
            given = {**extra_args, **means}
            new = inner.update(given.pop("updates"), state.inner_state, params, **given)
            return new[0], state_like(state.inner_state, new[1])

        def wait() -> tuple[Any, Any]:
            like = jax.eval_shape(step)[0]  # traced for the dtypes of the updates
            zeros = jax.tree.map(lambda g, u: jnp.full_like(g, -0.0, dtype=u.dtype), updates, like)
            return zeros, state.inner_state

        # A layer of which nothing counts would move by its momentum.
        are_known = jnp.any(counted, axis=0) | ~active
        steps = (call == num_calls - 1) & jnp.any(counted) & jnp.all(are_known)
        if isinstance(steps, Tracer):
            new_updates, inner_state = jax.lax.cond(steps, step, wait)
        else:  # where a conditional of new functions would be compiled in every call
            new_updates, inner_state = step() if to_host(steps) else wait()
        return new_updates, AccumulatedState(
            inner_state,
            jnp.asarray(optax.safe_increment(state.count)),
            counted,
            sums["updates"],
            sums.get("prev_params_grads", state.prev_params_sums),
        )

    return checked_transformation(init_fn, update_fn)


def _if_active(flag: Any, grad: Array) -> Array:
    """The gradient in active layers; 0 in the others, whatever was given."""
    if not is_static(flag):
        return where_active(flag, grad, 0)
    return grad if flag else jnp.zeros_like(grad)


def _by_leaf(layers: Layers, counted: Bool[Array, "micro_batches layers"], tree: Any) -> Any:
    """How many micro-batches count for each leaf, or each of its rows, in a shape that fits it."""
    weights: Float[Array, " layers"] = jnp.sum(counted, axis=0, dtype=jnp.float32)
    leaves, treedef = jax.tree.flatten(tree)
    shapes = [()] * len(leaves)
    if layers.stacks:  # whose masks say along which axis a leaf is stacked
        active = jax.ShapeDtypeStruct((layers.num_layers,), bool)
        shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(layers.subset, active))]
    rows = zip(layers.rows_of(tree), shapes, leaves, strict=True)
    return treedef.unflatten(
        weights[np.array(of_leaf)].reshape(shape + (1,) * (leaf.ndim - len(shape)))
        for of_leaf, shape, leaf in rows
    )


def accumulations(opt_state: Any) -> list[Any]:
    """The states of `accumulate` and of `optax.MultiSteps` in the state of an optimizer."""

    def accumulates(node: Any) -> bool:
        return isinstance(node, AccumulatedState | optax.MultiStepsState)

    return [*filter(accumulates, jax.tree.leaves(opt_state, is_leaf=accumulates))]


def calls_per_step(opt_state: Any) -> int:
    """How many calls of `update` make a step; an error for `optax.MultiSteps`, where it varies."""
    found = accumulations(opt_state)
    if any(isinstance(state, optax.MultiStepsState) for state in found):
        raise ValueError(
            "optax.MultiSteps counts the micro-batches that it accepts, and a sampler counts calls:"
            " after a skipped one, or with another steps_per_draw, a step would mix the gradients "
            f"of two depths. {_ACCUMULATE}"
        )
    return len(found[0].counted) if found else 1


def check_accumulation(opt_state: Any, sampler: DepthSampler) -> None:
    """Error unless the micro-batches that a state gathers share a draw of the sampler."""
    num_calls = calls_per_step(opt_state)
    if not accumulations(opt_state):
        return
    if isinstance(sampler.distribution, AdaptiveDistribution):
        raise ValueError(_IN_THE_LOSS)
    if num_calls != sampler.steps_per_draw:
        raise ValueError(
            f"The optimizer gathers {num_calls} micro-batches for a step, and the sampler draws a "
            f"depth for {sampler.steps_per_draw}: give dm.accumulate and dm.train_step the same "
            "sampler."
        )


def check_call(opt_state: Any, step: int) -> None:
    """Error unless a call is as far into its step as the state is, where its count is known."""
    for state in accumulations(opt_state):
        if isinstance(state, optax.MultiStepsState) or isinstance(state.count, Tracer):
            continue
        count, num_calls = to_host(state.count), len(state.counted)
        if count.ndim == 0 and count % num_calls != step % num_calls:
            raise ValueError(
                f"opt_state has gathered {count} micro-batches, {num_calls} for a step, and was "
                f"given for call {step}, so that a step would have those of two draws. Go on with "
                f"step={count}, or start with optimizer.init(params)."
            )
