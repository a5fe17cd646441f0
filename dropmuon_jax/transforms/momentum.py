"""Momentum: averages of the gradients, plain and with the correction of MARS."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from dropmuon_jax._checks import check_floating, check_nonnegative, check_positive
from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.layers.trees import advance_active, map_active
from dropmuon_jax.orthogonalize.batches import to_unit_entries
from dropmuon_jax.schedules import check_decay_or_schedule
from dropmuon_jax.transforms.masked import masked_transformation


class MomentumState(NamedTuple):
    """State of :func:`momentum`."""

    momentum: optax.Updates
    """M, with the structure of the parameters, as of the last step in which a leaf was active."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of all steps, for a schedule of the decay."""


class CorrectedMomentumState(NamedTuple):
    """State of :func:`momentum` with bias correction: it knows how much of M is its first 0."""

    momentum: optax.Updates
    """M, with the structure of the parameters, as of the last step in which a leaf was active."""
    weight_of_zero: Float[Array, " leaves"]
    """Of each leaf, the product of the decays of its own steps; one entry where there are none."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of all steps, for a schedule of the decay."""


@names_counterparts
def momentum(
    decay: float | jax.Array | optax.Schedule = 0.9,
    *,
    nesterov: bool = False,
    bias_correction: bool = False,
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradients of active layers by their exponential moving average.

    .. math::
        M \leftarrow \text{decay}\, M + (1 - \text{decay})\, G

    starting from M = 0. With `nesterov` the update is decay · M + (1 - decay) · G, of the new M.
    With `bias_correction` M is divided by 1 - w, where w is the weight that the first 0 has in it,
    decayᵗ in a leaf's t-th step; with both, M by 1 - decay · w and G by 1 - w, as in Nadam. An LMO
    does not see a length: for one, correction changes Nesterov's form alone, in the first
    1 / (1 - decay) steps of a layer. A sharp form or an adaptive radius sees it there always.
    The gradient's sign is kept.

    Args:
        decay: The weight of the past, in [0, 1): a number, a scalar array or a schedule of it over
            all steps, such as :func:`gluon_decay`. The paper's β, the weight of the new gradient,
            is 1 - decay.
        nesterov: Whether to look one step ahead. Static.
        bias_correction: Whether to correct for the start at 0, as optax.contrib.muon does; PyTorch
            and Muon's own code do not. Static.
        dtype: The dtype in which M is stored, by default the parameter's. The average is taken in
            float32 at least.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). Updates have the gradient's shape and dtype. An inactive leaf has update zero and
        keeps every bit of its M. The state is a :class:`MomentumState`, or with bias correction a
        :class:`CorrectedMomentumState`.

    Raises:
        ValueError: At construction, if `decay` is a Python number outside [0, 1).
        TypeError: At construction, if `dtype` is not of floating-point numbers.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.momentum(decay=0.75)
        >>> state = tx.init({"stem": jnp.zeros(2), "head": jnp.zeros(2)})
        >>> grads = {"stem": jnp.array([4.0, 8.0]), "head": jnp.array([4.0, 8.0])}
        >>> updates, state = tx.update(grads, state, layer_mask={"stem": False, "head": True})
        >>> print(updates["stem"], updates["head"])
        [0. 0.] [1. 2.]

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1 (the average; Nesterov's form is Muon's). Dozat,
        *Incorporating Nesterov Momentum into Adam*, 2016, for its correction.
    """
    check_decay_or_schedule("decay", decay)
    if dtype is not None:
        check_floating("dtype", dtype)

    def init(params: optax.Params) -> MomentumState | CorrectedMomentumState:
        zeros, count = zeros_of(params, dtype), jnp.zeros((), jnp.int32)
        if bias_correction:
            return CorrectedMomentumState(zeros, jnp.ones(num_entries(params), jnp.float32), count)
        return MomentumState(zeros, count)

    def update(
        updates: optax.Updates, state: Any, params: Any, layer_mask: Any, extra_args: Any
    ) -> tuple[optax.Updates, MomentumState | CorrectedMomentumState]:
        del params, extra_args
        weight_of_past = decay(state.count) if callable(decay) else decay

        def average(m: Array, g: Array) -> Array:
            wide = wide_dtype(m, g)
            weight = jnp.asarray(weight_of_past, wide)
            return weight * m.astype(wide) + (1 - weight) * g.astype(wide)

        def look_ahead(g: Array, m: Array) -> Array:
            return (average(m, g) if nesterov else m).astype(g.dtype)

        def corrected(g: Array, m: Array, w: Array) -> Array:
            wide = wide_dtype(m, g)
            w = w.astype(wide)
            next_w = w * jnp.asarray(weight_of_past, wide) if nesterov else w
            return look_ahead(g.astype(wide) / (1 - w), m / (1 - next_w)).astype(g.dtype)

        new = advance_active(average, layer_mask, state.momentum, updates)
        stored = stored_like(state.momentum, new, layer_mask)
        count = jnp.asarray(optax.safe_increment(state.count))
        if not bias_correction:
            return map_active(look_ahead, layer_mask, updates, new), MomentumState(stored, count)
        past, active = jnp.asarray(weight_of_past, jnp.float32), active_entries(layer_mask)
        weights = jnp.where(active, past * state.weight_of_zero, state.weight_of_zero)
        entries = entries_like(state.momentum, weights)
        updates = map_active(corrected, layer_mask, updates, new, entries)
        return updates, CorrectedMomentumState(stored, weights, count)

    return masked_transformation(init, update)


class MarsMomentumState(NamedTuple):
    """State of :func:`mars_momentum`; of a leaf, as of the last step in which it was active."""

    momentum: optax.Updates
    """M, with the structure of the parameters."""
    last_grads: optax.Updates
    """The gradient of the last step, on its own batch."""
    started: Bool[Array, " leaves"]
    """Which leaves have a last gradient; a single entry where there are no leaves."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of all steps, for a schedule of the decay."""


@names_counterparts
def mars_momentum(
    decay: float | jax.Array | optax.Schedule = 0.95,
    *,
    gamma: float | jax.Array = 0.025,
    max_norm: float | jax.Array | None = 1.0,
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradients of active layers by the momentum of MARS, with one gradient a step.

    .. math::
        C &= g + \gamma \tfrac{\text{decay}}{1 - \text{decay}}\,(g - g_{\text{last}}) \\
        M &\leftarrow \text{decay}\, M + (1 - \text{decay})\,
            C \min\left(1, \tfrac{\text{max\_norm}}{\|C\|_F}\right)

    from M = 0. The last gradient stands in for the one of this batch at the previous parameters. It
    has noise of its own, so a small γ corrects a little and adds little: with γ = 1 this would be
    the raw gradient. :func:`mvr_momentum` takes both gradients of a batch; its table compares the
    costs. γ = 0 without `max_norm` is :func:`momentum`.

    Args:
        decay: The weight of the past, in [0, 1): a number, a scalar array or a schedule of it over
            all steps.
        gamma: γ, the strength of the correction, at least 0.
        max_norm: Each leaf's C is shortened to this Frobenius norm, so that no batch outweighs the
            others; None for no limit. Gradients that are always longer all count alike.
        dtype: The dtype in which M and the last gradient are stored, by default the parameter's.
            The arithmetic is in float32 at least.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). Updates have the gradient's shape and dtype, and its sign. An inactive leaf has
        update zero and keeps every bit of its state, a :class:`MarsMomentumState`: when it is
        active again, its last gradient is that of its own last step. In a leaf's first step C = g.

    Raises:
        TypeError: At construction, if `dtype` is not of floating-point numbers; in `update`, for
            the state of another momentum.
        ValueError: At construction, for Python numbers out of range.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.transforms.mars_momentum(decay=0.75, gamma=0.5)
        >>> state = tx.init({"w": jnp.zeros(2)})
        >>> updates, state = tx.update({"w": jnp.array([3.0, 4.0])}, state)
        >>> print(updates["w"])  # of the direction of norm 1
        [0.15 0.2 ]

    References:
        Yuan et al., *MARS: Unleashing the Power of Variance Reduction for Training Large Models*,
        2024, arXiv:2411.10438, in its approximate form; Liu, Yuan, Gu, *MARS-M: When Variance
        Reduction Meets Matrices*, 2025, for matrices, with these defaults. Its code takes 0 for the
        gradient before the first, which makes the first C longer by 1 + γ decay / (1 - decay).
    """
    check_decay_or_schedule("decay", decay)
    for name, value in (("gamma", gamma), ("max_norm", max_norm)):
        if callable(value):
            raise TypeError(
                f"{name} must be a number or a scalar array, got a schedule. Give it through "
                f"optax.inject_hyperparams(dm.transforms.mars_momentum)({name}=schedule)."
            )
    check_nonnegative("gamma", gamma)
    if max_norm is not None:
        check_positive("max_norm", max_norm)
    if dtype is not None:
        check_floating("dtype", dtype)

    def init(params: optax.Params) -> MarsMomentumState:
        started = jnp.zeros(num_entries(params), bool)
        return MarsMomentumState(
            zeros_of(params, dtype), zeros_of(params, dtype), started, jnp.zeros((), jnp.int32)
        )

    def update(
        updates: optax.Updates, state: Any, params: Any, layer_mask: Any, extra_args: Any
    ) -> tuple[optax.Updates, MarsMomentumState]:
        del params, extra_args
        past = jnp.asarray(decay(state.count) if callable(decay) else decay)

        def average(m: Array, g: Array, g_last: Array, started: Bool[Array, ""]) -> Array:
            wide = wide_dtype(m, g)
            beta, g = past.astype(wide), g.astype(wide)
            correction = jnp.where(started, g - g_last.astype(wide), 0)
            c = g + jnp.asarray(gamma, wide) * beta / (1 - beta) * correction
            if max_norm is not None:
                c = _shortened(c, jnp.asarray(max_norm, wide))
            return beta * m.astype(wide) + (1 - beta) * c

        started = entries_like(state.momentum, state.started)
        pasts = state.momentum, updates, state.last_grads, started
        new = advance_active(average, layer_mask, *pasts)
        new_state = MarsMomentumState(
            stored_like(state.momentum, new, layer_mask),
            stored_like(state.last_grads, updates, layer_mask),
            state.started | active_entries(layer_mask),
            jnp.asarray(optax.safe_increment(state.count)),
        )
        return map_active(lambda g, m: m.astype(g.dtype), layer_mask, updates, new), new_state

    return masked_transformation(init, update)


def _shortened(c: Array, limit: Float[Array, ""]) -> Array:
    """C with a Frobenius norm of at most `limit`, for entries of any size."""
    y, exponent = to_unit_entries(c, tuple(range(c.ndim)))
    total = jnp.sum(y**2)
    length = jnp.sqrt(jnp.where(total == 0, 1, total))
    is_longer = jnp.ldexp(length, exponent.reshape(())) > limit
    return jnp.where(is_longer, limit * (y / length), c)


def wide_dtype(*arrays: Array) -> np.dtype:
    """The dtype in which one computes with these arrays: theirs, and float32 at least."""
    return functools.reduce(np.promote_types, [x.dtype for x in arrays], np.dtype(np.float32))


def zeros_of(params: optax.Params, dtype: Any) -> optax.Updates:
    """Zeros like the parameters, in this dtype or by default theirs."""
    canonical = jax.dtypes.canonicalize_dtype  # NumPy's float64 is float32 without x64
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=canonical(dtype or p.dtype)), params)


def stored_like(old: Any, new: Any, layer_mask: Any) -> Any:
    """The new leaves where they are active, in the dtypes of the old ones."""
    return advance_active(lambda old, new: new.astype(old.dtype), layer_mask, old, new)


# What a state knows of a leaf beside arrays of its shape is an entry of a vector, in the order of
# the leaves: a tree of scalars would be taken for parameters by `optax.tree.map_params` and by
# sharding rules. Without leaves the vector has one entry, since Orbax saves no empty array.


def num_entries(tree: Any) -> int:
    """The length of a vector of a number for each leaf."""
    return len(jax.tree.leaves(tree)) or 1


def active_entries(layer_mask: Any) -> Bool[np.ndarray, " leaves"]:
    """The booleans of a mask as a vector."""
    return np.array(jax.tree.leaves(layer_mask) or [False], bool)


def entries_like(tree: Any, vector: Array) -> Any:
    """The entries of a vector as a tree."""
    structure = jax.tree.structure(tree)
    return structure.unflatten(vector[i] for i in range(structure.num_leaves))
