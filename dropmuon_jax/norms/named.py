"""The plain norms of stacks of matrices, and the norms by name.

A matrix is (fan-in, fan-out), as a Flax kernel: the papers' Wᵀ. A direction D(G) is the element of
the unit ball with the largest ⟨G, D⟩, which is then ‖G‖*. The direction of a zero matrix is zero,
and so are all derivatives there. What an SVD makes has none where singular values are equal.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from dropmuon_jax._checks import check_choice, describe
from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.layers.matrices import MatrixAxes
from dropmuon_jax.norms.norm import SPECTRAL_FACTORS, Geometry, Lengths, Matrices, Norm
from dropmuon_jax.orthogonalize.batches import (
    DEFAULT_MEMORY_LIMIT,
    Orthogonalize,
    execution,
    finite_or_nan,
    svd_polar_factor,
    thin_svd,
    to_unit_entries,
)
from dropmuon_jax.orthogonalize.newton_schulz import newton_schulz

BOTH = (-2, -1)
_OF_A_STACK = MatrixAxes("(no leaf)", fan_in=(1,), fan_out=(2,))


@functools.cache  # so that equal norms are one function to `jax.jit`
def spectral(orthogonalize: Orthogonalize | None) -> Geometry:
    """‖X‖ = σ₁, ‖G‖* = Σσ, D = UVᵀ, exact or by a kernel that approximates UVᵀ."""
    kernel = orthogonalize or svd_polar_factor

    def direction(g: Matrices) -> Matrices:
        on = execution(g)
        return on.orthogonalize_all(kernel, [g], [_OF_A_STACK], DEFAULT_MEMORY_LIMIT)[0]

    def dual_norm(g: Matrices) -> Lengths:
        if orthogonalize is None:
            return _singular_values(g).sum(-1)
        return jnp.sum(g * direction(g), BOTH)

    draw = jax.nn.initializers.orthogonal()
    return Geometry(_largest_singular_value, dual_norm, direction, draw, kernel)


@names_counterparts
def spectral_norm(
    shape_factor: str = "spectral", *, orthogonalize: Orthogonalize | None = None
) -> Norm:
    r"""The largest singular value, divided by a shape factor: the norm of Muon and Scion.

    .. math::
        \|X\| = \sigma_1(X) / c, \qquad \|G\|_* = c \textstyle\sum_j \sigma_j(G), \qquad
        D = c\, UV^\top

    with c of this table, where a convolution (\*window, in, out) is the matrix (window · in, out):

    ============== ============================================ ==================================
    `shape_factor` c                                            who
    ============== ============================================ ==================================
    "spectral"     1                                            the ball of σ₁
    "muon"         max(1, fan-out / fan-in)^½                   Muon; Scion's "max"
    "moonlight"    0.2 max(fan-in, fan-out)^½                   Moonlight
    "rms_to_rms"   (fan-out / fan-in)^½                         the operator norm from RMS to RMS
    "scion"        (out / in)^½ / window                        Scion: the same for matrices, and
                                                                convolutions with their channels
    ============== ============================================ ==================================

    Args:
        shape_factor: A name of the table.
        orthogonalize: A function that gives UVᵀ of stacks (batch, rows, cols) with rows ≤ cols,
            some of which may be zero, each by itself and in its shape and dtype; by default an SVD.
            :func:`~dropmuon_jax.orthogonalize.newton_schulz` makes faster ones, whose accuracy
            `direction`, `argmin`, `sharp` and `dual_norm`, then ⟨G, D⟩, share.

    Raises:
        TypeError: If `orthogonalize` cannot be called.
        ValueError: If `shape_factor` is unknown.

    Examples:
        >>> import jax, dropmuon_jax as dm
        >>> norm = dm.norms.spectral_norm("rms_to_rms")
        >>> kernel = norm.init(jax.random.key(0), (2, 8))
        >>> print(norm.norm(kernel).round(5), (kernel @ kernel.T).round(3).diagonal())
        1.0 [4. 4.]

    References:
        Jordan et al., 2024; Liu et al., 2025, arXiv:2502.16982; Bernstein and Newhouse, 2024,
        arXiv:2410.21265; Pethick et al., 2025, arXiv:2502.07529. Scion's code initialises the
        positions of a convolution's window each orthogonally, which is a point of norm up to
        window^½; `init` stays on the sphere.
    """
    check_choice("shape_factor", shape_factor, SPECTRAL_FACTORS)
    if not (orthogonalize is None or callable(orthogonalize)) or orthogonalize is newton_schulz:
        raise TypeError(
            "orthogonalize must be a function from matrices to their polar factors, such as "
            "dm.orthogonalize.newton_schulz() with its parentheses, got "
            f"{describe(orthogonalize)}."
        )
    return Norm(f"spectral_norm({shape_factor!r})", spectral(orthogonalize), shape_factor)


def nuclear_norm() -> Norm:
    """The sum of the singular values; its steps have rank one, as in Frank-Wolfe for low rank.

    ‖X‖ = Σσ(X), ‖G‖* = σ₁(G), D = u₁v₁ᵀ, by an SVD.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.norms.nuclear_norm().argmin(jnp.diag(jnp.array([5.0, -0.5]))) + 0.0)
        [[-1. 0.]
         [ 0. 0.]]
    """
    return Norm("nuclear_norm()", _NUCLEAR, "one")


def sign_norm(*, normalized: bool = True) -> Norm:
    """The largest entry, times the fan-in: the norm of an output layer in Scion.

    ‖X‖ = fan-in · max|x|, ‖G‖* = Σ|g| / fan-in, D = sign(G) / fan-in; without `normalized` all of
    it without fan-in, which is signSGD. A vector has fan-in 1. A tied embedding (tokens, features)
    is an output layer of fan-in features: `dimension_numbers="out_in"`.

    Args:
        normalized: Whether fan-in enters: then ‖X‖ bounds every output of an input with entries up
            to 1.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.norms.sign_norm().argmin(jnp.array([[3.0], [-0.1]])))
        [[-0.5]
         [ 0.5]]

    References:
        Pethick et al., 2025 (Scion), arXiv:2502.07529, "Sign".
    """
    name = "sign_norm()" if normalized else "sign_norm(normalized=False)"
    return Norm(name, _MAXIMUM, "1/fan_in" if normalized else "one", "matrices and vectors")


def column_norm() -> Norm:
    """The largest root mean square of what one input gives: the norm of an embedding in Scion.

    A column is one of the papers' W = kernelᵀ, and so a *row* of a Flax kernel (in, out) and of an
    `nn.Embed` table (tokens, features): one vector of length fan-out for each input.
    ‖X‖ = max ‖column‖₂ / √fan-out, ‖G‖* = √fan-out Σ ‖column‖₂, D = √fan-out column / ‖column‖₂.
    The columns of tokens that a batch has not are zero in its gradient, and have direction zero.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.norms.column_norm().argmin(jnp.array([[3.0, 0.0, 4.0, 0.0]])) + 0.0)
        [[-1.2  0.  -1.6  0. ]]

    References:
        Pethick et al., 2025 (Scion), arXiv:2502.07529, "ColNorm".
    """
    return Norm("column_norm()", _COLUMNS, "sqrt(fan_out)")


def row_norm() -> Norm:
    """The largest output of an input with root mean square 1: Scion's other norm of a head.

    A row is one of the papers' W = kernelᵀ, and so a *column* of a Flax kernel (in, out): one
    vector of length fan-in for each output. ‖X‖ = √fan-in max ‖row‖₂, ‖G‖* = Σ ‖row‖₂ / √fan-in,
    D = row / (√fan-in ‖row‖₂).

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.norms.row_norm().argmin(jnp.array([[3.0], [0.0], [4.0], [0.0]])).T + 0.0)
        [[-0.3  0.  -0.4  0. ]]

    References:
        Pethick et al., 2025 (Scion), arXiv:2502.07529, "RowNorm".
    """
    return Norm("row_norm()", _ROWS, "1/sqrt(fan_in)")


def rms_norm() -> Norm:
    """The root mean square of a whole leaf: the norm of biases and scales in Scion.

    ‖x‖ = ‖x‖₂ / √d, ‖g‖* = √d ‖g‖₂, D = √d g / ‖g‖₂ for a leaf of d entries, of any shape: the
    biases of layers or heads that are stacked in one leaf share its ball. `init` gives zeros.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.norms.rms_norm().argmin(jnp.array([3.0, 0.0, 4.0, 0.0])) + 0.0)
        [-1.2  0.  -1.6  0. ]

    References:
        Pethick et al., 2025 (Scion), arXiv:2502.07529, "BiasRMS".
    """
    return Norm("rms_norm()", _EUCLIDEAN, "sqrt(size)", "whole leaves", starts_at_zero=True)


def euclidean_norm() -> Norm:
    """The Euclidean norm of a whole leaf, of any shape: normalised gradient descent.

    ‖x‖ = ‖x‖* = ‖x‖₂, D = g / ‖g‖₂, and the sharp operator is the identity.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.norms.euclidean_norm().argmin(jnp.array([3.0, 4.0])).round(3))
        [-0.6 -0.8]
    """
    return Norm("euclidean_norm()", _EUCLIDEAN, "one", "whole leaves")


def _largest_singular_value(x: Matrices) -> Lengths:
    """σ₁, from the smaller Gram matrix: as accurate as an SVD for the largest, and cheaper."""
    if x.size == 0:
        return jnp.zeros(len(x), x.dtype)
    y, exponent = to_unit_entries(finite_or_nan(x))
    y = y if x.shape[-2] <= x.shape[-1] else y.mT
    gram = jnp.matmul(y, y.mT, precision="highest")
    largest = jnp.maximum(jnp.linalg.eigvalsh(gram)[..., -1], 0)
    return jnp.where(largest == 0, 0, jnp.ldexp(_safe_sqrt(largest), exponent[..., 0, 0]))


def _singular_values(x: Matrices) -> Array:
    return thin_svd(x)[1]


def _first_singular_pair(g: Matrices) -> Matrices:
    if g.size == 0:
        return g
    u, s, vt = thin_svd(g)
    return jnp.where(s[..., :1, None] == 0, 0, u[..., :, :1] * vt[..., :1, :])


def _safe_sqrt(x: Array) -> Array:
    """√x, and 1 for 0, where the root has no derivative; the caller puts the zero back."""
    return jnp.sqrt(jnp.where(x == 0, 1, x))


def _length(x: Matrices, axes: int | tuple[int, int]) -> Array:
    """‖x‖₂ along axes, of numbers of any size."""
    y, exponent = to_unit_entries(x, axes)
    total = jnp.sum(y**2, axes)
    return jnp.where(total == 0, 0, jnp.ldexp(_safe_sqrt(total), jnp.squeeze(exponent, axes)))


def _unit(x: Matrices, axes: int | tuple[int, int]) -> Matrices:
    """x/‖x‖₂ along axes, of numbers of any size; zero for zero."""
    y, _ = to_unit_entries(x, axes)
    total = jnp.sum(y**2, axes, keepdims=True)
    return jnp.where(total == 0, 0, y / _safe_sqrt(total))


def _draw_rank_one(key: PRNGKeyArray, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    left, right = jax.random.split(key)
    column = _unit(jax.random.normal(left, (shape[0], 1), dtype), BOTH)
    return column * _unit(jax.random.normal(right, (1, shape[1]), dtype), BOTH)


def _draw_unit(axes: int | tuple[int, int]) -> Callable[..., Array]:
    return lambda key, shape, dtype: _unit(jax.random.normal(key, shape, dtype), axes)


# ‖X‖ = Σσ, ‖G‖* = σ₁, D = u₁v₁ᵀ.
_NUCLEAR = Geometry(
    norm=lambda x: _singular_values(x).sum(-1),
    dual_norm=_largest_singular_value,
    direction=_first_singular_pair,
    draw=_draw_rank_one,
)
# ‖X‖ = max |x|, ‖G‖* = Σ |g|, D = sign(G); |x| is written x sign(x), with the derivative 0 at 0.
_MAXIMUM = Geometry(
    norm=lambda x: jnp.max(x * jnp.sign(x), BOTH, initial=0),
    dual_norm=lambda g: jnp.sum(g * jnp.sign(g), BOTH),
    direction=jnp.sign,
    draw=lambda key, shape, dtype: jax.random.rademacher(key, shape).astype(dtype),
)
# A vector for each input, a column of the papers' W: ‖X‖ = max ‖x‖₂, ‖G‖* = Σ ‖g‖₂, D = g/‖g‖₂.
_COLUMNS = Geometry(
    norm=lambda x: jnp.max(_length(x, -1), -1, initial=0),
    dual_norm=lambda g: jnp.sum(_length(g, -1), -1),
    direction=lambda g: _unit(g, -1),
    draw=_draw_unit(-1),
)
# The same with a vector for each output, a row of the papers' W.
_ROWS = Geometry(
    norm=lambda x: jnp.max(_length(x, -2), -1, initial=0),
    dual_norm=lambda g: jnp.sum(_length(g, -2), -1),
    direction=lambda g: _unit(g, -2),
    draw=_draw_unit(-2),
)
# ‖X‖ = ‖X‖* = ‖X‖₂ of all entries, D = G/‖G‖₂.
_EUCLIDEAN = Geometry(
    norm=lambda x: _length(x, BOTH),
    dual_norm=lambda g: _length(g, BOTH),
    direction=lambda g: _unit(g, BOTH),
    draw=_draw_unit(BOTH),
)
