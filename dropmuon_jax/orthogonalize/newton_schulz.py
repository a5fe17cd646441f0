"""The Newton-Schulz iteration X ← p(X) on a stack of matrices.

X ← aX + b(XXᵀ)X + c(XXᵀ)²X maps every singular value x of X to p(x) = ax + bx³ + cx⁵ and leaves the
singular vectors alone. With R = XXᵀ and H = aI + bR + cR² it is X ← HX, R ← HRH, so that several
steps can be taken on the small R alone: Q ← QH, and X ← QX at the end of a segment. A polynomial of
degree 9 has H = (pI + qR + sR²)(…), one product more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.orthogonalize.batches import check_matrices, to_unit_entries
from dropmuon_jax.orthogonalize.coefficients import (
    Coefficients,
    check_float16,
    resolve_dtype,
    resolve_polynomials,
    resolve_precision,
)
from dropmuon_jax.orthogonalize.polynomials import (
    OddPolynomial,
    Polynomials,
    choose_segments,
    count_products,
    factors,
)

Product = Callable[[Float[Array, "*batch n k"], Float[Array, "*batch k m"]], Array]
# A symmetric matrix [[A, B], [Bᵀ, C]] whole, or as (A, B, C).
Symmetric = tuple[Array, ...]

# Unit roundoffs of products of float32 at JAX's default precision: on a GPU and on a TPU.
TF32, BFLOAT16 = 2.0**-11, 2.0**-8
# From this number of rows on symmetric matrices are faster in blocks on a CPU.
_BLOCKS_FROM = 384


@names_counterparts
def newton_schulz(
    coefficients: Coefficients = "polar_express",
    *,
    num_steps: int | None = None,
    preconditioning: str | None = None,
    dtype: Any = None,
    precision: jax.lax.Precision | str | None = None,
) -> NewtonSchulz:
    r"""The kernel of :func:`newton_schulz_lmo`: a function from matrices to their polar factors.

    The function takes an array of shape (\*batch, rows, cols) and returns one of the same shape,
    dtype and singular vectors, with singular values near 1. The arguments are those of
    :func:`newton_schulz_lmo`, where the accuracy and the references stand.

    Raises:
        ValueError: If `coefficients`, `num_steps`, `preconditioning`, `dtype` or `precision` are
            not among the known ones, or the iteration overflows in float16. The function raises it
            for an array with fewer than two axes.
        TypeError: If `num_steps` is no Python integer, or `dtype` no dtype. The function raises it
            for anything but an array of floating-point numbers.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> polar_factor = dm.orthogonalize.newton_schulz(num_steps=7)
        >>> print(polar_factor(jnp.array([[3.0, 0.0, 0.0], [0.0, -0.1, 0.0]])).round(3))
        [[ 1.  0.  0.]
         [ 0. -1.  0.]]
    """
    polynomials = resolve_polynomials(coefficients, num_steps, preconditioning)
    precision = resolve_precision(precision)
    if dtype is not None:
        dtype = resolve_dtype(dtype)
        if dtype == jnp.float16:
            check_float16(polynomials)
    return NewtonSchulz(polynomials, dtype, precision)


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """What :func:`newton_schulz` makes: two with the same fields are one function to `jax.jit`."""

    polynomials: Polynomials
    dtype: np.dtype | None
    precision: jax.lax.Precision | None

    def __call__(self, x: Float[Array, "*batch rows cols"]) -> Float[Array, "*batch rows cols"]:
        """The polar factors of the matrices."""
        check_matrices(x)
        result_dtype = x.dtype
        x = x.astype(np.promote_types(x.dtype, np.float32))
        arithmetic = x.dtype if self.dtype is None else self.dtype
        wide = x.shape[-2] <= x.shape[-1]
        x = x if wide else x.mT  # XXᵀ is the smaller of the two Gram matrices
        x = to_unit_entries(x)[0].astype(np.promote_types(arithmetic, np.float32))
        # One branch is traced for each platform; XLA compiles that of its own.
        polynomials, precision = self.polynomials, self.precision
        x = jax.lax.platform_dependent(
            x,
            cpu=lambda x: _iterate(x, polynomials, cpu_products(arithmetic)),
            tpu=lambda x: _iterate(
                x, polynomials, accelerator_products(arithmetic, precision, BFLOAT16)
            ),
            default=lambda x: _iterate(
                x, polynomials, accelerator_products(arithmetic, precision, TF32)
            ),
        )
        return (x if wide else x.mT).astype(result_dtype)

    def multiplications(self, num_rows: int, num_cols: int) -> tuple[int, int]:
        """The multiplications for one matrix in products with a longer side, and in square ones.

        They are counted for a processor that rounds as `dtype` does.
        """
        num_rows, num_cols = sorted((num_rows, num_cols))
        roundoff = _roundoff(self.dtype or np.float32)
        coefficients = self.polynomials.eased(roundoff)
        segments = choose_segments(coefficients, num_rows, num_cols, roundoff)
        on_both = count_products(coefficients, segments, num_rows, num_cols)
        on_gram = count_products(coefficients, segments, num_rows, 0)
        return on_both - on_gram, on_gram


def _iterate(
    x: Float[Array, "*batch rows cols"], polynomials: Polynomials, products: Products
) -> Float[Array, "*batch rows cols"]:
    """X ← p(X) for each of the polynomials in turn."""
    roundoff, product, split = products
    coefficients = polynomials.eased(roundoff)
    num_rows, num_cols = x.shape[-2:]
    identity = jnp.eye(num_rows, dtype=x.dtype).reshape((1,) * (x.ndim - 2) + (num_rows, num_rows))
    identity = split(identity)
    steps = iter(coefficients)
    for segment, length in enumerate(choose_segments(coefficients, num_rows, num_cols, roundoff)):
        gram, q, scale = _gram(x, product, len(identity)), identity, None
        if segment == 0:
            whole = _join(gram)
            scale = _SCALES[polynomials.preconditioning](whole)
            gram = split(scale * whole * scale.mT)
        for step in range(length):
            h = _polynomial(next(steps), gram, identity, product)
            q = _multiply(q, h, product) if step else h
            if step + 1 < length:
                gram = _multiply(_multiply(gram, h, product), h, product)
        whole = _join(q)
        x = product(whole if scale is None else whole * scale.mT, x)
    return x


def _polynomial(
    step: OddPolynomial, gram: Symmetric, identity: Symmetric, product: Product
) -> Symmetric:
    """H = h(R), with p(x) = x h(x²)."""
    first, second = factors(step)
    powers = [identity, gram]
    if len(first) > 2:
        powers.append(_multiply(gram, gram, product))
    h = _combine(first, powers)
    if second is not None:
        h = _multiply(h, _combine(second, powers), product)
    return h


# --- Symmetric matrices ---------------------------------------------------------------------------
#
# Polynomials of one symmetric matrix R commute, so that their products are symmetric as well: in
# blocks they take six products of half the size rather than eight, and nothing is copied.


def _join(blocks: Symmetric) -> Float[Array, "*batch n n"]:
    """The whole matrix."""
    if len(blocks) == 1:
        return blocks[0]
    a, b, c = blocks
    top, bottom = jnp.concatenate([a, b], axis=-1), jnp.concatenate([b.mT, c], axis=-1)
    return jnp.concatenate([top, bottom], axis=-2)


def _gram(x: Float[Array, "*batch n k"], product: Product, num_blocks: int) -> Symmetric:
    """XXᵀ, in as many blocks."""
    if num_blocks == 1:
        return (product(x, x.mT),)
    half = x.shape[-2] // 2
    top, bottom = x[..., :half, :], x[..., half:, :]
    return product(top, top.mT), product(top, bottom.mT), product(bottom, bottom.mT)


def _multiply(x: Symmetric, y: Symmetric, product: Product) -> Symmetric:
    """XY, of matrices that commute."""
    if len(x) == 1:
        return (product(x[0], y[0]),)
    (a, b, c), (d, e, f) = x, y
    return (
        product(a, d) + product(b, e.mT),
        product(a, e) + product(b, f),
        product(b.mT, e) + product(c, f),
    )


def _combine(coefficients: Sequence[float], matrices: Sequence[Symmetric]) -> Symmetric:
    """The sum of as many of the matrices as there are coefficients, times these."""
    pairs = list(zip(coefficients, matrices, strict=False))
    return tuple(
        sum((c * matrix[i] for c, matrix in pairs[1:]), pairs[0][0] * pairs[0][1][i])
        for i in range(len(matrices[0]))
    )


# --- The start ------------------------------------------------------------------------------------


def _safe_rsqrt(x: Array) -> Array:
    """1/√x, and 0 for 0 with the derivative 0, so that zero matrices have zero derivatives."""
    return jnp.where(x == 0, 0, jax.lax.rsqrt(jnp.where(x == 0, 1, x)))


def _safe_sqrt(x: Array) -> Array:
    return x * _safe_rsqrt(x)


# From XXᵀ, what the rows of X are multiplied by so that its singular values are at most 1.
_SCALES: dict[str, Callable[[Array], Array]] = {
    # 1 / ‖X‖_F, with ‖X‖_F² = tr XXᵀ.
    "frobenius": lambda gram: _safe_rsqrt(
        jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None],
    ),
    # 1 / ‖X‖_S4, with ‖X‖_S4² = ‖XXᵀ‖_F (Grishina et al., 2025, arXiv:2506.10935): no larger than
    # the Frobenius norm, smaller by up to rows^¼.
    "schatten": lambda gram: _safe_rsqrt(
        _safe_sqrt(jnp.sum(gram * gram, axis=(-2, -1), keepdims=True))
    ),
    # One factor a row, (Σ_j |XXᵀ|_ij)^-½ (Boissin et al., 2025, arXiv:2512.04632): what is
    # orthogonalized is then diag(s)X, whose polar factor is not that of X.
    "aol": lambda gram: _safe_rsqrt(jnp.sum(jnp.abs(gram), axis=-1, keepdims=True)),
}


class Products(NamedTuple):
    """How matrices of a dtype are multiplied on a platform, and how that rounds."""

    roundoff: float
    """Unit roundoff of the factors; sums are in float32 at least."""
    product: Product
    """AB."""
    split: Callable[[Array], Symmetric]
    """A symmetric matrix in the blocks in which it is multiplied."""


def cpu_products(dtype: Any) -> Products:
    """The products of a CPU, where float32 is multiplied in full, whatever precision is set."""
    accumulator, info = np.promote_types(dtype, np.float32), jnp.finfo(dtype)

    def product(a: Array, b: Array) -> Array:
        # XLA's CPU backend sums products of bfloat16 in float32 for some shapes only, and has none
        # for the others (jax 0.10): round, then multiply in float32, for the same result.
        if dtype != accumulator:
            a, b = (jax.lax.reduce_precision(x, info.nexp, info.nmant) for x in (a, b))
        return jnp.matmul(a.astype(accumulator), b.astype(accumulator))

    return Products(_roundoff(dtype), product, _split_on_cpu)


def accelerator_products(
    dtype: Any, precision: jax.lax.Precision | None, float32_roundoff: float
) -> Products:
    """The products of a GPU or TPU, which round float32 unless the precision is the highest."""
    accumulator = np.promote_types(dtype, np.float32)

    def product(a: Array, b: Array) -> Array:
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.matmul(a, b, precision=precision, preferred_element_type=accumulator)

    rounded = dtype == jnp.float32 and precision is not jax.lax.Precision.HIGHEST
    return Products(
        float32_roundoff if rounded else _roundoff(dtype), product, lambda matrix: (matrix,)
    )


def _roundoff(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def _split_on_cpu(matrix: Array) -> Symmetric:
    size = matrix.shape[-1]
    if size < _BLOCKS_FROM:
        return (matrix,)
    half = size // 2
    return matrix[..., :half, :half], matrix[..., :half, half:], matrix[..., half:, half:]
