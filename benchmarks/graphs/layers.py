"""The layers of the networks: as people write them in JAX, and as a CPU runs them soonest.

XLA's CPU backend (jaxlib 0.10) multiplies xᵀg, a weight gradient, more slowly than it copies xᵀ
and multiplies the copy; it takes the derivative of a gather in a loop over rows; and it repeats a
chain of elementwise operations in each sum that needs it. The derivatives below copy the transposed
matrix, add up rows with a product, and end such chains.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array
_EPSILON = 1e-5


class Layers(NamedTuple):
    """What the networks are made of."""

    rows: Callable[[Array, Array], Array]
    """table[index]."""
    linear: Callable[[Array, Array], Array]
    """x @ kernel."""
    dense: Callable[[Array, Array, Array], Array]
    """x @ kernel + bias."""
    norm: Callable[[Array, Array, Array], Array]
    """Layer normalization, with a scale and a bias."""
    attend: Callable[[Array, int], Array]
    """Causal attention with so many heads, from (q, k, v) along the last axis."""
    cross_entropy: Callable[[Array, Array], Array]
    """The mean of all, from logits and labels."""


# --- As people write them -------------------------------------------------------------------------


def _norm(x: Array, scale: Array, bias: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + _EPSILON) * scale + bias


def _attend(qkv: Array, num_heads: int) -> Array:
    batch, length = qkv.shape[:2]
    q, k, v = (z.reshape(batch, length, num_heads, -1) for z in jnp.split(qkv, 3, -1))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    mask = np.tril(np.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, -1)


def _cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


PLAIN = Layers(
    rows=lambda table, index: table[index],
    linear=jnp.matmul,
    dense=lambda x, kernel, bias: x @ kernel + bias,
    norm=_norm,
    attend=_attend,
    cross_entropy=_cross_entropy,
)

# --- As a CPU runs them soonest -------------------------------------------------------------------

_computed = jax.lax.optimization_barrier


def _on_rows(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function of a matrix and parameters, of arrays with more axes before the last."""

    def on_rows(x: Array, *params: Array) -> Array:
        result = function(x.reshape(-1, x.shape[-1]), *params)
        return result.reshape(*x.shape[:-1], -1)

    return on_rows


@jax.custom_vjp
def _multiply(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _of_multiply(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    g = _computed(g)
    return g @ kernel.T, _computed(x.T) @ g


_multiply.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _of_multiply)


@jax.custom_vjp
def _add(x: Array, bias: Array) -> Array:
    return x + bias


_add.defvjp(lambda x, bias: (x + bias, None), lambda _, g: (g, _computed(g).sum(0)))


@jax.custom_vjp
def _normalize(x: Array, scale: Array, bias: Array) -> Array:
    return _norm(x, scale, bias)


def _normalize_and_residuals(
    x: Array, scale: Array, bias: Array
) -> tuple[Array, tuple[Array, ...]]:
    x = x - x.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + _EPSILON)
    unit = _computed(x * rate)
    return unit * scale + bias, (unit, rate, scale)


def _of_normalize(residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    unit, rate, scale = residuals
    g = _computed(g)
    of_unit = g * scale
    along = (of_unit * unit).mean(-1, keepdims=True)
    of_x = (of_unit - of_unit.mean(-1, keepdims=True) - unit * along) * rate
    return of_x, (g * unit).sum(0), g.sum(0)


_normalize.defvjp(_normalize_and_residuals, _of_normalize)


@jax.custom_vjp
def _take(table: Array, index: Array) -> Array:
    return table[index]


def _of_take(residuals: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    index, numbers = residuals
    is_row = (numbers[:, None] == index.ravel()).astype(g.dtype)
    return is_row @ g.reshape(-1, g.shape[-1]), None


_take.defvjp(lambda table, index: (table[index], (index, jnp.arange(len(table)))), _of_take)


def _attend_in_lanes(qkv: Array, num_heads: int) -> Array:
    """With examples and heads along the last axis, where a CPU has its lanes.

    Products of 8 × 4 matrices, one after another, would be most of the time.
    """
    batch, length = qkv.shape[:2]
    parts = (z.reshape(batch, length, num_heads, -1) for z in jnp.split(qkv, 3, -1))
    q, k, v = (z.transpose(1, 3, 0, 2).reshape(length, -1, batch * num_heads) for z in parts)
    scores = (q[:, None] * k[None]).sum(2) / math.sqrt(q.shape[1])  # to, from, lanes
    mask = np.tril(np.ones((length, length), bool))[..., None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=1)
    mixed = (weights[:, :, None] * v[None]).sum(1).reshape(length, -1, batch, num_heads)
    return mixed.transpose(2, 0, 3, 1).reshape(batch, length, -1)


def _fast_cross_entropy(logits: Array, labels: Array) -> Array:
    of_labels = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, of_labels).mean()


FAST = Layers(
    rows=_take,
    linear=_on_rows(_multiply),
    dense=_on_rows(lambda x, kernel, bias: _add(_multiply(x, kernel), bias)),
    norm=_on_rows(_normalize),
    attend=_attend_in_lanes,
    cross_entropy=_fast_cross_entropy,
)
