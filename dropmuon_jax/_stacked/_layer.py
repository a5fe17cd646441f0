"""A layer as a program on flat lists, and the checks of what a user gives for one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from dropmuon_jax._checks import describe
from dropmuon_jax._layers import leaf_paths

Leaves = list[Any]


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


def trace_layer(f: Callable[..., Any], init: Any, xs: Any) -> tuple[Layer, Any]:
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
        lambda old, new: old.astype(new.dtype) if _is_weak(old) else old, init, out[0]
    )
    before, after = jax.tree.leaves(promoted), jax.tree.leaves(out[0])
    if any(new.dtype != old.dtype for new, old in zip(before, jax.tree.leaves(init), strict=True)):
        return trace_layer(f, promoted, xs)
    for path, old, new in zip(leaf_paths(init), before, after, strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TypeError(
                "f must return a carry of the shapes and dtypes that it takes, as in lax.scan. "
                f"{f'Leaf {path!r} of the carry' if path else 'The carry'} is {_aval(old)} and "
                f"becomes {_aval(new)}."
            )
    return Layer(jaxpr.jaxpr, list(jaxpr.consts), jax.tree.structure(out)), promoted


def _first_row(x: Any) -> Any:
    """With the sharding of the stack; of an empty one the shape."""
    if isinstance(x, jax.Array) and len(x):
        return jax.lax.index_in_dim(x, 0, keepdims=False)
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _is_weak(x: Any) -> bool:
    return getattr(x, "weak_type", False)


def _aval(x: Any) -> str:
    return f"{x.dtype.name}{list(x.shape)}"


def leading_size(xs: Any) -> int:
    """L; an error unless all leaves have it."""
    leaves, paths = jax.tree.leaves(xs), leaf_paths(xs)
    if not leaves:
        raise ValueError("xs has no leaves: give the stacked parameters, of shapes (L, …).")
    for leaf, path in zip(leaves, paths, strict=True):
        if not np.shape(leaf):
            raise ValueError(
                f"Leaf '{path}' of xs is a scalar. Every leaf has a leading axis, with a row for "
                "each layer; what all layers share, f can close over."
            )
        if np.shape(leaf)[0] != np.shape(leaves[0])[0]:
            raise ValueError(
                f"The leaves of xs must agree in their leading size, the number of layers: "
                f"'{paths[0]}' has shape {np.shape(leaves[0])}, and '{path}' {np.shape(leaf)}."
            )
    return np.shape(leaves[0])[0]
