"""The gradient of the active layers, at one point or at two, and the update that takes it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dropmuon_jax._checks import check_parameters, describe
from dropmuon_jax.layers.states import refuse_unfit, state_like
from dropmuon_jax.layers.trees import (
    inside_update,
    is_static,
    resolve_whole_mask,
    restructure_like,
    where_active,
)
from dropmuon_jax.transforms.prev_params import keeps_prev_params, prev_params

_MISSING = object()


def masked_value_and_grad(
    loss_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, optax.Updates]]:
    """`jax.value_and_grad`, with the backward pass stopped below the active layers.

    Only the active leaves are differentiated. Because the mask is static, JAX never builds the
    backward pass below the shallowest of them, nor keeps what it would need: in FLOPs and memory
    the compiled step is that of a network whose other layers are constants. Put the gradient, the
    optimizer and this mask in one `jax.jit`.

    The mask of stacked layers may be a vector, and be traced: gradients of inactive layers are zero
    whatever the loss does, and are not computed if the loss runs the stack by :func:`scan_layers`
    to the same depth.

    Args:
        loss_fn: A function of `(params, *args, **kwargs)` that returns a scalar, or
            `(scalar, aux)` with `has_aux`.
        has_aux: Whether `loss_fn` returns auxiliary data.

    Returns:
        A function of `(params, *args, layer_mask, **kwargs)` that returns `(value, grads)`, or
        `((value, aux), grads)` with `has_aux`. `grads` has the structure, shapes and dtypes of
        `params`; it is zero at inactive leaves. `layer_mask` is required; None makes all layers
        active. The function raises TypeError if the mask is missing, no tree of booleans, or traced
        without stacks, and ValueError if it does not fit `params`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"stem": jnp.array(2.0), "head": jnp.array(5.0)}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> loss_fn = lambda p, x: p["head"] * (p["stem"] * x)
        >>> value, grads = dm.masked_value_and_grad(loss_fn)(params, 3.0, layer_mask=layers.mask(1))
        >>> print(value, grads["stem"], grads["head"])
        30.0 0.0 6.0
    """

    def value_and_grad(
        params: optax.Params, *args: Any, layer_mask: Any = _MISSING, **kwargs: Any
    ) -> tuple[Any, optax.Updates]:
        layer_mask = _required_mask(layer_mask, params)
        leaves, treedef = jax.tree.flatten(params)
        flags = jax.tree.leaves(layer_mask)
        active = [not is_static(flag) or flag for flag in flags]

        def loss_of_active(active_leaves: list[Array]) -> Any:
            chosen = iter(active_leaves)
            merged = [next(chosen) if on else leaf for on, leaf in zip(active, leaves, strict=True)]
            return loss_fn(treedef.unflatten(merged), *args, **kwargs)

        active_leaves = [leaf for on, leaf in zip(active, leaves, strict=True) if on]
        _check_differentiable(treedef, active, leaves)
        value, active_grads = jax.value_and_grad(loss_of_active, has_aux=has_aux)(active_leaves)
        chosen = iter(active_grads)
        grads = [
            _of_active_layers(flag, next(chosen)) if on else jnp.zeros_like(leaf)
            for on, flag, leaf in zip(active, flags, leaves, strict=True)
        ]
        return value, treedef.unflatten(grads)

    return value_and_grad


def masked_value_and_grad_pair(
    loss_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, tuple[optax.Updates, optax.Updates]]]:
    """The gradients of one batch at two points, of which variance reduction takes the difference.

    :func:`masked_value_and_grad` at the parameters, and at the previous parameters of the active
    layers, with the same other arguments: the same batch and, in a pure function whose keys are
    among its arguments, the same dropout and augmentation. Inactive layers are at both points what
    they are now. Both backward passes stop below the shallowest active leaf, and the forward pass
    below it is the same in both, so that the compiled program has it once: the two cost at most
    twice the FLOPs of one, and up to twice its temporary memory.

    Args:
        loss_fn: A function of `(params, *args, **kwargs)` that returns a scalar, or
            `(scalar, aux)` with `has_aux`.
        has_aux: Whether `loss_fn` returns auxiliary data.

    Returns:
        A function of `(params, prev_params, *args, layer_mask, **kwargs)` that returns
        `(value, (grads, prev_params_grads))`, or `((value, aux), (grads, prev_params_grads))` with
        `has_aux`: value and aux at `params`. `prev_params` is what :func:`prev_params` returns, and
        `layer_mask` is required, None for all layers. The function raises what
        :func:`masked_value_and_grad` raises, and ValueError if `prev_params` do not fit `params`.

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
    gradient = masked_value_and_grad(loss_fn, has_aux)

    def value_and_grad_pair(
        params: optax.Params,
        prev_params: optax.Params,
        *args: Any,
        layer_mask: Any = _MISSING,
        **kwargs: Any,
    ) -> tuple[Any, tuple[optax.Updates, optax.Updates]]:
        layer_mask = _required_mask(layer_mask, params)
        prev_params = restructure_like(
            "prev_params", prev_params, params, reference_name="parameters"
        )

        def previous_of_active(flag: Any, old: Array, now: Array) -> Array:
            if not is_static(flag):
                return where_active(flag, old.astype(now.dtype), now)
            return old.astype(now.dtype) if flag else now

        previous = jax.tree.map(previous_of_active, layer_mask, prev_params, params)
        value, grads = gradient(params, *args, layer_mask=layer_mask, **kwargs)
        _, prev_params_grads = gradient(previous, *args, layer_mask=layer_mask, **kwargs)
        return value, (grads, prev_params_grads)

    return value_and_grad_pair


def _required_mask(layer_mask: Any, params: optax.Params) -> Any:
    """The checked mask of the parameters: all True for None, and an error if it was not given."""
    if layer_mask is _MISSING:
        raise TypeError(
            "The keyword argument 'layer_mask' is missing. Pass layer_mask=layers.mask(depth), or "
            "layer_mask=None for all layers."
        )
    if layer_mask is None:
        return jax.tree.map(lambda _: True, params)
    return resolve_whole_mask(layer_mask, params)


def _check_differentiable(treedef: Any, active: list[bool], leaves: list[Any]) -> None:
    """Error for an active leaf that has no gradient."""
    has_none = [
        on and not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating)
        for on, leaf in zip(active, leaves, strict=True)
    ]
    if any(has_none):
        kept = [leaf if bad else None for bad, leaf in zip(has_none, leaves, strict=True)]
        check_parameters(treedef.unflatten(kept))


def _of_active_layers(flag: Any, grad: Array) -> Array:
    return grad if is_static(flag) else where_active(flag, grad, 0)


def masked_gradient(
    loss_fn: Callable[..., Any], optimizer: optax.GradientTransformationExtraArgs
) -> Callable[..., tuple[Any, tuple[optax.Updates, ...]]]:
    """What a loss that returns (loss, aux) returns, and its gradients of the active layers.

    The function of `(params, opt_state, layer_mask, *args, **kwargs)` gives one gradient, or two
    for an optimizer that keeps previous parameters.
    """

    def gradient(params: Any, opt_state: Any, layer_mask: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_unfit(opt_state, optimizer.init, params)
        with inside_update(has_mask=True):
            if not keeps_prev_params(opt_state):
                of_one = masked_value_and_grad(loss_fn, has_aux=True)
                value, grads = of_one(params, *args, layer_mask=layer_mask, **kwargs)
                return value, (grads,)
            of_two = masked_value_and_grad_pair(loss_fn, has_aux=True)
            args = prev_params(opt_state, params), *args
            return of_two(params, *args, layer_mask=layer_mask, **kwargs)

    return gradient


def masked_update(
    optimizer: optax.GradientTransformationExtraArgs,
) -> Callable[..., tuple[optax.Params, optax.OptState]]:
    """The update of the active layers and its application.

    The function of `(params, opt_state, layer_mask, gradients)` returns new parameters and a new
    state of the same dtypes. Inactive parameters keep every bit.
    """

    def update(params: Any, opt_state: Any, layer_mask: Any, gradients: Any) -> Any:
        layer_mask = resolve_whole_mask(layer_mask, params)
        grads, *second = gradients
        extra_args = {"prev_params_grads": second[0]} if second else {}
        with inside_update(has_mask=True):
            updates, new_state = optimizer.update(
                grads, opt_state, params, layer_mask=layer_mask, **extra_args
            )
        params = jax.tree.map(_apply, layer_mask, params, updates)
        return params, state_like(opt_state, new_state)

    return update


def _apply(flag: Any, param: Any, update: Any) -> Any:
    """A parameter after its update; the same bits where it is inactive."""
    if is_static(flag) and not flag:
        return param
    moved: Any = optax.apply_updates(param, update)
    return moved if is_static(flag) else where_active(flag, moved, param)


def loss_of_params(
    loss_fn: Callable[..., Any], has_aux: bool, graphdef: Any, rest: Any
) -> Callable[..., Any]:
    """A loss of an NNX module as one of its parameters; without a graphdef it is one already.

    It returns the loss, and beside it the auxiliary data and `rest`, what else the module has, as
    the loss leaves it.
    """
    nnx: Any = sys.modules.get("flax.nnx")

    def loss_and_rest(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        model = params if graphdef is None else nnx.merge(graphdef, params, rest, copy=True)
        result = loss_fn(model, *args, **kwargs)
        if has_aux != isinstance(result, tuple):
            raise TypeError(
                f"loss_fn must return {'(loss, aux)' if has_aux else 'a scalar'} with "
                f"has_aux={has_aux}, got {describe(result)}."
            )
        loss, aux = result if has_aux else (result, None)
        if graphdef is None:
            return loss, (aux, None)
        new_rest = nnx.state(model, nnx.Not(nnx.Param))
        if jax.tree.structure(new_rest) != jax.tree.structure(rest):
            raise TypeError(
                "loss_fn has added variables to the module or removed some, and a step keeps them: "
                "return what it adds as aux."
            )
        return loss, (aux, state_like(rest, new_rest))

    return loss_and_rest


def takes_depth(loss_fn: Callable[..., Any], is_stacked: bool) -> bool:
    """Whether a loss is given the depth; an error unless one of stacked layers takes it.

    An error too for an argument of that name that means something else.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {describe(loss_fn)}.")
    parameters = inspect.signature(loss_fn).parameters
    takes_any = any(of.kind is of.VAR_KEYWORD for of in parameters.values())
    if is_stacked and not takes_any and "depth" not in parameters:
        raise TypeError(
            "Layers are stacked, so loss_fn must take the keyword argument `depth`, among all "
            "layers, and run the stack by dm.scan_layers(…, depth=layers.stack_depth(depth)). It "
            f"takes {', '.join(parameters)}."
        )
    own = parameters["depth"].default if "depth" in parameters else 0
    if isinstance(own, int) and own:  # the number of blocks, say, also if it is bound by a partial
        raise TypeError(
            f"loss_fn has an argument `depth`, {own} by default, for which it would be given the "
            "depth that is drawn. If it means something else, call it otherwise."
        )
    return "depth" in parameters or is_stacked
