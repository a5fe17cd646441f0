"""`trace_layers`: layers in the order in which a traced loss uses them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey, KeyPath

from dropmuon_jax._layers._forward_order import leaf_uses
from dropmuon_jax._layers._layers import Layers, make_layers
from dropmuon_jax._layers._paths import leaf_paths


def trace_layers(loss_fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Layers:
    """Finds the layers and their forward order from the program of the loss.

    The loss is traced, never run. The leaves of an innermost container (the kernel and the bias of
    a Flax module) form a layer; a leaf at the root, or beside other containers, is a layer of its
    own. Layers are ordered by the first operation in which one of their leaves meets the data,
    through `jit`, `checkpoint`, `scan`, `while_loop`, `cond` and custom derivatives; casts,
    reshapes and other work on parameters alone do not count. A leaf that is used again after a
    later layer began (a tied head) belongs to its shallowest use and is reported in the printed
    table. Layers that are stacked and scanned count as one; for one layer a row name them yourself,
    by :func:`stacked` in :func:`layers_by_path`.

    Args:
        loss_fn: A function of `(params, *args, **kwargs)`, as given to `jax.grad`.
        params: The parameters: any pytree of arrays or of `jax.ShapeDtypeStruct`s.
        *args: Example data, arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes matter.
        **kwargs: Further arguments, handed over as they are, not traced.

    Returns:
        The :class:`Layers`. Print it, and read it once, before a long run.

    Raises:
        ValueError: If the output of `loss_fn` does not depend on some leaf.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"a_head": jnp.zeros((4, 1)), "z_stem": jnp.zeros((3, 4))}
        >>> loss_fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["z_stem"]) @ p["a_head"])
        >>> dm.trace_layers(loss_fn, params, jnp.zeros((8, 3))).names
        ('z_stem', 'a_head')
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    # Static arguments (a module, `train=True`) travel in kwargs, which the trace must not touch.
    jaxpr = jax.make_jaxpr(functools.partial(loss_fn, **kwargs))(params, *args)
    found = leaf_uses(jaxpr, len(flat))
    uses = [use for use in found if use is not None]
    if len(uses) < len(found):
        unused = [path for path, use in zip(leaf_paths(params), found, strict=True) if use is None]
        raise ValueError(
            f"The output of loss_fn does not depend on the leaves {unused}, so they have no place "
            "in the forward order. Remove them from params, or name every layer yourself with "
            "dm.layers_by_path."
        )

    containers = _containers([path for path, _ in flat])
    first: dict[KeyPath, int] = {}
    for container, use in zip(containers, uses, strict=True):
        first[container] = min(first.get(container, use.first), use.first)
    order = sorted(first, key=first.__getitem__)
    starts = [first[container] for container in order]
    layer_of_leaf = [order.index(container) for container in containers]

    shared = []
    # A place where every layer is used at once is a penalty on the parameters, not a depth.
    layers_at: dict[int, set[int]] = {}
    for layer, use in zip(layer_of_leaf, uses, strict=True):
        for position in use.positions:
            layers_at.setdefault(position, set()).add(layer)
    for leaf, (layer, use) in enumerate(zip(layer_of_leaf, uses, strict=True)):
        places = [p for p in use.positions if len(layers_at[p]) < len(order)]
        # A use lies at the depth of the last layer that has begun by then.
        depths = {layer, *(max(d for d, start in enumerate(starts) if start <= p) for p in places)}
        if len(depths) > 1:
            shared.append((leaf, tuple(sorted(depths))))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in order]
    return make_layers(params, names, layer_of_leaf, shared)


def _containers(paths: list[KeyPath]) -> list[KeyPath]:
    """The path of each leaf's layer: of its container if that holds only leaves, or the leaf's."""
    # The array inside an NNX variable is no container's leaf; the variable is.
    paths = [p[:-1] if len(p) > 1 and p[-1] == GetAttrKey("value") else p for p in paths]
    parents = {path[:-1] for path in paths}
    outer = {parent[:n] for parent in parents for n in range(len(parent))} | {()}
    return [path if path[:-1] in outer else path[:-1] for path in paths]
