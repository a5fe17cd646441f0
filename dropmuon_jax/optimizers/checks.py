"""Scion's initial parameters, and a check of an optimizer on real parameters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from dropmuon_jax._checks import check_parameters, check_transformation, describe
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers
from dropmuon_jax.layers.layers import Layers, check_layers
from dropmuon_jax.layers.roles import Roles, as_roles
from dropmuon_jax.layers.trees import leaf_keys, leaf_paths
from dropmuon_jax.norms.norm import Norm
from dropmuon_jax.optimizers.composition import (
    check_role_norms,
    check_role_numbers,
    check_role_radii,
    role_numbers,
    rows_of,
)
from dropmuon_jax.schedules import AdaptiveRadius, Radius, leaf_radii
from dropmuon_jax.transforms.accumulation import calls_per_step
from dropmuon_jax.transforms.masked import promoting

_WARM_UP = 10  # steps in which a leaf should move, though its learning rate starts at 0


def scion_init(
    key: PRNGKeyArray,
    params: Any,
    radii: Mapping[str, Radius],
    *,
    norms: Mapping[str, Norm] | None = None,
    roles: Roles | Mapping[str, str] | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    layers: Layers | None = None,
) -> Any:
    """Random parameters on the boundary of the balls of :func:`scion`, where it may start.

    Hidden matrices are orthogonal times radius and shape factor, heads ± radius / fan-in, and
    embeddings of root mean square radius token by token. Biases and scales stay what they are: in
    Flax 0 and 1, inside a ball of radius 1. So do leaves whose role has no radius of its own kind
    in the table of :func:`scion` or `norms`. Of a convolution the whole matrix is orthogonal, so
    that its norm is the radius; Scion's code makes each position of the window so, which is larger
    by up to window^½ and outside the ball.

    Args:
        key: A PRNG key; each leaf gets its own.
        params: The parameters, of which structure, shapes, dtypes and biases are taken.
        radii: From role to a number, or to a mapping from path patterns to numbers.
        norms: The norms, as in :func:`scion`.
        roles: What the leaves are, as in :func:`scion`.
        dimension_numbers: The axes of matrices, as in :func:`scion`.
        layers: Needed where layers are stacked: each layer of a stack is then drawn for itself.

    Returns:
        A tree like `params`.

    Raises:
        TypeError: For a radius that is no number.
        ValueError: As :func:`scion`.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"Dense_0": jnp.zeros((4, 4)), "head": jnp.zeros((4, 1))}
        >>> radii = {"hidden": 3.0, "head": 8.0}
        >>> params = dm.optimizers.scion_init(jax.random.key(0), params, radii)
        >>> print(f"{jnp.linalg.norm(params['Dense_0'], 2):.3f}", abs(params["head"]).T)
        3.000 [[2. 2. 2. 2.]]

    References:
        Pethick et al., 2025, arXiv:2502.07529, and its repository.
    """
    check_parameters(params)
    norm_of_role = check_role_norms(norms)
    check_role_radii(radii, norm_of_role)
    rows = rows_of(params, layers)
    labels = as_roles(roles).labels(rows, dimension_numbers)
    check_role_numbers(labels, dimension_numbers)
    for path, role in zip(leaf_paths(params), jax.tree.leaves(labels), strict=True):
        if role in norm_of_role and role not in radii:
            raise ValueError(f"Leaf '{path}' is {role!r}, and radii has only {sorted(radii)}.")

    drawn = params
    keys_of_roles = jax.random.split(key, len(norm_of_role))
    for (role, norm), role_key in zip(norm_of_role.items(), keys_of_roles, strict=True):
        if role not in radii or role == "bias":
            continue
        subtree = _cut(rows, labels, role)
        radius_of_leaf: list[Any] = leaf_radii(f"radii[{role!r}]", radii[role], subtree)
        for radius in radius_of_leaf:
            if callable(radius) or isinstance(radius, AdaptiveRadius):
                raise TypeError(
                    f"radii[{role!r}] must be a number where parameters are drawn, got "
                    f"{describe(radius)}; of a schedule give the first value."
                )
        all_axes = norm.axes(subtree, role_numbers(role, dimension_numbers))
        leaves, treedef = jax.tree.flatten(cut := _cut(drawn, labels, role))
        row_axes = [None] * len(leaves) if layers is None else layers.row_axes_of(cut)
        keys = jax.random.split(role_key, len(leaves))
        new = [
            (radius * _init_leaf(norm, leaf_key, leaf, axes, row_axis)).astype(leaf.dtype)
            for radius, leaf_key, leaf, axes, row_axis in zip(
                radius_of_leaf, keys, leaves, all_axes, row_axes, strict=True
            )
        ]
        drawn = jax.tree.map(
            lambda label, old, replaced, role=role: replaced if label == role else old,
            labels,
            drawn,
            treedef.unflatten(new),
        )
    return drawn


def _init_leaf(
    norm: Norm, key: PRNGKeyArray, leaf: Any, axes: Any, row_axis: int | None
) -> jax.Array:
    """A draw for the leaf, or for each layer of it if it is stacked."""
    if row_axis is None:
        return norm.init_leaf(key, leaf, axes)
    keys = jax.random.split(key, leaf.shape[row_axis])
    draw = jax.vmap(lambda key, x: norm.init_leaf(key, x, axes), (0, row_axis), row_axis)
    return draw(keys, leaf)


def _cut(tree: Any, labels: Any, role: str) -> Any:
    """The leaves of one role; placeholders for the others."""
    return jax.tree.map(lambda label, x: x if label == role else optax.MaskedNode(), labels, tree)


def check_optimizer(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    layers: Layers | None = None,
    *,
    seed: int = 0,
    **extra_args: Any,
) -> None:
    """Error for an optimizer that climbs, or that moves a layer which a mask freezes.

    Takes a few steps with random gradients at your parameters, and looks at what they do:

    * every leaf must go downhill, ⟨g, u(g) − u(−g)⟩ ≤ 0, where u is the update: a part that has a
      learning rate already, such as `optax.adamw(…)` as `auxiliary` of :func:`muon`, has its minus
      sign too, and climbs;
    * with `layers`, a step of the last layer alone must leave all other layers as they are, bit for
      bit, and every array of the state that belongs to them, which is found by its path. A
      transformation of Optax that does not look at `layer_mask`, or stands behind
      :func:`layer_mask_sampler` in a chain, does not: put it into :func:`per_layer`, or before.

    It runs once, before a long run, and nothing of it stays in the training step.

    Args:
        optimizer: A transformation whose updates are added to the parameters.
        params: The parameters.
        layers: The layers, for an optimizer that takes masks.
        seed: Seed of the gradients.
        **extra_args: What `update` needs besides; `prev_params_grads` is made here if it is asked
            for by `prev_params_grads=True`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a leaf climbs or a frozen one moves, naming it, the cause and the way out;
            with `layers`, for `optax.MultiSteps`, which may mix the gradients of two depths.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": jnp.eye(2), "head": jnp.eye(2)}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> dm.check_optimizer(dm.drop_muon(0.1, layers), params, layers)
        >>> try:
        ...     dm.check_optimizer(optax.adam(0.1), params, layers)
        ... except ValueError as error:
        ...     print(str(error)[:63])
        Leaf 'stem' moves in a step in which its layer is not active: a
    """
    check_transformation("optimizer", optimizer)
    check_parameters(params)
    if layers is not None:
        check_layers(layers)
    tx = promoting(optimizer)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), max(1, len(leaves)))
    random = [
        jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=False)
    ]
    grads, state, moves = treedef.unflatten(random), tx.init(params), []
    if extra_args.get("prev_params_grads") is True:
        extra_args["prev_params_grads"] = grads
    num_calls = 1 if layers is None else calls_per_step(state)

    @functools.partial(jax.jit, static_argnames="depth")
    def call(grads: Any, extra_args: Any, state: Any, params: Any, depth: int) -> Any:
        mask = {} if layers is None else {"layer_mask": layers.mask(depth)}
        return tx.update(grads, state, params, **mask, **extra_args)

    def step(grads: Any, extra_args: Any, state: Any, depth: int) -> Any:
        updates = None
        for _ in range(num_calls):  # the last of which steps
            updates, state = call(grads, extra_args, state, params, depth)
        return updates, state

    for _ in range(_WARM_UP):  # the rate of the first step may be 0
        # Of a gradient and of its opposite, in which weight decay is the same.
        updates, new_state = step(grads, extra_args, state, 0)
        opposite = jax.tree.map(jnp.negative, (grads, extra_args))
        other, _ = step(opposite[0], opposite[1], state, 0)
        moves, state = treedef.flatten_up_to(jax.tree.map(jnp.subtract, updates, other)), new_state
        if all(bool(move.any()) for move in moves):
            break
    for path, grad, move in zip(leaf_paths(params), random, moves, strict=True):
        if float(jnp.vdot(grad.astype(jnp.float32), move.astype(jnp.float32))) > 0:
            raise ValueError(
                f"Leaf '{path}' moves along its gradient: the optimizer climbs there. A part of it "
                "has a learning rate, and with it the minus sign, already: give the direction "
                "alone, such as optax.scale_by_adam() in place of optax.adam(…), and the rate as "
                "auxiliary_learning_rate; or end a chain of your own with "
                "optax.scale_by_learning_rate(…)."
            )
    if layers is None:
        return
    last = layers.num_layers - 1
    updates, new_state = step(grads, extra_args, state, last)
    new_params, mask = optax.apply_updates(params, updates), layers.mask(last)
    frozen = _inactive(mask, params)
    for path, i in frozen.values():
        old, new = leaves[i], treedef.flatten_up_to(new_params)[i]
        if _bytes(old, mask, i) != _bytes(new, mask, i):
            raise ValueError(
                f"Leaf '{path}' moves in a step in which its layer is not active: a link of the "
                "chain does not look at layer_mask. Put it into dm.per_layer(…, layers), or before "
                "dm.layer_mask_sampler(layers, …), which lets active layers through alone."
            )
    before = jax.tree_util.tree_leaves_with_path(state)
    keys_of_leaves = sorted(leaf_keys(params), key=len, reverse=True)
    for (where, old), new in zip(before, jax.tree.leaves(new_state), strict=True):
        at = jax.tree_util.keystr(where)
        key = next(filter(at.endswith, keys_of_leaves), None)  # the longest that fits
        if key in frozen:
            path, i = frozen[key]
            is_whole = not np.ndim(jax.tree.leaves(mask)[i])  # no stack
            fits = is_whole or np.shape(old) == np.shape(leaves[i])
            if fits and _bytes(old, mask, i) != _bytes(new, mask, i):
                raise ValueError(
                    f"The state {at} of leaf '{path}' changes in a step in which its layer is not "
                    "active: a transformation does not look at layer_mask. Freeze it layer by "
                    "layer, dm.per_layer(…, layers)."
                )


def _inactive(layer_mask: Any, params: Any) -> dict[str, tuple[str, int]]:
    """From the key of each leaf with inactive layers to its path and its place."""
    flags = jax.tree.leaves(layer_mask)
    entries = zip(leaf_keys(params), leaf_paths(params), flags, strict=True)
    return {key: (path, i) for i, (key, path, flag) in enumerate(entries) if not np.all(flag)}


def _bytes(leaf: Any, layer_mask: Any, i: int) -> bytes:
    """The bits of a leaf in its inactive layers."""
    flag = np.asarray(jax.tree.leaves(layer_mask)[i])
    array = np.asarray(leaf)
    if flag.ndim:
        array = np.compress(~flag.ravel(), array, axis=flag.ndim - 1)
    return array.tobytes()
