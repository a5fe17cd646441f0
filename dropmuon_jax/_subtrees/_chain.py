"""One chain for each subtree of the parameters."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax

from dropmuon_jax._checks import check_transformation, did_you_mean
from dropmuon_jax._layers import leaf_paths
from dropmuon_jax._masks import resolve_whole_mask
from dropmuon_jax._subtrees._second_gradient import with_second_gradient


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
        resolved = resolve_whole_mask(layer_mask, updates, extra_args)
        # Optax cuts an extra argument to a subtree if its structure is that of the updates.
        if layer_mask is not None:
            extra_args["layer_mask"] = resolved
        extra_args = with_second_gradient(extra_args, updates)
        return partition.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
