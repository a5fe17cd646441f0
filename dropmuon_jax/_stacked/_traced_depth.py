"""The scan whose depth may be traced: its derivative is a loop that ends there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.tree_util import Partial
from jaxtyping import Array

from dropmuon_jax._room import room_for_rows
from dropmuon_jax._stacked._layer import Layer, Leaves


def scan_down_to(layer: Layer, policy: Any) -> Callable[..., tuple[Leaves, Leaves]]:
    """The scan of consts, init and xs, differentiated from the last layer to a traced depth."""

    @jax.custom_vjp
    def scan(consts: Leaves, init: Leaves, xs: Leaves, depth: Array) -> tuple[Leaves, Leaves]:
        del depth
        return jax.lax.scan(functools.partial(layer, consts), init, xs)

    def forward(consts: Any, init: Any, xs: Any, depth: Any) -> Any:
        wanted = [[_is_wanted(leaf) for leaf in leaves] for leaves in (consts, xs)]
        consts, init, xs = ([leaf.value for leaf in leaves] for leaves in (consts, init, xs))
        restore: Any = None

        def save(carry: Leaves, x: Leaves) -> tuple[Leaves, tuple[Leaves, Leaves]]:
            nonlocal restore
            (carry, y), pull_back = _layer_vjp(layer, policy, wanted, consts, carry, x)
            saved, restore = _take_apart(pull_back, consts, x)
            return carry, (y, saved)

        def below(i: Array, state: tuple[Leaves, Leaves]) -> tuple[Leaves, Leaves]:
            carry, ys = state
            carry, y = layer(consts, carry, [_row(x, i) for x in xs])
            return carry, [_write(stack, leaf, i) for stack, leaf in zip(ys, y, strict=True)]

        def above(i: Array, state: tuple[Leaves, Leaves, Leaves]) -> tuple[Leaves, Leaves, Leaves]:
            carry, ys, saved = state
            carry, rows = save(carry, [_row(x, i) for x in xs])
            ys, saved = jax.tree.map(lambda stack, leaf: _write(stack, leaf, i), (ys, saved), rows)
            return carry, ys, saved

        num_layers = len(xs[0])
        row = [_row(x, jnp.int32(0)) for x in xs]
        ys, saved = room_for_rows(lambda *row: save(*row)[1], num_layers, init, row)
        # Constants for a second derivative too, where a depth that is known now allows it.
        carry, ys = jax.lax.stop_gradient(jax.lax.fori_loop(0, depth.value, below, (init, ys)))
        carry, ys, saved = jax.lax.fori_loop(depth.value, num_layers, above, (carry, ys, saved))
        static = Partial(functools.partial(_pull_back_to, restore, wanted))
        return (carry, ys), (static, consts, xs, saved, depth.value)

    def backward(residuals: Any, cotangents: Any) -> Any:
        static, *arrays = residuals
        return (*static.func(*arrays, *cotangents), None)

    scan.defvjp(forward, backward, symbolic_zeros=True)
    return scan


def _layer_vjp(
    layer: Layer,
    policy: Any,
    wanted: Sequence[Sequence[bool]],
    consts: Leaves,
    carry: Leaves,
    x: Leaves,
) -> tuple[tuple[Leaves, Leaves], Callable[..., Any]]:
    """The outputs of a layer, and the function from their cotangents to those of its inputs.

    Of the carry all floating-point leaves are differentiated, of consts and x those wanted.
    """
    flags = wanted[0], [_is_floating(leaf) for leaf in carry], wanted[1]
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

    The consts and the row of xs, which a `jax.vjp` holds too, are there without being saved.
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
    wanted: Sequence[Sequence[bool]],
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
        pull_back = restore(consts, [_row(x, i) for x in xs], [_row(leaf, i) for leaf in saved])
        ct_y, _ = _split(y_flags, [_row(ct, i) for ct in ct_ys])
        of_consts, ct_carry, of_x = pull_back((ct_carry, ct_y))
        ct_consts = [total + ct for total, ct in zip(ct_consts, of_consts, strict=True)]
        ct_xs = [_write(stack, ct, i) for stack, ct in zip(ct_xs, of_x, strict=True)]
        return ct_consts, ct_carry, ct_xs

    ct_consts, ct_xs = (
        [jnp.zeros_like(leaf) for leaf in _split(*pair)[0]]
        for pair in zip(wanted, (consts, xs), strict=True)
    )
    ct_carry = [_instantiate(ct) for ct in _split(carry_flags, ct_carry)[0]]
    ct_consts, ct_init, ct_xs = jax.lax.fori_loop(
        0, num_layers - depth, turn, (ct_consts, ct_carry, ct_xs)
    )
    ct_init = [jnp.where(depth == 0, ct, 0) for ct in ct_init]
    return (
        _or_none(wanted[0], ct_consts),
        _or_none(carry_flags, ct_init),
        _or_none(wanted[1], ct_xs),
    )


def _or_none(flags: Sequence[bool], cts: Leaves) -> Leaves:
    """The cotangents of the inputs with a flag; None, which is zero, for the others."""
    return _join(flags, cts, [None] * (len(flags) - len(cts)))


def _row(stack: Any, i: Array) -> Any:
    """Row i, without its leading axis."""
    if isinstance(stack, SymbolicZero):
        aval: Any = stack.aval
        return jnp.zeros(aval.shape[1:], aval.dtype) if _is_floating(aval) else None
    return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)


def _write(stack: Array, row: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, row, i, axis=0)


def _instantiate(ct: Any) -> Array:
    if not isinstance(ct, SymbolicZero):
        return ct
    aval: Any = ct.aval
    return jnp.zeros(aval.shape, aval.dtype)


def _is_wanted(primal: Any) -> bool:
    """Whether an input of `forward` has a derivative that somebody asks for."""
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
