"""`scan_layers`: `lax.scan` over stacked layers, differentiated from the last down to a depth."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dropmuon_jax._checks import check_index, describe, static_int
from dropmuon_jax.backprop.traced_depth import Layer, Leaves, scan_down_to
from dropmuon_jax.layers.trees import leaf_paths

Carry = TypeVar("Carry")


def scan_layers(
    f: Callable[[Carry, Any], tuple[Carry, Any]],
    init: Carry,
    xs: Any,
    *,
    depth: int | Int[Array, ""] = 0,
    policy: Callable[..., bool] | None = None,
    axis: Any = 0,
) -> tuple[Carry, Any]:
    r"""`jax.lax.scan` over stacked layers, whose backward pass ends at a depth that may be traced.

    .. math::
        (c_{i+1}, y_i) = f(c_i, x_i), \qquad i = 0, …, L - 1

    and for the derivative everything before layer `depth` is a constant: c_depth, y_0, …,
    y_{depth-1} and what went into them. So the layers of `xs` from `depth` on have the gradients of
    `lax.scan`; the layers before have zeros; `init` has its gradient at depth 0 and else zero; what
    `f` closes over has the gradient of the layers from `depth` on.

    **One depth.** The masks of gradient and update have the depth among all layers of the network,
    this function has the depth in the stack: :meth:`Layers.stack_depth` makes one from the other.
    With too large a depth here, a layer that the mask calls active has gradient zero and steps on
    its old momentum, which nothing can detect. In the same way a parameter that is used before or
    inside the stack belongs to the shallowest layer that uses it (a tied head to the embedding):
    named in a later layer, its gradient would lack what the constant layers give.

    A traced depth is one program for every depth: the backward pass is a loop that takes L - depth
    turns. A Python integer is split into two scans, of which the first is not differentiated: a
    program for each depth, that may be differentiated again and forwards too, as a traced one may
    not. With the default policy both take the same time; what else is saved costs the traced one
    an allocation for all layers at every depth.

    Each layer is computed again in the backward pass from its saved input, unless `policy` says
    what else to save. The loop saves for active layers only, and has room for all.

    Args:
        f: The layer, from a carry and a row of `xs` to the next carry and an output, as in
            `lax.scan`: the activations, and auxiliary losses beside them, are the carry.
        init: The first carry.
        xs: A tree of arrays that agree in the size L of their axis of layers: the stacked
            parameters and whatever else a layer has of its own, such as dropout keys,
            `(params, jax.random.split(key, L))`, or positions. Row 0 is nearest the input.
        depth: In [0, L]: the first layer that is differentiated; L for none. A Python integer is
            static, an integer array is not, and is clipped. Take it from
            :meth:`Layers.stack_depth`.
        policy: What of a layer is saved for its backward pass, as in `jax.checkpoint`: by default
            its inputs alone, with `jax.checkpoint_policies.everything_saveable` everything that
            depends on the layer. A traced depth takes none that offloads.
        axis: The axis of layers, which :func:`stacked` is told too: an integer, counted from the
            last axis of each leaf if negative, or a tree of them with the structure of `xs` or a
            prefix of it, such as `axis=(1, 0)` for the example above. If it is not the first one,
            the leaves are transposed, and so are their gradients.

    Returns:
        The last carry, and the outputs stacked along their first axis.

    Raises:
        TypeError: If `depth` is no integer; if `f` returns no pair, or a carry of another
            structure, shape or dtype, naming the leaf.
        ValueError: If `xs` has no leaves, or they differ in the size of their axis of layers,
            naming two; if a Python integer is not in [0, L]; if `axis` does not fit `xs`.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> stack = jnp.array([2.0, 3.0, 5.0])
        >>> def loss_fn(stack, depth):
        ...     return dm.scan_layers(lambda c, w: (c * w, None), 1.0, stack, depth=depth)[0]
        >>> gradient = jax.jit(jax.grad(loss_fn))
        >>> for depth in range(4):
        ...     print(gradient(stack, depth))
        [15. 10.  6.]
        [ 0. 10.  6.]
        [0. 0. 6.]
        [0. 0. 0.]

    References:
        The cut is Drop-Muon's (Gruntkowska, Maziane, Qu, Richtárik, 2025, arXiv:2510.02239). To
        save inputs and compute again: Chen, Xu, Zhang, Guestrin, *Training Deep Nets with Sublinear
        Memory Cost*, 2016, arXiv:1604.06174.
    """
    xs = _layers_first(xs, axis)
    num_layers = len(jax.tree.leaves(xs)[0])
    depth = _check_depth(depth, num_layers)
    layer, init = _trace_layer(f, init, xs)
    leaves = jax.tree.leaves(init), jax.tree.leaves(xs)
    if isinstance(depth, int) or num_layers == 0:
        depth = depth if isinstance(depth, int) else 0
        carry, ys = _split_scan(layer, *leaves, depth, policy)
    else:
        carry, ys = scan_down_to(layer, policy)(layer.consts, *leaves, depth)
    return layer.out_tree.unflatten([*carry, *ys])


def _split_scan(
    layer: Layer, init: Leaves, xs: Leaves, depth: int, policy: Any
) -> tuple[Leaves, Leaves]:
    """The scan of the layers before the depth, as constants, and the scan of the others."""
    saving = jax.checkpoint(layer, prevent_cse=False, policy=policy)
    differentiated = functools.partial(saving, layer.consts)
    if depth == 0:
        return jax.lax.scan(differentiated, init, xs)
    constant = functools.partial(layer, jax.lax.stop_gradient(layer.consts))
    init, below = jax.lax.stop_gradient((init, [x[:depth] for x in xs]))
    carry, ys_below = jax.lax.scan(constant, init, below)
    if depth == len(xs[0]):
        return carry, ys_below
    carry, ys_above = jax.lax.scan(differentiated, carry, [x[depth:] for x in xs])
    return carry, [jnp.concatenate(parts) for parts in zip(ys_below, ys_above, strict=True)]


def _check_depth(depth: Any, num_layers: int) -> Any:
    """A depth in [0, L]; arrays are clipped."""
    if isinstance(depth, jax.Array):
        check_index("depth", depth)
        return jnp.clip(depth.astype(jnp.int32), 0, num_layers)
    depth = static_int("depth", depth, minimum=0)
    if depth > num_layers:
        raise ValueError(
            f"depth must be at most {num_layers}, the number of layers in xs, got {depth}. "
            "layers.stack_depth makes it from a depth among all layers of the network."
        )
    return depth


def _trace_layer(f: Callable[..., Any], init: Any, xs: Any) -> tuple[Layer, Any]:
    """The program of a layer, and the first carry as arrays; an error if the carry would change."""
    init = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), init)
    row = jax.tree.map(_first_row, xs)
    jaxpr, out = jax.make_jaxpr(f, return_shape=True)(init, row)
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            "f must return a pair of the next carry and an output, as in lax.scan, got "
            f"{'one array' if isinstance(out, jax.ShapeDtypeStruct) else describe(out)}. Without "
            "outputs: return carry, None."
        )
    if jax.tree.structure(out[0]) != jax.tree.structure(init):
        raise TypeError(
            "f must return a carry of the structure that it takes, as in lax.scan. It takes "
            f"{jax.tree.structure(init)} and returns {jax.tree.structure(out[0])}."
        )
    # As in lax.scan, a number of Python takes the dtype that the layer gives it.
    promoted = jax.tree.map(
        lambda old, new: old.astype(new.dtype) if getattr(old, "weak_type", False) else old,
        init,
        out[0],
    )
    before, after = jax.tree.leaves(promoted), jax.tree.leaves(out[0])
    if any(new.dtype != old.dtype for new, old in zip(before, jax.tree.leaves(init), strict=True)):
        return _trace_layer(f, promoted, xs)
    for path, old, new in zip(leaf_paths(init), before, after, strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TypeError(
                "f must return a carry of the shapes and dtypes that it takes, as in lax.scan. "
                f"{f'Leaf {path!r} of the carry' if path else 'The carry'} is {_describe(old)} "
                f"and becomes {_describe(new)}."
            )
    return Layer(jaxpr.jaxpr, list(jaxpr.consts), jax.tree.structure(out)), promoted


def _first_row(x: Any) -> Any:
    """The first layer of a stack, with its sharding; the shape alone if the stack is empty."""
    if isinstance(x, jax.Array) and len(x):
        return jax.lax.index_in_dim(x, 0, keepdims=False)
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _describe(x: Any) -> str:
    return f"{x.dtype.name}{list(x.shape)}"


def _layers_first(xs: Any, axis: Any) -> Any:
    """The leaves with their axis of layers in front; an error unless all have it, of one size."""
    paths = leaf_paths(xs)
    if not paths:
        raise ValueError("xs has no leaves: give the stacked parameters, of shapes (L, …).")
    try:
        axes = jax.tree.broadcast(axis, xs)
    except ValueError as error:
        raise ValueError(
            "axis must be an integer, or a tree of integers with the structure of xs or a prefix "
            f"of it, such as (1, 0) for a pair; {error}"
        ) from None
    sizes: list[int] = []
    for path, leaf, of_leaf in zip(paths, *map(jax.tree.leaves, (xs, axes)), strict=True):
        shape, of_leaf = np.shape(leaf), static_int("axis", of_leaf, minimum=-math.inf)
        if not -len(shape) <= of_leaf < len(shape):
            raise ValueError(
                f"Leaf '{path}' of xs has shape {shape}, and no axis {of_leaf}. Every leaf has an "
                "axis of layers, with a row for each; f can close over what all layers share. "
                "Where leaves differ in it, give a tree, such as axis=(1, 0) for a pair."
            )
        sizes.append(shape[of_leaf])
        if sizes[-1] != sizes[0]:
            first = np.shape(jax.tree.leaves(xs)[0])
            raise ValueError(
                "The leaves of xs must agree in the size of their axis of layers, their number: "
                f"'{paths[0]}' has shape {first}, and '{path}' {shape}, of which it is {of_leaf}."
            )
    return jax.tree.map(lambda x, of_x: jnp.moveaxis(x, of_x, 0) if of_x else x, xs, axes)
