"""The backward pass, computed for the active layers only, at one point or at two."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dropmuon_jax._checks import describe
from dropmuon_jax._layers import restructure_like
from dropmuon_jax._masks import is_static, resolve_whole_mask, where_active
from dropmuon_jax._sampling import LayerMaskSampler

_MISSING = object()


def masked_value_and_grad(
    loss_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """`jax.value_and_grad`, with the backward pass stopped below the active layers.

    Only the active leaves are differentiated. Because the mask is static, JAX never builds the
    backward pass below the shallowest of them, nor keeps what it would need: in FLOPs and memory
    the compiled step is that of a network whose other layers are constants. Put the gradient, the
    optimizer and this mask in one `jax.jit`.

    Of stacked layers the mask may have rows, and be traced: gradients of inactive rows are zero
    whatever the loss does, and not computed if it runs them by :func:`scan_layers` to the same
    depth.

    Args:
        loss_fn: A function of `(params, *args, **kwargs)` that returns a scalar, or
            `(scalar, aux)` with `has_aux`.
        has_aux: Whether `loss_fn` returns auxiliary data.

    Returns:
        A function of `(params, *args, layer_mask, **kwargs)` that returns `(value, grads)`, or
        `((value, aux), grads)` with `has_aux`. `grads` has the structure, shapes and dtypes of
        `params`; it is zero at inactive leaves. `layer_mask` is required; None makes all layers
        active. It raises TypeError if the mask is missing, no tree of booleans, or traced without
        stacks, and ValueError if it does not fit `params`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"stem": jnp.array(2.0), "head": jnp.array(5.0)}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> loss_fn = lambda p, x: p["head"] * (p["stem"] * x)
        >>> value, grads = dm.masked_value_and_grad(loss_fn)(params, 3.0, layer_mask=layers.mask(1))
        >>> print(value, grads["stem"], grads["head"])
        30.0 0.0 6.0
    """

    def value_and_grad(params: Any, *args: Any, layer_mask: Any = _MISSING, **kwargs: Any):
        layer_mask = _required_mask(layer_mask, params)
        leaves, treedef = jax.tree.flatten(params)
        flags = treedef.flatten_up_to(layer_mask)
        active = [not is_static(flag) or flag for flag in flags]

        def loss_of_active(active_leaves):
            chosen = iter(active_leaves)
            merged = [next(chosen) if on else leaf for on, leaf in zip(active, leaves, strict=True)]
            return loss_fn(treedef.unflatten(merged), *args, **kwargs)

        active_leaves = [leaf for on, leaf in zip(active, leaves, strict=True) if on]
        value, active_grads = jax.value_and_grad(loss_of_active, has_aux=has_aux)(active_leaves)
        chosen = iter(active_grads)
        grads = [
            _of_active_rows(flag, next(chosen)) if on else jnp.zeros_like(leaf)
            for on, flag, leaf in zip(active, flags, leaves, strict=True)
        ]
        return value, treedef.unflatten(grads)

    return value_and_grad


def masked_value_and_grad_pair(
    loss_fn: Callable[..., Any], has_aux: bool = False, *, stacked: bool = False
) -> Callable[..., tuple[Any, tuple[Any, Any]]]:
    """The gradients of one batch at two points, of which variance reduction takes the difference.

    :func:`masked_value_and_grad` at the parameters, and at the previous parameters of the active
    layers, with the same other arguments: the same batch and, in a pure function whose keys are
    among its arguments, the same dropout and augmentation. Inactive layers are at both points what
    they are now. Both backward passes stop below the shallowest active leaf, and the forward pass
    below it is the same in both, so that the compiled program has it once: the two cost at most
    twice the FLOPs of one, and up to twice its temporary memory.

    Args:
        loss_fn: As in :func:`masked_value_and_grad`.
        has_aux: Likewise.
        stacked: Whether to evaluate both points in one pass, by `jax.vmap` over the two, in place
            of one after the other. Same gradients; the active parameters are copied into a stack,
            and auxiliary data must be arrays. On a CPU it is slower (`benchmarks/two_gradients.py`
            measures both); on other devices it has not been measured.

    Returns:
        A function of `(params, prev_params, *args, layer_mask, **kwargs)` that returns
        `(value, (grads, prev_params_grads))`, or `((value, aux), (grads, prev_params_grads))` with
        `has_aux`: value and aux at `params`. `prev_params` are those of :func:`prev_params`.
        `layer_mask` as in :func:`masked_value_and_grad`; ValueError also if `prev_params` do not
        fit `params`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"stem": jnp.array(2.0), "head": jnp.array(5.0)}
        >>> prev_params = {"stem": jnp.array(1.0), "head": jnp.array(4.0)}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> loss_fn = lambda p, x: p["head"] ** 2 * (p["stem"] * x)
        >>> value, (grads, prev_grads) = dm.masked_value_and_grad_pair(loss_fn)(
        ...     params, prev_params, 3.0, layer_mask=layers.mask(1)
        ... )
        >>> print(value, grads["head"], prev_grads["head"])  # 2 · head · (2 · 3)
        150.0 60.0 48.0
    """
    single = masked_value_and_grad(loss_fn, has_aux=has_aux)

    def value_and_grad_pair(
        params: Any, prev_params: Any, *args: Any, layer_mask: Any = _MISSING, **kwargs: Any
    ):
        layer_mask = _required_mask(layer_mask, params)
        prev_params = restructure_like(
            "prev_params", prev_params, params, reference_name="parameters"
        )

        def point(flag: Any, old: Any, now: Any) -> Any:
            if not is_static(flag):
                return where_active(flag, old.astype(now.dtype), now)
            return old.astype(now.dtype) if flag else now

        previous = jax.tree.map(point, layer_mask, prev_params, params)
        both_points = jax.tree.map(lambda flag: not is_static(flag) or flag, layer_mask)
        if not stacked or not any(jax.tree.leaves(both_points)):
            value, grads = single(params, *args, layer_mask=layer_mask, **kwargs)
            _, prev_grads = single(previous, *args, layer_mask=layer_mask, **kwargs)
            return value, (grads, prev_grads)

        both = jax.tree.map(
            lambda active, now, old: jnp.stack([now, old]) if active else now,
            both_points,
            params,
            previous,
        )
        axes = jax.tree.map(lambda active: 0 if active else None, both_points)
        value, grads = jax.vmap(
            lambda point: single(point, *args, layer_mask=layer_mask, **kwargs), in_axes=(axes,)
        )(both)
        value, now, old = (
            jax.tree.map(lambda leaf, i=i: leaf[i], tree)
            for tree, i in ((value, 0), (grads, 0), (grads, 1))
        )
        return value, (now, old)

    return value_and_grad_pair


def _required_mask(layer_mask: Any, params: Any) -> Any:
    """The checked mask of the parameters; all leaves for None, and an error for none at all."""
    if layer_mask is _MISSING:
        raise TypeError(
            "The keyword argument 'layer_mask' is missing. Pass layer_mask=layers.mask(depth), or "
            "layer_mask=None for all layers."
        )
    return resolve_whole_mask(layer_mask, params, {})


def _of_active_rows(flag: Any, grad: jax.Array) -> jax.Array:
    return grad if is_static(flag) else where_active(flag, grad, 0)


def switch_depth(step_fn: Callable[..., Any], sampler: LayerMaskSampler) -> Callable[..., Any]:
    """A step whose depth is drawn on the device, for `lax.scan` and other loops there.

    A `lax.switch` over the static step, compiled once with one branch for each depth. (Stacked
    layers need no branches: :func:`scan_layers` takes a traced depth.) XLA's CPU backend runs
    convolutions inside a branch many times slower than outside; there, draw on the host.

    Args:
        step_fn: A function of `(*args, layer_mask)`, `layer_mask` by keyword, whose outputs have
            the same shapes and dtypes for every mask.
        sampler: The sampler, or an optimizer made with one such as :func:`drop_muon`.

    Returns:
        A function of `(index, *args)`; `index`, a scalar integer array, is `sampler.sample(count)`.
        As in `lax.switch`, an index out of range is clamped.

    Raises:
        TypeError: If `sampler` is no :class:`LayerMaskSampler`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": jnp.ones((3, 3)), "head": jnp.ones((3, 2))}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> tx = dm.drop_muon(0.1, layers, dm.uniform_depth(), seed=0)
        >>> loss_fn = lambda p, x: jnp.sum((x @ p["stem"] @ p["head"]) ** 2)
        >>> def train_step(params, state, x, layer_mask):
        ...     loss, grads = dm.masked_value_and_grad(loss_fn)(params, x, layer_mask=layer_mask)
        ...     updates, state = tx.update(grads, state, params, layer_mask=layer_mask)
        ...     return (optax.apply_updates(params, updates), state), loss
        >>> step = dm.switch_depth(train_step, tx)
        >>> def body(carry, count):
        ...     return step(tx.sample(count), *carry, jnp.eye(3))
        >>> carry, losses = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(20))
        >>> bool(losses[-1] < losses[0])
        True
    """
    if not isinstance(sampler, LayerMaskSampler):
        raise TypeError(
            f"sampler must be a LayerMaskSampler, got {describe(sampler)}. Give the one that is in "
            "the chain, or the chain with sampler.attach_to(chain)."
        )
    masks = [sampler.layers.subset(row.tolist()) for row in sampler.subsets]
    branches = [functools.partial(step_fn, layer_mask=mask) for mask in masks]

    def switched(index: jax.Array, *args: Any) -> Any:
        return jax.lax.switch(index, branches, *args)

    return switched
