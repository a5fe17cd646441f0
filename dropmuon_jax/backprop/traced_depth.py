"""Depths drawn on the device: steps with a branch for each, and the derivative of a scan to one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.tree_util import Partial
from jaxtyping import Array, Int

from dropmuon_jax._checks import describe
from dropmuon_jax.layers.rows import take_row, write_row, zeros_for_rows
from dropmuon_jax.sampling.sampler import DepthSampler

Leaves = list[Any]


def switch_depth(step_fn: Callable[..., Any], sampler: DepthSampler) -> Callable[..., Any]:
    """A step whose depth is drawn on the device, for `lax.scan` and other loops there.

    A `lax.switch` over the static step, compiled once with one branch for each depth. (Stacked
    layers need no branches: :func:`scan_layers` takes a traced depth.) XLA's CPU backend runs
    convolutions inside a branch many times slower than outside; there, draw on the host.

    Args:
        step_fn: A function of `(*args, layer_mask)`, `layer_mask` by keyword, whose outputs have
            the same shapes and dtypes for every mask.
        sampler: What can be drawn: a branch is made for each of its subsets of layers.

    Returns:
        A function of `(index, *args)`; `index`, a scalar integer array, is `sampler.sample(count)`.
        As in `lax.switch`, an index out of range is clamped.

    Raises:
        TypeError: If `sampler` is no :class:`DepthSampler`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": jnp.ones((3, 3)), "head": jnp.ones((3, 2))}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
        >>> optimizer = dm.drop_muon(0.1, layers)
        >>> loss_fn = lambda p, x: jnp.sum((x @ p["stem"] @ p["head"]) ** 2)
        >>> def train_step(params, state, x, layer_mask):
        ...     loss, grads = dm.masked_value_and_grad(loss_fn)(params, x, layer_mask=layer_mask)
        ...     updates, state = optimizer.update(grads, state, params, layer_mask=layer_mask)
        ...     return (optax.apply_updates(params, updates), state), loss
        >>> step = dm.switch_depth(train_step, sampler)
        >>> def body(carry, count):
        ...     return step(sampler.sample(count), *carry, jnp.eye(3))
        >>> carry, losses = jax.lax.scan(body, (params, optimizer.init(params)), jnp.arange(20))
        >>> bool(losses[-1] < losses[0])
        True
    """
    check_sampler(sampler)
    masks = [sampler.layers.subset(row.tolist()) for row in sampler.subsets]
    branches = [functools.partial(step_fn, layer_mask=mask) for mask in masks]

    def switched(index: Int[Array, ""], *args: Any) -> Any:
        return jax.lax.switch(index, branches, *args)

    return switched


def check_sampler(value: Any) -> None:
    """Error unless an argument is a `DepthSampler`, with the way out for the link of a chain."""
    if isinstance(value, DepthSampler):
        return
    cure = (
        "Give its attribute, sampler.draws."
        if isinstance(getattr(value, "draws", None), DepthSampler)
        else "Make one, dm.DepthSampler(layers, dm.uniform_depth(), seed=0)."
    )
    raise TypeError(f"sampler must be a DepthSampler, got {describe(value)}. {cure}")


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The program of a layer, on flat lists."""

    jaxpr: Any
    """From consts, carry and x to carry and y."""
    consts: Leaves
    """What `f` closes over."""
    out_tree: Any
    """The structure of the pair of carry and y."""

    def __call__(self, consts: Leaves, carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        """The next carry, and y."""
        out = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, consts))(*carry, *x)
        return out[: len(carry)], out[len(carry) :]


def scan_down_to(layer: Layer, policy: Any) -> Callable[..., tuple[Leaves, Leaves]]:
    """The scan of consts, init and xs, differentiated from the last layer to a traced depth."""

    @jax.custom_vjp
    def scan(consts: Leaves, init: Leaves, xs: Leaves, depth: Array) -> tuple[Leaves, Leaves]:
        del depth
        return jax.lax.scan(functools.partial(layer, consts), init, xs)

    def forward(consts: Any, init: Any, xs: Any, depth: Any) -> Any:
        needed = [[_needs_cotangent(leaf) for leaf in leaves] for leaves in (consts, xs)]
        consts, init, xs = ([leaf.value for leaf in leaves] for leaves in (consts, init, xs))
        restore: Any = None

        def save(carry: Leaves, x: Leaves) -> tuple[Leaves, tuple[Leaves, Leaves]]:
            nonlocal restore
            (carry, y), pull_back = _layer_vjp(layer, policy, needed, consts, carry, x)
            saved, restore = _take_apart(pull_back, consts, x)
            return carry, (y, saved)

        def below(i: Array, state: tuple[Leaves, Leaves]) -> tuple[Leaves, Leaves]:
            carry, ys = state
            carry, y = layer(consts, carry, take_row(xs, i))
            return carry, write_row(ys, y, i)

        def above(i: Array, state: tuple[Leaves, Leaves, Leaves]) -> tuple[Leaves, Leaves, Leaves]:
            carry, ys, saved = state
            carry, of_layer = save(carry, take_row(xs, i))
            return carry, *write_row((ys, saved), of_layer, i)

        num_layers = len(xs[0])
        first = take_row(xs, jnp.int32(0))
        ys, saved = zeros_for_rows(lambda *row: save(*row)[1], num_layers, init, first)
        # Constants for a second derivative too, where a depth that is known now allows it.
        carry, ys = jax.lax.stop_gradient(jax.lax.fori_loop(0, depth.value, below, (init, ys)))
        carry, ys, saved = jax.lax.fori_loop(depth.value, num_layers, above, (carry, ys, saved))
        static = Partial(functools.partial(_pull_back_to, restore, needed))
        return (carry, ys), (static, consts, xs, saved, depth.value)

    def backward(residuals: Any, cotangents: Any) -> Any:
        static, *arrays = residuals
        return (*static.func(*arrays, *cotangents), None)

    scan.defvjp(forward, backward, symbolic_zeros=True)
    return scan


def _layer_vjp(
    layer: Layer,
    policy: Any,
    needed: Sequence[Sequence[bool]],
    consts: Leaves,
    carry: Leaves,
    x: Leaves,
) -> tuple[tuple[Leaves, Leaves], Callable[..., Any]]:
    """The outputs of a layer, and the function from their cotangents to those of its inputs.

    All floating-point leaves of the carry are differentiated, and the needed ones of consts and x.
    """
    flags = needed[0], [_is_floating(leaf) for leaf in carry], needed[1]
    y_flags = [_is_floating(out.aval) for out in layer.jaxpr.outvars[len(carry) :]]
    inputs = [_split(*pair) for pair in zip(flags, (consts, carry, x), strict=True)]
    constant = [leaves for _, leaves in inputs]

    def differentiable(*variable: Leaves) -> tuple[Any, Any]:
        carry, y = layer(*map(_join, flags, variable, constant))
        (carry, rest_of_carry), (y, rest_of_y) = _split(flags[1], carry), _split(y_flags, y)
        return (carry, y), (rest_of_carry, rest_of_y)

    differentiable = jax.checkpoint(differentiable, prevent_cse=False, policy=policy)
    floating, pull_back, rest = jax.vjp(
        differentiable, *(leaves for leaves, _ in inputs), has_aux=True
    )
    carry, y = map(_join, (flags[1], y_flags), floating, rest)
    return (carry, y), pull_back


def _take_apart(
    pull_back: Callable[..., Any], consts: Leaves, x: Leaves
) -> tuple[Leaves, Callable[..., Any]]:
    """What a layer has to save for its `pull_back`, and the function that puts it together again.

    A `jax.vjp` holds the consts and the row of xs too, which are at hand without being saved.
    """
    held, treedef = jax.tree.flatten(pull_back)
    present = {id(leaf): place for place, leaf in enumerate([*consts, *x])}
    places = [present.get(id(leaf)) for leaf in held]

    def restore(consts: Leaves, x: Leaves, saved: Leaves) -> Callable[..., Any]:
        inputs, of_layer = [*consts, *x], iter(saved)
        return treedef.unflatten(
            next(of_layer) if place is None else inputs[place] for place in places
        )

    return [leaf for leaf, place in zip(held, places, strict=True) if place is None], restore


def _pull_back_to(
    restore: Callable[..., Any],
    needed: Sequence[Sequence[bool]],
    consts: Leaves,
    xs: Leaves,
    saved: Leaves,
    depth: Array,
    ct_carry: Leaves,
    ct_ys: Leaves,
) -> tuple[Leaves, Leaves, Leaves]:
    """The cotangents of consts, init and xs: layer by layer, from the last down to the depth."""
    num_layers = len(xs[0])
    carry_flags, y_flags = ([_is_floating(ct) for ct in cts] for cts in (ct_carry, ct_ys))

    def turn(t: Array, cts: tuple[Leaves, Leaves, Leaves]) -> tuple[Leaves, Leaves, Leaves]:
        ct_consts, ct_carry, ct_xs = cts
        i = num_layers - 1 - t
        pull_back = restore(consts, take_row(xs, i), take_row(saved, i))
        ct_y, _ = _split(y_flags, [_cotangent_row(ct, i) for ct in ct_ys])
        of_consts, ct_carry, of_x = pull_back((ct_carry, ct_y))
        ct_consts = [total + ct for total, ct in zip(ct_consts, of_consts, strict=True)]
        return ct_consts, ct_carry, write_row(ct_xs, of_x, i)

    ct_consts, ct_xs = (
        [jnp.zeros_like(leaf) for leaf in _split(*pair)[0]]
        for pair in zip(needed, (consts, xs), strict=True)
    )
    ct_carry = [_instantiate(ct) for ct in _split(carry_flags, ct_carry)[0]]
    ct_consts, ct_init, ct_xs = jax.lax.fori_loop(
        0, num_layers - depth, turn, (ct_consts, ct_carry, ct_xs)
    )
    ct_init = [jnp.where(depth == 0, ct, 0) for ct in ct_init]
    return (
        _or_none(needed[0], ct_consts),
        _or_none(carry_flags, ct_init),
        _or_none(needed[1], ct_xs),
    )


def _or_none(flags: Sequence[bool], cts: Leaves) -> Leaves:
    """The cotangents of the inputs with a flag; None, which is zero, for the others."""
    return _join(flags, cts, [None] * (len(flags) - len(cts)))


def _cotangent_row(ct: Any, i: Array) -> Any:
    """Layer i of the cotangent of stacked outputs."""
    if not isinstance(ct, SymbolicZero):
        return take_row(ct, i)
    aval: Any = ct.aval
    return jnp.zeros(aval.shape[1:], aval.dtype) if _is_floating(aval) else None


def _instantiate(ct: Any) -> Array:
    if not isinstance(ct, SymbolicZero):
        return ct
    aval: Any = ct.aval
    return jnp.zeros(aval.shape, aval.dtype)


def _needs_cotangent(primal: Any) -> bool:
    """Whether the derivative by an input of `forward` is asked for, and exists."""
    return primal.perturbed and _is_floating(primal.value)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _split(flags: Sequence[bool], leaves: Leaves) -> tuple[Leaves, Leaves]:
    """The leaves with and without a flag."""
    chosen = [leaf for flag, leaf in zip(flags, leaves, strict=True) if flag]
    return chosen, [leaf for flag, leaf in zip(flags, leaves, strict=True) if not flag]


def _join(flags: Sequence[bool], chosen: Leaves, others: Leaves) -> Leaves:
    """The inverse of `_split`."""
    of_flag = {True: iter(chosen), False: iter(others)}
    return [next(of_flag[flag]) for flag in flags]
