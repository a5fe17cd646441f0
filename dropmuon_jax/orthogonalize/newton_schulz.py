"""The Newton-Schulz iteration X ← p(X) on a stack of matrices.

X ← aX + b(XXᵀ)X + c(XXᵀ)²X maps every singular value x of X to p(x) = ax + bx³ + cx⁵ and leaves the
singular vectors alone. With R = XXᵀ and H = aI + bR + cR² it is X ← HX, R ← HRH, so that several
steps can be taken on the small R alone: Q ← QH, and X ← QX at the end of a segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dropmuon_jax._checks import check_choice, check_floating, describe
from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.orthogonalize.batches import to_unit_entries
from dropmuon_jax.orthogonalize.polynomials import (
    Coefficients,
    Polynomials,
    choose_segments,
    count_products,
    resolve_polynomials,
)

Product = Callable[[Float[Array, "*batch n k"], Float[Array, "*batch k m"]], Array]

DTYPES = ("float32", "bfloat16", "float16")
# Unit roundoffs of products of float32 at JAX's default precision: on a GPU and on a TPU.
TF32, BFLOAT16 = 2.0**-11, 2.0**-8
# From this size on two parts of a symmetric product are faster than the whole on a CPU: measured
# 1.10× at 768 and 1.19× at 1536 rows, and 0.96× at 512.
_SYMMETRIC_FROM = 768


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
    precision = _check_precision(precision)
    if dtype is not None:
        dtype = _check_dtype(dtype)
        if dtype == jnp.float16:
            _check_float16(polynomials)
    return NewtonSchulz(polynomials, dtype, precision)


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """What :func:`newton_schulz` makes: two with the same fields are one function to `jax.jit`."""

    polynomials: Polynomials
    dtype: np.dtype | None
    precision: jax.lax.Precision | None

    def __call__(self, x: Float[Array, "*batch rows cols"]) -> Float[Array, "*batch rows cols"]:
        """The polar factors of the matrices."""
        _check_matrices(x)
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
        segments = choose_segments(self.polynomials.eased(roundoff), num_rows, num_cols, roundoff)
        on_both = count_products(segments, num_rows, num_cols)
        on_gram = count_products(segments, num_rows, 0)
        return on_both - on_gram, on_gram


def _iterate(
    x: Float[Array, "*batch rows cols"], polynomials: Polynomials, products: Products
) -> Float[Array, "*batch rows cols"]:
    """X ← p(X) for each of the polynomials in turn."""
    roundoff, product, symmetric_product = products
    coefficients = polynomials.eased(roundoff)
    num_rows, num_cols = x.shape[-2:]
    identity = jnp.eye(num_rows, dtype=x.dtype).reshape((1,) * (x.ndim - 2) + (num_rows, num_rows))
    steps = iter(coefficients)
    for segment, length in enumerate(choose_segments(coefficients, num_rows, num_cols, roundoff)):
        gram, q = symmetric_product(x, x.mT), identity
        scale = _SCALES[polynomials.preconditioning](gram) if segment == 0 else None
        if scale is not None:
            gram = scale * gram * scale.mT
        for step in range(length):
            a, b, c = next(steps)
            h = a * identity + b * gram
            h = h + c * symmetric_product(gram, gram) if c else h
            q = symmetric_product(q, h) if step else h
            if step + 1 < length:
                gram = symmetric_product(symmetric_product(gram, h), h)
        x = product(q if scale is None else q * scale.mT, x)
    return x


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
    symmetric_product: Product
    """AB, where it is known to be symmetric."""


def cpu_products(dtype: Any) -> Products:
    """The products of a CPU, where float32 is multiplied in full, whatever precision is set."""
    accumulator, info = np.promote_types(dtype, np.float32), jnp.finfo(dtype)

    def product(a: Array, b: Array) -> Array:
        # XLA's CPU backend sums products of bfloat16 in float32 for some shapes only, and has none
        # for the others (jax 0.10): round, then multiply in float32, for the same result.
        if dtype != accumulator:
            a, b = (jax.lax.reduce_precision(x, info.nexp, info.nmant) for x in (a, b))
        return jnp.matmul(a.astype(accumulator), b.astype(accumulator))

    def symmetric_product(a: Array, b: Array) -> Array:
        if a.shape[-1] == a.shape[-2] >= _SYMMETRIC_FROM:
            return _in_parts(a, b, product)
        return product(a, b)

    return Products(_roundoff(dtype), product, symmetric_product)


def accelerator_products(
    dtype: Any, precision: jax.lax.Precision | None, float32_roundoff: float
) -> Products:
    """The products of a GPU or TPU, which round float32 unless the precision is the highest."""
    accumulator = np.promote_types(dtype, np.float32)

    def product(a: Array, b: Array) -> Array:
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.matmul(a, b, precision=precision, preferred_element_type=accumulator)

    rounded = dtype == jnp.float32 and precision is not jax.lax.Precision.HIGHEST
    return Products(float32_roundoff if rounded else _roundoff(dtype), product, product)


def _roundoff(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def _in_parts(a: Array, b: Array, product: Product) -> Array:
    """AB from its upper half and its lower right quarter: three quarters of the operations."""
    half = a.shape[-2] // 2
    top = product(a[..., :half, :], b)
    corner = product(a[..., half:, :], b[..., half:])
    bottom = jnp.concatenate([top[..., half:].mT, corner], axis=-1)
    return jnp.concatenate([top, bottom], axis=-2)


def _check_matrices(x: Any) -> None:
    """Error unless something is an array of matrices."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(
            f"newton_schulz orthogonalizes an array, got {describe(x)}. For a tree take "
            "newton_schulz_lmo."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        check_floating("the array to orthogonalize", x.dtype)
    if x.ndim < 2:
        raise ValueError(
            f"The array to orthogonalize must have shape (*batch, rows, cols), got {x.shape}."
        )


def _check_dtype(dtype: Any) -> np.dtype:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        raise TypeError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}.") from None
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {name!r}.")
    return jnp.dtype(dtype)


def _check_precision(precision: Any) -> jax.lax.Precision | None:
    if precision is None or isinstance(precision, jax.lax.Precision):
        return precision
    known = {level.name.lower(): level for level in jax.lax.Precision}
    name = str(precision).lower()
    check_choice("precision", name, known)
    return known[name]


def _check_float16(polynomials: Polynomials) -> None:
    """Error if a matrix of the iteration could exceed the largest number of float16."""
    limit = float(np.finfo(np.float16).max)
    if polynomials.preconditioning == "aol":
        raise ValueError(
            'preconditioning="aol" divides each row of a matrix by its own norm, and one of a '
            "small row overflows in float16. Take dtype=jnp.bfloat16 or float32, or another "
            "preconditioning."
        )
    eigenvalues = np.linspace(0, 1, 4001)
    for a, b, c in polynomials.coefficients:
        with np.errstate(over="ignore", invalid="ignore"):
            h = a + b * eigenvalues + c * eigenvalues**2
            eigenvalues = eigenvalues * h**2
        largest = max(np.abs(h).max(), eigenvalues.max())
        if not largest < limit:
            raise ValueError(
                f"With these coefficients the iteration reaches {largest:.1e}, which overflows in "
                "float16. Take dtype=jnp.bfloat16 or float32."
            )
