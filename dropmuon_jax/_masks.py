"""Layer masks: trees of booleans, True where a leaf is active.

Of leaves that are stacked layers, a vector of booleans with an entry for each row. Python and NumPy
booleans are static; arrays of JAX, of shape () or (rows,), are not, and go with stacks only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dropmuon_jax._checks import check_extra_args
from dropmuon_jax._layers import CUT_TO_THE_SUBTREE, Layers, leaf_keys, leaf_paths, masked_paths


def resolve_mask(
    layer_mask: Any, tree: Any, extra_args: Mapping[str, Any], *, takes_rows: bool = False
) -> Any:
    """The checked layer mask of a tree; without one, every leaf is active.

    Args:
        layer_mask: The mask, or None.
        tree: What it is for.
        extra_args: The further arguments of `update`, among which may be a misspelt mask.
        takes_rows: Whether leaves of the mask may be vectors over rows, and arrays.

    Raises:
        TypeError: If a leaf of the mask is no boolean, naming it; or is an array in a mask without
            stacks; or has rows, or is an array, and `takes_rows` is false.
        ValueError: If the mask has not the structure of the tree, or a vector not the length of its
            leaf, naming a leaf where they differ.
    """
    if layer_mask is None:
        check_extra_args(extra_args)
        return jax.tree.map(lambda _: True, tree)
    resolved = _with_structure(layer_mask, tree)
    flags = jax.tree.leaves(resolved)
    has_rows = any(np.ndim(flag) == 1 for flag in flags)
    for path, flag, leaf in zip(leaf_paths(tree), flags, jax.tree.leaves(tree), strict=True):
        _check_flag(path, flag, leaf, has_rows=has_rows, takes_rows=takes_rows)
    return resolved


def resolve_whole_mask(layer_mask: Any, tree: Any, extra_args: Mapping[str, Any]) -> Any:
    """As :func:`resolve_mask`, of a whole network: rows or arrays only if it has stacks."""
    resolved = resolve_mask(layer_mask, tree, extra_args, takes_rows=True)
    if not any(np.ndim(flag) for flag in jax.tree.leaves(resolved)):
        resolve_mask(resolved, tree, {})
    return resolved


def _check_flag(path: str, flag: Any, leaf: Any, *, has_rows: bool, takes_rows: bool) -> None:
    """Error unless a leaf of a mask is a boolean, or of the right shape and in the right place."""
    if isinstance(flag, bool | np.bool_):
        return
    is_vector = isinstance(flag, np.ndarray) and flag.ndim == 1
    if not (isinstance(flag, jax.Array) or is_vector) or flag.dtype != bool:
        raise TypeError(
            f"layer_mask must have Python booleans as leaves, got {flag!r} at '{path}'. "
            "Make it with layers.mask(depth) or layers.subset(active)."
        )
    if not takes_rows and not has_rows:
        raise TypeError(
            f"layer_mask is an array at '{path}'. A traced or device mask cannot skip work: "
            "build it from a static depth, layers.mask(depth) with "
            "jax.jit(step, static_argnames='depth'), or use dm.switch_depth on the device. (With "
            "stacked layers, run by dm.scan_layers, it can, inside dm.per_layer.)"
        )
    if not takes_rows:
        raise TypeError(
            f"layer_mask tells the rows of the stack '{path}' apart, which this transformation "
            "does not. Put the whole chain into dm.per_layer(…, layers, takes_mask=True), which "
            "runs it on the layers of a stack one by one."
        )
    if flag.shape != () and flag.shape != np.shape(leaf)[:1]:
        raise ValueError(
            f"layer_mask has shape {flag.shape} at '{path}', and the leaf {np.shape(leaf)}: one "
            "boolean for each row. Make it with layers.mask(depth), of layers made from these "
            "parameters."
        )


def _with_structure(layer_mask: Any, tree: Any) -> Any:
    """The mask in the containers of the tree."""
    if jax.tree.structure(layer_mask) == jax.tree.structure(tree):
        return layer_mask
    if leaf_keys(layer_mask) == leaf_keys(tree):  # the same leaves in other containers, as in NNX
        return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(layer_mask))
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


def check_rows(layer_mask: Any, layers: Layers) -> None:
    """Error for a vector at a leaf that is not stacked in these layers."""
    units = layers.units
    indices = jax.tree.leaves(layers.units_of(layer_mask))
    for path, flag, index in zip(
        leaf_paths(layer_mask), jax.tree.leaves(layer_mask), indices, strict=True
    ):
        if np.ndim(flag) and units[index] not in layers.stacks:
            raise ValueError(
                f"layer_mask has rows at '{path}', which is not stacked in these layers. Make it "
                "with layers.mask(depth) or layers.subset(active) of the same layers."
            )


def ignores_mask(transformation: optax.GradientTransformation) -> bool:
    """Whether its state changes in a leaf that is not active; False where that cannot be told."""
    transformation = optax.with_extra_args_support(transformation)
    probe = {"probe": jnp.ones((2, 2))}
    try:
        with jax.ensure_compile_time_eval():
            state = transformation.init(probe)
            asleep: Any = transformation.update(
                probe, state, probe, prev_params_grads=probe, layer_mask={"probe": False}
            )[1]
            return any(
                not bool(jnp.array_equal(new, old, equal_nan=True))
                for new, old in zip(jax.tree.leaves(asleep), jax.tree.leaves(state), strict=True)
                if jnp.ndim(old)
            )
    except (LookupError, TypeError, ValueError):
        return False  # made for other parameters, or of traced numbers


def is_static(flag: Any) -> bool:
    """Whether a leaf of a mask is known now, and the same for the whole leaf of the tree."""
    return isinstance(flag, bool | np.bool_)


def where_active(flag: Any, leaf: Array, otherwise: Any) -> Array:
    """The active rows of a leaf, of a mask's leaf that is no Python boolean; else another value."""
    flag = jnp.reshape(flag, np.shape(flag) + (1,) * (leaf.ndim - np.ndim(flag)))
    return jnp.where(flag, leaf, jnp.asarray(otherwise, leaf.dtype))


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
