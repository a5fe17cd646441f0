"""Where the state of an optimizer lies: with the parameters that it is about."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath

from dropmuon_jax._checks import check_transformation, describe
from dropmuon_jax._layers import leaf_paths


def state_shardings(
    transformation: optax.GradientTransformation, params: optax.Params, shardings: Any = None
) -> Any:
    """The `NamedSharding` of each leaf of an optimizer's state, for `jax.jit` and orbax.

    A leaf of the state whose path ends with the path of a parameter, and that has its shape, such
    as a momentum, is sharded as that parameter; everything else, such as counts, is replicated.
    Nothing is computed: parameters may be `jax.ShapeDtypeStruct`, as `jax.eval_shape` gives them.

    Args:
        transformation: Any, of Optax too.
        params: The parameters.
        shardings: A tree of `NamedSharding` with their structure, by default what the parameters'
            own `.sharding` are.

    Returns:
        A tree of `NamedSharding` with the structure of `transformation.init(params)`.

    Raises:
        TypeError: If a parameter, or a leaf of `shardings`, has no `NamedSharding`, naming it.
        ValueError: If `shardings` has another structure than the parameters.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> params = {"kernel": jnp.ones((4, 2))}
        >>> shardings = {"kernel": NamedSharding(mesh, PartitionSpec("fsdp"))}
        >>> tx = dm.momentum(0.9)
        >>> placed = dm.state_shardings(tx, params, shardings)
        >>> placed.momentum["kernel"].spec == PartitionSpec("fsdp")
        True
        >>> init = jax.jit(tx.init, out_shardings=placed)
    """
    check_transformation("transformation", transformation)
    if shardings is None:
        shardings = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), params)
    found = jax.tree.leaves(shardings, is_leaf=lambda x: x is None)
    paths = leaf_paths(params)
    given = leaf_paths(jax.tree.map(lambda _: 0, shardings, is_leaf=lambda x: x is None))
    if given != paths:
        differing = sorted(set(given) ^ set(paths))
        raise ValueError(
            f"shardings has {len(found)} leaves and the parameters {len(paths)}; they differ in "
            f"{differing[:3]}. Give a tree of NamedSharding with the structure of the parameters."
        )
    for path, sharding in zip(paths, found, strict=True):
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"The sharding of '{path}' must be a NamedSharding, got {describe(sharding)}. Put "
                "the parameters on the mesh, jax.device_put(params, shardings), or give shardings."
            )
    for path, leaf, sharding in zip(paths, jax.tree.leaves(params), found, strict=True):
        if len(sharding.spec) > np.ndim(leaf):
            raise ValueError(
                f"'{path}' has shape {np.shape(leaf)}, and its sharding {sharding.spec}."
            )
    of_param: dict[tuple[KeyPath, tuple[int, ...]], NamedSharding] = {}
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), found, strict=True
    ):
        of_param[path, np.shape(leaf)] = sharding
    replicated = NamedSharding(found[0].mesh, PartitionSpec()) if found else None

    def of_leaf(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> Any:
        for start in range(len(path) + 1):  # the longest path first
            sharding = of_param.get((path[start:], leaf.shape))
            if sharding is not None:
                return sharding
        return replicated

    state = jax.eval_shape(transformation.init, params)
    return jax.tree_util.tree_map_with_path(of_leaf, state)
