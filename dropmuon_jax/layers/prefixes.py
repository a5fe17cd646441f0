"""Trees that a user gives beside parameters, such as labels: fitted to them by the paths of leaves.

What is fitted has the containers of the parameters, so that Optax can map over both.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, tree_flatten_with_path

from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.trees import NNX_VALUE, difference, leaf_paths


def fitted_prefix(
    name: str, given: Any, check_value: Callable[[str, Any], None]
) -> Callable[[Any], Any]:
    """The function from parameters to a tree of one value for each leaf, which is made once.

    Args:
        name: What messages call the tree.
        given: A tree of values with the leaves of the parameters, or a prefix of one, as a single
            value is; or a function from the parameters to such a tree. A model of Equinox can be
            called, and is a tree. The containers may be others: plain dicts for a state of NNX.
        check_value: Raises an error for a bad value, from the path of a leaf and the value.
    """
    is_function = callable(given) and (
        jax.tree_util.all_leaves([given]) or isinstance(given, jax.tree_util.Partial)
    )

    def fit(tree: Any) -> Any:
        values = _fit(name, given(tree) if is_function else given, tree)
        for path, value in zip(leaf_paths(tree), jax.tree.leaves(values), strict=True):
            check_value(path, value)
        return values

    return remembered_labels(fit)


def remembered_labels(labels: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Labels are made once for trees of one structure and shapes: Optax asks in every update."""
    known: dict[Any, Any] = {}

    def remembered(tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        key = treedef, tuple(map(jnp.shape, leaves))
        if key not in known:
            known[key] = labels(tree)
        return known[key]

    return remembered


def without_masked(tree: Any) -> Any:
    """A tree without what `optax.MaskedNode()` alone is in: the same leaves in fewer nodes.

    A state for each of fifty layers would else have fifty times the nodes of the parameters, and
    each call of a program takes a tree apart and puts one together. A key of a mapping is left
    out, and another child is one masked node.
    """

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def is_out(node: Any) -> bool:
        nodes = jax.tree.leaves(node, is_leaf=is_masked)
        return bool(nodes) and all(map(is_masked, nodes))

    if is_masked(tree) or jax.tree_util.all_leaves([tree]):
        return tree
    is_class = dataclasses.is_dataclass(tree)  # as one of chex, which is a mapping as well
    if isinstance(tree, Mapping) and not isinstance(tree, collections.defaultdict) and not is_class:
        make: Any = type(tree)  # a dict, Flax's FrozenDict, a state of NNX
        return make({key: without_masked(of) for key, of in tree.items() if not is_out(of)})
    children, node = jax.tree.flatten(tree, is_leaf=lambda child: child is not tree)
    return node.unflatten(
        optax.MaskedNode() if is_out(child) else without_masked(child) for child in children
    )


def _fit(name: str, given: Any, tree: Any) -> Any:
    """The value of each leaf: that of the leaf, or of the node above it, which has its path."""
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:  # as the placeholder of optax.tree.map_params
        return tree
    pairs, structure = tree_flatten_with_path(given)
    places = {_short(path): i for i, (path, _) in enumerate(pairs)}
    chosen, used = [], set()
    # A place without a leaf, as in a masked tree and a filtered model, may have a value too.
    nodes, _ = tree_flatten_with_path(tree, is_leaf=lambda node: not jax.tree.leaves(node))
    for path, node in nodes:
        path = _short(path)
        above = next((places[path[:n]] for n in range(len(path) + 1) if path[:n] in places), None)
        used.add(above)
        if jax.tree.leaves(node):
            chosen.append(above)
        else:
            used |= {place for at, place in places.items() if at[: len(path)] == path}
    if None in chosen or not used.issuperset(places.values()):
        rest = structure.unflatten([None if i in used else x for i, (_, x) in enumerate(pairs)])
        missing = [x if i is None else None for i, x in zip(chosen, leaves, strict=True)]
        raise ValueError(
            f"{name} must have the leaves of the parameters, or be a prefix of their tree: "
            f"{difference(rest, treedef.unflatten(missing), name)}. Make it by jax.tree.map(…, "
            "params), or give a function from the parameters to it."
        )
    return treedef.unflatten([pairs[i][1] for i in chosen])


def _short(path: KeyPath) -> KeyPath:
    """The path without the `.value` of an NNX variable, which pure states do not have."""
    return path[:-1] if path and path[-1] == NNX_VALUE else path


def given_mask(layers: Layers, tree: Any, layer_mask: Any, depth: Any) -> Any:
    """The mask that an update was given, as such or by a depth; None if it was given none."""
    if depth is None:
        return layer_mask
    if layer_mask is not None:
        raise TypeError("update() takes layer_mask or depth, and got both.")
    return layers.flags_of(tree, layers.mask(depth))
