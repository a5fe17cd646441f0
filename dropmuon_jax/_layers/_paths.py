"""Names of leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, KeyPath

_NNX_VALUE = GetAttrKey("value")
# What to do about an extra argument that a wrapper of Optax does not cut to its part of the tree.
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
        jax.tree_util.keystr(path[:-1] if path and path[-1] == _NNX_VALUE else path)
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
        wraps_one_value = path and path[-1] == _NNX_VALUE and children[path[:-1]] == 1
        return path[:-1] if wraps_one_value else path

    return [jax.tree_util.keystr(shorten(path), simple=True, separator="/") for path in paths]


def restructure_like(
    name: str, tree: Any, reference: Any, *, reference_name: str = "gradients"
) -> Any:
    """The tree in the containers of another one with the same leaves.

    Args:
        name: What the message calls the tree.
        tree: A tree of arrays.
        reference: The other one.
        reference_name: What the message calls that.

    Raises:
        ValueError: If leaves are missing, too many, or of other shapes, naming some.
    """
    given, expected = jax.tree.leaves(tree), jax.tree.leaves(reference)
    keys, expected_keys = leaf_keys(tree), leaf_keys(reference)
    if keys != expected_keys:
        paths, expected_paths = set(leaf_paths(tree)), set(leaf_paths(reference))
        missing, extra = sorted(expected_paths - paths), sorted(paths - expected_paths)
        differences = [f"'{path}' is missing" for path in missing[:3]]
        differences += [f"'{path}' is not among them" for path in extra[:3]]
        if not differences:
            differences = ["their containers differ: a list or attribute against a dict"]
        way_out = f" {CUT_TO_THE_SUBTREE}" if masked_paths(reference) else ""
        raise ValueError(
            f"{name} must have the leaves of the {reference_name}, and "
            f"{'; '.join(differences)}.{way_out}"
        )
    for path, leaf, other in zip(leaf_paths(reference), given, expected, strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{name} has shape {jnp.shape(leaf)} at '{path}', where the {reference_name} have "
                f"{jnp.shape(other)}."
            )
    return jax.tree.unflatten(jax.tree.structure(reference), given)


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
