"""One chain for each subtree of the parameters, and Optax's own transformations frozen by layer."""

import functools
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dropmuon_jax._checks import check_extra_args, did_you_mean
from dropmuon_jax._layers import Layers, leaf_paths
from dropmuon_jax._masks import resolve_mask


def chain_subtrees(
    transforms: Mapping[str, optax.GradientTransformation],
    labels: Any | Callable[[Any], Any],
) -> optax.GradientTransformationExtraArgs:
    """Sends each leaf of the updates through the chain that its label names.

    This is `optax.partition` with `mask_compatible_extra_args=True`, so that a tree-shaped extra
    argument such as `layer_mask` reaches each chain cut to its leaves, and with messages that name
    the leaf.

    Args:
        transforms: From label to transformation; `optax.chain` makes one out of several.
        labels: A tree of labels with the structure of the parameters, or a prefix of it, or a
            function that makes one from the parameters, such as :func:`matrix_labels`.

    Returns:
        A transformation with the state of `optax.partition`. Extra arguments are passed on.

    Raises:
        ValueError: At construction without transforms; at `init` for a leaf whose label is not in
            `transforms`, naming its path.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
        >>> tx = dm.chain_subtrees(
        ...     {"matrix": dm.newton_schulz_lmo(), "vector": optax.scale(-1.0)},
        ...     {"kernel": "matrix", "bias": "vector"},
        ... )
        >>> grads = {"kernel": 9 * jnp.eye(2), "bias": jnp.ones(2)}
        >>> updates, _ = tx.update(grads, tx.init(params))
        >>> print(updates["bias"])
        [-1. -1.]
    """
    if not transforms:
        raise ValueError("transforms is empty; give one transformation for each label.")
    by_label: dict[Hashable, optax.GradientTransformation] = dict(transforms.items())
    partition = optax.partition(by_label, labels, mask_compatible_extra_args=True)

    def init_fn(params: optax.Params) -> optax.OptState:
        tree = labels(params) if callable(labels) else labels
        paths = leaf_paths(params)
        # Without leaves, params is the placeholder of optax.tree.map_params.
        leaf_labels = jax.tree.leaves(jax.tree.broadcast(tree, params)) if paths else []
        for path, label in zip(paths, leaf_labels, strict=True):
            if label not in transforms:
                raise ValueError(
                    f"Leaf '{path}' has the label {label!r}, and transforms has only "
                    f"{sorted(map(str, transforms))}.{did_you_mean(label, map(str, transforms))}"
                )
        return partition.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        if "layer_mask" not in extra_args:
            check_extra_args(extra_args)
        return partition.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def matrix_labels(params: Any) -> Any:
    """Labels for :func:`chain_subtrees`: "matrix" for what Muon is meant for, else "other".

    A leaf is "other" if it has fewer than two axes (biases, norm scales), or if a component of its
    path is called `embed`, `embedding`, `wte` or `wpe`, upper or lower case, with or without a Flax
    counter (`Embed_0`): the rows of an embedding are looked up, not multiplied. Everything else is
    "matrix". To decide otherwise, change the returned tree or write your own.

    Args:
        params: The parameters: any pytree of arrays or of `jax.ShapeDtypeStruct`s.

    Returns:
        A tree of strings with the structure of the parameters.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> dm.matrix_labels({"Embed_0": jnp.zeros((9, 4)), "w": jnp.eye(4), "b": jnp.zeros(4)})
        {'Embed_0': 'other', 'b': 'other', 'w': 'matrix'}
    """

    def label(path: str, leaf: Any) -> str:
        names = {re.sub(r"_\d+$", "", component).lower() for component in path.split("/")}
        embeds = not names.isdisjoint({"embed", "embedding", "wte", "wpe"})
        return "other" if embeds or len(np.shape(leaf)) < 2 else "matrix"

    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(label, leaf_paths(params), leaves))


class PerLayerState(NamedTuple):
    """State of :func:`per_layer`."""

    inner_states: tuple[optax.OptState, ...]
    """One state of the inner transformation for each layer, counts included."""


def per_layer(
    inner: optax.GradientTransformation, layers: Layers
) -> optax.GradientTransformationExtraArgs:
    """Runs any Optax transformation layer by layer, so that an inactive layer is frozen whole.

    Each layer has a state of its own. An active layer's updates go through `inner` as if its leaves
    were the only parameters; an inactive layer has update zero and keeps every bit of its state,
    moments and counts included, so that Adam's bias correction counts the layer's own steps and
    weight decay acts on active layers only. Transformations that look at all leaves at once, such
    as `optax.clip_by_global_norm`, see one layer at a time; put those outside. Learning-rate
    schedules belong outside too: there they count all steps, and give the zero update the sign that
    keeps every bit even of a parameter of -0.0.

    Args:
        inner: The transformation.
        layers: The layers, over the whole parameters; `per_layer` itself may run on a part of them,
            as inside :func:`chain_subtrees`.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). Extra arguments are passed on, those with the structure of the updates cut to the
        layer. The state is a :class:`PerLayerState`.

    Raises:
        ValueError: At `init`, for a leaf that is in no layer; in `update`, for a mask that splits a
            layer. Both name the path.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": jnp.ones(2), "head": jnp.ones(2)}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> tx = dm.per_layer(optax.scale_by_adam(), layers)
        >>> _, state = tx.update(params, tx.init(params), layer_mask=layers.mask(1))
        >>> [int(inner.count) for inner in state.inner_states]
        [0, 1]
    """
    inner = optax.with_extra_args_support(inner)

    def cut(tree: Any, depths: Any, layer: int) -> Any:
        return jax.tree.map(lambda d, x: x if d == layer else optax.MaskedNode(), depths, tree)

    def init_fn(params: optax.Params) -> PerLayerState:
        depths = layers.depths_of(params)
        return PerLayerState(
            tuple(inner.init(cut(params, depths, layer)) for layer in range(layers.num_layers))
        )

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        layer_mask = resolve_mask(layer_mask, updates, extra_args)
        depths = layers.depths_of(updates)
        active = _active_layers(layer_mask, depths)
        structure = jax.tree.structure(updates)

        merged = updates
        inner_states = list(state.inner_states)
        for layer in sorted(set(jax.tree.leaves(depths))):
            update_layer = functools.partial(
                inner.update,
                cut(updates, depths, layer),
                state.inner_states[layer],
                None if params is None else cut(params, depths, layer),
                **{
                    name: cut(value, depths, layer)
                    if jax.tree.structure(value) == structure
                    else value
                    for name, value in extra_args.items()
                },
            )
            if layer in active:
                layer_updates, inner_states[layer] = update_layer()
            else:  # traced for the dtypes that an active layer would have, and computed never
                shapes, _ = jax.eval_shape(update_layer)
                layer_updates = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            merged = jax.tree.map(
                lambda d, new, old, layer=layer: new if d == layer else old,
                depths,
                layer_updates,
                merged,
            )
        return merged, PerLayerState(tuple(inner_states))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _active_layers(layer_mask: Any, depths: Any) -> set[int]:
    """The layers that a mask activates; an error if it activates a part of one."""
    flags: dict[int, bool] = {}
    for path, flag, depth in zip(
        leaf_paths(layer_mask), jax.tree.leaves(layer_mask), jax.tree.leaves(depths), strict=True
    ):
        if flags.setdefault(depth, flag) != flag:
            raise ValueError(
                f"layer_mask is {flag} at '{path}' and {not flag} at another leaf of layer "
                f"{depth}. per_layer freezes whole layers; make masks with layers.mask or "
                "layers.subset of the same layers."
            )
    return {depth for depth, flag in flags.items() if flag}
