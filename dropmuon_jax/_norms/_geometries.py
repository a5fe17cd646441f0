"""The plain norms: of a stack of matrices the norm, the dual norm and the direction of each.

A matrix is (fan-in, fan-out), as a Flax kernel: the papers' Wᵀ. A direction D(G) is the element of
the unit ball with the largest ⟨G, D⟩, which is then ‖G‖*; of a zero matrix it is zero.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dropmuon_jax._many_matrices import map_matrices
from dropmuon_jax._matrices import Blocks
from dropmuon_jax._orthogonalize import (
    Orthogonalize,
    finite_or_nan,
    svd_polar_factor,
    to_unit_entries,
)

Stack = Float[Array, "batch fan_in fan_out"]
Numbers = Float[Array, " batch"]
BOTH = (-2, -1)


class Geometry(NamedTuple):
    """A norm of matrices without its shape factor: what a :class:`Norm` of your own is made of.

    The functions take a stack of matrices (batch, fan-in, fan-out), in float32 at least, and treat
    each by itself.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> def largest_entry(g):  # of the ball of Σ|x|, which steps in one entry
        ...     size = jnp.abs(g).max((-2, -1), keepdims=True)
        ...     return jnp.where((jnp.abs(g) == size) & (size > 0), jnp.sign(g), 0.0)
        >>> l1_norm = dm.Norm(
        ...     "l1_norm()",
        ...     dm.Geometry(
        ...         norm=lambda x: jnp.abs(x).sum((-2, -1)),
        ...         dual_norm=lambda g: jnp.abs(g).max((-2, -1)),
        ...         direction=largest_entry,
        ...         draw=lambda key, shape, dtype: jnp.zeros(shape, dtype).at[0, 0].set(1.0),
        ...     ),
        ... )
        >>> print(l1_norm.lmo(jnp.array([[3.0, -5.0]]), radius=2.0) + 0.0)
        [[0. 2.]]
        >>> tx = dm.norm_lmo(l1_norm, radius=2.0)
    """

    norm: Callable[[Stack], Numbers]
    """From a stack to ‖X‖ of each matrix."""
    dual_norm: Callable[[Stack], Numbers]
    """From a stack to ‖G‖* of each matrix."""
    direction: Callable[[Stack], Stack]
    """From a stack to D of each matrix: ‖D‖ ≤ 1 and ⟨G, D⟩ = ‖G‖*; zero of zero."""
    draw: Callable[[PRNGKeyArray, tuple[int, int], jnp.dtype], Array]
    """From a key, (fan-in, fan-out) and a dtype to one random matrix of norm 1."""
    orthogonalize: Orthogonalize | None = None
    """What `direction` is made of where it is a polar factor: called for many leaves at once."""


@functools.cache
def spectral(orthogonalize: Orthogonalize | None) -> Geometry:
    """‖X‖ = σ₁, ‖G‖* = Σσ, D = UVᵀ, exact or by a kernel that approximates UVᵀ."""

    def direction(g: Stack) -> Stack:
        return map_matrices(orthogonalize or svd_polar_factor, [Blocks(g, num_in=1)])[0]

    def dual_norm(g: Stack) -> Numbers:
        return inner(g, direction(g)) if orthogonalize else _singular_values(g).sum(-1)

    return Geometry(
        largest_singular_value,
        dual_norm,
        direction,
        jax.nn.initializers.orthogonal(),
        orthogonalize or svd_polar_factor,
    )


def _first_singular_pair(g: Stack) -> Stack:
    if g.size == 0:
        return g
    u, s, vt = jnp.linalg.svd(finite_or_nan(g), full_matrices=False)
    return jnp.where(s[..., :1, None] == 0, 0, u[..., :, :1] * vt[..., :1, :])


def _draw_rank_one(key: PRNGKeyArray, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    left, right = jax.random.split(key)
    column = _unit(jax.random.normal(left, (shape[0], 1), dtype), BOTH)
    return column * _unit(jax.random.normal(right, (1, shape[1]), dtype), BOTH)


def _draw_signs(key: PRNGKeyArray, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    return jax.random.rademacher(key, shape).astype(dtype)


def _draw_unit(axes: int | tuple[int, int]) -> Callable[..., Array]:
    return lambda key, shape, dtype: _unit(jax.random.normal(key, shape, dtype), axes)


# ‖X‖ = Σσ, ‖G‖* = σ₁, D = u₁v₁ᵀ.
NUCLEAR = Geometry(
    lambda x: _singular_values(x).sum(-1),
    lambda g: largest_singular_value(g),
    _first_singular_pair,
    _draw_rank_one,
)
# ‖X‖ = max |x|, ‖G‖* = Σ |g|, D = sign(G).
MAXIMUM = Geometry(
    lambda x: jnp.max(jnp.abs(x), BOTH, initial=0),
    lambda g: jnp.sum(jnp.abs(g), BOTH),
    jnp.sign,
    _draw_signs,
)
# A vector for each input, a column of the papers' W: ‖X‖ = max ‖x‖₂, ‖G‖* = Σ ‖g‖₂, D = g/‖g‖₂.
COLUMNS = Geometry(
    lambda x: jnp.max(_length(x, -1), -1, initial=0),
    lambda g: jnp.sum(_length(g, -1), -1),
    lambda g: _unit(g, -1),
    _draw_unit(-1),
)
# The same with a vector for each output, a row of the papers' W.
ROWS = Geometry(
    lambda x: jnp.max(_length(x, -2), -1, initial=0),
    lambda g: jnp.sum(_length(g, -2), -1),
    lambda g: _unit(g, -2),
    _draw_unit(-2),
)
# ‖X‖ = ‖X‖* = ‖X‖₂ of all entries, D = G/‖G‖₂.
EUCLIDEAN = Geometry(
    lambda x: _length(x, BOTH),
    lambda g: _length(g, BOTH),
    lambda g: _unit(g, BOTH),
    _draw_unit(BOTH),
)


def inner(x: Float[Array, "batch ..."], y: Float[Array, "batch ..."]) -> Numbers:
    """⟨X, Y⟩ of each pair of matrices, their axes merged or not."""
    return jnp.sum(x * y, tuple(range(1, x.ndim)))


def largest_singular_value(x: Stack) -> Numbers:
    """σ₁, from the smaller Gram matrix: as accurate as an SVD for the largest, and cheaper."""
    if x.size == 0:
        return jnp.zeros(len(x), x.dtype)
    y, exponent = to_unit_entries(finite_or_nan(x))
    y = y if x.shape[-2] <= x.shape[-1] else y.mT
    gram = jnp.matmul(y, y.mT, precision="highest")
    largest = jnp.linalg.eigvalsh(gram)[..., -1]
    return jnp.ldexp(jnp.sqrt(jnp.maximum(largest, 0)), exponent[..., 0, 0])


def _singular_values(x: Stack) -> Array:
    return jnp.linalg.svd(finite_or_nan(x), compute_uv=False)


def _length(x: Stack, axes: int | tuple[int, int]) -> Array:
    """‖x‖₂ along axes, of numbers of any size."""
    y, exponent = to_unit_entries(x, axes)
    return jnp.ldexp(jnp.sqrt(jnp.sum(y**2, axes)), jnp.squeeze(exponent, axes))


def _unit(x: Stack, axes: int | tuple[int, int]) -> Stack:
    """x/‖x‖₂ along axes, of numbers of any size; zero of zero."""
    y, _ = to_unit_entries(x, axes)
    length = jnp.sqrt(jnp.sum(y**2, axes, keepdims=True))
    return y / jnp.where(length == 0, 1, length)
