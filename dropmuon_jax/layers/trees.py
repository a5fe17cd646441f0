"""Trees of parameters: the paths of their leaves, and layer masks.

A layer mask has the structure of the parameters and booleans as leaves, True where a leaf is
active. The mask of stacked layers has an array of booleans there, one for each layer of the stack,
of a shape that says along which axis they are: (L,), (1, L), (1, 1, L) and so on.
Python and NumPy booleans are static; JAX arrays may be traced, and go with stacks only.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, KeyPath
from jaxtyping import Array

from dropmuon_jax._checks import check_extra_args

NNX_VALUE = GetAttrKey("value")
_MAKE_A_MASK = "Make it with layers.mask(depth) or layers.subset(active)"
# The way out for an extra argument that a wrapper of Optax does not cut to its part of the tree.
CUT_TO_THE_SUBTREE = (
    "Inside optax.partition and optax.masked it must be cut to their part of the tree: use "
    "dm.chain_subtrees, or give them mask_compatible_extra_args=True."
)


def leaf_keys(tree: Any) -> list[str]:
    """A key for each leaf that is the same in a masked part of the tree, and in NNX's pure states.

    Flax hands `update` states of bare arrays where `init` has seen states of NNX variables, nodes
    with the single child `.value`, so that component is left out.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [
        jax.tree_util.keystr(path[:-1] if path and path[-1] == NNX_VALUE else path)
        for path in paths
    ]


def leaf_paths(tree: Any) -> list[str]:
    """The path of each leaf as a user writes it: `blocks/3/kernel`.

    The `.value` of an NNX variable is left out; a leaf of that name beside others is not.
    """
    paths: list[KeyPath] = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    children: dict[KeyPath, int] = {}
    for path in paths:
        children[path[:-1]] = children.get(path[:-1], 0) + 1

    def shorten(path: KeyPath) -> KeyPath:
        wraps_one_value = path and path[-1] == NNX_VALUE and children[path[:-1]] == 1
        return path[:-1] if wraps_one_value else path

    return [jax.tree_util.keystr(shorten(path), simple=True, separator="/") for path in paths]


def masked_paths(tree: Any) -> list[str]:
    """The paths of what `chain_subtrees` has sent through another chain."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, node in nodes
        if is_masked(node)
    ]


def difference(tree: Any, reference: Any, name: str) -> str:
    """The leaves in which a tree differs from another one, for a message."""
    paths, expected = set(leaf_paths(tree)), set(leaf_paths(reference))
    missing, extra = sorted(expected - paths), sorted(paths - expected)
    differences = [f"'{path}' is missing from {name}" for path in missing[:3]]
    differences += [f"'{path}' is only in {name}" for path in extra[:3]]
    # The same paths can come from a list, a dict and the attributes of a module.
    return "; ".join(differences) or (
        f"the containers differ, {jax.tree.structure(tree)} in {name} and "
        f"{jax.tree.structure(reference)} in the other"
    )


def restructure_like(
    name: str, tree: Any, reference: Any, *, reference_name: str = "gradients"
) -> Any:
    """The tree in the containers of another one with the same leaves.

    Messages call the trees `name` and `reference_name`.

    Raises:
        ValueError: If leaves are missing, too many, or of other shapes, naming some.
    """
    given, expected = jax.tree.leaves(tree), jax.tree.leaves(reference)
    if leaf_keys(tree) != leaf_keys(reference):
        way_out = f" {CUT_TO_THE_SUBTREE}" if masked_paths(reference) else ""
        raise ValueError(
            f"{name} must have the leaves of the {reference_name}: "
            f"{difference(tree, reference, name)}.{way_out}"
        )
    for path, leaf, other in zip(leaf_paths(reference), given, expected, strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{name} has shape {jnp.shape(leaf)} at '{path}', where the {reference_name} have "
                f"{jnp.shape(other)}."
            )
    return jax.tree.unflatten(jax.tree.structure(reference), given)


_MASK_IN_FORCE: contextvars.ContextVar[bool | None] = contextvars.ContextVar(
    "mask_in_force", default=None
)


def mask_in_force() -> bool | None:
    """Whether the update that runs now was given a mask, which is valid; None outside of all."""
    return _MASK_IN_FORCE.get()


@contextlib.contextmanager
def inside_update(has_mask: bool) -> Iterator[None]:
    """Within it run the parts of an update, which must see its mask, if it was given one."""
    token = _MASK_IN_FORCE.set(has_mask)
    try:
        yield
    finally:
        _MASK_IN_FORCE.reset(token)


def resolve_mask(
    layer_mask: Any,
    tree: Any,
    extra_args: Mapping[str, Any] | None = None,
    *,
    takes_rows: bool = False,
) -> Any:
    """The layer mask of a tree, with its structure; without a mask every leaf is active.

    A mask is validated where it enters the outermost transformation; equal static masks only once.

    Args:
        layer_mask: The mask, or None.
        tree: The updates or parameters.
        extra_args: The further arguments of `update`, among which may be a misspelt mask.
        takes_rows: Whether leaves of the mask may be arrays, over the layers of a stack or not.

    Raises:
        TypeError: If a leaf of the mask is no boolean, naming it; or is an array in a mask without
            stacks, or where `takes_rows` is false; or if there is no mask where one is in force,
            which was lost on the way.
        ValueError: If the mask has not the structure of the tree, or an array not the length of its
            leaf along their last axis, naming a leaf where they differ.
    """
    if layer_mask is None:
        check_extra_args(extra_args or {})
        if mask_in_force():
            raise TypeError(
                "update() was given a layer mask, and a part of it that looks at the mask does not "
                f"get it, for {', '.join(map(repr, leaf_paths(tree)[:3]))}: a wrapper around that "
                "part takes no extra arguments. If the update of your wrapper `w` takes them, as "
                "that of optax.MultiSteps, give optax.GradientTransformationExtraArgs(w.init, "
                "w.update); else put it into dm.per_layer(w, layers), which freezes it whole."
            )
        return jax.tree.map(lambda _: True, tree)
    flags, structure = jax.tree.flatten(layer_mask)
    leaves, expected = jax.tree.flatten(tree)
    is_checked = all(isinstance(flag, bool) for flag in flags) or (takes_rows and mask_in_force())
    if is_checked and (structure == expected or _fits(structure, expected)):
        return expected.unflatten(flags)
    resolved = _with_structure(layer_mask, tree)
    flags = jax.tree.leaves(resolved)
    has_rows = any(np.ndim(flag) > 0 for flag in flags)
    for path, flag, leaf in zip(leaf_paths(tree), flags, leaves, strict=True):
        _check_flag(path, flag, leaf, has_rows=has_rows, takes_rows=takes_rows)
    return resolved


def resolve_whole_mask(
    layer_mask: Any, tree: Any, extra_args: Mapping[str, Any] | None = None
) -> Any:
    """The mask of a whole network: vectors or arrays only if it has stacks."""
    resolved = resolve_mask(layer_mask, tree, extra_args, takes_rows=True)
    flags = jax.tree.leaves(resolved)
    has_arrays = any(not isinstance(flag, bool | np.bool_) for flag in flags)
    if has_arrays and not any(np.ndim(flag) for flag in flags):
        resolve_mask(resolved, tree)
    return resolved


@functools.lru_cache
def _fits(structure: Any, expected: Any) -> bool:
    """Whether two structures have the same leaves, in other containers, as in NNX."""
    trees = (s.unflatten(range(s.num_leaves)) for s in (structure, expected))
    given, wanted = map(leaf_keys, trees)
    return given == wanted


def _check_flag(path: str, flag: Any, leaf: Any, *, has_rows: bool, takes_rows: bool) -> None:
    """Error unless a leaf of a mask is a boolean, or of the right shape and in the right place."""
    if is_static(flag):
        return
    has_axes = isinstance(flag, np.ndarray) and flag.ndim > 0
    if not (isinstance(flag, jax.Array) or has_axes) or flag.dtype != bool:
        raise TypeError(
            f"layer_mask must have Python booleans as leaves, got {flag!r} at '{path}'. "
            f"{_MAKE_A_MASK}."
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
            f"layer_mask tells the layers of the stack '{path}' apart, which this transformation "
            "does not. Put the whole chain into dm.per_layer(…, layers, takes_mask=True), which "
            "runs it on the layers of a stack one by one."
        )
    axis = flag.ndim - 1
    if flag.shape != () and flag.shape != (1,) * axis + np.shape(leaf)[axis : axis + 1]:
        raise ValueError(
            f"layer_mask has shape {flag.shape} at '{path}', and the leaf {np.shape(leaf)}: one "
            "boolean for each layer of the stack. Make it with layers.mask(depth), of layers made "
            "from these parameters."
        )


def _with_structure(layer_mask: Any, tree: Any) -> Any:
    """The mask in the containers of the tree."""
    structure = jax.tree.structure(layer_mask)
    if structure == jax.tree.structure(tree) or _fits(structure, jax.tree.structure(tree)):
        return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(layer_mask))
    if isinstance(layer_mask, bool):
        raise TypeError(f"layer_mask must be a tree of booleans, got {layer_mask}. {_MAKE_A_MASK}.")
    way_out = (
        CUT_TO_THE_SUBTREE
        if masked_paths(tree)
        else f"{_MAKE_A_MASK}, of layers made from the same tree that you differentiate."
    )
    raise ValueError(
        "layer_mask has another structure than the updates or parameters: "
        f"{difference(layer_mask, tree, 'the mask')}. {way_out}"
    )


def is_static(flag: Any) -> bool:
    """Whether a leaf of a mask is known now, and the same for the whole leaf of the tree."""
    return isinstance(flag, bool | np.bool_)


def where_active(flag: Any, leaf: Array, otherwise: Any) -> Array:
    """The leaf in the active layers of a stack, for a flag that is no Python boolean."""
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
