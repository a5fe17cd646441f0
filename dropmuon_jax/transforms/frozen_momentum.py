"""Momenta of other libraries, which do not look at the mask, frozen where a layer is inactive."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.trees import inside_update, leaf_keys
from dropmuon_jax.transforms.masked import promoting
from dropmuon_jax.transforms.per_layer import per_layer


def frozen_momentum(
    inner: optax.GradientTransformation, layers: Layers | None
) -> optax.GradientTransformation:
    """A momentum that may not look at the mask, such as Optax's, frozen in inactive layers.

    One that takes no extra arguments, and so no mask, runs layer by layer. Of others the leaves of
    the state that belong to inactive ones stay as they are; what they count, they count.
    """
    takes_mask = isinstance(inner, optax.GradientTransformationExtraArgs)
    tx = inner if takes_mask else promoting(inner)
    if layers is None:
        return tx

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        flags = dict(zip(leaf_keys(updates), jax.tree.leaves(layer_mask), strict=True))
        if not takes_mask:
            if not any(flags.values()):
                return jax.tree.map(jnp.zeros_like, updates), state
            with inside_update(has_mask=True):  # a part that looks for it finds that it is lost
                return tx.update(updates, state, params)
        shapes = dict(zip(flags, map(jnp.shape, jax.tree.leaves(updates)), strict=True))
        keys = sorted(flags, key=len, reverse=True)

        def keep(path: Any, old: Any, new: Any) -> Any:
            key = next(filter(jax.tree_util.keystr(path).endswith, keys), None)
            is_frozen = key is not None and not flags[key] and jnp.shape(old) == shapes[key]
            return old if is_frozen else new

        updates, new = tx.update(updates, state, params, layer_mask=layer_mask, **extra_args)
        return updates, jax.tree_util.tree_map_with_path(keep, state, new)

    frozen = optax.GradientTransformationExtraArgs(tx.init, update_fn)
    # Of stacks, momentum and LMO run layer by layer together.
    one_by_one = not takes_mask and not layers.stacks
    return per_layer(frozen, layers, takes_mask=True) if one_by_one else frozen
