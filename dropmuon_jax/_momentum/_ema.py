"""The exponential moving average of the gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dropmuon_jax._checks import check_floating
from dropmuon_jax._masks import advance_active, map_active, resolve_mask
from dropmuon_jax._momentum._schedules import check_decay_or_schedule


class MomentumState(NamedTuple):
    """State of :func:`momentum`."""

    momentum: optax.Updates
    """M, with the structure of the parameters, as of the last step in which a leaf was active."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """All steps, for a schedule of the decay."""


def momentum(
    decay: float | jax.Array | optax.Schedule = 0.9, *, nesterov: bool = False, dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradients of active layers by their exponential moving average.

    .. math::
        M \leftarrow \text{decay}\, M + (1 - \text{decay})\, G

    starting from M = 0, without bias correction: one factor, which an LMO does not see, and a sharp
    form or an adaptive radius does, in the first 1 / (1 - decay) steps of a layer. With
    `nesterov` the update is decay · M + (1 - decay) · G, of the new M; optax.contrib.muon corrects
    both terms, by different factors, so that first steps differ. The gradient's sign is kept.

    Args:
        decay: The weight of the past, in [0, 1): a number, a scalar array or a schedule of it over
            all steps, such as :func:`gluon_decay`. The paper's β, the weight of the new gradient,
            is 1 - decay.
        nesterov: Whether to look one step ahead. Static.
        dtype: The dtype in which M is stored, by default the parameter's. The average is taken in
            float32 at least.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). Updates have the gradient's shape and dtype. An inactive leaf has update zero and
        keeps every bit of its M. The state is a :class:`MomentumState`.

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
        arXiv:2510.02239, Algorithm 1 (the average; Nesterov's form is Muon's).
    """
    check_decay_or_schedule("decay", decay)
    if dtype is not None:
        check_floating("dtype", dtype)

    def init_fn(params: optax.Params) -> MomentumState:
        return MomentumState(
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype or p.dtype), params),
            jnp.zeros((), jnp.int32),
        )

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        del params
        layer_mask = resolve_mask(layer_mask, updates, extra_args)
        weight_of_past = decay(state.count) if callable(decay) else decay

        def average(m, g):
            wide = np.promote_types(
                np.promote_types(m.dtype, np.float32), np.promote_types(g.dtype, np.float32)
            )
            weight = jnp.asarray(weight_of_past, wide)
            return weight * m.astype(wide) + (1 - weight) * g.astype(wide)

        def look_ahead(g, m):
            return (average(m, g) if nesterov else m).astype(g.dtype)

        new = advance_active(average, layer_mask, state.momentum, updates)
        updates = map_active(look_ahead, layer_mask, updates, new)
        stored = advance_active(lambda m, old: m.astype(old.dtype), layer_mask, new, state.momentum)
        return updates, MomentumState(stored, jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
