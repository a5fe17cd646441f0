"""`scan_layers`: `lax.scan` over stacked layers, differentiated from the last down to a depth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dropmuon_jax._checks import check_index, static_int
from dropmuon_jax._stacked._layer import Layer, Leaves, leading_size, trace_layer
from dropmuon_jax._stacked._traced_depth import scan_down_to

Carry = TypeVar("Carry")


def scan_layers(
    f: Callable[[Carry, Any], tuple[Carry, Any]],
    init: Carry,
    xs: Any,
    *,
    depth: int | Int[Array, ""] = 0,
    policy: Callable[..., bool] | None = None,
) -> tuple[Carry, Any]:
    r"""`jax.lax.scan` over stacked layers, whose backward pass ends at a depth that may be traced.

    .. math::
        (c_{i+1}, y_i) = f(c_i, x_i), \qquad i = 0, …, L - 1

    and for the derivative everything before layer `depth` is a constant: c_depth, y_0, …,
    y_{depth-1} and what went into them. So the rows of `xs` from `depth` on have the gradients of
    `lax.scan`; the rows before have zeros; `init` has its gradient at depth 0 and else zero; what
    `f` closes over has that of the layers from `depth` on.

    **One depth.** The mask of the gradient and of the update has the depth among all layers of the
    network, this function that among the rows of `xs`: :meth:`Layers.stack_depth` makes one from
    the other. With too large a depth here, a layer that the mask calls active has gradient zero
    and steps on its old momentum, which nothing can detect. Likewise a parameter that is used
    before or inside the layers belongs to the shallowest layer that uses it (a tied head to the
    embedding): named in a later one, its gradient would lack what the constant layers give.

    A traced depth is one program for every depth: the backward pass is a loop that takes L - depth
    turns. A Python integer is split into two scans, of which the first is not differentiated: a
    program for each depth, that may be differentiated again and forwards too, as a traced one may
    not. With the default policy both take the same time (`benchmarks/stacked_cost.py`); what else
    is saved costs the traced one an allocation for all layers at every depth.

    Each layer is computed again in the backward pass from its saved input, unless `policy` says
    what else to save. The loop saves for active layers only, and has room for all.

    Args:
        f: The layer, from a carry and a row of `xs` to the next carry and an output, as in
            `lax.scan`: the activations, and auxiliary losses beside them, are the carry.
        init: The first carry.
        xs: A tree of arrays that agree in their leading size L: the stacked parameters and
            whatever else a layer has of its own, such as dropout keys,
            `(params, jax.random.split(key, L))`, or positions. Row 0 is nearest the input.
        depth: In [0, L]: the first row that is differentiated; L for none. A Python integer is
            static, an integer array is not, and is clipped. Of a depth among all layers of the
            network, :meth:`Layers.stack_depth` makes it.
        policy: What of a layer is saved for its backward pass, as in `jax.checkpoint`: by default
            its inputs alone, with `jax.checkpoint_policies.everything_saveable` everything that
            depends on the layer. A traced depth takes none that offloads.

    Returns:
        The last carry, and the outputs stacked.

    Raises:
        TypeError: If `depth` is no integer; if `f` returns no pair, or a carry of another
            structure, shape or dtype, naming the leaf.
        ValueError: If `xs` has no leaves, or they differ in their leading size, naming two; if a
            Python integer is not in [0, L].

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
        >>> gradient._cache_size()
        1

    References:
        The cut is Drop-Muon's (Gruntkowska, Maziane, Qu, Richtárik, 2025, arXiv:2510.02239). To
        save inputs and compute again: Chen, Xu, Zhang, Guestrin, *Training Deep Nets with Sublinear
        Memory Cost*, 2016, arXiv:1604.06174.
    """
    num_layers = leading_size(xs)
    depth = _checked_depth(depth, num_layers)
    layer, init = trace_layer(f, init, xs)
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
    """The scan of the layers before the depth, as constants, and that of the others."""
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


def _checked_depth(depth: Any, num_layers: int) -> Any:
    """A depth in [0, L], of which arrays are clipped."""
    if isinstance(depth, jax.Array):
        check_index("depth", depth)
        return jnp.clip(depth.astype(jnp.int32), 0, num_layers)
    depth = static_int("depth", depth, minimum=0)
    if depth > num_layers:
        raise ValueError(
            f"depth must be at most {num_layers}, the number of layers in xs, got {depth}. Of a "
            "depth among all layers of the network, layers.stack_depth makes that of a stack."
        )
    return depth
