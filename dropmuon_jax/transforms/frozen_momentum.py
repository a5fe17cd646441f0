"""Momenta of other libraries, which do not look at the mask, frozen where a layer is inactive."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.trees import inside_update
from dropmuon_jax.transforms.masked import promoting
from dropmuon_jax.transforms.per_layer import per_layer


def frozen_momentum(
    inner: optax.GradientTransformation, layers: Layers | None
) -> optax.GradientTransformation:
    """A momentum that may not look at the mask, such as Optax's, frozen in inactive layers.

    One that takes no extra arguments, and so no mask, runs layer by layer. Of others what the state
    keeps of inactive leaves, in whatever shape, stays as it is; what they count, they count.
    """
    takes_mask = isinstance(inner, optax.GradientTransformationExtraArgs)
    tx = inner if takes_mask else promoting(inner)
    if layers is None:
        return tx

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        flags = jax.tree.leaves(layer_mask)
        if not takes_mask:
            if not any(flags):
                return jax.tree.map(jnp.zeros_like, updates), state
            with inside_update(has_mask=True):  # a part that looks for it finds that it is lost
                return tx.update(updates, state, params)
        of_updates = jax.tree.structure(updates)

        def is_by_leaf(node: Any) -> bool:
            with contextlib.suppress(ValueError):
                parts = of_updates.flatten_up_to(node)
                return not any(getattr(part, "_fields", ()) for part in parts)  # states of links
            return False

        def keep(old: Any, new: Any) -> Any:
            if not is_by_leaf(old):
                return new
            pairs = zip(flags, *map(of_updates.flatten_up_to, (old, new)), strict=True)
            return of_updates.unflatten(y if flag else x for flag, x, y in pairs)

        updates, new = tx.update(updates, state, params, layer_mask=layer_mask, **extra_args)
        return updates, jax.tree.map(keep, state, new, is_leaf=is_by_leaf)

    frozen = optax.GradientTransformationExtraArgs(tx.init, update_fn)
    # Of stacks, momentum and LMO run layer by layer together.
    one_by_one = not takes_mask and not layers.stacks
    return per_layer(frozen, layers, takes_mask=True) if one_by_one else frozen
