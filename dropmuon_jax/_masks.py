"""Layer masks: trees of Python booleans, True where a leaf is active."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dropmuon_jax._checks import check_extra_args
from dropmuon_jax._layers import CUT_TO_THE_SUBTREE, leaf_keys, leaf_paths, masked_paths


def resolve_mask(layer_mask: Any, tree: Any, extra_args: Mapping[str, Any]) -> Any:
    """The checked layer mask of a tree; without one, every leaf is active.

    Args:
        layer_mask: The mask, or None.
        tree: What it is for.
        extra_args: The further arguments of `update`, among which may be a misspelt mask.

    Raises:
        TypeError: If a leaf of the mask is not a Python boolean, naming it.
        ValueError: If the mask has not the structure of the tree, naming a leaf where they differ.
    """
    if layer_mask is None:
        check_extra_args(extra_args)
        return jax.tree.map(lambda _: True, tree)
    flags = jax.tree.leaves(layer_mask)
    for path, leaf in zip(leaf_paths(layer_mask), flags, strict=True):
        if isinstance(leaf, jax.Array):
            raise TypeError(
                f"layer_mask is an array at '{path}'. A traced or device mask cannot skip work: "
                "build it from a static depth, layers.mask(depth) with "
                "jax.jit(step, static_argnames='depth'), or use dm.switch_depth on the device."
            )
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"layer_mask must have Python booleans as leaves, got {leaf!r} at '{path}'. "
                "Make it with layers.mask(depth) or layers.subset(active)."
            )
    if jax.tree.structure(layer_mask) == jax.tree.structure(tree):
        return layer_mask
    if leaf_keys(layer_mask) == leaf_keys(tree):  # the same leaves in other containers, as in NNX
        return jax.tree.unflatten(jax.tree.structure(tree), flags)
    if jax.tree.structure(layer_mask).num_leaves == 1 and isinstance(layer_mask, bool):
        raise TypeError(
            f"layer_mask must be a tree of booleans, got {layer_mask}. Make it with "
            "layers.mask(depth) or layers.subset(active)."
        )
    mask_paths, tree_paths = set(leaf_paths(layer_mask)), set(leaf_paths(tree))
    missing, extra = sorted(tree_paths - mask_paths), sorted(mask_paths - tree_paths)
    difference = "; ".join(
        [f"'{path}' is missing from the mask" for path in missing[:3]]
        + [f"'{path}' is only in the mask" for path in extra[:3]]
    )
    way_out = (
        CUT_TO_THE_SUBTREE
        if masked_paths(tree)
        else "Make it with layers.mask(depth) or layers.subset(active), of layers made from the "
        "same tree that you differentiate."
    )
    raise ValueError(
        f"layer_mask has another structure than the updates or parameters: {difference}. {way_out}"
    )


def map_active(function: Callable[..., Any], layer_mask: Any, updates: Any, *rest: Any) -> Any:
    """`function` of the active leaves; zeros, of the update's dtype, for the others."""
    return jax.tree.map(
        lambda active, update, *others: (
            function(update, *others) if active else jnp.zeros_like(update)
        ),
        layer_mask,
        updates,
        *rest,
    )


def advance_active(function: Callable[..., Any], layer_mask: Any, state: Any, *rest: Any) -> Any:
    """`function` of the active leaves of a state; the others are returned as they are."""
    return jax.tree.map(
        lambda active, old, *others: function(old, *others) if active else old,
        layer_mask,
        state,
        *rest,
    )
