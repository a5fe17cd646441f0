"""Explicit axes made automatic, for computations that say themselves what moves where."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from dropmuon_jax._layers import leaf_paths
from dropmuon_jax._mesh._scope import LeafSharding, current_scope, scope


def on_auto_axes(
    function: Callable[..., Any], *arguments: Any, named: Any, results_like: Any
) -> Any:
    """`function(*arguments)`, in which no axis of the mesh is explicit.

    Args:
        function: Of trees of arrays; it closes over no others.
        *arguments: Its arguments.
        named: The tree among them whose shardings are known while the function is traced.
        results_like: A tree with the structure of the results, sharded as they are to be.
    """
    mesh = _explicit_mesh(arguments)
    if mesh is None:
        return function(*arguments)
    leaves = dict(current_scope().leaves)
    for path, leaf in zip(leaf_paths(named), jax.tree.leaves(named), strict=True):
        leaves[path] = LeafSharding(jax.typeof(leaf).sharding.spec)
    results = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, results_like)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    has_mesh = bool(jax.sharding.get_abstract_mesh().axis_names)
    of_leaves = contextlib.nullcontext() if has_mesh else jax.sharding.use_abstract_mesh(mesh)
    with of_leaves, scope(leaves=leaves):
        return jax.sharding.auto_axes(function, axes=explicit, out_sharding=results)(*arguments)


def _explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh of the first leaf whose type has explicit axes."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in (mesh.axis_types or ()):
            return mesh
    return None
