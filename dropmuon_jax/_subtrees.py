"""One chain for each subtree of the parameters, and Optax's own transformations frozen by layer."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dropmuon_jax._checks import check_transformation, did_you_mean
from dropmuon_jax._layers import Layers, check_layers, leaf_paths, restructure_like
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
    for label, transformation in transforms.items():
        check_transformation(f"transforms[{label!r}]", transformation)
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
        layer_mask = extra_args.pop("layer_mask", None)
        resolved = resolve_mask(layer_mask, updates, extra_args)
        # Optax cuts an extra argument to a subtree if its structure is that of the updates.
        if layer_mask is not None:
            extra_args["layer_mask"] = resolved
        extra_args = _with_second_gradient(extra_args, updates)
        return partition.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    check_transformation("inner", inner)
    check_layers(layers)
    inner = optax.with_extra_args_support(inner)

    def cut(tree: Any, depths: Any, layer: int) -> Any:
        return jax.tree.map(lambda d, x: x if d == layer else optax.MaskedNode(), depths, tree)

    def init_fn(params: optax.Params) -> PerLayerState:
        depths = layers.depths_of(params)
        states = [inner.init(cut(params, depths, layer)) for layer in range(layers.num_layers)]
        if optax.tree.get_all_with_path(states, "MVRMomentumState"):
            raise ValueError(
                "mvr_momentum looks at the layer mask itself, and inside per_layer it cannot know "
                "how long a layer slept: leave per_layer out. It cannot be the auxiliary of "
                "drop_muon; write the chain with dm.chain_subtrees."
            )
        return PerLayerState(tuple(states))

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        layer_mask = resolve_mask(layer_mask, updates, extra_args)
        extra_args = _with_second_gradient(extra_args, updates)
        depths = layers.depths_of(updates)
        active = _active_layers(layer_mask, depths)
        structure = jax.tree.structure(updates)

        def update_layer(layer: int) -> tuple[Any, optax.OptState]:
            return inner.update(
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

        leaves, leaf_depths = jax.tree.leaves(updates), jax.tree.leaves(depths)
        inner_states = list(state.inner_states)
        for layer in sorted(set(leaf_depths)):
            if layer in active:
                layer_updates, inner_states[layer] = update_layer(layer)
            else:  # traced for the dtypes that an active layer would have, and never computed
                layer_updates, _ = jax.eval_shape(functools.partial(update_layer, layer))
            members = [i for i, depth in enumerate(leaf_depths) if depth == layer]
            for i, new in zip(members, jax.tree.leaves(layer_updates), strict=True):
                leaves[i] = new if layer in active else jnp.zeros_like(leaves[i], dtype=new.dtype)
        return jax.tree.unflatten(structure, leaves), PerLayerState(tuple(inner_states))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _with_second_gradient(extra_args: dict[str, Any], updates: Any) -> dict[str, Any]:
    """The extra arguments, `prev_params_grads` among them in the containers of the updates."""
    grads = extra_args.get("prev_params_grads")
    if grads is None:
        return extra_args
    return extra_args | {"prev_params_grads": restructure_like("prev_params_grads", grads, updates)}


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
